//! What a batch is held against for the sake of rules between pods, and what its transaction compares so that it stays true.
//!
//! Whoever reads on needs two facts, of which [`crate::rules::announced`] says why they are enough: a pod with a rule is bound only while the
//! announcements are those that were seen, with the rule's among them; and whoever an announcement speaks of takes its turn.

use std::{collections::BTreeSet, sync::PoisonError};

use minipod_proto::{Kind, Resource, rules::Labels};

use super::{
    Binder,
    execute::{ATTEMPTS, Candidate},
};
use crate::{
    cache::Ground,
    error::ApiError,
    keys,
    rules::{
        Demand,
        announced::{self, Announced, Announcement, PRUNE_AT, Turns},
        scene::{Scene, Subject},
        tally::Around,
    },
    storage::{Guard, Item, Outcome, StoreError, Write},
};

/// What must be known before a batch is decided on again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floor {
    /// Up to this revision everything must be seen.
    pub(super) seen: i64,
    /// From this revision on a refusal by a rule is final; the store's after the call had begun.
    pub(super) sure: i64,
}

impl Default for Floor {
    fn default() -> Floor {
        Floor { seen: 0, sure: i64::MAX }
    }
}

/// What a batch was held against.
pub(super) struct Sight {
    /// Everything up to this revision was seen, at least.
    pub(super) revision: i64,
    announced_at: i64,
    /// Turns with the revisions at which they were taken last.
    turns: Vec<(usize, i64)>,
    /// By position.
    of_each: Vec<Turns>,
    /// Rules and counts; `None`: no rule speaks of any pod of the batch.
    pub(super) scene: Option<Scene>,
}

impl Sight {
    /// What the transaction compares.
    pub(super) fn guards(&self) -> impl Iterator<Item = Guard> {
        let turns = self.turns.iter().map(|(turn, at)| Guard::new(keys::turn(*turn), *at));
        std::iter::once(Guard::new(keys::announced(), self.announced_at)).chain(turns)
    }

    /// The turns that it compares.
    pub(super) fn turns(&self) -> Turns {
        self.turns.iter().fold(0, |all, (turn, _)| all | 1 << turn)
    }

    /// Up to which revision must be seen what made the transaction fail, by what the keys of [`Sight::guards`] hold now.
    pub(super) fn overtaken_at(&self, present: &[Option<Item>]) -> i64 {
        let expected = std::iter::once(self.announced_at).chain(self.turns.iter().map(|(_, at)| *at));
        let now = present.iter().map(|item| item.as_ref().map_or(0, |item| item.revision));
        expected.zip(now).filter(|(expected, now)| expected != now).map(|(_, now)| now).max().unwrap_or(0)
    }

    /// The turns that the pods at these positions take.
    pub(super) fn turns_of(&self, positions: &[usize]) -> Turns {
        positions.iter().filter_map(|position| self.of_each.get(*position)).fold(0, |all, turns| all | turns)
    }
}

impl Binder {
    /// The turns that binding a pod takes, as far as is known.
    pub(super) fn concern(&self, ground: &Ground, candidate: &Candidate) -> Turns {
        let own = candidate.wants.demand.iter().flat_map(|demand| demand.whos()).filter_map(Announcement::of);
        let own = own.map(|one| ground.announced.covering(&one).unwrap_or_else(|| one.turn()));
        own.fold(spoken_of(&ground.announced, candidate), |all, turns| all | turns)
    }

    /// Looks at what concerns a batch, at `floor` or later. Rules that are not announced yet are announced first.
    pub(super) async fn look(&self, batch: &[Candidate], mut floor: i64) -> Result<Sight, StoreError> {
        self.caught_up.get_or_try_init(|| self.catch_up()).await?;
        for _ in 0..ATTEMPTS {
            self.reach(floor).await?;
            // Before anything else of the cache: what is looked at after it may only be newer than what is compared.
            let ground = self.registry.cache.ground();
            let (mut of_each, mut missing) = (Vec::with_capacity(batch.len()), BTreeSet::new());
            for candidate in batch {
                let mut turns = spoken_of(&ground.announced, candidate);
                let whos = candidate.wants.demand.iter().flat_map(|demand| demand.whos());
                for one in whos.filter_map(Announcement::of) {
                    match ground.announced.covering(&one) {
                        Some(own) => turns |= own,
                        None => drop(missing.insert(one)),
                    }
                }
                of_each.push(turns);
            }
            if !missing.is_empty() {
                floor = floor.max(self.announce(&missing).await?);
                continue;
            }
            let all = of_each.iter().fold(0, |all, turns| all | turns);
            if self.give_way(&ground, all).await {
                continue;
            }
            // What this server has written itself it need not be told by a transaction that fails.
            let own = self.taken(all);
            if ground.revision < own {
                floor = floor.max(own);
                continue;
            }
            let ruled = all != 0 || batch.iter().any(|candidate| candidate.wants.demand.is_some());
            let turns = announced::numbers(all).map(|turn| (turn, ground.turns.get(turn).copied().unwrap_or(0)));
            return Ok(Sight {
                revision: ground.revision,
                announced_at: ground.announced_at,
                turns: turns.collect(),
                of_each,
                scene: ruled.then(|| self.scene(batch)),
            });
        }
        Err(contended("look at the rules between pods", "they changed"))
    }

