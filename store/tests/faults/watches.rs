//! Watchers that go on through faults, and the nine checks of what they were told.

use etcd_client::{Client, EventType, WatchFilterType, WatchOptions};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

/// A value and the revision that wrote it.
pub type Version = (String, i64);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    pub revision: i64,
    pub key: String,
    /// None when the key was deleted.
    pub value: Option<String>,
    pub create_revision: i64,
    pub prev: Option<Version>,
}

/// What came to a watcher, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A new stream was asked for from this revision on.
    Resumed(i64),
    Events(Vec<Event>),
    /// All until this revision was told, the server says.
    Progress(i64),
}

/// What a watcher asks for.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scope {
    /// One key, or all under `k/`.
    pub key: Option<&'static str>,
    pub no_put: bool,
    pub no_delete: bool,
}

impl Scope {
    fn has(self, event: &Event) -> bool {
        self.key.map_or(event.key.starts_with("k/"), |key| event.key == key)
            && !(self.no_put && event.value.is_some())
            && !(self.no_delete && event.value.is_none())
    }

    fn options(self, from: i64) -> (&'static str, WatchOptions) {
        let mut options = WatchOptions::new().with_start_revision(from).with_prev_key().with_progress_notify();
        let mut filters = Vec::new();
        filters.extend(self.no_put.then_some(WatchFilterType::NoPut));
        filters.extend(self.no_delete.then_some(WatchFilterType::NoDelete));
        options = options.with_filters(filters);
        self.key.map_or_else(|| ("k/", options.clone().with_prefix()), |key| (key, options.clone()))
    }
}

fn event(event: &etcd_client::Event) -> Event {
    let kv = event.kv().expect("an event has a key");
    let text = |kv: &etcd_client::KeyValue| kv.value_str().expect("text").to_owned();
    Event {
        revision: kv.mod_revision(),
        key: kv.key_str().expect("text").to_owned(),
        value: (event.event_type() == EventType::Put).then(|| text(kv)),
        create_revision: kv.create_revision(),
        prev: event.prev_kv().map(|kv| (text(kv), kv.mod_revision())),
    }
}

/// Watches one member after the other from revision 2 on, until all up to `end` (0: not known yet) was told or the time is over.
pub async fn watch(mut members: Vec<Client>, scope: Scope, end: Arc<AtomicI64>, until: Instant) -> Vec<Item> {
    let (mut items, mut told) = (Vec::new(), 1);
    let over = |told: i64| {
        let end = end.load(Ordering::SeqCst);
        (end > 0 && told >= end) || Instant::now() > until
    };
    while !over(told) {
        let (key, options) = scope.options(told + 1);
        members.rotate_left(1);
        let opened = tokio::time::timeout(Duration::from_secs(2), members[0].watch(key, Some(options))).await;
        let Ok(Ok(mut stream)) = opened else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        items.push(Item::Resumed(told + 1));
        // A member is left after a while, so that resuming happens also without a fault.
        let leave = Instant::now() + Duration::from_secs(4);
        let mut silent = 0;
        while !over(told) && Instant::now() < leave && silent < 4 {
            match tokio::time::timeout(Duration::from_millis(400), stream.message()).await {
                Ok(Ok(Some(message))) if message.canceled() => break,
                Ok(Ok(Some(message))) => {
                    silent = 0;
                    if let Some(last) = message.events().last() {
                        told = last.kv().expect("a key").mod_revision();
                        items.push(Item::Events(message.events().iter().map(event).collect()));
                    } else if !message.created() {
                        let revision = message.header().expect("a header").revision();
                        told = told.max(revision);
                        items.push(Item::Progress(revision));
                    }
                }
                Ok(_) => break,
                Err(_) => {
                    silent += 1;
                    let asked = tokio::time::timeout(Duration::from_secs(1), stream.request_progress()).await;
                    if !matches!(asked, Ok(Ok(()))) {
                        break;
                    }
                }
            }
        }
    }
    items
}

/// is-create and prev-kv over the whole history: every event follows from those before it.
pub fn history_is_whole(history: &[Event]) -> Result<(), String> {
    let mut state: BTreeMap<&str, (Version, i64)> = BTreeMap::new();
    for event in history {
        let before = state.get(event.key.as_str());
        if event.prev.as_ref() != before.map(|(version, _)| version) {
            return Err(format!("prev-kv: {event:?} follows {before:?}"));
        }
        match &event.value {
            Some(value) => {
                let created = before.map_or(event.revision, |(_, created)| *created);
                if event.create_revision != created {
                    return Err(format!("is-create: {event:?}, created at {created}"));
                }
                state.insert(&event.key, ((value.clone(), event.revision), created));
            }
            None if before.is_none() => return Err(format!("is-create: {event:?} deletes nothing")),
            None => {
                state.remove(event.key.as_str());
            }
        }
    }
    Ok(())
}

