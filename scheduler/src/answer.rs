//! Questions of the API servers: one stream to each of them, kept open by a task of its own; the loop answers between its turns, slice by slice.
//!
//! ```text
//!  API server ──SchedulerQuestion──▶ task ──Question (bounded)──▶ loop ──oneshot──▶ task ──SchedulerMessage──▶ API server
//! ```

use std::time::Duration;

use minipod_client::Client;
use minipod_daemon::shutdown::Shutdown;
use minipod_proto::v1::node_verdict::Short;
use minipod_proto::v1::remedy::Pod as VictimPod;
use minipod_proto::v1::scheduler_message::{Failure, Hello, Message};
use minipod_proto::v1::scheduler_question::Question as Asked;
use minipod_proto::v1::{
    Explanation, FitRequest, FitResponse, NodeVerdict, Remedy, SchedulerMessage, SchedulerQuestion, fit_response,
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use crate::plan::{self, Inquiry, Planner, PodInfo, Progress, Reason, Standing};

/// Questions that wait for the loop, of all API servers.
const QUESTIONS: usize = 16;
/// Verdicts that are put in words before the loop turns: about a millisecond.
const SLICE: usize = 500;
/// Answers that wait for the network, per API server.
const ANSWERS: usize = 16;
/// First and longest pause before a lost stream is opened again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
/// Copies in one question: what takes the loop tens of milliseconds.
const COPIES: i32 = 10_000;

/// A question, and where the answer goes.
#[derive(Debug)]
pub struct Question {
    asked: Asked,
    reply: oneshot::Sender<Message>,
}

/// Keeps a stream open to every API server of the client until the shutdown; what is asked comes out of the receiver.
pub fn listen(client: &Client, name: &str, shutdown: &Shutdown) -> mpsc::Receiver<Question> {
    let (sender, receiver) = mpsc::channel(QUESTIONS);
    for server in client.each() {
        tokio::spawn(keep(server, name.to_owned(), sender.clone(), shutdown.clone()));
    }
    receiver
}

async fn keep(server: Client, name: String, questions: mpsc::Sender<Question>, shutdown: Shutdown) {
    let mut pause = PAUSE.0;
    loop {
        // Cancel safe: whatever is dropped here ends with the process.
        let ended = tokio::select! {
            ended = converse(&server, &name, &questions, &mut pause) => ended,
            () = shutdown.asked() => return,
        };
        tracing::debug!(server = %server.servers(), %ended, "the stream of questions has ended");
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.asked() => return,
        }
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// One stream, until it ends; answers why it did.
async fn converse(server: &Client, name: &str, questions: &mpsc::Sender<Question>, pause: &mut Duration) -> String {
    let (answers, outbound) = mpsc::channel(ANSWERS);
    let hello = SchedulerMessage { id: 0, message: Some(Message::Hello(Hello { name: name.to_owned() })) };
    if answers.send(hello).await.is_err() {
        return "it could not be begun".to_owned();
    }
    let mut inbound: Streaming<SchedulerQuestion> = match server.answer(ReceiverStream::new(outbound)).await {
        Ok(inbound) => inbound,
        Err(error) => return error.to_string(),
    };
    *pause = PAUSE.0;
    loop {
        let SchedulerQuestion { id, question } = match inbound.message().await {
            Ok(Some(question)) => question,
            Ok(None) => return "the server has closed it".to_owned(),
            Err(status) => return status.to_string(),
        };
        let message = match question {
            Some(asked) => ask(asked, questions).await,
            None => failure(Code::Unimplemented, "this scheduler is older than the question"),
        };
        if answers.send(SchedulerMessage { id, message: Some(message) }).await.is_err() {
            return "the server takes no answers".to_owned();
        }
    }
}

async fn ask(asked: Asked, questions: &mpsc::Sender<Question>) -> Message {
    let (reply, answer) = oneshot::channel();
    let ending = || failure(Code::Unavailable, "the scheduler is ending");
    if questions.send(Question { asked, reply }).await.is_err() {
        return ending();
    }
    answer.await.unwrap_or_else(|_| ending())
}

fn failure(code: Code, message: impl Into<String>) -> Message {
    Message::Failure(Failure { code: code.into(), message: message.into() })
}

/// A question on the way to its answer.
#[derive(Debug)]
pub struct Answering {
    work: Work,
    /// Of the pod that is asked about, as people know it.
    key: String,
    reply: oneshot::Sender<Message>,
}

#[derive(Debug)]
enum Work {
    /// The planner looks at nodes.
    Looking(Inquiry),
    /// What it has found is put in the words of the API.
    Telling { found: Box<Found>, told: Vec<NodeVerdict> },
    /// Places for pods that are not there.
    Fitting(Box<FitRequest>),
}

#[derive(Debug)]
struct Found {
    why: plan::Explanation,
    remedies: Vec<plan::Remedy>,
    tried: usize,
    note: String,
}

impl Answering {
    /// Takes up a question. It has cost nothing yet.
    pub fn begin(planner: &Planner, question: Question) -> Answering {
        let Question { asked, reply } = question;
        match asked {
            Asked::Explain(explain) => {
                let key = format!("{} (uid {})", explain.key, explain.uid);
                Answering { work: Work::Looking(planner.inquire(&explain.uid)), key, reply }
            }
            Asked::Fit(request) => Answering { work: Work::Fitting(Box::new(request)), key: String::new(), reply },
        }
    }

    /// Does the next slice, from what the planner knows now; `None`: it is answered.
    pub fn proceed(self, planner: &mut Planner, name: &str) -> Option<Answering> {
        let Answering { work, key, reply } = self;
        if reply.is_closed() {
            return None;
        }
        let message = match work {
            Work::Looking(inquiry) => match planner.pursue(inquiry) {
                Progress::More(inquiry) => return Some(Answering { work: Work::Looking(inquiry), key, reply }),
                Progress::Done(None) => {
                    let unknown = format!("pod {key} is not known to scheduler {name} yet, or not any more");
                    failure(Code::NotFound, unknown)
                }
                Progress::Done(Some(Standing::Placed(state))) => {
                    let (scheduler, summary) = (name.to_owned(), state.clone());
                    Message::Explanation(Explanation { scheduler, summary, state, ..Explanation::default() })
                }
                Progress::Done(Some(Standing::Waits { why, remedies, tried, note })) => {
                    let found = Box::new(Found { why, remedies, tried, note });
                    let told = Vec::with_capacity(found.why.nodes.len());
                    return Some(Answering { work: Work::Telling { found, told }, key, reply });
                }
            },
            Work::Telling { found, mut told } => {
                let nodes = found.why.nodes.iter().enumerate().skip(told.len()).take(SLICE);
                told.extend(nodes.map(|(at, node)| verdict(planner, node, found.remedies.get(at))));
                if told.len() < found.why.nodes.len() {
                    return Some(Answering { work: Work::Telling { found, told }, key, reply });
                }
                let Found { why, tried, note, .. } = *found;
                Message::Explanation(Explanation { state: note, ..explanation(name, &why, told, tried) })
            }
            Work::Fitting(request) => fit(planner, name, &request),
        };
        // Whoever asked may have gone.
        let _ = reply.send(message);
        None
    }
}

fn explanation(name: &str, why: &plan::Explanation, nodes: Vec<NodeVerdict>, tried: usize) -> Explanation {
    Explanation {
        scheduler: name.to_owned(),
        summary: why.to_string(),
        gates: why.gates.clone(),
        nodes,
        state: String::new(),
        remedies_tried: i64::try_from(tried).unwrap_or(i64::MAX),
    }
}

fn verdict(planner: &Planner, node: &plan::NodeReason, remedy: Option<&plan::Remedy>) -> NodeVerdict {
    let Some(reason) = &node.reason else {
        return NodeVerdict { node: node.node.clone(), ..NodeVerdict::default() };
    };
    let core = planner.core();
    let short = |short: &minipod_proto::resources::Shortfall| Short {
        resource: short.resource.clone(),
        requested: short.requested,
        free: short.free,
        allocatable: core.allocatable_of(&node.node, &short.resource),
    };
    let shortfalls = match reason {
        Reason::Short(all) => all.iter().map(short).collect(),
        _ => Vec::new(),
    };
    let victim = |info: &PodInfo| VictimPod {
        namespace: info.namespace().to_owned(),
        name: info.name.to_string(),
        priority: info.needs.priority,
    };
    let remedy = remedy.map(|remedy| Remedy {
        text: remedy.text.clone(),
        evict: remedy.evict.iter().filter_map(|pod| core.pod(*pod)).map(victim).collect(),
        by_preemption: remedy.by_preemption,
    });
    NodeVerdict { node: node.node.clone(), reason: reason.to_string(), kind: reason.kind(), shortfalls, remedy }
}

fn fit(planner: &mut Planner, name: &str, request: &FitRequest) -> Message {
    let copies = match usize::try_from(request.count) {
        Ok(copies) if (1..=COPIES).contains(&request.count) && !request.pods.is_empty() => copies,
        _ => {
            let (count, pods) = (request.count, request.pods.len());
            return failure(
                Code::InvalidArgument,
                format!("count: {count} copies of {pods} pods: want 1 to {COPIES} copies of at least one pod"),
            );
        }
    };
    let infos: Result<Vec<PodInfo>, _> = request.pods.iter().map(PodInfo::new).collect();
    let infos = match infos {
        Ok(infos) => infos,
        Err(error) => return failure(Code::InvalidArgument, error.to_string()),
    };
    let fit = planner.fit(&infos, copies);
    let pod = |at: usize| infos.get(at).map_or_else(String::new, |info| info.name.to_string());
    let copy = |copy: usize| i32::try_from(copy + 1).unwrap_or(i32::MAX);
    let placements = fit.placements.iter().map(|(number, at, node)| fit_response::Placement {
        pod: pod(*at),
        copy: copy(*number),
        node: node.clone(),
    });
    let mut answer = FitResponse {
        scheduler: name.to_owned(),
        placements: placements.collect(),
        asked: i32::try_from(copies.saturating_mul(infos.len())).unwrap_or(i32::MAX),
        group: fit.group.unwrap_or_default(),
        ..FitResponse::default()
    };
    if let Some(unplaced) = fit.unplaced {
        answer.unplaced = pod(unplaced.pod);
        answer.unplaced_copy = copy(unplaced.copy);
        let nodes = unplaced.why.nodes.iter().enumerate();
        let nodes = nodes.map(|(at, node)| verdict(planner, node, unplaced.remedies.get(at))).collect();
        answer.why = Some(explanation(name, &unplaced.why, nodes, unplaced.tried));
    }
    Message::Fit(answer)
}
