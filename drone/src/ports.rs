//! Ports for backends.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

/// Ports to choose from. Between the choice and the moment at which the backend listens the port is nobody's, so it must
/// not be one that the kernel gives to outgoing connections meanwhile (32768 to 60999 by default) or that other software
/// likes to take (Kubernetes' node ports begin at 30000).
const PREFERRED: std::ops::Range<u16> = 20_000..30_000;
/// How often a preferred port is tried before the kernel is asked for any.
const PREFERRED_ATTEMPTS_MAX: u32 = 100;
/// How often the kernel is asked before giving up: it may offer one that a backend of ours has not bound yet.
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
        for _ in 0..PREFERRED_ATTEMPTS_MAX {
            let port = rand::random_range(PREFERRED);
            if !self.given.contains(&port) && self.bind(port).is_ok() {
                self.given.insert(port);
                return Ok(SocketAddr::new(self.ip, port));
            }
        }
        for _ in 0..ATTEMPTS_MAX {
            let port = self.bind(0)?.local_addr()?.port();
            if self.given.insert(port) {
                return Ok(SocketAddr::new(self.ip, port));
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, "no free port found"))
    }

    fn bind(&self, port: u16) -> io::Result<TcpListener> {
        match TcpListener::bind((self.ip, port)) {
            // The address may be one that the machine is reached by but does not have (NAT).
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => {
                TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
            }
            bound => bound,
        }
    }

    /// A backend of an earlier drone has this address.
    pub fn keep(&mut self, address: SocketAddr) {
        self.given.insert(address.port());
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
        // None that an outgoing connection could take before the backend listens.
        assert!(given.iter().all(|address| PREFERRED.contains(&address.port())));
        for address in given {
            ports.release(address);
        }
        assert!(ports.given.is_empty());
    }
}
