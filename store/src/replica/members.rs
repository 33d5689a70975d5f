//! Who belongs to the cluster, as of the last applied change. Pure, and the same on every member.

use crate::machine::Member;
use crate::records::{ChangeKind, ChangeRecord, MemberRecord};
use crate::refused::Refused;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2};
use std::collections::{BTreeMap, BTreeSet};

/// The members, and the ids that never come back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    members: BTreeMap<u64, Member>,
    removed: BTreeSet<u64>,
}

/// etcd allows one learner at a time unless told otherwise.
const MAX_LEARNERS: usize = 1;

impl Membership {
    /// From what a snapshot says.
    #[must_use]
    pub fn new(members: impl IntoIterator<Item = Member>, removed: impl IntoIterator<Item = u64>) -> Self {
        let members = members.into_iter().map(|member| (member.id, member)).collect();
        Self { members, removed: removed.into_iter().collect() }
    }

    /// All members by id.
    #[must_use]
    pub fn list(&self) -> Vec<Member> {
        self.members.values().cloned().collect()
    }

    /// One member.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<&Member> {
        self.members.get(&id)
    }

    /// Whether the id was a member's once.
    #[must_use]
    pub fn was_removed(&self, id: u64) -> bool {
        self.removed.contains(&id)
    }

    /// For a snapshot.
    #[must_use]
    pub fn records(&self) -> (Vec<MemberRecord>, Vec<u64>) {
        (self.list().into_iter().map(MemberRecord::from).collect(), self.removed.iter().copied().collect())
    }

    /// Whether the change may be made as things are, in etcd's words.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, change: &ChangeRecord) -> Result<(), Refused> {
        let Some(wanted) = &change.member else { return Err(Refused::MemberNotFound) };
        let known = self.members.get(&wanted.id);
        match ChangeKind::try_from(change.kind).unwrap_or(ChangeKind::Unset) {
            ChangeKind::Unset => Err(Refused::MemberNotFound),
            ChangeKind::Add => {
                if known.is_some() || self.was_removed(wanted.id) {
                    return Err(Refused::MemberExists);
                }
                self.check_urls(wanted)?;
                if wanted.is_learner {
                    let learners = self.members.values().filter(|member| member.is_learner).count();
                    return if learners < MAX_LEARNERS { Ok(()) } else { Err(Refused::TooManyLearners) };
                }
                self.check_quorum(1, None)
            }
            ChangeKind::Remove => {
                let known = known.ok_or(Refused::MemberNotFound)?;
                if known.is_learner { Ok(()) } else { self.check_quorum(0, Some(wanted.id)) }
            }
            ChangeKind::Update => {
                known.ok_or(Refused::MemberNotFound)?;
                self.check_urls(wanted)
            }
            ChangeKind::Promote => {
                if known.ok_or(Refused::MemberNotFound)?.is_learner {
                    Ok(())
                } else {
                    Err(Refused::MemberNotLearner)
                }
            }
            ChangeKind::Publish => known.map(|_| ()).ok_or(Refused::MemberNotFound),
        }
    }

    fn check_urls(&self, wanted: &MemberRecord) -> Result<(), Refused> {
        let others = || self.members.values().filter(|member| member.id != wanted.id);
        let taken = wanted.peer_urls.iter().any(|url| others().any(|member| member.peer_urls.contains(url)));
        if taken { Err(Refused::PeerUrlExists) } else { Ok(()) }
    }

    /// Whether the voters that have started are a quorum after `added` that has not started and without `removed`.
    fn check_quorum(&self, added: usize, removed: Option<u64>) -> Result<(), Refused> {
        let voters = || self.members.values().filter(|member| !member.is_learner && Some(member.id) != removed);
        let started = voters().filter(|member| !member.name.is_empty()).count();
        let quorum = (voters().count() + added) / 2 + 1;
        // A cluster of one grows through a moment without quorum; there is no other way but by learners.
        let grows_from_one = added == 1 && started == 1 && voters().count() == 1;
        if grows_from_one || started >= quorum { Ok(()) } else { Err(Refused::MemberNotEnoughStarted) }
    }

    /// Makes a change that was checked.
    pub fn apply(&mut self, change: &ChangeRecord) {
        let Some(wanted) = change.member.clone() else { return };
        let id = wanted.id;
        match ChangeKind::try_from(change.kind).unwrap_or(ChangeKind::Unset) {
            ChangeKind::Unset => {}
            ChangeKind::Add => drop(self.members.insert(id, wanted.into())),
            ChangeKind::Remove => {
                self.members.remove(&id);
                self.removed.insert(id);
            }
            ChangeKind::Update => self.change(id, |member| member.peer_urls = wanted.peer_urls),
            ChangeKind::Promote => self.change(id, |member| member.is_learner = false),
            ChangeKind::Publish => self.change(id, |member| {
                member.name = wanted.name;
                member.client_urls = wanted.client_urls;
            }),
        }
    }

    fn change(&mut self, id: u64, with: impl FnOnce(&mut Member)) {
        if let Some(member) = self.members.get_mut(&id) {
            with(member);
        }
    }
}

