//! The pods of a batch, the rules that concern them, and what the domains hold: whether each may go where it was proposed.

use std::{collections::HashMap, sync::Arc};

use minipod_proto::{
    Resource,
    rules::{Bounds, Spread, Term, Who},
    selector::LabelSelector,
    v1::Pod,
};

use super::{
    Demand,
    counter::{Counted, Counts},
    tally::{Around, Survey, Tallies},
};
use crate::cache::Entry;

/// A pod of the batch.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// As it is bound.
    pub pod: &'a Pod,
    /// Its own rules, if it has any.
    pub demand: Option<&'a Demand>,
}

/// What a counter must say of a node's domain.
#[derive(Debug, Clone)]
enum Rule {
    Near,
    /// Anti-affinity, the pod's own or another's towards it.
    Apart {
        own: bool,
    },
    Skew(Spread),
}

/// What is to be looked at for one pod.
#[derive(Debug, Default)]
struct Part {
    checks: Vec<(usize, Rule)>,
    /// All terms of its affinity speak of itself.
    likes_itself: bool,
    /// Counters that count it once it is placed.
    counted_by: Vec<usize>,
}

/// A batch among the pods that are bound already. Pods of the batch that are placed count for those after them.
pub struct Scene {
    /// Positions of the nodes that were asked for, and the nodes by position.
    positions: HashMap<String, usize>,
    nodes: Vec<Option<Arc<Entry>>>,
    counters: Vec<Counts>,
    parts: Vec<Part>,
}

impl Scene {
    /// Of these pods, each of which may be asked for on any of these nodes.
    pub fn new(subjects: &[Subject], nodes: &[&str], around: Around, tallies: &mut Tallies) -> Scene {
        let mut making = Making { survey: tallies.survey(nodes, around), counters: Vec::new(), ids: HashMap::new() };
        let mut parts: Vec<Part> = subjects.iter().map(|subject| making.own_rules(subject)).collect();
        // Rules of others: of those that are bound, and of those that may be in this batch.
        let speaks = |term: &&Term| subjects.iter().any(|subject| making.survey.speaks_of(&term.who, subject.pod));
        let held: Vec<Term> = making.survey.held().filter(speaks).cloned().collect();
        for term in &held {
            making.repelling(term);
        }
        for (subject, part) in subjects.iter().zip(&mut parts) {
            making.relate(subject, part);
        }
        making.scene(nodes, parts)
    }

    /// Whether the pod at a position may go to a node.
    ///
    /// # Errors
    /// The rule against it, in words.
    pub fn admits(&self, position: usize, node: &str) -> Result<(), String> {
        let Some(part) = self.parts.get(position) else { return Ok(()) };
        let near = part.checks.iter().filter(|(_, rule)| matches!(rule, Rule::Near));
        let nobody = near.into_iter().all(|(id, _)| self.counters.get(*id).is_none_or(|counter| counter.total() == 0));
        let is_first = part.likes_itself && nobody;
        let place = self.positions.get(node).copied();
        for (id, rule) in &part.checks {
            let Some(counter) = self.counters.get(*id) else { continue };
            let bounds = match rule {
                Rule::Near => Bounds::near(is_first),
                Rule::Apart { .. } => Bounds::APART,
                Rule::Skew(spread) => {
                    let (domains, emptiest) = counter.domains();
                    Bounds::skew(spread, domains, emptiest)
                }
            };
            let count = place.and_then(|place| counter.of(place));
            if !bounds.admit(count) {
                let domain = place.and_then(|place| self.domain(place, &counter.key));
                return Err(why(counter, rule, domain.zip(count), bounds.most));
            }
        }
        Ok(())
    }

    fn domain(&self, place: usize, key: &str) -> Option<&str> {
        let node = self.nodes.get(place)?.as_ref()?.object.as_node()?;
        node.meta().labels.get(key).map(String::as_str)
    }

    /// The pod at a position goes to a node.
    pub fn place(&mut self, position: usize, node: &str) {
        let (Some(part), Some(place)) = (self.parts.get(position), self.positions.get(node)) else { return };
        for id in &part.counted_by {
            if let Some(counter) = self.counters.get_mut(*id) {
                counter.place(*place);
            }
        }
    }
}

