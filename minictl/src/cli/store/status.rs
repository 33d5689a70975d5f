//! `minictl store status`: what the members say, put together, and how it is shown.

use futures_util::future::join_all;
use minipod_client::{Client, Options};
use minipod_proto::quantity::Quantity;
use minipod_proto::v1;
use minipod_store::peer::tls::PeerTls;
use minipod_store::remote::{Alarm, Known, MemberStatus, Remote, RemoteError};
use serde_json::{Value, json};

use super::super::args::Global;
use super::super::error::CliError;
use super::super::session::Session;
use crate::view::table::Table;
use crate::view::text;

/// What to do about a full store.
const ADVICE: &str = "delete what is not needed and wait for the history to be compacted (the API server's --keep-history), or give the store more \
     room (--store-quota of the API server, --quota-bytes of minipod-store; --quota-backend-bytes of an etcd, whose alarm stays until `etcdctl \
     alarm disarm`)";

/// A member, or somebody who should have been one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Row {
    known: Known,
    said: Option<MemberStatus>,
    problem: String,
}

/// The members.
#[derive(Debug, Default)]
pub struct Told {
    kind: String,
    rows: Vec<Row>,
}

/// What the API server says of its store; where several carry one, what each says of its member.
pub async fn from_api(global: &Global) -> Result<Told, CliError> {
    let session = Session::new(global)?;
    let first = session.client.store_status().await?;
    let mut told = Told { kind: first.kind.clone(), rows: Vec::new() };
    // The others are reached as the first one was.
    let scheme = session.client.servers().split("://").next().unwrap_or("http").to_owned();
    let others = join_all(first.servers.iter().map(async |address| {
        let asked = async { Client::new(&Options::servers(&format!("{scheme}://{address}")))?.store_status().await };
        (address, asked.await)
    }));
    told.add_api(first.members.clone());
    for (address, said) in others.await {
        match said {
            Ok(status) => told.add_api(status.members),
            Err(error) => told.rows.push(Row {
                problem: format!("the API server at {address} does not answer: {error}"),
                ..Row::default()
            }),
        }
    }
    Ok(told)
}

/// What members of the store say.
pub async fn from_members(endpoints: &[String], tls: Option<&PeerTls>) -> Told {
    let asked = endpoints.iter().map(async |endpoint| {
        let said = async {
            let remote = Remote::new(endpoint, tls).await?;
            Ok::<_, RemoteError>((remote.members().await?, remote.status().await?))
        };
        (endpoint, said.await)
    });
    let mut told = Told::default();
    for (endpoint, said) in join_all(asked).await {
        match said {
            Ok((known, status)) => {
                told.kind = if status.is_ours() { "minipod-store" } else { "etcd" }.to_owned();
                let me = status.member_id;
                for known in known {
                    let said = (known.id == me).then(|| status.clone());
                    told.add(Row { known, said, problem: String::new() });
                }
            }
            Err(error) => {
                let problem = minipod_store::replica::run::with_causes(&error);
                let known = Known { name: endpoint.clone(), ..Known::default() };
                told.rows.push(Row { known, said: None, problem });
            }
        }
    }
    told
}

fn unwire(said: v1::StoreMemberStatus, member_id: u64) -> MemberStatus {
    let alarms = said.alarms.into_iter();
    MemberStatus {
        member_id,
        leader_id: said.leader_id,
        version: said.version,
        term: said.term,
        applied_index: said.applied_index,
        revision: said.revision,
        size_bytes: said.size_bytes,
        used_bytes: said.used_bytes,
        quota_bytes: said.quota_bytes,
        alarms: alarms.map(|alarm| Alarm { member_id: alarm.member_id, kind: alarm.kind }).collect(),
        problems: said.problems,
    }
}

impl Told {
    fn add_api(&mut self, members: Vec<v1::StoreMember>) {
        for member in members {
            let known =
                Known { id: member.id, name: member.name, is_learner: member.is_learner, client_urls: Vec::new() };
            let said = member.status.map(|said| unwire(said, member.id));
            self.add(Row { known, said, problem: member.problem });
        }
    }

