//! A transaction on top of a state reads as if its writes were already in it.

#![allow(clippy::unwrap_used)]

use holdfast_core::kv::{MemState, ReadState, Table, Txn};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    Put(Table, Vec<u8>, u8),
    Delete(Table, Vec<u8>),
    BeginEntry,
}

/// Few and short keys over three byte values (the lowest, a middle and the highest), so that they meet.
fn keys() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop::sample::select(vec![0u8, 7, 255]), 0..4)
}

fn tables() -> impl Strategy<Value = Table> {
    prop::sample::select(vec![Table::Meta, Table::Keys, Table::KeyExpiry])
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(
        prop_oneof![
            4 => (tables(), keys(), any::<u8>()).prop_map(|(t, k, v)| Op::Put(t, k, v)),
            4 => (tables(), keys()).prop_map(|(t, k)| Op::Delete(t, k)),
            1 => Just(Op::BeginEntry),
        ],
        0..40,
    )
}

fn write(state: &mut MemState, ops: &[Op]) {
    let mut txn = Txn::new(&*state);
    replay(&mut txn, ops);
    let writes = txn.into_writes();
    state.commit(writes);
}

fn replay<R: ReadState>(txn: &mut Txn<'_, R>, ops: &[Op]) {
    for op in ops {
        match op {
            Op::Put(table, key, value) => txn.put(*table, key.clone(), vec![*value]),
            Op::Delete(table, key) => txn.delete(*table, key.clone()),
            Op::BeginEntry => txn.begin_entry(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_transaction_reads_like_the_committed_state(
        below in ops(),
        above in ops(),
        table in tables(),
        start in keys(),
        end in prop::option::of(keys()),
        limit in prop_oneof![0..6usize, Just(usize::MAX)],
    ) {
        let mut base = MemState::default();
        write(&mut base, &below);
        let mut committed = base.clone();
        write(&mut committed, &above);

        let mut txn = Txn::new(&base);
        replay(&mut txn, &above);
        let expected = committed.scan(table, &start, end.as_deref(), limit).unwrap();
        prop_assert_eq!(txn.scan(table, &start, end.as_deref(), limit).unwrap(), expected);
        prop_assert_eq!(txn.get(table, &start).unwrap(), committed.get(table, &start).unwrap());
    }
}

#[test]
fn the_writes_of_an_entry_are_those_since_it_began() {
    let base = MemState::default();
    let mut txn = Txn::new(&base);
    txn.put(Table::Keys, b"a".to_vec(), vec![1]);
    txn.begin_entry();
    txn.put(Table::Keys, b"b".to_vec(), vec![2]);
    txn.delete(Table::Keys, b"a".to_vec());
    let own: Vec<_> = txn.entry_writes().keys().map(|(_, key)| key.clone()).collect();
    assert_eq!(own, [b"a".to_vec(), b"b".to_vec()]);
    assert_eq!(txn.into_writes()[&(Table::Keys, b"a".to_vec())], None);
}
