//! Images that pods use and images that nobody uses: volumes that show one, and what goes when the disk fills or somebody asks.

mod support;

use std::path::PathBuf;

use minipod_proto::v1::open_stream::Request;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{
    ImageListRequest, ImagePruneRequest, ImageRemoveRequest, ImageVolumeSource, PodStatus, Volume, VolumeMount,
};
use support::*;

const BUSYBOX: &str = "minipod.local/busybox:latest";
const TOOLBOX: &str = "minipod.local/toolbox:latest";

async fn ask(node: &Node, request: Request) -> Vec<String> {
    let mut tunnel = node.api.open("", request).await;
    loop {
        match tunnel.next().await {
            Some(Frame::Images(list)) => {
                let mut names: Vec<String> = list.images.into_iter().flat_map(|image| image.names).collect();
                names.sort();
                return names;
            }
            Some(_) => {}
            None => panic!("no answer\n{}", node.agent_log()),
        }
    }
}

async fn names(node: &Node) -> Vec<String> {
    ask(node, Request::ImageList(ImageListRequest::default())).await
}

async fn wait_images(node: &Node, want: &[&str]) {
    let began = std::time::Instant::now();
    loop {
        let there = names(node).await;
        if there == want {
            return;
        }
        assert!(began.elapsed().as_secs() < 30, "{there:?} are there, want {want:?}\n{}", node.agent_log());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

fn layers(node: &Node) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(node.data_dir().join("layers")).expect("layers").flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The list forgets an image before the last of its layers is removed.
async fn wait_layers(node: &Node, at_most: usize) {
    let began = std::time::Instant::now();
    while layers(node).len() > at_most {
        assert!(began.elapsed().as_secs() < 30, "want {at_most} layers: {:?}\n{}", layers(node), node.agent_log());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

#[test]
fn a_full_disk_costs_the_images_that_nobody_uses() {
    on_a_node(|| async {
        let mut node = Node::new().await;
        node.flags.retain(|flag| !flag.starts_with("--image-gc"));
        // Full in any case.
        let flags = ["--image-gc-high-threshold=1", "--image-gc-low-threshold=0", "--image-minimum-gc-age=3s"];
        node.flags.extend(flags.map(str::to_owned));
        node.flags.push("--housekeeping-interval-ms=300".to_owned());
        node.api.put(scripts("uid-user", "Always", 1, &[("a:app", "sleep 1000")])).await;
        let before = layers(&node).len();
        node.start(&[]);
        node.wait_running("uid-user").await;
        wait_images(&node, &[BUSYBOX]).await;
        wait_layers(&node, before - 1).await;
        let running = node.wait_running("uid-user").await;
        assert_eq!(container(&running, "app").restart_count, 0);
        node.api.delete("uid-user", 1).await;
        node.wait_finished("uid-user").await;
        // Nobody uses it any more, and its age is over.
        wait_images(&node, &[]).await;
        wait_layers(&node, 0).await;
        node.wait_gone("uid-user").await;
    });
}

#[test]
fn prune_removes_what_no_pod_uses_and_what_it_is_asked_to() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        node.api.put(scripts("uid-user", "Always", 1, &[("a:app", "sleep 1000")])).await;
        node.wait_running("uid-user").await;
        let prune = |all| Request::ImagePrune(ImagePruneRequest { nodes: Vec::new(), all });
        assert_eq!(ask(&node, prune(false)).await, Vec::<String>::new(), "all of them have names");
        assert_eq!(names(&node).await, [BUSYBOX, TOOLBOX]);
        assert_eq!(ask(&node, prune(true)).await, [TOOLBOX]);
        assert_eq!(names(&node).await, [BUSYBOX]);
        node.api.delete("uid-user", 1).await;
        node.wait_finished("uid-user").await;
        node.wait_gone("uid-user").await;
    });
}

#[test]
fn an_image_is_removed_by_its_names_and_never_from_under_a_pod() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        node.api.put(scripts("uid-user", "Always", 1, &[("a:app", "sleep 1000")])).await;
        node.wait_running("uid-user").await;
        let remove = |image: &str| {
            Request::ImageRemove(ImageRemoveRequest { nodes: Vec::new(), images: vec![image.to_owned()] })
        };
        assert_eq!(ask(&node, remove("minipod.local/none")).await, Vec::<String>::new());
        let mut tunnel = node.api.open("", remove("minipod.local/busybox")).await;
        match tunnel.next().await {
            Some(Frame::End(end)) => {
                assert_eq!(end.code, tonic::Code::FailedPrecondition as i32, "{end:?}");
                assert!(end.message.contains("minipod.local/busybox"), "{end:?}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(ask(&node, remove("minipod.local/toolbox")).await, [TOOLBOX]);
        assert_eq!(names(&node).await, [BUSYBOX]);
        wait_layers(&node, 1).await;
        node.api.delete("uid-user", 1).await;
        node.wait_finished("uid-user").await;
        node.wait_gone("uid-user").await;
        assert_eq!(ask(&node, remove(BUSYBOX)).await, [BUSYBOX]);
        wait_layers(&node, 0).await;
    });
}

#[test]
fn a_volume_shows_an_image_and_keeps_it() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-show";
        let look = "ls /image /part | head -c 2000; [ -x /image/bin/sh ] || echo no shell; \
                    touch /image/x 2>&1; /image/bin/busybox true 2>&1 || echo not run; echo looked; sleep 1000";
        let mut pod = scripts(uid, "Always", 1, &[("a:app", look)]);
        let source = |reference: &str, policy: &str| ImageVolumeSource {
            reference: reference.into(),
            pull_policy: policy.into(),
        };
        let volume = |name: &str, source| Volume { name: name.into(), image: Some(source), ..Volume::default() };
        let spec = pod.spec_mut();
        spec.volumes.push(volume("image", source(TOOLBOX, "IfNotPresent")));
        let mount = |path: &str, part: &str| VolumeMount {
            name: "image".into(),
            mount_path: path.into(),
            sub_path: part.into(),
            ..VolumeMount::default()
        };
        spec.containers[0].volume_mounts.extend([mount("/image", ""), mount("/part", "bin")]);
        node.api.put(pod).await;
        let log = node.wait_log(uid, "app", "looked").await;
        assert!(log.contains("/image:\n") && log.contains("Read-only file system") && log.contains("not run"), "{log}");
        let used = Request::ImagePrune(ImagePruneRequest { nodes: Vec::new(), all: true });
        assert_eq!(ask(&node, used.clone()).await, Vec::<String>::new(), "both are in use");
        // Also for an agent that comes anew.
        node.end(nix::sys::signal::Signal::SIGKILL);
        node.start(&[]);
        let sessions = || (node.api.sessions() >= 2).then_some(());
        node.api.wait_for("a second session", sessions, || node.agent_log()).await;
        node.wait_running(uid).await;
        assert_eq!(ask(&node, used).await, Vec::<String>::new());

        node.api.put(example("image-volume")).await;
        node.wait("uid-image-volume", "Succeeded", |status| status.phase == "Succeeded").await;
        let log = node.log("uid-image-volume", "reader", 0);
        assert!(log.contains("bin ") && log.contains("nobody can write to it"), "{log}");

        let mut missing = scripts("uid-missing", "Always", 1, &[("a:app", "sleep 1000")]);
        missing.spec_mut().volumes.push(volume("gone", source("minipod.local/nothing:1", "Never")));
        node.api.put(missing).await;
        node.wait_event("uid-missing", "FailedMount").await;
        let told = |status: &PodStatus| waiting_reason(container(status, "app")) == Some("ErrImageNeverPull");
        node.wait("uid-missing", "the reason", told).await;
        assert_ne!(node.api.status("uid-missing").map(|status| status.phase), Some("Running".to_owned()));
        for uid in [uid, "uid-image-volume", "uid-missing"] {
            node.api.delete(uid, 1).await;
            node.wait_finished(uid).await;
        }
        for uid in [uid, "uid-image-volume", "uid-missing"] {
            node.wait_gone(uid).await;
        }
    });
}