    /// Adds what somebody knows of a member to what is known.
    fn add(&mut self, row: Row) {
        let same = self.rows.iter_mut().find(|there| there.known.id == row.known.id && row.known.id != 0);
        match same {
            Some(there) => {
                there.said = row.said.or(there.said.take());
                if there.problem.is_empty() {
                    there.problem = row.problem;
                }
            }
            None => self.rows.push(row),
        }
    }

    fn name_of(&self, id: u64) -> String {
        let row = self.rows.iter().find(|row| row.known.id == id);
        let name = row.map(|row| row.known.name.clone()).filter(|name| !name.is_empty());
        name.unwrap_or_else(|| format!("{id:x}"))
    }

    fn leader(&self) -> u64 {
        // The highest term knows best.
        let said = self.rows.iter().filter_map(|row| row.said.as_ref());
        said.max_by_key(|said| (said.term, said.leader_id != 0)).map_or(0, |said| said.leader_id)
    }

    fn alarms(&self) -> Vec<Alarm> {
        let mut alarms: Vec<Alarm> =
            self.rows.iter().filter_map(|row| row.said.as_ref()).flat_map(|said| said.alarms.clone()).collect();
        alarms.sort_by(|a, b| (a.member_id, &a.kind).cmp(&(b.member_id, &b.kind)));
        alarms.dedup();
        alarms
    }

    /// What is wrong, a sentence each.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for alarm in self.alarms() {
            let member = self.name_of(alarm.member_id);
            problems.push(match alarm.kind.as_str() {
                "NOSPACE" => format!("alarm NOSPACE of {member}: the quota is used up and nothing is written; {ADVICE}"),
                kind => format!("alarm {kind} of {member}: its state differs from the others'; remove the member, empty its data directory and join it again"),
            });
        }
        for row in &self.rows {
            let member = if row.known.id == 0 { row.known.name.clone() } else { self.name_of(row.known.id) };
            let member = if member.is_empty() { String::new() } else { format!("{member}: ") };
            if !row.problem.is_empty() {
                problems.push(format!("{member}{}", row.problem));
            }
            let said = row.said.iter().flat_map(|said| &said.problems);
            problems.extend(said.map(|problem| format!("{member}{problem}")));
        }
        problems
    }

    /// One row a member, and what is wrong after them.
    pub fn table(&self) -> String {
        let mut table =
            Table::new(&["MEMBER", "NAME", "ROLE", "REVISION", "APPLIED", "TERM", "SIZE", "USED", "QUOTA", "VERSION"]);
        let leader = self.leader();
        for row in self.rows.iter().filter(|row| row.known.id != 0) {
            let id = row.known.id;
            let role = if row.known.is_learner {
                "learner"
            } else if id == leader {
                "leader"
            } else {
                "follower"
            };
            let number = |number: String| if row.said.is_some() { number } else { "-".to_owned() };
            let said = row.said.clone().unwrap_or_default();
            let quota = if said.quota_bytes == 0 { "-".to_owned() } else { amount(said.quota_bytes) };
            table.row([
                format!("{id:x}"),
                if row.known.name.is_empty() { "-".to_owned() } else { row.known.name.clone() },
                role.to_owned(),
                number(said.revision.to_string()),
                number(said.applied_index.to_string()),
                number(said.term.to_string()),
                number(amount(said.size_bytes)),
                number(amount(said.used_bytes)),
                number(quota),
                number(said.version),
            ]);
        }
        let mut all = if table.is_empty() { String::new() } else { table.render(true) };
        for problem in self.problems() {
            all.push_str(&text::block(&problem));
            all.push('\n');
        }
        all
    }

    /// Everything, for programs.
    pub fn json(&self) -> String {
        let leader = self.leader();
        let members: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let status = row.said.as_ref().map(|said| {
                    json!({
                        "revision": said.revision,
                        "appliedIndex": said.applied_index,
                        "term": said.term,
                        "sizeBytes": said.size_bytes,
                        "usedBytes": said.used_bytes,
                        "quotaBytes": said.quota_bytes,
                        "version": said.version,
                        "problems": said.problems,
                    })
                });
                json!({
                    "id": format!("{:x}", row.known.id),
                    "name": row.known.name,
                    "isLearner": row.known.is_learner,
                    "isLeader": row.known.id != 0 && row.known.id == leader,
                    "status": status,
                    "problem": row.problem,
                })
            })
            .collect();
        let alarms: Vec<Value> = self
            .alarms()
            .iter()
            .map(|alarm| json!({ "member": format!("{:x}", alarm.member_id), "kind": alarm.kind }))
            .collect();
        format!("{:#}\n", json!({ "kind": self.kind, "members": members, "alarms": alarms }))
    }

    /// An error when nobody has answered.
    pub fn outcome(&self) -> Result<(), CliError> {
        if self.rows.iter().any(|row| row.said.is_some()) {
            return Ok(());
        }
        Err(CliError::Some { failed: self.rows.len(), all: self.rows.len() })
    }
}

