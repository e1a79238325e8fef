//! The client of Holdfast's HTTP API: it finds the leader, stays with it, and repeats what may safely be repeated.
//!
//! ```text
//!   connect(), keys(), …            one call of the API, typed by holdfast-wire
//!        │
//!        ▼
//!   transport: attempt ──HTTP──▶ a controller ──▶ answer + x-holdfast-leader
//!        ▲         │                                        │
//!        │         ▼ outcome                                ▼
//!        └── policy::decide ◀───────────────────────── targets (who is there, who leads)
//!            Done │ Retry {url, delay} │ GiveUp
//! ```
//!
//! `policy`, `targets` and `sse` decide and hold no IO; `transport` and `stream` do the IO and decide nothing.
//!
//! Invariants:
//!
//! 1. A request that may have taken effect is never reported as failed: [`ClientError::OutcomeUnknown`] (the design's
//!    invariant 8). Once one attempt's outcome is unknown, only a definite answer to a later attempt ends the doubt.
//! 2. Every request that changes something is repeatable: `connect` without a key by an `Idempotency-Key`, the caller's or
//!    a random one, which is the same in every attempt; everything else by nature. A random one takes room in the
//!    controllers' table of answers, so no other request gets one.
//! 3. Retries end: no attempt is begun after the deadline of [`RequestOptions`], and each attempt has a time-out.
//! 4. A controller that says `Retry-After` is not asked again by the same request before that time.
//! 5. A status stream gives each status once and in the order of a backend's life, however often it reconnects.

mod client;
mod error;
mod listing;
mod policy;
mod sse;
mod stream;
mod targets;
mod transport;

pub use client::{Client, SNAPSHOT_SILENCE, SnapshotStream};
pub use error::ClientError;
pub use listing::{BackendFilter, DroneFilter, KeyFilter};
pub use policy::{
    ALL_UNREACHABLE_MS_DEFAULT, ATTEMPT_MS_DEFAULT, BACKOFF_MS_MAX, BACKOFF_MS_MIN, DEADLINE_MS_DEFAULT,
    RequestOptions,
};
pub use targets::{URLS_MAX, normal_url};
pub use transport::random_idempotency_key;

pub use holdfast_wire as wire;
