//! `resize`: other CPU and memory for a container that runs.

use std::str::FromStr;

use minipod_proto::quantity::Quantity;
use minipod_proto::resize;
use minipod_proto::v1::{Pod, ResizeRequest, ResourceRequirements, resize_request};

use super::args::ResizeArgs;
use super::error::CliError;
use super::session::Session;
use super::{access, print};
use crate::view::text;

/// A request, a limit, or both.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Amounts {
    request: Option<String>,
    limit: Option<String>,
}

impl FromStr for Amounts {
    type Err = String;

    fn from_str(text: &str) -> Result<Amounts, String> {
        let quantity = |text: &str| -> Result<Option<String>, String> {
            if text.is_empty() {
                return Ok(None);
            }
            let parsed = text.parse::<Quantity>().map_err(|error| error.to_string())?;
            Ok(Some(parsed.to_string()))
        };
        let (request, limit) = text.split_once(':').unwrap_or((text, ""));
        let amounts = Amounts { request: quantity(request)?, limit: quantity(limit)? };
        if amounts.request.is_none() && amounts.limit.is_none() {
            return Err("want REQUEST, REQUEST:LIMIT or :LIMIT".to_owned());
        }
        Ok(amounts)
    }
}

/// `minictl resize`
pub async fn run(session: &Session, options: &ResizeArgs) -> Result<(), CliError> {
    let pod: Pod = session.client.get(&session.namespace, &options.pod).await?;
    let container = if options.container.is_empty() { access::choose(&pod) } else { options.container.clone() };
    let present = pod.spec().container(&container).and_then(|container| container.resources.clone());
    let resources = wanted(&present.unwrap_or_default(), options.cpu.as_ref(), options.memory.as_ref());
    let request = ResizeRequest {
        namespace: session.namespace.clone(),
        name: options.pod.clone(),
        // The limit that follows is that of this pod.
        uid: pod.metadata.as_ref().map(|meta| meta.uid.clone()).unwrap_or_default(),
        containers: vec![resize_request::Container { name: container, resources: Some(resources) }],
        dry_run: options.dry_run,
        ..ResizeRequest::default()
    };
    let resized = session.client.resize(request).await?;
    print(&format!("pod/{} {}\n", text::line(&options.pod), outcome(&resized, options.dry_run)))
}

/// What is asked for: what is named, and limits that go with their requests.
fn wanted(present: &ResourceRequirements, cpu: Option<&Amounts>, memory: Option<&Amounts>) -> ResourceRequirements {
    let mut wanted = ResourceRequirements::default();
    for (name, amounts) in [("cpu", cpu), ("memory", memory)] {
        let Some(amounts) = amounts else { continue };
        let parsed = |text: Option<&String>| text.and_then(|text| text.parse::<Quantity>().ok());
        let (request, limit) = (parsed(present.requests.get(name)), parsed(present.limits.get(name)));
        let follows = limit.is_some() && request.is_none_or(|request| Some(request) == limit);
        let new_limit = amounts.limit.clone().or_else(|| amounts.request.clone().filter(|_| follows));
        if let Some(request) = &amounts.request {
            wanted.requests.insert(name.to_owned(), request.clone());
        }
        if let Some(limit) = new_limit {
            wanted.limits.insert(name.to_owned(), limit);
        }
    }
    wanted
}

fn outcome(pod: &Pod, dry_run: bool) -> String {
    match resize::pending(pod) {
        _ if dry_run => "resized (dry run)".to_owned(),
        Some(condition) => {
            format!("not resized yet ({}): {}", text::line(&condition.reason), text::line(&condition.message))
        }
        None => "resized".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(requests: &[(&str, &str)], limits: &[(&str, &str)]) -> ResourceRequirements {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ResourceRequirements { requests: map(requests), limits: map(limits) }
    }

    #[test]
    fn a_limit_follows_where_it_was_its_request() {
        let amounts = |text: &str| text.parse::<Amounts>().expect("good");
        for (present, cpu, want) in [
            (of(&[], &[]), "500m", of(&[("cpu", "500m")], &[])),
            (of(&[("cpu", "1")], &[]), "500m", of(&[("cpu", "500m")], &[])),
            (of(&[("cpu", "1")], &[("cpu", "1000m")]), "2", of(&[("cpu", "2")], &[("cpu", "2")])),
            (of(&[("cpu", "1")], &[("cpu", "2")]), "1500m", of(&[("cpu", "1500m")], &[])),
            (of(&[("cpu", "1")], &[("cpu", "2")]), "1:4", of(&[("cpu", "1")], &[("cpu", "4")])),
            (of(&[("cpu", "1")], &[("cpu", "2")]), ":4", of(&[], &[("cpu", "4")])),
        ] {
            assert_eq!(wanted(&present, Some(&amounts(cpu)), None), want, "{cpu}");
        }
        assert_eq!(wanted(&of(&[], &[]), None, Some(&amounts("1Gi"))), of(&[("memory", "1Gi")], &[]));
        for bad in ["", ":", "x", "1:y", "1Gb"] {
            assert!(bad.parse::<Amounts>().is_err(), "{bad}");
        }
    }
}
