//! The process that holds a pod's namespaces.
fn main() {}
