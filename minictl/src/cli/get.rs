//! `get`: objects as a table, as JSON or YAML, once or for as long as they change.

use std::collections::BTreeMap;
use std::time::Duration;

use minipod_client::{ChangeKind, ClientError, Query};
use minipod_proto::v1::Object;
use minipod_proto::{Kind, manifest};
use serde_json::json;
use tokio::time::sleep;

use super::args::{GetArgs, Output};
use super::error::CliError;
use super::session::Session;
use super::target::{self, Target};
use super::{now, print};
use crate::view::columns::{self, Columns};
use crate::view::table::Table;
use crate::view::text;

/// How long to wait before a broken watch is opened again.
const PAUSE: Duration = Duration::from_secs(1);

/// Prints them.
pub async fn run(session: &Session, options: &GetArgs) -> Result<(), CliError> {
    let targets = target::parse(&options.target.targets)?;
    if options.watch {
        let [target] = targets.as_slice() else {
            return Err(CliError::usage(
                "only one kind can be watched at a time",
                "watch each in a terminal of its own",
            ));
        };
        return watch(session, options, target).await;
    }
    let (mut found, mut missing, single) = (Vec::new(), Vec::new(), is_single(&targets));
    for target in &targets {
        if target.names.is_empty() {
            found.extend(session.client.list_objects(target.kind, &query(session, options, target.kind)).await?.items);
            continue;
        }
        check_names(options)?;
        for name in &target.names {
            let namespace = if target.kind.namespaced() { session.namespace.as_str() } else { "" };
            match session.client.get_object(target.kind, namespace, name).await {
                Ok(object) => found.push(object),
                Err(error) if error.is_not_found() => missing.push(error),
                Err(error) => return Err(error.into()),
            }
        }
    }
    show(session, options, &targets, &found, single)?;
    match missing.pop() {
        None => Ok(()),
        Some(error) if missing.is_empty() => Err(error.into()),
        Some(last) => {
            let (failed, all) = (missing.len() + 1, missing.len() + 1 + found.len());
            missing.into_iter().chain([last]).for_each(|error| CliError::from(error).report());
            Err(CliError::Some { failed, all })
        }
    }
}

fn is_single(targets: &[Target]) -> bool {
    matches!(targets, [Target { names, .. }] if names.len() == 1)
}

fn check_names(options: &GetArgs) -> Result<(), CliError> {
    let select = &options.target.select;
    if select.all_namespaces || !select.selector.is_empty() || !select.field_selector.is_empty() {
        return Err(CliError::usage(
            "names and a selection do not go together",
            "leave out the names, or -A, -l and --field-selector",
        ));
    }
    Ok(())
}

fn query(session: &Session, options: &GetArgs, kind: Kind) -> Query {
    let select = &options.target.select;
    let namespace = if kind.namespaced() { session.scope(select.all_namespaces) } else { "" };
    Query::namespace(namespace).with_labels(&select.selector).with_fields(&select.field_selector)
}

fn columns(options: &GetArgs) -> Columns {
    Columns {
        namespace: options.target.select.all_namespaces,
        wide: options.output == Some(Output::Wide),
        labels: options.show_labels,
    }
}

fn show(
    session: &Session,
    options: &GetArgs,
    targets: &[Target],
    found: &[Object],
    single: bool,
) -> Result<(), CliError> {
    match options.output {
        Some(Output::Json | Output::Yaml) if single => {
            found.iter().try_for_each(|object| print(&document(options, object)))
        }
        Some(Output::Json | Output::Yaml) => print(&list(options, found)),
        Some(Output::Name) => found.iter().try_for_each(|object| print(&name_line(object))),
        Some(Output::Wide) | None => {
            tables(options, targets, found)?;
            if found.is_empty() && targets.iter().all(|target| target.names.is_empty()) {
                let place =
                    if options.target.select.all_namespaces || !targets.iter().any(|target| target.kind.namespaced()) {
                        String::new()
                    } else {
                        format!(" in namespace {}", text::line(&session.namespace))
                    };
                note!("nothing found{place}");
            }
            Ok(())
        }
    }
}

/// One table for every kind.
fn tables(options: &GetArgs, targets: &[Target], found: &[Object]) -> Result<(), CliError> {
    let (columns, now) = (columns(options), now());
    let mut by_kind: BTreeMap<Kind, Vec<&Object>> = BTreeMap::new();
    for object in found {
        if let Some(kind) = object.kind_of() {
            by_kind.entry(kind).or_default().push(object);
        }
    }
    let mut first = true;
    for target in targets {
        let Some(mut objects) = by_kind.remove(&target.kind) else { continue };
        if target.kind == Kind::Event {
            sort_events(&mut objects);
        }
        let mut table = columns::table(target.kind, columns);
        objects.iter().for_each(|object| table.row(columns::row(object, columns, now)));
        let gap = if first { "" } else { "\n" };
        print(&format!("{gap}{}", table.render(!options.no_headers)))?;
        first = false;
    }
    Ok(())
}

