//! A network of hosts: one network namespace for each, joined by a bridge in a namespace of its own.
//!
//! ```text
//!   hf<pid>-<n>-h0 (eth0 10.231.0.10) ──p0─┐
//!   hf<pid>-<n>-h1 (eth0 10.231.0.11) ──p1─┼─ br0 in hf<pid>-<n>-net
//!   …                                      ┘   (10.231.0.1)
//! ```
//!
//! Nothing of it is in the machine's own namespace, so networks of tests that run at the same time have the same addresses
//! and never meet. A direction is blocked by a rule that drops what arrives: the sender sees silence, as on a broken line.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Where `ip netns` keeps its namespaces.
const NAMESPACES: &str = "/run/netns";
/// Where system programs live that are not in every user's PATH.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// The address of the bridge, where [`Network::listener`] listens.
const BRIDGE: Ipv4Addr = Ipv4Addr::new(10, 231, 0, 1);
/// The last byte of the first host's address.
const FIRST_HOST: u8 = 10;
/// Looks at whether killed processes are gone, before their namespace is deleted.
const GONE_LOOKS: u32 = 200;

/// A network namespace, to start processes and threads in.
#[derive(Debug, Clone)]
pub struct Namespace {
    name: String,
    file: Arc<File>,
}

impl Namespace {
    fn make(name: &str) -> Result<Self, String> {
        ip(&["netns", "add", name])?;
        let path = Path::new(NAMESPACES).join(name);
        let file = File::open(&path).map_err(|error| format!("opening {}: {error}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    /// Moves the calling thread into this namespace. Only makes a system call, so it is safe between fork and exec.
    pub fn enter(&self) -> io::Result<()> {
        // SAFETY: the descriptor is open while `self` lives.
        match unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// See the module. Removed when dropped, with every process in it.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    bridge: Option<Namespace>,
    hosts: Vec<Namespace>,
    /// From whom to whom nothing arrives.
    blocked: BTreeSet<(usize, usize)>,
}

fn tool(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(SBIN.iter().map(PathBuf::from));
    dirs.map(|dir| dir.join(name)).find(|path| path.is_file()).unwrap_or_else(|| PathBuf::from(name))
}

fn run(program: &str, args: &[&str]) -> Result<String, String> {
    let line = || format!("{program} {}", args.join(" "));
    let output = Command::new(tool(program)).args(args).output().map_err(|e| format!("{}: {e}", line()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{}: {}", line(), String::from_utf8_lossy(&output.stderr).trim()))
    }
}

fn ip(args: &[&str]) -> Result<String, String> {
    run("ip", args)
}

/// Ends every process in a namespace, and deletes it. Errors are of no use: it may be gone, or another test deletes it.
fn remove(name: &str) {
    for _ in 0..GONE_LOOKS {
        let pids = ip(&["netns", "pids", name]).unwrap_or_default();
        let pids: Vec<i32> = pids.split_whitespace().filter_map(|pid| pid.parse().ok()).collect();
        // Never this process itself.
        let others: Vec<i32> =
            pids.into_iter().filter(|pid| pid.cast_unsigned() != std::process::id()).collect();
        if others.is_empty() {
            break;
        }
        for pid in others {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = ip(&["netns", "del", name]);
}

/// Removes what a test left that was killed: namespaces named after a process that is gone.
fn remove_stale() {
    let Ok(entries) = std::fs::read_dir(NAMESPACES) else { return };
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let pid = name.strip_prefix("hf").and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            remove(&name);
        }
    }
}

impl Network {
    /// Makes a network of so many hosts. Panics, with what to do, where namespaces cannot be made.
    pub fn make(hosts: usize) -> Self {
        static NETWORKS: AtomicU32 = AtomicU32::new(0);
        remove_stale();
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("hf{}-{number}", std::process::id());
        let mut network = Self { prefix, bridge: None, hosts: Vec::new(), blocked: BTreeSet::new() };
        if let Err(problem) = network.build(hosts) {
            panic!(
                "a network of namespaces cannot be made: {problem}\nTests on hosts of their own need the right to make \
                 network namespaces (run them as root, in a container with --privileged) and the programs ip and \
                 iptables (deploy/prerequisites.sh test)"
            );
        }
        network
    }

    fn build(&mut self, hosts: usize) -> Result<(), String> {
        let net = format!("{}-net", self.prefix);
        self.bridge = Some(Namespace::make(&net)?);
        ip(&["-n", &net, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", &net, "addr", "add", &format!("{BRIDGE}/24"), "dev", "br0"])?;
        ip(&["-n", &net, "link", "set", "br0", "up"])?;
        for at in 0..hosts {
            let (name, port) = (format!("{}-h{at}", self.prefix), format!("p{at}"));
            self.hosts.push(Namespace::make(&name)?);
            ip(&["-n", &net, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name])?;
            ip(&["-n", &net, "link", "set", &port, "master", "br0", "up"])?;
            let addr = format!("{}/24", self.addr(at));
            ip(&["-n", &name, "addr", "add", &addr, "dev", "eth0"])?;
            ip(&["-n", &name, "link", "set", "eth0", "up"])?;
            ip(&["-n", &name, "link", "set", "lo", "up"])?;
            // Found out now whether rules can be set, rather than when a test needs one.
            run("ip", &["netns", "exec", &name, &iptables(), "-w", "-P", "FORWARD", "DROP"])?;
        }
        Ok(())
    }

    /// The address of a host.
    pub fn addr(&self, at: usize) -> Ipv4Addr {
        let host =
            u8::try_from(at).ok().and_then(|at| at.checked_add(FIRST_HOST)).expect("at most 245 hosts");
        Ipv4Addr::new(10, 231, 0, host)
    }

    /// The namespace of a host.
    pub fn namespace(&self, at: usize) -> Namespace {
        self.hosts[at].clone()
    }

    /// A listener that every host reaches, whatever lines between hosts are cut.
    pub fn listener(&self) -> TcpListener {
        let bridge = self.bridge.clone().expect("a network that was made");
        let listening = std::thread::spawn(move || {
            bridge.enter()?;
            TcpListener::bind((BRIDGE, 0))
        });
        listening.join().expect("no panic").expect("a listener on the bridge")
    }

    fn rule(&self, change: &str, from: usize, to: usize) {
        let (name, addr) = (&self.hosts[to].name, self.addr(from).to_string());
        let iptables = iptables();
        let rule = ["netns", "exec", name, &iptables, "-w", change, "INPUT", "-s", &addr, "-j", "DROP"];
        ip(&rule).unwrap_or_else(|problem| panic!("{problem}"));
    }

    /// Nothing from `from` arrives at `to` any more.
    pub fn block(&mut self, from: usize, to: usize) {
        if self.blocked.insert((from, to)) {
            self.rule("-A", from, to);
        }
    }

    /// Takes [`Self::block`] back.
    pub fn unblock(&mut self, from: usize, to: usize) {
        if self.blocked.remove(&(from, to)) {
            self.rule("-D", from, to);
        }
    }

    /// Cuts the line between two hosts, or joins it again.
    pub fn set_line(&mut self, a: usize, b: usize, joined: bool) {
        for (from, to) in [(a, b), (b, a)] {
            if joined { self.unblock(from, to) } else { self.block(from, to) }
        }
    }

    /// Takes back every block.
    pub fn heal(&mut self) {
        for (from, to) in self.blocked.clone() {
            self.unblock(from, to);
        }
    }

    /// Takes a host's link down, or up again.
    pub fn set_link(&self, at: usize, up: bool) {
        let state = if up { "up" } else { "down" };
        let set = ip(&["-n", &self.hosts[at].name, "link", "set", "eth0", state]);
        set.unwrap_or_else(|problem| panic!("{problem}"));
    }
}

fn iptables() -> String {
    tool("iptables").display().to_string()
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in &self.hosts {
            remove(&host.name);
        }
        remove(&format!("{}-net", self.prefix));
    }
}
