//! A controller of Holdfast: the HTTP API and the drones' sockets around one replica.
//!
//! ```text
//!   clients ──HTTP──▶ http ─────┬─▶ connect, schedule ──▶ Store::propose ═══▶ leader ═══▶ every replica's apply
//!                               └─▶ reads ◀── linearizable or local view ◀──────────────────────┤
//!   drones ──WebSocket─▶ session ─▶ heartbeats, renewals, reports, acknowledgements ─▶ propose  │
//!                          ▲                                                                    │
//!                          └── actions ◀── hub ◀── effects of applied entries ◀─────────────────┘
//! ```
//!
//! Every controller serves every path; no request is proxied as HTTP, and no type of openraft or RocksDB is in here.
//!
//! Invariants (the numbers are those of the design):
//!
//! 4. *No resurrection*: this crate decides nothing about a key. It proposes, and says what `apply` answered.
//! 7. *Bounded*: bodies, queues, waiters, streams and sockets have named bounds, and a request beyond one gets
//!    `Overloaded` or `InvalidRequest`.
//! 8. *Unknown is said*: every proposal has a deadline; a definite no is `NoLeader`, anything else `OutcomeUnknown`.
//!    Only what may be applied twice is repeated (renewals, reports, acknowledgements, one session's registration).

pub mod app;
pub mod config;
pub mod connect;
pub mod http;
pub mod hub;
mod idle;
pub mod ids;
pub mod join;
pub mod restore;
pub mod room;
pub mod schedule;
pub mod serve;
pub mod session;
pub mod token;
mod waiting;
