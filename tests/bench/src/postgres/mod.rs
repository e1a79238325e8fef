//! PostgreSQL: one unreplicated node of Debian's package with its defaults (`fsync` and `synchronous_commit` on).
//!
//! What is measured:
//!
//! - *acquire*: what Plane 0.5.6 asks the database when a client connects to a free key ([`statements`]): two reads, a
//!   transaction of five statements, one of a single one. Two commits that are synced.
//! - *renew*: Plane's one `UPDATE` for one key. One commit that is synced.
//!
//! Plane's controller itself is not there, nor the drone's acknowledgements and reports: this is what the database alone
//! would allow. Clients share a pool of as many connections as Plane's (20), which also is what PostgreSQL likes best on a
//! few cores, and a client's request keeps one connection until it is done.

mod statements;

use crate::child::{Server, command, unprivileged};
use crate::load::Client;
use crate::problem::{During, Result, problem};
use crate::usage::Servers;
use holdfast_tests::harness::PortBlock;
use nix::sys::signal::Signal;
use statements::{CLUSTER, Connection};
use std::net::SocketAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Tables and indexes.
const SCHEMA: &str = include_str!("schema.sql");
/// It must take connections within this.
const READY_MAX: Duration = Duration::from_secs(30);
/// Between two looks at a server that starts.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A running server.
pub struct Database {
    server: Server,
    settings: String,
    home: PathBuf,
    _ports: PortBlock,
}

/// Where Debian puts the newest version's programs, which are not in PATH.
fn programs() -> Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").during("PostgreSQL is not installed")?;
    versions
        .flatten()
        .filter_map(|entry| {
            Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path().join("bin")))
        })
        .filter(|(_, path)| path.join("postgres").is_file())
        .max()
        .map(|(_, path)| path)
        .during("/usr/lib/postgresql holds no server")
}

impl Database {
    /// Makes a database below `dir`, starts its server and fills in what Plane would have: a controller and `drones`.
    pub async fn start(dir: &Path, drones: usize) -> Result<Self> {
        let (programs, user) = (programs()?, unprivileged()?);
        let home = dir.join("postgres");
        std::fs::create_dir_all(&home).during(home.display())?;
        if let Some(user) = &user {
            nix::unistd::chown(&home, Some(user.uid), Some(user.gid)).during(home.display())?;
        }
        let data = home.join("data");
        let made = command(&programs.join("initdb"), user.as_ref(), "PG")
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .current_dir(&home)
            .output()
            .during("initdb")?;
        if !made.status.success() {
            let said = String::from_utf8_lossy(&made.stderr).into_owned();
            return problem(format!(
                "initdb failed ({}); if the user postgres can't reach {}, use --dir: {said}",
                made.status,
                home.display()
            ));
        }
        let mut ports = PortBlock::take();
        let addr: SocketAddr = ports.give();
        let mut postgres = command(&programs.join("postgres"), user.as_ref(), "PG");
        postgres
            .arg("-D")
            .arg(&data)
            .args(["-c", &format!("listen_addresses={}", addr.ip())])
            .args(["-c", &format!("port={}", addr.port())])
            .arg("-c")
            .arg(format!("unix_socket_directories={}", home.display()))
            .args(["-c", "fsync=on", "-c", "synchronous_commit=on", "-c", "max_connections=300"])
            .current_dir(&home);
        // SIGINT: fast shutdown. What listens to nothing else is the postmaster's children, which end with it.
        let server = Server::start(postgres, dir.join("postgres.log"), Signal::SIGINT)?;
        let settings = format!("host={} port={} user=postgres dbname=postgres", addr.ip(), addr.port());
        let mut database = Self { server, settings, home, _ports: ports };
        let end = Instant::now() + READY_MAX;
        let client = loop {
            database.server.check()?;
            match statements::connect(&database.settings).await {
                Ok(client) => break client,
                Err(seen) if Instant::now() > end => {
                    return problem(format!(
                        "PostgreSQL does not start: {seen}\n{}",
                        database.server.log_tail()
                    ));
                }
                Err(_) => tokio::time::sleep(LOOK_EVERY).await,
            }
        };
        client.batch_execute(SCHEMA).await.during("the schema")?;
        // Heartbeats of the next hour, so that nothing has to write them.
        client
            .batch_execute(&format!(
                "INSERT INTO controller VALUES ('co-1', now(), now() + interval '1 hour', true, '0.5.6', '', NULL);
                 INSERT INTO node (kind, name, cluster, plane_version, plane_hash, controller, ip, last_connection_start_time)
                     SELECT 'drone', 'dr-' || i, '{CLUSTER}', '0.5.6', '', 'co-1', '127.0.0.1', now()
                     FROM generate_series(1, {drones}) i;
                 INSERT INTO drone (id, ready, last_heartbeat, last_local_time)
                     SELECT id, true, now() + interval '1 hour', now() FROM node;"
            ))
            .await
            .during("its first rows")?;
        Ok(database)
    }

