//! What every daemon of minipod needs and none should write twice: logging, an orderly end, `/healthz` and `/metrics`, back-off, and
//! connections that answer many small calls with one write.
#![forbid(unsafe_code)]

pub mod backoff;
pub mod coalesce;
pub mod http;
pub mod metrics;
pub mod shutdown;
pub mod telemetry;
