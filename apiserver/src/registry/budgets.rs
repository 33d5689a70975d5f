//! Keeps the status of disruption budgets true: what users read, and what schedulers spare pods by when they preempt.
//!
//! Every API server does so, and writes only what differs; who comes second finds it done. Nothing depends on how fresh a status is:
//! evictions count for themselves ([`super::evict`]).

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use minipod_daemon::shutdown::Shutdown;
use minipod_proto::{Kind, disruption::Standing, v1::PodDisruptionBudget};

use super::{Registry, Verdict};
use crate::{
    cache::{Cache, Delivery, Entry, Filter, Subscription},
    error::ApiError,
};

/// Changes of pods that come within this time are one count.
const SETTLE: Duration = Duration::from_millis(100);

/// Keeps them until the shutdown.
pub async fn keep(registry: Arc<Registry>, shutdown: Shutdown) {
    // Cancel safe to drop anywhere: every write is a transaction of its own.
    tokio::select! {
        () = run(&registry) => {}
        () = shutdown.asked() => {}
    }
}

async fn run(registry: &Registry) {
    loop {
        // Without a budget, pods come and go and nobody here looks.
        let Some(mut budgets) = subscribe(&registry.cache, Kind::PodDisruptionBudget) else { continue };
        while all(&registry.cache).is_empty() {
            if budgets.next().await.is_err() {
                break;
            }
        }
        let Some(mut pods) = subscribe(&registry.cache, Kind::Pod) else { continue };
        let mut namespaces: BTreeSet<String> = BTreeSet::new();
        let mut anew = true;
        loop {
            let present = all(&registry.cache);
            if present.is_empty() {
                break;
            }
            for entry in present.iter().filter(|entry| anew || namespaces.contains(&entry.object.meta().namespace)) {
                if let Err(error) = count(registry, entry).await {
                    tracing::warn!(budget = entry.key, %error, "the status of a disruption budget is not up to date");
                }
            }
            namespaces.clear();
            // Both arms are cancel safe: `next` is. A subscription that was cut is made anew, with all it has missed.
            let news = tokio::select! {
                news = pods.next() => news.map(|news| (news, false)),
                news = budgets.next() => news.map(|news| (news, true)),
            };
            let Ok((first, of_budgets)) = news else { break };
            anew = of_budgets;
            note(&mut namespaces, &first);
            let settled = tokio::time::sleep(SETTLE);
            tokio::pin!(settled);
            loop {
                // As above; the time that has passed is kept in the sleep.
                let news = tokio::select! {
                    news = pods.next() => news,
                    () = &mut settled => break,
                };
                match news {
                    Ok(news) => note(&mut namespaces, &news),
                    Err(_) => break,
                }
            }
        }
    }
}

fn subscribe(cache: &Arc<Cache>, kind: Kind) -> Option<Subscription> {
    cache.subscribe(kind, Filter::everything(kind).ok()?, 0).ok()
}

fn all(cache: &Cache) -> Vec<Arc<Entry>> {
    let filter = Filter::everything(Kind::PodDisruptionBudget);
    filter.map(|filter| cache.list(Kind::PodDisruptionBudget, &filter).0).unwrap_or_default()
}

fn note(namespaces: &mut BTreeSet<String>, news: &[Delivery]) {
    for entry in news.iter().filter_map(|delivery| delivery.entry.as_ref()) {
        let namespace = &entry.object.meta().namespace;
        if !namespaces.contains(namespace) {
            namespaces.insert(namespace.clone());
        }
    }
}

/// Counts a budget's pods and writes what has changed.
async fn count(registry: &Registry, entry: &Entry) -> Result<(), ApiError> {
    let Some(budget) = entry.object.as_budget() else { return Ok(()) };
    let standing = standing(&registry.cache, entry, budget);
    if told(budget) == Some(standing) {
        return Ok(());
    }
    let now = registry.now();
    let written = registry
        .modify(Kind::PodDisruptionBudget, &entry.key, |object| {
            let Some(budget) = object.as_budget() else { return Ok(Verdict::Keep) };
            // Counted for every attempt: an eviction that came between has changed the pods too.
            let standing = self::standing(&registry.cache, entry, budget);
            if told(budget) == Some(standing) {
                return Ok(Verdict::Keep);
            }
            let mut budget = budget.clone();
            budget.status = Some(standing.status(&budget, now));
            Ok(Verdict::put(budget))
        })
        .await;
    match written {
        Ok(_) | Err(ApiError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// How a budget stands by the pods that the cache knows; nothing of one that is not there any more.
fn standing(cache: &Cache, entry: &Entry, budget: &PodDisruptionBudget) -> Standing {
    Standing::of(budget.spec(), cache.counted(entry).unwrap_or_default())
}

/// What the status says, if it is of the present spec.
fn told(budget: &PodDisruptionBudget) -> Option<Standing> {
    let status = budget.status.as_ref()?;
    let current = budget.metadata.as_ref().is_some_and(|meta| meta.generation == status.observed_generation);
    current.then_some(Standing {
        expected: status.expected_pods,
        healthy: status.current_healthy,
        desired: status.desired_healthy,
        allowed: status.disruptions_allowed,
    })
}
