//! Evictions: deletions that disruption budgets have a say in.
//!
//! An eviction that takes from a budget marks its pod and writes the budget in one transaction, which compares both. The next one
//! under that budget counts pods at the budget's revision or later, and so counts the mark: no two pass on the same allowance,
//! whatever servers they are asked at.

use std::time::Duration;

use minipod_daemon::backoff::Backoff;
use minipod_proto::{
    Kind, Resource,
    disruption::{self, Scope, Standing, Verdict as Say},
    v1::{DeleteResponse, EvictRequest, Object, Time, preempt_request::Nominee},
};

use super::{ATTEMPTS, Registry, Verdict, commit::stamp, delete, update::check_preconditions};
use crate::{
    cache::Budgeted,
    error::ApiError,
    keys,
    storage::{Guard, Outcome, Write},
};

/// Reason and words of the condition of a pod that is evicted.
const TARGET: (&str, &str) = ("EvictionByEvictionAPI", "evicted through the API");

/// What an eviction comes to.
#[derive(Debug)]
struct Plan {
    /// What becomes of the pod.
    verdict: Verdict,
    /// Budgets that were looked at, with their revisions.
    compared: Vec<(String, i64)>,
    /// Budgets that it takes from, as they are then.
    taken: Vec<(String, Object)>,
}

