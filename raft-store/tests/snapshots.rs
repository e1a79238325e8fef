//! Large snapshots over links that break, a log that stays bounded, and backups: replicas in one process, on real disks
//! and sockets.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use futures::StreamExt;
use holdfast_core::command::{
    Acquire, Command, HeartbeatItem, Proposal, RegisterDrone, Renew, RenewKey, Spawn,
};
use holdfast_core::outcome::{Holder, Outcome, Refusal, RenewOutcome};
use holdfast_wire::{BackendStatus, KeyConfig, LeaseConfig};
use raft_store::restore::{INDEX_JUMP, RestoreError, RestoreOptions, restore};
use raft_store::{Answer, Store, StoreConfig};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const DEADLINE: Duration = Duration::from_secs(30);
/// Acquisitions under way at once.
const CONCURRENCY: usize = 128;

fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// In front of one member: passes everything on, and cuts each connection that has carried more than `cut_after` bytes to
/// the member.
struct Proxy {
    addr: SocketAddr,
    /// Bytes to the member on connections that were cut or have carried more than a small part of `cut_after`.
    large_bytes: Arc<AtomicU64>,
    cuts: Arc<AtomicU64>,
    cut_after: Arc<AtomicU64>,
}

impl Proxy {
    async fn start(to: SocketAddr) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let this = Self {
            addr,
            large_bytes: Arc::default(),
            cuts: Arc::default(),
            cut_after: Arc::new(AtomicU64::new(u64::MAX)),
        };
        let (bytes, cuts, cut_after) = (this.large_bytes.clone(), this.cuts.clone(), this.cut_after.clone());
        tokio::spawn(async move {
            while let Ok((inbound, _)) = listener.accept().await {
                let (bytes, cuts, cut_after) = (bytes.clone(), cuts.clone(), cut_after.clone());
                tokio::spawn(async move {
                    let Ok(outbound) = TcpStream::connect(to).await else { return };
                    let (mut from_peer, mut to_peer) = inbound.into_split();
                    let (mut from_member, mut to_member) = outbound.into_split();
                    let back =
                        tokio::spawn(async move { tokio::io::copy(&mut from_member, &mut to_peer).await });
                    let mut buffer = vec![0; 64 << 10];
                    let (mut carried, mut counted) = (0_u64, 0);
                    while let Ok(read) = from_peer.read(&mut buffer).await {
                        if read == 0 || to_member.write_all(&buffer[..read]).await.is_err() {
                            break;
                        }
                        carried += read as u64;
                        let limit = cut_after.load(Ordering::Relaxed);
                        if carried > limit / 4 {
                            bytes.fetch_add(carried - counted, Ordering::Relaxed);
                            counted = carried;
                        }
                        if carried > limit {
                            cuts.fetch_add(1, Ordering::Relaxed);
                            break;
                        }
                    }
                    back.abort();
                });
            }
        });
        this
    }
}

struct Cluster {
    dir: TempDir,
    /// Where each member listens.
    addrs: BTreeMap<u64, SocketAddr>,
    /// What its peers dial.
    dialled: BTreeMap<u64, SocketAddr>,
    stores: BTreeMap<u64, Store>,
    lease: LeaseConfig,
    snapshot_every: u64,
}

impl Cluster {
    async fn start(snapshot_every: u64) -> Self {
        let mut this = Self::plan(snapshot_every);
        this.open_all().await;
        this
    }

    fn plan(snapshot_every: u64) -> Self {
        let addrs: BTreeMap<u64, SocketAddr> = (1..=3).map(|id| (id, free_addr())).collect();
        let lease = LeaseConfig::default();
        Self {
            dir: TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
            dialled: addrs.clone(),
            addrs,
            stores: BTreeMap::new(),
            lease,
            snapshot_every,
        }
    }

    async fn open_all(&mut self) {
        for id in 1..=3 {
            self.open(id).await;
        }
    }

    fn members(&self) -> BTreeMap<u64, String> {
        self.dialled.iter().map(|(id, addr)| (*id, addr.to_string())).collect()
    }

    fn data_dir(&self, id: u64) -> PathBuf {
        self.dir.path().join(id.to_string())
    }

