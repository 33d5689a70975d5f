//! The node agent of minipod.
//!
//! # Tasks and channels
//!
//! ```text
//!  API server ◀──Session── session ──▶ Pods ──watch (newest Desired)──▶ worker (one per pod) ──▶ tasks: execute::perform
//!                  ▲          ▲                                          │      ▲   ▲                 │ one per step
//!                  │          └── Outbox (newest status per pod, ≤512 events) ◀─┘      │   └── outcome ───────┘
//!               Tunnel        │                                              mpsc (64 events)
//!                  │          └─▶ streams (≤64: logs, exec, images)                 │
//!                  └──────────────────┘ watch (PodView) ◀── worker           shim: one connection task per pod ◀─▶ podshim
//! ```
//!
//! A worker owns all that is known of its pod. It plans (`plan`, pure), has the steps performed (`execute`, which chooses
//! nothing), and takes their outcomes and the supervisor's events in one loop. What must outlive the agent lies in the pod's
//! directory (`record`) and in the supervisor; `recover` brings the workers back at a start. The session only carries: pods run
//! on and start without it.
#![deny(unsafe_code)]

pub mod agent;
pub mod apparmor;
pub mod ceiling;
pub mod clock;
pub mod config;
pub mod container;
pub mod events;
pub mod execute;
pub mod failpoints;
pub mod image;
pub mod logs;
pub mod metrics;
pub mod net;
pub mod node;
pub mod outbox;
pub mod paths;
pub mod plan;
pub mod pods;
pub mod pressure;
pub mod probe;
pub mod projection;
pub mod record;
pub mod recover;
pub mod remove;
pub mod report;
pub mod seccomp;
pub mod session;
pub mod shim;
pub mod sources;
pub mod status;
pub mod streams;
#[allow(unsafe_code, reason = "the one module that may: see there")]
pub mod sys;
pub mod sysctls;
pub mod termination;
pub mod users;
pub mod volumes;
pub mod want;
pub mod worker;
