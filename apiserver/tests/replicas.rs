//! Three API servers, each a process that carries a replica of the store, speaking TLS to each other.

mod support;

use std::{
    collections::BTreeSet,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use minipod_proto::v1::{Object, object, objects_client::ObjectsClient, watch_event};
use minipod_store::{certs, members::parse_members};
use support::{create, eventually, free_port, get, list, pod, watch};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tonic::{Code, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

struct Member {
    name: &'static str,
    api: u16,
    child: Option<Child>,
}

/// Ends with the test, also when it fails.
struct Servers {
    root: TempDir,
    peers: String,
    members: Vec<Member>,
}

impl Servers {
    fn start() -> Servers {
        let root = tempfile::tempdir().expect("a temporary directory");
        let members: Vec<Member> =
            ["a", "b", "c"].into_iter().map(|name| Member { name, api: free_port(), child: None }).collect();
        let peers: Vec<String> =
            members.iter().map(|member| format!("{}=https://127.0.0.1:{}", member.name, free_port())).collect();
        let peers = peers.join(",");
        certs::make(&root.path().join("certs"), &parse_members(&peers).expect("members"), 1).expect("certificates");
        let mut servers = Servers { root, peers, members };
        (0..3).for_each(|place| servers.run(place));
        servers
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn run(&mut self, place: usize) {
        let (name, api) = (self.members[place].name, self.members[place].api);
        let log = std::fs::File::options().create(true).append(true).open(self.file(&format!("{name}.log")));
        let child = Command::new(env!("CARGO_BIN_EXE_minipod-apiserver"))
            .env_clear()
            .args(["--store=embedded", "--name", name, "--peers", &self.peers, &format!("--listen=127.0.0.1:{api}")])
            .arg("--data-dir")
            .arg(self.file(name))
            .arg("--peer-cert-file")
            .arg(self.file(&format!("certs/{name}.pem")))
            .arg("--peer-key-file")
            .arg(self.file(&format!("certs/{name}-key.pem")))
            .arg("--peer-trusted-ca-file")
            .arg(self.file("certs/ca.pem"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.expect("the log file"))
            .spawn();
        self.members[place].child = Some(child.expect("the binary runs"));
    }

    fn kill(&mut self, place: usize) {
        let mut child = self.members[place].child.take().expect("it runs");
        child.kill().expect("killed");
        child.wait().expect("ended");
    }

    /// SIGTERM, and waits for the end.
    async fn terminate(&mut self, place: usize) {
        let mut child = self.members[place].child.take().expect("it runs");
        let told = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill runs");
        assert!(told.success());
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = child.try_wait().expect("it is ours") {
                assert!(status.success(), "{status}");
                return;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                panic!("{} does not end", self.members[place].name);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn objects(&self, place: usize) -> ObjectsClient<Channel> {
        let url = format!("http://127.0.0.1:{}", self.members[place].api);
        ObjectsClient::new(Channel::from_shared(url).expect("an address").connect_lazy())
    }

    /// Creates a pod through a server, again as long as the answer is one to try again after.
    async fn create(&self, place: usize, name: &str) {
        let client = self.objects(place);
        eventually(&format!("{name} is created"), || {
            let mut client = client.clone();
            async move {
                match client.create(create(pod(name, "1m", "1Mi"))).await {
                    Ok(_) => Ok(()),
                    // An earlier try was not answered and has happened.
                    Err(status) if status.code() == Code::AlreadyExists => Ok(()),
                    Err(status) if [Code::Unavailable, Code::DeadlineExceeded].contains(&status.code()) => {
                        Err(status.to_string())
                    }
                    Err(status) => panic!("create {name}: not to be tried again: {status}"),
                }
            }
        })
        .await;
    }

    /// Waits until a server's health is this: clients with several servers leave one that does not serve.
    async fn says_of_itself(&self, place: usize, expected: ServingStatus) {
        let url = format!("http://127.0.0.1:{}", self.members[place].api);
        let client = HealthClient::new(Channel::from_shared(url).expect("an address").connect_lazy());
        eventually(&format!("its health is {expected:?}"), || {
            let mut client = client.clone();
            async move {
                let answer = client.check(HealthCheckRequest::default()).await.map_err(|status| status.to_string())?;
                let status = answer.into_inner().status();
                if status == expected { Ok(()) } else { Err(format!("{status:?}")) }
            }
        })
        .await;
    }

    /// Waits until a server lists exactly these pods.
    async fn lists(&self, place: usize, pods: &BTreeSet<String>) {
        let client = self.objects(place);
        eventually("all acknowledged pods are listed", || {
            let mut client = client.clone();
            async move {
                let answer = client.list(list("Pod")).await.map_err(|status| status.to_string())?.into_inner();
                let names: BTreeSet<String> = answer.items.iter().filter_map(name_of).collect();
                if names == *pods { Ok(()) } else { Err(format!("{names:?}")) }
            }
        })
        .await;
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn name_of(object: &Object) -> Option<String> {
    let Some(object::Kind::Pod(pod)) = &object.kind else { return None };
    pod.metadata.as_ref().map(|meta| meta.name.clone())
}

/// Follows all pods from a revision on, at one server after another whenever a stream ends; sends what it is told was added.
async fn follow(clients: Vec<ObjectsClient<Channel>>, mut revision: i64, added: mpsc::UnboundedSender<String>) {
    for mut client in clients.into_iter().cycle() {
        // Any error is one of a server that is away or has not caught up yet: another one is asked from the same revision on.
        if let Ok(answer) = client.watch(watch("Pod", revision)).await {
            let mut stream = answer.into_inner();
            while let Ok(Some(event)) = stream.message().await {
                revision = revision.max(event.revision);
                let name = event.object.as_ref().and_then(name_of);
                if event.r#type() == watch_event::Type::Added
                    && let Some(name) = name
                    && added.send(name).is_err()
                {
                    return;
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_server_may_die_and_nothing_acknowledged_is_lost() {
    let mut servers = Servers::start();
    for place in 0..3 {
        let client = servers.objects(place);
        eventually("the default namespace is there", || {
            let mut client = client.clone();
            async move { client.get(get("Namespace", "", "default")).await.map_err(|status| status.to_string()) }
        })
        .await;
    }
    servers.create(0, "first").await;
    let mut pods: BTreeSet<String> = ["first".to_owned()].into();
    servers.lists(1, &pods).await;
    let from = servers.objects(1).list(list("Pod")).await.expect("listed").into_inner().revision;
    let (sender, mut told) = mpsc::unbounded_channel();
    let follower = tokio::spawn(follow((0..3).map(|place| servers.objects(place)).collect(), from, sender));

    // Each dies once, so the leader does; while it is away, the others take writes; then it is back and has them.
    for dead in 0..3 {
        servers.kill(dead);
        for number in 0..6 {
            let name = format!("killed-{dead}-{number}");
            servers.create((dead + 1 + number % 2) % 3, &name).await;
            pods.insert(name);
        }
        servers.run(dead);
        servers.lists(dead, &pods).await;
    }
    // A rolling restart: each is told to end, and the writes go on at the others.
    for ended in 0..3 {
        servers.terminate(ended).await;
        for number in 0..6 {
            let name = format!("restarted-{ended}-{number}");
            servers.create((ended + 1 + number % 2) % 3, &name).await;
            pods.insert(name);
        }
        servers.run(ended);
        servers.lists(ended, &pods).await;
    }
    for place in 0..3 {
        servers.lists(place, &pods).await;
    }

    let mut seen: BTreeSet<String> = ["first".to_owned()].into();
    let deadline = Instant::now() + Duration::from_secs(30);
    while seen != pods {
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, told.recv()).await {
            Ok(Some(name)) => _ = seen.insert(name),
            _ => panic!("the watch has a gap: {:?} were never told", pods.difference(&seen).collect::<Vec<_>>()),
        }
    }
    follower.abort();

    // One that is alone knows it and says so, also when nothing happens that it could miss.
    servers.says_of_itself(0, ServingStatus::Serving).await;
    servers.kill(1);
    servers.kill(2);
    servers.says_of_itself(0, ServingStatus::NotServing).await;
    servers.run(1);
    servers.says_of_itself(0, ServingStatus::Serving).await;
}