    fn config(&self, id: u64) -> StoreConfig {
        StoreConfig {
            id,
            data_dir: self.data_dir(id),
            peer_listen: self.addrs[&id],
            advertise_url: format!("http://controller-{id}"),
            initial_cluster: self.members(),
            lease: Some(self.lease),
            terminated_keep_ms: 3_600_000,
            election_timeout_ms: 1_000,
            snapshot_every: self.snapshot_every,
            disk_reserve_bytes: 0,
        }
    }

    async fn open(&mut self, id: u64) {
        let store = Store::open(self.config(id)).await.unwrap();
        self.stores.insert(id, store);
    }

    async fn stop(&mut self, id: u64) {
        self.stores.remove(&id).unwrap().stop().await;
    }

    async fn stop_all(&mut self) {
        for id in self.stores.keys().copied().collect::<Vec<_>>() {
            self.stop(id).await;
        }
    }

    async fn leader(&self) -> u64 {
        let (_, any) = self.stores.iter().next().unwrap();
        let mut leader = any.leader();
        let stores = &self.stores;
        let found = leader.wait_for(|l| l.as_ref().is_some_and(|l| stores.contains_key(&l.id)));
        tokio::time::timeout(DEADLINE, found).await.unwrap().unwrap().as_ref().unwrap().id
    }

    fn store(&self, id: u64) -> &Store {
        &self.stores[&id]
    }

    /// All replicas have applied the same, and have the same running checksum where they published one.
    async fn agree(&self) {
        let index = self.store(self.leader().await).status().last_log;
        let mut published: BTreeMap<u64, u64> = BTreeMap::new();
        let mut seen = 0;
        for store in self.stores.values() {
            store.wait_applied(index, DEADLINE).await.unwrap();
            for (index, value) in store.local().view.progress().unwrap().published {
                let first = *published.entry(index).or_insert(value);
                assert_eq!(first, value, "replicas differ at {index}");
                seen += 1;
            }
        }
        assert!(seen > published.len(), "no index is published by two replicas");
    }
}

async fn propose(store: &Store, command: Command) -> Answer {
    store.propose(Proposal { command, idempotency: None }, DEADLINE).await.unwrap()
}

fn register(session: &str) -> Command {
    Command::RegisterDrone(RegisterDrone {
        cluster: "c".into(),
        name: "dr-a".into(),
        pool: String::new(),
        incarnation: "i1".into(),
        data_id: None,
        address: String::new(),
        session: session.into(),
        controller: 1,
        take_over: false,
        version: "0".into(),
        git_hash: "0".into(),
    })
}

async fn drone(store: &Store, session: &str) -> i32 {
    let answer = propose(store, register(session)).await.outcome;
    let Outcome::Registered { drone_id } = answer else { panic!("not registered: {answer:?}") };
    beat(store, drone_id, session).await;
    drone_id
}

async fn beat(store: &Store, drone_id: i32, session: &str) {
    let beat = HeartbeatItem { drone_id, session: session.into(), local_time_ms: 1_000 };
    propose(store, Command::Heartbeats(vec![beat])).await;
}

fn acquire(name: &str, backend_id: &str, drone_id: i32, executable_bytes: usize) -> Command {
    Command::Acquire(Box::new(Acquire {
        key: KeyConfig { name: name.into(), ..KeyConfig::default() },
        spawn: Some(Spawn {
            backend_id: backend_id.into(),
            id_supplied: false,
            cluster: "c".into(),
            pool: String::new(),
            candidates: vec![drone_id],
            executable_json: format!("\"{}\"", "x".repeat(executable_bytes)),
            lifetime_limit_seconds: None,
            max_idle_seconds: None,
            static_token: None,
            secret_token: "x".into(),
            subdomain: None,
        }),
    }))
}

fn acquired(answer: Answer) -> Holder {
    match answer.outcome {
        Outcome::Acquired(holder) => holder,
        other => panic!("not acquired: {other:?}"),
    }
}

/// Acquires `count` keys `{prefix}0`, `{prefix}1`, … for a drone whose heartbeat is kept fresh.
async fn hold(store: &Store, drone_id: i32, prefix: &str, count: usize, executable_bytes: usize) {
    let all = (0..count).map(|n| async move {
        if n % 5_000 == 0 {
            beat(store, drone_id, "s1").await;
        }
        let command =
            acquire(&format!("{prefix}{n}"), &format!("ba-{prefix}{n}"), drone_id, executable_bytes);
        acquired(propose(store, command).await);
    });
    futures::stream::iter(all).buffer_unordered(CONCURRENCY).collect::<Vec<_>>().await;
}

