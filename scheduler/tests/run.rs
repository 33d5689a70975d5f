//! The loop against an API server of the test's own: one arbiter that binds by fit, refuses at random, and remembers everything.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use minipod_client::{Client, Options};
use minipod_daemon::metrics::Registry;
use minipod_daemon::shutdown::{Shutdown, Trigger};
use minipod_proto::resources::{Resources, node_allocatable, pod_requests};
use minipod_proto::v1::bind_batch_request::{Item, Mode};
use minipod_proto::v1::bind_result::Code;
use minipod_proto::v1::objects_server::{Objects, ObjectsServer};
use minipod_proto::v1::scheduling_server::{Scheduling, SchedulingServer};
use minipod_proto::v1::watch_event::Type;
use minipod_proto::v1::{
    Affinity, BindBatchRequest, BindBatchResponse, BindResult, Container, CreateManyRequest, CreateManyResponse,
    CreateRequest, DeleteRequest, DeleteResponse, EvictRequest, GetRequest, LabelSelector, LabelSelectorRequirement,
    ListRequest, ListResponse, Node, Object, PatchRequest, Pod, PodAffinity, PodAffinityTerm, PreemptRequest,
    PreemptResponse, ReportUnschedulableRequest, ReportUnschedulableResponse, ResourceRequirements, UpdateRequest,
    WatchEvent, WatchRequest,
};
use minipod_proto::{Kind, Resource};
use minipod_scheduler::plan::{Profile, Settings};
use minipod_scheduler::run::{self, Pulse};
use tokio::sync::watch;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

#[derive(Default)]
struct State {
    objects: BTreeMap<(String, String), Object>,
    log: Vec<(String, WatchEvent)>,
    used: BTreeMap<String, Resources>,
    messages: BTreeMap<String, String>,
    attempts: u64,
    refused: u64,
    /// Sizes of the ALL batches that were bound.
    gangs: Vec<usize>,
    /// Pods that a rule stands against so many times.
    against: BTreeMap<String, usize>,
}

impl State {
    fn revision(&self) -> i64 {
        self.log.len() as i64
    }

    fn write(&mut self, kind: Kind, mut object: Object, event: Type) {
        let revision = self.revision() + 1;
        object.meta_mut().unwrap().resource_version = revision.to_string();
        let key = (kind.name().to_owned(), object.key());
        if event == Type::Deleted {
            self.objects.remove(&key);
        } else {
            self.objects.insert(key, object.clone());
        }
        let event = WatchEvent { r#type: event.into(), object: Some(object), revision };
        self.log.push((kind.name().to_owned(), event));
    }

    fn pod(&self, key: &str) -> Option<Pod> {
        self.objects.get(&("Pod".to_owned(), key.to_owned())).and_then(|object| object.as_pod().cloned())
    }

    fn free(&self, node: &str) -> Option<Resources> {
        let object = self.objects.get(&("Node".to_owned(), node.to_owned()))?;
        let used = self.used.get(node).cloned().unwrap_or_default();
        Some(node_allocatable(object.as_node()?).unwrap().checked_sub(&used).unwrap())
    }

    /// What binding this would give.
    fn judge(&mut self, item: &Item) -> Code {
        self.attempts += 1;
        let Some(pod) = self.pod(&format!("{}/{}", item.namespace, item.pod)).filter(|pod| pod.uid() == item.uid)
        else {
            return Code::PodGone;
        };
        if pod.node_name().is_some() {
            return Code::AlreadyBound;
        }
        if let Some(left) = self.against.get_mut(&item.pod).filter(|left| **left > 0) {
            *left -= 1;
            return Code::RuleBroken;
        }
        // Every seventh is refused without cause, as a contended store would.
        if self.attempts.is_multiple_of(7) {
            return Code::Conflict;
        }
        match self.free(&item.node) {
            None => Code::NodeGone,
            Some(free) if pod_requests(pod.spec()).unwrap().fits(&free) => Code::Bound,
            Some(_) => Code::NoFit,
        }
    }

    fn bind(&mut self, item: &Item) {
        let mut pod = self.pod(&format!("{}/{}", item.namespace, item.pod)).unwrap();
        pod.spec_mut().node_name = item.node.clone();
        let used = self.used.entry(item.node.clone()).or_default();
        *used = used.checked_add(&pod_requests(pod.spec()).unwrap()).unwrap();
        self.write(Kind::Pod, pod.into(), Type::Modified);
    }

    fn unbind(&mut self, item: &Item) {
        let pod = self.pod(&format!("{}/{}", item.namespace, item.pod)).unwrap();
        let used = self.used.get_mut(&item.node).unwrap();
        *used = used.checked_sub(&pod_requests(pod.spec()).unwrap()).unwrap();
        let mut pod = pod;
        pod.spec_mut().node_name.clear();
        self.objects.insert(("Pod".to_owned(), pod.key()), pod.into());
    }
}

#[derive(Clone)]
struct Server {
    state: Arc<Mutex<State>>,
    changed: watch::Sender<i64>,
}

impl Server {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn write(&self, kind: Kind, object: Object, event: Type) {
        let mut state = self.state();
        state.write(kind, object, event);
        self.changed.send_replace(state.revision());
    }
}

fn not_here<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("the scheduler does not need this"))
}

