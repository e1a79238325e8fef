//! A cluster with a few held keys and the checker on, and what is written down of each fault.

use holdfast_client::{Client, RequestOptions};
use holdfast_tests::checker::{Checker, guard_of};
use holdfast_tests::harness::{Cluster, ClusterBuilder, LONG, SHORT, boot_ms, wait_until};
use holdfast_wire::http::{ConnectRequest, KeyInfo};
use holdfast_wire::{BackendStatus, LeaseConfig};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Between the hard deadline and the expiry lies a second and a half, more than a busy machine needs for a kill.
const LEASE: &str = "renew=600ms,soft=1200ms,hard=1800ms,expiry=3300ms";
/// Between two renewals lies enough for an election, so that nothing is lost by one.
pub const CALM: &str = "renew=700ms,soft=3s,hard=3500ms,expiry=5s";
/// How much later than its hard deadline something may be seen on a busy machine, in milliseconds.
const LATE_MS: u64 = 900;
/// And enough for a drone to notice that its controller says nothing any more (3 s), and to find another.
pub const CALMER: &str = "renew=1s,soft=6s,hard=7s,expiry=8500ms";
/// Drones; any two of them can hold all keys.
const DRONES: usize = 3;

/// A key with a ready backend.
#[derive(Debug, Clone)]
pub struct Held {
    /// The key's name.
    pub key: String,
    /// The backend.
    pub backend: String,
    /// Its token.
    pub token: u64,
    /// The index of its drone.
    pub drone: usize,
}

impl Held {
    /// The process number of its guard.
    pub fn guard(&self) -> u32 {
        guard_of(&self.backend).unwrap_or_else(|| panic!("{self:?} has no guard"))
    }
}

/// See the module.
pub struct Arena {
    /// The cluster.
    pub cluster: Cluster,
    /// The checker.
    pub checker: Checker,
    /// Waits for drones, too.
    pub client: Client,
    /// The lease durations.
    pub lease: LeaseConfig,
    keys: Vec<String>,
    table: Vec<String>,
}

/// Sends a signal to a guard; none if it is gone.
pub fn signal_guard(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
}

impl Arena {
    /// Starts a cluster in which nothing is held yet.
    pub async fn start(keys: usize) -> Self {
        Self::of(Cluster::builder(), LEASE, keys).await
    }

    /// Starts a cluster with these lease durations, what the tests need, and what `builder` has besides.
    pub async fn of(builder: ClusterBuilder, lease: &str, keys: usize) -> Self {
        let cluster = builder.drones(DRONES).lease(lease).proxied_drones().start().await;
        let checker = Checker::start(&cluster);
        let options = RequestOptions { retry_no_drone: true, ..RequestOptions::default() };
        let client = cluster.client().with_options(options);
        let keys = (0..keys).map(|i| format!("k-{i}")).collect();
        Self { cluster, checker, client, lease: lease.parse().unwrap(), keys, table: Vec::new() }
    }

    /// The keys' names.
    pub fn keys(&self) -> Vec<String> {
        self.keys.clone()
    }

    /// A request for a key. Backends of every other key ignore SIGTERM, so that only a kill ends them.
    pub fn request(&self, key: &str) -> ConnectRequest {
        let backend = self.checker.backend(&self.cluster);
        let backend = if key.ends_with(['0', '2', '4']) { backend.ignoring_sigterm() } else { backend };
        backend.request(key)
    }

    /// Connects until the key has a ready backend of a token above `above`.
    pub async fn ready(&self, key: &str, above: u64) -> Held {
        let request = self.request(key);
        wait_until(&format!("{key} is held by a ready backend"), LONG, async || {
            let answer = self.client.connect(&request).await.map_err(|e| e.to_string())?;
            if answer.fencing_token <= above {
                return Err(format!("the old one: {answer:?}"));
            }
            match self.client.backend(&answer.backend_id).await {
                Ok(Some(info)) if info.status == BackendStatus::Ready => Ok(Held {
                    key: key.to_owned(),
                    backend: info.id,
                    token: info.fencing_token,
                    drone: info.drone.trim_start_matches("dr-").parse().unwrap(),
                }),
                other => Err(format!("{other:?}")),
            }
        })
        .await
    }

