//! The suite of containers once more, by supervisors that have waited for their pod and have some of it ready.

#[path = "containers.rs"]
mod containers;
