//! Faults, by name and at random, while a checker looks at the process table and a resource at the tokens.
//!
//! Real controllers and drones, and backends that leave children behind which nothing but SIGKILL ends.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

#[path = "faults/arena.rs"]
mod arena;

#[path = "faults/clocks.rs"]
mod clocks;

#[path = "faults/killed_and_stopped.rs"]
mod killed_and_stopped;

#[path = "faults/cut_off.rs"]
mod cut_off;

#[path = "faults/random.rs"]
mod random;
