//! Gangs under ten schedulers that are killed and stopped, and preemption with grace on a real node. What is asserted of gangs is
//! asserted of the store as every revision left it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use minictl::local::{NodeOptions, Options};
use minipod_client::{ChangeKind, Client, DeleteOptions, Query};
use minipod_proto::Resource;
use minipod_proto::v1::{Event, Pod};
use minipod_tests::cluster::{Cluster, bin_dir, pod, text};
use minipod_tests::hollow::HollowNode;
use minipod_tests::wait;
use tonic::transport::Endpoint;

const NODES: usize = 20;
/// A node takes four members; a gang has four: twenty gangs fit, whatever they are spread over.
const GANGS: usize = 30;
const MEMBERS: usize = 4;
const FIT: usize = 20;
/// Gangs that are deleted later, so that as many others get their turn.
const LEAVE: usize = 5;

const PRIORITIES: &str = "apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: low}\nvalue: 1\n---\n\
                          apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: high}\nvalue: 1000\n";

fn member(gang: &str, at: usize, class: &str) -> Pod {
    pod(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {gang}-{at}\n  annotations: {{minipod.dev/pod-group: {gang}, \
         minipod.dev/pod-group-min-count: \"{MEMBERS}\"}}\nspec:\n  priorityClassName: {class}\n  containers:\n  - name: c\n    \
         image: x\n    resources: {{requests: {{cpu: 1}}}}\n"
    ))
}

fn gang_of(pod: &Pod) -> String {
    pod.meta().annotations.get("minipod.dev/pod-group").cloned().unwrap_or_default()
}

async fn create_priorities(client: &Client) {
    for object in minipod_proto::manifest::parse(PRIORITIES).expect("a manifest") {
        client.create_object(object, false).await.expect("created");
    }
}

/// What the whole history of the store says of gangs.
#[derive(Debug, Default)]
struct History {
    /// Members that were ever bound, by gang.
    bound: BTreeMap<String, BTreeSet<String>>,
    places: HashMap<String, String>,
    /// CPUs in use, by node.
    used: HashMap<String, i64>,
    on: HashMap<String, String>,
    revisions: usize,
}

impl History {
    fn apply(&mut self, kind: &ChangeKind<Pod>) {
        match kind {
            ChangeKind::Added(pod) | ChangeKind::Modified(pod) => {
                let Some(node) = pod.node_name() else { return };
                let place = self.places.entry(pod.uid().to_owned()).or_insert_with(|| node.to_owned());
                assert_eq!(place, node, "{} was moved at revision {}", pod.key(), pod.revision());
                if self.on.insert(pod.uid().to_owned(), node.to_owned()).is_none() {
                    *self.used.entry(node.to_owned()).or_default() += 1;
                    self.bound.entry(gang_of(pod)).or_default().insert(pod.uid().to_owned());
                }
            }
            ChangeKind::Deleted(pod) => {
                if let Some(node) = self.on.remove(pod.uid()) {
                    *self.used.entry(node).or_default() -= 1;
                }
            }
            ChangeKind::Bookmark => {}
        }
    }

    /// What holds at the end of a revision.
    fn check(&mut self, revision: i64) {
        self.revisions += 1;
        for (gang, members) in self.bound.iter().filter(|(gang, _)| !gang.is_empty()) {
            assert!(members.len() >= MEMBERS, "{gang} has {} members bound at revision {revision}", members.len());
        }
        for (node, used) in &self.used {
            assert!(*used <= MEMBERS as i64, "{node} has {used} CPUs in use at revision {revision}");
        }
    }

    fn gangs(&self) -> usize {
        self.bound.keys().filter(|gang| !gang.is_empty()).count()
    }
}

/// Follows every change of every pod until as many gangs were bound as there shall be, and then for a while.
async fn audit(client: Client, revision: i64, want: usize) -> History {
    let mut watch = client.watch::<Pod>(&Query::all(), revision).await.expect("watched");
    let (mut history, mut at) = (History::default(), revision);
    loop {
        let patience = if history.gangs() < want { wait::PATIENCE } else { Duration::from_secs(3) };
        let Ok(change) = tokio::time::timeout(patience, watch.next()).await else { return history };
        let change = change.expect("the watch lives").expect("the watch goes on");
        // Objects carry the revision of their transaction; the next one begins where it is another.
        if let ChangeKind::Added(pod) | ChangeKind::Modified(pod) | ChangeKind::Deleted(pod) = &change.kind
            && pod.revision() != at
        {
            history.check(at);
            at = pod.revision();
        }
        history.apply(&change.kind);
        if matches!(change.kind, ChangeKind::Bookmark) {
            history.check(at);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gangs_are_never_partial_under_ten_schedulers_that_die_and_stall() {
    let options = Options { schedulers: 10, ..Options::new(bin_dir(), Vec::new()) };
    let mut cluster = Cluster::start_with(options).await;
    let client = cluster.client().clone();
    create_priorities(&client).await;
    let channel = Endpoint::from_shared(cluster.local.server().to_owned()).expect("an address").connect_lazy();
    let mut nodes = Vec::new();
    for index in 0..NODES {
        let allocatable = [("cpu", "4"), ("memory", "64Gi"), ("pods", "110")];
        let joined = HollowNode::join(channel.clone(), &format!("hollow-{index}"), &allocatable).await;
        nodes.push(joined.unwrap_or_else(|status| panic!("hollow-{index}: {status}")));
    }
    let revision = client.list::<Pod>(&Query::all()).await.expect("listed").revision;
    // Beside those that fit at first come as many as others make room for, and one that takes its room.
    let audit = tokio::spawn(audit(client.clone(), revision, FIT + LEAVE + 1));
    let creating = client.clone();
    let created = tokio::spawn(async move {
        // The members of a gang come one by one, with others in between.
        for at in 0..MEMBERS {
            for gang in 0..GANGS {
                creating.create(member(&format!("g{gang}"), at, "low")).await.expect("created");
            }
        }
    });
    for name in ["scheduler-3", "scheduler-7"] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.local.daemon(name).expect("it runs").kill();
    }
    // This one wakes up with a snapshot of long ago, and decides on it.
    cluster.local.daemon("scheduler-1").expect("it runs").pause(true);
    created.await.expect("all pods are created");
    let whole = |want: usize| {
        let client = client.clone();
        async move {
            wait::until(&format!("{want} gangs to be bound"), || async {
                let pods = client.list::<Pod>(&Query::all()).await.map_err(|error| error.to_string())?.items;
                let mut gangs: BTreeMap<String, usize> = BTreeMap::new();
                for pod in pods.iter().filter(|pod| pod.node_name().is_some()) {
                    *gangs.entry(gang_of(pod)).or_default() += 1;
                }
                let whole: Vec<String> =
                    gangs.iter().filter(|(_, count)| **count == MEMBERS).map(|(gang, _)| gang.clone()).collect();
                if whole.len() == want { Ok(whole) } else { Err(format!("{gangs:?}")) }
            })
            .await
        }
    };
    let bound = whole(FIT).await;
    cluster.local.daemon("scheduler-1").expect("it runs").pause(false);
    for gang in bound.iter().take(LEAVE) {
        for at in 0..MEMBERS {
            let options = DeleteOptions { grace_seconds: Some(0), ..DeleteOptions::default() };
            client.delete::<Pod>("default", &format!("{gang}-{at}"), &options).await.expect("deleted");
        }
    }
    whole(FIT).await;
    // A gang that is more important ends as many as it needs, and comes as a whole.
    for at in 0..MEMBERS {
        client.create(member("important", at, "high")).await.expect("created");
    }
    wait::until("the important gang to be bound", || async {
        let pods = client.list::<Pod>(&Query::all()).await.map_err(|error| error.to_string())?.items;
        let bound = pods.iter().filter(|pod| gang_of(pod) == "important" && pod.node_name().is_some()).count();
        if bound == MEMBERS { Ok(()) } else { Err(format!("{bound} of it are bound")) }
    })
    .await;
    let history = audit.await.expect("nothing was wrong at any revision");
    assert!(history.bound.contains_key("important"), "{:?}", history.bound.keys());
    eprintln!("{} gangs bound, {} revisions checked", history.gangs(), history.revisions);
    cluster.local.stop().expect("taken down");
}

/// A pod with all but a little of the node's memory that takes its time to end.
fn hog(name: &str, class: &str, memory: &str) -> Pod {
    pod(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  priorityClassName: {class}\n  \
         terminationGracePeriodSeconds: 20\n  containers:\n  - name: c\n    image: minipod.local/busybox\n    \
         imagePullPolicy: IfNotPresent\n    command: [sh, -c, \"trap 'sleep 4; exit 0' TERM; while true; do sleep 0.1; done\"]\n    \
         resources: {{requests: {{memory: {memory}}}}}\n"
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn victims_end_with_grace_and_the_room_is_kept_meanwhile() {
    let nodes = vec![NodeOptions::with_memory("node-a", "2Gi")];
    let mut cluster = Cluster::start_with(Options { schedulers: 2, ..Options::new(bin_dir(), nodes) }).await;
    let client = cluster.client().clone();
    create_priorities(&client).await;
    cluster.create(hog("low", "low", "1500Mi")).await;
    cluster.until_phase("low", "Running").await;
    cluster.create(hog("high", "high", "1500Mi")).await;
    // While the victim has its grace, the one that gets its place is nominated, and both say why.
    let victim = wait::until("the victim to be marked", || async {
        let (low, high) = (cluster.pod("low").await?, cluster.pod("high").await?);
        let marked = low.is_terminating() && low.condition_true("DisruptionTarget");
        let nominated = high.status().nominated_node_name == "node-a";
        if marked && nominated { Ok(low) } else { Err(format!("{:#?} {:#?}", low.status(), high.status())) }
    })
    .await;
    assert_eq!(victim.meta().deletion_grace_period_seconds, Some(20));
    let target = victim.condition("DisruptionTarget").expect("the condition");
    assert_eq!(target.reason, "PreemptionByScheduler");
    assert!(target.message.contains("default/high"), "{}", target.message);
    // A third that would fit into the room finds it taken, also when the scheduler that has decided is gone.
    cluster.local.daemon("scheduler-0").expect("it runs").kill();
    cluster.create(hog("small", "low", "1Gi")).await;
    let high = cluster.until_phase("high", "Running").await;
    assert_eq!(high.node_name(), Some("node-a"));
    assert!(high.status().nominated_node_name.is_empty(), "it has its place");
    assert!(cluster.pod("low").await.is_err(), "the victim is gone");
    let small = wait::until("the small one to be told why it waits", || async {
        let small = cluster.pod("small").await?;
        let told = small.condition("PodScheduled").is_some_and(|told| told.message.contains("memory short"));
        if told { Ok(small) } else { Err(format!("{:#?}", small.status())) }
    })
    .await;
    assert_eq!(small.node_name(), None);
    let events = client.list::<Event>(&Query::all()).await.expect("listed").items;
    assert!(events.iter().any(|event| event.reason == "Preempted"), "{events:#?}");

    // And the budget of the one that runs now is asked before it may be evicted.
    let budget = "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: all}\nspec: {minAvailable: 1, selector: {}}\n";
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), budget).expect("written");
    let applied = cluster.minictl(&["apply", "-f", &file.path().to_string_lossy()]);
    assert!(applied.status.success(), "{}", text(&applied.stderr));
    let evicted = cluster.minictl(&["evict", "high"]);
    let (out, err) = (text(&evicted.stdout), text(&evicted.stderr));
    assert!(
        !evicted.status.success() && err.contains("the disruption budget all needs 1 healthy pods and has 1"),
        "{out}{err}"
    );
    let drained = cluster.minictl(&["drain", "node-a", "--timeout", "2s"]);
    let err = text(&drained.stderr);
    assert!(!drained.status.success() && err.contains("would violate the pod's disruption budget"), "{err}");
    let shown = text(&cluster.minictl(&["get", "pdb"]).stdout);
    assert!(shown.contains("ALLOWED DISRUPTIONS") && shown.contains("all"), "{shown}");
    let deleted = cluster.minictl(&["delete", "pdb", "all"]);
    assert!(deleted.status.success(), "{}", text(&deleted.stderr));
    let drained = cluster.minictl(&["drain", "node-a"]);
    let (out, err) = (text(&drained.stdout), text(&drained.stderr));
    assert!(
        drained.status.success() && out.contains("pod \"default/high\" evicted") && out.contains("node/node-a drained"),
        "{out}{err}"
    );
    assert!(cluster.pod("high").await.is_err(), "it is gone");
    cluster.local.stop().expect("taken down");
}
