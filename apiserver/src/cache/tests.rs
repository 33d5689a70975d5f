use minipod_proto::v1::{Pod, watch_event::Type};

use super::*;
use crate::storage::RawEvent;

fn cache(limits: Limits) -> Arc<Cache> {
    let cache = Cache::new(limits, &Registry::default());
    cache.replace(Vec::new(), 10);
    cache
}

fn pod_bytes(name: &str, node: &str, app: &str) -> Vec<u8> {
    let mut pod = Pod::default();
    let meta = pod.metadata.get_or_insert_default();
    meta.name = name.into();
    meta.namespace = "d".into();
    meta.uid = format!("uid-{name}");
    meta.labels.insert("app".into(), app.into());
    pod.spec_mut().node_name = node.into();
    Object::from(pod).encode_inner()
}

fn put(revision: i64, name: &str, node: &str, app: &str) -> RawEvent {
    let key = crate::keys::object(Kind::Pod, &format!("d/{name}"));
    RawEvent { key, value: Some(pod_bytes(name, node, app)), revision }
}

fn gone(revision: i64, name: &str) -> RawEvent {
    RawEvent { key: crate::keys::object(Kind::Pod, &format!("d/{name}")), value: None, revision }
}

fn pods(namespace: &str, labels: &str, fields: &str) -> Filter {
    Filter::parse(Kind::Pod, namespace, labels, fields).expect("good selectors")
}

/// `+name@object-revision>resume`, `~` changed, `-` gone, `=` bookmark.
fn shown(deliveries: &[Delivery]) -> String {
    let one = |delivery: &Delivery| {
        let sign = match delivery.kind {
            Type::Added => '+',
            Type::Modified => '~',
            Type::Deleted => '-',
            Type::Bookmark => '=',
            Type::Unknown => '?',
        };
        let entry = delivery.entry.as_ref();
        let object =
            entry.map(|entry| format!("{}@{}", entry.object.meta().name, entry.object.meta().resource_version));
        format!("{sign}{}>{}", object.unwrap_or_default(), delivery.revision)
    };
    deliveries.iter().map(one).collect::<Vec<_>>().join(" ")
}

async fn next(subscription: &mut Subscription) -> String {
    let next = tokio::time::timeout(Duration::from_secs(5), subscription.next()).await.expect("an event within 5 s");
    match next {
        Ok(deliveries) => shown(&deliveries),
        Err(cut) => format!("{cut:?}"),
    }
}

fn idle(subscription: &mut Subscription) -> bool {
    subscription.backlog.is_empty() && subscription.queue.is_empty()
}

#[tokio::test]
async fn present_objects_then_changes() {
    let cache = cache(Limits::default());
    cache.apply(vec![put(11, "a", "", "x"), put(12, "b", "", "x")], 12);
    let mut all = cache.subscribe(Kind::Pod, pods("", "", ""), 0).expect("opens");
    assert_eq!(next(&mut all).await, "+a@11>0 +b@12>0 =>12");
    cache.apply(vec![put(13, "a", "", "x"), gone(14, "b"), put(15, "c", "", "x")], 15);
    assert_eq!(next(&mut all).await, "~a@13>13");
    assert_eq!(next(&mut all).await, "-b@14>14");
    assert_eq!(next(&mut all).await, "+c@15>15");
    cache.bookmark();
    assert_eq!(next(&mut all).await, "=>15");
    // What is told again after a broken feed changes nothing.
    cache.apply(vec![put(13, "a", "", "x"), gone(14, "b")], 15);
    assert!(idle(&mut all));
    assert_eq!(cache.get(Kind::Pod, "d/a").expect("there").revision, 13);
}

