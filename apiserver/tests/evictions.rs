//! Evictions against a real etcd: however many are asked for at once, at however many servers, a budget is never overdrawn.

mod support;

use minipod_proto::{
    Resource,
    v1::{
        EvictRequest, LabelSelector, Object, Pod, PodDisruptionBudget, PodDisruptionBudgetSpec, PreemptRequest,
        ReportUnschedulableRequest, UpdateRequest, object,
        preempt_request::{Nominee, Victim},
        report_unschedulable_request,
    },
};
use support::*;
use tonic::Code;

const PODS: usize = 12;
const LEAST: i32 = 7;

fn budget(name: &str, least: i32) -> PodDisruptionBudget {
    let mut budget = PodDisruptionBudget::default();
    let meta = budget.meta_mut();
    (meta.name, meta.namespace) = (name.into(), "default".into());
    let selector = LabelSelector { match_labels: [("app".to_owned(), "web".to_owned())].into(), ..Default::default() };
    budget.spec = Some(PodDisruptionBudgetSpec {
        min_available: Some(least.into()),
        selector: Some(selector),
        ..Default::default()
    });
    budget
}

fn evict(pod: &str) -> EvictRequest {
    EvictRequest { namespace: "default".into(), pod: pod.into(), ..EvictRequest::default() }
}

/// A pod that runs and is ready, as its node would say.
async fn running(server: &Server, name: &str) -> Pod {
    let mut made = pod(name, "10m", "1Mi");
    made.meta_mut().labels.insert("app".into(), "web".into());
    made.spec_mut().node_name = "n".into();
    let mut objects = server.objects().await;
    // Binding is the schedulers': the pod is made without its node.
    made.spec_mut().node_name.clear();
    let made = Pod::try_from(objects.create(create(made)).await.expect("created").into_inner()).expect("a pod");
    let item = minipod_proto::v1::bind_batch_request::Item {
        namespace: "default".into(),
        pod: name.into(),
        uid: made.uid().into(),
        revision: 0,
        node: "n".into(),
    };
    let request = minipod_proto::v1::BindBatchRequest { items: vec![item], ..Default::default() };
    let bound = server.scheduling().await.bind_batch(request).await.expect("bound").into_inner();
    assert_eq!(bound.results[0].code, 0, "{bound:?}");
    set_ready(server, name, true).await
}

async fn set_ready(server: &Server, name: &str, ready: bool) -> Pod {
    let mut objects = server.objects().await;
    let now = objects.get(get("Pod", "default", name)).await.expect("it is there").into_inner();
    let mut pod = Pod::try_from(now).expect("a pod");
    pod.meta_mut().resource_version.clear();
    pod.status_mut().phase = "Running".into();
    let at = minipod_proto::v1::Time::from_unix(1, 0);
    pod.status_mut().set_condition("Ready", if ready { "True" } else { "False" }, "", "", at);
    let request = UpdateRequest { object: Some(pod.into()), dry_run: false };
    Pod::try_from(objects.update_status(request).await.expect("written").into_inner()).expect("a pod")
}

