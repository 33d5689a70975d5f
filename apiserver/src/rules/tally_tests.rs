use minipod_proto::{
    Kind as ObjectKind,
    rules::Inclusion,
    selector::LabelSelector,
    v1::{Affinity, LabelSelector as Message, Node, Object, PodAffinityTerm, PodAntiAffinity, Taint, Time},
};
use std::collections::BTreeMap;

use super::*;
use crate::dice::Dice;

fn entry(kind: ObjectKind, object: Object) -> Arc<Entry> {
    let key = if kind == ObjectKind::Node { object.meta().name.clone() } else { object.key() };
    Arc::new(Entry::decode(kind, &key, &object.encode_inner(), 1).expect("it decodes"))
}

fn pod(dice: &mut Dice, name: &str) -> Arc<Entry> {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace) = (name.into(), format!("ns{}", dice.roll(2)));
    // Another one each time: of one and the same pod the rules do not change.
    meta.uid = dice.roll(u64::MAX).to_string();
    meta.labels.insert("app".into(), format!("a{}", dice.roll(2)));
    if dice.one_in(4) {
        meta.deletion_timestamp = Some(Time::from_unix(1, 0));
    }
    if dice.roll(3) > 0 {
        // One of them is never there.
        pod.spec_mut().node_name = format!("n{}", dice.roll(5));
    }
    if dice.one_in(4) {
        pod.status_mut().phase = "Succeeded".into();
    }
    if dice.one_in(2) {
        let match_labels = [("app".to_owned(), format!("a{}", dice.roll(2)))].into();
        let term = PodAffinityTerm {
            topology_key: "zone".into(),
            label_selector: Some(Message { match_labels, ..Message::default() }),
            ..PodAffinityTerm::default()
        };
        // Twice the same is one.
        let required_during_scheduling_ignored_during_execution = vec![term.clone(), term];
        pod.spec_mut().affinity = Some(Box::new(Affinity {
            pod_anti_affinity: Some(PodAntiAffinity {
                required_during_scheduling_ignored_during_execution,
                ..PodAntiAffinity::default()
            }),
            ..Affinity::default()
        }));
    }
    entry(ObjectKind::Pod, pod.into())
}

fn node(dice: &mut Dice, name: &str) -> Arc<Entry> {
    let mut node = Node::default();
    node.meta_mut().name = name.into();
    if !dice.one_in(4) {
        node.meta_mut().labels.insert("zone".into(), format!("z{}", dice.roll(3)));
    }
    if dice.one_in(3) {
        node.spec_mut().taints = vec![Taint { key: "t".into(), effect: "NoSchedule".into(), ..Taint::default() }];
    }
    entry(ObjectKind::Node, node.into())
}

fn who(app: &str, team: Option<&str>) -> Who {
    Who {
        namespaces: ["ns0".to_owned()].into(),
        namespace_selector: team.map(|team| LabelSelector::parse(team).expect("good")),
        labels: Some(LabelSelector::parse(app).expect("good")),
    }
}

/// Objects by name, and what the last step changed.
#[derive(Default)]
struct Kept {
    objects: BTreeMap<String, Arc<Entry>>,
    changes: Vec<Change>,
}

impl Kept {
    fn step(&mut self, dice: &mut Dice, names: u64, make: fn(&mut Dice, &str) -> Arc<Entry>) {
        self.changes.clear();
        for _ in 0..dice.roll(4) {
            let name = format!("n{}", dice.roll(names));
            let after = (dice.roll(4) > 0).then(|| make(dice, &name));
            let before = match &after {
                Some(after) => self.objects.insert(name, Arc::clone(after)),
                None => self.objects.remove(&name),
            };
            self.changes.push((before, after));
        }
    }

    /// News of the last step to whoever knows the one before, and everything to anybody else.
    fn news(&self, since: i64, now: i64) -> News {
        if since == now - 1 {
            return News::Changes(self.changes.clone(), now);
        }
        News::All(self.objects.values().cloned().collect(), now)
    }
}

const NODES: [&str; 5] = ["n0", "n1", "n2", "n3", "n4"];

/// What is said of all nodes.
fn said(survey: &mut Survey, counted: &Counted) -> (Vec<Option<i64>>, i64, (usize, i64)) {
    let counts = survey.counts(counted, "zone");
    ((0..NODES.len()).map(|node| counts.of(node)).collect(), counts.total(), counts.domains())
}