#[tokio::test]
async fn resumed_without_a_gap_also_inside_a_transaction() {
    let cache = cache(Limits::default());
    cache.apply(vec![put(11, "a", "", "x"), put(12, "b", "", "x"), put(12, "c", "", "x"), put(12, "d", "", "x")], 12);
    let mut all = cache.subscribe(Kind::Pod, pods("", "", ""), 10).expect("opens");
    assert_eq!(next(&mut all).await, "+a@11>11");
    // Only the last event of revision 12 lets a watcher resume behind it.
    assert_eq!(next(&mut all).await, "+b@12>11 +c@12>11 +d@12>12");
    let mut again = cache.subscribe(Kind::Pod, pods("", "", ""), 11).expect("opens");
    assert_eq!(next(&mut again).await, "+b@12>11 +c@12>11 +d@12>12");
    let mut after = cache.subscribe(Kind::Pod, pods("", "", ""), 12).expect("opens");
    assert!(idle(&mut after));
    // A revision that this server has not seen yet: what comes up to it is not for this watcher.
    let mut future = cache.subscribe(Kind::Pod, pods("", "", ""), 14).expect("opens");
    cache.apply(vec![put(13, "e", "", "x"), put(14, "f", "", "x"), put(15, "g", "", "x")], 15);
    assert_eq!(next(&mut future).await, "+g@15>15");
    assert_eq!(next(&mut after).await, "+e@13>13");
}

#[tokio::test]
async fn selectors_turn_changes_into_arrivals_and_departures() {
    let cache = cache(Limits::default());
    let mut x = cache.subscribe(Kind::Pod, pods("", "app=x", ""), 10).expect("opens");
    let mut node = cache.subscribe(Kind::Pod, pods("", "", "spec.nodeName=n"), 10).expect("opens");
    let mut elsewhere = cache.subscribe(Kind::Pod, pods("other", "", ""), 10).expect("opens");
    cache.apply(
        vec![
            put(11, "a", "", "y"),
            put(12, "a", "", "x"),
            put(13, "a", "n", "x"),
            put(14, "a", "n", "y"),
            gone(15, "a"),
        ],
        15,
    );
    assert_eq!(next(&mut x).await, "+a@12>12");
    assert_eq!(next(&mut x).await, "~a@13>13");
    assert_eq!(next(&mut x).await, "-a@14>14");
    assert_eq!(next(&mut node).await, "+a@13>13");
    assert_eq!(next(&mut node).await, "~a@14>14");
    assert_eq!(next(&mut node).await, "-a@15>15");
    assert!(idle(&mut x) && idle(&mut node) && idle(&mut elsewhere));
    assert_eq!(cache.pods_of("n").len(), 0);
}

#[tokio::test]
async fn a_slow_watcher_is_cut_and_can_resume() {
    let cache = cache(Limits { history: 100, queue: 2 });
    let mut slow = cache.subscribe(Kind::Pod, pods("", "", ""), 10).expect("opens");
    let mut other = cache.subscribe(Kind::Pod, pods("d", "", ""), 10).expect("opens");
    for revision in 11..=12 {
        cache.apply(vec![put(revision, "a", "", "x")], revision);
    }
    assert_eq!(next(&mut other).await, "+a@11>11");
    assert_eq!(next(&mut other).await, "~a@12>12");
    cache.apply(vec![put(13, "a", "", "x")], 13);
    assert_eq!(next(&mut other).await, "~a@13>13", "the slow one blocks nobody");
    assert_eq!(next(&mut slow).await, "+a@11>11");
    assert_eq!(next(&mut slow).await, "~a@12>12");
    assert_eq!(slow.next().await.expect_err("cut"), Cut::Slow { resume: 12 });
    let mut resumed = cache.subscribe(Kind::Pod, pods("", "", ""), 12).expect("opens");
    assert_eq!(next(&mut resumed).await, "~a@13>13");
}

