//! Scans of the whole state with floors under them: they find what they would find without.

use crate::state_db::StateHandle;
use crate::types::{CommittedLeader, LogId};
use holdfast_core::kv::{ReadState, Table, Writes};
use proptest::prelude::*;
use rocksdb::perf::{PerfContext, PerfMetric, PerfStatsLevel, set_perf_stats};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

const T: Table = Table::Terminated;

/// A state, with the index of its last entry.
struct Log(StateHandle, u64);

impl Log {
    fn open(dir: &std::path::Path) -> Self {
        Self(StateHandle::open(&dir.join("state")).unwrap(), 0)
    }

    fn commit(&mut self, rows: impl IntoIterator<Item = (Vec<u8>, Option<Vec<u8>>)>) {
        self.1 += 1;
        let writes: Writes = rows.into_iter().map(|(key, value)| ((T, key), value)).collect();
        self.0.commit(writes, LogId { leader_id: CommittedLeader::new(1), index: self.1 }, None).unwrap();
    }
}

#[derive(Debug, Clone)]
enum Turn {
    Put(u8),
    Delete(u8),
    DeleteBelow(u8),
    /// Into the database.
    Flush,
    Scan {
        start: Option<u8>,
        end: Option<u8>,
        limit: usize,
    },
}

fn turn() -> impl Strategy<Value = Turn> {
    prop_oneof![
        4 => any::<u8>().prop_map(Turn::Put),
        2 => any::<u8>().prop_map(Turn::Delete),
        1 => any::<u8>().prop_map(Turn::DeleteBelow),
        3 => Just(Turn::Flush),
        4 => (prop::option::weighted(0.3, any::<u8>()), prop::option::of(any::<u8>()), 1_usize..6)
            .prop_map(|(start, end, limit)| Turn::Scan { start, end, limit }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn scans_find_what_is_there_whatever_was_found_before(turns in prop::collection::vec(turn(), 1..80)) {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path());
        let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        for turn in turns {
            match turn {
                Turn::Put(key) => {
                    model.insert(vec![key], vec![1]);
                    log.commit([(vec![key], Some(vec![1]))]);
                }
                Turn::Delete(key) => {
                    model.remove(&vec![key]);
                    log.commit([(vec![key], None)]);
                }
                Turn::DeleteBelow(key) => {
                    let rest = model.split_off(&vec![key]);
                    log.commit(std::mem::replace(&mut model, rest).into_keys().map(|key| (key, None)));
                }
                Turn::Flush => log.0.make_durable().unwrap(),
                Turn::Scan { start, end, limit } => {
                    let start: Vec<u8> = start.into_iter().collect();
                    let end: Option<Vec<u8>> = end.map(|end| vec![end]);
                    let expected: Vec<_> = model
                        .range(start.clone()..)
                        .take_while(|(key, _)| end.as_ref().is_none_or(|end| *key < end))
                        .take(limit)
                        .map(|(key, value)| (key.clone(), value.clone()))
                        .collect();
                    prop_assert_eq!(log.0.scan(T, &start, end.as_deref(), limit).unwrap(), expected);
                }
            }
        }
    }
}

#[test]
fn rows_that_are_gone_are_walked_over_once() {
    const GONE: u32 = 5_000;
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path());
    let key = |n: u32| n.to_be_bytes().to_vec();
    log.commit((0..=GONE).map(|n| (key(n), Some(vec![]))));
    log.0.make_durable().unwrap();
    log.commit((0..GONE).map(|n| (key(n), None)));
    log.0.make_durable().unwrap();
    set_perf_stats(PerfStatsLevel::EnableCount);
    let walked_over = || {
        let mut counts = PerfContext::default();
        counts.reset();
        assert_eq!(log.0.scan(T, &[], None, 1).unwrap(), [(key(GONE), vec![])]);
        counts.metric(PerfMetric::InternalDeleteSkippedCount)
    };
    assert_eq!(walked_over(), u64::from(GONE));
    assert_eq!(walked_over(), 0);
    // The same when nothing is found.
    log.commit([(key(GONE), None)]);
    log.0.make_durable().unwrap();
    let end = key(GONE + 1);
    let mut counts = PerfContext::default();
    for walked_over in [1, 0] {
        counts.reset();
        assert_eq!(log.0.scan(T, &[], Some(&end), 1).unwrap(), []);
        assert_eq!(counts.metric(PerfMetric::InternalDeleteSkippedCount), walked_over);
    }
    set_perf_stats(PerfStatsLevel::Disable);
}

#[test]
fn a_row_below_all_others_is_seen_at_once_while_others_look_at_every_moment_of_its_writing() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path());
    log.commit([(b"z".to_vec(), Some(vec![]))]);
    log.0.make_durable().unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            let (state, over) = (log.0.clone(), &over);
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let found = state.scan(T, &[], None, 2).unwrap();
                    assert!(found.last().is_some_and(|(key, _)| key == b"z"), "{found:?}");
                }
            });
        }
        for n in 0..1_000_u32 {
            let low = [b"a", n.to_be_bytes().as_slice()].concat();
            for there in [true, false] {
                log.commit([(low.clone(), there.then(Vec::new))]);
                log.0.flush().unwrap();
                let found = log.0.scan(T, &[], None, 1).unwrap();
                let seen = found.first().map(|(key, _)| key.as_slice());
                assert_eq!(seen, Some(if there { low.as_slice() } else { b"z" }), "round {n}");
            }
        }
        over.store(true, Ordering::Relaxed);
    });
}
