//! The list-watch as a state machine: every state names the one call that comes next, [`State::step`] says what its
//! answer means. No I/O and no clock in here; [`crate::cache::Reflector`] performs the calls.
//!
//! ```text
//!   Listing ──last page──▶ Opening ──opened──▶ Watching ──┐ event
//!      ▲                     ▲                   │  ▲─────┘
//!      │ waited, no revision │ waited            │ ended, failed
//!      └──────────────── Waiting ◀───────────────┘          (a failure anywhere leads to Waiting;
//!                                                            Expired takes the revision away)
//! ```

use crate::watch::{Change, ChangeKind};

/// Where the list-watch stands.
#[derive(Debug, Clone, PartialEq)]
pub enum State<T> {
    /// Next: the page of the list that `page` names (empty: the first).
    Listing {
        /// What the pages before had.
        items: Vec<T>,
        /// Token of the page.
        page: String,
    },
    /// Next: open a watch after `revision`.
    Opening {
        /// Everything up to here is known.
        revision: i64,
    },
    /// Next: the open watch's next event.
    Watching {
        /// Everything up to here is known.
        revision: i64,
    },
    /// Next: wait (the driver backs off), then go on.
    Waiting {
        /// Everything up to here is known; `None`: start over with a list.
        revision: Option<i64>,
    },
}

/// What the call of a state came to.
#[derive(Debug, Clone, PartialEq)]
pub enum Input<T> {
    /// A page of the list.
    Page {
        /// Its objects.
        items: Vec<T>,
        /// The revision at which the list is exact.
        revision: i64,
        /// Token of the page after it; empty: this was the last.
        next: String,
    },
    /// The watch is open.
    Opened,
    /// An event of the watch.
    Event(Change<T>),
    /// The server ended the watch.
    Ended,
    /// The call failed, or the watch broke.
    Failed {
        /// The revision, or the list's continuation, is not there any more.
        expired: bool,
    },
    /// The wait is over.
    Waited,
}

/// What the one who follows the objects has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Output<T> {
    /// These are all objects, whatever was known before.
    Reset {
        /// All of them.
        items: Vec<T>,
        /// Exact at this revision.
        revision: i64,
    },
    /// This object is new or changed.
    Upsert {
        /// As it is now.
        object: T,
        /// Since this revision.
        revision: i64,
    },
    /// This object is gone, or does not match any more.
    Remove {
        /// As it was last.
        object: T,
        /// Since this revision.
        revision: i64,
    },
    /// No object changed up to this revision.
    Progress {
        /// That revision.
        revision: i64,
    },
}

impl<T> Default for State<T> {
    fn default() -> State<T> {
        State::start()
    }
}

impl<T> State<T> {
    /// A list from the beginning.
    #[must_use]
    pub fn start() -> State<T> {
        State::Listing { items: Vec::new(), page: String::new() }
    }

    /// Everything up to here is known; `None` while a list is needed.
    #[must_use]
    pub fn revision(&self) -> Option<i64> {
        match self {
            State::Listing { .. } => None,
            State::Opening { revision } | State::Watching { revision } => Some(*revision),
            State::Waiting { revision } => *revision,
        }
    }

    /// The state after the answer, and what to do about it. An input that does not belong to the state starts over
    /// with a list: that is always right, if slow.
    #[must_use]
    pub fn step(self, input: Input<T>) -> (State<T>, Option<Output<T>>) {
        match (self, input) {
            (State::Listing { mut items, .. }, Input::Page { items: more, revision, next }) => {
                items.extend(more);
                if next.is_empty() {
                    (State::Opening { revision }, Some(Output::Reset { items, revision }))
                } else {
                    (State::Listing { items, page: next }, None)
                }
            }
            (State::Opening { revision }, Input::Opened) => (State::Watching { revision }, None),
            (State::Watching { revision }, Input::Event(change)) => {
                // A revision never goes back: resuming before what is known would only repeat events.
                let revision = revision.max(change.revision);
                (State::Watching { revision }, Some(output(change.kind, revision)))
            }
            (State::Waiting { revision: Some(revision) }, Input::Waited) => (State::Opening { revision }, None),
            (_, Input::Failed { expired: true }) => (State::Waiting { revision: None }, None),
            (state, Input::Failed { expired: false } | Input::Ended) => {
                (State::Waiting { revision: state.revision() }, None)
            }
            (_, Input::Waited | Input::Page { .. } | Input::Opened | Input::Event(_)) => (State::start(), None),
        }
    }
}

