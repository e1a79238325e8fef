//! A leader whose log is not the one that this replica has applied: the replica stops for good. Such a leader is elected only
//! when a majority has lost what it promised, so a stranger plays it here.

use crate::api::StoreConfig;
use crate::codec::{WireLogId, WireVote};
use crate::membership::init::InitRequest;
use crate::membership::naming::{Disk, DiskIdentity, Me, Starts};
use crate::membership::standing::Standing;
use crate::membership::waiting::Opened;
use crate::store::Store;
use crate::transport::Directory;
use crate::transport::client::RpcClient;
use crate::transport::wire::{Append, AppendReply, Reply, Request};
use crate::types::Member;
use holdfast_wire::LeaseConfig;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::watch;

const DEADLINE: Duration = Duration::from_secs(20);

async fn lone_member(dir: &TempDir) -> Store {
    let peer_listen = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config = StoreConfig {
        data_dir: dir.path().to_owned(),
        peer_listen,
        advertise_url: "http://127.0.0.1:1".into(),
        terminated_keep_ms: 1_000,
        election_timeout_ms: 200,
        snapshot_every: 1_000,
        disk_reserve_bytes: 0,
    };
    let Opened::Waiting(waiting) = Store::open(config.clone()).await.unwrap() else {
        panic!("it has a name")
    };
    let members = vec![peer_listen.to_string()];
    waiting.init(&InitRequest { members, lease: LeaseConfig::default() }).await.unwrap();
    waiting.close().await;
    let store = Store::open_member(config).await.unwrap();
    store.linearizable(DEADLINE).await.unwrap();
    store
}

/// Connects as a member that the store does not know.
fn stranger(store: &Store) -> RpcClient {
    let mut starts = Starts::default();
    starts.begin();
    let disk = Disk { identity: DiskIdentity::random(), starts };
    let me = Me { id: 2, cluster_id: store.inner.naming.cluster_id.clone(), disk };
    let directory = Directory::new(me, "http://127.0.0.1:2".into(), Standing::new(watch::Sender::default()));
    let identity = store.inner.directory.me.disk.identity;
    let peer_addr = store.inner.config.peer_listen.to_string();
    RpcClient::new(Arc::new(directory), 1, Member { peer_addr, identity })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_contradicts_what_is_committed_stops_the_replica() {
    let dir = TempDir::new().unwrap();
    let store = lone_member(&dir).await;
    let committed = store.inner.log.committed().unwrap();
    let client = stranger(&store);
    let append = |term, prev_term| {
        Request::Append(Append {
            vote: WireVote { term, node: 2, committed: true },
            prev: Some(WireLogId { term: prev_term, index: committed.index }),
            commit: None,
            entries: Vec::new(),
        })
    };
    let deposed = client.request(&append(0, committed.leader_id.term + 1), DEADLINE).await.unwrap();
    assert!(matches!(deposed, Reply::Append(AppendReply::HigherVote(_))), "{deposed:?}");
    assert_eq!(store.not_ready(), None, "a deposed leader stops no one");
    let answer = client.request(&append(99, committed.leader_id.term + 1), DEADLINE).await.unwrap();
    assert!(matches!(&answer, Reply::Failed(why) if why.contains("another log")), "{answer:?}");
    let why = tokio::time::timeout(DEADLINE, store.failed()).await.unwrap();
    assert!(why.contains("acknowledged entries were lost elsewhere"), "{why}");
    store.stop().await;
}