fn why(counter: &Counts, rule: &Rule, found: Option<(&str, i64)>, most: i64) -> String {
    let key = &counter.key;
    let Some((domain, count)) = found else {
        return format!("it has no label {key}, which a rule of the pod needs");
    };
    let whom = || match &counter.counted {
        Counted::Matching(all) => {
            let texts = all.iter().filter_map(|who| who.labels.as_ref()).map(LabelSelector::to_string);
            let texts = texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join(" and ");
            if texts.is_empty() { "a pod".to_owned() } else { format!("a pod with {texts}") }
        }
        Counted::Spread(who, _) | Counted::Repelling(who) => {
            who.labels.as_ref().map_or_else(String::new, LabelSelector::to_string)
        }
    };
    match rule {
        Rule::Near => format!("the pod's affinity wants {} in {key}={domain}", whom()),
        Rule::Apart { own: true } => {
            format!("the pod's anti-affinity keeps away from {key}={domain}, where {} is", whom())
        }
        Rule::Apart { own: false } => format!("the anti-affinity of a pod in {key}={domain} keeps it away"),
        Rule::Skew(spread) => format!(
            "{key}={domain} has {count} of the pods to be spread, and may have {} before another one comes (maxSkew {})",
            most.max(0),
            spread.max_skew
        ),
    }
}

/// A scene that is being made.
struct Making<'a> {
    survey: Survey<'a>,
    counters: Vec<Counts>,
    ids: HashMap<(Counted, String), usize>,
}

impl Making<'_> {
    fn counter(&mut self, counted: Counted, key: &str) -> usize {
        let what = (counted, key.to_owned());
        if let Some(id) = self.ids.get(&what) {
            return *id;
        }
        let id = self.counters.len();
        self.counters.push(self.survey.counts(&what.0, key));
        self.ids.insert(what, id);
        id
    }

    fn repelling(&mut self, term: &Term) -> usize {
        self.counter(Counted::Repelling(term.who.clone()), &term.topology_key)
    }

    /// The counters of a pod's own rules, and its checks of them.
    fn own_rules(&mut self, subject: &Subject) -> Part {
        let mut part = Part::default();
        let Some(demand) = subject.demand else { return part };
        let rules = &demand.rules;
        let all: Vec<Who> = rules.affinity.iter().map(|term| term.who.clone()).collect();
        part.likes_itself = all.iter().all(|who| self.survey.speaks_of(who, subject.pod));
        for spread in &rules.spread {
            let inclusion = spread.inclusion(&rules.spread, &demand.placement);
            let id = self.counter(Counted::Spread(spread.who.clone(), Box::new(inclusion)), &spread.topology_key);
            part.checks.push((id, Rule::Skew(spread.clone())));
        }
        for term in &rules.affinity {
            // A pod counts for one term only if all terms speak of it, as in Kubernetes.
            let id = self.counter(Counted::Matching(all.clone()), &term.topology_key);
            part.checks.push((id, Rule::Near));
        }
        for term in &rules.anti_affinity {
            let id = self.counter(Counted::Matching(vec![term.who.clone()]), &term.topology_key);
            part.checks.push((id, Rule::Apart { own: true }));
            part.counted_by.push(self.repelling(term));
        }
        part.counted_by.sort_unstable();
        part.counted_by.dedup();
        part
    }

    /// What all counters have to do with a pod of the batch.
    fn relate(&self, subject: &Subject, part: &mut Part) {
        for (id, counter) in self.counters.iter().enumerate() {
            if !self.survey.counts_pod(&counter.counted, subject.pod) {
                continue;
            }
            match &counter.counted {
                Counted::Matching(_) | Counted::Spread(..) => part.counted_by.push(id),
                Counted::Repelling(_) => part.checks.push((id, Rule::Apart { own: false })),
            }
        }
    }

    fn scene(self, nodes: &[&str], parts: Vec<Part>) -> Scene {
        let positions = nodes.iter().enumerate().map(|(position, node)| ((*node).to_owned(), position)).collect();
        Scene { positions, nodes: self.survey.nodes(), counters: self.counters, parts }
    }
}

#[cfg(test)]
#[path = "scene_tests.rs"]
mod tests;
