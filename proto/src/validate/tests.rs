use super::*;
use crate::{
    Kind, defaults, manifest,
    v1::{ConfigMap, Container, HttpGetAction, LifecycleHandler, Pod, Probe, SleepAction, TcpSocketAction},
};

fn one(text: &str, name: &str) -> Object {
    let mut objects = manifest::parse(text).unwrap_or_else(|problems| panic!("{name}:\n{problems}"));
    assert_eq!(objects.len(), 1, "{name}");
    let mut object = objects.remove(0);
    defaults::apply(&mut object);
    object
}

fn text(problems: Vec<Problem>) -> String {
    if problems.is_empty() { "none".to_owned() } else { Problems::from(problems).to_string() }
}

fn blocks(table: &str) -> Vec<(&str, &str, &str)> {
    let parts = table.split("\n=== ").skip(1).map(|block| {
        let (name, rest) = block.split_once('\n').expect("a name");
        let (input, expected) = rest.split_once(">>>\n").expect("an expectation");
        (name, input, expected.trim_end())
    });
    parts.collect()
}

#[test]
fn new_objects() {
    // Kubernetes' own notation is refused by the manifest for the fields in the other test; here are those that are carried out.
    let blocks = blocks(include_str!("../../testdata/validate.txt"));
    assert!(blocks.len() > 15);
    let mut failed = Vec::new();
    for (name, input, expected) in blocks {
        // A quantity that cannot be read is the manifest's to refuse; here it came by another way.
        let object = match name {
            "quantities" => {
                let mut object = one(&input.replace("8Ei", "1Ei"), name);
                if let Some(object::Kind::Pod(pod)) = &mut object.kind {
                    let resources = pod.spec_mut().containers[1].resources.as_mut().unwrap();
                    resources.limits.insert("memory".into(), "8Ei".into());
                }
                object
            }
            _ => one(input, name),
        };
        let found = text(create(&object));
        if found != expected {
            failed.push(format!("{name}\n{found}\n"));
        }
    }
    assert!(failed.is_empty(), "found other problems:\n{}", failed.join("\n"));
}

#[test]
fn changed_objects() {
    let blocks = blocks(include_str!("../../testdata/updates.txt"));
    assert!(blocks.len() > 8);
    for (name, input, expected) in blocks {
        let (old, new) = input.split_once("-->\n").expect("an old and a new object");
        let (old, mut new) = (one(old, name), one(new, name));
        carry_over(&old, &mut new);
        assert_eq!(text(update(&old, &new)), expected, "{name}");
        assert_eq!(update(&old, &old), [], "{name}: nothing changes");
    }
}

#[test]
fn debug_containers_are_added_and_stay() {
    let pod = |ephemeral: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: p, uid: u}}\nspec:\n  volumes: [{{name: v}}]\n  initContainers: \
             [{{name: i, image: x}}]\n  containers: [{{name: a, image: x}}]\n  ephemeralContainers: [{ephemeral}]\n"
        );
        one(&text, ephemeral)
    };
    let first =
        "{name: d, image: x, targetContainerName: a, stdin: true, tty: true, volumeMounts: [{name: v, mountPath: /v}]}";
    let second =
        "{name: e, image: x, securityContext: {capabilities: {add: [SYS_PTRACE]}}, env: [{name: A, value: b}]}";
    let both = format!("{first}, {second}");
    for (old, new, expected) in [
        ("", first, "none"),
        (first, first, "none"),
        (first, both.as_str(), "none"),
        (
            both.as_str(),
            second,
            "spec.ephemeralContainers: found \"d\": existing ephemeral containers may not be removed",
        ),
        (
            first,
            "{name: d, image: y}",
            "spec.ephemeralContainers: found \"d\": existing ephemeral containers may not be changed",
        ),
        (
            "",
            "{name: a, image: x}",
            "spec.ephemeralContainers[0].name: found \"a\": is there already, want every one once",
        ),
        (
            "",
            "{name: i, image: x}",
            "spec.ephemeralContainers[0].name: found \"i\": is there already, want every one once",
        ),
        (
            "",
            "{name: d, image: x, targetContainerName: b}",
            "spec.ephemeralContainers[0].targetContainerName: found \"b\": want the name of a container of the pod",
        ),
        (
            "",
            "{name: d, image: x, ports: [{containerPort: 1}], resources: {limits: {cpu: 1}}, restartPolicy: Always, \
             livenessProbe: {exec: {command: [a]}}, lifecycle: {preStop: {sleep: {seconds: 1}}}}",
            "spec.ephemeralContainers[0].ports: cannot be set for an Ephemeral Container\n\
             spec.ephemeralContainers[0].resources: cannot be set for an Ephemeral Container\n\
             spec.ephemeralContainers[0].restartPolicy: cannot be set for an Ephemeral Container\n\
             spec.ephemeralContainers[0].livenessProbe: cannot be set for an Ephemeral Container\n\
             spec.ephemeralContainers[0].lifecycle: cannot be set for an Ephemeral Container",
        ),
        (
            "",
            "{name: d, volumeMounts: [{name: v, mountPath: /v, subPath: x}]}",
            "spec.ephemeralContainers[0].volumeMounts[0].subPath: found \"x\": cannot be set for an Ephemeral Container\n\
             spec.ephemeralContainers[0].image: is missing: want an image such as busybox:1.36",
        ),
    ] {
        assert_eq!(text(update_ephemeral(&pod(old), &pod(new))), expected, "{old} --> {new}");
    }
    // By no other way, and nothing else by this one.
    assert!(text(create(&pod(first))).contains("added to a running one"));
    assert!(text(update(&pod(""), &pod(first))).starts_with("spec.ephemeralContainers: does not change"));
    let mut other = pod(first);
    let Some(object::Kind::Pod(changed)) = &mut other.kind else { panic!("a pod") };
    changed.spec_mut().containers[0].image = "y".into();
    assert!(text(update_ephemeral(&pod(""), &other)).starts_with("spec.containers[0].image: does not change"));
    // A manifest that is applied again leaves them alone.
    let mut again = pod("");
    carry_over(&pod(first), &mut again);
    assert_eq!(update(&pod(first), &again), []);
}

