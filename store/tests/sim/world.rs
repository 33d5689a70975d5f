//! The events of a simulation.

use super::check::Checker;
use super::machine::Chain;
use crate::support::disk::{Fault, SimDisk};
use crate::support::rng::Rng;
use bytes::Bytes;
use minipod_store::disk::Disk;
use minipod_store::machine::Member;
use minipod_store::records::{ChangeKind, ChangeRecord, MemberRecord};
use minipod_store::replica::core::{Boot, Core, Outbox, Planted, Reply, Settings, SnapshotJob};
use minipod_store::wal::{Identity, Options};
use raft::eraftpb::{Message, MessageType};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

const CLUSTER: u64 = 77;
/// Simulated milliseconds with faults, and then without.
const STORM_MS: u64 = 20_000;
const CALM_MS: u64 = 60_000;

enum Event {
    Tick { node: u64, life: u64 },
    Deliver(Message),
    Operation,
    Snapshot { node: u64, life: u64, job: SnapshotJob },
    SnapshotReport { node: u64, to: u64, arrived: bool },
    Start { node: u64 },
    Trouble,
    Change,
}

#[derive(Default)]
struct Out {
    messages: Vec<Message>,
    answers: Vec<(u64, Reply)>,
}

impl Outbox<u64> for Out {
    fn send(&mut self, messages: Vec<Message>) {
        self.messages.extend(messages);
    }

    fn answer(&mut self, waiter: u64, reply: Reply) {
        self.answers.push((waiter, reply));
    }
}

struct Node {
    disk: SimDisk,
    core: Option<Core<Chain, u64>>,
    life: u64,
    boot: Boot,
}

/// A read under way: it must see everything that was acknowledged when it began.
struct Read {
    at_least: u64,
}

/// What a simulation did, to be sure that it did something.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    pub acknowledged: u64,
    pub reads: u64,
    pub crashes: u64,
    pub snapshots_installed: u64,
    pub changes: u64,
}

pub struct World {
    rng: Rng,
    now: u64,
    sequence: u64,
    events: BTreeMap<(u64, u64), Event>,
    nodes: BTreeMap<u64, Node>,
    /// Pairs that cannot talk.
    cut: BTreeSet<(u64, u64)>,
    loss_per_mille: u64,
    checker: Checker,
    reads: BTreeMap<u64, Read>,
    next_operation: u64,
    next_member: u64,
    planted: Option<Planted>,
    lying_disks: bool,
    calm: bool,
    tally: Tally,
}

fn member(id: u64) -> Member {
    Member { id, name: format!("m{id}"), peer_urls: vec![format!("http://m{id}")], ..Member::default() }
}

/// Runs one seed. An error says what was violated.
pub fn run(seed: u64, planted: Option<Planted>, lying_disks: bool) -> Result<Tally, String> {
    let mut world = World::new(seed, planted, lying_disks);
    world.run()
}

/// A fault that was injected, as the operator would read it.
fn disk_failed(error: &str) -> bool {
    error.contains("input/output") || error.contains("no storage space")
}

impl World {
    fn new(seed: u64, planted: Option<Planted>, lying_disks: bool) -> Self {
        let mut world = Self {
            rng: Rng::new(seed),
            now: 0,
            sequence: 0,
            events: BTreeMap::new(),
            nodes: BTreeMap::new(),
            cut: BTreeSet::new(),
            loss_per_mille: 0,
            checker: Checker::default(),
            reads: BTreeMap::new(),
            next_operation: 1,
            next_member: 4,
            planted,
            lying_disks,
            calm: false,
            tally: Tally::default(),
        };
        // Some begin alone, and others join.
        let first = if world.rng.chance(250) { 1 } else { 3 };
        let boot = Boot::Members((1..=first).map(member).collect());
        for id in 1..=first {
            world.add_node(id, boot.clone());
        }
        world.after(500, Event::Operation);
        world.after(2_000, Event::Trouble);
        world.after(3_000, Event::Change);
        world
    }