fn output<T>(kind: ChangeKind<T>, revision: i64) -> Output<T> {
    match kind {
        ChangeKind::Added(object) | ChangeKind::Modified(object) => Output::Upsert { object, revision },
        ChangeKind::Deleted(object) => Output::Remove { object, revision },
        ChangeKind::Bookmark => Output::Progress { revision },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `state, input -> state [output]`, one line each; items are numbers.
    const STEPS: &str = "
        list                page 1 at 5           -> open 5            reset 1 at 5
        list                page 1 at 5 more t    -> list 1 page t
        list 1 page t       page 2 at 5           -> open 5            reset 1,2 at 5
        list 1 page t       failed                -> wait list
        list 1 page t       expired               -> wait list
        open 5              opened                -> watch 5
        open 5              failed                -> wait 5
        open 5              expired               -> wait list
        watch 5             added 3 at 6          -> watch 6           upsert 3 at 6
        watch 5             modified 3 at 7       -> watch 7           upsert 3 at 7
        watch 5             deleted 3 at 8        -> watch 8           remove 3 at 8
        watch 5             bookmark at 9         -> watch 9           progress 9
        watch 5             bookmark at 4         -> watch 5           progress 5
        watch 5             ended                 -> wait 5
        watch 5             failed                -> wait 5
        watch 5             expired               -> wait list
        wait 5              waited                -> open 5
        wait list           waited                -> list
        watch 5             opened                -> list
        open 5              added 3 at 6          -> list
    ";

    fn numbers(text: &str) -> Vec<u32> {
        text.split(',').map(|number| number.parse().expect("a number")).collect()
    }

    fn state(text: &str) -> State<u32> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            ["list"] => State::start(),
            ["list", items, "page", page] => State::Listing { items: numbers(items), page: page.into() },
            ["open", revision] => State::Opening { revision: revision.parse().expect("a number") },
            ["watch", revision] => State::Watching { revision: revision.parse().expect("a number") },
            ["wait", revision] => State::Waiting { revision: revision.parse().ok() },
            _ => panic!("state {text:?}"),
        }
    }

    fn input(text: &str) -> Input<u32> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let number = |text: &str| text.parse::<u32>().expect("a number");
        let event = |kind, revision: &str| Input::Event(Change { kind, revision: number(revision).into() });
        match words[..] {
            ["page", items, "at", revision, ref more @ ..] => Input::Page {
                items: numbers(items),
                revision: number(revision).into(),
                next: more.last().map_or(String::new(), |token| (*token).to_owned()),
            },
            ["opened"] => Input::Opened,
            ["added", item, "at", revision] => event(ChangeKind::Added(number(item)), revision),
            ["modified", item, "at", revision] => event(ChangeKind::Modified(number(item)), revision),
            ["deleted", item, "at", revision] => event(ChangeKind::Deleted(number(item)), revision),
            ["bookmark", "at", revision] => event(ChangeKind::Bookmark, revision),
            ["ended"] => Input::Ended,
            ["failed"] => Input::Failed { expired: false },
            ["expired"] => Input::Failed { expired: true },
            ["waited"] => Input::Waited,
            _ => panic!("input {text:?}"),
        }
    }

    fn shown(output: Option<Output<u32>>) -> String {
        match output {
            None => String::new(),
            Some(Output::Reset { items, revision }) => {
                let items: Vec<String> = items.iter().map(u32::to_string).collect();
                format!("reset {} at {revision}", items.join(","))
            }
            Some(Output::Upsert { object, revision }) => format!("upsert {object} at {revision}"),
            Some(Output::Remove { object, revision }) => format!("remove {object} at {revision}"),
            Some(Output::Progress { revision }) => format!("progress {revision}"),
        }
    }

    #[test]
    fn the_table_of_steps() {
        let lines: Vec<&str> = STEPS.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 20);
        for line in lines {
            let (before, after) = line.split_once("->").expect("an arrow");
            let columns = |text: &str| -> Vec<String> {
                text.split("   ").map(str::trim).filter(|part| !part.is_empty()).map(str::to_owned).collect()
            };
            let (before, after) = (columns(before), columns(after));
            let (next, output) = state(&before[0]).step(input(&before[1]));
            assert_eq!(next, state(&after[0]), "{line}");
            assert_eq!(shown(output), after.get(1).cloned().unwrap_or_default(), "{line}");
        }
    }
}
