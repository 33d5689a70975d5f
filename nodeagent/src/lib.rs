//! The node agent of minipod.
#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod container;
pub mod events;
pub mod image;
pub mod logs;
pub mod net;
pub mod node;
pub mod outbox;
pub mod paths;
pub mod plan;
pub mod pods;
pub mod record;
pub mod report;
pub mod shim;
pub mod status;
pub mod sys;
pub mod termination;
pub mod volumes;
pub mod want;
