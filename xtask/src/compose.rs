//! `cargo xtask compose up|down|test`.

/// One of `up`, `down`, `test`.
///
/// # Errors
/// When docker is missing or a step fails.
pub fn run(verb: &str) -> Result<(), String> {
    crate::setup::install(crate::setup::DOCKER)?;
    Err(format!("compose {verb}: not yet"))
}
