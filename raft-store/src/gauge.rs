//! What the disk is being asked right now, and how long it took before: written by the threads that wait for it, read by
//! those that must not.

use crate::boot_clock::boot_ms;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Upper bounds of the buckets of [`DiskTimes`], in microseconds: 0.1 ms to 10 s.
pub const BUCKETS_US: [u64; 16] = [
    100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 5_000_000, 10_000_000,
];

/// How long one kind of disk work took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DiskTimes {
    /// Works that have ended, well or not.
    pub count: u64,
    /// Their time together, in microseconds.
    pub sum_us: u64,
    /// How many of them took at most [`BUCKETS_US`], each bound by itself (not cumulative); the rest took longer.
    pub buckets: [u64; BUCKETS_US.len()],
    /// How long the work under way has taken so far, in milliseconds; none if there is none.
    pub under_way_ms: Option<u64>,
}

/// Of work that one thread does at a time.
#[derive(Debug, Default)]
pub struct Gauge {
    /// `CLOCK_BOOTTIME` in milliseconds; 0 = nothing is under way.
    since_boot_ms: AtomicU64,
    count: AtomicU64,
    sum_us: AtomicU64,
    buckets: [AtomicU64; BUCKETS_US.len()],
}

/// Work under way; it ends when this is dropped.
pub struct UnderWay<'a> {
    gauge: &'a Gauge,
    began: Instant,
}

impl Gauge {
    /// Work begins.
    pub fn begin(&self) -> UnderWay<'_> {
        self.since_boot_ms.store(boot_ms().max(1), Ordering::Release);
        UnderWay { gauge: self, began: Instant::now() }
    }

    /// How long the work under way has taken so far, in milliseconds.
    pub fn under_way_ms(&self) -> Option<u64> {
        let since = self.since_boot_ms.load(Ordering::Acquire);
        (since != 0).then(|| boot_ms().saturating_sub(since))
    }

    /// Everything.
    pub fn times(&self) -> DiskTimes {
        DiskTimes {
            count: self.count.load(Ordering::Relaxed),
            sum_us: self.sum_us.load(Ordering::Relaxed),
            buckets: std::array::from_fn(|i| self.buckets[i].load(Ordering::Relaxed)),
            under_way_ms: self.under_way_ms(),
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.gauge.since_boot_ms.store(0, Ordering::Release);
        self.gauge.count.fetch_add(1, Ordering::Relaxed);
        self.gauge.sum_us.fetch_add(us, Ordering::Relaxed);
        if let Some(bucket) = BUCKETS_US.iter().position(|bound| us <= *bound) {
            self.gauge.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_seen_while_it_is_under_way_and_counted_after() {
        let gauge = Gauge::default();
        assert_eq!(gauge.times(), DiskTimes::default());
        {
            let _under_way = gauge.begin();
            assert!(gauge.times().under_way_ms.is_some());
            assert_eq!(gauge.times().count, 0);
        }
        let times = gauge.times();
        assert_eq!((times.count, times.under_way_ms, times.buckets.iter().sum::<u64>()), (1, None, 1));
    }
}