/// The other seven, against the whole history up to `end`.
pub fn check(items: &[Item], scope: Scope, history: &[Event], end: i64) -> Result<(), String> {
    let due: Vec<&Event> = history.iter().filter(|event| scope.has(event)).collect();
    let (mut next, mut told) = (0, 1);
    for item in items {
        match item {
            Item::Resumed(from) if *from != told + 1 => return Err(format!("resumable: from {from} after {told}")),
            Item::Resumed(_) => {}
            Item::Progress(revision) => {
                if let Some(missing) = due.get(next).filter(|event| event.revision <= *revision) {
                    return Err(format!("bookmarkable: progress {revision} overtook {missing:?}"));
                }
                told = told.max(*revision);
            }
            Item::Events(events) => {
                for event in events {
                    one(event, scope, &due, &mut next, told)?;
                }
                told = events.last().map_or(told, |event| event.revision);
                if let Some(rest) = due.get(next).filter(|event| event.revision == told) {
                    return Err(format!("atomic: revision {told} was cut before {rest:?}"));
                }
            }
        }
    }
    if told < end {
        return Err(format!("reliable: told up to {told} of {end}"));
    }
    due.get(next).map_or(Ok(()), |missing| Err(format!("reliable: never told: {missing:?}")))
}

fn one(event: &Event, scope: Scope, due: &[&Event], next: &mut usize, told: i64) -> Result<(), String> {
    if event.revision > told && due.get(*next) == Some(&event) {
        *next += 1;
        return Ok(());
    }
    if !scope.has(event) {
        return Err(format!("filter: {event:?} was not asked for by {scope:?}"));
    }
    if due[..*next].contains(&event) {
        return Err(format!("unique: {event:?} came twice"));
    }
    if event.revision <= told || *next > 0 && event.revision < due[*next - 1].revision {
        return Err(format!("ordered: {event:?} came after revision {told}"));
    }
    let expected = due.get(*next).ok_or_else(|| format!("reliable: {event:?} is in no history"))?;
    let name = match (&expected.key, expected.revision) == (&event.key, event.revision) {
        true if expected.prev != event.prev => "prev-kv",
        true if expected.create_revision != event.create_revision => "is-create",
        _ => "reliable",
    };
    Err(format!("{name}: {event:?} came where {expected:?} was due"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(revision: i64, key: &str, created: i64, prev: Option<(&str, i64)>) -> Event {
        let prev = prev.map(|(value, revision)| (value.to_owned(), revision));
        Event { revision, key: key.to_owned(), value: Some(revision.to_string()), create_revision: created, prev }
    }

    #[test]
    fn each_check_can_fail() {
        let history =
            [put(2, "k/a", 2, None), put(3, "k/a", 2, Some(("2", 2))), put(3, "k/b", 3, None), put(4, "k/c", 4, None)];
        history_is_whole(&history).expect("whole");
        let [a, a2, b, c] = history.clone();
        let events = |list: &[&Event]| Item::Events(list.iter().map(|event| (*event).clone()).collect());
        let all = Scope::default();
        let only_b = Scope { key: Some("k/b"), ..all };
        let mut other_prev = a2.clone();
        other_prev.prev = None;
        let mut other_create = a2.clone();
        other_create.create_revision = 3;
        let table = [
            ("", all, vec![Item::Resumed(2), events(&[&a, &a2, &b]), Item::Progress(3), events(&[&c])]),
            ("filter", only_b, vec![events(&[&a])]),
            ("ordered", all, vec![events(&[&a, &a2, &b]), events(&[&put(2, "k/z", 2, None)])]),
            ("unique", all, vec![events(&[&a]), events(&[&a])]),
            ("atomic", all, vec![events(&[&a, &a2]), events(&[&b])]),
            ("bookmarkable", all, vec![events(&[&a]), Item::Progress(3)]),
            ("resumable", all, vec![events(&[&a]), Item::Resumed(4)]),
            ("reliable", all, vec![events(&[&a]), events(&[&c])]),
            ("reliable", all, vec![events(&[&a, &a2, &b])]),
            ("prev-kv", all, vec![events(&[&a, &other_prev])]),
            ("is-create", all, vec![events(&[&a, &other_create])]),
        ];
        for (name, scope, items) in table {
            let said = check(&items, scope, &history, 4).err().unwrap_or_default();
            assert!(said.starts_with(name) && said.is_empty() == name.is_empty(), "{name}: {said}");
        }
        for (name, bad) in [("prev-kv", vec![a.clone(), other_prev]), ("is-create", vec![a, other_create])] {
            assert!(history_is_whole(&bad).expect_err(name).starts_with(name));
        }
    }
}