#[tokio::test]
async fn what_is_forgotten_cannot_be_resumed() {
    let cache = cache(Limits { history: 2, queue: 8 });
    cache.apply((11..=15).map(|revision| put(revision, "a", "", "x")).collect(), 15);
    let refused = cache.subscribe(Kind::Pod, pods("", "", ""), 12).err().expect("too old").to_string();
    assert!(refused.contains("oldest resumable revision is 13"), "{refused}");
    let mut oldest = cache.subscribe(Kind::Pod, pods("", "", ""), 13).expect("opens");
    assert_eq!(next(&mut oldest).await, "~a@14>14");
    // A list after a gap: nobody can be told what happened in between.
    cache.replace(Vec::new(), 40);
    assert_eq!(next(&mut oldest).await, "~a@15>15");
    assert_eq!(oldest.next().await.expect_err("cut"), Cut::Relisted { oldest: 40 });
    assert!(cache.subscribe(Kind::Pod, pods("", "", ""), 39).is_err());
    assert!(cache.subscribe(Kind::Pod, pods("", "", ""), 40).is_ok());
}

#[tokio::test]
async fn a_dropped_watch_leaves_nothing() {
    let cache = cache(Limits::default());
    for fields in ["", "spec.nodeName=n"] {
        drop(cache.subscribe(Kind::Pod, pods("d", "", fields), 10).expect("opens"));
    }
    assert_eq!(cache.metrics.watchers.value(), 0);
    let state = cache.read();
    assert!(state.kind(Kind::Pod).is_unwatched());
}

#[test]
fn a_spec_is_as_old_as_its_generation() {
    let cache = cache(Limits::default());
    cache.apply(vec![put(11, "a", "", "x"), put(12, "a", "", "y")], 12);
    assert_eq!(cache.get(Kind::Pod, "d/a").expect("there").spec_revision, 11, "labels are not the spec");
    let mut pod = Pod::decode_from(&pod_bytes("a", "", "x"));
    pod.metadata.get_or_insert_default().generation = 2;
    let value = Some(Object::from(pod).encode_inner());
    cache.apply(vec![RawEvent { key: crate::keys::object(Kind::Pod, "d/a"), value, revision: 13 }], 13);
    assert_eq!(cache.get(Kind::Pod, "d/a").expect("there").spec_revision, 13);
}

trait DecodeFrom: Sized {
    fn decode_from(bytes: &[u8]) -> Self;
}

impl DecodeFrom for Pod {
    fn decode_from(bytes: &[u8]) -> Pod {
        prost::Message::decode(bytes).expect("it decodes")
    }
}

#[test]
fn news_are_what_has_happened_since() {
    let cache = cache(Limits { history: 2, ..Limits::default() });
    let told = |news: News| match news {
        News::Changes(changes, at) => format!("{} changes up to {at}", changes.len()),
        News::All(all, at) => format!("all {} at {at}", all.len()),
    };
    cache.apply(vec![put(11, "a", "", "web"), put(12, "b", "n1", "web")], 12);
    assert_eq!(told(cache.news(Kind::Pod, 10)), "2 changes up to 12");
    assert_eq!(told(cache.news(Kind::Pod, 12)), "0 changes up to 12");
    assert_eq!(told(cache.news(Kind::Node, 10)), "0 changes up to 12");
    cache.apply(vec![put(13, "c", "n1", "web")], 13);
    assert_eq!(told(cache.news(Kind::Pod, 11)), "2 changes up to 13");
    assert_eq!(told(cache.news(Kind::Pod, 10)), "all 2 at 13", "those that are bound");
}

#[test]
fn labels_of_namespaces_have_a_revision() {
    let cache = cache(Limits::default());
    assert_eq!(cache.namespaces_relabelled(), 10);
    let namespace = |revision, team: &str, note: &str| {
        let mut namespace = minipod_proto::v1::Namespace::default();
        let meta = namespace.metadata.get_or_insert_default();
        meta.name = "d".into();
        meta.labels.insert("team".into(), team.into());
        meta.annotations.insert("note".into(), note.into());
        let value = Some(Object::from(namespace).encode_inner());
        RawEvent { key: crate::keys::object(Kind::Namespace, "d"), value, revision }
    };
    for (revision, team, note, want) in [(11, "x", "", 11), (12, "x", "seen", 11), (13, "y", "seen", 13)] {
        cache.apply(vec![namespace(revision, team, note)], revision);
        assert_eq!(cache.namespaces_relabelled(), want);
    }
}

