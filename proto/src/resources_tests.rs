use super::*;
use crate::v1::Pod;

/// `init: cpu/memory …` in the notation of the table: `name=cpu,memory` with `*` for a sidecar.
fn spec(init: &[(&str, &str, bool)], apps: &[(&str, &str)]) -> PodSpec {
    let container = |cpu: &str, memory: &str| {
        let amounts = [(CPU, cpu), (MEMORY, memory)].into_iter().filter(|(_, text)| !text.is_empty());
        let requests = amounts.map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
        Container { resources: Some(ResourceRequirements { requests, ..Default::default() }), ..Default::default() }
    };
    let mut spec = PodSpec::default();
    for (cpu, memory, sidecar) in init {
        let mut container = container(cpu, memory);
        container.restart_policy = if *sidecar { "Always".into() } else { String::new() };
        spec.init_containers.push(container);
    }
    spec.containers = apps.iter().map(|(cpu, memory)| container(cpu, memory)).collect();
    spec
}

/// Init containers (CPU, memory, whether a sidecar), apps (CPU, memory), CPU sum in thousandths, memory sum.
type Case<'a> = (&'a [(&'a str, &'a str, bool)], &'a [(&'a str, &'a str)], i64, i64);

#[test]
fn effective_requests() {
    let table: &[Case] = &[
        (&[], &[("", "")], 0, 0),
        (&[], &[("100m", "1Ki"), ("1", "2Ki")], 1100, 3072),
        (&[], &[("1u", "1500m")], 1, 2),
        (&[("2", "1", false)], &[("1", "10")], 2000, 10),
        (&[("2", "1", false), ("3", "1", false)], &[("1", "10")], 3000, 10),
        // A sidecar runs beside the apps, and beside the init containers after it.
        (&[("1", "1", true)], &[("1", "10")], 2000, 11),
        (&[("1", "1", true), ("5", "1", false)], &[("1", "10")], 6000, 11),
        (&[("5", "1", false), ("1", "1", true)], &[("1", "10")], 5000, 11),
        (&[("1", "5", true), ("1", "5", true), ("1", "1", false)], &[("1", "1")], 3000, 11),
        (&[("1", "0", true), ("9", "0", true)], &[("0", "0")], 10_000, 0),
    ];
    for (init, apps, cpu, memory) in table {
        let all = pod_requests(&spec(init, apps)).unwrap();
        assert_eq!((all.cpu_milli, all.memory_bytes, all.pods), (*cpu, *memory, 1), "{init:?} {apps:?}");
    }
}

#[test]
fn limits_stand_in_for_requests_and_pod_level_replaces() {
    let mut spec = spec(&[], &[("1", "1Gi")]);
    spec.containers[0].resources.as_mut().unwrap().limits =
        [("cpu", "2"), ("example.com/gpu", "1")].map(|(name, text)| (name.to_owned(), text.to_owned())).into();
    let all = pod_requests(&spec).unwrap();
    assert_eq!((all.cpu_milli, all.get("example.com/gpu")), (1000, 1));
    let requests = [("cpu", "4"), ("ephemeral-storage", "1")].map(|(name, text)| (name.to_owned(), text.to_owned()));
    spec.resources = Some(Box::new(ResourceRequirements { requests: requests.into(), ..Default::default() }));
    spec.overhead = [("memory".to_owned(), "1Mi".to_owned())].into();
    let all = pod_requests(&spec).unwrap();
    assert_eq!((all.cpu_milli, all.memory_bytes, all.ephemeral_bytes), (4000, 1025 << 20, 0));
    let limits = pod_limits(&spec).unwrap();
    assert_eq!((limits.cpu_milli, limits.memory_bytes), (2000, 0));
}

#[test]
fn sums_do_not_wrap() {
    let huge = spec(&[], &[("1", "7Ei"), ("1", "7Ei")]);
    assert_eq!(pod_requests(&huge), Err(ResourceError::Overflow { resource: "memory".into() }));
    assert_eq!(pod_requests(&spec(&[], &[("9E", "")])), Err(ResourceError::Overflow { resource: "cpu".into() }));
    assert!(matches!(pod_requests(&spec(&[], &[("x", "")])), Err(ResourceError::Quantity { .. })));
}

#[test]
fn what_does_not_fit_and_by_how_much() {
    let free = Resources { cpu_milli: 250, memory_bytes: 1 << 30, pods: 0, ..Default::default() };
    let mut request = Resources { cpu_milli: 500, memory_bytes: 1280 << 20, pods: 1, ..Default::default() };
    request.set("example.com/gpu", 2);
    let text: Vec<String> = request.shortfalls(&free).iter().map(Shortfall::to_string).collect();
    assert_eq!(text, ["cpu short by 250m", "memory short by 256Mi", "pods short by 1", "example.com/gpu short by 2"]);
    assert!(!request.fits(&free));
    let nothing = Resources::default();
    let negative = Resources { cpu_milli: -1, ..Default::default() };
    assert!(nothing.fits(&negative) && nothing.shortfalls(&negative).is_empty());
    assert!(free.fits(&free));
}

#[test]
fn maps_there_and_back() {
    let texts =
        [("cpu", "1500m"), ("memory", "1280Mi"), ("ephemeral-storage", "1Gi"), ("pods", "110"), ("a.b/c", "3k")];
    let map: BTreeMap<String, String> = texts.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
    assert_eq!(Resources::from_map(&map).unwrap().to_map(), map);
    let sum = Resources::from_map(&map).unwrap();
    assert_eq!(sum.checked_sub(&sum).unwrap(), Resources::default());
}

#[test]
fn quality_of_service() {
    let class = |json: &str| {
        let pod: Pod = serde_json::from_str(json).unwrap();
        qos_class(pod.spec()).unwrap().as_str()
    };
    assert_eq!(class(r#"{"spec":{"containers":[{"name":"a"}]}}"#), "BestEffort");
    assert_eq!(class(r#"{"spec":{"containers":[{"name":"a","resources":{"requests":{"cpu":1}}}]}}"#), "Burstable");
    let both = r#"{"name":"a","resources":{"limits":{"cpu":1,"memory":"1Gi"}}}"#;
    assert_eq!(class(&format!(r#"{{"spec":{{"containers":[{both}]}}}}"#)), "Guaranteed");
    assert_eq!(
        class(&format!(r#"{{"spec":{{"containers":[{both}],"initContainers":[{{"name":"i"}}]}}}}"#)),
        "Burstable"
    );
}