    /// The postmaster, from which the others descend.
    pub fn servers(&self) -> Servers {
        Servers::new(vec![self.server.pid()], &self.home)
    }

    /// A pool of `size` connections.
    async fn pool(&self, size: usize) -> Result<Arc<Pool>> {
        let mut connections = Vec::with_capacity(size);
        for _ in 0..size {
            connections.push(Connection::open(&self.settings).await?);
        }
        Ok(Arc::new(Pool { places: Semaphore::new(size), free: Mutex::new(connections) }))
    }

    /// Clients that acquire through a pool of at most `connections`.
    pub async fn acquirers(&self, count: usize, connections: usize) -> Result<Vec<Acquirer>> {
        let pool = self.pool(connections.min(count)).await?;
        Ok((0..count).map(|client| Acquirer { pool: Arc::clone(&pool), client, number: 0 }).collect())
    }

    /// Clients that renew, each `keys` keys in turn, through a pool of at most `connections`.
    pub async fn renewers(&self, count: usize, keys: usize, connections: usize) -> Result<Vec<Renewer>> {
        let client = statements::connect(&self.settings).await?;
        let (clients_last, keys_last) = (count.saturating_sub(1), keys.saturating_sub(1));
        client
            .batch_execute(&format!(
                "INSERT INTO backend (id, cluster, last_status, last_status_time, last_status_number, drone_id, last_keepalive, state)
                     SELECT 'ba-' || c || '-' || k, '{CLUSTER}', 'ready', now(), 4, 1, now(), '{{\"status\": \"ready\"}}'
                     FROM generate_series(0, {clients_last}) c, generate_series(0, {keys_last}) k;
                 INSERT INTO backend_key (id, namespace, key_name, tag, expires_at, fencing_token)
                     SELECT id, '', 'key-' || id, '', now() + interval '60 seconds', 1 FROM backend;
                 ANALYZE;"
            ))
            .await
            .during("keys to renew")?;
        let pool = self.pool(connections.min(count)).await?;
        Ok((0..count).map(|client| Renewer { pool: Arc::clone(&pool), client, keys, at: 0 }).collect())
    }
}

/// Connections that clients share.
struct Pool {
    places: Semaphore,
    free: Mutex<Vec<Connection>>,
}

impl Pool {
    /// Takes a connection when one is free, in the order of asking.
    async fn take(&self) -> Result<Lent<'_>> {
        let place = self.places.acquire().await.during("the pool")?;
        let connection = self.free().pop().during("a place without a connection")?;
        Ok(Lent { pool: self, connection: Some(connection), _place: place })
    }

    fn free(&self) -> MutexGuard<'_, Vec<Connection>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Goes back when dropped.
struct Lent<'a> {
    pool: &'a Pool,
    connection: Option<Connection>,
    _place: SemaphorePermit<'a>,
}

impl Deref for Lent<'_> {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        self.connection.as_ref().unwrap_or_else(|| unreachable!("there until it is dropped"))
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        // Fields are dropped after this: the place is free only when the connection is back.
        self.pool.free().extend(self.connection.take());
    }
}

/// Acquires one free key after the other.
pub struct Acquirer {
    pool: Arc<Pool>,
    client: usize,
    number: u64,
}

impl Client for Acquirer {
    async fn once(&mut self) -> Result<u64> {
        self.number += 1;
        let (key, backend) = (
            format!("load-{}-{}", self.client, self.number),
            format!("ba-load-{}-{}", self.client, self.number),
        );
        self.pool.take().await?.acquire(&key, &backend).await?;
        Ok(1)
    }
}

/// Renews one key after the other.
pub struct Renewer {
    pool: Arc<Pool>,
    client: usize,
    keys: usize,
    at: usize,
}

impl Client for Renewer {
    async fn once(&mut self) -> Result<u64> {
        let backend = format!("ba-{}-{}", self.client, self.at);
        self.at = (self.at + 1) % self.keys.max(1);
        self.pool.take().await?.renew(&backend).await?;
        Ok(1)
    }
}