/// Whatever happens to pods and budgets, in whatever order, the counts are what counting anew would find.
#[test]
fn budgets_are_counted_as_if_anew() {
    use minipod_proto::{
        disruption::{Counted, Scope},
        v1::{LabelSelector, PodDisruptionBudget, PodDisruptionBudgetSpec, Time},
    };

    let cache = cache(Limits::default());
    let mut dice = crate::dice::Dice(7);
    let mut seen = [0; 3];
    for revision in 11..4_000 {
        let namespace = ["d", "e"][usize::from(dice.one_in(3))];
        let name = format!("x{}", dice.roll(12));
        let app = ["web", "db"][usize::from(dice.one_in(2))];
        let is_budget = dice.one_in(6);
        let (kind, mut object) = if is_budget {
            let present = cache.get(Kind::PodDisruptionBudget, &format!("{namespace}/{name}"));
            let mut budget = match present.and_then(|entry| entry.object.as_budget().cloned()) {
                // Its status alone.
                Some(present) if dice.one_in(2) => present,
                _ => {
                    let match_labels = [("app".to_owned(), app.to_owned())].into();
                    let selector =
                        Some(LabelSelector { match_labels, ..Default::default() }).filter(|_| !dice.one_in(9));
                    let mut budget = PodDisruptionBudget {
                        spec: Some(PodDisruptionBudgetSpec { selector, ..Default::default() }),
                        ..Default::default()
                    };
                    budget.metadata.get_or_insert_default().generation = revision;
                    budget
                }
            };
            budget.status.get_or_insert_default().expected_pods = 7;
            budget.metadata.get_or_insert_default().resource_version.clear();
            (Kind::PodDisruptionBudget, Object::from(budget))
        } else {
            let mut pod = Pod::default();
            pod.metadata.get_or_insert_default().labels.insert("app".into(), app.into());
            pod.metadata.get_or_insert_default().deletion_timestamp = dice.one_in(4).then(|| Time::from_unix(1, 0));
            pod.status_mut().phase = ["Running", "Succeeded"][usize::from(dice.one_in(4))].into();
            let ready = ["True", "False"][usize::from(dice.one_in(3))];
            pod.status_mut().set_condition("Ready", ready, "", "", Time::from_unix(1, 0));
            (Kind::Pod, Object::from(pod))
        };
        if let Some(meta) = object.meta_mut() {
            (meta.namespace, meta.name) = (namespace.into(), name.clone());
        }
        let key = crate::keys::object(kind, &format!("{namespace}/{name}"));
        let value = (!dice.one_in(5)).then(|| object.encode_inner());
        cache.apply(vec![RawEvent { key, value, revision }], revision);
        if dice.one_in(500) {
            // As after a gap: everything comes anew.
            let all = Kind::ALL.into_iter().flat_map(|kind| {
                let item = move |entry: Arc<Entry>| Item {
                    key: crate::keys::object(kind, &entry.key),
                    value: entry.inner.to_vec(),
                    revision: entry.revision,
                };
                cache.all(kind).into_iter().map(item).collect::<Vec<_>>()
            });
            let all = all.collect();
            cache.replace(all, revision);
            seen[2] += 1;
        }
        for entry in cache.all(Kind::PodDisruptionBudget) {
            let scope = Scope::of(entry.object.as_budget().expect("a budget")).expect("a selector");
            let pods = cache.all(Kind::Pod);
            let pods = pods.iter().filter_map(|entry| entry.object.as_pod()).filter(|pod| scope.has(pod));
            let anew = Counted::of(pods);
            assert_eq!(cache.counted(&entry), Some(anew), "revision {revision}: {}", entry.key);
            seen[usize::from(anew.healthy < anew.expected)] += 1;
        }
    }
    assert!(seen.iter().all(|count| *count > 2), "too little happened: {seen:?}");
}