/// Whatever happens to pods, nodes and namespaces, what was kept is what is counted anew.
#[test]
fn counters_that_follow_are_those_counted_anew() {
    let (mut told, mut zones) = (0, 0);
    for seed in 1..=100 {
        let mut dice = Dice(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        let untainted = Inclusion {
            selected: None,
            tolerating: Some(minipod_proto::rules::Placement::new(minipod_proto::v1::PodSpec::default())),
            keys: vec!["zone".into()],
        };
        let everywhere = Inclusion { selected: None, tolerating: None, keys: vec![] };
        let asked = [
            Counted::Matching(vec![who("app=a0", None)]),
            Counted::Matching(vec![who("app", Some("team=x")), who("app!=a1", Some("team"))]),
            Counted::Spread(who("app=a1", None), Box::new(untainted)),
            Counted::Spread(who("", Some("team=x")), Box::new(everywhere)),
            Counted::Repelling(who("app=a0", None)),
            Counted::Repelling(Who { namespaces: ["ns1".to_owned()].into(), ..who("app=a1", None) }),
        ];
        let mut kept = Tallies::default();
        let (mut pods, mut nodes) = (Kept::default(), Kept::default());
        let (mut teams, mut relabelled) = ([false, true], 0);
        for now in 1..60 {
            pods.step(&mut dice, 8, pod);
            nodes.step(&mut dice, 4, node);
            if dice.one_in(8) {
                teams[dice.roll(2) as usize] ^= true;
                relabelled = now;
            }
            let labels_of = |namespace: &str| {
                let team = if namespace == "ns0" { teams[0] } else { teams[1] };
                Labels::from([("team".to_owned(), if team { "x" } else { "y" }.to_owned())])
            };
            let (of_pods, of_nodes) = (|since| pods.news(since, now), |since| nodes.news(since, now));
            let around =
                || Around { labels_of: &labels_of, namespaces_at: relabelled, pods: &of_pods, nodes: &of_nodes };
            let mut fresh = Tallies::default();
            let mut want = fresh.survey(&NODES, around());
            let mut found = kept.survey(&NODES, around());
            let held = |survey: &Survey| survey.held().cloned().collect::<BTreeSet<Term>>();
            assert_eq!(held(&found), held(&want), "seed {seed}, step {now}");
            for counted in &asked {
                // Not each time: one that falls behind counts anew.
                if dice.one_in(5) {
                    continue;
                }
                let (want, found) = (said(&mut want, counted), said(&mut found, counted));
                assert_eq!(found, want, "seed {seed}, step {now}, {counted:?}");
                told += want.1;
                zones = zones.max(want.2.0);
            }
        }
    }
    assert!(told > 1_000 && zones == 3, "{told} pods in up to {zones} zones prove little");
}

fn quiet(tallies: &mut Tallies, counted: &Counted, nodes: &dyn Fn(i64) -> News) {
    let around =
        Around { labels_of: &|_| Labels::new(), namespaces_at: 0, pods: &|_| News::Changes(Vec::new(), 1), nodes };
    tallies.survey(&["n0"], around).counts(counted, "zone");
}

#[test]
fn counters_that_nobody_asks_for_are_forgotten() {
    let mut tallies = Tallies::default();
    let kind = |n: usize| Counted::Matching(vec![who(&format!("a={n}"), None)]);
    for n in 0..COUNTERS_LIMIT + 10 {
        quiet(&mut tallies, &kind(n), &|_| News::Changes(Vec::new(), 1));
        quiet(&mut tallies, &kind(0), &|_| News::Changes(Vec::new(), 1));
    }
    let has = |n: usize| tallies.kept.contains_key(&(kind(n), "zone".to_owned()));
    assert_eq!(tallies.kept.len(), COUNTERS_LIMIT);
    assert!(has(0) && !has(1));
}

#[test]
fn nodes_that_come_and_go_leave_nothing_behind() {
    let mut tallies = Tallies::default();
    let mut dice = Dice(1);
    let counted = Counted::Matching(vec![who("app", None)]);
    let mut most = 0;
    for n in 0..100 {
        let born: Vec<_> = (0..1_000).map(|i| node(&mut dice, &format!("n{}", n * 1_000 + i))).collect();
        let come = born.iter().map(|node| (None, Some(Arc::clone(node))));
        let gone = born.iter().map(|node| (Some(Arc::clone(node)), None));
        let changes: Vec<Change> = come.chain(gone).collect();
        quiet(&mut tallies, &counted, &|since| match since {
            -1 => News::All(Vec::new(), 1),
            _ => News::Changes(changes.clone(), 1),
        });
        most = most.max(tallies.terrain.count());
    }
    assert!(most < 70_000, "{most} nodes are remembered");
}
