//! What a checkpoint of a large state costs those who write meanwhile: `make soak` prints it.

use crate::state_db::StateHandle;
use crate::types::{CommittedLeader, LogId};
use holdfast_core::codec::encode;
use holdfast_core::kv::{Table, Writes, keys};
use holdfast_core::records::KeyRecord;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const KEYS: u64 = 1_000_000;
/// Renewals in one committed batch.
const BATCH: u64 = 64;

fn key(n: u64, expires_at_ms: u64) -> ((Table, Vec<u8>), Option<Vec<u8>>) {
    let record = KeyRecord {
        tag: String::new(),
        backend_id: format!("ba-{n:012}"),
        drone_id: 1,
        token: n,
        allow_renew: true,
        acquired_at_ms: 1_700_000_000_000,
        expires_at_ms,
        indexed_at_ms: 1_700_000_060_000,
    };
    ((Table::Keys, keys::pair("", &format!("key-{n:012}"))), Some(encode(&record)))
}

fn at(index: u64) -> LogId {
    LogId { leader_id: CommittedLeader::new(1), index }
}

fn percentile(sorted: &[Duration], share: f64) -> Duration {
    sorted[((sorted.len() - 1) as f64 * share) as usize]
}

/// Commits renewals until told to stop; the latency of each.
fn renew(state: &StateHandle, from: u64, stop: &dyn Fn() -> bool) -> Vec<Duration> {
    let mut latencies = Vec::new();
    let mut index = from;
    while !stop() {
        index += 1;
        let keys =
            (0..BATCH).map(|n| key((index * BATCH * 7919 + n * 104_729) % KEYS, 1_700_000_060_000 + index));
        let writes: Writes = keys.collect();
        let began = Instant::now();
        state.commit(writes, at(index), None).unwrap();
        latencies.push(began.elapsed());
        // As fast as a busy leader, not as fast as memory.
        std::thread::sleep(Duration::from_micros(200));
    }
    latencies.sort();
    latencies
}

#[test]
#[ignore = "takes minutes: make soak"]
fn commits_go_on_while_a_checkpoint_of_a_million_keys_is_made() {
    let dir = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")).unwrap();
    let state = StateHandle::open(&dir.path().join("state")).unwrap();
    for batch in 0..KEYS / 1_000 {
        let writes: Writes = (0..1_000).map(|n| key(batch * 1_000 + n, 1_700_000_060_000)).collect();
        state.commit(writes, at(batch + 1), None).unwrap();
    }
    let show = |what: &str, latencies: &[Duration]| {
        println!(
            "{what}: {} commits of {BATCH} renewals, p50 {:?}, p99 {:?}, p99.9 {:?}, most {:?}",
            latencies.len(),
            percentile(latencies, 0.5),
            percentile(latencies, 0.99),
            percentile(latencies, 0.999),
            percentile(latencies, 1.0),
        );
    };
    let began = Instant::now();
    let quiet = renew(&state, 10_000, &|| began.elapsed() > Duration::from_secs(5));
    show("without checkpoints", &quiet);
    let stop = AtomicBool::new(false);
    let (busy, checkpoints) = std::thread::scope(|scope| {
        let writer = scope.spawn(|| renew(&state, 1_000_000, &|| stop.load(Ordering::Relaxed)));
        let mut took = Vec::new();
        let began = Instant::now();
        for n in 0.. {
            let aside = dir.path().join(format!("checkpoint-{n}"));
            let start = Instant::now();
            let meta = state.checkpoint(&aside).unwrap();
            took.push(start.elapsed());
            assert!(meta.last_log_id.is_some());
            std::fs::remove_dir_all(&aside).unwrap();
            if began.elapsed() > Duration::from_secs(10) {
                break;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
        stop.store(true, Ordering::Relaxed);
        took.sort();
        (writer.join().unwrap(), took)
    });
    show("beside checkpoints", &busy);
    println!(
        "{} checkpoints of {KEYS} keys: half within {:?}, the longest {:?}",
        checkpoints.len(),
        percentile(&checkpoints, 0.5),
        percentile(&checkpoints, 1.0)
    );
    assert!(busy.len() > 1_000, "commits stood still: {}", busy.len());
}
