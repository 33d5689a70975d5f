//! The workload's nodes and pods as minipod's scheduler sees them.

use std::sync::Arc;

use minipod_proto::Resource;
use minipod_proto::v1::{Container, Node, Pod, ResourceRequirements};

use crate::plan::{Group, NodeInfo, PodInfo};
use crate::sim::job::{Amounts, Job};
use crate::sim::world::JobId;

/// GPUs, in thousandths so that shares of a device can be asked for.
const GPU: &str = "example.com/gpu-milli";
/// More pods than any node here has room for.
const PODS_PER_NODE: &str = "1000000";

fn quantities(amounts: Amounts) -> Vec<(String, String)> {
    let [cpu, memory, gpu] = amounts.0;
    let all = [("cpu", format!("{cpu}m")), ("memory", format!("{memory}Mi")), (GPU, gpu.to_string())];
    let positive = all.into_iter().zip(amounts.0).filter(|(_, amount)| *amount > 0);
    positive.map(|((name, quantity), _)| (name.to_owned(), quantity)).collect()
}

/// Name of a node.
pub fn node_name(node: u32) -> String {
    format!("node-{node}")
}

/// A node of the workload.
pub fn node_info(node: u32, amounts: Amounts) -> NodeInfo {
    let mut object = Node::default();
    object.meta_mut().name = node_name(node);
    let pods = ("pods".to_owned(), PODS_PER_NODE.to_owned());
    object.status_mut().allocatable = quantities(amounts).into_iter().chain([pods]).collect();
    NodeInfo::new(&object).expect("quantities made of integers are quantities")
}

/// A unit of a job as a pod, with a container per part; of a gang if the job needs more than one unit at a time. `like` is another
/// unit of the job, which has the same needs.
pub fn pod_info(id: JobId, job: &Job, unit: u32, scheduler: &str, like: Option<&PodInfo>) -> PodInfo {
    let name: Arc<str> = format!("{id}-{unit}").into();
    if let Some(like) = like {
        return PodInfo { uid: Arc::clone(&name), name, ..like.clone() };
    }
    let mut object = Pod::default();
    let meta = object.meta_mut();
    (meta.name, meta.namespace, meta.uid) = (name.to_string(), "sim".into(), name.to_string());
    object.spec_mut().scheduler_name = scheduler.into();
    let container = |(at, part): (usize, &Amounts)| {
        let requests = quantities(*part).into_iter().collect();
        let resources = Some(ResourceRequirements { requests, ..Default::default() });
        Container { name: format!("part-{at}"), resources, ..Default::default() }
    };
    object.spec_mut().containers = job.parts.iter().enumerate().map(container).collect();
    let mut info = PodInfo::new(&object).expect("a pod made of integers has needs");
    (info.created_ms, info.started_ms) = ((job.submit_us / 1000) as i64, (job.submit_us / 1000) as i64);
    info.group = (job.min_count > 1).then(|| Group { name: format!("job-{id}"), min_count: job.min_count });
    info
}

/// The job and the unit of a pod.
pub fn unit_of(uid: &str) -> Option<(JobId, u32)> {
    let (job, unit) = uid.split_once('-')?;
    job.parse().ok().zip(unit.parse().ok())
}