#[tonic::async_trait]
impl Objects for Server {
    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let kind = request.into_inner().kind;
        let state = self.state();
        let items = state.objects.iter().filter(|((other, _), _)| *other == kind).map(|(_, object)| object.clone());
        Ok(Response::new(ListResponse {
            items: items.collect(),
            revision: state.revision(),
            r#continue: String::new(),
        }))
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchEvent, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let request = request.into_inner();
        let (sender, receiver) = tokio::sync::mpsc::channel(64);
        let (state, mut changed) = (Arc::clone(&self.state), self.changed.subscribe());
        tokio::spawn(async move {
            let mut at = usize::try_from(request.revision).unwrap();
            loop {
                let news: Vec<_> = state.lock().unwrap().log[at..].to_vec();
                at += news.len();
                for (kind, event) in news {
                    if kind == request.kind && sender.send(Ok(event)).await.is_err() {
                        return;
                    }
                }
                if changed.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver))))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        let request = request.into_inner();
        let pod = self.state().pod(&format!("{}/{}", request.namespace, request.name));
        let pod = pod.filter(|pod| pod.uid() == request.uid).ok_or_else(|| Status::not_found("gone"))?;
        if let Some(node) = pod.node_name() {
            let mut state = self.state();
            let used = state.used.get_mut(node).unwrap();
            *used = used.checked_sub(&pod_requests(pod.spec()).unwrap()).unwrap();
        }
        self.write(Kind::Pod, pod.clone().into(), Type::Deleted);
        Ok(Response::new(DeleteResponse { object: Some(pod.into()), gone: true }))
    }

    async fn evict(&self, _: Request<EvictRequest>) -> Result<Response<DeleteResponse>, Status> {
        not_here()
    }
    async fn create(&self, _: Request<CreateRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn create_many(&self, _: Request<CreateManyRequest>) -> Result<Response<CreateManyResponse>, Status> {
        not_here()
    }
    async fn get(&self, _: Request<GetRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn update_status(&self, _: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn update_ephemeral_containers(&self, _: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn patch(&self, _: Request<PatchRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
    async fn resize(&self, _: Request<minipod_proto::v1::ResizeRequest>) -> Result<Response<Object>, Status> {
        not_here()
    }
}

#[tonic::async_trait]
impl Scheduling for Server {
    async fn bind_batch(&self, request: Request<BindBatchRequest>) -> Result<Response<BindBatchResponse>, Status> {
        let request = request.into_inner();
        let all = request.mode() == Mode::All;
        let mut state = self.state();
        let (mut codes, mut done) = (Vec::new(), Vec::new());
        for item in &request.items {
            let code = state.judge(item);
            if code == Code::Bound {
                state.bind(item);
                done.push(item);
            }
            codes.push(code);
        }
        let failed = codes.iter().any(|code| *code != Code::Bound);
        if all && failed {
            // As if nothing had happened: the log is cut back as well.
            let keep = state.log.len() - done.len();
            done.iter().for_each(|item| state.unbind(item));
            state.log.truncate(keep);
            codes.iter_mut().filter(|code| **code == Code::Bound).for_each(|code| *code = Code::Gang);
        } else if all {
            state.gangs.push(codes.len());
        }
        state.refused += codes.iter().filter(|code| **code != Code::Bound).count() as u64;
        self.changed.send_replace(state.revision());
        let results = request.items.iter().zip(codes).map(|(item, code)| {
            let bound = state.pod(&format!("{}/{}", item.namespace, item.pod));
            let node = bound.and_then(|pod| pod.node_name().map(str::to_owned)).unwrap_or_default();
            let message = if code == Code::RuleBroken { format!("{}: a rule", item.node) } else { String::new() };
            BindResult { code: code.into(), node, message, ..BindResult::default() }
        });
        Ok(Response::new(BindBatchResponse { results: results.collect() }))
    }

    async fn preempt(&self, request: Request<PreemptRequest>) -> Result<Response<PreemptResponse>, Status> {
        for victim in request.into_inner().victims {
            let request =
                DeleteRequest { namespace: victim.namespace, name: victim.pod, uid: victim.uid, ..Default::default() };
            // Gone already is as good.
            let _ = self.delete(Request::new(request)).await;
        }
        Ok(Response::new(PreemptResponse::default()))
    }

    async fn report_unschedulable(
        &self,
        request: Request<ReportUnschedulableRequest>,
    ) -> Result<Response<ReportUnschedulableResponse>, Status> {
        for item in request.into_inner().items {
            self.state().messages.insert(item.pod, item.message);
        }
        Ok(Response::new(ReportUnschedulableResponse {}))
    }
}

struct Cluster {
    server: Server,
    ends: Vec<Trigger>,
    address: String,
    schedulers: Vec<tokio::task::JoinHandle<()>>,
    /// Of all schedulers together.
    metrics: Arc<Registry>,
}

impl Cluster {
    async fn start(schedulers: usize) -> Cluster {
        let server = Server { state: Arc::default(), changed: watch::channel(0).0 };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let routes = tonic::transport::Server::builder()
            .add_service(ObjectsServer::new(server.clone()))
            .add_service(SchedulingServer::new(server.clone()));
        tokio::spawn(routes.serve_with_incoming(TcpListenerStream::new(listener)));
        let mut cluster =
            Cluster { server, ends: Vec::new(), address, schedulers: Vec::new(), metrics: Arc::default() };
        for _ in 0..schedulers {
            cluster.add_scheduler();
        }
        cluster
    }

    fn add_scheduler(&mut self) {
        let client = Client::new(&Options::servers(&self.address)).unwrap();
        let (end, shutdown) = Shutdown::manual();
        let settings = Settings {
            name: "default-scheduler".into(),
            shard: (0, 1),
            profile: Profile::Spread,
            hold_after_ms: 30_000,
        };
        let metrics = Arc::clone(&self.metrics);
        self.schedulers.push(tokio::spawn(async move {
            run::run(client, settings, &metrics, Arc::new(Pulse::default()), shutdown).await;
        }));
        self.ends.push(end);
    }

    fn node(&self, name: &str, cpu: &str) {
        let mut node = Node::default();
        node.meta_mut().name = name.into();
        let amounts = [("cpu", cpu), ("memory", "64Gi"), ("pods", "110")];
        node.status_mut().allocatable = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        self.server.write(Kind::Node, node.into(), Type::Added);
    }

    fn pod(&self, pod: Pod) {
        self.server.write(Kind::Pod, pod.into(), Type::Added);
    }

    fn bound(&self) -> usize {
        let state = self.server.state();
        state.objects.values().filter_map(Object::as_pod).filter(|pod| pod.node_name().is_some()).count()
    }

    /// Waits until `done`, and says what is the case if it never is.
    async fn until(&self, what: &str, done: impl Fn(&Cluster) -> bool) {
        for _ in 0..3_000 {
            if done(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let state = self.server.state();
        panic!(
            "{what}: {} bound after {} attempts, messages {:?}",
            self.bound_of(&state),
            state.attempts,
            state.messages
        );
    }

    fn bound_of(&self, state: &State) -> usize {
        state.objects.values().filter_map(Object::as_pod).filter(|pod| pod.node_name().is_some()).count()
    }

    /// Every node within its bounds at every revision, every pod bound at most once.
    fn check_history(&self) {
        let state = self.server.state();
        let mut places: BTreeMap<String, String> = BTreeMap::new();
        let mut used: BTreeMap<String, Resources> = BTreeMap::new();
        let mut sizes: BTreeMap<String, Resources> = BTreeMap::new();
        for (_, event) in &state.log {
            let object = event.object.as_ref().unwrap();
            if let Some(node) = object.as_node() {
                sizes.insert(node.name().into(), node_allocatable(node).unwrap());
            }
            let Some(pod) = object.as_pod() else { continue };
            let Some(node) = pod.node_name() else { continue };
            let requests = pod_requests(pod.spec()).unwrap();
            let entry = used.entry(node.into()).or_default();
            if event.r#type() == Type::Deleted {
                *entry = entry.checked_sub(&requests).unwrap();
                continue;
            }
            assert_eq!(places.insert(pod.uid().into(), node.into()), None, "{} is bound twice", pod.key());
            *entry = entry.checked_add(&requests).unwrap();
            assert!(entry.fits(&sizes[node]), "{node} is overcommitted at revision {}", event.revision);
        }
    }

    async fn stop(mut self) {
        for end in self.ends.drain(..) {
            end.end();
        }
        for scheduler in self.schedulers.drain(..) {
            tokio::time::timeout(Duration::from_secs(10), scheduler).await.expect("a scheduler ends").unwrap();
        }
    }
}

fn pod(name: &str, cpu: &str) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace, meta.uid) = (name.into(), "default".into(), format!("uid-{name}"));
    pod.spec_mut().scheduler_name = "default-scheduler".into();
    let requests = [("cpu", cpu), ("memory", "1Mi")].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let resources = Some(ResourceRequirements { requests, ..Default::default() });
    pod.spec_mut().containers = vec![Container { name: "main".into(), resources, ..Default::default() }];
    pod
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_schedulers_at_once_bind_what_fits_and_nothing_twice() {
    let mut cluster = Cluster::start(10).await;
    for at in 0..10 {
        cluster.node(&format!("n{at}"), "30");
    }
    for at in 0..400 {
        cluster.pod(pod(&format!("p{at}"), "1"));
    }
    cluster.until("three hundred fit", |all| all.bound() == 300).await;
    cluster.until("the others are told why", |all| all.server.state().messages.len() >= 100).await;
    assert!(cluster.server.state().refused > 0, "the arbiter must have had something to refuse");
    // Two go, one comes: whoever starts late helps as well.
    cluster.ends.drain(..9).for_each(|end| end.end());
    cluster.add_scheduler();
    cluster.node("late", "50");
    cluster.until("fifty more fit", |all| all.bound() == 350).await;
    let message = cluster.server.state().messages.values().next().unwrap().clone();
    assert!(message.starts_with("0/1"), "{message}");
    cluster.check_history();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gangs_are_never_partial_and_preemption_makes_room() {
    let cluster = Cluster::start(2).await;
    for at in 0..4 {
        cluster.node(&format!("n{at}"), "4");
    }
    for group in 0..6 {
        for at in 0..4 {
            let mut pod = pod(&format!("g{group}-{at}"), "1");
            let annotations = &mut pod.meta_mut().annotations;
            annotations.insert("minipod.dev/pod-group".into(), format!("g{group}"));
            annotations.insert("minipod.dev/pod-group-min-count".into(), "4".into());
            cluster.pod(pod);
        }
    }
    cluster.until("four gangs of four fit", |all| all.bound() == 16).await;
    let mut by_group: BTreeMap<String, usize> = BTreeMap::new();
    for pod in cluster.server.state().objects.values().filter_map(Object::as_pod) {
        let group = pod.meta().annotations["minipod.dev/pod-group"].clone();
        *by_group.entry(group).or_default() += usize::from(pod.node_name().is_some());
    }
    assert!(by_group.values().all(|count| *count == 0 || *count == 4), "{by_group:?}");
    assert_eq!(cluster.server.state().gangs, [4, 4, 4, 4]);
    let mut high = pod("high", "2");
    high.spec_mut().priority = Some(100);
    cluster.pod(high);
    let is_bound = |all: &Cluster| all.server.state().pod("default/high").is_some_and(|pod| pod.node_name().is_some());
    cluster.until("the pod of high priority gets its place", is_bound).await;
    cluster.check_history();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_whose_selector_is_none_is_told_so_and_holds_up_nobody() {
    let cluster = Cluster::start(1).await;
    cluster.node("n0", "4");
    let mut wrong = pod("wrong", "1");
    let requirement =
        LabelSelectorRequirement { key: "app".into(), operator: "Resembles".into(), values: vec!["web".into()] };
    let selector = LabelSelector { match_expressions: vec![requirement], ..Default::default() };
    let term = PodAffinityTerm { topology_key: "zone".into(), label_selector: Some(selector), ..Default::default() };
    let near = PodAffinity { required_during_scheduling_ignored_during_execution: vec![term], ..Default::default() };
    wrong.spec_mut().affinity = Some(Box::new(Affinity { pod_affinity: Some(near), ..Default::default() }));
    cluster.pod(wrong);
    for at in 0..3 {
        cluster.pod(pod(&format!("p{at}"), "1"));
    }
    cluster.until("the others are bound", |all| all.bound() == 3).await;
    let told =
        |all: &Cluster| all.server.state().messages.get("wrong").is_some_and(|text| text.contains("\"Resembles\""));
    cluster.until("the wrong one is told why", told).await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_a_rule_stands_against_is_told_counted_and_tried_again() {
    let cluster = Cluster::start(1).await;
    cluster.server.state().against.insert("late".into(), 2);
    cluster.node("n0", "4");
    cluster.pod(pod("late", "1"));
    cluster.until("it is bound in the end", |all| all.bound() == 1).await;
    let told = "pods that were bound meanwhile stand against the decision, it is made anew: n0: a rule";
    cluster
        .until("it was told why not at once", |all| {
            all.server.state().messages.get("late").is_some_and(|text| text == told)
        })
        .await;
    let metrics = cluster.metrics.render();
    assert!(metrics.contains("minipod_scheduler_rules_overtaken_total 2"), "{metrics}");
    cluster.stop().await;
}

#[tokio::test]
async fn a_scheduler_without_a_server_ends_when_asked() {
    let client = Client::new(&Options::servers("http://127.0.0.1:9")).unwrap();
    let (end, shutdown) = Shutdown::manual();
    let settings =
        Settings { name: "default-scheduler".into(), shard: (0, 1), profile: Profile::Pack, hold_after_ms: 30_000 };
    let pulse = Arc::new(Pulse::default());
    let health = Arc::clone(&pulse);
    let task = tokio::spawn(async move { run::run(client, settings, &Registry::default(), pulse, shutdown).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(health.check().is_err(), "nothing has been listed");
    end.end();
    tokio::time::timeout(Duration::from_secs(10), task).await.expect("it ends").unwrap();
}