    /// All keys with ready backends, once they were renewed.
    pub async fn settle(&self) -> Vec<Held> {
        let mut all = Vec::new();
        for key in &self.keys {
            all.push(self.ready(key, 0).await);
        }
        wait_until("all keys are renewed", SHORT, async || {
            let keys = self.cluster.keys().await;
            let renewed = |key: &KeyInfo| key.expires_at > key.acquired_at + self.lease.expiry_ms;
            if keys.iter().all(renewed) { Ok(()) } else { Err(keys) }
        })
        .await;
        all
    }

    /// The hard deadline of a key's holder as the controllers' last grant has it, in `CLOCK_BOOTTIME`; rather later than
    /// it is for the drone. None if it is not the holder any more.
    pub async fn hard_deadline(&self, held: &Held) -> Option<u64> {
        let key = self.cluster.key(&held.key).await.filter(|key| key.token == held.token)?;
        let cluster_ms = self.cluster.info().await.cluster_time;
        let granted_ms = key.expires_at.saturating_sub(self.lease.expiry_ms);
        Some((boot_ms() + granted_ms + self.lease.hard_terminate_ms).saturating_sub(cluster_ms))
    }

    /// Waits until nothing of a backend is left and its key has a new one, and writes down both. `deadline_ms` is when its
    /// end is due at the latest, if that is known.
    pub async fn taken_over(&mut self, fault: &str, held: &Held, deadline_ms: Option<u64>, from_ms: u64) {
        let last_ms = self.checker.processes.gone(&held.backend, LONG).await;
        let after = |at_ms: u64| i64::try_from(at_ms).unwrap() - i64::try_from(from_ms).unwrap();
        if let Some(deadline_ms) = deadline_ms {
            assert!(
                last_ms <= deadline_ms + LATE_MS,
                "{fault}: {held:?} was there at {last_ms}, {} ms after its deadline",
                last_ms - deadline_ms
            );
        }
        let next = self.ready(&held.key, held.token).await;
        let row = format!(
            "{fault:58} | last seen {:>5} ms{} | next ready {:>5} ms",
            after(last_ms),
            deadline_ms.map_or_else(String::new, |at| format!(" (hard deadline {:>5} ms)", after(at))),
            after(boot_ms()),
        );
        println!("{row}");
        self.table.push(row);
        assert_ne!(next.backend, held.backend);
        self.checker.assert_clean();
    }

    /// Waits until all of these were renewed so late that everything granted before now is over; they must be the holders
    /// still.
    pub async fn undisturbed(&mut self, fault: &str, all: &[Held]) {
        let from_ms = self.cluster.info().await.cluster_time;
        wait_until(&format!("{fault}: all keys are renewed past an expiry"), LONG, async || {
            let keys = self.cluster.keys().await;
            for held in all {
                let key = keys.iter().find(|key| key.name == held.key);
                assert_eq!(key.map(|key| &key.backend), Some(&held.backend), "{fault}: {held:?} is lost");
            }
            let past = from_ms + self.lease.expiry_ms + self.lease.hard_terminate_ms;
            if keys.iter().all(|key| key.expires_at > past) { Ok(()) } else { Err(keys) }
        })
        .await;
        let row = format!("{fault:58} | all {} keys kept", all.len());
        println!("{row}");
        self.table.push(row);
        self.checker.assert_clean();
    }

    /// A drone that was killed comes back.
    pub async fn revive(&mut self, drone: usize) {
        self.cluster.restart_drone(drone);
        self.cluster.wait_drone(drone).await;
    }

    /// Judges everything and shows the table.
    pub fn finish(self) {
        let summary = self.checker.finish(&self.cluster);
        println!("faults and what was seen of the key's backend, from the fault on:");
        self.table.iter().for_each(|row| println!("  {row}"));
        println!("{summary}");
    }
}
