//! `fit`: where pods would go, without creating them.

use minipod_proto::v1::{FitRequest, Pod, object};
use minipod_proto::{Kind, Resource};

use super::args::{FitArgs, Verbosity};
use super::error::CliError;
use super::session::Session;
use super::{print, sources};
use crate::view::explanation;

/// Asks the scheduler and prints a table per node, or JSON.
pub async fn run(session: &Session, options: &FitArgs) -> Result<(), CliError> {
    let mut pods: Vec<Pod> = Vec::new();
    for object in sources::read(&options.files, &session.namespace, session.explicit_namespace)? {
        let (kind, key) = (object.kind_of().map_or("object", Kind::name), object.key());
        match object.kind {
            Some(object::Kind::Pod(pod)) => pods.push(pod),
            // A manifest often brings what its pods refer to.
            _ => note!("{kind} {key} is passed over: only pods are placed"),
        }
    }
    if pods.is_empty() {
        return Err(CliError::usage(
            format!("no pods in {}", options.files.join(", ")),
            "fit places objects of kind Pod",
        ));
    }
    pods.iter_mut().for_each(|pod| pod.meta_mut().resource_version.clear());
    let fit = session.client.fit(FitRequest { pods, count: options.copies }).await?;
    match options.output {
        Some(Verbosity::Json) => print(&explanation::fit_json(&fit)),
        other => print(&explanation::fit_text(&fit, other.is_some())),
    }
}
