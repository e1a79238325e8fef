//! The Holdfast drone: runs backends on one machine, renews their keys, and ends them on the deadline.
//!
//! ```text
//!                    ┌──────────────────────── holdfast-drone ───────────────────────────┐
//!   controllers ◀──▶ │ session ◀─▶ agent ──Desired──▶ runtime ──Update──▶ guard (a process)│ ──▶ backend
//!    WebSocket       │  discovery   │ ▲ ◀─Observation─┘    ◀─────Report────┘              │
//!                    │        Input ▼ │ Effect                                            │
//!                    │  pure: machine (lease, backend_state, outbox, admission, activity)  │
//!                    └────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! [`machine`] decides everything and does nothing; [`agent`] is the loop that carries its effects out, with [`session`],
//! [`runtime`] and [`backend_store`]. A backend outlives its drone: the next one finds it by its [`journal`] and
//! [adopts](adopt) it through its guard.
//!
//! Invariants (numbers in brackets are those of the design):
//!
//! 1. A backend runs only before the `hard_terminate_at` of the latest deadlines granted for its key and token. Drone,
//!    guard *and* the init of its PID namespace enforce it, on `CLOCK_BOOTTIME`, so that it holds while the drone is dead
//!    or the guard is stopped, and through a suspension of the machine (1).
//! 2. Deadlines come from the moment a request was *made*, never from when its answer came; they never go back (1, 4).
//! 3. A backend id is started at most once, and not after its `soft_terminate_at`, and not by deadlines of an earlier
//!    process's time (1).
//! 4. `terminated` is reported only when nothing of the backend is left, since it frees the key at once (1); so of a
//!    backend that an earlier process has started only when its guard says so, or was killed with all that it held.
//! 5. Every state is reported in order and again until it is acknowledged.
//! 6. Every queue, log, map and wait has a named bound (7).
//! 7. Before a guard is started its backend is durably in the journal. Before an end that a controller asked for is
//!    acknowledged it is durable too, or carried out: a later drone carries it out.
//! 8. What earlier drones left is adopted, reported or ended backend by backend: none of them delays another one. A spawn
//!    waits for an earlier backend of its own key alone.

pub mod activity;
pub mod admission;
pub mod adopt;
pub mod agent;
pub mod backend_state;
pub mod backend_store;
pub mod cgroup;
pub mod clock;
pub mod config;
pub mod data_dir;
pub mod data_id;
pub mod discovery;
pub mod guard;
pub mod journal;
pub mod lease;
pub mod machine;
pub mod open_files;
pub mod outbox;
pub mod ports;
pub mod processes;
pub mod readiness;
pub mod runtime;
pub mod session;
pub mod tables;
