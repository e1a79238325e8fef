//! The cluster clock: the only source of cluster time. Pure: the caller gives it `CLOCK_BOOTTIME`.
//!
//! Cluster time is a counter in milliseconds since the epoch. A leader's stamp is `base + its own elapsed boot time`,
//! where `base` is the last stamp that its log and state hold when its reign begins, so cluster time stands still while
//! there is no leader and never runs ahead of elapsed real time (invariant 3).

use crate::command::Stamp;

/// Time without a leader after which heartbeats of earlier terms are no longer trusted to be fresh, in milliseconds.
pub const LONG_OUTAGE_MS: u64 = 5_000;

/// One term of one leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reign {
    term: u64,
    base_ms: u64,
    began_boot_ms: u64,
    last_stamp_ms: u64,
    own_term_only: bool,
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct ClusterClock {
    reign: Option<Reign>,
}

impl ClusterClock {
    /// A clock that has not reigned.
    pub fn new() -> Self {
        Self::default()
    }

    /// The stamp for an entry that this node appends as the leader of `term`.
    ///
    /// `last_logged_ms` is the larger of the last stamped entry in the log and the state's cluster time (in a new
    /// cluster, where both are zero, the anchor: the wall clock of the leader that forms it); it counts only when the
    /// reign begins with this stamp. `leaderless_ms` is how long this node had heard of no leader when it
    /// became one (`None` = unknown, as after a start), likewise. A stamp is for its term alone: a proposal that is
    /// appended in a later reign is stamped anew, because stamping happens at append.
    pub fn stamp(
        &mut self,
        term: u64,
        boot_ms: u64,
        last_logged_ms: u64,
        leaderless_ms: Option<u64>,
    ) -> Stamp {
        let reign = match &mut self.reign {
            Some(reign) if reign.term == term => reign,
            slot => slot.insert(Reign {
                term,
                base_ms: last_logged_ms,
                began_boot_ms: boot_ms,
                last_stamp_ms: last_logged_ms,
                own_term_only: leaderless_ms.is_none_or(|ms| ms > LONG_OUTAGE_MS),
            }),
        };
        let now_ms = reign.base_ms.saturating_add(boot_ms.saturating_sub(reign.began_boot_ms));
        reign.last_stamp_ms = reign.last_stamp_ms.max(now_ms);
        Stamp { cluster_time_ms: reign.last_stamp_ms, own_term_only: reign.own_term_only }
    }

    /// Cluster time now, while this node leads `term` and has stamped in it.
    pub fn now_ms(&self, term: u64, boot_ms: u64) -> Option<u64> {
        let reign = self.reign.as_ref().filter(|reign| reign.term == term)?;
        let now_ms = reign.base_ms.saturating_add(boot_ms.saturating_sub(reign.began_boot_ms));
        Some(now_ms.max(reign.last_stamp_ms))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reign_starts_at_the_last_stamp_and_runs_with_boot_time() {
        let mut clock = ClusterClock::new();
        assert_eq!(clock.stamp(1, 500, 10_000, Some(0)).cluster_time_ms, 10_000);
        // What the log holds later does not matter within the reign.
        assert_eq!(clock.stamp(1, 750, 99_999_999, Some(0)).cluster_time_ms, 10_250);
    }

    #[test]
    fn a_proposal_queued_in_one_reign_and_appended_in_a_later_one_is_stamped_by_the_later() {
        let mut clock = ClusterClock::new();
        clock.stamp(1, 0, 10_000, Some(0));
        clock.stamp(1, 60_000, 0, Some(0));
        // This node lost its leadership; others logged only up to 12 s. Its old reign would say 100 s.
        assert_eq!(clock.stamp(3, 90_000, 12_000, Some(0)).cluster_time_ms, 12_000);
        assert_eq!(clock.now_ms(1, 90_000), None);
    }

    #[test]
    fn time_never_falls_within_a_term_even_if_boot_time_does() {
        let mut clock = ClusterClock::new();
        clock.stamp(1, 1_000, 5_000, Some(0));
        assert_eq!(clock.stamp(1, 3_000, 0, Some(0)).cluster_time_ms, 7_000);
        assert_eq!(clock.stamp(1, 2_000, 0, Some(0)).cluster_time_ms, 7_000);
        assert_eq!(clock.now_ms(1, 2_000), Some(7_000));
    }

    #[test]
    fn after_a_long_or_unknown_time_without_a_leader_old_heartbeats_are_not_trusted() {
        for (leaderless, expected) in
            [(Some(0), false), (Some(5_000), false), (Some(5_001), true), (None, true)]
        {
            assert_eq!(ClusterClock::new().stamp(1, 0, 0, leaderless).own_term_only, expected);
        }
    }
}
