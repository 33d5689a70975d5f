//! `delete`: marks or removes objects, and waits until they are gone.

use std::time::Duration;

use minipod_client::{ClientError, DeleteOptions, Query};
use minipod_proto::Kind;
use minipod_proto::v1::Object;
use tokio::time::{Instant, sleep};

use super::args::DeleteArgs;
use super::error::CliError;
use super::session::Session;
use super::{print, sources, target};
use crate::view::text;

/// How often it is looked whether an object is gone.
const PAUSE: Duration = Duration::from_millis(100);

/// An object to delete.
struct Victim {
    kind: Kind,
    namespace: String,
    name: String,
}

/// Deletes them all, then waits for all.
pub async fn run(session: &Session, options: &DeleteArgs) -> Result<(), CliError> {
    let victims = victims(session, options).await?;
    if options.force {
        note!("warning: the objects are removed at once; what runs of them on a node that cannot be reached runs on");
    }
    let grace_seconds = if options.force { Some(0) } else { options.grace_period };
    let (all, mut failed, mut marked) = (victims.len(), Vec::new(), Vec::new());
    for victim in victims {
        let wanted = DeleteOptions { grace_seconds, ..DeleteOptions::default() };
        let Victim { kind, namespace, name } = &victim;
        match session.client.delete_object(*kind, namespace, name, &wanted).await {
            Ok((object, gone)) => {
                let how = if options.force { " (force)" } else { "" };
                print(&format!("{} {:?} deleted{how}\n", kind.name().to_ascii_lowercase(), text::line(name)))?;
                if !gone {
                    marked.push((victim, object));
                }
            }
            Err(error) if error.is_not_found() && options.ignore_not_found => {}
            Err(error) => failed.push(error),
        }
    }
    if options.wait {
        wait(session, options, marked).await?;
    }
    match failed.pop() {
        None => Ok(()),
        Some(error) if failed.is_empty() && all == 1 => Err(error.into()),
        Some(last) => {
            let count = failed.len() + 1;
            failed.into_iter().chain([last]).for_each(|error| CliError::from(error).report());
            Err(CliError::Some { failed: count, all })
        }
    }
}

async fn victims(session: &Session, options: &DeleteArgs) -> Result<Vec<Victim>, CliError> {
    let of = |object: &Object| {
        let meta = object.meta();
        object.kind_of().map(|kind| Victim { kind, namespace: meta.namespace.clone(), name: meta.name.clone() })
    };
    if !options.files.is_empty() {
        let objects = sources::read(&options.files, &session.namespace, session.explicit_namespace)?;
        return Ok(objects.iter().filter_map(of).collect());
    }
    let select = &options.select;
    let selected = options.all || !select.selector.is_empty() || !select.field_selector.is_empty();
    let mut victims = Vec::new();
    for target in target::parse(&options.targets)? {
        let namespace = if target.kind.namespaced() { session.namespace.as_str() } else { "" };
        match (target.names.is_empty(), selected) {
            (false, false) => victims.extend(target.names.into_iter().map(|name| Victim {
                kind: target.kind,
                namespace: namespace.to_owned(),
                name,
            })),
            (true, true) => {
                let scope = if select.all_namespaces { "" } else { namespace };
                let query = Query::namespace(scope).with_labels(&select.selector).with_fields(&select.field_selector);
                victims.extend(session.client.list_objects(target.kind, &query).await?.items.iter().filter_map(of));
            }
            (true, false) => {
                let message = format!("which {}? a name is missing", target.kind.plural());
                return Err(CliError::usage(message, "name them, or select with -l SELECTOR, or say --all"));
            }
            (false, true) => {
                return Err(CliError::usage("names and a selection do not go together", "leave out one of them"));
            }
        }
    }
    if victims.is_empty() {
        note!("nothing is selected");
    }
    Ok(victims)
}

/// Waits until none of these is there any more: the same name with another uid is another object.
async fn wait(session: &Session, options: &DeleteArgs, marked: Vec<(Victim, Object)>) -> Result<(), CliError> {
    let start = Instant::now();
    for (victim, object) in marked {
        let Victim { kind, namespace, name } = &victim;
        loop {
            let last = match session.client.get_object(*kind, namespace, name).await {
                Err(error) if error.is_not_found() => break,
                Ok(now) if now.meta().uid != object.meta().uid => break,
                Ok(now) => now
                    .as_pod()
                    .map_or_else(|| "still there".to_owned(), |pod| crate::view::pod_status::summary(pod).status),
                // The server may be away for a moment: the deletion goes on.
                Err(error) if error.is_transient() && !matches!(error, ClientError::Unreachable { .. }) => {
                    error.to_string()
                }
                Err(error) => return Err(error.into()),
            };
            if let Some(timeout) = options.timeout
                && start.elapsed() >= timeout
            {
                let what = format!("the end of {} {name:?}", kind.name().to_ascii_lowercase());
                return Err(CliError::Waited { what, seconds: timeout.as_secs(), last });
            }
            sleep(PAUSE).await;
        }
    }
    Ok(())
}
