//! Placeholder until the loop lands.
fn main() {}
