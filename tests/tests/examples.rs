//! The examples of deploy/examples on a cluster of real processes, checked in the API and in the kernel.

use std::collections::BTreeMap;
use std::time::Duration;

use minictl::local::{NodeOptions, Options};
use minipod_proto::v1::{ContainerStatus, Object, Pod};
use minipod_proto::{Resource, manifest};
use minipod_tests::cluster::{Cluster, bin_dir, example, image, pod, text};
use minipod_tests::registry::{Registry, free_port};
use minipod_tests::{kernel, wait};

/// The two machines of the examples: the app and its collector (1.5Gi) fit on node-b alone.
const NODES: [(&str, &str); 2] = [("node-a", "1.25Gi"), ("node-b", "2Gi")];

fn status<'a>(pod: &'a Pod, container: &str) -> &'a ContainerStatus {
    let statuses = pod.status().container_statuses.iter().chain(&pod.status().init_container_statuses);
    let mut found = statuses.filter(|status| status.name == container);
    found.next().unwrap_or_else(|| panic!("no status of {container} in {:#?}", pod.status()))
}

fn kill(process: &kernel::Process) {
    let killed = std::process::Command::new("kill").args(["-9", &process.pid.to_string()]).status();
    assert!(killed.expect("kill is there").success(), "{process:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn helloworld_four_containers_work_together_and_only_the_killed_one_restarts() {
    let cluster = Cluster::start(&NODES).await;
    let created = cluster.create(pod(&example("helloworld.yaml"))).await;
    cluster.until_phase("helloworld", "Running").await;
    wait::until("main to hear from api and compute", || async {
        let journal = cluster.logs("helloworld", "log").await?;
        let works = journal.contains("hello from api to request") && journal.contains("compute: 3 * 3 = 9");
        if works { Ok(()) } else { Err(journal) }
    })
    .await;

    let before = kernel::containers(created.uid());
    let names: Vec<&str> = before.keys().map(String::as_str).collect();
    assert_eq!(names, ["api", "compute", "log", "main"], "each container's own process is its PID 1: {before:#?}");
    let nets: Vec<u64> = before.values().map(|process| process.namespaces["net"]).collect();
    assert!(nets.windows(2).all(|pair| pair[0] == pair[1]), "one network namespace: {before:#?}");

    kill(&before["main"]);
    let again = wait::until("main to start again", || async {
        let pod = cluster.pod("helloworld").await?;
        let main = status(&pod, "main");
        let up = main.restart_count == 1 && main.ready;
        if up { Ok(pod) } else { Err(format!("{main:#?}")) }
    })
    .await;
    let last = status(&again, "main").last_state.clone().and_then(|state| state.terminated).expect("its end is told");
    assert_eq!((last.exit_code, last.signal), (137, 9), "{last:?}");
    let after = kernel::containers(created.uid());
    for name in ["api", "compute", "log"] {
        let (old, new) = (&before[name], after.get(name).unwrap_or_else(|| panic!("{name} is gone: {after:#?}")));
        assert_eq!((old.pid, old.start_ticks), (new.pid, new.start_ticks), "{name} must not notice");
        assert_eq!(status(&again, name).restart_count, 0, "{name}");
    }
    assert_ne!(before["main"].pid, after["main"].pid);
    cluster.delete_completely("helloworld").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn co_scheduling_binds_the_pod_whole_or_not_at_all() {
    let cluster = Cluster::start(&NODES).await;
    let manifest = pod(&example("co-scheduling.yaml"));
    for round in 0..5 {
        cluster.create(manifest.clone()).await;
        let running = cluster.until_phase("co-scheduling", "Running").await;
        assert_eq!(running.node_name(), Some("node-b"), "round {round}");
        cluster.delete_completely("co-scheduling").await;
    }

    cluster.create(filler("filler", "1Gi", "node-b")).await;
    cluster.until_phase("filler", "Running").await;
    cluster.create(manifest.clone()).await;
    let pending = wait::until("the pod to be told unschedulable", || async {
        let pod = cluster.pod("co-scheduling").await?;
        let told = pod.condition("PodScheduled").is_some_and(|condition| condition.reason == "Unschedulable");
        if told { Ok(pod) } else { Err(format!("{:#?}", pod.status())) }
    })
    .await;
    let reason = pending.condition("PodScheduled").map(|condition| condition.message.clone()).unwrap_or_default();
    for shortfall in ["node-a", "256Mi", "node-b", "512Mi"] {
        assert!(reason.contains(shortfall), "each node's shortfall is told, {shortfall} too: {reason}");
    }
    let why = cluster.minictl(&["why", "co-scheduling"]);
    assert!(text(&why.stdout).contains("node-a"), "{}{}", text(&why.stdout), text(&why.stderr));
    wait::stays("pending", Duration::from_secs(1), || async {
        let pod = cluster.pod("co-scheduling").await?;
        if pod.node_name().is_none() { Ok(()) } else { Err(format!("it is on {:?}", pod.node_name())) }
    })
    .await;

    // Nothing is reserved for it: what is free can be had to the last byte.
    cluster.create(filler("all-of-a", "1280Mi", "node-a")).await;
    cluster.create(filler("rest-of-b", "1Gi", "node-b")).await;
    cluster.until_phase("all-of-a", "Running").await;
    cluster.until_phase("rest-of-b", "Running").await;

    // And once there is room, it runs, without anybody asking again.
    cluster.delete_completely("filler").await;
    cluster.delete_completely("rest-of-b").await;
    let running = cluster.until_phase("co-scheduling", "Running").await;
    assert_eq!(running.node_name(), Some("node-b"));
    cluster.local.stop().expect("taken down");
}

/// A pod that takes exactly `memory` of a node.
fn filler(name: &str, memory: &str, node: &str) -> Pod {
    pod(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 0
  nodeSelector: {{kubernetes.io/hostname: {node}}}
  containers:
  - name: sleep
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, infinity]
    resources: {{requests: {{memory: {memory}}}, limits: {{memory: {memory}}}}}
"
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_data_one_volume_one_address_two_root_file_systems() {
    let cluster = Cluster::start(&NODES).await;
    let created = cluster.create(pod(&example("shared-data.yaml"))).await;
    let running = cluster.until_phase("shared-data", "Running").await;
    let ask = async |container: &str, command: &str| {
        let words = ["sh", "-c", command];
        wait::until(&format!("{container} to answer {command:?}"), || cluster.exec("shared-data", container, &words))
            .await
    };
    for shared in ["ip -o link show eth0", "ip -o -4 address show eth0", "wget -q -O - http://127.0.0.1/"] {
        assert_eq!(ask("reader", shared).await, ask("writer", shared).await, "{shared}");
    }
    let address = ask("reader", "ip -o -4 address show eth0").await;
    assert!(address.contains(&format!(" {}/", running.status().pod_ip)), "{address} is the pod's one address");
    assert_eq!(ask("reader", "cat /html/index.html").await, "hello from the writer\n");
    for (container, own) in [("reader", "reader\n"), ("writer", "writer\n")] {
        assert_eq!(ask(container, "cat /who-am-i").await, own, "the root file systems are distinct");
        let log = cluster.logs("shared-data", container).await.expect("it has a log");
        assert!(log.contains("I am PID 1"), "{log}");
    }
    let processes = kernel::containers(created.uid());
    for (name, shared) in [("net", true), ("ipc", true), ("uts", true), ("mnt", false), ("pid", false)] {
        let (reader, writer) = (processes["reader"].namespaces[name], processes["writer"].namespaces[name]);
        assert_eq!(reader == writer, shared, "namespace {name}: {processes:#?}");
    }
    let refused = cluster.exec("shared-data", "reader", &["touch", "/html/x"]).await.expect_err("read-only there");
    assert!(refused.contains("Read-only"), "{refused}");
    cluster.delete_completely("shared-data").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn init_order_one_after_the_other_and_a_failing_one_blocks_until_it_recovers() {
    let cluster = Cluster::start(&NODES).await;
    cluster.create(pod(&example("init-order.yaml"))).await;
    let running = cluster.until_phase("init-order", "Running").await;
    let log = wait::until("the app to say what it saw", || async {
        let log = cluster.logs("init-order", "app").await?;
        if log.is_empty() { Err("nothing yet".to_owned()) } else { Ok(log) }
    })
    .await;
    assert_eq!(log, "app: started after: first second third\n");
    let restarts: BTreeMap<&str, i32> =
        ["first", "second", "third", "app"].map(|name| (name, status(&running, name).restart_count)).into();
    assert_eq!(restarts, BTreeMap::from([("first", 0), ("second", 1), ("third", 0), ("app", 0)]));
    let time = |name: &str| {
        let state = status(&running, name).state.clone().expect("it has a state");
        let ended = state.terminated.map(|ended| (ended.started_at, ended.finished_at, ended.exit_code));
        ended.unwrap_or_else(|| panic!("{name} has not ended"))
    };
    let millis = |time: Option<minipod_proto::v1::Time>| time.expect("times are told").unix_ms();
    for (earlier, later) in [("first", "second"), ("second", "third")] {
        let ((_, end, code), (start, _, _)) = (time(earlier), time(later));
        assert_eq!(code, 0, "{earlier}");
        assert!(millis(end) <= millis(start), "{earlier} ends before {later} starts");
    }
    cluster.delete_completely("init-order").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn sidecar_starts_before_the_app_ends_after_it_and_does_not_hold_the_pod_open() {
    let cluster = Cluster::start(&NODES).await;
    cluster.create(pod(&example("sidecar.yaml"))).await;
    let done = cluster.until_phase("sidecar", "Succeeded").await;
    let ended = |name: &str| {
        let state = status(&done, name).state.clone().expect("it has a state");
        state.terminated.unwrap_or_else(|| panic!("{name} has not ended: {:#?}", done.status()))
    };
    let (app, collector) = (ended("app"), ended("log-collector"));
    let millis = |time: &Option<minipod_proto::v1::Time>| time.as_ref().expect("times are told").unix_ms();
    assert_eq!((app.exit_code, collector.exit_code), (0, 0));
    assert!(millis(&collector.started_at) <= millis(&app.started_at), "{collector:?} {app:?}");
    assert!(millis(&collector.finished_at) >= millis(&app.finished_at), "{collector:?} {app:?}");
    let log = cluster.logs("sidecar", "log-collector").await.expect("kept after the end");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.first(), Some(&"log-collector: ready before the app"), "{log}");
    assert!(log.contains("app: line 5 of 5"), "the last line is collected: {log}");
    assert_eq!(lines.last(), Some(&"log-collector: the app ended, 5 lines collected"), "{log}");
    cluster.delete_completely("sidecar").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ambassador_answers_for_an_app_that_listens_on_localhost_alone() {
    let cluster = Cluster::start(&NODES).await;
    cluster.create(pod(&example("ambassador.yaml"))).await;
    let served = wait::until("the pod to be ready", || async {
        let pod = cluster.pod("ambassador").await?;
        let ready = pod.condition("Ready").is_some_and(|condition| condition.status == "True");
        if ready { Ok(pod) } else { Err(format!("{:#?}", pod.status())) }
    })
    .await;
    cluster.create(filler("visitor", "64Mi", served.node_name().expect("it is bound"))).await;
    cluster.until_phase("visitor", "Running").await;
    let ask = async |port: u16| {
        let url = format!("http://{}:{port}/", served.status().pod_ip);
        cluster.exec("visitor", "sleep", &["wget", "-q", "-O", "-", &url]).await
    };
    for _ in 0..3 {
        assert_eq!(ask(80).await.as_deref(), Ok("hello from an app that knows only localhost\n"));
    }
    let refused = ask(8080).await.expect_err("the app itself is not to be reached");
    assert!(refused.contains("refused"), "{refused}");
    cluster.delete_completely("visitor").await;
    cluster.delete_completely("ambassador").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_gives_an_app_the_face_that_monitoring_expects() {
    let cluster = Cluster::start(&NODES).await;
    cluster.create(pod(&example("adapter.yaml"))).await;
    cluster.until_phase("adapter", "Running").await;
    let scrape = async |at_least: u64| {
        wait::until(&format!("{at_least} jobs done"), || async {
            let url = "http://127.0.0.1:9100/cgi-bin/metrics";
            let text = cluster.exec("adapter", "app", &["wget", "-q", "-O", "-", url]).await?;
            let done = text.lines().find_map(|line| line.strip_prefix("app_jobs_done_total "));
            match done.and_then(|number| number.parse::<u64>().ok()) {
                Some(done) if done >= at_least => Ok((done, text)),
                _ => Err(text),
            }
        })
        .await
    };
    let (first, text) = scrape(3).await;
    for line in ["# TYPE app_jobs_done_total counter", "# TYPE app_jobs_waiting gauge"] {
        assert!(text.contains(line), "{text}");
    }
    assert_eq!(first % 3, 0, "the app does three jobs at a time: {text}");
    // It is the app's present state, not a copy of the first.
    scrape(first + 3).await;
    cluster.delete_completely("adapter").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_war_comes_from_its_own_image_and_tomcat_serves_it() {
    let port = free_port();
    let nodes = NODES.map(|(name, memory)| NodeOptions::with_memory(name, memory)).into();
    let cluster = Cluster::start_with(Options { registry_port: Some(port), ..Options::new(bin_dir(), nodes) }).await;
    let gateway = cluster.local.names().expect("the cluster is up").gateway();
    let registry = Registry::at((gateway, port).into());
    for name in ["sample", "tomcat"] {
        // As they are: to compress some hundred megabytes for one pull would take longer than the pull.
        registry.push_as(&image(name), name, &["--preserve-digests"]);
    }

    cluster.create(pod(&example("tomcat-war.yaml"))).await;
    let served = cluster.until_phase("tomcat-war", "Running").await;
    assert!(registry.fetches().len() >= 4, "configs and layers were pulled: {:?}", registry.fetches());
    cluster.create(filler("visitor", "64Mi", served.node_name().expect("it is bound"))).await;
    cluster.until_phase("visitor", "Running").await;
    let ask = async |path: &str| {
        let url = format!("http://{}:8080{path}", served.status().pod_ip);
        cluster.exec("visitor", "sleep", &["wget", "-q", "-O", "-", &url]).await
    };
    assert_eq!(ask("/sample/").await.as_deref(), Ok("hello from a war that an init container brought\n"));
    for absent in ["/sample/WEB-INF/web.xml", "/"] {
        let refused = ask(absent).await.expect_err("Tomcat has nothing else to serve");
        assert!(refused.contains("404"), "{absent}: {refused}");
    }
    cluster.delete_completely("visitor").await;
    cluster.delete_completely("tomcat-war").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_ships_every_line_once_whoever_is_killed_on_the_way() {
    let cluster = Cluster::start(&NODES).await;
    let objects = manifest::parse(&example("log-shipping.yaml")).expect("a good manifest");
    let [sink, app]: [Object; 2] = objects.try_into().expect("sink and app");
    let [sink, app] = [sink, app].map(|object| Pod::try_from(object).expect("pods"));
    // Nobody has said where the sink is: the app works, and the collector waits.
    let app = cluster.create(app).await;
    cluster.until_phase("log-shipping", "Running").await;
    let sink = cluster.create(sink).await;
    let address = cluster.until_phase("log-sink", "Running").await.status().pod_ip.clone();
    let place = format!(
        "{{apiVersion: v1, kind: ConfigMap, metadata: {{name: log-sink}}, data: {{address: '{address}:9000'}}}}"
    );
    let [place]: [Object; 1] = manifest::parse(&place).expect("a good manifest").try_into().expect("one object");
    cluster.client().create_object(place, false).await.expect("the config map is created");

    let shipped = async || cluster.exec("log-sink", "sink", &["cat", &format!("/sink/{}", app.uid())]).await;
    let until_more = async |than: usize| {
        wait::until(&format!("more than {than} lines in the sink"), || async {
            let lines = shipped().await?.lines().count();
            if lines > than { Ok(lines) } else { Err(format!("{lines} lines")) }
        })
        .await
    };
    let mut lines = until_more(5).await;
    for (pod, container) in [(&app, "collector"), (&app, "app"), (&sink, "sink")] {
        let running = kernel::containers(pod.uid());
        let before = running.get(container).unwrap_or_else(|| panic!("{container} runs: {running:#?}"));
        kill(before);
        wait::until(&format!("{container} to run again"), || async {
            let running = kernel::containers(pod.uid());
            let again = running.get(container).is_some_and(|process| process.pid != before.pid);
            if again { Ok(()) } else { Err(format!("{running:#?}")) }
        })
        .await;
        lines = until_more(lines + 5).await;
    }

    // In good order: the collector outlives the app and ships its last words.
    cluster.delete("log-shipping").await;
    let text = shipped().await.expect("the sink keeps what it has");
    let mut lines: Vec<&str> = text.lines().collect();
    let last = lines.pop();
    let all: Vec<String> = (1..=lines.len()).map(|number| format!("app: line {number}")).collect();
    assert_eq!(lines, all, "every line once, and in order");
    assert_eq!(last, Some(format!("app: ended after line {}", all.len()).as_str()));
    // Only now: the log that the sink kept was called by the pod's uid.
    cluster.delete_completely("log-sink").await;
    cluster.leaves_nothing(&app).await;
    cluster.local.stop().expect("taken down");
}
