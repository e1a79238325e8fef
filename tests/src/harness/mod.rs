//! What the tests are made of; see the crate.

mod backend;
mod cluster;
mod http;
mod plan;
mod ports;
mod process;
mod proxy;
mod wait;

pub use backend::{Event, EventKind, Journal, TestBackend};
pub use cluster::Cluster;
pub use http::{Answer, Http};
pub use plan::ClusterBuilder;
pub use ports::PortBlock;
pub use process::{Process, binary, libfaketime, target_tmp};
pub use proxy::{Proxy, ProxySet};
pub use wait::{LONG, SHORT, boot_ms, wait_until};