/// Renews without pause until told to stop; says how many entries that were.
fn keep_writing(store: Store, drone_id: i32, stop: Arc<AtomicBool>) -> tokio::task::JoinHandle<u64> {
    tokio::spawn(async move {
        let mut entries = 0;
        while !stop.load(Ordering::Relaxed) {
            let keys = (0..64).map(|n| RenewKey { backend_id: format!("ba-k{n}"), token: None }).collect();
            let answer = propose(&store, Command::Renew(Renew { drone_id, keys })).await;
            assert_eq!(answer.outcome, Outcome::Renewed(vec![RenewOutcome::Renewed; 64]));
            entries += 1;
        }
        entries
    })
}

fn bytes_below(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
            Ok(meta) => meta.len(),
            // Deleted in between.
            Err(_) => 0,
        })
        .sum()
}

/// A member that lost its disk gets a snapshot of `keys` keys over a link that is cut again and again, while writes go on.
async fn a_snapshot_arrives_over_a_link_that_keeps_breaking(
    keys: usize,
    executable_bytes: usize,
    cut_after: u64,
) {
    let snapshot_every = 2_000;
    let mut cluster = Cluster::plan(snapshot_every);
    let proxy = Proxy::start(cluster.addrs[&3]).await;
    cluster.dialled.insert(3, proxy.addr);
    // Nobody renews while a million keys are acquired.
    cluster.lease = "renew=1200s,soft=1500s,hard=1800s,expiry=2400s".parse().unwrap();
    cluster.open_all().await;
    let drone_id = drone(cluster.store(1), "s1").await;
    if cluster.leader().await == 3 {
        assert!(cluster.store(3).transfer_leadership(DEADLINE).await);
    }
    cluster.stop(3).await;
    std::fs::remove_dir_all(cluster.data_dir(3)).unwrap();
    let leader = cluster.leader().await;
    hold(cluster.store(leader), drone_id, "k", keys, executable_bytes).await;

    proxy.cut_after.store(cut_after, Ordering::Relaxed);
    let stop = Arc::new(AtomicBool::new(false));
    let writer = keep_writing(cluster.store(leader).clone(), drone_id, stop.clone());
    let began = Instant::now();
    cluster.open(3).await;
    while proxy.cuts.load(Ordering::Relaxed) < 2 {
        assert!(began.elapsed() < DEADLINE, "no transfer has begun");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // What has arrived outlives its receiver's restart.
    cluster.stop(3).await;
    cluster.open(3).await;
    // Everything that was acknowledged by now, though the link breaks every few hundred milliseconds.
    let now = cluster.store(leader).status().applied;
    let patience = Duration::from_secs(120 + keys as u64 / 2_000);
    cluster.store(3).wait_applied(now, patience).await.unwrap();
    let took = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    let entries = writer.await.unwrap();
    proxy.cut_after.store(u64::MAX, Ordering::Relaxed);
    cluster.agree().await;
    assert_eq!(cluster.store(3).local().view.progress().unwrap().keys_held, keys as u64);

    let (file, began) = (cluster.dir.path().join("backup"), Instant::now());
    let backup = save(cluster.store(3), &file).await;
    let (saved, began) = (began.elapsed(), Instant::now());
    restore(&options(&file, &Cluster::plan(1), 1)).await.unwrap();
    println!("backup of {} MiB saved in {saved:?}, restored in {:?}", backup.bytes >> 20, began.elapsed());
    let snapshot = bytes_below(&cluster.data_dir(3).join("snapshots"));
    let (cuts, carried) = (proxy.cuts.load(Ordering::Relaxed), proxy.large_bytes.load(Ordering::Relaxed));
    println!(
        "{keys} keys, snapshot of {} MiB over {cuts} breaks ({} MiB carried) in {took:?}; {entries} entries meanwhile",
        snapshot >> 20,
        carried >> 20
    );
    assert!(cuts >= 3, "the link broke {cuts} times");
    assert!(cluster.store(3).status().snapshot > 0, "it came by a snapshot");
    let names: Vec<_> = std::fs::read_dir(cluster.data_dir(3).join("snapshots"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    let left = |name: &str| name.starts_with("incoming-") || name.starts_with("arrived-");
    assert!(!names.iter().any(|name| left(&name.to_string_lossy())), "{names:?}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_larger_than_what_any_connection_carries_arrives_while_writes_go_on() {
    a_snapshot_arrives_over_a_link_that_keeps_breaking(5_000, 4_096, 4 << 20).await;
}

/// Entries in a member's log.
fn log_entries(store: &Store) -> u64 {
    (store.status().last_log + 1).saturating_sub(store.log_begins_at())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_stays_bounded_while_a_member_is_away_and_it_catches_up_by_a_snapshot() {
    let snapshot_every = 500;
    let mut cluster = Cluster::start(snapshot_every).await;
    let drone_id = drone(cluster.store(1), "s1").await;
    let leader = cluster.leader().await;
    hold(cluster.store(leader), drone_id, "k", 64, 10).await;
    let away = *cluster.stores.keys().find(|id| **id != leader).unwrap();
    // It is followed entry by entry when it goes.
    cluster.store(away).wait_applied(cluster.store(leader).status().applied, DEADLINE).await.unwrap();
    cluster.stop(away).await;
    let renew = || {
        let keys = vec![RenewKey { backend_id: "ba-k0".into(), token: None }];
        propose(cluster.store(leader), Command::Renew(Renew { drone_id, keys }))
    };
    let mut most = BTreeMap::new();
    for _ in 0..5 {
        futures::stream::iter((0..2_000).map(|_| renew())).buffer_unordered(64).collect::<Vec<_>>().await;
        for (id, store) in &cluster.stores {
            let entries = most.entry(*id).or_insert(0);
            *entries = log_entries(store).max(*entries);
        }
    }
    // Kept beside a snapshot, written since, and what may be written while one is made: that depends on the machine.
    let bound = snapshot_every / 2 + snapshot_every + 5_000;
    println!("most entries in a log, of 10,000 written: {most:?}");
    assert!(most.values().all(|entries| *entries <= bound), "{most:?}, expected at most {bound}");
    cluster.open(away).await;
    cluster.agree().await;
    assert!(cluster.store(away).status().snapshot > 0, "what it lacked is in a snapshot only");
    cluster.stop_all().await;
}

/// A backup of a member, as a file.
async fn save(store: &Store, file: &Path) -> raft_store::backup_file::Summary {
    let mut backup = store.backup().await.unwrap();
    let mut out = tokio::fs::File::create(file).await.unwrap();
    while let Some(bytes) = backup.chunks.recv().await {
        out.write_all(&bytes.unwrap()).await.unwrap();
    }
    out.sync_all().await.unwrap();
    raft_store::backup_file::inspect(std::fs::File::open(file).unwrap()).unwrap()
}

fn rows(file: &Path) -> Vec<raft_store::backup_file::Row> {
    let mut reader = raft_store::backup_file::Reader::open(std::fs::File::open(file).unwrap()).unwrap();
    let mut all = Vec::new();
    while let Some(rows) = reader.next_rows().unwrap() {
        all.extend(rows);
    }
    all
}

fn options(file: &Path, cluster: &Cluster, id: u64) -> RestoreOptions {
    RestoreOptions {
        file: file.to_owned(),
        data_dir: cluster.data_dir(id),
        id,
        members: cluster.members(),
        above_token: 0,
        quarantine_ms: 0,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn backups_are_of_one_instant_whatever_is_written_meanwhile_and_the_same_on_every_member() {
    let mut cluster = Cluster::start(10_000).await;
    let drone_id = drone(cluster.store(1), "s1").await;
    hold(cluster.store(2), drone_id, "k", 2_000, 1_000).await;
    let stop = Arc::new(AtomicBool::new(false));
    // Changes the number of keys all the time: a backup that saw two instants would not count right.
    let (store, stopped) = (cluster.store(1).clone(), stop.clone());
    let writer = tokio::spawn(async move {
        let mut n = 0;
        while !stopped.load(Ordering::Relaxed) {
            n += 1;
            beat(&store, drone_id, "s1").await;
            hold(&store, drone_id, &format!("w{n}-"), 20, 100).await;
        }
        n
    });
    let mut indexes = Vec::new();
    for round in 0..4 {
        for (id, store) in &cluster.stores {
            store.linearizable(DEADLINE).await.unwrap();
            let summary = save(store, &cluster.dir.path().join(format!("{round}-{id}"))).await;
            assert!(summary.keys_held >= 2_000 && summary.backends_live == summary.keys_held);
            indexes.push(summary.index);
        }
    }
    stop.store(true, Ordering::Relaxed);
    assert!(writer.await.unwrap() > 1 && indexes.first() < indexes.last(), "{indexes:?}");
    cluster.agree().await;
    let mut all = Vec::new();
    for (id, store) in &cluster.stores {
        let file = cluster.dir.path().join(format!("still-{id}"));
        let summary = save(store, &file).await;
        let progress = store.local().view.progress().unwrap();
        assert_eq!((summary.state_checksum, summary.keys_held), (progress.checksum, progress.keys_held));
        all.push((summary.index, rows(&file)));
    }
    assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "two members' backups of one index differ");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_nobody_reads_any_more_ends_and_gives_its_place_free() {
    let mut cluster = Cluster::start(10_000).await;
    let drone_id = drone(cluster.store(1), "s1").await;
    hold(cluster.store(1), drone_id, "k", 1_000, 4_000).await;
    let store = cluster.store(1);
    let (first, second) = (store.backup().await.unwrap(), store.backup().await.unwrap());
    assert!(store.backup().await.unwrap_err().to_string().contains("backups are under way"));
    drop(first);
    // The place is free as soon as its thread has noticed.
    let began = Instant::now();
    while store.backup().await.is_err() {
        assert!(began.elapsed() < DEADLINE, "the place of an abandoned backup is never given free");
        tokio::task::yield_now().await;
    }
    drop(second);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_cluster_waits_one_full_expiry_and_its_tokens_lie_beyond_all_of_the_old_one() {
    let mut old = Cluster::plan(10_000);
    old.lease = "renew=1s,soft=2s,hard=3s,expiry=4s".parse().unwrap();
    old.open_all().await;
    let drone_id = drone(old.store(1), "s1").await;
    hold(old.store(1), drone_id, "k", 300, 10).await;
    let file = old.dir.path().join("backup");
    let leader = old.leader().await;
    let backup = save(old.store(leader), &file).await;
    assert_eq!((backup.keys_held, backup.backends_live, backup.drones), (300, 300, 1));
    // Held when the old cluster ends, and the backup does not know of it.
    beat(old.store(1), drone_id, "s1").await;
    let later = acquired(propose(old.store(1), acquire("later", "ba-later", drone_id, 10)).await);
    let old_secret = old.store(1).local().view.cluster().unwrap().unwrap().token_secret;
    old.stop_all().await;

    let mut new = Cluster::plan(10_000);
    new.lease = old.lease;
    for id in 1..=3 {
        let restored = restore(&options(&file, &new, id)).await.unwrap();
        assert_eq!((restored.index, restored.quarantine_ms), (backup.index + INDEX_JUMP, 4_000));
    }
    new.open_all().await;
    let began = Instant::now();
    let drone_id_again = drone(new.store(2), "s2").await;
    assert_eq!(drone_id_again, drone_id, "a drone keeps its number");
    let cluster = new.store(2).local().view.cluster().unwrap().unwrap();
    assert!(cluster.cluster_id.starts_with("restored-") && cluster.cluster_id != backup.cluster_id);
    assert!(cluster.token_secret != old_secret && cluster.lease == old.lease);
    let progress = new.store(2).local().view.progress().unwrap();
    assert_eq!(progress.keys_held, 0);
    assert!(progress.cluster_time_ms >= backup.cluster_time, "cluster time never falls");
    let known = new.store(2).local().view.backend("ba-k0").unwrap().unwrap();
    assert_eq!(known.state().status(), BackendStatus::Terminated);

    // Neither what the backup knows nor what it does not can be renewed.
    let keys = vec![
        RenewKey { backend_id: "ba-k0".into(), token: None },
        RenewKey { backend_id: "ba-later".into(), token: Some(later.token) },
    ];
    let renewed = propose(new.store(3), Command::Renew(Renew { drone_id, keys })).await.outcome;
    assert_eq!(renewed, Outcome::Renewed(vec![RenewOutcome::NotHolder, RenewOutcome::Unknown]));

    let mut refused = 0;
    let taken = loop {
        beat(new.store(1), drone_id, "s2").await;
        let answer = propose(new.store(1), acquire("later", "ba-new", drone_id, 10)).await;
        match answer.outcome {
            Outcome::Refused(Refusal::Restored { wait_ms }) => {
                assert!((1..=4_000).contains(&wait_ms));
                refused += 1;
            }
            Outcome::Acquired(holder) => break holder,
            other => panic!("{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(
        refused > 0 && began.elapsed() >= Duration::from_millis(3_500),
        "{refused}, {:?}",
        began.elapsed()
    );
    assert!(taken.token > later.token && taken.token > backup.index + INDEX_JUMP);
    // A backend's id is never used again, also after a restore.
    let again = propose(new.store(2), acquire("k0", "ba-k0", drone_id, 10)).await.outcome;
    assert_eq!(again, Outcome::Refused(Refusal::BackendIdUsed("ba-k0".into())));
    beat(new.store(2), drone_id, "s2").await;
    for n in 0..100 {
        acquired(
            propose(new.store(2), acquire(&format!("k{n}"), &format!("ba-again-{n}"), drone_id, 10)).await,
        );
    }
    new.agree().await;
    // It goes on after a restart, and its own backup can be restored again.
    let second = save(new.store(3), &new.dir.path().join("second")).await;
    assert_eq!(second.cluster_id, cluster.cluster_id);
    new.stop_all().await;
    new.open_all().await;
    assert_eq!(new.store(1).linearizable(DEADLINE).await.unwrap().view.progress().unwrap().keys_held, 101);
    new.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_gets_the_same_rows_from_the_same_backup_and_none_mixes_with_another() {
    let mut old = Cluster::start(10_000).await;
    let drone_id = drone(old.store(1), "s1").await;
    hold(old.store(1), drone_id, "a", 50, 10).await;
    let (first, second) = (old.dir.path().join("first"), old.dir.path().join("second"));
    save(old.store(1), &first).await;
    hold(old.store(1), drone_id, "b", 50, 10).await;
    save(old.store(1), &second).await;
    old.stop_all().await;

    let mut new = Cluster::plan(10_000);
    let mut prefixes = Vec::new();
    for (id, file) in [(1, &first), (2, &first), (3, &second)] {
        prefixes.push(restore(&options(file, &new, id)).await.unwrap().id_prefix);
    }
    assert!(prefixes[0] == prefixes[1] && prefixes[1] != prefixes[2]);
    new.open(1).await;
    new.open(2).await;
    let cluster_id = {
        drone(new.store(1), "s2").await;
        new.store(1).local().view.cluster().unwrap().unwrap().cluster_id
    };
    // The one of another backup neither takes part nor disturbs.
    new.open(3).await;
    let read = new.store(3).linearizable(Duration::from_secs(3)).await;
    assert!(read.is_err(), "a member restored from another backup has joined");
    drone(new.store(2), "s3").await;
    assert_eq!(new.store(2).local().view.cluster().unwrap().unwrap().cluster_id, cluster_id);
    assert_eq!(new.store(1).status().term, new.store(2).status().term);
    // Restored as it should have been, it joins: as a member that lost its disk.
    new.stop(3).await;
    std::fs::remove_dir_all(new.data_dir(3)).unwrap();
    restore(&options(&first, &new, 3)).await.unwrap();
    new.open(3).await;
    for _ in 0..140 {
        beat(new.store(1), drone_id, "s3").await;
    }
    new.agree().await;
    let mut all = Vec::new();
    for (id, store) in &new.stores {
        let file = new.dir.path().join(format!("backup-{id}"));
        save(store, &file).await;
        all.push(rows(&file));
    }
    assert!(all[0] == all[1] && all[1] == all[2]);
    new.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_unfinished_or_in_use_is_not_restored_and_says_so() {
    let mut old = Cluster::start(10_000).await;
    let drone_id = drone(old.store(1), "s1").await;
    hold(old.store(1), drone_id, "k", 200, 2_000).await;
    let file = old.dir.path().join("backup");
    let backup = save(old.store(1), &file).await;
    let used = options(&file, &old, 1);
    let error = restore(&used).await.unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    old.stop_all().await;
    let error = restore(&used).await.unwrap_err().to_string();
    assert!(error.contains("is not empty"), "{error}");

    let new = Cluster::plan(10_000);
    let whole = std::fs::read(&file).unwrap();
    let damaged = new.dir.path().join("damaged");
    for (content, named) in [
        (whole[..whole.len() / 2].to_vec(), "cut off"),
        (whole[..whole.len() - 1].to_vec(), "cut off"),
        (
            [&whole[..whole.len() / 2], &[whole[whole.len() / 2] ^ 4], &whole[whole.len() / 2 + 1..]]
                .concat(),
            "wrong checksum",
        ),
        ([whole.as_slice(), b"x"].concat(), "follow its end"),
        (b"something else".to_vec(), "not a backup"),
    ] {
        std::fs::write(&damaged, content).unwrap();
        let error = restore(&options(&damaged, &new, 1)).await.unwrap_err();
        assert!(matches!(error, RestoreError::Backup { .. }) && error.to_string().contains(named), "{error}");
        assert!(!new.data_dir(1).exists(), "{named}: nothing is made of it");
    }
    let mut other = options(&file, &new, 1);
    other.id = 9;
    assert!(matches!(restore(&other).await, Err(RestoreError::Arguments(_))));
    let mut far = options(&file, &new, 1);
    far.above_token = 1 << 53;
    assert!(matches!(restore(&far).await, Err(RestoreError::Arguments(_))));

    // A restore that was killed half-way: the directory is not opened, and the restore can be run again.
    let mut above = options(&file, &new, 1);
    above.above_token = backup.index + (1 << 33);
    std::fs::create_dir_all(new.data_dir(1).join("state/db-1")).unwrap();
    std::fs::write(new.data_dir(1).join("RESTORING"), b"").unwrap();
    let error = Store::open(new.config(1)).await.err().unwrap().to_string();
    assert!(error.contains("not finished"), "{error}");
    let restored = restore(&above).await.unwrap();
    assert_eq!(restored.index, above.above_token + INDEX_JUMP);
    let mut other = new.config(1);
    other.id = 2;
    let error = Store::open(other).await.err().unwrap().to_string();
    assert!(error.contains("belongs to member 1, not 2"), "{error}");
}

/// How much of a long test is done: `HOLDFAST_SOAK_…` or all of it.
fn soak(what: &str, all: u64) -> u64 {
    std::env::var(format!("HOLDFAST_SOAK_{what}")).map_or(all, |given| given.parse().unwrap())
}

/// Most memory this process has used, in MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make soak"]
async fn a_million_keys_reach_a_member_over_a_link_that_keeps_breaking_while_writes_go_on() {
    let keys = soak("KEYS", 1_000_000);
    a_snapshot_arrives_over_a_link_that_keeps_breaking(usize::try_from(keys).unwrap(), 10, keys * 48).await;
    println!("most memory of all three members together: {} MiB", peak_mib());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes: make soak"]
async fn the_files_of_the_log_stay_bounded_under_minutes_of_writes() {
    /// Bytes of one entry, about.
    const ENTRY_BYTES: usize = 64 << 10;
    let mut cluster = Cluster::start(2_000).await;
    let drone_id = drone(cluster.store(1), "s1").await;
    let leader = cluster.leader().await;
    acquired(propose(cluster.store(leader), acquire("k", "ba-k", drone_id, 10)).await);
    // Long to write down, and changes nothing: the key is held with another tag.
    let Command::Acquire(mut long) = acquire("k", "ba-other", drone_id, ENTRY_BYTES) else { unreachable!() };
    long.key.tag = "other".into();
    let began = Instant::now();
    let (mut entries, mut most) = (0_u64, 0);
    while began.elapsed() < Duration::from_secs(soak("SECONDS", 150)) {
        let batch = (0..500).map(|_| propose(cluster.store(leader), Command::Acquire(long.clone())));
        let answers = futures::stream::iter(batch).buffer_unordered(16).collect::<Vec<_>>().await;
        assert!(answers.iter().all(|a| matches!(a.outcome, Outcome::Refused(Refusal::TagMismatch { .. }))));
        entries += 500;
        most = bytes_below(&cluster.data_dir(leader).join("log")).max(most);
    }
    let written = entries * ENTRY_BYTES as u64;
    println!(
        "{entries} entries, {} MiB written to the log; its files were {} MiB at most, {} entries left",
        written >> 20,
        most >> 20,
        log_entries(cluster.store(leader))
    );
    assert!(most < 2 << 30, "the log's files reached {} MiB", most >> 20);
    cluster.stop_all().await;
}
