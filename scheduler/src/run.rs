//! The loop: list and watch, feed the planner, carry out its steps. One task owns the planner; requests run beside it.
//!
//! ```text
//!  Deltas<Pod>, Deltas<Node>, Deltas<Namespace> ──▶ one loop ──BindBatch──▶ up to IN_FLIGHT tasks
//!                                                     ▲                          │
//!                                                     └────────── results ◀──────┘
//! ```

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use minipod_client::cache::{Delta, Deltas, Reflector};
use minipod_client::{Client, ClientError, Query};
use minipod_daemon::metrics::{Counter, Gauge, Histogram, Registry};
use minipod_daemon::shutdown::Shutdown;
use minipod_proto::Resource;
use minipod_proto::v1::bind_batch_request::{Item, Mode};
use minipod_proto::v1::bind_result::Code;
use minipod_proto::v1::{
    BindBatchRequest, BindBatchResponse, BindResult, Namespace, Node, Pod, PodDisruptionBudget, PreemptRequest,
    ReportUnschedulableRequest, preempt_request, report_unschedulable_request,
};
use tokio::task::JoinSet;

use crate::answer::{self, Answering};
use crate::plan::needs::NeedsError;
use crate::plan::{
    BATCH, Binding, Budget, Event, Eviction, NodeInfo, Outcome, Planner, PodInfo, Report, Settings, Step,
};

/// Batches under way at once: while one is committed the next is decided on, and one is on its way. More would only make the snapshot older
/// and the batches smaller.
const IN_FLIGHT: usize = 3;
/// Events taken over before the planner is asked again: a turn stays within milliseconds.
const EVENTS: usize = 4096;
/// Questions that are answered at a time, a slice of one of them between two turns.
const ANSWERING: usize = 8;
/// A turn that takes longer than this stands in the way of everything else, and is counted and logged.
const STALL: Duration = Duration::from_secs(1);
/// The loop turns at least this often, so that its standing still can be told from having nothing to do.
const TICK: Duration = Duration::from_secs(5);
/// Without a turn for this long the scheduler is not healthy.
const STUCK_MS: i64 = 30_000;
/// Requests that are under way when the end is asked for get this long.
const DRAIN: Duration = Duration::from_secs(5);

/// Whether the loop turns, for `/healthz`.
#[derive(Debug)]
pub struct Pulse {
    start: Instant,
    turned_ms: AtomicI64,
    synced: std::sync::atomic::AtomicBool,
}

impl Default for Pulse {
    fn default() -> Pulse {
        Pulse { start: Instant::now(), turned_ms: AtomicI64::new(0), synced: false.into() }
    }
}

