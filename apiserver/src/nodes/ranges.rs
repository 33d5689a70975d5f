//! Which ranges are given, as far as this server has seen: a fleet that registers at once reads them once, not once per node, and
//! no two of its nodes ask for the same one. It is a hint only; the transaction that claims a range compares its key.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::cidr::{self, Choice, ClusterCidr};

/// Owner and key revision by number.
pub type Given = BTreeMap<u32, (String, i64)>;

/// What is known of the ranges that are given.
#[derive(Debug, Default)]
pub struct Ranges {
    /// `None`: nothing, or too old to go by.
    known: Mutex<Option<Given>>,
}

/// A range for a node, and who had it.
#[derive(Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Which.
    pub choice: Choice,
    /// The revision of the chosen range's key; 0: it has none.
    pub revision: i64,
    /// The node that is gone, of a range that is taken over.
    pub owner: Option<String>,
}

impl Ranges {
    /// Whether there is anything to choose from without asking the store.
    pub fn is_known(&self) -> bool {
        self.known().is_some()
    }

    /// What was remembered is wrong.
    pub fn forget(&self) {
        *self.known() = None;
    }

    /// Chooses, from what the store has just said or else from what is remembered; a range that was never given is set aside. `None`:
    /// the store must be read, because only that a range was never given can be found out by claiming it.
    pub fn choose(
        &self,
        cidr: ClusterCidr,
        node: &str,
        read: Option<Given>,
        alive: impl Fn(&str) -> bool,
    ) -> Option<Chosen> {
        let mut known = self.known();
        let fresh = known.is_none();
        let given = match read {
            Some(read) => known.get_or_insert(read),
            None => known.as_mut()?,
        };
        let choice = cidr::choose(cidr, node, given, alive);
        if let Choice::Free(index) = choice {
            given.insert(index, (node.to_owned(), 0));
            return Some(Chosen { choice, revision: 0, owner: None });
        }
        if !fresh {
            *known = None;
            return None;
        }
        let index = match choice {
            Choice::Has(index) | Choice::Reclaim(index, _) => Some(index),
            Choice::Free(_) | Choice::Full => None,
        };
        let (owner, revision) = index.and_then(|index| given.get(&index)).cloned().unwrap_or_default();
        let owner = matches!(choice, Choice::Reclaim(..)).then_some(owner);
        Some(Chosen { choice, revision, owner })
    }

    fn known(&self) -> MutexGuard<'_, Option<Given>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(owners: &[(u32, &str)]) -> Given {
        owners.iter().map(|(index, owner)| (*index, ((*owner).to_owned(), i64::from(*index) + 10))).collect()
    }

    #[test]
    fn a_fleet_reads_once_and_asks_for_different_ranges() {
        let cidr: ClusterCidr = "10.0.0.0/21".parse().expect("good");
        let ranges = Ranges::default();
        let choose = |node: &str, read| ranges.choose(cidr, node, read, |node| node != "gone");
        let chosen =
            |choice, revision, owner: Option<&str>| Some(Chosen { choice, revision, owner: owner.map(str::to_owned) });
        assert_eq!(choose("a", None), None, "nothing is known yet");
        let read = given(&[(0, "old"), (2, "gone")]);
        assert_eq!(choose("a", Some(read.clone())), chosen(Choice::Free(1), 0, None));
        assert_eq!(choose("b", None), chosen(Choice::Free(3), 0, None));
        assert_eq!(
            choose("c", Some(read)),
            chosen(Choice::Free(4), 0, None),
            "two read at once: what is set aside stays"
        );
        assert_eq!(choose("old", None), None, "the range that it had may be another's by now");
        assert!(!ranges.is_known());
        let read = given(&[(0, "old"), (1, "a"), (2, "gone"), (3, "b"), (4, "c"), (5, "d"), (6, "e"), (7, "f")]);
        assert_eq!(choose("old", Some(read)), chosen(Choice::Has(0), 10, None));
        ranges.forget();
        let read = given(&[(0, "old"), (1, "a"), (2, "gone"), (3, "b"), (4, "c"), (5, "d"), (6, "e"), (7, "f")]);
        assert_eq!(choose("g", Some(read)), chosen(Choice::Reclaim(2, 12), 12, Some("gone")));
        ranges.forget();
        let full = (0..8).map(|index| (index, ("a".to_owned(), 1))).collect();
        assert_eq!(choose("g", Some(full)), chosen(Choice::Full, 0, None));
    }
}
