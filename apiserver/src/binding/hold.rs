//! Turns that are held for a server which has lost them again and again.
//!
//! A server that learns late what the store says loses every turn that others take more often than it learns of them: whenever it has seen
//! the one that beat it, the next one has been taken. So after some losses it writes its name into the turns. Whoever sees that lets it go
//! first, for a while: long enough for a server that is [`HOLD`] behind, and no longer for one that has died. What keeps rules is the
//! comparison of turns alone: a server that does not give way breaks nothing.

use std::time::{Duration, Instant};

use super::{Binder, sight::Sight};
use crate::{
    cache::Ground,
    keys,
    rules::announced::{self, Turns},
    storage::{Guard, Item, StoreError, Write},
};

/// Losses after which a server has turns held for it.
const LOSSES: u32 = 3;

/// How long others give way, from when they see it. They wait for a server as far behind as that, and for one that is gone.
const HOLD: Duration = Duration::from_secs(2);

/// How a batch has fared with its turns.
#[derive(Debug, Default)]
pub(super) struct Struggle {
    losses: u32,
    /// What is held for it, and since which revision.
    held: Option<(Turns, i64)>,
}

impl Struggle {
    /// The turns were taken by the batch itself: with that they are free again.
    pub(super) fn took(&mut self, turns: Turns) {
        self.held = self.held.map(|(held, at)| (held & !turns, at)).filter(|(held, _)| *held != 0);
    }
}

impl Binder {
    /// Waits while one of these turns is held for another server; whether there was anything to wait for.
    pub(super) async fn give_way(&self, ground: &Ground, turns: Turns) -> bool {
        let (mut ground, mut has_waited) = (ground.clone(), false);
        while let Some(until) = held_until(&ground, turns, self.id.as_bytes(), Instant::now()) {
            has_waited = true;
            // Cancel safe: nothing is taken from anywhere. When its time is over the hold is, whatever the store says.
            let _ = tokio::time::timeout_at(until.into(), self.registry.cache.passed(ground.revision)).await;
            ground = self.registry.cache.ground();
        }
        has_waited
    }

    /// After a transaction that turns have made fail: has them held once that has happened too often. From which revision on everything
    /// must be seen. `present` is what their keys hold.
    pub(super) async fn lost_turns(
        &self,
        struggle: &mut Struggle,
        sight: &Sight,
        present: &[Option<Item>],
    ) -> Result<i64, StoreError> {
        struggle.losses += 1;
        struggle.held = None;
        let turns = sight.turns();
        // The announcements come first, and are nobody's.
        let foreign = |item: &Item| !item.value.is_empty() && item.value != self.id.as_bytes();
        let is_held = present.iter().skip(1).flatten().any(foreign);
        // Another one's hold is not taken away.
        if struggle.losses < LOSSES || turns == 0 || is_held {
            return Ok(0);
        }
        // Compared with nothing: whoever is on the way with one of them loses it to this, once.
        let hold = |turn| Write::Put(keys::turn(turn), self.id.as_bytes().to_vec());
        let writes = announced::numbers(turns).map(hold).collect();
        let at = self.registry.storage.put(writes).await?;
        self.took(turns, at);
        self.holds.increment();
        tracing::debug!(turns, revision = at, "turns are held for bindings that came too late again and again");
        struggle.held = Some((turns, at));
        Ok(at)
    }

    /// Frees what is still held at the end.
    pub(super) async fn release(&self, struggle: Struggle) {
        let Some((turns, at)) = struggle.held else { return };
        let guards = announced::numbers(turns).map(|turn| Guard::new(keys::turn(turn), at)).collect();
        let writes = announced::numbers(turns).map(|turn| Write::Put(keys::turn(turn), Vec::new())).collect();
        match self.registry.storage.txn(guards, writes).await {
            Ok(crate::storage::Outcome::Done { revision }) => self.took(turns, revision),
            // Somebody has taken one already, or the hold ends by itself.
            Ok(crate::storage::Outcome::Lost { .. }) => {}
            Err(error) => tracing::debug!(%error, "turns are not freed"),
        }
    }
}

/// Until when to wait for others that have one of these turns.
fn held_until(ground: &Ground, turns: Turns, own: &[u8], now: Instant) -> Option<Instant> {
    let held = announced::numbers(turns).filter_map(|turn| ground.held.get(turn)?.as_ref());
    held.filter(|held| *held.by != *own).map(|held| held.seen + HOLD).filter(|until| *until > now).max()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{cache::Held, rules::announced::TURNS};

    #[test]
    fn others_are_waited_for_and_no_longer_than_a_hold() {
        let start = Instant::now();
        let mut held: [Option<Held>; TURNS] = Default::default();
        held[3] = Some(Held { by: (*b"other").into(), seen: start });
        held[5] = Some(Held { by: (*b"own").into(), seen: start });
        let ground = Ground { revision: 9, announced: Arc::default(), announced_at: 0, turns: [0; TURNS], held };
        let until = |turns, after: Duration| held_until(&ground, turns, b"own", start + after);
        assert_eq!(until(1 << 3, Duration::ZERO), Some(start + HOLD));
        assert_eq!(until(1 << 3 | 1 << 5, HOLD / 2), Some(start + HOLD));
        assert_eq!(until(1 << 3, HOLD), None, "its server has had its time");
        assert_eq!(until(1 << 5, Duration::ZERO), None, "its own");
        assert_eq!(until(1 << 4, Duration::ZERO), None, "another turn");
    }

    #[test]
    fn what_was_taken_is_held_no_more() {
        let mut struggle = Struggle { losses: LOSSES, held: Some((0b110, 7)) };
        struggle.took(0b010);
        assert_eq!(struggle.held, Some((0b100, 7)));
        struggle.took(0b100);
        assert_eq!(struggle.held, None);
    }
}
