//! The API server: keeps objects in etcd, binds pods, and talks to nodes.
//!
//! Stateless over the store; any number may run. What runs in one, and what flows between:
//!
//! ```text
//!  etcd ──feed──▶ cache ──Subscription (bounded)──▶ Watch streams, node sessions, routes, namespaces
//!    ▲             │ Arc<Entry>
//!    │ txn         ▼
//!  storage ◀── registry (defaults, validates, compare-and-swap) ◀── Objects, sessions' reports, contact, namespaces, events
//!    ▲
//!    └──────── binding (pods, ledgers and turns in one transaction, by rules) ◀── Scheduling
//!
//!  PodAccess, Images ──OpenStream──▶ session ──▶ agent ──Tunnel──▶ tunnels (rendezvous) ──▶ PodAccess, Images
//!                  └──Relay──▶ the API server that holds the node's session, which does the same
//! ```
//!
//! Tasks for the life of the process: [`cache::feed::follow`], [`registry::namespaces::keep`], [`registry::budgets::keep`],
//! [`nodes::contact::watch`], [`nodes::routes::keep`], [`events::write`], [`space::watch`] and the compactor of [`serve`]. Tasks per
//! stream: one per watch, session and tunnel, two per relay.
#![forbid(unsafe_code)]

pub mod binding;
pub mod cache;
#[cfg(test)]
mod dice;
pub mod error;
pub mod events;
pub mod keys;
pub mod ledger;
pub mod nodes;
pub mod registry;
pub mod rules;
pub mod serve;
pub mod services;
pub mod space;
pub mod storage;
pub mod tunnels;
mod wire;