impl Pulse {
    fn now_ms(&self) -> i64 {
        i64::try_from(self.start.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    fn beat(&self) {
        self.turned_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Whether all is well.
    ///
    /// # Errors
    /// What is not.
    pub fn check(&self) -> Result<(), String> {
        if !self.synced.load(Ordering::Relaxed) {
            return Err("pods, nodes and namespaces have not been listed yet".to_owned());
        }
        let still = self.now_ms() - self.turned_ms.load(Ordering::Relaxed);
        if still > STUCK_MS { Err(format!("the loop has not turned for {} s", still / 1000)) } else { Ok(()) }
    }
}

struct Metrics {
    decided: Arc<Counter>,
    bound: Arc<Counter>,
    refused: Arc<Counter>,
    overtaken_rules: Arc<Counter>,
    failed: Arc<Counter>,
    ready: Arc<Gauge>,
    waiting: Arc<Gauge>,
    in_flight: Arc<Gauge>,
    turn: Arc<Histogram>,
    stall: Arc<Histogram>,
    bind: Arc<Histogram>,
}

impl Metrics {
    fn new(registry: &Registry) -> Metrics {
        let counter = |name, help| registry.counter(name, &[], help);
        let pods =
            |state| registry.gauge("minipod_scheduler_pods", &[("state", state)], "Pods that are not bound yet.");
        Metrics {
            decided: counter("minipod_scheduler_decided_total", "Bindings proposed."),
            bound: counter("minipod_scheduler_bound_total", "Bindings accepted."),
            refused: counter("minipod_scheduler_refused_total", "Bindings refused; the pod is tried again."),
            overtaken_rules: counter(
                "minipod_scheduler_rules_overtaken_total",
                "Bindings refused by a rule between pods, because of pods that others had bound; the pod is decided on anew.",
            ),
            failed: counter("minipod_scheduler_failed_total", "Batches whose outcome is unknown."),
            ready: pods("ready"),
            waiting: pods("waiting"),
            in_flight: pods("in_flight"),
            stall: registry.histogram(
                "minipod_scheduler_loop_stall_seconds",
                &[],
                "How long the loop was busy without looking at anything new, where that was more than a second.",
            ),
            turn: registry.histogram("minipod_scheduler_turn_seconds", &[], "Time that one turn of the loop plans."),
            bind: registry.histogram("minipod_scheduler_bind_seconds", &[], "Time that one batch of bindings takes."),
        }
    }
}

/// What came of one request.
enum Done {
    Bound(Vec<Binding>, Result<BindBatchResponse, ClientError>, Duration),
    Reported(Result<(), ClientError>),
    /// Uids of preemptors whose victims were not all ended.
    Evicted {
        failed: Vec<Arc<str>>,
    },
}

struct Loop {
    client: Client,
    name: String,
    planner: Planner,
    requests: JoinSet<Done>,
    metrics: Metrics,
    pulse: Arc<Pulse>,
    /// Pods that cannot be understood, with what was said of them.
    misfits: HashMap<String, String>,
    /// Reports of misfits that are to be sent.
    complaints: Vec<Report>,
}

/// Schedules until the shutdown.
pub async fn run(client: Client, settings: Settings, registry: &Registry, pulse: Arc<Pulse>, shutdown: Shutdown) {
    let (_pods, mut pods) = Reflector::<Pod>::new(&client, Query::all()).start_with_deltas();
    let (_nodes, mut nodes) = Reflector::<Node>::new(&client, Query::all()).start_with_deltas();
    let (known_budgets, mut budgets) = Reflector::<PodDisruptionBudget>::new(&client, Query::all()).start_with_deltas();
    let (_namespaces, mut namespaces) = Reflector::<Namespace>::new(&client, Query::all()).start_with_deltas();
    let mut questions = answer::listen(&client, &settings.name, &shutdown);
    let mut all = Loop {
        client,
        name: settings.name.clone(),
        planner: Planner::new(settings),
        requests: JoinSet::new(),
        metrics: Metrics::new(registry),
        pulse,
        misfits: HashMap::new(),
        complaints: Vec::new(),
    };
    // Decisions on half a cluster would be wrong: all three lists first, nodes before the pods that are on them.
    let lists = async {
        all.first_list(&mut namespaces, Loop::see_namespace).await;
        all.first_list(&mut budgets, |_, _| {}).await;
        all.see_budgets(&known_budgets.list());
        all.first_list(&mut nodes, Loop::see_node).await;
        all.first_list(&mut pods, Loop::see_pod).await;
    };
    tokio::select! {
        () = lists => {}
        () = shutdown.asked() => return,
    }
    tracing::info!(
        nodes = all.planner.core().node_count(),
        pods = all.planner.core().pod_count(),
        "the cluster is known"
    );
    all.pulse.synced.store(true, Ordering::Relaxed);
    let mut awake = Instant::now();
    let mut answering: VecDeque<Answering> = VecDeque::new();
    loop {
        all.turn();
        all.watch_stall(awake);
        let due = all.due();
        let answers = !answering.is_empty();
        // Every arm is cancel safe: receiving from a channel, joining from a set and sleeping lose nothing.
        tokio::select! {
            Some(delta) = pods.next() => all.see_pod(delta),
            Some(delta) = nodes.next() => all.see_node(delta),
            Some(delta) = namespaces.next() => all.see_namespace(delta),
            Some(_) = budgets.next() => {
                // All of them are taken over together, whatever has changed.
                while budgets.try_next().is_some() {}
                all.see_budgets(&known_budgets.list());
            }
            Some(done) = all.requests.join_next(), if !all.requests.is_empty() => {
                if let Ok(done) = done { all.finish(done); }
            }
            Some(question) = questions.recv(), if answering.len() < ANSWERING => {
                answering.push_back(Answering::begin(&all.planner, question));
            }
            () = tokio::time::sleep(due), if !answers => {}
            () = std::future::ready(()), if answers => {}
            () = shutdown.asked() => break,
        }
        awake = Instant::now();
        // One slice a turn, each question's in its turn: whoever asks much waits, and the pods do not.
        if let Some(one) = answering.pop_front() {
            answering.extend(one.proceed(&mut all.planner, &all.name));
        }
        for _ in 0..EVENTS {
            if let Some(delta) = nodes.try_next() {
                all.see_node(delta);
            } else if let Some(delta) = pods.try_next() {
                all.see_pod(delta);
            } else {
                break;
            }
        }
        while let Some(Ok(done)) = all.requests.try_join_next() {
            all.finish(done);
        }
    }
    let drained = tokio::time::timeout(DRAIN, async { while all.requests.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(
            requests = all.requests.len(),
            "ended with requests under way; what they did shows in the watch"
        );
    }
}

impl Loop {
    async fn first_list<K>(&mut self, deltas: &mut Deltas<K>, see: fn(&mut Loop, Delta<K>)) {
        while let Some(delta) = deltas.next().await {
            let synced = matches!(delta, Delta::Synced { .. });
            see(self, delta);
            if synced {
                return;
            }
        }
    }

    fn see_pod(&mut self, delta: Delta<Pod>) {
        match delta {
            Delta::Added(pod) => self.see_state(&pod, PodInfo::new(&pod)),
            Delta::Modified { old, new } => {
                let core = self.planner.core();
                let known = core.pod_id(new.uid()).and_then(|pod| core.pod(pod)).map(|info| &info.needs);
                let info = known.map_or_else(|| PodInfo::new(&new), |known| PodInfo::changed(&old, &new, known));
                self.see_state(&new, info);
            }
            Delta::Deleted(pod) => {
                self.misfits.remove(pod.uid());
                self.planner.observe(Event::PodGone(pod.uid().into()));
            }
            Delta::Synced { .. } => {}
        }
    }

    fn see_state(&mut self, pod: &Pod, info: Result<PodInfo, NeedsError>) {
        match info {
            Ok(info) => {
                self.misfits.remove(pod.uid());
                self.planner.observe(Event::Pod(info));
            }
            Err(error) => self.complain(pod, &error),
        }
    }

    /// A pod that validation should have refused: told once, and left alone.
    fn complain(&mut self, pod: &Pod, error: &NeedsError) {
        let message = error.to_string();
        let known = self.misfits.insert(pod.uid().to_owned(), message.clone());
        if known.as_ref() == Some(&message) {
            return;
        }
        tracing::warn!(pod = %pod.key(), %error, "this pod cannot be scheduled");
        self.planner.observe(Event::PodGone(pod.uid().into()));
        if pod.node_name().is_none() && pod.spec().scheduler_name == self.name {
            self.complaints.push(Report {
                namespace: pod.namespace().to_owned(),
                pod: pod.name().into(),
                uid: pod.uid().into(),
                reason: "SchedulerError",
                message,
                outdated: String::new(),
            });
        }
    }

    fn see_node(&mut self, delta: Delta<Node>) {
        match delta {
            Delta::Added(node) | Delta::Modified { new: node, .. } => match NodeInfo::new(&node) {
                Ok(info) => self.planner.observe(Event::Node(info)),
                Err(error) => {
                    tracing::warn!(%error, "this node is left out");
                    self.planner.observe(Event::NodeGone(node.name().into()));
                }
            },
            Delta::Deleted(node) => self.planner.observe(Event::NodeGone(node.name().into())),
            Delta::Synced { .. } => {}
        }
    }

    fn see_namespace(&mut self, delta: Delta<Namespace>) {
        match delta {
            Delta::Added(namespace) | Delta::Modified { new: namespace, .. } => {
                let labels = namespace.meta().labels.clone();
                self.planner.observe(Event::Namespace(namespace.name().into(), labels));
            }
            Delta::Deleted(namespace) => self.planner.observe(Event::NamespaceGone(namespace.name().into())),
            Delta::Synced { .. } => {}
        }
    }

    /// How many pods of which may be ended.
    fn see_budgets(&mut self, all: &[Arc<PodDisruptionBudget>]) {
        let mut budgets = Vec::new();
        for one in all {
            match Budget::new(one) {
                Ok(budget) => budgets.extend(budget),
                Err(error) => tracing::warn!(budget = %one.key(), %error, "this disruption budget is left out"),
            }
        }
        self.planner.observe(Event::Budgets(budgets));
    }

    /// Plans and sends off what was planned.
    fn turn(&mut self) {
        let started = Instant::now();
        let room = IN_FLIGHT.saturating_sub(self.requests.len()) * BATCH;
        if room > 0 {
            let mut steps = self.planner.plan(self.pulse.now_ms(), room);
            if !self.complaints.is_empty() {
                steps.push(Step::Report(std::mem::take(&mut self.complaints)));
            }
            let mut evictions = Vec::new();
            for step in steps {
                match step {
                    Step::Bind(bindings) => self.bind(bindings, Mode::Each),
                    Step::BindAll(bindings) => self.bind(bindings, Mode::All),
                    Step::Evict(eviction) => evictions.push(eviction),
                    Step::Report(reports) => self.report(reports),
                }
            }
            if !evictions.is_empty() {
                self.evict(evictions);
            }
            self.metrics.turn.observe(started.elapsed());
        }
        let (ready, waiting, in_flight) = self.planner.counts();
        let gauges =
            [(&self.metrics.ready, ready), (&self.metrics.waiting, waiting), (&self.metrics.in_flight, in_flight)];
        for (gauge, count) in gauges {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        self.pulse.beat();
    }

    /// Counts and logs a turn, from waking up to going to sleep, that took too long.
    fn watch_stall(&self, awake: Instant) {
        let busy = awake.elapsed();
        if busy > STALL {
            self.metrics.stall.observe(busy);
            tracing::warn!(busy_ms = busy.as_millis(), "the loop has stood still");
        }
    }

    fn due(&self) -> Duration {
        if self.requests.len() >= IN_FLIGHT {
            return TICK;
        }
        let now = self.pulse.now_ms();
        let due = self.planner.due_ms(now).map(|due| due.saturating_sub(now).max(0));
        due.map_or(TICK, |ms| Duration::from_millis(ms.unsigned_abs()).min(TICK))
    }

    fn bind(&mut self, bindings: Vec<Binding>, mode: Mode) {
        self.metrics.decided.add(bindings.len() as u64);
        let items = bindings.iter().map(|binding| Item {
            namespace: binding.namespace.clone(),
            pod: binding.pod.to_string(),
            uid: binding.uid.to_string(),
            revision: binding.revision,
            node: binding.node.clone(),
        });
        let request = BindBatchRequest { items: items.collect(), mode: mode.into(), scheduler: self.name.clone() };
        let client = self.client.clone();
        self.requests.spawn(async move {
            let started = Instant::now();
            let answer = client.bind_batch(request).await;
            Done::Bound(bindings, answer, started.elapsed())
        });
    }

    /// One task for all evictions of a turn, one call after the other: preemption is for the few.
    fn evict(&mut self, evictions: Vec<Eviction>) {
        let (client, scheduler) = (self.client.clone(), self.name.clone());
        self.requests.spawn(async move {
            let mut failed = Vec::new();
            for eviction in evictions {
                let preemptor = eviction.preemptor.clone();
                let uids: Vec<Arc<str>> = eviction.nominees.iter().map(|nominee| Arc::clone(&nominee.uid)).collect();
                tracing::info!(%preemptor, places = uids.len(), victims = eviction.victims.len(), "preempting");
                let problem = match client.preempt(preempt_request(eviction, &scheduler)).await {
                    Ok(answer) => answer.failures.into_iter().next().map(|failure| failure.message),
                    Err(error) => Some(error.to_string()),
                };
                if let Some(problem) = problem {
                    tracing::warn!(%preemptor, problem, "not all that stand in the way are being ended");
                    failed.extend(uids);
                }
            }
            Done::Evicted { failed }
        });
    }

    fn report(&mut self, reports: Vec<Report>) {
        let items = reports.into_iter().map(|report| report_unschedulable_request::Item {
            namespace: report.namespace,
            pod: report.pod.to_string(),
            uid: report.uid.to_string(),
            reason: report.reason.to_owned(),
            message: report.message,
            outdated_nomination: report.outdated,
        });
        let request = ReportUnschedulableRequest { items: items.collect(), scheduler: self.name.clone() };
        let client = self.client.clone();
        self.requests.spawn(async move { Done::Reported(client.report_unschedulable(request).await) });
    }

    fn finish(&mut self, done: Done) {
        match done {
            Done::Bound(bindings, Ok(answer), took) => {
                self.metrics.bind.observe(took);
                for (binding, result) in bindings.iter().zip(&answer.results) {
                    self.resolve(binding, result);
                }
            }
            Done::Bound(bindings, Err(error), took) => {
                self.metrics.bind.observe(took);
                self.metrics.failed.increment();
                tracing::warn!(pods = bindings.len(), %error, "a batch of bindings failed");
                for binding in &bindings {
                    self.planner.resolve(&binding.uid, Outcome::Unknown, self.pulse.now_ms());
                }
            }
            Done::Evicted { failed } => {
                for uid in failed {
                    self.planner.eviction_failed(&uid, self.pulse.now_ms());
                }
            }
            Done::Reported(Ok(())) => {}
            Done::Reported(Err(error)) => tracing::warn!(%error, "pods were not told why they wait"),
        }
    }

    fn resolve(&mut self, binding: &Binding, result: &BindResult) {
        let outcome = outcome(result.code(), result.node == binding.node);
        match outcome {
            Outcome::Bound => self.metrics.bound.increment(),
            Outcome::Refused => self.metrics.refused.increment(),
            Outcome::Overtaken | Outcome::Unknown => {}
        }
        if outcome != Outcome::Bound {
            let (namespace, pod, node) = (&binding.namespace, &binding.pod, &binding.node);
            tracing::debug!(%namespace, %pod, %node, code = ?result.code(), message = %result.message, "not bound");
        }
        self.planner.resolve(&binding.uid, outcome, self.pulse.now_ms());
        if result.code() == Code::RuleBroken {
            self.metrics.overtaken_rules.increment();
            self.planner.tell_refusal(&binding.uid, &result.message);
        }
    }
}

fn preempt_request(eviction: Eviction, scheduler: &str) -> PreemptRequest {
    let nominees = eviction.nominees.into_iter().map(|nominee| preempt_request::Nominee {
        namespace: nominee.namespace,
        pod: nominee.pod.to_string(),
        uid: nominee.uid.to_string(),
        node: nominee.node,
        seen: nominee.seen,
    });
    let victims = eviction.victims.into_iter().map(|victim| preempt_request::Victim {
        namespace: victim.namespace,
        pod: victim.pod.to_string(),
        uid: victim.uid.to_string(),
    });
    PreemptRequest {
        nominees: nominees.collect(),
        victims: victims.collect(),
        preemptor: eviction.preemptor,
        scheduler: scheduler.to_owned(),
    }
}

/// What a result means for the pod.
fn outcome(code: Code, same_node: bool) -> Outcome {
    match code {
        Code::Bound => Outcome::Bound,
        Code::AlreadyBound if same_node => Outcome::Bound,
        Code::AlreadyBound | Code::PodGone | Code::PodTerminating | Code::PodChanged => Outcome::Overtaken,
        Code::NodeGone | Code::NodeUnschedulable | Code::NoFit | Code::RuleBroken | Code::Gang | Code::Conflict => {
            Outcome::Refused
        }
        Code::UnknownOutcome => Outcome::Unknown,
    }
}
