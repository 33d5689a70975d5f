//! `describe`, `why` and `version`: an object, and what belongs to it.

use minipod_client::Query;
use minipod_proto::v1::{Event, Explanation, Node, Object, Pod, object};
use minipod_proto::{Kind, Resource};

use super::args::{TargetArgs, Verbosity};
use super::error::CliError;
use super::session::Session;
use super::{now, print, target};
use crate::view::{columns, describe as page, explanation, why as reasons};

/// One page per object.
pub async fn describe(session: &Session, options: &TargetArgs) -> Result<(), CliError> {
    let mut objects = Vec::new();
    for target in target::parse(&options.targets)? {
        let namespace = if target.kind.namespaced() { session.scope(options.select.all_namespaces) } else { "" };
        if target.names.is_empty() {
            let query = Query::namespace(namespace)
                .with_labels(&options.select.selector)
                .with_fields(&options.select.field_selector);
            objects.extend(session.client.list_objects(target.kind, &query).await?.items);
        }
        let namespace = if target.kind.namespaced() { session.namespace.as_str() } else { "" };
        for name in &target.names {
            objects.push(session.client.get_object(target.kind, namespace, name).await?);
        }
    }
    if objects.is_empty() {
        note!("nothing found");
    }
    for (index, object) in objects.iter().enumerate() {
        let gap = if index == 0 { "" } else { "\n\n" };
        let events = events(session, object).await?;
        let text = match &object.kind {
            Some(object::Kind::Pod(pod)) => page::pod(pod, &events, now()),
            Some(object::Kind::Node(node)) => {
                let query = Query::all().with_fields(format!("spec.nodeName={}", node.name()));
                page::node(node, &session.client.list::<Pod>(&query).await?.items, &events, now())
            }
            Some(object::Kind::PodDisruptionBudget(budget)) => page::budget(budget, &events, now()),
            _ => page::other(object, &events, now()),
        };
        print(&format!("{gap}{text}"))?;
    }
    Ok(())
}

/// Why a pod is where it is.
pub async fn why(session: &Session, pod: &str, output: Option<Verbosity>) -> Result<(), CliError> {
    let name = target::pod_name(pod)?;
    let pod: Pod = session.client.get(&session.namespace, name).await?;
    let asked = match pod.node_name() {
        None => session.client.explain(&session.namespace, name).await,
        Some(node) => Ok(Explanation { state: format!("bound to {node}"), ..Explanation::default() }),
    };
    let told = match (asked, output) {
        (Ok(told), Some(Verbosity::Json)) => return print(&explanation::json(&told)),
        (Ok(told), _) => Some(told),
        (Err(error), Some(_)) => return Err(error.into()),
        (Err(error), None) => {
            // What was last written into the pod is still worth reading.
            note!("the scheduler cannot be asked, this is what it said last: {error}");
            None
        }
    };
    let events = events(session, &pod.clone().into()).await?;
    let nodes = told.map(|told| explanation::text(&told, output == Some(Verbosity::Wide)));
    print(&reasons::why(&pod, nodes.as_deref(), &events, now()))
}

/// The events about an object.
async fn events(session: &Session, object: &Object) -> Result<Vec<Event>, CliError> {
    let meta = object.meta();
    let kind = object.kind_of().map_or("", Kind::name);
    // Events of objects without namespace are in `default`, as in Kubernetes.
    let namespace = if meta.namespace.is_empty() { "default" } else { &meta.namespace };
    let mut fields = format!("involvedObject.kind={kind},involvedObject.name={}", meta.name);
    if object.as_pod().is_some() && !meta.uid.is_empty() {
        fields += &format!(",involvedObject.uid={}", meta.uid);
    }
    Ok(session.client.list::<Event>(&Query::namespace(namespace).with_fields(fields)).await?.items)
}

/// The versions of everything that can be asked.
pub async fn version(session: &Session) -> Result<(), CliError> {
    print(&format!("minictl: {}\nserver:  {}\n", env!("CARGO_PKG_VERSION"), session.client.servers()))?;
    for node in session.client.list::<Node>(&Query::all()).await?.items {
        let version = node.status().node_info.as_ref().map_or("unknown", |info| info.kubelet_version.as_str());
        let status = columns::node_status(&node);
        print(&format!(
            "node {}: {} ({status})\n",
            crate::view::text::line(node.name()),
            crate::view::text::line(version)
        ))?;
    }
    Ok(())
}
