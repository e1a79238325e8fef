//! Holdfast: three controllers as they are shipped, with simulated drones on their sockets.
//!
//! What is measured:
//!
//! - *acquire*: `POST /ctrl/connect` to a free key, one request under way for each client. Meanwhile the drones
//!   acknowledge the spawns and report four states of each backend: all of it is written, replicated and synced too.
//! - *renew*: one frame for one key (`RenewKey`), one under way for each client, each client a drone's session.
//! - *renew_batched*: one frame for all keys of a drone (`RenewKeys`), one under way for each drone; an operation is one
//!   key, a time is a frame's. Every renewal is an entry that a quorum has synced.
//!
//! Clients and drones go to the leader unless told otherwise, as our client and our drone do by themselves.

pub mod drone;
pub mod fleet;
pub mod http;

use crate::load::Client;
use crate::place::Place;
use crate::problem::{During, Result, problem};
use crate::usage::Servers;
use drone::{Drone, Identity, Kept};
use holdfast_tests::harness;
use http::HttpClient;
use serde::Deserialize;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::task::JoinHandle;

/// The default lease, not a test's.
const LEASE: &str = "renew=30s,soft=40s,hard=50s,expiry=60s";
/// Connections that fill drones with keys before renewals are measured.
const FILLERS: usize = 64;
/// A drone must be fit to take a backend within this.
const FIT_MAX: Duration = Duration::from_secs(20);

/// A running cluster.
pub struct Cluster {
    /// Its processes.
    pub inner: harness::Cluster,
    /// Where the controllers serve.
    pub addrs: Vec<SocketAddr>,
    /// Index of the leader when it started.
    pub leader: usize,
}

/// Settings that a measurement may change.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// `--election-timeout`; the controllers' default if there is none.
    pub election_timeout: Option<String>,
    /// `--terminated-keep`, likewise.
    pub terminated_keep: Option<String>,
}

/// The body of a connect to `key`.
pub fn connect_body(cluster: &str, pool: &str, key: &str) -> String {
    format!(
        r#"{{"key":{{"name":"{key}"}},"spawn_config":{{"cluster":"{cluster}","pool":"{pool}","executable":{{"command":["true"]}}}}}}"#
    )
}

/// The part of an answer that is looked at.
#[derive(Debug, Deserialize)]
pub struct Connected<'a> {
    /// Whether the key was free.
    pub spawned: bool,
    /// The new backend.
    pub backend_id: &'a str,
    /// The drone that it was scheduled to.
    #[serde(default)]
    pub drone: Option<&'a str>,
}