/// What raft has to do for a change; `None` when its configuration stays.
#[must_use]
pub fn conf_change(change: &ChangeRecord) -> Option<ConfChangeV2> {
    let member = change.member.as_ref()?;
    let change_type = match ChangeKind::try_from(change.kind).ok()? {
        ChangeKind::Add if member.is_learner => ConfChangeType::AddLearnerNode,
        ChangeKind::Add | ChangeKind::Promote => ConfChangeType::AddNode,
        ChangeKind::Remove => ConfChangeType::RemoveNode,
        ChangeKind::Unset | ChangeKind::Update | ChangeKind::Publish => return None,
    };
    let mut single = ConfChangeSingle { node_id: member.id, ..ConfChangeSingle::default() };
    single.set_change_type(change_type);
    Some(ConfChangeV2 { changes: vec![single], context: change.to_bytes(), ..ConfChangeV2::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, name: &str, is_learner: bool) -> Member {
        Member { id, name: name.to_owned(), peer_urls: vec![format!("http://{id}")], is_learner, ..Member::default() }
    }

    fn change(kind: ChangeKind, member: Member) -> ChangeRecord {
        ChangeRecord { kind: kind.into(), member: Some(member.into()) }
    }

    #[test]
    fn changes_are_refused_in_etcds_words() {
        use ChangeKind::{Add, Promote, Remove, Update};
        let three = Membership::new([member(1, "a", false), member(2, "b", false), member(3, "", false)], [9]);
        let one = Membership::new([member(1, "a", false)], []);
        let with_learner = Membership::new([member(1, "a", false), member(2, "b", true)], []);
        let mut same_url = member(5, "", false);
        same_url.peer_urls = vec!["http://2".to_owned()];
        let table = [
            (&three, change(Add, member(4, "", true)), Ok(())),
            (&three, change(Add, member(4, "", false)), Err(Refused::MemberNotEnoughStarted)),
            (&three, change(Add, member(2, "", true)), Err(Refused::MemberExists)),
            (&three, change(Add, member(9, "", true)), Err(Refused::MemberExists)),
            (&three, change(Add, same_url.clone()), Err(Refused::PeerUrlExists)),
            (&three, change(Update, same_url), Err(Refused::MemberNotFound)),
            (&three, change(Update, member(2, "", false)), Ok(())),
            (&three, change(Remove, member(3, "", false)), Ok(())),
            (&three, change(Remove, member(1, "", false)), Err(Refused::MemberNotEnoughStarted)),
            (&three, change(Remove, member(8, "", false)), Err(Refused::MemberNotFound)),
            (&three, change(Promote, member(1, "", false)), Err(Refused::MemberNotLearner)),
            (&one, change(Add, member(2, "", false)), Ok(())),
            (&with_learner, change(Add, member(3, "", true)), Err(Refused::TooManyLearners)),
            (&with_learner, change(Promote, member(2, "", false)), Ok(())),
            (&with_learner, change(Remove, member(2, "", false)), Ok(())),
            (&with_learner, ChangeRecord::default(), Err(Refused::MemberNotFound)),
        ];
        for (membership, change, expected) in table {
            assert_eq!(membership.check(&change), expected, "{change:?}");
        }
    }

    #[test]
    fn changes_take_effect_and_tell_raft() {
        let mut members = Membership::new([member(1, "a", false)], []);
        let add = change(ChangeKind::Add, member(2, "", true));
        assert_eq!(
            conf_change(&add).map(|change| change.changes[0].change_type),
            Some(ConfChangeType::AddLearnerNode as i32)
        );
        members.apply(&add);
        members.apply(&change(ChangeKind::Publish, member(2, "b", false)));
        members.apply(&change(ChangeKind::Promote, member(2, "", false)));
        assert_eq!(members.get(2), Some(&member(2, "b", false)));
        let remove = change(ChangeKind::Remove, member(1, "", false));
        assert_eq!(conf_change(&remove).map(|change| change.changes[0].node_id), Some(1));
        members.apply(&remove);
        assert!(members.was_removed(1) && members.get(1).is_none());
        assert_eq!(conf_change(&change(ChangeKind::Publish, member(2, "b", false))), None);
    }
}