#[test]
fn what_the_system_set_is_carried_over() {
    let old = one(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p, uid: u, generation: 3}\nspec: {nodeName: node-a, priority: 7, containers: [{name: a, image: x}]}",
        "old",
    );
    let mut new =
        one("apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: a, image: x}]}", "new");
    carry_over(&old, &mut new);
    let pod = new.as_pod().unwrap();
    assert_eq!((pod.spec().node_name.as_str(), pod.spec().priority), ("node-a", Some(7)));
    assert_eq!((new.meta().uid.as_str(), new.meta().generation), ("u", 3));
}

/// Handlers, numbers and ports.
#[test]
fn probes_and_hooks() {
    let problems = |container: Container| {
        let mut pod = Pod::default();
        pod.spec_mut().containers.push(Container { name: "a".into(), image: "x".into(), ..container });
        let mut walk = Walk::default();
        pod::pod(&mut walk, &pod);
        text(walk.problems)
    };
    let port = |port: i32| Some(TcpSocketAction { port: Some(port.into()), ..TcpSocketAction::default() });
    let probe = |probe: Probe| Container { liveness_probe: Some(Box::new(probe)), ..Container::default() };
    assert_eq!(problems(probe(Probe { tcp_socket: port(80), ..Probe::default() })), "none");
    let nothing = "spec.containers[0].livenessProbe: says nothing, want exactly one of exec, httpGet, tcpSocket, grpc";
    assert_eq!(problems(probe(Probe::default())), nothing);
    let bad = Probe { tcp_socket: port(0), success_threshold: 2, period_seconds: -1, ..Probe::default() };
    let expected = "spec.containers[0].livenessProbe.periodSeconds: found \"-1\": want 0 to 2147483647\n\
         spec.containers[0].livenessProbe.successThreshold: found \"2\": want 1 for liveness and startup\n\
         spec.containers[0].livenessProbe.tcpSocket.port: found \"0\": want 1 to 65535";
    assert_eq!(problems(probe(bad)), expected);
    let by_name = HttpGetAction { port: Some("web".into()), scheme: "ftp".into(), ..HttpGetAction::default() };
    let expected = "spec.containers[0].livenessProbe.httpGet.port: found \"web\": want a number or the name of a port of this container\n\
         spec.containers[0].livenessProbe.httpGet.scheme: found \"ftp\": want HTTP or HTTPS";
    assert_eq!(problems(probe(Probe { http_get: Some(by_name), ..Probe::default() })), expected);
    let handler = LifecycleHandler {
        sleep: Some(SleepAction { seconds: -1 }),
        tcp_socket: port(1),
        ..LifecycleHandler::default()
    };
    let lifecycle = crate::v1::Lifecycle { pre_stop: Some(handler), ..crate::v1::Lifecycle::default() };
    let expected = "spec.containers[0].lifecycle.preStop: has tcpSocket and sleep, want exactly one of them\n\
         spec.containers[0].lifecycle.preStop.sleep.seconds: found \"-1\": want 0 to 30";
    assert_eq!(problems(Container { lifecycle: Some(Box::new(lifecycle)), ..Container::default() }), expected);
}

#[test]
fn sizes() {
    let mut map = ConfigMap::default();
    use crate::Resource;
    map.meta_mut().name = "c".into();
    map.meta_mut().namespace = "default".into();
    map.data.insert("a".into(), "x".repeat(1 << 20));
    assert_eq!(create(&map.clone().into()), []);
    map.data.insert("b".into(), "y".into());
    assert_eq!(text(create(&map.clone().into())), "data: has 1048577 bytes, want at most 1048576");
    map.data.clear();
    map.meta_mut().annotations.insert("a".into(), "x".repeat(256 << 10));
    assert_eq!(text(create(&map.into())), "metadata.annotations: have 262145 bytes, want at most 262144");
}

#[test]
fn objects_of_nothing_do_not_panic() {
    for kind in Kind::ALL {
        let mut object = Object::empty(kind);
        assert!(!create(&object).is_empty(), "{kind} without a name");
        defaults::apply(&mut object);
        assert!(!create(&object).is_empty(), "{kind} without a name");
        let _ = update(&object, &object);
    }
    assert_eq!(text(create(&Object { kind: None })), "kind: is missing: want an object of a known kind");
}
