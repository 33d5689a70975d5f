//! Pods and images that mean harm to the node they run on: it stays, and so do its other pods.

mod support;

use std::collections::BTreeMap;

use minipod_proto::v1::PodStatus;
use prost::Message as _;
use support::liar::{Answer, Liar, MANIFEST, config_of, digest, layer, manifest_of};
use support::{Node, container, ended, on_a_node, pod, scripts, terminated, waiting_reason};

/// What a pod's status may take, whatever its image says of itself.
const MAX_STATUS_BYTES: usize = 32 << 10;

/// Puts an image into a registry's answers; `more` are fields of its config.
fn add(answers: &mut BTreeMap<String, Answer>, name: &str, more: &str) {
    let layer = layer(b"nothing to run");
    let config = config_of(&[&layer], more);
    let manifest = manifest_of(&config, config.len() as u64, &[(digest(&layer), layer.len() as u64)]);
    for (place, blob) in [
        (format!("blobs/{}", digest(&layer)), layer),
        (format!("blobs/{}", digest(&config)), config),
        ("manifests/1".to_owned(), manifest),
    ] {
        answers.insert(format!("/v2/{name}/{place}"), Answer::Is(MANIFEST, blob));
    }
}

#[test]
fn an_image_whose_config_is_endless_costs_its_own_pod_alone() {
    on_a_node(|| async {
        let text = |letter: &str| letter.repeat(3 << 20);
        let variables: Vec<String> = (0..200_000).map(|number| format!("\"A{number}=x\"")).collect();
        let images = [
            ("user", format!(r#","User":"{}""#, text("u"))),
            ("variable", format!(r#","Env":["A={}"]"#, text("v"))),
            ("environment", format!(r#","Env":[{}]"#, variables.join(","))),
            ("directory", format!(r#","WorkingDir":"/{}""#, text("d"))),
            ("program", format!(r#","Entrypoint":["/{}"]"#, text("e"))),
            ("signal", format!(r#","StopSignal":"{}""#, text("s"))),
            ("labels", format!(r#","Labels":{{"a":"{}"}}"#, text("l"))),
        ];
        let mut answers = BTreeMap::new();
        for (name, more) in &images {
            add(&mut answers, &format!("x/{name}"), more);
        }
        let registry = Liar::start(answers);
        let mut node = Node::new().await;
        node.flags.push(format!("--registry-http={}", registry.host));
        node.start(&[]);
        for (name, _) in &images {
            let yaml = format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  restartPolicy: Never\n  \
                 terminationGracePeriodSeconds: 0\n  containers:\n    - {{name: app, image: '{}/x/{name}:1'}}\n",
                registry.host
            );
            let uid = format!("uid-{name}");
            node.api.put(pod(&yaml, &uid)).await;
            // Nothing of it can run; why, is told.
            let told = |status: &PodStatus| {
                let app = container(status, "app");
                let waits =
                    waiting_reason(app).is_some_and(|reason| !matches!(reason, "ContainerCreating" | "Pulling"));
                terminated(app).is_some() || waits
            };
            let status = node.wait(&uid, "why it does not run", told).await;
            assert!(status.encoded_len() < MAX_STATUS_BYTES, "{name}: {} bytes of status", status.encoded_len());
        }
        // The agent lives, talks, and runs others.
        node.api.put(scripts("uid-other", "Never", 0, &[("a:app", "echo fine")])).await;
        let status = node.wait("uid-other", "its end", ended("app")).await;
        assert_eq!(terminated(container(&status, "app")).map(|end| end.exit_code), Some(0));
        let uids = images.iter().map(|(name, _)| format!("uid-{name}")).chain(["uid-other".to_owned()]);
        for uid in uids {
            node.api.delete(&uid, 0).await;
            node.wait_finished(&uid).await;
            node.wait_gone(&uid).await;
        }
    });
}

#[test]
fn directories_deeper_than_any_path_go_with_their_pod() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-deep";
        // Thrice as deep as a path can be: each tree is moved to the end of the next one. In a volume and in the root directory.
        let script = "long=$(printf 'd/%.0s' $(seq 1900)); for at in /v /deep; do mkdir -p $at; cd $at; mkdir -p a/$long; \
                      for i in 1 2; do mkdir -p b/$long && mv a b/${long}x && mv b a || exit 1; done; done; \
                      echo made; sleep 1000";
        node.api.put(scripts(uid, "Never", 0, &[("a:app", script)])).await;
        node.wait_log(uid, "app", "made").await;
        // What measures its disk goes on, too.
        let agent = node.agent_pid();
        node.api.delete(uid, 0).await;
        // A disk that is told of each block that comes free (ext4's discard) takes milliseconds for a directory.
        let began = std::time::Instant::now();
        while !node.api.is_finished(uid) {
            assert!(began.elapsed().as_secs() < 300, "the pod does not end\n{}", node.agent_log());
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        node.wait_gone(uid).await;
        node.api.put(scripts("uid-other", "Never", 0, &[("a:app", "echo fine")])).await;
        node.wait_log("uid-other", "app", "fine").await;
        assert_eq!(node.agent_pid(), agent);
        node.api.delete("uid-other", 0).await;
        node.wait_finished("uid-other").await;
        node.wait_gone("uid-other").await;
    });
}
