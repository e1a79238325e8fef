//! The schedules that break simpler designs, on real controllers. Drones are simulated where a real one could not be made
//! to do what the schedule needs: lose an acknowledgement, report late, be of Plane's make.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

#[path = "schedules/support.rs"]
mod support;

#[path = "schedules/outages.rs"]
mod outages;
#[path = "schedules/races.rs"]
mod races;
#[path = "schedules/spawns.rs"]
mod spawns;
