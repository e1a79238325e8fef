//! How fast a drone's clock runs, measured by this controller's.
//!
//! Exclusion rests on clock *rates* that differ by no more than the tolerance ρ. A heartbeat carries the drone's clock, so
//! a session can compare: the offset between the two clocks grows by the difference of their rates. What a heartbeat
//! takes on its way only lowers the offset that it shows; so of each few seconds the largest counts.
//!
//! ```text
//!   offset │            ·        x  largest of its bucket
//!          │   x   ·       x
//!          │ ·   x·  ·   x           slope = error of the drone's rate
//!          │x  ·   ·                 (or of ours: the leader's clock is the one that leases are counted by)
//!          └──────────────────▶ this controller's CLOCK_MONOTONIC
//! ```
//!
//! The error is shown in `/metrics` and, beyond ρ, logged. It changes nothing: a controller that was stalled cannot tell its
//! own clock from the drone's, and such clocks are outside the fault model.

use holdfast_wire::lease::CLOCK_RATE_TOLERANCE_PERCENT;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Heartbeats within this time count as one: the least delayed of them, in milliseconds.
const BUCKET_MS: i64 = 2_000;
/// Buckets that are remembered; the error is measured over half a minute.
const BUCKETS_MAX: usize = 16;
/// Nothing is said of a rate before this much time was measured, in milliseconds: a delay of a quarter of a second would
/// pass for 3 %.
const SPAN_MS_MIN: i64 = 8_000;
/// ρ, in millionths.
pub const TOLERANCE_PPM: i64 = CLOCK_RATE_TOLERANCE_PERCENT.cast_signed() * 10_000;
/// What a measurement may be off by itself, in millionths.
const MEASURED_PPM_MARGIN: i64 = 10_000;
/// From here on a clock counts as beyond what leases allow for.
const FAULT_PPM: i64 = TOLERANCE_PPM + MEASURED_PPM_MARGIN;
/// An error beyond this is a clock that was set, not one that runs fast; shown as this, in millionths.
const SHOWN_PPM_MAX: i64 = 10_000_000;
/// Most drones whose error is shown: those whose clocks are furthest off.
pub const SHOWN_MAX: usize = 50;

#[derive(Debug, Clone, Copy)]
struct Bucket {
    begin_ms: i64,
    offset_ms: i64,
    /// When the largest offset was seen, on this controller's clock.
    at_ms: i64,
}

/// The measurement of one session.
#[derive(Debug, Default)]
pub struct Drift {
    buckets: VecDeque<Bucket>,
    ppm: Option<i64>,
}

impl Drift {
    /// Takes a heartbeat's `local_ms` that came at `mine_ms` of this controller's clock. Gives the error of the drone's
    /// rate in millionths, positive for fast, whenever it is measured anew.
    pub fn heartbeat(&mut self, local_ms: i64, mine_ms: i64) -> Option<i64> {
        let offset_ms = local_ms.saturating_sub(mine_ms);
        if let Some(bucket) = self.buckets.back_mut()
            && mine_ms < bucket.begin_ms + BUCKET_MS
        {
            if offset_ms > bucket.offset_ms {
                (bucket.offset_ms, bucket.at_ms) = (offset_ms, mine_ms);
            }
            return None;
        }
        let measured = self.slope();
        self.buckets.push_back(Bucket { begin_ms: mine_ms, offset_ms, at_ms: mine_ms });
        if self.buckets.len() > BUCKETS_MAX {
            self.buckets.pop_front();
        }
        self.ppm = measured.or(self.ppm);
        measured
    }

    /// Between the first and the last bucket, both complete.
    fn slope(&self) -> Option<i64> {
        let (first, last) = (self.buckets.front()?, self.buckets.back()?);
        let span_ms = last.at_ms - first.at_ms;
        if span_ms < SPAN_MS_MIN {
            return None;
        }
        let grown_ms = last.offset_ms.saturating_sub(first.offset_ms);
        Some((grown_ms.saturating_mul(1_000_000) / span_ms).clamp(-SHOWN_PPM_MAX, SHOWN_PPM_MAX))
    }
}

#[derive(Debug)]
struct Row {
    drone: String,
    ppm: i64,
}

#[derive(Debug, Default)]
struct Rows {
    sessions: BTreeMap<String, Row>,
    faults: u64,
}

/// The errors of all drones that have a session here.
#[derive(Debug, Default)]
pub struct Drifts {
    rows: Arc<Mutex<Rows>>,
}

fn lock(rows: &Mutex<Rows>) -> MutexGuard<'_, Rows> {
    rows.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A session's measurement; it leaves the metrics when this is dropped.
#[derive(Debug)]
pub struct Measured {
    drift: Drift,
    session: String,
    /// The drone's name.
    drone: String,
    rows: Arc<Mutex<Rows>>,
}