    fn add_node(&mut self, id: u64, boot: Boot) {
        let disk = SimDisk::default();
        if self.lying_disks {
            disk.lie_about_syncs();
        }
        self.nodes.insert(id, Node { disk, core: None, life: 0, boot });
        self.after(0, Event::Start { node: id });
    }

    fn after(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.events.insert((self.now + delay, self.sequence), event);
    }

    fn run(&mut self) -> Result<Tally, String> {
        while let Some(((at, _), event)) = self.events.pop_first() {
            self.now = at;
            if !self.calm && self.now >= STORM_MS {
                self.begin_calm();
            }
            if self.now >= STORM_MS + CALM_MS {
                return self.finish();
            }
            self.handle(event)?;
            if self.calm && self.now % 1_000 < 50 && self.settled() {
                return self.finish();
            }
        }
        Err("nothing happens any more".to_owned())
    }

    fn begin_calm(&mut self) {
        self.calm = true;
        self.cut.clear();
        self.loss_per_mille = 0;
        let down: Vec<u64> = self.nodes.iter().filter(|(_, node)| node.core.is_none()).map(|(id, _)| *id).collect();
        for node in self.nodes.values() {
            node.disk.no_fault();
        }
        for node in down {
            self.after(100, Event::Start { node });
        }
    }

    /// The members of the replica that has applied most.
    fn members(&self) -> Vec<u64> {
        let cores = self.nodes.values().filter_map(|node| node.core.as_ref());
        let newest = cores.max_by_key(|core| core.applied());
        newest.map(|core| core.members().list().iter().map(|member| member.id).collect()).unwrap_or_default()
    }

    fn settled(&self) -> bool {
        let members = self.members();
        let applied = |id: &u64| self.nodes.get(id).and_then(|node| node.core.as_ref()).map(Core::applied);
        let first = members.first().and_then(applied);
        self.now > STORM_MS + 10_000
            && !members.is_empty()
            && first.is_some()
            && members.iter().all(|id| applied(id) == first)
    }

    fn finish(&mut self) -> Result<Tally, String> {
        let members = self.members();
        let states: Vec<_> = members
            .iter()
            .map(|id| {
                (
                    *id,
                    self.nodes
                        .get(id)
                        .and_then(|node| node.core.as_ref())
                        .map(|core| (core.applied(), core.raft().state)),
                )
            })
            .collect();
        if !self.settled() {
            return Err(format!("the cluster did not come together again: {states:?}"));
        }
        for id in members {
            let core = self.nodes.get(&id).and_then(|node| node.core.as_ref()).ok_or("a member is down")?;
            self.checker.look_at_the_end(core)?;
        }
        self.tally.acknowledged = self.checker.acknowledged.len() as u64;
        if self.tally.acknowledged < 5 {
            return Err(format!("only {} operations were acknowledged", self.tally.acknowledged));
        }
        Ok(self.tally)
    }

