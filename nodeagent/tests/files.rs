//! Files that a pod gets and leaves: its names and resolvers, its last words, values by the dozen, and what outlives it.

mod support;

use minipod_proto::v1::server_message::Message as ToAgent;
use minipod_proto::v1::{
    ConfigMap, ConfigMapVolumeSource, HostAlias, HostPathVolumeSource, ObjectMeta, Pod, PodDnsConfig,
    PodDnsConfigOption, PodStatus, SecurityContext, Volume, VolumeMount,
};
use support::*;

async fn remove(node: &Node, uids: &[String]) {
    for uid in uids {
        node.api.delete(uid, 0).await;
    }
    for uid in uids {
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    }
}

#[test]
fn containers_see_their_pods_names_aliases_and_resolvers() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let look = "hostname; hostname -f; cat /etc/hosts /etc/resolv.conf; echo end; exec sleep 1000";
        let mut pod = scripts("uid-names", "Always", 0, &[("a:app", look), ("a:other", look)]);
        let spec = pod.spec_mut();
        (spec.hostname, spec.subdomain) = ("front".into(), "web".into());
        spec.host_aliases =
            vec![HostAlias { ip: "192.0.2.7".into(), hostnames: vec!["db".into(), "db.example".into()] }];
        spec.dns_policy = "None".into();
        spec.dns_config = Some(Box::new(PodDnsConfig {
            nameservers: ["192.0.2.53", "192.0.2.54", "192.0.2.55", "192.0.2.56"].map(str::to_owned).into(),
            searches: vec!["example.org".into()],
            options: vec![PodDnsConfigOption { name: "ndots".into(), value: Some("2".into()) }],
        }));
        node.api.put(pod).await;
        let status = node.wait_running("uid-names").await;
        for name in ["app", "other"] {
            let log = node.wait_log("uid-names", name, "end").await;
            let ip = &status.pod_ip;
            for line in [
                "front",
                "front.web.default.svc.cluster.local",
                &format!("{ip}\tfront.web.default.svc.cluster.local\tfront"),
                "192.0.2.7\tdb\tdb.example",
                "nameserver 192.0.2.55",
                "search example.org",
                "options ndots:2",
            ] {
                assert!(log.lines().any(|other| other == line), "{line:?} is not in\n{log}");
            }
            assert!(!log.contains("192.0.2.56"), "resolvers read three\n{log}");
        }
        // What was left out is told.
        node.wait_event("uid-names", "DNSConfigForming").await;
        remove(&node, &["uid-names".to_owned()]).await;
    });
}

#[test]
fn last_words_are_the_files_or_the_logs() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let many = "n=0; while [ $n -lt 200 ]; do echo line $n; n=$((n+1)); done; exit 3";
        let last_lines: String = (120..200).map(|number| format!("line {number}\n")).collect();
        let long = "x".repeat(2048);
        let cases = [
            ("file", "File", "echo -n bye > /dev/termination-log; exit 3", "bye"),
            ("user", "File", "echo -n $(id -u) > /dev/termination-log; exit 0", "1000"),
            // Six containers have 12 KiB together.
            ("long", "File", "yes x | tr -d '\n' | head -c 9000 > /dev/termination-log", long.as_str()),
            ("fallback", "FallbackToLogsOnError", many, last_lines.as_str()),
            ("own", "FallbackToLogsOnError", "echo log; echo -n own > /dev/termination-log; exit 3", "own"),
            ("fine", "FallbackToLogsOnError", "echo log; exit 0", ""),
        ];
        let containers: Vec<(String, &str)> =
            cases.iter().map(|(name, _, script, _)| (format!("a:{name}"), *script)).collect();
        let containers: Vec<(&str, &str)> = containers.iter().map(|(name, script)| (name.as_str(), *script)).collect();
        let mut pod = scripts("uid-words", "Never", 0, &containers);
        for (container, (name, policy, ..)) in pod.spec_mut().containers.iter_mut().zip(&cases) {
            container.termination_message_policy = (*policy).to_owned();
            if *name == "user" {
                let context = SecurityContext { run_as_user: Some(1000), ..SecurityContext::default() };
                container.security_context = Some(Box::new(context));
            }
            if *name == "own" {
                container.termination_message_path = "/last/words".to_owned();
                container.args = vec![container.args[0].replace("/dev/termination-log", "/last/words")];
            }
        }
        node.api.put(pod).await;
        let over = |status: &PodStatus| status.phase == "Failed";
        let status = node.wait("uid-words", "the end of all", over).await;
        for (name, _, _, expected) in &cases {
            assert_eq!(terminated(container(&status, name)).expect("ended").message, *expected, "{name}");
        }
        remove(&node, &["uid-words".to_owned()]).await;
    });
}

