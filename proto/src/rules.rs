//! Rules between pods: whom terms of pod (anti-)affinity and topology spread constraints speak of, and what they ask of the domain
//! that a pod goes to. Pure; the scheduler decides by it, and the API server holds every binding against it.
//!
//! The semantics are Kubernetes': required terms and `DoNotSchedule` hold when a pod is bound, and are not looked at again later.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};

use prost::Message;

use crate::{
    Resource, scheduling,
    selector::{LabelSelector, SelectorError},
    v1::{Affinity, Pod, PodAffinityTerm, PodSpec, Taint, TopologySpreadConstraint},
};

/// Labels of an object.
pub type Labels = BTreeMap<String, String>;

/// A rule cannot be understood; validation should have refused it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// A label selector is none.
    #[error("pod {pod}: {field}: {source}")]
    Selector {
        /// Which pod.
        pod: String,
        /// Where in its spec.
        field: &'static str,
        /// What is wrong.
        source: SelectorError,
    },
    /// A term names no topology.
    #[error("pod {pod}: {field}: topologyKey is empty: want the key of a node label, such as kubernetes.io/hostname")]
    TopologyKey {
        /// Which pod.
        pod: String,
        /// Where in its spec.
        field: &'static str,
    },
    /// A number is out of its range.
    #[error("pod {pod}: topologySpreadConstraints: {field} is {value}: want at least 1")]
    Spread {
        /// Which pod.
        pod: String,
        /// Which number.
        field: &'static str,
        /// As given.
        value: i32,
    },
}

/// Which pods a term speaks of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Who {
    /// Namespaces by name.
    pub namespaces: BTreeSet<String>,
    /// Namespaces by label, beside those by name.
    pub namespace_selector: Option<LabelSelector>,
    /// Pods by label; `None` selects none.
    pub labels: Option<LabelSelector>,
}

impl Who {
    /// Whether pods of a namespace with these labels of its own can be meant.
    pub fn has_namespace(&self, name: &str, labels: &Labels) -> bool {
        self.namespaces.contains(name) || self.namespace_selector.as_ref().is_some_and(|all| all.matches(labels))
    }

    /// Whether pods with these labels can be meant.
    pub fn has_labels(&self, labels: &Labels) -> bool {
        self.labels.as_ref().is_some_and(|selector| selector.matches(labels))
    }
}

/// A term of pod affinity or anti-affinity.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Term {
    /// The pods that it speaks of.
    pub who: Who,
    /// The node label whose equal values make nodes near each other.
    pub topology_key: String,
}

impl Term {
    /// A term of this pod's; `field` says where in its spec.
    ///
    /// # Errors
    /// When it names no topology, or a selector is none.
    pub fn new(pod: &Pod, field: &'static str, term: &PodAffinityTerm) -> Result<Term, RuleError> {
        if term.topology_key.is_empty() {
            return Err(RuleError::TopologyKey { pod: pod.key(), field });
        }
        let wrong = |source| RuleError::Selector { pod: pod.key(), field, source };
        let mut labels = term.label_selector.as_ref().map(LabelSelector::from_message).transpose().map_err(wrong)?;
        let same = term.match_label_keys.iter().map(|key| (key, false));
        let other = term.mismatch_label_keys.iter().map(|key| (key, true));
        for (key, negate) in same.chain(other) {
            if let (Some(selector), Some(value)) = (labels.clone(), pod.meta().labels.get(key)) {
                labels = Some(selector.and(key, value, negate).map_err(wrong)?);
            }
        }
        let namespace_selector = term.namespace_selector.as_ref().map(LabelSelector::from_message).transpose();
        let namespace_selector = namespace_selector.map_err(wrong)?;
        let own = term.namespaces.is_empty() && namespace_selector.is_none();
        let own = own.then(|| pod.namespace().to_owned());
        let namespaces = term.namespaces.iter().cloned().chain(own).collect();
        Ok(Term { who: Who { namespaces, namespace_selector, labels }, topology_key: term.topology_key.clone() })
    }
}