    fn scene(&self, batch: &[Candidate]) -> Scene {
        let cache = &self.registry.cache;
        let subjects: Vec<Subject> = batch
            .iter()
            .filter_map(|candidate| {
                Some(Subject { pod: candidate.pod.object.as_pod()?, demand: candidate.wants.demand.as_deref() })
            })
            .collect();
        let nodes: BTreeSet<&str> = batch.iter().map(Candidate::node).collect();
        let nodes: Vec<&str> = nodes.into_iter().collect();
        let labels_of = |namespace: &str| {
            cache.get(Kind::Namespace, namespace).map_or_else(Labels::new, |entry| entry.object.meta().labels.clone())
        };
        let around = Around {
            labels_of: &labels_of,
            // Before they are looked at: what changes meanwhile is then looked at again.
            namespaces_at: cache.namespaces_relabelled(),
            pods: &|since| cache.news(Kind::Pod, since),
            nodes: &|since| cache.news(Kind::Node, since),
        };
        let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        Scene::new(&subjects, &nodes, around, &mut tallies)
    }

    /// Once in a server's life: announces the rules of pods that were bound by servers which announced nothing yet.
    async fn catch_up(&self) -> Result<(), StoreError> {
        self.reach(self.registry.storage.revision().await?).await?;
        let announced = self.registry.cache.ground().announced;
        let missing = self.needed().into_iter().filter(|one| announced.covering(one).is_none()).collect();
        self.announce(&missing).await.map(drop)
    }

    /// Announces whom rules speak of; the revision from which on that stands.
    async fn announce(&self, more: &BTreeSet<Announcement>) -> Result<i64, StoreError> {
        for attempt in 0..ATTEMPTS {
            // Before the pods that are looked through for what is needed, as in `look`.
            let ground = self.registry.cache.ground();
            let (item, _) = self.registry.storage.get(keys::announced()).await?;
            let at = item.as_ref().map_or(0, |item| item.revision);
            let known = item.map_or_else(Announced::default, |item| {
                Announced::decode(&item.value).unwrap_or_else(|_| Announced::everything())
            });
            let more: Vec<Announcement> = more.iter().filter(|one| known.covering(one).is_none()).cloned().collect();
            if more.is_empty() {
                return Ok(at);
            }
            // Where turns are taken all the time, nothing is taken back.
            let needed = (known.len() >= PRUNE_AT && attempt < ATTEMPTS / 4).then(|| self.needed());
            let (next, dropped) = known.with(&more, needed.as_ref());
            let mut guards = vec![Guard::new(keys::announced(), at)];
            // A pod with a rule that is not seen yet has taken the turn of what announces it: then it must not be taken back.
            guards.extend(
                announced::numbers(dropped)
                    .map(|turn| Guard::new(keys::turn(turn), ground.turns.get(turn).copied().unwrap_or(0))),
            );
            let write = Write::Put(keys::announced(), next.encode());
            match self.registry.storage.txn(guards, vec![write]).await? {
                Outcome::Done { revision } => {
                    tracing::debug!(announcements = next.len(), revision, "rules between pods are announced");
                    self.announcements.increment();
                    return Ok(revision);
                }
                Outcome::Lost { present } => {
                    self.reach(present.iter().flatten().map(|item| item.revision).max().unwrap_or(0)).await?;
                }
            }
        }
        Err(contended("announce a rule between pods", "the announcements changed"))
    }

    /// Announcements of all rules of pods that are there and have not ended.
    fn needed(&self) -> BTreeSet<Announcement> {
        let pods = self.registry.cache.all(Kind::Pod);
        let living = pods.iter().filter_map(|entry| entry.object.as_pod()).filter(|pod| !pod.is_terminal());
        // What cannot be understood was never bound with its rules.
        let demands = living.filter_map(|pod| Demand::of(pod).ok().flatten());
        demands.flat_map(|demand| demand.whos().filter_map(Announcement::of).collect::<Vec<_>>()).collect()
    }

    async fn reach(&self, revision: i64) -> Result<(), StoreError> {
        if self.registry.cache.revision() >= revision {
            return Ok(());
        }
        let reached = self.registry.cache.reach(revision).await;
        reached.map_err(|error: ApiError| StoreError::Unavailable {
            operation: "follow the store",
            detail: error.to_string(),
        })
    }

    /// The revision at which this server took any of these turns last.
    fn taken(&self, turns: Turns) -> i64 {
        if turns == 0 {
            return 0;
        }
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        announced::numbers(turns).filter_map(|turn| taken.get(turn)).copied().max().unwrap_or(0)
    }

    /// Notes that this server has taken turns.
    pub(super) fn took(&self, turns: Turns, revision: i64) {
        if turns == 0 {
            return;
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        for turn in announced::numbers(turns) {
            if let Some(at) = taken.get_mut(turn) {
                *at = revision.max(*at);
            }
        }
    }
}

/// Turns of the announcements that speak of a pod.
fn spoken_of(announced: &Announced, candidate: &Candidate) -> Turns {
    match candidate.pod.object.as_pod() {
        Some(pod) if !announced.is_empty() => announced.turns_of(pod.namespace(), &pod.meta().labels),
        _ => 0,
    }
}

fn contended(operation: &'static str, what: &str) -> StoreError {
    StoreError::Unavailable { operation, detail: format!("{what} {ATTEMPTS} times meanwhile") }
}