/// Kubernetes' "wrapper volumes should not cause race condition": fifty volumes in each of five pods at once.
#[test]
fn volumes_of_values_by_the_dozen_are_all_there() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let maps = 50;
        for number in 0..maps {
            let name = format!("map-{number}");
            let metadata =
                Some(ObjectMeta { name: name.clone(), namespace: "default".into(), ..ObjectMeta::default() });
            let map =
                ConfigMap { metadata, data: [("value".into(), format!("{number}\n"))].into(), ..ConfigMap::default() };
            node.api.put_source(&name, ToAgent::ConfigMap(map)).await;
        }
        let uids: Vec<String> = (0..5).map(|number| format!("uid-dozens-{number}")).collect();
        let pod_of = |uid: &str| -> Pod {
            let mut pod = scripts(uid, "Never", 0, &[("a:app", "cat /many/*/value | sort -n | tr '\\n' ' '")]);
            let spec = pod.spec_mut();
            for number in 0..maps {
                let name = format!("many-{number}");
                let source =
                    ConfigMapVolumeSource { name: format!("map-{number}"), ..ConfigMapVolumeSource::default() };
                spec.volumes.push(Volume { name: name.clone(), config_map: Some(source), ..Volume::default() });
                let mount = VolumeMount { name, mount_path: format!("/many/{number}"), ..VolumeMount::default() };
                spec.containers[0].volume_mounts.push(mount);
            }
            pod
        };
        for uid in &uids {
            node.api.put(pod_of(uid)).await;
        }
        let all: String = (0..maps).map(|number| format!("{number} ")).collect();
        for uid in &uids {
            let status = node.wait(uid, "success", |status| status.phase == "Succeeded").await;
            assert_eq!(terminated(container(&status, "app")).expect("ended").exit_code, 0);
            assert_eq!(node.log(uid, "app", 0).trim(), all.trim(), "{uid}");
        }
        remove(&node, &uids).await;
    });
}

#[test]
fn a_directory_of_the_node_outlives_its_pods() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let dir = tempfile::tempdir().expect("tempdir");
        let kept = dir.path().join("made/here");
        let pod_of = |uid: &str, script: &str| {
            let mut pod = scripts(uid, "Never", 0, &[("a:app", script)]);
            let host_path =
                HostPathVolumeSource { path: kept.display().to_string(), r#type: "DirectoryOrCreate".into() };
            let spec = pod.spec_mut();
            spec.volumes.push(Volume { name: "kept".into(), host_path: Some(host_path), ..Volume::default() });
            let mount = VolumeMount { name: "kept".into(), mount_path: "/kept".into(), ..VolumeMount::default() };
            spec.containers[0].volume_mounts.push(mount);
            pod
        };
        let succeeded = |status: &PodStatus| status.phase == "Succeeded";
        for (uid, script, lines) in
            [("uid-first", "echo one >> /kept/data", 1), ("uid-second", "echo two >> /kept/data", 2)]
        {
            node.api.put(pod_of(uid, script)).await;
            node.wait(uid, "success", succeeded).await;
            remove(&node, &[uid.to_owned()]).await;
            assert_eq!(std::fs::read_to_string(kept.join("data")).expect("it stays").lines().count(), lines);
        }
    });
}
