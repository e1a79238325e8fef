//! The maps that hold what a drone knows of its backends. They exist so that the cost of an input can be counted: every
//! entry that is looked up, changed or walked over counts as one, and a test compares the counts at 100 and at 10,000
//! backends. So all state that grows with the number of backends lives in these two types.

use std::borrow::Borrow;
use std::collections::btree_map::{self, BTreeMap};
use std::collections::btree_set::BTreeSet;
use std::ops::Bound;

#[cfg(test)]
thread_local! {
    static TOUCHED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Entries touched by this thread so far.
#[cfg(test)]
pub(crate) fn touched() -> u64 {
    TOUCHED.get()
}

fn touch() {
    #[cfg(test)]
    TOUCHED.set(TOUCHED.get() + 1);
}

/// An ordered map.
#[derive(Debug)]
pub struct Table<K, V>(BTreeMap<K, V>);

impl<K, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<K: Ord, V> Table<K, V> {
    /// The entry of a key.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        touch();
        self.0.get(key)
    }

    /// The entry of a key, to change it.
    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        touch();
        self.0.get_mut(key)
    }

    /// The entry of a key, made if it is missing.
    pub fn entry(&mut self, key: K) -> btree_map::Entry<'_, K, V> {
        touch();
        self.0.entry(key)
    }

    /// Whether a key has an entry.
    pub fn contains<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        touch();
        self.0.contains_key(key)
    }

    /// Sets the entry of a key, and returns the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        touch();
        self.0.insert(key, value)
    }

    /// Removes the entry of a key.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        touch();
        self.0.remove(key)
    }

    /// The number of entries.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.0.iter().inspect(|_| touch())
    }

    /// All entries in order, to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        self.0.iter_mut().inspect(|_| touch())
    }

    /// The entries behind a key, or all.
    pub fn after<Q: Ord + ?Sized>(&self, key: Option<&Q>) -> impl Iterator<Item = (&K, &V)>
    where
        K: Borrow<Q>,
    {
        let from = key.map_or(Bound::Unbounded, Bound::Excluded);
        self.0.range::<Q, _>((from, Bound::Unbounded)).inspect(|_| touch())
    }
}

/// One moment for each key, in order of time.
#[derive(Debug)]
pub struct Schedule<K> {
    moments: BTreeMap<K, i64>,
    by_time: BTreeSet<(i64, K)>,
}

impl<K> Default for Schedule<K> {
    fn default() -> Self {
        Self { moments: BTreeMap::new(), by_time: BTreeSet::new() }
    }
}

impl<K: Ord + Clone> Schedule<K> {
    /// Sets the moment of a key, or takes it away.
    pub fn set(&mut self, key: &K, at: Option<i64>) {
        touch();
        let before = match at {
            Some(at) => self.moments.insert(key.clone(), at),
            None => self.moments.remove(key),
        };
        if before == at {
            return;
        }
        if let Some(before) = before {
            self.by_time.remove(&(before, key.clone()));
        }
        if let Some(at) = at {
            self.by_time.insert((at, key.clone()));
        }
    }

    /// The moment of a key.
    pub fn get(&self, key: &K) -> Option<i64> {
        touch();
        self.moments.get(key).copied()
    }

    /// The earliest moment.
    pub fn next(&self) -> Option<i64> {
        touch();
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Takes away the earliest key if its moment has come.
    pub fn pop_due(&mut self, now: i64) -> Option<K> {
        touch();
        if self.by_time.first()?.0 > now {
            return None;
        }
        let (_, key) = self.by_time.pop_first()?;
        self.moments.remove(&key);
        Some(key)
    }

    /// The keys whose moment is at or before `at`, earliest first.
    pub fn until(&self, at: i64) -> impl Iterator<Item = &K> {
        self.by_time
            .iter()
            .take_while(move |(moment, _)| *moment <= at)
            .inspect(|_| touch())
            .map(|(_, key)| key)
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.moments.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.moments.is_empty()
    }

    /// Takes away everything, in order of keys.
    pub fn take_all(&mut self) -> impl Iterator<Item = K> + use<K> {
        self.by_time.clear();
        std::mem::take(&mut self.moments).into_keys().inspect(|_| touch())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_holds_one_moment_for_each_key() {
        let mut schedule = Schedule::default();
        schedule.set(&"a", Some(5));
        schedule.set(&"b", Some(3));
        schedule.set(&"a", Some(1));
        assert_eq!((schedule.next(), schedule.len()), (Some(1), 2));
        assert_eq!(schedule.until(3).copied().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!((schedule.pop_due(0), schedule.pop_due(1), schedule.pop_due(1)), (None, Some("a"), None));
        schedule.set(&"b", None);
        assert!(schedule.is_empty() && schedule.next().is_none());
    }

    #[test]
    fn every_entry_that_is_walked_over_counts() {
        let mut table = Table::default();
        (0..10).for_each(|n| assert_eq!(table.insert(n, ()), None));
        let before = touched();
        assert_eq!(table.iter().count(), 10);
        assert_eq!(table.after(Some(&6)).count(), 3);
        assert_eq!(touched() - before, 13);
    }
}