/// Connects to a key that must be free; gives what `look` makes of the answer.
pub async fn connect<T>(
    http: &mut HttpClient,
    body: &str,
    look: impl FnOnce(Connected<'_>) -> T,
) -> Result<T> {
    let (status, answer) = http.post("/ctrl/connect", body).await?;
    if status != 200 {
        return problem(format!("connect: {status}: {}", String::from_utf8_lossy(answer)));
    }
    let connected: Connected<'_> = serde_json::from_slice(answer).during("an answer to connect")?;
    if !connected.spawned {
        return problem(format!("a key was held: {connected:?}"));
    }
    Ok(look(connected))
}

impl Cluster {
    /// Starts three controllers.
    pub async fn start(settings: &Settings) -> Result<Self> {
        let election_timeout = settings.election_timeout.clone().unwrap_or_default();
        let mut builder =
            harness::Cluster::builder().drones(0).lease(LEASE).election_timeout(&election_timeout);
        if let Some(keep) = &settings.terminated_keep {
            builder = builder.controller_flag("--terminated-keep", keep);
        }
        let inner = builder.start().await;
        let addrs = inner
            .urls()
            .iter()
            .map(|url| url.trim_start_matches("http://").parse().during(url))
            .collect::<Result<_>>()?;
        let leader = inner.leader().await;
        Ok(Self { inner, addrs, leader })
    }

    /// Process numbers of the controllers.
    pub fn pids(&self) -> Vec<u32> {
        self.inner.controllers.iter().filter_map(harness::Process::pid).collect()
    }

    /// The controllers.
    pub fn servers(&self) -> Servers {
        Servers::new(self.pids(), &self.inner.dir())
    }

    /// Where client number `client` connects.
    pub fn addr(&self, client: usize, place: Place) -> SocketAddr {
        self.addrs[place.node(client, self.leader, self.addrs.len())]
    }

    /// Opens sessions of `count` drones, each of the pool that `pool` names for its number.
    pub async fn drones(
        &self,
        count: usize,
        place: Place,
        pool: impl Fn(usize) -> String,
    ) -> Result<Vec<Drone>> {
        let start = Instant::now();
        let mut drones = Vec::with_capacity(count);
        for at in 0..count {
            let identity = Identity {
                cluster: self.inner.name.clone(),
                name: format!("dr-{at}"),
                pool: pool(at),
                incarnation: "bench".to_owned(),
            };
            let drone = Drone::connect(self.addr(at, place), &identity, start, Kept::default()).await;
            drones.push(drone.map_err(|(_, problem)| problem)?);
        }
        Ok(drones)
    }

    /// Connects once in `pool` until some drone of it takes a backend: its first heartbeat must have been recorded.
    pub async fn wait_fit(&self, pool: &str, place: Place) -> Result<()> {
        let mut http = HttpClient::open(self.addr(0, place)).await?;
        let end = Instant::now() + FIT_MAX;
        for number in 0.. {
            match connect(
                &mut http,
                &connect_body(&self.inner.name, pool, &format!("fit-{pool}-{number}")),
                |_| (),
            )
            .await
            {
                Ok(()) => break,
                Err(seen) if Instant::now() > end => return Err(seen),
                // The controller has waited for a drone itself.
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Clients that acquire.
    pub async fn acquirers(&self, count: usize, place: Place) -> Result<Vec<Acquirer>> {
        let mut clients = Vec::with_capacity(count);
        for client in 0..count {
            clients.push(Acquirer {
                http: HttpClient::open(self.addr(client, place)).await?,
                cluster: self.inner.name.clone(),
                prefix: format!("load-{client}"),
                number: 0,
            });
        }
        Ok(clients)
    }

    /// `count` drones with `keys` keys each.
    pub async fn holders(&self, count: usize, keys: usize, place: Place) -> Result<Vec<Drone>> {
        let pool = |at: usize| format!("p{at}");
        let working: Vec<Working> =
            self.drones(count, place, pool).await?.into_iter().map(Working::start).collect();
        // Interleaved, so that no drone is far ahead of the others.
        for at in 0..count {
            self.wait_fit(&pool(at), place).await?;
        }
        let mut fillers = Vec::new();
        for filler in 0..FILLERS.min(count * keys) {
            let mut http = HttpClient::open(self.addr(filler, place)).await?;
            // One key was acquired while waiting for fitness.
            let bodies: Vec<String> = (filler..count * (keys - 1))
                .step_by(FILLERS)
                .map(|number| connect_body(&self.inner.name, &pool(number % count), &format!("key-{number}")))
                .collect();
            fillers.push(tokio::spawn(async move {
                for body in &bodies {
                    connect(&mut http, body, |_| ()).await?;
                }
                Ok::<_, crate::problem::Problem>(())
            }));
        }
        for filler in fillers {
            filler.await.during("a filler")??;
        }
        Working::stop_all(working, keys).await
    }
}

/// A drone that works in a task of its own until it is asked back.
pub struct Working {
    task: JoinHandle<Result<Drone>>,
    stop: oneshot::Sender<usize>,
}

impl Working {
    /// Lets it work.
    pub fn start(mut drone: Drone) -> Self {
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut until = None;
            loop {
                // A turn must not be cut short; the next heartbeat ends it at the latest.
                drone.turn(None).await?;
                match stopped.try_recv() {
                    Ok(keys) => until = Some(keys),
                    Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Closed) if until.is_none() => {
                        return problem("nobody asks this drone back");
                    }
                    Err(TryRecvError::Closed) => {}
                }
                if until.is_some_and(|keys| drone.held.len() >= keys) && drone.reports_open() == 0 {
                    return Ok(drone);
                }
            }
        });
        Self { task, stop }
    }

    /// The drones, once each holds `keys` keys and all its reports are recorded.
    pub async fn stop_all(working: Vec<Self>, keys: usize) -> Result<Vec<Drone>> {
        let mut tasks = Vec::with_capacity(working.len());
        for Self { task, stop } in working {
            // If the drone has failed, its task says why.
            let _ = stop.send(keys);
            tasks.push(task);
        }
        let mut drones = Vec::with_capacity(tasks.len());
        for task in tasks {
            drones.push(task.await.during("a drone")??);
        }
        Ok(drones)
    }
}

/// Connects to one free key after the other.
pub struct Acquirer {
    http: HttpClient,
    cluster: String,
    prefix: String,
    number: u64,
}

impl Client for Acquirer {
    async fn once(&mut self) -> Result<u64> {
        self.number += 1;
        let body = connect_body(&self.cluster, "", &format!("{}-{}", self.prefix, self.number));
        connect(&mut self.http, &body, |_| ()).await?;
        Ok(1)
    }
}

/// Renews one key after the other, each in a frame of its own.
pub struct Renewer {
    /// The session.
    pub drone: Drone,
    keys: Vec<(String, u64)>,
    at: usize,
}

impl Renewer {
    /// Of `keys` keys of a drone.
    pub fn new(drone: Drone, keys: usize) -> Self {
        let mut all = drone.keys();
        all.truncate(keys);
        Self { drone, keys: all, at: 0 }
    }
}

async fn answered(drone: &mut Drone, keys: u64) -> Result<u64> {
    let mut granted = 0;
    while granted < keys {
        granted += drone.turn(None).await?;
        if drone.counts.refused > 0 {
            return problem(format!("renewals were refused: {:?}", drone.counts));
        }
    }
    Ok(granted)
}

impl Client for Renewer {
    async fn once(&mut self) -> Result<u64> {
        let (backend, token) = self.keys.get(self.at).during("no key to renew")?;
        self.drone.ask_one(backend, *token).await?;
        self.at = (self.at + 1) % self.keys.len();
        answered(&mut self.drone, 1).await
    }
}

/// Renews all keys of a drone in one frame.
pub struct BatchRenewer {
    drone: Drone,
    keys: Vec<(String, u64)>,
}

impl BatchRenewer {
    /// Of at most `keys` keys of a drone.
    pub fn new(drone: Drone, keys: usize) -> Self {
        let mut all = drone.keys();
        all.truncate(keys);
        Self { drone, keys: all }
    }
}

impl Client for BatchRenewer {
    async fn once(&mut self) -> Result<u64> {
        self.drone.ask_many(&self.keys).await?;
        answered(&mut self.drone, self.keys.len() as u64).await
    }
}
