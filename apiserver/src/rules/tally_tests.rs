use minipod_proto::{
    Kind as ObjectKind,
    v1::{Affinity, LabelSelector as Message, Object, PodAffinityTerm, PodAntiAffinity, Time},
};

use super::*;
use crate::dice::Dice;

fn pod(dice: &mut Dice, name: &str) -> Arc<Entry> {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace) = (name.into(), format!("ns{}", dice.roll(2)));
    meta.labels.insert("app".into(), format!("a{}", dice.roll(2)));
    if dice.roll(4) == 0 {
        meta.deletion_timestamp = Some(Time::from_unix(1, 0));
    }
    if dice.roll(3) > 0 {
        pod.spec_mut().node_name = format!("n{}", dice.roll(3));
    }
    if dice.roll(4) == 0 {
        pod.status_mut().phase = "Succeeded".into();
    }
    if dice.roll(2) == 0 {
        let match_labels = [("app".to_owned(), format!("a{}", dice.roll(2)))].into();
        let term = PodAffinityTerm {
            topology_key: "zone".into(),
            label_selector: Some(Message { match_labels, ..Message::default() }),
            ..PodAffinityTerm::default()
        };
        // Twice the same is one.
        let required_during_scheduling_ignored_during_execution = vec![term.clone(), term];
        pod.spec_mut().affinity = Some(Affinity {
            pod_anti_affinity: Some(PodAntiAffinity {
                required_during_scheduling_ignored_during_execution,
                ..PodAntiAffinity::default()
            }),
            ..Affinity::default()
        });
    }
    let object = Object::from(pod);
    let key = object.key();
    Arc::new(Entry::decode(ObjectKind::Pod, &key, &object.encode_inner(), 1).expect("it decodes"))
}

/// Whatever happens to pods, what was kept is what is counted anew.
#[test]
fn tallies_that_follow_are_those_counted_anew() {
    for seed in 1..=100 {
        let mut dice = Dice(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        let kinds: Vec<Kind> = [("app=a0", true), ("app=a0", false), ("", true), ("app!=a1", false)]
            .map(|(text, living)| Kind { labels: vec![LabelSelector::parse(text).expect("good")], living })
            .into();
        let (mut kept, mut pods) = (Tallies::default(), HashMap::<String, Arc<Entry>>::new());
        // What is bound, for whoever knows nothing yet.
        let all = |pods: &HashMap<String, Arc<Entry>>, at| {
            let bound = pods.values().filter(|entry| placed(Some(entry)).is_some());
            News::All(bound.cloned().collect(), at)
        };
        for step in 1..60 {
            let mut changes = Vec::new();
            for _ in 0..dice.roll(4) {
                let name = format!("p{}", dice.roll(6));
                let after = (dice.roll(4) > 0).then(|| pod(&mut dice, &name));
                let before = match &after {
                    Some(after) => pods.insert(name, Arc::clone(after)),
                    None => pods.remove(&name),
                };
                changes.push((before, after));
            }
            let news = |since: i64| match since {
                -1 => all(&pods, step),
                _ => News::Changes(changes.clone(), step),
            };
            let mut fresh = Tallies::default();
            for kind in &kinds {
                let want = fresh.pods(kind, |_| all(&pods, step)).clone();
                assert_eq!(kept.pods(kind, news), &want, "seed {seed}, step {step}, {kind:?}");
            }
            let want = fresh.holders(|_| all(&pods, step)).clone();
            assert_eq!(kept.holders(news), &want, "seed {seed}, step {step}");
        }
    }
}

#[test]
fn kinds_that_nobody_asks_for_are_forgotten() {
    let mut tallies = Tallies::default();
    let kind = |n: usize| Kind { labels: vec![LabelSelector::parse(&format!("a={n}")).expect("good")], living: true };
    for n in 0..KINDS_LIMIT + 10 {
        tallies.pods(&kind(n), |_| News::All(Vec::new(), 1));
        tallies.pods(&kind(0), |_| News::Changes(Vec::new(), 1));
    }
    assert_eq!(tallies.kinds.len(), KINDS_LIMIT);
    assert!(tallies.kinds.contains_key(&kind(0)) && !tallies.kinds.contains_key(&kind(1)));
}
