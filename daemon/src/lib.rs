//! What every daemon of minipod needs and none should write twice: logging, an orderly end, `/healthz` and `/metrics`, back-off.
#![forbid(unsafe_code)]

pub mod backoff;
pub mod http;
pub mod metrics;
pub mod shutdown;
pub mod telemetry;
