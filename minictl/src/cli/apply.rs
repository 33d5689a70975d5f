//! `apply` and `create`.
//!
//! `apply` is a three-way merge like kubectl's: what the manifest says and the object has otherwise is set; what the manifest
//! said last time (the annotation kept on the object) and says no more is removed; what others set stays. Both sides are
//! compared with defaults filled in, so that `unchanged` is the truth. The server gets one JSON merge patch, or nothing.

use minipod_client::ClientError;
use minipod_proto::v1::{Object, ObjectMeta};
use minipod_proto::{Kind, defaults, manifest};
use serde_json::{Map, Value, json};

use super::args::{ApplyArgs, CreateArgs, Output};
use super::error::CliError;
use super::session::Session;
use super::{print, sources};

/// Where the last applied manifest is kept: kubectl's annotation, so that either may go on with the other's objects.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// An object that changes under our hands is read again so often.
const CONFLICT_RETRIES: usize = 3;

/// Applies every object; goes on after an error and fails at the end.
pub async fn apply(session: &Session, options: &ApplyArgs) -> Result<(), CliError> {
    let objects = sources::read(&options.files, &session.namespace, session.explicit_namespace)?;
    let all = objects.len();
    let mut errors = Vec::new();
    for run in runs(objects) {
        // A dry run asks first: it is not told of what is there already.
        let created = match options.dry_run {
            false if run.len() > 1 => create_noted(session, &run).await,
            _ => vec![false; run.len()],
        };
        for (object, created) in run.into_iter().zip(created) {
            let name = short(&object);
            let done = if created { Ok("created") } else { apply_one(session, &object, options.dry_run).await };
            match done {
                Ok(word) => print(&format!("{name} {word}{}\n", if options.dry_run { " (dry run)" } else { "" }))?,
                Err(error) => errors.push(explain(&object, error)),
            }
        }
    }
    finish(errors, all)
}

/// Creates every object; goes on after an error and fails at the end.
pub async fn create(session: &Session, options: &CreateArgs) -> Result<(), CliError> {
    let objects = sources::read(&options.sources.files, &session.namespace, session.explicit_namespace)?;
    let all = objects.len();
    let (mut errors, dry_run) = (Vec::new(), options.sources.dry_run);
    let dry = if dry_run { " (dry run)" } else { "" };
    for run in runs(objects) {
        if run.len() > 1 && matches!(options.output, None | Some(Output::Name | Output::Wide)) {
            let tail = if options.output == Some(Output::Name) { String::new() } else { format!(" created{dry}") };
            for created in session.client.create_many(run, dry_run).await {
                match created {
                    Ok(created) => print(&format!("pod/{}{tail}\n", created.name))?,
                    Err(error) => errors.push(error.into()),
                }
            }
            continue;
        }
        for object in run {
            match session.client.create_object(object, dry_run).await {
                Ok(created) => print(&match options.output {
                    Some(Output::Json) => manifest::to_json(&created),
                    Some(Output::Yaml) => manifest::to_yaml(&created),
                    Some(Output::Name) => format!("{}\n", short(&created)),
                    Some(Output::Wide) | None => format!("{} created{dry}\n", short(&created)),
                })?,
                Err(error) => errors.push(error.into()),
            }
        }
    }
    finish(errors, all)
}

/// Objects in their order; pods that follow each other together, since none of them needs another one to be there.
fn runs(objects: Vec<Object>) -> Vec<Vec<Object>> {
    let mut runs: Vec<Vec<Object>> = Vec::new();
    for object in objects {
        match runs.last_mut() {
            Some(run) if [&object].into_iter().chain(run.last()).all(|object| object.as_pod().is_some()) => {
                run.push(object);
            }
            _ => runs.push(vec![object]),
        }
    }
    runs
}

