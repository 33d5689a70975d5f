//! What every daemon of minipod needs and none should write twice: logging, an orderly end, `/healthz` and `/metrics`, back-off, and
//! connections that answer many small calls with one write, memory that goes back to the kernel.
#![deny(unsafe_code)]

pub mod backoff;
pub mod coalesce;
pub mod http;
#[allow(unsafe_code, reason = "one call of the C library")]
pub mod memory;
pub mod metrics;
pub mod shutdown;
pub mod telemetry;
