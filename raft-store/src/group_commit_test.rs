//! Group commit: what the log's one writer thread promises.

use crate::log_store::LogStore;
use crate::types::{
    CommittedLeader, LeaderId, LogEntry, LogId, Payload, Proposed, Stamper, TypeConfig, Vote,
};
use bytes::Bytes;
use holdfast_core::command::Stamp;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use std::io;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(20);

fn open(dir: &TempDir, before_purge: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> LogStore {
    let stamper = Arc::new(Stamper::default());
    LogStore::open(&dir.path().join("log"), stamper, Box::new(before_purge)).unwrap()
}

fn id(index: u64) -> LogId {
    LogId { leader_id: CommittedLeader::new(1), index }
}

fn entry(index: u64, bytes: usize) -> LogEntry {
    let stamp = Stamp { cluster_time_ms: index, own_term_only: false };
    let proposed = Proposed::decoded(Bytes::from(vec![7; bytes]), Some(stamp));
    LogEntry { log_id: id(index), payload: Payload::Normal(proposed) }
}

type Flushed = openraft::type_config::alias::OneshotReceiverOf<TypeConfig, Result<(), io::Error>>;

async fn append(log: &mut LogStore, index: u64, bytes: usize) -> Flushed {
    let (tx, rx) = TypeConfig::oneshot();
    log.append([entry(index, bytes)], IOFlushed::signal(tx)).await.unwrap();
    rx
}

async fn flushed(rx: Flushed) -> io::Result<()> {
    tokio::time::timeout(DEADLINE, rx).await.unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_queued_costs_one_sync_and_is_called_back_in_order() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, || Ok(()));
    let before = log.gauge().times().count;
    // While the writer is busy with the first, the others queue up.
    let mut waiting = vec![append(&mut log, 0, 4 << 20).await];
    for index in 1..=500 {
        waiting.push(append(&mut log, index, 100).await);
    }
    // A vote stands in the same queue.
    let vote = Vote { leader_id: LeaderId { term: 1, voted_for: 1 }, committed: true };
    log.save_vote(&vote).await.unwrap();
    // The vote came last, so everything before it has been called back.
    for (index, mut rx) in waiting.into_iter().enumerate() {
        rx.try_recv().unwrap_or_else(|_| panic!("{index} was not called back before the vote")).unwrap();
    }
    let syncs = log.gauge().times().count - before;
    assert!((1..100).contains(&syncs), "{syncs} syncs for 502 writes");
    assert_eq!(log.read_vote().await.unwrap(), Some(vote));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_waits_for_the_state_and_nothing_waits_for_the_purge() {
    let dir = TempDir::new().unwrap();
    let (release, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let mut log = open(&dir, move || released.lock().unwrap().recv().map_err(io::Error::other));
    for index in 0..10 {
        flushed(append(&mut log, index, 10).await).await.unwrap();
    }
    tokio::time::timeout(DEADLINE, log.purge(id(4))).await.expect("the caller does not wait").unwrap();
    // The state is not durable yet; entries are, all the same.
    flushed(append(&mut log, 10, 10).await).await.unwrap();
    assert_eq!(log.get_log_state().await.unwrap().last_purged_log_id, Some(id(4)));
    release.send(()).unwrap();
    log.stop();
    drop(log);
    let mut log = open(&dir, || Ok(()));
    let state = log.get_log_state().await.unwrap();
    assert_eq!((state.last_purged_log_id, state.last_log_id), (Some(id(4)), Some(id(10))));
    assert_eq!(log.try_get_log_entries(0..100).await.unwrap().first().unwrap().log_id, id(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_the_purge_finds_the_whole_log() {
    let dir = TempDir::new().unwrap();
    let (_never, released) = mpsc::channel::<()>();
    let released = Mutex::new(released);
    let mut log = open(&dir, move || released.lock().unwrap().recv().map_err(io::Error::other));
    for index in 0..10 {
        flushed(append(&mut log, index, 10).await).await.unwrap();
    }
    log.purge(id(4)).await.unwrap();
    // As it is on disk at this moment.
    let copy = TempDir::new().unwrap();
    std::fs::create_dir(copy.path().join("log")).unwrap();
    for file in std::fs::read_dir(dir.path().join("log")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.path().join("log").join(file.file_name())).unwrap();
    }
    let mut log = open(&copy, || Ok(()));
    assert_eq!(log.get_log_state().await.unwrap().last_purged_log_id, None);
    assert_eq!(log.try_get_log_entries(0..100).await.unwrap().len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_cannot_be_made_durable_stops_the_log_for_good() {
    let dir = TempDir::new().unwrap();
    let mut log = open(&dir, || Err(io::Error::other("no such luck")));
    for index in 0..10 {
        flushed(append(&mut log, index, 10).await).await.unwrap();
    }
    log.purge(id(4)).await.unwrap();
    let end = Instant::now() + DEADLINE;
    let mut index = 10;
    let error = loop {
        assert!(Instant::now() < end, "nothing failed");
        match flushed(append(&mut log, index, 10).await).await {
            Ok(()) => index += 1,
            Err(error) => break error.to_string(),
        }
    };
    assert!(error.contains("no such luck"), "{error}");
    assert!(flushed(append(&mut log, index + 1, 10).await).await.is_err(), "nobody knows what is on disk");
}
