//! Tests of the whole: real controllers and drones as processes of this machine, broken on purpose.
//!
//! ```text
//!   a test ── Cluster ──┬── holdfast-controller × n ◀──peers──▶ …
//!     │                 ├── holdfast-drone × m ──[Proxy]──▶ controllers      (a proxy can be cut)
//!     │                 │        └── guards ── test-backend … ──▶ journal, lock of its key
//!     │                 └── kill -9, SIGSTOP, restart, libfaketime
//!     └── Client, raw HTTP ──▶ controllers
//! ```
//!
//! Invariants:
//!
//! 1. Nothing outlives a test: what a [`harness::Cluster`] started dies with it, or with the test's process.
//! 2. Only what a cluster started is ever killed.
//! 3. Nothing waits for a fixed time: every wait is for something that can be looked at, has a limit, and says what it saw
//!    last when that is over.
//! 4. Two backends of one key that overlap for a moment are seen: each locks a file of its key for its life. Where
//!    faults are made, [`checker`] also watches the process table and a resource that checks tokens.
//! 5. [`hosts`] gives each process a network namespace of its own, so that leaders can be isolated rather than stopped. No
//!    packet of such a network leaves it, and it is removed with the test.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

pub mod checker;
pub mod fleet;
pub mod harness;
pub mod hosts;
pub mod load;
pub mod power;
pub mod sim_drone;
