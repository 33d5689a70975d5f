//! The alarm of the quota goes by itself when there is room again, or when its member is gone. What to do is decided by a pure function;
//! [`keep_space`] carries it out. (etcd leaves both to `alarm disarm`, which works here too.)

use crate::machine::{ProposeError, Replicator};
use crate::state::{Kind, Shared, number_command};
use std::sync::Arc;
use std::time::Duration;

/// The kind of alarm that says that the quota is used up.
pub const NO_SPACE: i32 = 1;

/// How often the alarms are looked at.
const LOOK: Duration = Duration::from_millis(500);
/// A member's alarm goes when a twentieth of the quota is free again, so that it does not come and go with every write.
const FREE_PART: u64 = 20;

/// What the decision needs to know.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// This member.
    pub me: u64,
    /// Whether it leads.
    pub is_leader: bool,
    /// The members.
    pub members: &'a [u64],
    /// The alarms that are raised: member and kind.
    pub alarms: &'a [(u64, i32)],
    /// The size of the state, bytes.
    pub bytes: u64,
    /// How large it may be, bytes; 0 for no limit.
    pub quota_bytes: u64,
}

/// The members whose alarm of the quota is to be cleared: this one's when there is room again, and, when this member leads, those
/// of members that are gone, for whom nobody else would do it.
#[must_use]
pub fn to_clear(seen: &Seen<'_>) -> Vec<u64> {
    let has_room = seen.quota_bytes == 0 || seen.bytes <= seen.quota_bytes.saturating_sub(seen.quota_bytes / FREE_PART);
    let is_over = |member: u64| {
        if member == seen.me { has_room } else { seen.is_leader && !seen.members.contains(&member) }
    };
    let raised = seen.alarms.iter().filter(|(_, kind)| *kind == NO_SPACE);
    raised.map(|(member, _)| *member).filter(|member| is_over(*member)).collect()
}

/// Clears what is to be cleared, until the replica stops.
pub async fn keep_space<R: Replicator>(replicator: R, shared: Arc<Shared>, quota_bytes: u64) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let alarms: Vec<(u64, i32)> = shared.read().alarms().collect();
        if alarms.is_empty() {
            continue;
        }
        let status = replicator.status();
        let members: Vec<u64> = replicator.members().iter().map(|member| member.id).collect();
        let seen = Seen {
            me: status.member_id,
            is_leader: status.leader_id == status.member_id,
            members: &members,
            alarms: &alarms,
            // What is compacted and not yet swept still counts; it is gone at the next look.
            bytes: shared.bytes(),
            quota_bytes,
        };
        for member in to_clear(&seen) {
            match replicator.propose(number_command(Kind::Alarm, [0, member as i64, i64::from(NO_SPACE)])).await {
                Ok(_) => tracing::info!(
                    member = format!("{member:x}"),
                    bytes = seen.bytes,
                    quota_bytes,
                    "cleared the alarm of the quota: there is room again, or its member is gone"
                ),
                Err(ProposeError::Stopped) => return,
                // The next look proposes it again.
                Err(error) => tracing::debug!(%error, "clear the alarm of the quota"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alarm_goes_when_there_is_room_and_with_its_member() {
        for (what, is_leader, alarms, bytes, quota_bytes, cleared) in [
            ("still full", true, &[(1, 1)][..], 1_000, 1_000, &[][..]),
            ("only a little room", true, &[(1, 1)], 951, 1_000, &[]),
            ("room again", true, &[(1, 1)], 950, 1_000, &[1]),
            ("a follower clears its own too", false, &[(1, 1)], 10, 1_000, &[1]),
            ("no quota any more", true, &[(1, 1)], 5_000, 0, &[1]),
            ("a larger quota", true, &[(1, 1)], 1_000, 2_000, &[1]),
            ("another member clears its own", true, &[(2, 1)], 10, 1_000, &[]),
            ("the leader clears those of members that are gone", true, &[(7, 1)], 1_000, 1_000, &[7]),
            ("a follower leaves that to it", false, &[(7, 1)], 10, 1_000, &[]),
            ("corruption does not go by itself", true, &[(1, 2), (7, 2)], 10, 1_000, &[]),
        ] {
            let seen = Seen { me: 1, is_leader, members: &[1, 2, 3], alarms, bytes, quota_bytes };
            assert_eq!(to_clear(&seen), cleared, "{what}");
        }
    }
}
