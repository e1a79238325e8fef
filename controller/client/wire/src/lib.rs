//! The vocabulary of Holdfast: every type that crosses a process boundary as JSON, and the checks on their fields.
//!
//! ```text
//!   CLI, clients ──ConnectRequest──▶ controller ──MessageToDrone──▶ drone
//!        ▲                              │  ▲                          │
//!        └──ConnectResponse, ApiError───┘  └────MessageFromDrone──────┘
//! ```
//!
//! No IO, no clock and no randomness in here: the pure key state machine (`holdfast-core`) builds on these types too,
//! and those of them that enter the Raft log also derive bincode's `Encode`/`Decode`. The order of the variants and
//! fields of such a type is part of the log's format (a test in `holdfast-core` pins the bytes).
//!
//! Invariants:
//!
//! 1. JSON shapes are those of Plane 0.5.6 where Plane has them; fields that are ours alone are optional on input.
//! 2. Unknown fields are ignored.
//! 3. Every string that a stranger sends has a named bound in [`limits`] and a check that names the field.

pub mod backend;
pub mod drone;
pub mod error;
pub mod http;
pub mod key;
pub mod lease;
pub mod limits;
pub mod names;

pub use backend::{BackendState, BackendStatus, TerminationKind, TerminationReason};
pub use error::{ApiError, ApiErrorKind, FieldError};
pub use key::KeyConfig;
pub use lease::{Deadlines, LeaseConfig};
