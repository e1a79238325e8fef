//! Data directories that do not belong where they are.

#![allow(clippy::unwrap_used)]

use holdfast_wire::LeaseConfig;
use raft_store::{Store, StoreConfig};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

mod common;

const DEADLINE: Duration = Duration::from_secs(20);

fn config(dir: &Path, addrs: &BTreeMap<u64, SocketAddr>, id: u64) -> StoreConfig {
    StoreConfig {
        data_dir: dir.join(id.to_string()),
        peer_listen: addrs[&id],
        advertise_url: format!("http://controller-{id}"),
        terminated_keep_ms: 3_600_000,
        election_timeout_ms: 300,
        snapshot_every: 10_000,
        disk_reserve_bytes: 0,
    }
}

fn addrs() -> BTreeMap<u64, SocketAddr> {
    (1..=3).map(|id| (id, TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())).collect()
}

async fn form(dir: &Path, addrs: &BTreeMap<u64, SocketAddr>) -> Vec<Store> {
    let configs: Vec<StoreConfig> = (1..=3).map(|id| config(dir, addrs, id)).collect();
    let dialled = addrs.values().map(SocketAddr::to_string).collect();
    let stores = common::form(&configs, dialled, LeaseConfig::default()).await;
    for store in &stores {
        store.linearizable(DEADLINE).await.unwrap();
    }
    stores
}

fn problem(store: &Store, of: u64) -> Option<String> {
    store.status().members.into_iter().find(|member| member.id == of)?.problem
}

/// Waits until `store` has met what is wrong with a member, and gives it.
async fn met_problem(store: &Store, of: u64, said: &str) {
    let until = tokio::time::Instant::now() + DEADLINE;
    while !problem(store, of).is_some_and(|problem| problem.contains(said)) {
        assert!(tokio::time::Instant::now() < until, "{said:?}: {:?}", problem(store, of));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_of_another_cluster_at_a_members_address_disturbs_no_one() {
    let addrs = addrs();
    let (first, second) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for store in form(first.path(), &addrs).await {
        store.stop().await;
    }
    let mut stores = form(second.path(), &addrs).await;
    stores.remove(0).stop().await;
    // Member 1 comes back with the data of the first cluster, whose members had the same addresses.
    let stranger = common::reopen(&config(first.path(), &addrs, 1)).await;
    met_problem(&stranger, 2, "belongs to cluster").await;
    assert!(stranger.linearizable(Duration::from_millis(500)).await.is_err());
    met_problem(&stores[0], 1, "belongs to cluster").await;
    for store in &stores {
        store.linearizable(DEADLINE).await.unwrap();
        assert_eq!(store.not_ready(), None);
    }
    stranger.stop().await;
    let back = common::reopen(&config(second.path(), &addrs, 1)).await;
    back.linearizable(DEADLINE).await.unwrap();
    met_no_problem(&stores[0], 1).await;
    stores.push(back);
    for store in stores {
        store.stop().await;
    }
}

async fn met_no_problem(store: &Store, of: u64) {
    let until = tokio::time::Instant::now() + DEADLINE;
    while problem(store, of).is_some() {
        assert!(tokio::time::Instant::now() < until, "{:?}", problem(store, of));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), &to).unwrap();
        }
    }
}

/// Outside the fault model, but seen: peers that know a newer start refuse an older copy of a directory.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_was_set_back_is_refused_by_its_peers() {
    let addrs = addrs();
    let dir = TempDir::new().unwrap();
    let mut stores = form(dir.path(), &addrs).await;
    stores.remove(0).stop().await;
    copy_dir(&dir.path().join("1"), &dir.path().join("copy"));
    // Two more starts of the real one than of its copy, each seen by the others.
    for _ in 0..2 {
        let real = common::reopen(&config(dir.path(), &addrs, 1)).await;
        real.linearizable(DEADLINE).await.unwrap();
        for peer in &stores {
            met_no_problem(peer, 1).await;
        }
        real.stop().await;
    }
    let mut set_back = config(dir.path(), &addrs, 1);
    set_back.data_dir = dir.path().join("copy");
    let copy = common::reopen(&set_back).await;
    met_problem(&stores[0], 1, "was set back").await;
    met_problem(&copy, 2, "was set back").await;
    assert!(copy.linearizable(Duration::from_millis(500)).await.is_err());
    stores[0].linearizable(DEADLINE).await.unwrap();
    copy.stop().await;
    for store in stores {
        store.stop().await;
    }
}