/// A topology spread constraint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Spread {
    /// The pods that are counted.
    pub who: Who,
    /// The node label whose values are the domains.
    pub topology_key: String,
    /// How much fuller than the emptiest domain the pod's domain may be, the pod included.
    pub max_skew: i64,
    /// With fewer domains than this the emptiest one counts as empty.
    pub min_domains: i64,
    /// DoNotSchedule; otherwise ScheduleAnyway.
    pub hard: bool,
    /// Count only nodes that the pod's selector and affinity allow.
    pub honor_affinity: bool,
    /// Count only nodes whose taints the pod tolerates.
    pub honor_taints: bool,
    /// Whether the pod itself is counted.
    pub counts_itself: bool,
}

impl Spread {
    /// A constraint of this pod's.
    ///
    /// # Errors
    /// When it names no topology, a selector is none, or a number is below 1.
    pub fn new(pod: &Pod, constraint: &TopologySpreadConstraint) -> Result<Spread, RuleError> {
        let field = "topologySpreadConstraints";
        if constraint.topology_key.is_empty() {
            return Err(RuleError::TopologyKey { pod: pod.key(), field });
        }
        for (field, value) in [("maxSkew", constraint.max_skew), ("minDomains", constraint.min_domains.unwrap_or(1))] {
            if value < 1 {
                return Err(RuleError::Spread { pod: pod.key(), field, value });
            }
        }
        let wrong = |source| RuleError::Selector { pod: pod.key(), field, source };
        let selector = constraint.label_selector.as_ref();
        let mut labels = selector.map(LabelSelector::from_message).transpose().map_err(wrong)?;
        for key in &constraint.match_label_keys {
            if let (Some(selector), Some(value)) = (labels.clone(), pod.meta().labels.get(key)) {
                labels = Some(selector.and(key, value, false).map_err(wrong)?);
            }
        }
        let counts_itself = labels.as_ref().is_some_and(|labels| labels.matches(&pod.meta().labels));
        let namespaces = BTreeSet::from([pod.namespace().to_owned()]);
        Ok(Spread {
            who: Who { namespaces, namespace_selector: None, labels },
            topology_key: constraint.topology_key.clone(),
            max_skew: i64::from(constraint.max_skew),
            min_domains: i64::from(constraint.min_domains.unwrap_or(1)),
            hard: constraint.when_unsatisfiable != "ScheduleAnyway",
            honor_affinity: constraint.node_affinity_policy != "Ignore",
            honor_taints: constraint.node_taints_policy == "Honor",
            counts_itself,
        })
    }

    /// Which nodes the constraint counts, of a pod with this placement and all these constraints.
    pub fn inclusion(&self, all: &[Spread], placement: &Placement) -> Inclusion {
        let same = all.iter().filter(|other| other.hard == self.hard);
        let mut keys: Vec<String> = same.map(|other| other.topology_key.clone()).collect();
        keys.sort_unstable();
        keys.dedup();
        let spec = &placement.spec;
        let selected = self.honor_affinity.then(|| {
            let (node_selector, affinity) = (spec.node_selector.clone(), spec.affinity.clone());
            Placement::new(PodSpec { node_selector, affinity, ..PodSpec::default() })
        });
        let tolerating = self
            .honor_taints
            .then(|| Placement::new(PodSpec { tolerations: spec.tolerations.clone(), ..PodSpec::default() }));
        Inclusion { selected, tolerating, keys }
    }
}

/// What a pod asks of nodes as they are: selector, node affinity, tolerations. Compared and hashed by encoding.
#[derive(Debug, Clone)]
pub struct Placement {
    /// A spec with nodeSelector, affinity.nodeAffinity and tolerations only.
    pub spec: PodSpec,
    /// Its encoding.
    pub key: Box<[u8]>,
}

impl Placement {
    /// Of a spec that has only those parts.
    pub fn new(spec: PodSpec) -> Placement {
        let key = spec.encode_to_vec().into_boxed_slice();
        Placement { spec, key }
    }

    /// Of any pod's spec.
    pub fn of(spec: &PodSpec) -> Placement {
        let node_affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.clone());
        Placement::new(PodSpec {
            node_selector: spec.node_selector.clone(),
            affinity: node_affinity
                .map(|node_affinity| Affinity { node_affinity: Some(node_affinity), ..Affinity::default() }.into()),
            tolerations: spec.tolerations.clone(),
            ..PodSpec::default()
        })
    }
}

impl PartialEq for Placement {
    fn eq(&self, other: &Placement) -> bool {
        self.key == other.key
    }
}

