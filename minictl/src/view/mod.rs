//! What the user sees of objects: pure functions of objects and the time, no I/O.

pub mod age;
pub mod columns;
pub mod describe;
pub mod explanation;
pub mod pod_status;
pub mod table;
pub mod text;
pub mod why;
