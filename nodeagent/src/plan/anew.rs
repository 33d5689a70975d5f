//! Whether a run is to end, so that another one begins in its place.

use super::model::{ContainerSeen, ContainerWant, Kind, Run};
use super::resize::{Change, change};

/// What a living run cannot be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anew {
    /// Another image.
    Image,
    /// Other resources, as its resizePolicy says.
    Resources,
}

impl Anew {
    /// The kubelet's words for it.
    #[must_use]
    pub fn why(self, name: &str) -> String {
        match self {
            Self::Image => format!("Container {name} definition changed"),
            Self::Resources => format!("Container {name} resize requires restart"),
        }
    }
}

/// What the newest run of a container has to end for, whatever its restart policy says; of one of which is unknown what it began with, nothing.
///
/// As with the kubelet, an init container that runs is let run: the next one of it has the new image.
#[must_use]
pub fn anew(container: &ContainerWant, seen: &ContainerSeen) -> Option<Anew> {
    if !seen.run.as_ref().is_some_and(Run::is_running) {
        return None;
    }
    let kept_running = matches!(container.kind, Kind::App | Kind::Sidecar);
    if kept_running && !seen.started_from.is_empty() && seen.started_from != container.image {
        return Some(Anew::Image);
    }
    (change(container, seen) == Change::Restart).then_some(Anew::Resources)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::model::{Gates, ResizePolicy, Resources, RestartPolicy, RunState};

    #[test]
    fn another_image_ends_what_is_kept_running() {
        let want = |kind, image: &str| ContainerWant {
            name: "x".into(),
            kind,
            image: image.into(),
            restart: RestartPolicy::Never,
            rules: Vec::new(),
            gates: Gates::default(),
            resources: Resources::default(),
            resize: ResizePolicy { cpu_restarts: true, memory_restarts: false },
        };
        let run = |state| Some(Run { attempt: 0, sandbox: 1, started_wall_ms: 1, state });
        let seen = |from: &str| ContainerSeen {
            run: run(RunState::Running),
            started_from: from.into(),
            applied: Some(Resources::default()),
            ..ContainerSeen::default()
        };
        let cases = [
            (Kind::App, "a:1", "a:1", None),
            (Kind::App, "a:2", "a:1", Some(Anew::Image)),
            (Kind::Sidecar, "a:2", "a:1", Some(Anew::Image)),
            // An agent before this one has started it, and did not say from what.
            (Kind::App, "a:2", "", None),
            (Kind::Init, "a:2", "a:1", None),
            (Kind::Debug, "a:2", "a:1", None),
        ];
        for (kind, wanted, from, expected) in cases {
            assert_eq!(anew(&want(kind, wanted), &seen(from)), expected, "{kind:?} {wanted} {from}");
        }
        let ended = ContainerSeen { run: run(RunState::Ended(Default::default())), ..seen("a:1") };
        assert_eq!(anew(&want(Kind::App, "a:2"), &ended), None, "what has ended");
        let cpu = Resources { cpu_request_milli: Some(5), ..Resources::default() };
        let more = ContainerWant { resources: cpu, ..want(Kind::App, "a:1") };
        assert_eq!(anew(&more, &seen("a:1")), Some(Anew::Resources));
    }
}
