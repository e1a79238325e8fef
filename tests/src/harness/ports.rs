//! Ports that no other test uses.
//!
//! They lie below the ranges from which the kernel takes the ports of outgoing connections and a drone those of its
//! backends, so that a killed controller finds its port free when it comes back, and they all have five digits, which
//! [`super::proxy`] depends on. Test processes keep apart by a locked file for each block.

use rand::Rng;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};

/// Ports of one block.
pub const BLOCK_PORTS: u16 = 32;
/// First port of the first block.
const FIRST: u16 = 10_000;
/// Number of blocks: the last one ends below 20000, where a drone begins with the ports of its backends.
const BLOCKS: u16 = 312;
/// Tries before it gives up.
const TRIES_MAX: u32 = 2_000;

/// [`BLOCK_PORTS`] ports of 127.0.0.1, ours as long as this lives.
#[derive(Debug)]
pub struct PortBlock {
    first: u16,
    given: u16,
    /// Locked. The kernel unlocks it when this process ends, however it ends.
    _lock: File,
}

impl PortBlock {
    /// Takes a block that nobody uses.
    pub fn take() -> Self {
        let dir = std::env::temp_dir().join("holdfast-test-ports");
        std::fs::create_dir_all(&dir).expect("the directory of port locks");
        for _ in 0..TRIES_MAX {
            let block = rand::rng().random_range(0..BLOCKS);
            let file = File::create(dir.join(block.to_string())).expect("a port lock file");
            if file.try_lock().is_err() {
                continue;
            }
            let first = FIRST + block * BLOCK_PORTS;
            // All at once, and let go together.
            let bound: Result<Vec<_>, _> = (first..first + BLOCK_PORTS)
                .map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)))
                .collect();
            if bound.is_ok() {
                return Self { first, given: 0, _lock: file };
            }
        }
        panic!("no block of free ports found");
    }

    /// The next port.
    pub fn give(&mut self) -> SocketAddr {
        assert!(self.given < BLOCK_PORTS, "this cluster needs more than {BLOCK_PORTS} ports");
        self.given += 1;
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.first + self.given - 1))
    }
}
