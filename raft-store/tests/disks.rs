//! Data directories that do not belong where they are, and purges under way.

#![allow(clippy::unwrap_used)]

use raft_store::{Store, StoreConfig};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(20);

fn config(dir: &Path, addrs: &BTreeMap<u64, SocketAddr>, id: u64) -> StoreConfig {
    StoreConfig {
        id,
        data_dir: dir.join(id.to_string()),
        peer_listen: addrs[&id],
        advertise_url: format!("http://controller-{id}"),
        initial_cluster: addrs.iter().map(|(id, addr)| (*id, addr.to_string())).collect(),
        lease: None,
        terminated_keep_ms: 3_600_000,
        election_timeout_ms: 300,
        snapshot_every: 10_000,
        disk_reserve_bytes: 0,
    }
}

async fn start(dir: &Path, addrs: &BTreeMap<u64, SocketAddr>) -> Vec<Store> {
    let mut stores = Vec::new();
    for id in 1..=3 {
        stores.push(Store::open(config(dir, addrs, id)).await.unwrap());
    }
    for store in &stores {
        store.linearizable(DEADLINE).await.unwrap();
        // Formed, so that it knows which cluster it belongs to.
        let until = tokio::time::Instant::now() + DEADLINE;
        while store.local().view.cluster().unwrap().is_none() {
            assert!(tokio::time::Instant::now() < until, "the cluster is not formed");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    stores
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_of_another_cluster_is_refused_and_the_cluster_does_not_mind() {
    let addrs: BTreeMap<u64, SocketAddr> =
        (1..=3).map(|id| (id, TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())).collect();
    let (first, second) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    for store in start(first.path(), &addrs).await {
        store.stop().await;
    }
    let mut stores = start(second.path(), &addrs).await;
    stores.remove(0).stop().await;
    // Member 1 comes back with the data of the first cluster, whose members had the same addresses.
    let stranger = Store::open(config(first.path(), &addrs, 1)).await.unwrap();
    let why = tokio::time::timeout(DEADLINE, stranger.failed()).await.unwrap();
    assert!(why.contains("another cluster") && why.contains(&first.path().display().to_string()), "{why}");
    assert_eq!(stranger.not_ready(), Some(why));
    stranger.stop().await;
    for store in &stores {
        store.linearizable(DEADLINE).await.unwrap();
        assert_eq!(store.not_ready(), None);
    }
    let back = Store::open(config(second.path(), &addrs, 1)).await.unwrap();
    back.linearizable(DEADLINE).await.unwrap();
    stores.push(back);
    for store in stores {
        store.stop().await;
    }
}
