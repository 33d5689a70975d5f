//! What the store's tests share.
#![allow(dead_code, reason = "each test file uses a part")]

pub mod disk;
pub mod rng;