impl Eq for Placement {}

impl Hash for Placement {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key.hash(state);
    }
}

/// Which nodes a spread constraint counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Inclusion {
    /// Nodes that selector and affinity allow, where they are honoured.
    pub selected: Option<Placement>,
    /// Nodes whose taints are tolerated, where they are honoured.
    pub tolerating: Option<Placement>,
    /// Labels that nodes must have.
    pub keys: Vec<String>,
}

impl Inclusion {
    /// Whether it has the node of that name.
    pub fn admits(&self, node: &str, labels: &Labels, taints: &[Taint]) -> bool {
        let selected = |all: &Placement| scheduling::node_matches(&all.spec, labels, node);
        let tolerates = |all: &Placement| scheduling::untolerated(taints, &all.spec.tolerations).is_none();
        self.keys.iter().all(|key| labels.contains_key(key))
            && self.selected.as_ref().is_none_or(selected)
            && self.tolerating.as_ref().is_none_or(tolerates)
    }
}

/// The rules of one pod about others, in the order of its spec.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// Pods it must be near to: all of these.
    pub affinity: Vec<Term>,
    /// Pods it must not be near to.
    pub anti_affinity: Vec<Term>,
    /// How pods shall be spread, `ScheduleAnyway` included.
    pub spread: Vec<Spread>,
}

impl Rules {
    /// Required terms and spread constraints of a pod.
    ///
    /// # Errors
    /// When one of them cannot be understood.
    pub fn of(pod: &Pod) -> Result<Rules, RuleError> {
        let mut rules = Rules { anti_affinity: Rules::anti_affinity_of(pod)?, ..Rules::default() };
        let affinity = pod.spec().affinity.as_ref();
        let near = affinity.and_then(|all| all.pod_affinity.as_ref());
        for one in near.into_iter().flat_map(|all| &all.required_during_scheduling_ignored_during_execution) {
            rules.affinity.push(Term::new(pod, "affinity.podAffinity", one)?);
        }
        for constraint in &pod.spec().topology_spread_constraints {
            rules.spread.push(Spread::new(pod, constraint)?);
        }
        Ok(rules)
    }

    /// The required anti-affinity of a pod alone: what holds against pods that come after it.
    ///
    /// # Errors
    /// When a term cannot be understood.
    pub fn anti_affinity_of(pod: &Pod) -> Result<Vec<Term>, RuleError> {
        let away = pod.spec().affinity.as_ref().and_then(|all| all.pod_anti_affinity.as_ref());
        let terms = away.into_iter().flat_map(|all| &all.required_during_scheduling_ignored_during_execution);
        terms.map(|one| Term::new(pod, "affinity.podAntiAffinity", one)).collect()
    }
}

/// How many pods that a rule counts may be in the domain that a pod goes to, itself left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// At least so many.
    pub least: i64,
    /// At most so many.
    pub most: i64,
    /// Whether a node without the topology's label will do.
    pub missing: bool,
}

impl Bounds {
    /// Anti-affinity, the pod's own or another's towards it.
    pub const APART: Bounds = Bounds { least: i64::MIN, most: 0, missing: true };

    /// Affinity. `is_first`: all terms of the pod speak of itself and no pod that they speak of is anywhere; such a pod may go to any
    /// domain, or no pod of its kind could ever be the first.
    pub const fn near(is_first: bool) -> Bounds {
        Bounds { least: if is_first { 0 } else { 1 }, most: i64::MAX, missing: false }
    }

    /// Spread over so many domains, of which the emptiest has so many pods.
    pub fn skew(spread: &Spread, domains: usize, emptiest: i64) -> Bounds {
        let few = i64::try_from(domains).unwrap_or(i64::MAX) < spread.min_domains;
        let emptiest = if few { 0 } else { emptiest };
        Bounds {
            least: i64::MIN,
            most: spread.max_skew.saturating_add(emptiest) - i64::from(spread.counts_itself),
            missing: false,
        }
    }

    /// Whether a domain with so many will do; `None`: the node has no domain.
    #[inline]
    pub fn admit(&self, count: Option<i64>) -> bool {
        count.map_or(self.missing, |count| self.least <= count && count <= self.most)
    }
}

#[cfg(test)]
#[path = "rules_tests.rs"]
mod tests;