fn sort_events(events: &mut [&Object]) {
    let seen = |object: &&Object| match &object.kind {
        Some(minipod_proto::v1::object::Kind::Event(event)) => {
            columns::last_seen(event).map(|time| (time.seconds, time.nanos))
        }
        _ => None,
    };
    events.sort_by_key(seen);
}

fn document(options: &GetArgs, object: &Object) -> String {
    if options.output == Some(Output::Json) { manifest::to_json(object) } else { manifest::to_yaml(object) }
}

fn list(options: &GetArgs, found: &[Object]) -> String {
    let items: Vec<serde_json::Value> = found
        .iter()
        .map(|object| {
            let mut object = object.clone();
            object.set_type();
            serde_json::to_value(&object).unwrap_or_default()
        })
        .collect();
    let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
    if options.output == Some(Output::Json) { format!("{list:#}\n") } else { manifest::value_to_yaml(list) }
}

fn name_line(object: &Object) -> String {
    let kind = object.kind_of().map_or("object", Kind::name).to_ascii_lowercase();
    format!("{kind}/{}\n", text::line(&object.meta().name))
}

/// Prints the objects, then every change, until the user has seen enough. A watch that breaks is resumed where it broke.
async fn watch(session: &Session, options: &GetArgs, target: &Target) -> Result<(), CliError> {
    let mut query = query(session, options, target.kind);
    match target.names.as_slice() {
        [] => {}
        [name] => {
            check_names(options)?;
            query = query.with_fields(format!("metadata.name={name}"));
        }
        _ => {
            return Err(CliError::usage("only one object can be watched by name", "watch them all, or select with -l"));
        }
    }
    let mut list = session.client.list_objects(target.kind, &query).await?;
    if let [name] = target.names.as_slice()
        && list.items.is_empty()
    {
        // The error with the usual words.
        list.items.push(session.client.get_object(target.kind, &query.namespace, name).await?);
    }
    let mut printer = Printer::new(options, target.kind);
    list.items.iter().try_for_each(|object| printer.add(object))?;
    printer.flush()?;
    let mut revision = list.revision;
    loop {
        match follow(session, target.kind, &query, &mut revision, &mut printer).await {
            Ok(()) => {}
            Err(CliError::Client(error)) if error.is_expired() => {
                note!("the watch fell behind: showing everything again");
                let list = session.client.list_objects(target.kind, &query).await?;
                list.items.iter().try_for_each(|object| printer.add(object))?;
                printer.flush()?;
                revision = list.revision;
            }
            Err(CliError::Client(error)) if error.is_transient() || matches!(error, ClientError::Server { .. }) => {
                note!("the watch broke: {error}; resuming");
            }
            Err(error) => return Err(error),
        }
        sleep(PAUSE).await;
    }
}

async fn follow(
    session: &Session,
    kind: Kind,
    query: &Query,
    revision: &mut i64,
    printer: &mut Printer<'_>,
) -> Result<(), CliError> {
    let mut watch = session.client.watch_objects(kind, query, *revision).await?;
    while let Some(change) = watch.next().await? {
        *revision = (*revision).max(change.revision);
        match &change.kind {
            ChangeKind::Added(object) | ChangeKind::Modified(object) | ChangeKind::Deleted(object) => {
                printer.add(object)?;
                printer.flush()?;
            }
            ChangeKind::Bookmark => {}
        }
    }
    Ok(())
}

/// Prints objects as they come.
struct Printer<'a> {
    options: &'a GetArgs,
    table: Table,
    header: bool,
}

impl<'a> Printer<'a> {
    fn new(options: &'a GetArgs, kind: Kind) -> Printer<'a> {
        Printer { options, table: columns::table(kind, columns(options)), header: !options.no_headers }
    }

    fn add(&mut self, object: &Object) -> Result<(), CliError> {
        match self.options.output {
            Some(Output::Json) => print(&manifest::to_json(object)),
            Some(Output::Yaml) => print(&format!("---\n{}", manifest::to_yaml(object))),
            Some(Output::Name) => print(&name_line(object)),
            Some(Output::Wide) | None => {
                self.table.row(columns::row(object, columns(self.options), now()));
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> Result<(), CliError> {
        let rows = self.table.take_rows();
        if rows.is_empty() {
            return Ok(());
        }
        // After the rows: they make the columns' widths.
        let header = std::mem::take(&mut self.header).then(|| self.table.header());
        header.into_iter().chain(rows).try_for_each(|line| print(&format!("{line}\n")))
    }
}
