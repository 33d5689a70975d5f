//! Disruption budgets (policy/v1): how many of an application's pods may be away at once because somebody wants it so. Pure.
//!
//! Nothing here knows how many pods an application should have: there are no workload controllers. A percentage is one of the pods
//! that exist, those that are being ended included; only a `minAvailable` that is a number also holds when nobody makes pods anew.

use std::fmt;

use crate::{
    selector::{LabelSelector, SelectorError},
    v1::{
        Condition, IntOrString, Pod, PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus, Time,
        int_or_string::Value,
    },
};

/// The condition of a budget.
pub const DISRUPTION_ALLOWED: &str = "DisruptionAllowed";
/// The condition of a pod that somebody has chosen to end.
pub const DISRUPTION_TARGET: &str = "DisruptionTarget";
/// Evict pods that run and are not ready only while the budget has all the healthy pods that it wants (the default).
pub const IF_HEALTHY_BUDGET: &str = "IfHealthyBudget";
/// Evict pods that run and are not ready whatever the budget says.
pub const ALWAYS_ALLOW: &str = "AlwaysAllow";

/// A number of pods, or a share of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So many.
    Count(i32),
    /// So many of a hundred, rounded up.
    Percent(i32),
}

impl Amount {
    /// Reads `3` or `"25%"`.
    ///
    /// # Errors
    /// What would be right, when it is neither.
    pub fn read(value: &IntOrString) -> Result<Amount, &'static str> {
        const WANTED: &str = "want a number of pods from 0 on, or a percentage from \"0%\" to \"100%\"";
        match &value.value {
            None => Ok(Amount::Count(0)),
            Some(Value::Int(count)) if *count >= 0 => Ok(Amount::Count(*count)),
            Some(Value::Str(text)) => {
                let digits = text.strip_suffix('%').filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
                let percent = digits.and_then(|digits| digits.parse().ok()).filter(|percent| *percent <= 100);
                percent.map(Amount::Percent).ok_or(WANTED)
            }
            Some(Value::Int(_)) => Err(WANTED),
        }
    }

    /// How many of `all` that is.
    pub fn of(self, all: i32) -> i32 {
        match self {
            Amount::Count(count) => count,
            Amount::Percent(percent) => {
                let part = (i64::from(all) * i64::from(percent) + 99) / 100;
                i32::try_from(part).unwrap_or(i32::MAX)
            }
        }
    }
}

/// The pods that a budget speaks of, counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counted {
    /// Those that have not ended.
    pub expected: i32,
    /// Those of them that are ready and not being ended.
    pub healthy: i32,
}

impl Counted {
    /// These pods.
    pub fn of<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Counted {
        pods.into_iter().fold(Counted::default(), |all, pod| all.plus(&Counted::one(pod)))
    }

    /// One pod.
    pub fn one(pod: &Pod) -> Counted {
        Counted { expected: i32::from(!pod.is_terminal()), healthy: i32::from(is_healthy(pod)) }
    }

    /// With others.
    #[must_use]
    pub fn plus(self, others: &Counted) -> Counted {
        Counted {
            expected: self.expected.saturating_add(others.expected),
            healthy: self.healthy.saturating_add(others.healthy),
        }
    }

    /// Without some of them.
    #[must_use]
    pub fn minus(self, some: &Counted) -> Counted {
        Counted { expected: self.expected - some.expected, healthy: self.healthy - some.healthy }
    }
}

/// How a budget stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Standing {
    /// Pods that it speaks of and that have not ended.
    pub expected: i32,
    /// Those of them that are ready and not being ended.
    pub healthy: i32,
    /// How many must be healthy.
    pub desired: i32,
    /// How many of the healthy ones may go now.
    pub allowed: i32,
}

/// What a budget says to the eviction of one of its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It does not matter to the budget.
    Free,
    /// It may go, and takes one of the disruptions that are allowed.
    Counts,
    /// Not now.
    Refused,
}

/// The pods that a budget speaks of.
#[derive(Debug, Clone)]
pub struct Scope {
    namespace: String,
    /// `None`: no pods.
    selector: Option<LabelSelector>,
}

