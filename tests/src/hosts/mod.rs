//! Controllers and drones on hosts of their own: each in a network namespace, so that any line between two of them can be
//! cut while both run and clients on each still reach the process there.
//!
//! [`Hosts`] is what a test holds. Everything that it made is removed when it is dropped, also when the test fails; what a
//! killed test left is removed by the next one.

mod fleet;
mod host;
mod net;
mod process;
mod relay;
mod watch;

pub use fleet::{Held, Hosts};
pub use host::{CLUSTER, Host, HostClient, Said};
pub use net::{Namespace, Network};
pub use process::Process;
pub use relay::Relay;
pub use watch::Watch;
