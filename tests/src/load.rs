//! Clients that never stop: connects to free keys and reads of them, through `holdfast-client`, with everything that a
//! client sees written down. For tests and figures of restarts and replacements.

use crate::sim_drone::{AutoDrone, Identity};
use futures::future::join_all;
use holdfast_client::Client;
use holdfast_wire::KeyConfig;
use holdfast_wire::http::{ConnectRequest, SpawnConfig};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// What one request was like.
#[derive(Debug, Clone)]
pub struct Seen {
    /// When it was sent.
    pub began: Instant,
    /// When it was answered.
    pub ended: Instant,
    /// What was asked.
    pub what: String,
    /// What the client said that is no success.
    pub failure: Option<String>,
}

/// A load that runs until [`Load::stop`].
pub struct Load {
    began: Instant,
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Seen>>>,
}

/// What the clients saw.
#[derive(Debug)]
pub struct Report {
    /// All requests, in the order in which they were answered.
    pub seen: Vec<Seen>,
}

/// A connect that starts a backend on a simulated drone.
pub fn request(cluster: &str, key: &str) -> ConnectRequest {
    ConnectRequest {
        key: Some(KeyConfig { name: key.to_owned(), ..KeyConfig::default() }),
        spawn_config: Some(SpawnConfig {
            id: None,
            cluster: Some(cluster.to_owned()),
            pool: String::new(),
            executable: json!({"command": ["true"]}),
            lifetime_limit_seconds: None,
            max_idle_seconds: None,
            use_static_token: false,
            subdomain: None,
        }),
        ..ConnectRequest::default()
    }
}

/// Simulated drones that behave, `dr-load-0` and so on. Each begins at another of `urls`.
pub fn drones(cluster: &str, count: usize, urls: &[String]) -> Vec<AutoDrone> {
    (0..count)
        .map(|i| {
            let mut urls = urls.to_vec();
            let first = i % urls.len();
            urls.rotate_left(first);
            AutoDrone::start(urls, Identity::new(cluster, &format!("dr-load-{i}"), "one"))
        })
        .collect()
}

impl Load {
    /// Starts `count` clients that know `urls`, each with a client of its own and a pause between two requests. Every other
    /// request reads, with a linearizable read, the key that the one before has got.
    pub fn start(name: &str, cluster: &str, urls: &[String], count: usize, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let clients = (0..count)
            .map(|i| {
                let client = Client::new(urls.to_vec()).expect("URLs of controllers");
                let (cluster, stop) = (cluster.to_owned(), Arc::clone(&stop));
                let name = format!("{name}-{i}");
                tokio::spawn(async move { one(client, cluster, name, pause, &stop).await })
            })
            .collect();
        Self { began: Instant::now(), stop, clients }
    }

    /// When it began.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Lets what is under way end, and tells what was seen.
    pub async fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let all = join_all(self.clients).await;
        let mut seen: Vec<Seen> = all.into_iter().flat_map(|client| client.expect("a client")).collect();
        seen.sort_by_key(|request| request.ended);
        Report { seen }
    }
}

async fn one(client: Client, cluster: String, name: String, pause: Duration, stop: &AtomicBool) -> Vec<Seen> {
    let mut seen = Vec::new();
    // Out of step with the others.
    tokio::time::sleep(pause.mul_f64(rand::random_range(0.0..=1.0))).await;
    for round in 0.. {
        let key = format!("{name}-{round}");
        for read in [false, true] {
            if stop.load(Ordering::Relaxed) {
                return seen;
            }
            let began = Instant::now();
            let failure = if read {
                client.key(&key, "").await.err()
            } else {
                client.connect(&request(&cluster, &key)).await.err()
            };
            let what = format!("{} {key}", if read { "read" } else { "connect" });
            let failure = failure.map(|error| format!("{what}: {error}"));
            seen.push(Seen { began, ended: Instant::now(), what, failure });
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.5))).await;
        }
    }
    seen
}

impl Report {
    /// What did not succeed.
    pub fn failures(&self) -> Vec<&str> {
        self.seen.iter().filter_map(|request| request.failure.as_deref()).collect()
    }

    /// Of the requests answered in that time: how many, the longest time between two answers, the longest request.
    pub fn between(&self, from: Instant, to: Instant) -> Figures {
        let mut figures = Figures::default();
        let mut last = from;
        for request in self.seen.iter().filter(|request| from <= request.ended && request.ended <= to) {
            figures.requests += 1;
            figures.longest_gap = figures.longest_gap.max(request.ended - last);
            figures.longest_request = figures.longest_request.max(request.ended - request.began);
            figures.failed += usize::from(request.failure.is_some());
            last = request.ended;
        }
        figures.longest_gap = figures.longest_gap.max(to.saturating_duration_since(last));
        figures
    }
}

/// See [`Report::between`].
#[derive(Debug, Default, Clone, Copy)]
pub struct Figures {
    /// Requests answered.
    pub requests: usize,
    /// Of them, those that failed.
    pub failed: usize,
    /// Longest time in which nobody got an answer.
    pub longest_gap: Duration,
    /// Longest that one client waited.
    pub longest_request: Duration,
}
