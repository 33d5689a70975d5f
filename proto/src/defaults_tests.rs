use super::*;
use crate::manifest::{parse, to_yaml};

#[test]
fn defaults() {
    let blocks: Vec<&str> = include_str!("../testdata/defaults.txt").split("\n=== ").skip(1).collect();
    assert!(blocks.len() > 5);
    for block in blocks {
        let (name, rest) = block.split_once('\n').unwrap();
        let (manifest, expected) = rest.split_once(">>>\n").unwrap();
        let expected = format!("{}\n", expected.trim_end());
        let mut objects = parse(manifest).unwrap_or_else(|problems| panic!("{name}:\n{problems}"));
        objects.iter_mut().for_each(apply);
        let text: Vec<String> = objects.iter().map(to_yaml).collect();
        assert_eq!(text.join("---\n"), expected, "{name}");
        let again: Vec<Object> = objects
            .iter()
            .cloned()
            .map(|mut object| {
                apply(&mut object);
                object
            })
            .collect();
        assert_eq!(again, objects, "{name}: twice is once");
    }
}

#[test]
fn probes_and_hooks() {
    let mut object = Object::empty(Kind::Pod);
    let Some(object::Kind::Pod(pod)) = &mut object.kind else { panic!("a pod") };
    let probe = Probe { http_get: Some(HttpGetAction::default()), period_seconds: 5, ..Probe::default() };
    pod.spec_mut().containers.push(Container { readiness_probe: Some(Box::new(probe)), ..Container::default() });
    apply(&mut object);
    let probe = object.as_pod().unwrap().spec().containers[0].readiness_probe.as_ref().unwrap();
    let numbers = (probe.timeout_seconds, probe.period_seconds, probe.success_threshold, probe.failure_threshold);
    assert_eq!(numbers, (1, 5, 1, 3));
    let http = probe.http_get.as_ref().unwrap();
    assert_eq!((http.path.as_str(), http.scheme.as_str()), ("/", "HTTP"));
}

#[test]
fn pull_policies() {
    for (image, expected) in [
        ("busybox", "Always"),
        ("busybox:latest", "Always"),
        ("busybox:1.36", "IfNotPresent"),
        ("host:5000/busybox", "Always"),
        ("host:5000/busybox:1", "IfNotPresent"),
        ("busybox@sha256:abc", "IfNotPresent"),
        ("busybox:latest@sha256:abc", "IfNotPresent"),
        ("", "Always"),
    ] {
        assert_eq!(pull_policy(image), expected, "{image}");
    }
}
