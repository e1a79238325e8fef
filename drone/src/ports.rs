//! Ports for backends.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, PoisonError};

/// Ports to choose from. Between the choice and the moment at which the backend listens the port is nobody's, so it must
/// not be one that the kernel gives to outgoing connections meanwhile (32768 to 60999 by default) or that other software
/// likes to take (Kubernetes' node ports begin at 30000).
const PREFERRED: Range<u16> = 20_000..30_000;
/// How often a preferred port is tried before the kernel is asked for any.
const PREFERRED_ATTEMPTS_MAX: u32 = 100;
/// How often the kernel is asked before giving up: it may offer one that a backend has not bound yet.
const ATTEMPTS_MAX: u32 = 100;

/// Held while a port is tried, and while a child is started: between fork and exec a child has a copy of every descriptor
/// of this process, and with the copy of a trial's it would keep the port busy when its backend comes to listen on it.
static TRIAL: Mutex<()> = Mutex::new(());

/// Does what starts a child while no port is being tried.
pub(crate) fn between_trials<T>(start: impl FnOnce() -> T) -> T {
    let _no_trial = TRIAL.lock().unwrap_or_else(PoisonError::into_inner);
    start()
}

/// Keeps the other drones of this network namespace (two on one machine) from choosing a port before its backend listens:
/// a socket by the port's name, which the kernel forgets with the drone.
#[derive(Debug)]
struct Claim {
    _socket: UnixDatagram,
}

impl Claim {
    /// Fails with `AddrInUse` while another has it.
    fn new(port: u16) -> io::Result<Self> {
        let name = std::os::unix::net::SocketAddr::from_abstract_name(format!("holdfast-drone/port/{port}"))?;
        Ok(Self { _socket: UnixDatagram::bind_addr(&name)? })
    }
}

/// Ports given to backends that have not ended.
#[derive(Debug)]
pub struct Ports {
    ip: IpAddr,
    preferred: Range<u16>,
    given: HashMap<u16, Option<Claim>>,
}

impl Ports {
    /// Ports of this address.
    pub fn new(ip: IpAddr) -> Self {
        Self { ip, preferred: PREFERRED, given: HashMap::new() }
    }

    /// An address with a port that is free now and given to nobody else.
    pub fn take(&mut self) -> io::Result<SocketAddr> {
        for _ in 0..PREFERRED_ATTEMPTS_MAX {
            let port = rand::random_range(self.preferred.clone());
            if !self.given.contains_key(&port)
                && let Ok(claim) = Claim::new(port)
                && self.try_bind(port).is_ok()
            {
                self.given.insert(port, Some(claim));
                return Ok(SocketAddr::new(self.ip, port));
            }
        }
        for _ in 0..ATTEMPTS_MAX {
            let port = self.try_bind(0)?;
            if !self.given.contains_key(&port)
                && let Ok(claim) = Claim::new(port)
            {
                self.given.insert(port, Some(claim));
                return Ok(SocketAddr::new(self.ip, port));
            }
        }
        Err(io::Error::new(io::ErrorKind::AddrInUse, "no free port found"))
    }

    /// Whether one could listen on the port, and on which if it is 0.
    fn try_bind(&self, port: u16) -> io::Result<u16> {
        between_trials(|| {
            let bound = match TcpListener::bind((self.ip, port)) {
                // The address may be one that the machine is reached by but does not have (NAT).
                Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => {
                    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))
                }
                bound => bound,
            };
            Ok(bound?.local_addr()?.port())
        })
    }

    /// A backend of an earlier drone has this address.
    pub fn keep(&mut self, address: SocketAddr) {
        // If the earlier drone is still on its way out its claim stands a moment longer; the backend listens already, which
        // keeps others away as well.
        self.given.insert(address.port(), Claim::new(address.port()).ok());
    }

    /// The backend has ended.
    pub fn release(&mut self, address: SocketAddr) {
        self.given.remove(&address.port());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::process::{Command, Stdio};
    use std::sync::atomic::{AtomicBool, Ordering};

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[test]
    fn no_port_is_given_twice_until_it_is_released() {
        let mut ports = Ports::new(HERE);
        let given: HashSet<SocketAddr> = (0..200).map(|_| ports.take().unwrap()).collect();
        assert_eq!(given.len(), 200);
        // None that an outgoing connection could take before the backend listens.
        assert!(given.iter().all(|address| PREFERRED.contains(&address.port())));
        for address in given {
            ports.release(address);
        }
        assert!(ports.given.is_empty());
    }

    #[test]
    fn two_drones_of_one_machine_never_choose_the_same_port() {
        // No other test's drone chooses from these, and they are not given to outgoing connections either.
        let few = || Ports { preferred: 19_990..20_000, ..Ports::new(HERE) };
        let (mut one, mut other) = (few(), few());
        for _ in 0..5 {
            let taken = one.take().unwrap();
            for _ in 0..20 {
                let others = other.take().unwrap();
                assert_ne!(others, taken);
                other.release(others);
            }
        }
        let taken = one.take().unwrap();
        one.release(taken);
        // A drone that adopts a backend keeps its port from the others too.
        other.keep(taken);
        assert!((0..20).all(|_| one.take().unwrap() != taken));
    }

    #[test]
    fn a_backend_can_listen_on_its_port_at_once_while_other_children_are_being_started() {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        let mut command = Command::new("true");
                        command.stdin(Stdio::null());
                        let child = between_trials(|| command.spawn());
                        assert!(child.unwrap().wait().unwrap().success());
                    }
                });
            }
            let mut ports = Ports::new(HERE);
            let refused: Vec<io::Error> = (0..3_000)
                .filter_map(|_| {
                    let address = ports.take().unwrap();
                    let listening = TcpListener::bind(address);
                    ports.release(address);
                    listening.err()
                })
                .collect();
            over.store(true, Ordering::Relaxed);
            assert!(refused.is_empty(), "{} of 3000: {:?}", refused.len(), refused[0]);
        });
    }
}