/// Creates what has a name and is not there yet; whether each was created. Whatever else there is to say of the others, [`apply_one`] finds out.
async fn create_noted(session: &Session, run: &[Object]) -> Vec<bool> {
    if run.iter().any(|object| object.meta().name.is_empty()) {
        return vec![false; run.len()];
    }
    let noted = run.iter().map(|object| Wanted::new(object).with_note(object)).collect();
    session.client.create_many(noted, false).await.iter().map(Result::is_ok).collect()
}

fn finish(mut errors: Vec<CliError>, all: usize) -> Result<(), CliError> {
    match errors.pop() {
        None => Ok(()),
        // Told by the caller, like that of any command.
        Some(error) if all == 1 => Err(error),
        Some(last) => {
            let failed = errors.len() + 1;
            errors.iter().chain([&last]).for_each(CliError::report);
            Err(CliError::Some { failed, all })
        }
    }
}

/// A pod's spec can hardly change: say what to do instead.
fn explain(object: &Object, error: CliError) -> CliError {
    let name = short(object);
    match error {
        CliError::Client(ClientError::Invalid { operation, problems })
            if operation.to_string().starts_with("patch") =>
        {
            let namespace = &object.meta().namespace;
            let place = if namespace.is_empty() { String::new() } else { format!(" -n {namespace}") };
            let message = format!("{name} cannot become what the manifest says:\n  {}", problems.join("\n  "));
            CliError::usage(message, format!("replace it: minictl delete {name}{place}, then apply again"))
        }
        other => other,
    }
}

