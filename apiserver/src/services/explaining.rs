//! Questions to the schedulers, and the streams on which they answer.
//!
//! A scheduler listens on nothing but its health endpoint: like an agent it dials in, says its name, and is asked on its own stream.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use minipod_proto::{
    Kind, Resource,
    v1::{
        CreateRequest, ExplainRequest, Explanation, FitRequest, FitResponse, Pod, SchedulerMessage, SchedulerQuestion,
        explaining_server::Explaining,
        scheduler_message::{Failure, Message},
        scheduler_question::{Explain, Question},
    },
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::{error::ApiError, keys, registry::Registry};

/// A scheduler says hello within this time.
const ARRIVAL: Duration = Duration::from_secs(10);
/// A scheduler that does not answer within this time is passed over: it may have been stopped, and another of its name may run.
const PATIENCE: Duration = Duration::from_secs(4);
/// Questions on their way to one scheduler.
const QUESTIONS: usize = 16;
/// Streams at once: more schedulers than anybody runs.
const STREAMS: usize = 1_024;
/// Pods of one copy in a question.
const PODS_LIMIT: usize = 1_000;
/// Copies in a question.
const COPIES_LIMIT: i32 = 10_000;

/// The implementation.
#[derive(Clone)]
pub struct ExplainingApi {
    registry: Arc<Registry>,
    schedulers: Arc<Schedulers>,
}

/// The schedulers that have a stream here.
#[derive(Default)]
struct Schedulers {
    ids: AtomicU64,
    streams: Mutex<HashMap<u64, Scheduler>>,
}

struct Scheduler {
    name: String,
    questions: mpsc::Sender<Result<SchedulerQuestion, Status>>,
    /// Whoever waits for an answer, by the question's id.
    waiting: HashMap<u64, oneshot::Sender<Message>>,
}

impl Schedulers {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Scheduler>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn join(&self, name: String) -> Result<(u64, mpsc::Receiver<Result<SchedulerQuestion, Status>>), ApiError> {
        let (questions, receiver) = mpsc::channel(QUESTIONS);
        let (stream, mut streams) = (self.id(), self.lock());
        if streams.len() >= STREAMS {
            return Err(ApiError::TooLarge(format!("{STREAMS} schedulers have streams here already")));
        }
        streams.insert(stream, Scheduler { name, questions, waiting: HashMap::new() });
        Ok((stream, receiver))
    }

    /// Hands an answer to whoever waits for it, if somebody still does.
    fn deliver(&self, stream: u64, id: u64, message: Message) {
        let waiting = self.lock().get_mut(&stream).and_then(|scheduler| scheduler.waiting.remove(&id));
        if let Some(waiting) = waiting {
            let _ = waiting.send(message);
        }
    }

    /// Streams of the schedulers of that name, the newest first: one that came back is the more likely to live.
    fn named(&self, name: &str) -> Vec<u64> {
        let streams = self.lock();
        let mut all: Vec<u64> =
            streams.iter().filter(|(_, scheduler)| scheduler.name == name).map(|(stream, _)| *stream).collect();
        all.sort_unstable_by_key(|stream| std::cmp::Reverse(*stream));
        all
    }

    /// Asks one scheduler; `None` when its stream is gone or full, or it does not answer in time.
    async fn ask_one(&self, stream: u64, question: Question) -> Option<Message> {
        let id = self.id();
        let (sender, answer) = oneshot::channel();
        {
            let mut streams = self.lock();
            let scheduler = streams.get_mut(&stream)?;
            let question = SchedulerQuestion { id, question: Some(question) };
            scheduler.questions.try_send(Ok(question)).ok()?;
            scheduler.waiting.insert(id, sender);
        }
        let answer = tokio::time::timeout(PATIENCE, answer).await;
        if let Some(scheduler) = self.lock().get_mut(&stream) {
            scheduler.waiting.remove(&id);
        }
        answer.ok()?.ok()
    }

    async fn ask(&self, name: &str, question: Question) -> Result<Message, Status> {
        let streams = self.named(name);
        let known = streams.len();
        for stream in streams {
            match self.ask_one(stream, question.clone()).await {
                Some(Message::Failure(Failure { code, message })) => {
                    return Err(Status::new(Code::from_i32(code), message));
                }
                Some(message) => return Ok(message),
                None => {}
            }
        }
        let seconds = PATIENCE.as_secs();
        Err(Status::unavailable(match known {
            0 => format!(
                "no scheduler of the name {name:?} is connected to this API server: does one run, and was it told of this server?"
            ),
            _ => format!(
                "{known} schedulers of the name {name:?} are connected, and none has answered within {seconds} s"
            ),
        }))
    }
}

