//! Membership on hosts of their own: controllers, drones and clients in network namespaces, leaders that are isolated and
//! not stopped, and disks that are lost. In each schedule a checker looks at the process table and a resource at tokens.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

#[path = "hosts/added_again.rs"]
mod added_again;
#[path = "hosts/init.rs"]
mod init;
#[path = "hosts/lost_disk.rs"]
mod lost_disk;
#[path = "hosts/strangers.rs"]
mod strangers;

/// The key of all schedules.
const KEY: &str = "k";
/// What an emptied process says.
const WAITS: &str = "waiting for \"holdfast cluster init\" or \"holdfast cluster add\"";
/// What its peers say of it.
const LOST: &str = "lost disk: remove this member, then add the new one";