impl Registry {
    /// Deletes a pod if its budgets allow that now.
    ///
    /// # Errors
    /// [`ApiError::Budget`] when one does not; otherwise as a deletion.
    pub async fn evict(&self, request: EvictRequest) -> Result<DeleteResponse, ApiError> {
        let key = keys::object_key(Kind::Pod, &request.namespace, &request.pod)?;
        let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(50));
        for attempt in 0..ATTEMPTS {
            // Everything that was acknowledged before is counted.
            self.cache.reach(self.storage.revision().await?).await?;
            let (budgets, pod) = self.cache.budgeted(&request.namespace, &key);
            let pod = pod.ok_or_else(|| ApiError::NotFound { kind: Kind::Pod, key: key.clone() })?;
            check_preconditions(&pod.object, &request.uid, &request.resource_version)?;
            // The cache was waited for: a node that it does not know is gone.
            let is_orphan = self.unknown_node(&pod.object).is_some();
            let grace = if is_orphan { Some(0) } else { request.grace_period_seconds };
            let plan = decide(&pod.object, &budgets, grace, self.now())?;
            let new = match plan.verdict {
                Verdict::Keep => {
                    return Ok(DeleteResponse { object: Some(pod.object.clone()), gone: false });
                }
                Verdict::Put(object) => Some(*object),
                Verdict::Remove => None,
            };
            if request.dry_run {
                let gone = new.is_none();
                return Ok(DeleteResponse { object: Some(new.unwrap_or_else(|| pod.object.clone())), gone });
            }
            let budget = |key: &str| keys::object(Kind::PodDisruptionBudget, key);
            let compared = plan.compared.iter().map(|(key, revision)| Guard::new(budget(key), *revision));
            let taken = plan.taken.iter().map(|(key, object)| Write::Put(budget(key), object.encode_inner()));
            let mut transaction = self.transaction(Kind::Pod, &key, Some(&pod), new.as_ref(), None, None).await?;
            transaction.part.guards.extend(compared);
            transaction.part.writes.extend(taken);
            if let Outcome::Done { revision } = transaction.run(self).await? {
                let gone = new.is_none();
                let mut object = new.unwrap_or_else(|| pod.object.clone());
                stamp(&mut object, revision);
                return Ok(DeleteResponse { object: Some(object), gone });
            }
            self.conflicts.increment();
            if attempt > 2 {
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
        let detail = format!("it or its disruption budgets changed {ATTEMPTS} times meanwhile");
        Err(ApiError::Stale { kind: Kind::Pod, key, detail })
    }
}

impl Registry {
    /// Ends a pod with its own grace because a more important one gets its place. `message` says which. `false`: it was ended or
    /// is being ended already, or is another pod by now.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn preempt(&self, namespace: &str, pod: &str, uid: &str, message: &str) -> Result<bool, ApiError> {
        let key = keys::object_key(Kind::Pod, namespace, pod)?;
        let now = self.now();
        let mut ended = false;
        let written = self
            .end(Kind::Pod, &key, |object, is_orphan| {
                ended = false;
                if object.meta().uid != uid || object.meta().deletion_timestamp.is_some() {
                    return Ok(Verdict::Keep);
                }
                ended = true;
                ending(object, is_orphan, ("PreemptionByScheduler", message), now)
            })
            .await;
        match written {
            Ok(_) => Ok(ended),
            Err(ApiError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes where a pod is to go that others are ended for. Of two schedulers that decide on the same pod only the first gets its way.
    ///
    /// # Errors
    /// When the pod does not wait any more, or its nomination is not the one that was known.
    pub async fn nominate(&self, nominee: &Nominee) -> Result<(), ApiError> {
        let key = keys::object_key(Kind::Pod, &nominee.namespace, &nominee.pod)?;
        keys::check_name("node", &nominee.node)?;
        let decide = |object: &Object| {
            let waits = object.as_pod().filter(|pod| {
                pod.uid() == nominee.uid && pod.node_name().is_none() && !pod.is_terminating() && !pod.is_terminal()
            });
            let Some(pod) = waits else {
                return Err(ApiError::Precondition(format!("pod {key} does not wait for a place any more")));
            };
            let now = &pod.status().nominated_node_name;
            if *now != nominee.seen {
                let detail = if now.is_empty() { "it has none".to_owned() } else { format!("it is {now}") };
                return Err(ApiError::Precondition(format!(
                    "the nomination of pod {key} is not {:?} any more: {detail}",
                    nominee.seen
                )));
            }
            let mut pod = pod.clone();
            pod.status_mut().nominated_node_name.clone_from(&nominee.node);
            Ok(Verdict::put(pod))
        };
        self.modify(Kind::Pod, &key, decide).await.map(drop)
    }
}

/// A deletion with a pod's own grace, and the condition that says who has chosen it.
fn ending(object: &Object, is_orphan: bool, why: (&str, &str), now: Time) -> Result<Verdict, ApiError> {
    Ok(match delete::decide(object, is_orphan.then_some(0), now)? {
        Verdict::Put(marked) => Verdict::Put(targeted(marked, why, now)),
        other => other,
    })
}

/// With the condition of a pod that somebody has chosen to end.
fn targeted(mut object: Box<Object>, why: (&str, &str), now: Time) -> Box<Object> {
    if let Some(pod) = object.as_pod_mut() {
        pod.status_mut().set_condition(disruption::DISRUPTION_TARGET, "True", why.0, why.1, now);
    }
    object
}

/// What becomes of the pod, and which budgets have a say. `budgets` are those of its namespace.
fn decide(object: &Object, budgets: &[Budgeted], grace: Option<i64>, now: Time) -> Result<Plan, ApiError> {
    let Some(pod) = object.as_pod() else { return Err(ApiError::Invalid("only a pod can be evicted".into())) };
    let (mut compared, mut taken, mut refusals) = (Vec::new(), Vec::new(), Vec::new());
    for (entry, pods) in budgets.iter().filter(|_| !disruption::goes_freely(pod)) {
        let Some(budget) = entry.object.as_budget() else { continue };
        // Validation has refused a selector that is none.
        if !Scope::of(budget).is_ok_and(|scope| scope.has(pod)) {
            continue;
        }
        let standing = Standing::of(budget.spec(), *pods);
        compared.push((entry.key.clone(), entry.revision));
        match standing.judge(budget.spec(), pod) {
            Say::Free => {}
            Say::Counts => {
                let mut budget = budget.clone();
                budget.status = Some(standing.without(pod).status(&budget, now));
                budget.meta_mut().resource_version.clear();
                taken.push((entry.key.clone(), budget.into()));
            }
            Say::Refused => refusals.push(format!("the disruption budget {} {standing}", budget.name())),
        }
    }
    if !refusals.is_empty() {
        return Err(ApiError::Budget { pod: object.key(), detail: refusals.join("; ") });
    }
    let verdict = match delete::decide(object, grace, now)? {
        Verdict::Put(marked) => Verdict::Put(targeted(marked, TARGET, now)),
        other => other,
    };
    Ok(Plan { verdict, compared, taken })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use minipod_proto::{
        disruption::Counted,
        v1::{LabelSelector, Pod, PodDisruptionBudget, PodDisruptionBudgetSpec},
    };

    use super::*;
    use crate::cache::Entry;

    fn entry(kind: Kind, object: Object, revision: i64) -> Arc<Entry> {
        let key = object.key();
        Arc::new(Entry::decode(kind, &key, &object.encode_inner(), revision).expect("it decodes"))
    }

    fn pod(name: &str, app: &str, phase: &str, ready: &str) -> Object {
        let mut pod = Pod::default();
        let meta = pod.meta_mut();
        (meta.name, meta.namespace, meta.uid) = (name.into(), "d".into(), format!("uid-{name}"));
        meta.labels.insert("app".into(), app.into());
        pod.spec_mut().node_name = "n".into();
        pod.status_mut().phase = phase.into();
        pod.status_mut().set_condition("Ready", ready, "", "", Time::from_unix(1, 0));
        pod.into()
    }

    fn budget(name: &str, app: &str, least: i32) -> Arc<Entry> {
        let mut budget = PodDisruptionBudget::default();
        let meta = budget.meta_mut();
        (meta.name, meta.namespace) = (name.into(), "d".into());
        let labels = [("app".to_owned(), app.to_owned())].into();
        let selector = Some(LabelSelector { match_labels: labels, ..LabelSelector::default() });
        budget.spec =
            Some(PodDisruptionBudgetSpec { min_available: Some(least.into()), selector, ..Default::default() });
        entry(Kind::PodDisruptionBudget, budget.into(), 7)
    }

    #[test]
    fn budgets_have_their_say() {
        let now = Time::from_unix(1_000, 0);
        let web = |name: &str| pod(name, "web", "Running", "True");
        let pods: Vec<Arc<Entry>> =
            [web("a"), web("b"), pod("c", "db", "Running", "True")].map(|pod| entry(Kind::Pod, pod, 5)).into();
        type Case = (&'static str, Object, Vec<Arc<Entry>>, Result<&'static str, &'static str>);
        let cases: [Case; 7] = [
            ("none", web("a"), vec![], Ok("at 1030, compared [], taken []")),
            ("room", web("a"), vec![budget("x", "web", 1)], Ok("at 1030, compared [d/x@7], taken [d/x allows 0]")),
            (
                "none left",
                web("a"),
                vec![budget("x", "web", 2)],
                Err(
                    "cannot evict pod d/a as it would violate the pod's disruption budget: the disruption budget x needs 2 \
                     healthy pods and has 2 currently",
                ),
            ),
            ("another's", web("a"), vec![budget("x", "db", 1)], Ok("at 1030, compared [], taken []")),
            (
                "both must allow",
                web("a"),
                vec![budget("x", "web", 1), budget("y", "web", 2)],
                Err(
                    "cannot evict pod d/a as it would violate the pod's disruption budget: the disruption budget y needs 2 \
                     healthy pods and has 2 currently",
                ),
            ),
            (
                "not begun",
                pod("a", "web", "Pending", "False"),
                vec![budget("x", "web", 2)],
                Ok("at 1030, compared [], taken []"),
            ),
            (
                "ended",
                pod("a", "web", "Failed", "False"),
                vec![budget("x", "web", 2)],
                Ok("removed, compared [], taken []"),
            ),
        ];
        for (name, pod, budgets, want) in cases {
            let counted = |budget: &Arc<Entry>| {
                let scope = Scope::of(budget.object.as_budget().expect("a budget")).expect("a selector");
                let all = pods.iter().filter_map(|entry| entry.object.as_pod()).filter(|pod| scope.has(pod));
                (Arc::clone(budget), Counted::of(all))
            };
            let budgets: Vec<Budgeted> = budgets.iter().map(counted).collect();
            let shown = decide(&pod, &budgets, None, now).map(|plan| {
                let compared: Vec<String> = plan.compared.iter().map(|(key, at)| format!("{key}@{at}")).collect();
                let allowed = |object: &Object| {
                    object
                        .as_budget()
                        .and_then(|budget| budget.status.clone())
                        .map_or(-1, |one| one.disruptions_allowed)
                };
                let taken: Vec<String> =
                    plan.taken.iter().map(|(key, object)| format!("{key} allows {}", allowed(object))).collect();
                let verdict = match plan.verdict {
                    Verdict::Keep => "kept".to_owned(),
                    Verdict::Remove => "removed".to_owned(),
                    Verdict::Put(object) => {
                        let pod = object.as_pod().expect("a pod");
                        assert!(pod.condition_true("DisruptionTarget"), "{name}");
                        format!("at {}", object.meta().deletion_timestamp.map_or(0, |at| at.seconds))
                    }
                };
                format!("{verdict}, compared [{}], taken [{}]", compared.join(" "), taken.join(" "))
            });
            assert_eq!(
                shown.map_err(|error| error.to_string()),
                want.map(str::to_owned).map_err(str::to_owned),
                "{name}"
            );
        }
    }
}
