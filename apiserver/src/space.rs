//! The members of the store behind this server: asked for users, and looked at, so that what is new is refused while there is still room
//! to change and delete what is there.
//!
//! A store that has used up its quota refuses everything that writes a key, and deleting a pod writes several (its grace, its status,
//! its node's ledger). So the last twentieth of the quota is kept for that.

use std::{
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::future::join_all;
use minipod_daemon::shutdown::Shutdown;
use minipod_proto::{quantity::Quantity, v1};
use minipod_store::{
    remote::{Known, MemberStatus, Remote, RemoteError},
    replica::run::with_causes,
};
use tokio::sync::OnceCell;

use crate::error::ApiError;

/// What a user can do about a full store.
pub const ADVICE: &str = "delete what is not needed and wait for the history to be compacted (--keep-history), or give the store more room \
     (--store-quota of the API server; --quota-backend-bytes of an etcd, whose alarm is cleared with `etcdctl alarm disarm`); \
     `minictl store status` shows sizes and alarms";

/// How often the members are looked at.
const LOOK: Duration = Duration::from_secs(2);
/// This part of the quota is kept for changes and deletions.
const KEPT_PART: u64 = 20;

/// The members that this server reaches.
#[derive(Clone)]
pub struct Members(Arc<Reached>);

enum Reached {
    /// The store in this process.
    Own(Box<Remote>),
    /// An etcd's members, connected to when they are first asked.
    Etcd(Vec<(String, OnceCell<Remote>)>),
}

impl Members {
    /// The store of this process.
    pub fn own(store: Remote) -> Members {
        Members(Arc::new(Reached::Own(Box::new(store))))
    }

    /// An etcd, at `host:port` addresses.
    pub fn etcd(addresses: &[String]) -> Members {
        let members = addresses.iter().map(|address| (address.clone(), OnceCell::new()));
        Members(Arc::new(Reached::Etcd(members.collect())))
    }

    /// Whether it is the store of this process.
    pub fn is_own(&self) -> bool {
        matches!(*self.0, Reached::Own(_))
    }

    /// What each says of itself, all asked at once.
    pub async fn statuses(&self) -> Vec<(String, Result<MemberStatus, RemoteError>)> {
        match &*self.0 {
            Reached::Own(remote) => vec![(remote.endpoint().to_owned(), remote.status().await)],
            Reached::Etcd(members) => {
                join_all(members.iter().map(async |(address, remote)| {
                    let said = async { connected(address, remote).await?.status().await };
                    (address.clone(), said.await)
                }))
                .await
            }
        }
    }

    /// The members as the first one that answers knows them.
    ///
    /// # Errors
    /// When none answers: why the last one did not.
    pub async fn list(&self) -> Result<Vec<Known>, RemoteError> {
        match &*self.0 {
            Reached::Own(remote) => remote.members().await,
            Reached::Etcd(members) => {
                let mut last = None;
                for (address, remote) in members {
                    match async { connected(address, remote).await?.members().await }.await {
                        Ok(known) => return Ok(known),
                        Err(error) => last = Some(error),
                    }
                }
                last.map_or(Ok(Vec::new()), Err)
            }
        }
    }
}

async fn connected<'a>(address: &str, remote: &'a OnceCell<Remote>) -> Result<&'a Remote, RemoteError> {
    remote.get_or_try_init(|| Remote::new(address, None)).await
}

/// Puts together what is known of the members and what they said.
pub fn report(
    kind: &str,
    known: Vec<Known>,
    said: Vec<(String, Result<MemberStatus, RemoteError>)>,
) -> v1::StoreStatus {
    let mut members: Vec<v1::StoreMember> = known
        .into_iter()
        .map(|known| v1::StoreMember {
            id: known.id,
            name: known.name,
            is_learner: known.is_learner,
            ..v1::StoreMember::default()
        })
        .collect();
    for (address, said) in said {
        let said = match said {
            Ok(status) => status,
            Err(error) => {
                // Which member it would have been, nobody has said.
                let problem = with_causes(&error);
                members.push(v1::StoreMember { name: address, problem, ..v1::StoreMember::default() });
                continue;
            }
        };
        let id = said.member_id;
        match members.iter_mut().find(|member| member.id == id) {
            Some(member) => member.status = Some(wire_status(said)),
            None => members.push(v1::StoreMember {
                id,
                status: Some(wire_status(said)),
                problem: "no other member knows it".to_owned(),
                ..v1::StoreMember::default()
            }),
        }
    }
    v1::StoreStatus { kind: kind.to_owned(), members, servers: Vec::new() }
}

fn wire_status(said: MemberStatus) -> v1::StoreMemberStatus {
    let alarms = said.alarms.into_iter();
    v1::StoreMemberStatus {
        leader_id: said.leader_id,
        version: said.version,
        term: said.term,
        applied_index: said.applied_index,
        revision: said.revision,
        size_bytes: said.size_bytes,
        used_bytes: said.used_bytes,
        quota_bytes: said.quota_bytes,
        alarms: alarms.map(|alarm| v1::StoreAlarm { member_id: alarm.member_id, kind: alarm.kind }).collect(),
        problems: said.problems,
    }
}

/// How much room there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Room {
    /// Enough, or nobody has said.
    #[default]
    Enough,
    /// Only what is kept for changes and deletions.
    Scarce {
        /// In use, bytes.
        used_bytes: u64,
        /// How much may be used, bytes.
        quota_bytes: u64,
    },
    /// None: the store itself refuses to write.
    None,
}

