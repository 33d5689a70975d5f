//! Whether an object may be stored: all problems at once, each with its path, its value and what would be right.
//!
//! Objects are expected to have their defaults ([`crate::defaults::apply`]); one without them is judged as if they were there.

mod container;
mod meta;
mod pod;
mod resize;
mod resources;
mod scheduling;
mod security;
mod small;
mod update;
mod volume;
mod walk;

use self::walk::Walk;
pub use self::{
    resize::resize,
    update::{carry_over, update, update_ephemeral},
};
pub use crate::problem::{Problem, Problems};
use crate::{
    unsupported,
    v1::{Object, object},
};

/// What is wrong with a new object; nothing means that it may be stored.
pub fn create(object: &Object) -> Vec<Problem> {
    let mut walk = checked(object);
    if let Some(pod) = object.as_pod() {
        pod::create(&mut walk, pod);
    }
    walk.problems
}

/// What holds for new and for changed objects.
fn checked(object: &Object) -> Walk {
    let mut walk = Walk::default();
    let Some(kind) = object.kind_of() else {
        walk.missing("kind", "want an object of a known kind");
        return walk;
    };
    // As a manifest would be told.
    walk.problems = unsupported::check(object);
    meta::object(&mut walk, object, kind);
    match &object.kind {
        Some(object::Kind::Pod(pod)) => pod::pod(&mut walk, pod),
        Some(object::Kind::Node(node)) => small::node(&mut walk, node),
        Some(object::Kind::ConfigMap(map)) => small::config_map(&mut walk, map),
        Some(object::Kind::Secret(secret)) => small::secret(&mut walk, secret),
        Some(object::Kind::PriorityClass(class)) => small::priority_class(&mut walk, class),
        Some(object::Kind::PodDisruptionBudget(budget)) => small::budget(&mut walk, budget),
        Some(object::Kind::Event(event)) => small::event(&mut walk, event),
        Some(object::Kind::Namespace(_)) | None => {}
    }
    walk
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