impl Scope {
    /// Of a budget. Without a selector it speaks of no pods; with an empty one of all in its namespace.
    ///
    /// # Errors
    /// When the selector is none (validation refuses such a budget).
    pub fn of(budget: &PodDisruptionBudget) -> Result<Scope, SelectorError> {
        let selector = budget.spec().selector.as_ref().map(LabelSelector::from_message).transpose()?;
        Ok(Scope { namespace: crate::Resource::namespace(budget).to_owned(), selector })
    }

    /// The namespace of its pods.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// What its pods have in common; `None`: it speaks of no pods.
    pub fn selector(&self) -> Option<&LabelSelector> {
        self.selector.as_ref()
    }

    /// Whether it speaks of a pod.
    pub fn has(&self, pod: &Pod) -> bool {
        let meta = crate::Resource::meta(pod);
        self.namespace == meta.namespace && self.selector.as_ref().is_some_and(|all| all.matches(&meta.labels))
    }
}

/// Whether a pod counts as healthy: ready, and not being ended.
pub fn is_healthy(pod: &Pod) -> bool {
    pod.condition_true("Ready") && !pod.is_terminating() && !pod.is_terminal()
}

/// Whether a pod can go without any budget being asked: it has not begun, has ended, or is being ended already.
pub fn goes_freely(pod: &Pod) -> bool {
    pod.is_terminal() || pod.is_terminating() || pod.phase() == crate::Phase::Pending
}

impl Standing {
    /// How a budget with these pods stands; amounts that cannot be read allow nothing.
    pub fn of(spec: &PodDisruptionBudgetSpec, pods: Counted) -> Standing {
        let Counted { expected, healthy } = pods;
        let read = |amount: &Option<IntOrString>| amount.as_ref().map(Amount::read);
        let desired = match (read(&spec.min_available), read(&spec.max_unavailable)) {
            (Some(Ok(least)), _) => least.of(expected),
            (None, Some(Ok(most))) => expected.saturating_sub(most.of(expected)).max(0),
            (None, None) => 0,
            (Some(Err(_)), _) | (None, Some(Err(_))) => i32::MAX,
        };
        let allowed = if expected == 0 { 0 } else { healthy.saturating_sub(desired).max(0) };
        Standing { expected, healthy, desired, allowed }
    }

    /// What the budget says to the eviction of one of its pods.
    pub fn judge(&self, spec: &PodDisruptionBudgetSpec, pod: &Pod) -> Verdict {
        if goes_freely(pod) {
            return Verdict::Free;
        }
        if !pod.condition_true("Ready") {
            let whole = self.healthy >= self.desired && self.desired > 0;
            if spec.unhealthy_pod_eviction_policy == ALWAYS_ALLOW || whole {
                return Verdict::Free;
            }
        }
        if self.allowed > 0 { Verdict::Counts } else { Verdict::Refused }
    }

    /// As it is when a pod that counted has been marked.
    #[must_use]
    pub fn without(mut self, pod: &Pod) -> Standing {
        self.healthy -= i32::from(is_healthy(pod));
        self.allowed = self.healthy.saturating_sub(self.desired).clamp(0, self.allowed.saturating_sub(1).max(0));
        self
    }

    /// The budget's status that says this.
    pub fn status(&self, budget: &PodDisruptionBudget, now: Time) -> PodDisruptionBudgetStatus {
        let generation = crate::Resource::meta(budget).generation;
        let old = budget.status.as_ref().and_then(|status| status.conditions.first());
        let (status, reason) =
            if self.allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
        let since = old.filter(|old| old.status == status).and_then(|old| old.last_transition_time);
        let condition = Condition {
            r#type: DISRUPTION_ALLOWED.to_owned(),
            status: status.to_owned(),
            observed_generation: generation,
            last_transition_time: since.or(Some(now)),
            reason: reason.to_owned(),
            message: String::new(),
        };
        PodDisruptionBudgetStatus {
            observed_generation: generation,
            disrupted_pods: Default::default(),
            disruptions_allowed: self.allowed,
            current_healthy: self.healthy,
            desired_healthy: self.desired,
            expected_pods: self.expected,
            conditions: vec![condition],
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "needs {} healthy pods and has {} currently", self.desired, self.healthy)
    }
}

#[cfg(test)]
#[path = "disruption_tests.rs"]
mod tests;