fn amount(bytes: u64) -> String {
    // Rounded to what fits a column; from some mebibytes on the rest does not matter.
    let rounded = match bytes {
        0..1_024 => bytes,
        1_024..1_048_576 => bytes >> 10 << 10,
        _ => bytes >> 20 << 20,
    };
    Quantity::from_size(rounded).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(id: u64, name: &str, said: Option<MemberStatus>) -> Row {
        Row { known: Known { id, name: name.into(), ..Known::default() }, said, problem: String::new() }
    }

    fn said(member_id: u64, leader_id: u64, term: u64) -> MemberStatus {
        let (size_bytes, used_bytes, quota_bytes) = (64 << 20, 3 << 20, 2 << 30);
        let version = "3.5.13+minipod".to_owned();
        MemberStatus {
            member_id,
            leader_id,
            term,
            size_bytes,
            used_bytes,
            quota_bytes,
            version,
            ..MemberStatus::default()
        }
    }

    #[test]
    fn what_each_server_says_of_its_member_becomes_one_table() {
        let mut told = Told { kind: "embedded".into(), rows: Vec::new() };
        // Each knows all members and has the status of its own.
        for me in 1..=2 {
            for id in 1..=3 {
                told.add(row(id, ["a", "b", "c"][id as usize - 1], (id == me).then(|| said(me, 2, 7))));
            }
        }
        told.rows.push(Row { problem: "the API server at c:1 does not answer: refused".into(), ..Row::default() });
        let table = told.table();
        let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["1", "a", "follower", "0", "0", "7", "64Mi", "3Mi", "2Gi", "3.5.13+minipod"]);
        assert_eq!(lines[2][..3], ["2", "b", "leader"]);
        assert_eq!(lines[3], ["3", "c", "follower", "-", "-", "-", "-", "-", "-", "-"]);
        assert_eq!(table.lines().nth(4), Some("the API server at c:1 does not answer: refused"));
        assert!(told.outcome().is_ok());
        let parsed: Value = serde_json::from_str(&told.json()).expect("JSON");
        assert_eq!(parsed["members"][1]["isLeader"], true);
        assert_eq!(parsed["members"][2]["status"], Value::Null);
    }

    #[test]
    fn a_full_store_and_a_missing_leader_are_told_with_what_to_do() {
        let mut full = said(1, 0, 3);
        full.alarms = vec![Alarm { member_id: 1, kind: "NOSPACE".into() }];
        full.problems = vec!["etcdserver: no leader".into()];
        let told = Told { kind: String::new(), rows: vec![row(1, "a", Some(full))] };
        let table = told.table();
        assert!(
            table.contains("alarm NOSPACE of a: the quota is used up") && table.contains("--store-quota"),
            "{table}"
        );
        assert!(table.contains("a: etcdserver: no leader"), "{table}");
        let nobody = Told { kind: String::new(), rows: vec![row(0, "h:1", None)] };
        assert!(nobody.outcome().is_err());
    }
}