async fn allowed(server: &Server, name: &str, want: i32) -> PodDisruptionBudget {
    eventually(&format!("the budget {name} allows {want}"), || async {
        let object = server.objects().await.get(get("PodDisruptionBudget", "default", name)).await;
        let object = object.map_err(|status| status.to_string())?.into_inner();
        match object.kind {
            Some(object::Kind::PodDisruptionBudget(budget))
                if budget.status.as_ref().is_some_and(|status| status.disruptions_allowed == want) =>
            {
                Ok(budget)
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn evictions_at_once_never_overdraw_a_budget() {
    let cluster = Cluster::start().await;
    let (server, second) = (&cluster.server, Server::start(config(&cluster.etcd)).await);
    register(server, node("n", "4", "4Gi", "100")).await;
    for at in 0..PODS {
        running(server, &format!("p{at}")).await;
    }
    server.objects().await.create(create(budget("web", LEAST))).await.expect("created");
    let seen = allowed(server, "web", PODS as i32 - LEAST).await;
    let status = seen.status.expect("a status");
    assert_eq!((status.expected_pods, status.current_healthy, status.desired_healthy), (12, 12, 7));
    assert_eq!(status.conditions[0].reason, "SufficientPods");

    let all = (0..PODS).map(|at| {
        let server = if at % 2 == 0 { server } else { &second };
        async move { server.objects().await.evict(evict(&format!("p{at}"))).await }
    });
    let answers = futures_util::future::join_all(all).await;
    let refused: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert_eq!(refused.len(), LEAST as usize, "{answers:?}");
    for status in refused {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        let want = "the disruption budget web needs 7 healthy pods and has 7 currently";
        assert!(status.message().contains(want), "{}", status.message());
    }
    let evicted: Vec<Object> = answers.into_iter().flatten().filter_map(|answer| answer.into_inner().object).collect();
    for object in &evicted {
        let pod = object.as_pod().expect("a pod");
        assert!(pod.is_terminating(), "it gets its grace: {pod:?}");
        let target = pod.condition("DisruptionTarget").expect("the condition");
        assert_eq!((target.status.as_str(), target.reason.as_str()), ("True", "EvictionByEvictionAPI"));
    }
    allowed(server, "web", 0).await;

    // What its node says of a pod that ends does not take the condition away.
    let ending = evicted[0].meta().name.clone();
    let told = set_ready(server, &ending, false).await;
    assert!(told.condition_true("DisruptionTarget"));
    // One that is ending already may be evicted again; nothing is taken for it.
    server.objects().await.evict(evict(&ending)).await.expect("it goes anyway");
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_budgets_say_of_pods_that_are_not_ready() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    register(server, node("n", "4", "4Gi", "100")).await;
    for name in ["a", "b", "c"] {
        running(server, name).await;
    }
    let mut objects = server.objects().await;
    objects.create(create(budget("web", 2))).await.expect("created");
    allowed(server, "web", 1).await;
    let dry = EvictRequest { dry_run: true, ..evict("a") };
    objects.evict(dry).await.expect("it would be allowed");
    allowed(server, "web", 1).await;

    // The budget has what it wants: the one that is not ready is no loss.
    set_ready(server, "c", false).await;
    allowed(server, "web", 0).await;
    let refused = objects.evict(evict("a")).await.expect_err("two must stay ready");
    assert_eq!(refused.code(), Code::ResourceExhausted);
    // With fewer than it wants, one that is not ready may be about to help.
    set_ready(server, "b", false).await;
    let refused = objects.evict(evict("c")).await.expect_err("it is missing already");
    assert!(refused.message().contains("needs 2 healthy pods and has 1 currently"), "{}", refused.message());
    let mut always = budget("web", 2);
    always.spec_mut().unhealthy_pod_eviction_policy = "AlwaysAllow".into();
    let request = UpdateRequest { object: Some(always.into()), dry_run: false };
    objects.update(request).await.expect("changed");
    objects.evict(evict("c")).await.expect("whatever the budget has");

    let wrong = EvictRequest { uid: "another".into(), ..evict("a") };
    assert_eq!(objects.evict(wrong).await.expect_err("another pod is meant").code(), Code::FailedPrecondition);
    assert_eq!(objects.evict(evict("nobody")).await.expect_err("there is none").code(), Code::NotFound);
    // A deletion asks no budget.
    objects.delete(delete("Pod", "default", "a")).await.expect("deleted");
    let mut both = budget("both", 1);
    both.spec_mut().max_unavailable = Some(1.into());
    let refused = objects.create(create(both)).await.expect_err("one of them");
    assert!(refused.message().contains("spec.maxUnavailable"), "{}", refused.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn preemption_marks_with_grace_and_says_why() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    register(server, node("n", "4", "4Gi", "100")).await;
    let victim = running(server, "low").await;
    let victims = vec![
        Victim { namespace: "default".into(), pod: "low".into(), uid: victim.uid().into() },
        Victim { namespace: "default".into(), pod: "gone".into(), uid: "gone".into() },
    ];
    let high = server.objects().await.create(create(pod("high", "4", "1Mi"))).await.expect("created").into_inner();
    let nominee = |node: &str, seen: &str| Nominee {
        namespace: "default".into(),
        pod: "high".into(),
        uid: high.meta().uid.clone(),
        node: node.into(),
        seen: seen.into(),
    };
    let request = PreemptRequest {
        victims,
        nominees: vec![nominee("n", "")],
        preemptor: "default/high".into(),
        scheduler: "default-scheduler".into(),
    };
    let mut scheduling = server.scheduling().await;
    let answer = scheduling.preempt(request.clone()).await.expect("done").into_inner();
    assert!(answer.failures.is_empty(), "{answer:?}");
    let now = server.objects().await.get(get("Pod", "default", "low")).await.expect("it has its grace").into_inner();
    let pod = now.as_pod().expect("a pod");
    assert_eq!(pod.meta().deletion_grace_period_seconds, Some(30));
    let target = pod.condition("DisruptionTarget").expect("the condition");
    assert_eq!(target.reason, "PreemptionByScheduler");
    assert!(target.message.contains("default/high"), "{}", target.message);
    let nominated = || async {
        let high = server.objects().await.get(get("Pod", "default", "high")).await.expect("it waits").into_inner();
        high.as_pod().expect("a pod").status().nominated_node_name.clone()
    };
    assert_eq!(nominated().await, "n");
    // Another scheduler that has decided on the same pod without knowing of this comes too late, and ends nobody.
    let other = running(server, "other").await;
    let victims = vec![Victim { namespace: "default".into(), pod: "other".into(), uid: other.uid().into() }];
    let late = PreemptRequest { victims: victims.clone(), nominees: vec![nominee("m", "")], ..request.clone() };
    let answer = scheduling.preempt(late).await.expect("answered").into_inner();
    assert!(answer.failures[0].message.contains("it is n"), "{answer:?}");
    let now = server.objects().await.get(get("Pod", "default", "other")).await.expect("it runs on").into_inner();
    assert!(now.meta().deletion_timestamp.is_none());
    // One that knows may change it; and it is taken back only by who knows it.
    let better = PreemptRequest { victims: vec![], nominees: vec![nominee("m", "n")], ..request.clone() };
    assert!(scheduling.preempt(better).await.expect("answered").into_inner().failures.is_empty());
    for (outdated, left) in [("n", "m"), ("m", "")] {
        let item = report_unschedulable_request::Item {
            namespace: "default".into(),
            pod: "high".into(),
            uid: high.meta().uid.clone(),
            reason: "Unschedulable".into(),
            message: "waits".into(),
            outdated_nomination: outdated.into(),
        };
        let report = ReportUnschedulableRequest { items: vec![item], scheduler: "s".into() };
        scheduling.report_unschedulable(report).await.expect("reported");
        assert_eq!(nominated().await, left, "{outdated}");
    }
    // A victim that is being ended already is no failure.
    let again = PreemptRequest { nominees: vec![], ..request };
    assert!(scheduling.preempt(again).await.expect("done").into_inner().failures.is_empty());
    eventually("an event says so", || async {
        let events =
            server.objects().await.list(list("Event")).await.map_err(|status| status.to_string())?.into_inner();
        let told = events.items.iter().filter_map(|object| match &object.kind {
            Some(object::Kind::Event(event)) => Some(event),
            _ => None,
        });
        let told: Vec<_> = told.filter(|event| event.reason == "Preempted").collect();
        match told.as_slice() {
            [one] if one.count == 1 && one.r#type == "Normal" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
}
