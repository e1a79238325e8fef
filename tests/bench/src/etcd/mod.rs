//! etcd: three nodes of Debian's package with its defaults, fsync on.
//!
//! What is measured:
//!
//! - *acquire*: `LeaseGrant` of 60 s, then `Txn` that puts the key with that lease if it was never created: two requests,
//!   as a user of etcd's locks makes them. Each is an entry that a quorum has synced.
//! - *renew*: `LeaseKeepAlive` of one lease, on one stream for each client. The leader answers it from memory: it is
//!   neither written nor replicated.
//!
//! Each client has a connection of its own. All of them go to the leader unless told otherwise, which is the friendlier
//! way for etcd: a follower passes each keepalive on to the leader over HTTP.

pub mod grpc;
pub mod wire;

use crate::child::{Server, command};
use crate::load::Client;
use crate::place::Place;
use crate::problem::{During, Result, problem};
use crate::usage::Servers;
use grpc::{Connection, Stream};
use holdfast_tests::harness::PortBlock;
use nix::sys::signal::Signal;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Of a lease, in seconds: as long as our keys'.
const TTL_S: u64 = 60;
/// Nodes.
const NODES: usize = 3;
/// A cluster must have a leader within this.
const READY_MAX: Duration = Duration::from_secs(30);
/// Between two looks at a cluster that starts.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A running cluster.
pub struct Cluster {
    nodes: Vec<Server>,
    addrs: Vec<SocketAddr>,
    /// Index of the leader.
    leader: usize,
    dir: PathBuf,
    _ports: PortBlock,
}

impl Cluster {
    /// Starts three nodes with their data below `dir` and waits until all of them know the same leader.
    pub async fn start(dir: &Path) -> Result<Self> {
        let mut ports = PortBlock::take();
        let addrs: Vec<_> = (0..NODES).map(|_| (ports.give(), ports.give())).collect();
        let initial: Vec<String> =
            addrs.iter().enumerate().map(|(at, (_, peer))| format!("n{at}=http://{peer}")).collect();
        let mut nodes = Vec::new();
        for (at, (listen, peer)) in addrs.iter().enumerate() {
            let mut etcd = command(Path::new("etcd"), None, "ETCD_");
            etcd.args(["--name", &format!("n{at}")])
                .arg("--data-dir")
                .arg(dir.join(format!("etcd-{at}")))
                .args(["--listen-client-urls", &format!("http://{listen}")])
                .args(["--advertise-client-urls", &format!("http://{listen}")])
                .args(["--listen-peer-urls", &format!("http://{peer}")])
                .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
                .args(["--initial-cluster", &initial.join(",")])
                .args(["--initial-cluster-state", "new"]);
            nodes.push(Server::start(etcd, dir.join(format!("etcd-{at}.log")), Signal::SIGKILL)?);
        }
        let addrs = addrs.into_iter().map(|(listen, _)| listen).collect();
        let mut cluster = Self { nodes, addrs, leader: 0, dir: dir.to_owned(), _ports: ports };
        let end = Instant::now() + READY_MAX;
        loop {
            cluster.nodes.iter_mut().try_for_each(Server::check)?;
            match cluster.find_leader().await {
                Ok(leader) => {
                    cluster.leader = leader;
                    return Ok(cluster);
                }
                Err(seen) if Instant::now() > end => return problem(format!("etcd does not start: {seen}")),
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    }

    async fn find_leader(&self) -> Result<usize> {
        let mut found = Vec::new();
        for addr in &self.addrs {
            let connection = Connection::open(*addr).await?;
            let answer = connection.unary("/etcdserverpb.Maintenance/Status", &[]).await?;
            found.push(wire::status(&answer)?);
        }
        let leader = found[0].1;
        if leader == 0 || found.iter().any(|(_, other)| *other != leader) {
            return problem(format!("they do not agree on a leader: {found:?}"));
        }
        found.iter().position(|(member, _)| *member == leader).during("the leader is not a node")
    }

    /// The nodes.
    pub fn servers(&self) -> Servers {
        Servers::new(self.nodes.iter().map(Server::pid).collect(), &self.dir)
    }

    async fn connect(&self, client: usize, place: Place) -> Result<Connection> {
        Connection::open(self.addrs[place.node(client, self.leader, NODES)]).await
    }

    /// Clients that acquire.
    pub async fn acquirers(&self, count: usize, place: Place) -> Result<Vec<Acquirer>> {
        let mut clients = Vec::with_capacity(count);
        for client in 0..count {
            let connection = self.connect(client, place).await?;
            clients.push(Acquirer {
                connection,
                prefix: format!("load-{client}"),
                number: 0,
                leases: vec![],
            });
        }
        Ok(clients)
    }

    /// Clients that renew, each `keys` keys in turn, which they have acquired.
    pub async fn renewers(&self, count: usize, keys: usize, place: Place) -> Result<Vec<Renewer>> {
        let holders = crate::load::prepare(self.acquirers(count, place).await?, keys).await?;
        let mut clients = Vec::with_capacity(count);
        for holder in holders {
            let stream = holder.connection.stream("/etcdserverpb.Lease/LeaseKeepAlive").await?;
            clients.push(Renewer { stream, leases: holder.leases, at: 0 });
        }
        Ok(clients)
    }
}

/// Acquires one free key after the other.
pub struct Acquirer {
    connection: Connection,
    prefix: String,
    number: u64,
    leases: Vec<u64>,
}

impl Client for Acquirer {
    async fn once(&mut self) -> Result<u64> {
        self.number += 1;
        let key = format!("{}-{}", self.prefix, self.number);
        let answer =
            self.connection.unary("/etcdserverpb.Lease/LeaseGrant", &wire::lease_grant(TTL_S)).await?;
        let lease = wire::granted(&answer)?;
        if lease == 0 {
            return problem("etcd granted no lease");
        }
        let txn = wire::create_if_absent(&key, &self.prefix, lease);
        let answer = self.connection.unary("/etcdserverpb.KV/Txn", &txn).await?;
        if !wire::succeeded(&answer)? {
            return problem(format!("{key} was held"));
        }
        self.leases.push(lease);
        Ok(1)
    }
}

/// Renews one lease after the other.
pub struct Renewer {
    stream: Stream,
    leases: Vec<u64>,
    at: usize,
}

impl Client for Renewer {
    async fn once(&mut self) -> Result<u64> {
        let lease = *self.leases.get(self.at).during("no lease to renew")?;
        self.at = (self.at + 1) % self.leases.len();
        let answer = self.stream.ask(&wire::keep_alive(lease)).await?;
        match wire::kept(&answer)? {
            (id, ttl_s) if id == lease && ttl_s > 0 => Ok(1),
            other => problem(format!("lease {lease} was not renewed: {other:?}")),
        }
    }
}