async fn apply_one(session: &Session, object: &Object, dry_run: bool) -> Result<&'static str, CliError> {
    let Some(kind) = object.kind_of() else {
        return Err(CliError::usage("an object of unknown kind", "compare the versions: minictl version"));
    };
    let meta = object.meta().clone();
    if meta.name.is_empty() {
        let hint = "apply needs metadata.name; with metadata.generateName use: minictl create -f FILE";
        return Err(CliError::usage(format!("a {kind} has no name"), hint));
    }
    let wanted = Wanted::new(object);
    let mut tries = 0;
    loop {
        let live = match session.client.get_object(kind, &meta.namespace, &meta.name).await {
            Ok(live) => live,
            // A name that cannot be: the server's answer to the whole object has every problem, not this one alone.
            Err(error) if error.is_not_found() || matches!(error, ClientError::Invalid { .. }) => {
                match session.client.create_object(wanted.with_note(object), dry_run).await {
                    Ok(_) => return Ok("created"),
                    // Somebody else was faster: now it is there.
                    Err(error) if error.is_already_exists() && tries < CONFLICT_RETRIES => {
                        tries += 1;
                        continue;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            Err(error) => return Err(error.into()),
        };
        let Some(patch) = wanted.patch(&live) else { return Ok("unchanged") };
        let sent = send(session, kind, &meta, &live, &patch, dry_run).await;
        match sent {
            Ok(()) => return Ok("configured"),
            Err(error) if (error.is_conflict() || error.is_not_found()) && tries < CONFLICT_RETRIES => tries += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

async fn send(
    session: &Session,
    kind: Kind,
    meta: &ObjectMeta,
    live: &Object,
    patch: &Value,
    dry_run: bool,
) -> Result<(), ClientError> {
    if !dry_run {
        return session.client.patch_object(kind, &meta.namespace, &meta.name, &patch.to_string()).await.map(|_| ());
    }
    // The server has a dry run for updates: give it the object as the patch would make it.
    let operation = || minipod_client::Operation::new("patch", short(live));
    match manifest::merge_patch(live, patch.to_string().as_bytes()) {
        Ok(patched) => session.client.update_object(patched, true).await.map(|_| ()),
        Err(problems) => {
            let problems = problems.list.iter().map(ToString::to_string).collect();
            Err(ClientError::Invalid { operation: operation(), problems })
        }
    }
}

/// `pod/web`
fn short(object: &Object) -> String {
    let kind = object.kind_of().map_or("object", Kind::name).to_ascii_lowercase();
    let meta = object.meta();
    format!("{kind}/{}", if meta.name.is_empty() { &meta.generate_name } else { &meta.name })
}

/// What a manifest wants.
struct Wanted {
    /// As it was written.
    written: Value,
    /// With the defaults that the server fills in.
    complete: Value,
    /// As it is noted on the object.
    note: String,
}

impl Wanted {
    fn new(object: &Object) -> Wanted {
        let mut written = tree(object);
        // The note is about the manifest, not about itself; the status is not the manifest's to say.
        remove(&mut written, &["metadata", "annotations", LAST_APPLIED]);
        remove(&mut written, &["status"]);
        let mut complete = object.clone();
        defaults::apply(&mut complete);
        let mut complete = tree(&complete);
        remove(&mut complete, &["status"]);
        for owned_by_server in ["uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp"] {
            remove(&mut complete, &["metadata", owned_by_server]);
        }
        let note = format!("{written}\n");
        Wanted { written, complete, note }
    }

    /// The manifest with its note, for creation.
    fn with_note(&self, object: &Object) -> Object {
        let mut object = object.clone();
        if let Some(meta) = object.meta_mut() {
            meta.annotations.insert(LAST_APPLIED.to_owned(), self.note.clone());
        }
        object
    }

    /// The merge patch that makes `live` be as wanted; `None` when it is already.
    fn patch(&self, live: &Object) -> Option<Value> {
        let note = live.meta().annotations.get(LAST_APPLIED);
        let before = note.and_then(|note| serde_json::from_str(note).ok()).unwrap_or(Value::Null);
        let live = tree(live);
        let mut patch = difference(&self.complete, &live);
        merge(&mut patch, removals(&before, &self.complete, &live));
        if note != Some(&self.note) && note.is_none_or(|_| before != self.written) {
            let annotations = json!({"metadata": {"annotations": {LAST_APPLIED: self.note}}});
            merge(&mut patch, Some(annotations));
        }
        patch
    }
}

/// The Kubernetes JSON form, with apiVersion and kind.
fn tree(object: &Object) -> Value {
    let mut object = object.clone();
    object.set_type();
    serde_json::to_value(&object).unwrap_or(Value::Null)
}

fn remove(tree: &mut Value, path: &[&str]) {
    let Some((last, way)) = path.split_last() else { return };
    let mut place = Some(tree);
    for step in way {
        place = place.and_then(|place| place.get_mut(*step));
    }
    if let Some(Value::Object(map)) = place {
        map.remove(*last);
    }
}

/// A merge patch that sets what `wanted` says and `live` has otherwise.
fn difference(wanted: &Value, live: &Value) -> Option<Value> {
    match (wanted, live) {
        (Value::Object(wanted), Value::Object(live)) => {
            let mut patch = Map::new();
            for (name, value) in wanted {
                let change = live.get(name).map_or_else(|| Some(value.clone()), |live| difference(value, live));
                patch.extend(change.map(|change| (name.clone(), change)));
            }
            (!patch.is_empty()).then_some(Value::Object(patch))
        }
        (wanted, live) => (!covers(live, wanted)).then(|| wanted.clone()),
    }
}

/// Whether `live` has everything that `wanted` says; what it has beyond that in maps is the server's or another's.
fn covers(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => {
            wanted.iter().all(|(name, value)| live.get(name).is_some_and(|live| covers(live, value)))
        }
        (Value::Array(live), Value::Array(wanted)) => {
            live.len() == wanted.len() && live.iter().zip(wanted).all(|(live, wanted)| covers(live, wanted))
        }
        (live, wanted) => live == wanted,
    }
}

/// A merge patch that removes what the manifest said before, says no more, and `live` still has.
fn removals(before: &Value, wanted: &Value, live: &Value) -> Option<Value> {
    let (Value::Object(before), Value::Object(live)) = (before, live) else { return None };
    let mut patch = Map::new();
    for (name, value) in before {
        match (wanted.get(name), live.get(name)) {
            (None, Some(_)) => {
                patch.insert(name.clone(), Value::Null);
            }
            (Some(wanted), Some(live)) => {
                patch.extend(removals(value, wanted, live).map(|change| (name.clone(), change)));
            }
            (_, None) => {}
        }
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

/// Adds one merge patch to another.
fn merge(patch: &mut Option<Value>, more: Option<Value>) {
    match (patch.as_mut(), more) {
        (_, None) => {}
        (Some(Value::Object(patch)), Some(Value::Object(more))) => {
            for (name, value) in more {
                let mut merged = patch.remove(&name);
                merge(&mut merged, Some(value));
                patch.extend(merged.map(|merged| (name, merged)));
            }
        }
        (_, Some(more)) => *patch = Some(more),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A live object as the server makes it of a manifest.
    fn stored(manifest: &str, noted: bool) -> Object {
        let object = parse(manifest);
        let mut object = if noted { Wanted::new(&object).with_note(&object) } else { object };
        defaults::apply(&mut object);
        if let Some(meta) = object.meta_mut() {
            (meta.uid, meta.resource_version) = ("u".into(), "7".into());
        }
        object
    }

    fn parse(manifest: &str) -> Object {
        let objects = manifest::parse(manifest).unwrap_or_else(|problems| panic!("{problems}"));
        objects.into_iter().next().expect("one object")
    }

    fn pod(metadata: &str, spec: &str, container: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: a, namespace: default{metadata}}}\nspec:\n  {spec}\n  containers:\n  - name: c\n    image: x\n    {container}\n"
        )
    }

    fn patch(before: &str, noted: bool, now: &str) -> String {
        let patch = Wanted::new(&parse(now)).patch(&stored(before, noted));
        patch.map_or_else(
            || "unchanged".to_owned(),
            |mut patch| {
                remove(&mut patch, &["metadata", "annotations", LAST_APPLIED]);
                patch.to_string()
            },
        )
    }

    #[test]
    fn pods_that_follow_each_other_are_made_together() {
        let object = |kind: Kind| Object::empty(kind);
        let kinds =
            [Kind::Pod, Kind::Pod, Kind::Namespace, Kind::Pod, Kind::ConfigMap, Kind::ConfigMap, Kind::Pod, Kind::Pod];
        let lengths: Vec<usize> = runs(kinds.into_iter().map(object).collect()).iter().map(Vec::len).collect();
        assert_eq!(lengths, [2, 1, 1, 1, 1, 2]);
        assert!(runs(Vec::new()).is_empty());
    }

    #[test]
    fn the_table_of_patches() {
        let plain = pod("", "", "");
        assert_eq!(patch(&plain, true, &plain), "unchanged", "defaults are no difference");
        let resources = pod("", "", "resources: {requests: {memory: 1024Mi, cpu: 0.5}}");
        let same = pod("", "", "resources: {requests: {memory: 1Gi, cpu: 500m}}");
        assert_eq!(patch(&resources, true, &same), "unchanged", "quantities are compared by value");
        let label = pod(", labels: {a: b, c: d}", "", "");
        let fewer = pod(", labels: {a: x}", "", "");
        assert_eq!(patch(&label, true, &fewer), r#"{"metadata":{"labels":{"a":"x","c":null},"annotations":{}}}"#);
        assert_eq!(
            patch(&label, false, &fewer),
            r#"{"metadata":{"labels":{"a":"x"},"annotations":{}}}"#,
            "others' labels stay"
        );
        assert_eq!(patch(&plain, false, &plain), r#"{"metadata":{"annotations":{}}}"#, "only the note is new");
        let never = pod("", "restartPolicy: Never", "");
        assert_eq!(patch(&never, true, &plain), r#"{"spec":{"restartPolicy":"Always"},"metadata":{"annotations":{}}}"#);
        let image = plain.replace("image: x", "image: y");
        assert!(patch(&plain, true, &image).contains(r#""image":"y""#));
    }
}