/// What the members' words come to.
pub fn judge<'a>(said: impl IntoIterator<Item = &'a MemberStatus>) -> Room {
    let mut room = Room::Enough;
    for member in said {
        if member.alarms.iter().any(|alarm| alarm.kind == "NOSPACE") {
            return Room::None;
        }
        let MemberStatus { used_bytes, quota_bytes, .. } = *member;
        if quota_bytes > 0 && used_bytes >= quota_bytes - quota_bytes / KEPT_PART {
            room = Room::Scarce { used_bytes, quota_bytes };
        }
    }
    room
}

/// The room as it was seen last. Shared by everybody who adds something.
#[derive(Debug, Default)]
pub struct Space(RwLock<Room>);

impl Space {
    /// Notes what was seen.
    pub fn set(&self, room: Room) {
        let mut seen = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if std::mem::replace(&mut *seen, room) != room {
            drop(seen);
            match self.trouble() {
                Some(trouble) => tracing::warn!("{trouble}"),
                None => tracing::info!("the store has room"),
            }
        }
    }

    /// What is wrong, for whoever looks whether this server takes writes.
    pub fn trouble(&self) -> Option<String> {
        match *self.0.read().unwrap_or_else(PoisonError::into_inner) {
            Room::Enough => None,
            Room::Scarce { used_bytes, quota_bytes } => Some(format!(
                "the store is nearly full ({} of {}), and what is left is kept for changes and deletions: {ADVICE}",
                amount(used_bytes),
                amount(quota_bytes)
            )),
            Room::None => Some(format!("the store is full, nothing can be written: {ADVICE}")),
        }
    }

    /// Whether something new may be added.
    ///
    /// # Errors
    /// [`ApiError::StoreFull`] when not, with what can be done about it.
    pub fn admit(&self) -> Result<(), ApiError> {
        self.trouble().map_or(Ok(()), |trouble| Err(ApiError::StoreFull(trouble)))
    }
}

fn amount(bytes: u64) -> String {
    // Rounded down to mebibytes where there are some, so that it stays readable.
    let rounded = if bytes >= 1 << 24 { bytes >> 20 << 20 } else { bytes };
    Quantity::from_size(rounded).to_string()
}

/// Looks how much room there is until the shutdown.
pub async fn watch(space: Arc<Space>, members: Members, shutdown: Shutdown) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        // Cancel safe: a tick that is not taken comes again.
        tokio::select! {
            _ = tick.tick() => {}
            () = shutdown.asked() => return,
        }
        let said: Vec<MemberStatus> = members.statuses().await.into_iter().filter_map(|(_, said)| said.ok()).collect();
        // While nobody answers nothing is known, and nothing can be written anyway.
        if !said.is_empty() {
            space.set(judge(&said));
        }
    }
}

#[cfg(test)]
mod tests {
    use minipod_store::remote::Alarm;

    use super::*;

    fn said(member_id: u64, used_bytes: u64, quota_bytes: u64) -> MemberStatus {
        MemberStatus { member_id, used_bytes, quota_bytes, ..MemberStatus::default() }
    }

    #[test]
    fn room_is_what_the_fullest_member_has() {
        let full = MemberStatus { alarms: vec![Alarm { member_id: 1, kind: "NOSPACE".into() }], ..said(2, 1, 100) };
        let corrupt = MemberStatus { alarms: vec![Alarm { member_id: 1, kind: "CORRUPT".into() }], ..said(2, 1, 100) };
        let scarce = Room::Scarce { used_bytes: 95, quota_bytes: 100 };
        for (what, members, room) in [
            ("nobody answers", vec![], Room::Enough),
            ("room", vec![said(1, 94, 100)], Room::Enough),
            ("little room", vec![said(1, 95, 100)], scarce),
            ("one of three", vec![said(1, 10, 100), said(2, 95, 100), said(3, 10, 100)], scarce),
            ("no limit", vec![said(1, 1 << 50, 0)], Room::Enough),
            ("an alarm", vec![said(1, 95, 100), full], Room::None),
            ("another alarm", vec![corrupt], Room::Enough),
        ] {
            assert_eq!(judge(&members), room, "{what}");
        }
    }

    #[test]
    fn trouble_says_how_full_it_is_and_what_to_do() {
        let space = Space::default();
        assert!(space.admit().is_ok());
        space.set(Room::Scarce { used_bytes: 1_992_294_400, quota_bytes: 2 << 30 });
        let told = space.admit().expect_err("refused").to_string();
        assert!(told.contains("(1900Mi of 2Gi)") && told.contains("--store-quota"), "{told}");
        space.set(Room::None);
        assert!(space.admit().expect_err("refused").to_string().contains("nothing can be written"));
        space.set(Room::Enough);
        assert!(space.admit().is_ok());
    }

    #[test]
    fn members_and_their_words_are_put_together() {
        let known = |id, name: &str| Known { id, name: name.into(), ..Known::default() };
        let lost = RemoteError::Timeout { operation: "ask", endpoint: "b:1".into(), seconds: 10 };
        let told = vec![
            ("a:1".to_owned(), Ok(said(1, 5, 9))),
            ("b:1".to_owned(), Err(lost)),
            ("c:1".to_owned(), Ok(said(9, 1, 1))),
        ];
        let report = report("etcd", vec![known(1, "a"), known(2, "b")], told);
        let seen: Vec<_> = report
            .members
            .iter()
            .map(|member| (member.id, member.name.as_str(), member.status.is_some(), member.problem.as_str()))
            .collect();
        assert_eq!(
            seen,
            [
                (1, "a", true, ""),
                (2, "b", false, ""),
                (0, "b:1", false, "ask at b:1: no answer within 10 s"),
                (9, "", true, "no other member knows it"),
            ]
        );
    }
}