impl Drop for Measured {
    fn drop(&mut self) {
        lock(&self.rows).sessions.remove(&self.session);
    }
}

impl Drifts {
    /// Begins to measure a session's drone.
    pub fn enter(&self, session: &str, drone: &str) -> Measured {
        Measured {
            drift: Drift::default(),
            session: session.to_owned(),
            drone: drone.to_owned(),
            rows: Arc::clone(&self.rows),
        }
    }

    /// Names and errors in millionths of those whose clocks are furthest off, and how often one was found beyond ρ.
    pub fn worst(&self) -> (Vec<(String, i64)>, u64) {
        let rows = lock(&self.rows);
        let mut all: Vec<_> = rows.sessions.values().map(|row| (row.drone.clone(), row.ppm)).collect();
        all.sort_by_key(|(_, ppm)| std::cmp::Reverse(ppm.abs()));
        // An older session of a drone may not have left yet.
        let mut seen = std::collections::BTreeSet::new();
        all.retain(|(drone, _)| seen.insert(drone.clone()));
        all.truncate(SHOWN_MAX);
        (all, rows.faults)
    }
}

impl Measured {
    /// See [`Drift::heartbeat`].
    pub fn heartbeat(&mut self, local_ms: i64, mine_ms: i64) {
        let Some(ppm) = self.drift.heartbeat(local_ms, mine_ms) else { return };
        let mut rows = lock(&self.rows);
        let before = rows.sessions.insert(self.session.clone(), Row { drone: self.drone.clone(), ppm });
        let was_off = before.is_some_and(|row| row.ppm.abs() > FAULT_PPM);
        if ppm.abs() > FAULT_PPM && !was_off {
            rows.faults += 1;
            tracing::error!(
                drone = self.drone,
                ppm,
                tolerance_ppm = TOLERANCE_PPM,
                "the drone's clock runs at another rate than this controller's, beyond what leases allow for"
            );
        } else if was_off && ppm.abs() <= FAULT_PPM {
            tracing::info!(drone = self.drone, ppm, "the drone's clock runs at a tolerable rate again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Heartbeats each 100 ms for `ms`, with a clock of this rate, each `delay` late.
    fn measured(rate: f64, ms: i64, delay: impl Fn(i64) -> i64) -> Drift {
        let mut drift = Drift::default();
        for sent_ms in (0..ms).step_by(100) {
            #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "small numbers")]
            let local_ms = 7_000_000 + (sent_ms as f64 * rate) as i64;
            drift.heartbeat(local_ms, 50_000 + sent_ms + delay(sent_ms));
        }
        drift
    }

    #[test]
    fn a_rate_is_measured_through_delays_of_most_heartbeats() {
        // Nine of ten come up to 400 ms late.
        let delay = |at: i64| if at % 1_000 == 0 { 0 } else { at * 7 % 400 };
        for (rate, ppm) in [(1.0, 0), (1.05, 50_000), (0.95, -50_000), (1.3, 300_000), (0.7, -300_000)] {
            let is = measured(rate, 30_000, delay).ppm.unwrap();
            assert!((is - ppm).abs() < 15_000, "{rate} is measured as {is}");
        }
    }

    #[test]
    fn nothing_is_said_before_enough_was_seen() {
        assert_eq!(measured(1.3, 8_000, |_| 0).ppm, None);
        assert!(measured(1.3, 13_000, |_| 0).ppm.is_some());
    }

    #[test]
    fn a_clock_that_was_set_counts_as_far_off_and_only_for_the_window() {
        let mut drift = measured(1.0, 20_000, |_| 0);
        drift.heartbeat(i64::MAX, 70_000);
        drift.heartbeat(i64::MIN, 73_000);
        drift.heartbeat(i64::MIN, 76_000);
        assert!(drift.ppm.unwrap().abs() <= SHOWN_PPM_MAX);
    }

    #[test]
    fn the_metrics_show_the_worst_and_forget_ended_sessions() {
        let drifts = Drifts::default();
        let mut all: Vec<_> =
            (0..SHOWN_MAX + 10).map(|i| drifts.enter(&format!("s-{i}"), &format!("dr-{i}"))).collect();
        for (i, measured) in all.iter_mut().enumerate() {
            for at_ms in (0..20_000).step_by(500) {
                let off = if i == 3 { at_ms / 10 } else { 0 };
                measured.heartbeat(at_ms + off, at_ms);
            }
        }
        let (worst, faults) = drifts.worst();
        assert_eq!((worst.len(), faults), (SHOWN_MAX, 1));
        assert!(worst[0].0 == "dr-3" && worst[0].1 > TOLERANCE_PPM, "{:?}", worst[0]);
        drop(all);
        assert_eq!(drifts.worst().0, []);
    }
}