    fn handle(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Start { node } => self.start(node),
            Event::Tick { node, life } => {
                if self.nodes.get(&node).is_none_or(|node| node.life != life || node.core.is_none()) {
                    return Ok(());
                }
                // Clocks drift and processes stall.
                let mut wait = 70 + self.rng.below(60);
                if !self.calm && self.rng.chance(10) {
                    wait += self.rng.below(1_500);
                }
                self.after(wait, Event::Tick { node, life });
                self.with_core(node, |core, out| core.tick(out))
            }
            Event::Deliver(message) => self.deliver(message),
            Event::Operation => self.operation(),
            Event::Snapshot { node, life, job } => {
                if self.nodes.get(&node).is_none_or(|node| node.life != life || node.core.is_none()) {
                    return Ok(());
                }
                let done = job.run();
                if self.crash_if_stopped(node) {
                    return Ok(());
                }
                self.with_core_result(node, |core, _| core.snapshot_done(done).map_err(|error| error.to_string()))
            }
            Event::SnapshotReport { node, to, arrived } => {
                self.with_core(node, |core, _| core.snapshot_sent(to, arrived))
            }
            Event::Trouble => self.trouble(),
            Event::Change => self.change(),
        }
    }

    fn start(&mut self, id: u64) -> Result<(), String> {
        if std::env::var_os("MINIPOD_SIM_TRACE").is_some() {
            println!("{} m{id} starts", self.now);
        }
        let planted = self.planted;
        let nonce = self.rng.next();
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        if node.core.is_some() {
            return Ok(());
        }
        let mut settings = Settings::new(Identity { cluster_id: CLUSTER, member_id: id });
        settings.random_elections = false;
        settings.snapshot_entries = 20;
        settings.keep_bytes = 2_000;
        settings.wal = Options { segment_len: 4_096, nonce_seed: nonce, ..Options::default() };
        settings.planted = planted;
        let disk: Arc<dyn Disk> = Arc::new(node.disk.clone());
        match Core::open(&disk, Path::new("/data"), settings, &node.boot, Chain::default()) {
            Ok(core) => {
                node.life += 1;
                let life = node.life;
                self.checker.look(&core)?;
                node.core = Some(core);
                self.after(1, Event::Tick { node: id, life });
                Ok(())
            }
            // A crash may come while the last one is cleaned up.
            Err(error) if node.disk.is_stopped() || disk_failed(&error.to_string()) => {
                self.power_off(id);
                Ok(())
            }
            Err(error) => Err(format!("member {id} does not start again: {error}")),
        }
    }

    fn power_off(&mut self, id: u64) {
        let wait = 100 + self.rng.below(if self.calm { 200 } else { 4_000 });
        let node = self.nodes.get_mut(&id).expect("the node");
        node.core = None;
        node.disk.crash(&mut self.rng);
        self.tally.crashes += 1;
        self.after(wait, Event::Start { node: id });
    }

    fn crash_if_stopped(&mut self, id: u64) -> bool {
        let stopped = self.nodes.get(&id).is_some_and(|node| node.core.is_some() && node.disk.is_stopped());
        if stopped {
            self.power_off(id);
        }
        stopped
    }

    fn with_core(&mut self, id: u64, act: impl FnOnce(&mut Core<Chain, u64>, &mut Out)) -> Result<(), String> {
        self.with_core_result(id, |core, out| {
            act(core, out);
            Ok(())
        })
    }

    /// Lets a replica do something, and then its round, mostly.
    fn with_core_result(
        &mut self,
        id: u64,
        act: impl FnOnce(&mut Core<Chain, u64>, &mut Out) -> Result<(), String>,
    ) -> Result<(), String> {
        let batch = self.rng.chance(200);
        let Some(node) = self.nodes.get_mut(&id) else { return Ok(()) };
        let Some(core) = node.core.as_mut() else { return Ok(()) };
        let mut out = Out::default();
        let trace = std::env::var_os("MINIPOD_SIM_TRACE").is_some();
        let before = core.applied();
        let mut done = act(core, &mut out);
        if done.is_ok() && !batch {
            done = core.advance(&mut out).map_err(|error| error.to_string());
        }
        if done.is_ok() {
            self.checker.look(core)?;
            if core.applied() > before + 1 && core.machine().operations.is_empty() {
                self.tally.snapshots_installed += 1;
            }
        }
        if trace {
            let raft = core.raft();
            println!(
                "{} m{id} term {} {:?} last {} commit {} applied {} {}",
                self.now,
                raft.term,
                raft.state,
                raft.raft_log.last_index(),
                raft.raft_log.committed,
                core.applied(),
                done.as_ref().err().map_or("", String::as_str)
            );
            for message in &out.messages {
                println!(
                    "    to m{}: {:?} term {} index {} commit {} entries {} reject {}",
                    message.to,
                    message.get_msg_type(),
                    message.term,
                    message.index,
                    message.commit,
                    message.entries.len(),
                    message.reject
                );
            }
        }
        let job = core.snapshot_job();
        let life = node.life;
        // What was sent and answered before the disk failed was sent and answered.
        for message in out.messages {
            self.send(message);
        }
        for (waiter, reply) in out.answers {
            self.answered(id, waiter, reply)?;
        }
        match done {
            Ok(()) => {}
            Err(_) if self.nodes.get(&id).is_some_and(|node| node.disk.is_stopped()) => {
                self.power_off(id);
                return Ok(());
            }
            // The process ends at an error of its disk, and the disk may work again later.
            Err(error) if disk_failed(&error) => {
                self.power_off(id);
                return Ok(());
            }
            Err(error) => return Err(format!("member {id} stops: {error}")),
        }
        if let Some(job) = job {
            let wait = 1 + self.rng.below(300);
            self.after(wait, Event::Snapshot { node: id, life, job });
        }
        Ok(())
    }

    fn send(&mut self, message: Message) {
        if message.get_msg_type() == MessageType::MsgSnapshot {
            self.tally.snapshots_installed += 1;
        }
        // Whoever sends a snapshot learns what became of it: its loss is decided on arrival.
        if message.get_msg_type() != MessageType::MsgSnapshot && self.rng.chance(self.loss_per_mille) {
            return;
        }
        if self.rng.chance(self.loss_per_mille / 4) {
            let wait = 1 + self.rng.below(2_000);
            self.after(wait, Event::Deliver(message.clone()));
        }
        let far = self.rng.chance(30);
        let wait = 1 + self.rng.below(if far { 400 } else { 8 });
        self.after(wait, Event::Deliver(message));
    }

    fn deliver(&mut self, message: Message) -> Result<(), String> {
        let (from, to) = (message.from, message.to);
        if message.get_msg_type() == MessageType::MsgSnapshot {
            return self.deliver_snapshot(message);
        }
        if self.cut.contains(&(from.min(to), from.max(to))) {
            return self.with_core(from, |core, _| core.unreachable(to));
        }
        self.with_core(to, |core, _| core.step(message))
    }

    /// The file goes first; the message follows when it has arrived, and the sender is told.
    fn deliver_snapshot(&mut self, message: Message) -> Result<(), String> {
        let (from, to) = (message.from, message.to);
        let metadata = message.get_snapshot().get_metadata();
        let (index, term) = (metadata.index, metadata.term);
        let lost = self.rng.chance(self.loss_per_mille);
        let reachable = !lost && !self.cut.contains(&(from.min(to), from.max(to)));
        let bytes = self.nodes.get(&from).and_then(|node| node.core.as_ref()).and_then(|core| {
            let (file, len) = core.snapshots().raw(index, term).ok()?;
            let mut bytes = vec![0; usize::try_from(len).expect("a length")];
            file.read_at(0, &mut bytes).ok()?;
            Some(bytes)
        });
        let tag = self.rng.next();
        let arrived = reachable
            && bytes.is_some_and(|bytes| {
                let Some(core) = self.nodes.get(&to).and_then(|node| node.core.as_ref()) else { return false };
                let received = core.snapshots().receive(tag).and_then(|mut incoming| {
                    incoming.put(&bytes)?;
                    incoming.finish()
                });
                received.is_ok()
            });
        self.crash_if_stopped(to);
        let wait = 1 + self.rng.below(100);
        self.after(wait, Event::SnapshotReport { node: from, to, arrived });
        if arrived { self.with_core(to, |core, _| core.step(message)) } else { Ok(()) }
    }

    fn operation(&mut self) -> Result<(), String> {
        let wait = 5 + self.rng.below(if self.calm { 400 } else { 120 });
        // The load ends, so that the replicas can be compared at the same entry.
        if self.now < STORM_MS + 8_000 {
            self.after(wait, Event::Operation);
        }
        let ids: Vec<u64> = self.nodes.keys().copied().collect();
        let id = ids[self.rng.index(ids.len())];
        let waiter = self.next_operation;
        self.next_operation += 1;
        if self.rng.chance(300) {
            self.reads.insert(waiter, Read { at_least: self.checker.highest_acknowledged });
            return self.with_core(id, |core, _| core.read(waiter));
        }
        let mut command = waiter.to_le_bytes().to_vec();
        command.resize(8 + self.rng.index(200), 0);
        self.with_core(id, |core, _| core.propose(Bytes::from(command), waiter))
    }

    fn answered(&mut self, id: u64, waiter: u64, reply: Reply) -> Result<(), String> {
        match reply {
            Reply::Outcome(outcome) => {
                self.checker.acknowledge(waiter, u64::try_from(outcome.revision).expect("an index"))
            }
            Reply::Read(index) => {
                let read = self.reads.remove(&waiter).ok_or("a read was answered that nobody asked")?;
                self.tally.reads += 1;
                if index < read.at_least {
                    return Err(format!(
                        "a read on member {id} saw {index}, and {} was acknowledged before it",
                        read.at_least
                    ));
                }
                Ok(())
            }
            Reply::Change(result) => {
                self.tally.changes += u64::from(result.is_ok());
                Ok(())
            }
            Reply::Lost(_) => Ok(()),
        }
    }

    fn trouble(&mut self) -> Result<(), String> {
        if self.calm {
            return Ok(());
        }
        let wait = 200 + self.rng.below(2_000);
        self.after(wait, Event::Trouble);
        let ids: Vec<u64> = self.nodes.keys().copied().collect();
        let id = ids[self.rng.index(ids.len())];
        match self.rng.below(8) {
            0 => {
                // Any two sides.
                let side = self.rng.next();
                let apart = |a: u64, b: u64| (side >> a) & 1 != (side >> b) & 1;
                self.cut = ids
                    .iter()
                    .flat_map(|a| ids.iter().map(move |b| (*a, *b)))
                    .filter(|(a, b)| a < b && apart(*a, *b))
                    .collect();
            }
            1 | 2 => self.cut.clear(),
            3 => self.loss_per_mille = self.rng.below(300),
            4 if self.nodes[&id].core.is_some() => self.power_off(id),
            5 | 6 => {
                // In the middle of whatever it does next.
                let after = self.rng.below(12);
                self.nodes[&id].disk.fault_after(after, Fault::Stop);
            }
            7 => {
                let after = self.rng.below(12);
                let fault = if self.rng.chance(500) { Fault::Io } else { Fault::Full };
                self.nodes[&id].disk.fault_after(after, fault);
            }
            _ => {
                // All at once.
                let up: Vec<u64> = ids.into_iter().filter(|id| self.nodes[id].core.is_some()).collect();
                for id in up {
                    self.power_off(id);
                }
            }
        }
        Ok(())
    }

    fn change(&mut self) -> Result<(), String> {
        if self.calm {
            return Ok(());
        }
        let wait = 1_000 + self.rng.below(4_000);
        self.after(wait, Event::Change);
        let leader = self.nodes.iter().find(|(_, node)| node.core.as_ref().is_some_and(Core::is_leader));
        let Some((leader, node)) = leader else { return Ok(()) };
        let (leader, core) = (*leader, node.core.as_ref().expect("it is up"));
        let members = core.members().list();
        let learner = members.iter().find(|member| member.is_learner).cloned();
        let (kind, target) = match (learner, self.rng.below(4)) {
            (Some(learner), 0..=2) => {
                if !core.learner_is_ready(learner.id) {
                    return Ok(());
                }
                (ChangeKind::Promote, learner)
            }
            (None, 0 | 1) if members.len() < 5 => {
                let mut member = member(self.next_member);
                member.is_learner = true;
                self.next_member += 1;
                self.add_node(member.id, Boot::Join);
                (ChangeKind::Add, member)
            }
            (_, 2 | 3) if members.len() > 2 => {
                let target = members[self.rng.index(members.len())].clone();
                (ChangeKind::Remove, target)
            }
            _ => return Ok(()),
        };
        let change = ChangeRecord { kind: kind.into(), member: Some(MemberRecord::from(target)) };
        let waiter = self.next_operation;
        self.next_operation += 1;
        self.with_core(leader, |core, out| core.change(change, waiter, out))
    }
}
