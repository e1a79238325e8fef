//! Three replicas in one process, on real disks and sockets.

#![allow(clippy::unwrap_used)]

use holdfast_core::command::{
    Acquire, Command, HeartbeatItem, Proposal, RegisterDrone, Renew, RenewKey, Spawn,
};
use holdfast_core::outcome::{Holder, Outcome, RenewOutcome};
use holdfast_wire::{KeyConfig, LeaseConfig};
use raft_store::{Answer, Store, StoreConfig};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(20);

fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

struct Cluster {
    dir: TempDir,
    addrs: BTreeMap<u64, SocketAddr>,
    stores: BTreeMap<u64, Store>,
    snapshot_every: u64,
}

impl Cluster {
    async fn start(snapshot_every: u64) -> Self {
        let addrs = (1..=3).map(|id| (id, free_addr())).collect();
        let mut this = Self { dir: TempDir::new().unwrap(), addrs, stores: BTreeMap::new(), snapshot_every };
        for id in 1..=3 {
            this.open(id).await;
        }
        this
    }

    fn config(&self, id: u64) -> StoreConfig {
        StoreConfig {
            id,
            data_dir: self.dir.path().join(id.to_string()),
            peer_listen: self.addrs[&id],
            advertise_url: format!("http://controller-{id}"),
            initial_cluster: self.addrs.iter().map(|(id, addr)| (*id, addr.to_string())).collect(),
            lease: Some(LeaseConfig::default()),
            terminated_keep_ms: 3_600_000,
            election_timeout_ms: 500,
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
}

async fn propose(store: &Store, command: Command) -> Answer {
    store.propose(Proposal { command, idempotency: None }, DEADLINE).await.unwrap()
}

async fn drone(store: &Store) -> i32 {
    let register = RegisterDrone {
        cluster: "c".into(),
        name: "dr-a".into(),
        pool: String::new(),
        incarnation: "i1".into(),
        data_id: None,
        address: String::new(),
        session: "s1".into(),
        controller: 1,
        take_over: false,
        version: "0".into(),
        git_hash: "0".into(),
    };
    let Outcome::Registered { drone_id } = propose(store, Command::RegisterDrone(register)).await.outcome
    else {
        panic!("not registered")
    };
    heartbeat(store, drone_id).await;
    drone_id
}

async fn heartbeat(store: &Store, drone_id: i32) {
    let beat = HeartbeatItem { drone_id, session: "s1".into(), local_time_ms: 1_000 };
    propose(store, Command::Heartbeats(vec![beat])).await;
}

fn acquire(name: &str, backend_id: &str, drone_id: i32) -> Command {
    Command::Acquire(Box::new(Acquire {
        key: KeyConfig { name: name.into(), ..KeyConfig::default() },
        spawn: Some(Spawn {
            backend_id: backend_id.into(),
            id_supplied: false,
            cluster: "c".into(),
            pool: String::new(),
            candidates: vec![drone_id],
            executable_json: "{}".into(),
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
        Outcome::Acquired(holder) => {
            assert_eq!(holder.token, answer.index, "the token is the log index of the acquisition");
            holder
        }
        other => panic!("not acquired: {other:?}"),
    }
}

async fn checksums_agree(cluster: &Cluster) {
    let index = cluster.store(cluster.leader().await).status().last_log;
    let mut seen = Vec::new();
    for store in cluster.stores.values() {
        store.wait_applied(index, DEADLINE).await.unwrap();
        seen.push(store.local().view.progress().unwrap());
    }
    let common = seen
        .iter()
        .map(|p| p.published.iter().copied().collect::<BTreeMap<_, _>>())
        .reduce(|a, b| a.into_iter().filter(|(index, _)| b.contains_key(index)).collect())
        .unwrap();
    assert!(!common.is_empty(), "the replicas have published no checksum in common: {seen:?}");
    for progress in &seen {
        for (index, value) in &progress.published {
            assert!(common.get(index).is_none_or(|agreed| agreed == value), "replicas differ at {index}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_takes_proposals_and_all_replicas_agree() {
    let mut cluster = Cluster::start(10_000).await;
    let drone_id = drone(cluster.store(1)).await;
    let mut last_token = 0;
    for n in 0..90_u64 {
        let store = cluster.store(n % 3 + 1);
        let holder = acquired(propose(store, acquire(&format!("k{n}"), &format!("ba-{n}"), drone_id)).await);
        assert!(holder.token > last_token);
        last_token = holder.token;
    }
    // A linearizable read on any member sees what was acknowledged by any other.
    for store in cluster.stores.values() {
        let read = store.linearizable(DEADLINE).await.unwrap();
        assert_eq!(read.view.key("", "k89").unwrap().unwrap().token, last_token);
        assert!(read.now_ms > 1_700_000_000_000, "cluster time is anchored at the wall clock");
    }
    checksums_agree(&cluster).await;
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_leader_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::start(10_000).await;
    let drone_id = drone(cluster.store(1)).await;
    let held = acquired(propose(cluster.store(2), acquire("k", "ba-1", drone_id)).await);
    let leader = cluster.leader().await;
    cluster.stop(leader).await;
    let other = *cluster.stores.keys().next().unwrap();
    let found = propose(cluster.store(other), acquire("k", "ba-2", drone_id)).await.outcome;
    let Outcome::Found(found) = found else { panic!("{found:?}") };
    assert_eq!((found.backend_id.as_str(), found.token), ("ba-1", held.token));
    let renewed = propose(
        cluster.store(other),
        Command::Renew(Renew {
            drone_id,
            keys: vec![RenewKey { backend_id: "ba-1".into(), token: Some(held.token) }],
        }),
    )
    .await;
    assert_eq!(renewed.outcome, Outcome::Renewed(vec![RenewOutcome::Renewed]));
    cluster.open(leader).await;
    let read = cluster.store(leader).linearizable(DEADLINE).await.unwrap();
    assert_eq!(read.view.key("", "k").unwrap().unwrap().token, held.token);
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_is_handed_over_on_request() {
    let mut cluster = Cluster::start(10_000).await;
    drone(cluster.store(1)).await;
    let leader = cluster.leader().await;
    assert!(cluster.store(leader).transfer_leadership(DEADLINE).await);
    let other = *cluster.stores.keys().find(|id| **id != leader).unwrap();
    let mut watch = cluster.store(other).leader();
    let changed = watch.wait_for(|l| l.as_ref().is_some_and(|l| l.id != leader));
    let info = tokio::time::timeout(DEADLINE, changed).await.unwrap().unwrap().clone().unwrap();
    drone(cluster.store(leader)).await;
    assert!(info.url.is_none_or(|url| url.starts_with("http://controller-")));
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_follower_catches_up_from_a_snapshot_and_the_log_is_purged() {
    let mut cluster = Cluster::start(64).await;
    let drone_id = drone(cluster.store(1)).await;
    let leader = cluster.leader().await;
    let lost = *cluster.stores.keys().find(|id| **id != leader).unwrap();
    cluster.stop(lost).await;
    std::fs::remove_dir_all(cluster.dir.path().join(lost.to_string())).unwrap();
    let mut last = 0;
    for n in 0..400_u64 {
        let answer =
            propose(cluster.store(leader), acquire(&format!("k{n}"), &format!("ba-{n}"), drone_id)).await;
        last = acquired(answer).token;
    }
    cluster.open(lost).await;
    cluster.store(lost).wait_applied(last, DEADLINE).await.unwrap();
    {
        let view = cluster.store(lost).local().view;
        assert_eq!(view.key("", "k0").unwrap().unwrap().backend_id, "ba-0");
        assert_eq!(view.progress().unwrap().keys_held, 400);
    }
    assert!(cluster.store(lost).status().snapshot > 0, "it came by a snapshot");
    checksums_agree(&cluster).await;
    // It serves after a restart from what it was given, too.
    cluster.stop(lost).await;
    cluster.open(lost).await;
    let read = cluster.store(lost).linearizable(DEADLINE).await.unwrap();
    assert_eq!(read.view.progress().unwrap().keys_held, 400);
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_lease_durations_and_another_members_directory_are_refused() {
    let mut cluster = Cluster::start(10_000).await;
    drone(cluster.store(1)).await;
    cluster.stop(2).await;
    let mut config = cluster.config(2);
    config.lease = Some("renew=10s".parse().unwrap());
    let error = Store::open(config).await.err().unwrap().to_string();
    assert!(error.contains("renew=10s") && error.contains("renew=30s"), "{error}");
    let mut config = cluster.config(2);
    config.id = 3;
    let error = Store::open(config).await.err().unwrap().to_string();
    assert!(error.contains("belongs to member 2, not 3"), "{error}");
    let error = Store::open(cluster.config(1)).await.err().unwrap().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    cluster.open(2).await;
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_whose_state_is_older_than_its_snapshot_starts_from_the_snapshot_again_and_again() {
    let mut cluster = Cluster::start(64).await;
    let drone_id = drone(cluster.store(1)).await;
    let leader = cluster.leader().await;
    for n in 0..200_u64 {
        let answer =
            propose(cluster.store(leader), acquire(&format!("k{n}"), &format!("ba-{n}"), drone_id)).await;
        acquired(answer);
    }
    let member = *cluster.stores.keys().find(|id| **id != leader).unwrap();
    let last = cluster.store(leader).status().last_log;
    cluster.store(member).wait_applied(last, DEADLINE).await.unwrap();
    let state = cluster.dir.path().join(member.to_string()).join("state");
    for _ in 0..2 {
        cluster.stop(member).await;
        std::fs::remove_dir_all(&state).unwrap();
        cluster.open(member).await;
        cluster.store(member).wait_applied(last, DEADLINE).await.unwrap();
        assert_eq!(cluster.store(member).local().view.progress().unwrap().keys_held, 200);
    }
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_log_but_not_its_state_is_refused() {
    let mut cluster = Cluster::start(10_000).await;
    drone(cluster.store(1)).await;
    cluster.store(2).linearizable(DEADLINE).await.unwrap();
    cluster.stop(2).await;
    std::fs::remove_dir_all(cluster.dir.path().join("2/log")).unwrap();
    let error = Store::open(cluster.config(2)).await.err().unwrap().to_string();
    assert!(error.contains("lost its log"), "{error}");
    for id in [1, 3] {
        cluster.stop(id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_lost_its_disk_elects_nobody_who_lacks_what_it_had_acknowledged() {
    let mut cluster = Cluster::start(10_000).await;
    let drone_id = drone(cluster.store(1)).await;
    let leader = cluster.leader().await;
    let others: Vec<u64> = cluster.stores.keys().copied().filter(|id| *id != leader).collect();
    let (wiped, lagging) = (others[0], others[1]);
    let base = cluster.store(leader).status().last_log;
    cluster.store(lagging).wait_applied(base, DEADLINE).await.unwrap();
    cluster.stop(lagging).await;
    // Acknowledged by the leader and the one that loses its disk.
    let held = acquired(propose(cluster.store(leader), acquire("k", "ba-1", drone_id)).await);
    cluster.stop(leader).await;
    cluster.stop(wiped).await;
    std::fs::remove_dir_all(cluster.dir.path().join(wiped.to_string())).unwrap();
    cluster.open(lagging).await;
    cluster.open(wiped).await;
    // A majority runs, but one of it has forgotten: it must not go on without the entry.
    let read = cluster.store(lagging).linearizable(Duration::from_secs(5)).await;
    assert!(read.is_err(), "the two that lack the entry elected a leader");
    // With the third it goes on, and the wiped one catches up under a leader that never changes.
    cluster.open(leader).await;
    for store in cluster.stores.values() {
        let read = store.linearizable(DEADLINE).await.unwrap();
        assert_eq!(read.view.key("", "k").unwrap().unwrap().token, held.token);
    }
    checksums_agree(&cluster).await;
    for id in 1..=3 {
        cluster.stop(id).await;
    }
}
