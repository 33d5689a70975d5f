//! Whom rules speak of: the announcements, one key of the store, and the turns that bindings take.
//!
//! A pod with a rule is bound only after whom the rule speaks of was announced. Every binding compares the announcements, and so knows
//! of all that were there when it was written: whoever is spoken of takes the announcement's turn, whether or not it has rules of its own.
//! A turn is a key that each of these bindings compares and writes. So of two bindings that could break a rule together one sees the other,
//! or is refused by its transaction. An announcement says a little more than the rule (no topology, and any namespace where the rule
//! chooses them by label): too many turns cost time, too few would cost the rule.

use std::collections::{BTreeSet, HashMap};

use minipod_proto::{
    rules::{Labels, Who},
    selector::LabelSelector,
};
use prost::Message;

/// Number of turns. Announcements share them by hash: more would let more bindings pass each other, but all that one binding takes must
/// fit in its transaction.
pub const TURNS: usize = 16;
/// From so many announcements on, those that nobody needs any more are taken back when a new one comes.
pub const PRUNE_AT: usize = 64;
/// At most so many, some tens of kilobytes: more are made coarser, first whole namespaces, then everything.
const LIMIT: usize = 512;

/// A set of turns: the bit of each.
pub type Turns = u16;

/// The turns of a set, as numbers.
pub fn numbers(turns: Turns) -> impl Iterator<Item = usize> {
    (0..TURNS).filter(move |turn| turns & (1 << turn) != 0)
}

/// Some pods that a rule speaks of. The form in the store.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Message)]
pub struct Announcement {
    /// Their namespaces, sorted; empty with `anywhere`.
    #[prost(string, repeated, tag = "1")]
    pub namespaces: Vec<String>,
    /// They may be in any namespace.
    #[prost(bool, tag = "2")]
    pub anywhere: bool,
    /// A label selector as text; empty: all pods there.
    #[prost(string, tag = "3")]
    pub labels: String,
}

/// The value of the key.
#[derive(Clone, PartialEq, Eq, Message)]
struct Record {
    #[prost(message, repeated, tag = "1")]
    all: Vec<Announcement>,
}

impl Announcement {
    /// Of whom a rule speaks of; `None`: of nobody.
    pub fn of(who: &Who) -> Option<Announcement> {
        let labels = who.labels.as_ref()?.to_string();
        let anywhere = who.namespace_selector.is_some();
        let namespaces = if anywhere { Vec::new() } else { who.namespaces.iter().cloned().collect() };
        Some(Announcement { namespaces, anywhere, labels })
    }

    /// Whether it has all pods that the other one has, as far as both tell.
    fn covers(&self, other: &Announcement) -> bool {
        let everywhere =
            || !other.anywhere && other.namespaces.iter().all(|one| self.namespaces.binary_search(one).is_ok());
        (self.labels.is_empty() || self.labels == other.labels) && (self.anywhere || everywhere())
    }

    /// Its turn. FNV-1a: the same in every server and every build.
    pub fn turn(&self) -> Turns {
        let bytes = self.encode_to_vec();
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        // Texts that differ at their end alone would share few turns: mixed as by murmur3's end.
        let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        1 << ((mixed ^ (mixed >> 33)) % TURNS as u64)
    }
}

/// All announcements.
#[derive(Debug, Default)]
pub struct Announced {
    all: Vec<Announcement>,
    /// Of each its selector and its turn.
    parsed: Vec<(LabelSelector, Turns)>,
    by_namespace: HashMap<String, Vec<usize>>,
    anywhere: Vec<usize>,
}

impl Announced {
    /// These.
    pub fn new(mut all: Vec<Announcement>) -> Announced {
        all.sort_unstable();
        all.dedup();
        let (mut by_namespace, mut anywhere) = (HashMap::<String, Vec<usize>>::new(), Vec::new());
        for (index, one) in all.iter().enumerate() {
            if one.anywhere {
                anywhere.push(index);
            }
            for namespace in &one.namespaces {
                by_namespace.entry(namespace.clone()).or_default().push(index);
            }
        }
        // A text that is none (there is no such writer) has everything: that costs time and breaks nothing.
        let parsed =
            all.iter().map(|one| (LabelSelector::parse(&one.labels).unwrap_or_default(), one.turn())).collect();
        Announced { all, parsed, by_namespace, anywhere }
    }

    /// From the store.
    ///
    /// # Errors
    /// When the value is none.
    pub fn decode(value: &[u8]) -> Result<Announced, prost::DecodeError> {
        Ok(Announced::new(Record::decode(value)?.all))
    }

    /// For the store.
    pub fn encode(&self) -> Vec<u8> {
        Record { all: self.all.clone() }.encode_to_vec()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = (&Announcement, &(LabelSelector, Turns))> {
        let named = self.by_namespace.get(namespace).into_iter().flatten();
        named.chain(&self.anywhere).filter_map(|index| Some((self.all.get(*index)?, self.parsed.get(*index)?)))
    }

    /// Turns of all that may speak of a pod with these labels.
    pub fn turns_of(&self, namespace: &str, labels: &Labels) -> Turns {
        let speaking = self.in_namespace(namespace).filter(|(_, (selector, _))| selector.matches(labels));
        speaking.fold(0, |turns, (_, (_, turn))| turns | turn)
    }

    /// Turns of those that have all pods of this one; `None`: it is not announced.
    pub fn covering(&self, one: &Announcement) -> Option<Turns> {
        // What covers it has its first namespace, and an announcement has one or is for any.
        let first = one.namespaces.first().map_or("", String::as_str);
        let covering = self.in_namespace(first).filter(|(other, _)| other.covers(one));
        let turns = covering.fold(0, |turns, (_, (_, turn))| turns | turn);
        (turns != 0).then_some(turns)
    }

    /// With some more, and the turns of those that were taken back: all that cover nothing of what is `needed`, if that is told.
    pub fn with(&self, more: &[Announcement], needed: Option<&BTreeSet<Announcement>>) -> (Announced, Turns) {
        let (mut all, mut dropped) = (self.all.clone(), 0);
        if let Some(needed) = needed {
            all.retain(|one| {
                let keep = needed.contains(one) || needed.iter().any(|other| one.covers(other));
                dropped |= if keep { 0 } else { one.turn() };
                keep
            });
        }
        all.extend(more.iter().cloned());
        let next = Announced::new(all);
        if next.len() <= LIMIT {
            return (next, dropped);
        }
        let coarse = next.all.into_iter().map(|one| Announcement { labels: String::new(), ..one });
        let coarse = Announced::new(coarse.collect());
        if coarse.len() <= LIMIT { (coarse, dropped) } else { (Announced::everything(), dropped) }
    }

    /// All pods of the cluster: every binding takes one turn.
    pub fn everything() -> Announced {
        Announced::new(vec![Announcement { anywhere: true, ..Announcement::default() }])
    }
}

#[cfg(test)]
#[path = "announced_tests.rs"]
mod tests;
