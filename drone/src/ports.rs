//! Ports for backends.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

/// How often a free port is asked for before giving up: the kernel may offer one that a backend of ours has not bound yet.
const ATTEMPTS_MAX: u32 = 100;

/// Ports given to backends that have not ended.
#[derive(Debug)]
pub struct Ports {
    ip: IpAddr,
    given: HashSet<u16>,
}

impl Ports {
    /// Ports of this address.
    pub fn new(ip: IpAddr) -> Self {
        Self { ip, given: HashSet::new() }
    }

    /// An address with a port that is free now and given to nobody else.
    pub fn take(&mut self) -> io::Result<SocketAddr> {
        for _ in 0..ATTEMPTS_MAX {
            // The address may be one that the machine is reached by but does not have (NAT).
            let listener =
                TcpListener::bind((self.ip, 0)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
            let port = listener.local_addr()?.port();
            if self.given.insert(port) {
                return Ok(SocketAddr::new(self.ip, port));
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, "no free port found"))
    }

    /// The backend has ended.
    pub fn release(&mut self, address: SocketAddr) {
        self.given.remove(&address.port());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_port_is_given_twice_until_it_is_released() {
        let mut ports = Ports::new(IpAddr::V4(Ipv4Addr::LOCALHOST));
        let given: HashSet<SocketAddr> = (0..200).map(|_| ports.take().unwrap()).collect();
        assert_eq!(given.len(), 200);
        for address in given {
            ports.release(address);
        }
        assert!(ports.given.is_empty());
    }
}