/// Takes a scheduler out when its stream ends, however that comes.
struct Stay {
    schedulers: Arc<Schedulers>,
    stream: u64,
}

impl Drop for Stay {
    fn drop(&mut self) {
        self.schedulers.lock().remove(&self.stream);
    }
}

impl ExplainingApi {
    /// Over the objects.
    pub fn new(registry: Arc<Registry>) -> ExplainingApi {
        ExplainingApi { registry, schedulers: Arc::default() }
    }

    /// A pod as it would be created, without creating it.
    async fn as_created(&self, mut pod: Pod) -> Result<Pod, ApiError> {
        // A manifest that was read back from the cluster has them.
        pod.meta_mut().resource_version.clear();
        let request = CreateRequest { object: Some(pod.into()), dry_run: true };
        let object = self.registry.create(request).await?;
        Pod::try_from(object).map_err(|_| ApiError::Invalid("pods: want pods".into()))
    }
}

/// An answer to another question: a scheduler that is not ours, or not of our version.
fn strange() -> Status {
    Status::internal("the scheduler has answered another question than it was asked")
}

#[tonic::async_trait]
impl Explaining for ExplainingApi {
    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<Explanation>, Status> {
        let request = request.into_inner();
        let key = keys::object_key(Kind::Pod, &request.namespace, &request.pod)?;
        let name = format!("{}/{}", request.namespace, request.pod);
        let entry = self.registry.cache.get(Kind::Pod, &key);
        let pod = entry.as_ref().and_then(|entry| entry.object.as_pod());
        let pod = pod.ok_or(ApiError::NotFound { kind: Kind::Pod, key: name.clone() })?;
        let scheduler = pod.spec().scheduler_name.clone();
        if let Some(node) = pod.node_name() {
            let state = format!("bound to {node}");
            return Ok(Response::new(Explanation {
                scheduler,
                summary: state.clone(),
                state,
                ..Explanation::default()
            }));
        }
        let question = Question::Explain(Explain { uid: pod.uid().to_owned(), key: name });
        match self.schedulers.ask(&scheduler, question).await? {
            Message::Explanation(explanation) => Ok(Response::new(explanation)),
            _ => Err(strange()),
        }
    }

    async fn fit(&self, request: Request<FitRequest>) -> Result<Response<FitResponse>, Status> {
        let FitRequest { pods, count } = request.into_inner();
        if !(1..=COPIES_LIMIT).contains(&count) {
            return Err(ApiError::Invalid(format!("count: {count}, want 1 to {COPIES_LIMIT}")).into());
        }
        if pods.is_empty() || pods.len() > PODS_LIMIT {
            return Err(ApiError::Invalid(format!("pods: {} pods, want 1 to {PODS_LIMIT}", pods.len())).into());
        }
        let mut valid = Vec::with_capacity(pods.len());
        for pod in pods {
            valid.push(self.as_created(pod).await?);
        }
        let scheduler = valid.first().map(|pod| pod.spec().scheduler_name.clone()).unwrap_or_default();
        if let Some(other) = valid.iter().find(|pod| pod.spec().scheduler_name != scheduler) {
            let other = &other.spec().scheduler_name;
            return Err(ApiError::Invalid(format!(
                "schedulerName: {scheduler:?} and {other:?}, want one for all pods"
            ))
            .into());
        }
        match self.schedulers.ask(&scheduler, Question::Fit(FitRequest { pods: valid, count })).await? {
            Message::Fit(fit) => Ok(Response::new(fit)),
            _ => Err(strange()),
        }
    }

    type AnswerStream = ReceiverStream<Result<SchedulerQuestion, Status>>;

    async fn answer(
        &self,
        request: Request<Streaming<SchedulerMessage>>,
    ) -> Result<Response<Self::AnswerStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(ARRIVAL, inbound.message()).await;
        let Ok(Ok(Some(SchedulerMessage { message: Some(Message::Hello(hello)), .. }))) = first else {
            return Err(ApiError::Invalid("message: a scheduler's stream begins with hello".into()).into());
        };
        let (stream, receiver) = self.schedulers.join(hello.name)?;
        let stay = Stay { schedulers: Arc::clone(&self.schedulers), stream };
        tokio::spawn(async move {
            // Ends with the stream: with the scheduler, its connection, or this server.
            while let Ok(Some(SchedulerMessage { id, message: Some(message) })) = inbound.message().await {
                stay.schedulers.deliver(stay.stream, id, message);
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
