//! When a guard asks its backend to end, and when it kills. Pure; all times in milliseconds of `CLOCK_BOOTTIME`.

use super::{EndNow, Update};

/// What the guard has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing yet.
    Wait,
    /// SIGTERM.
    Term {
        /// Because of the soft deadline, not because the drone said so.
        by_deadline: bool,
    },
    /// SIGKILL.
    Kill,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// SIGTERM is due (told by the drone) or was sent.
    Ending {
        sent: bool,
        kill_at: i64,
    },
    Killing {
        sent: bool,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Timeline {
    soft_at: i64,
    hard_at: i64,
    phase: Phase,
}

impl Timeline {
    /// From the arming message.
    pub fn new(update: Update) -> Self {
        let mut timeline =
            Self { soft_at: update.soft_boot_ms, hard_at: update.hard_boot_ms, phase: Phase::Running };
        timeline.update(update);
        timeline
    }

    /// The drone has spoken. Deadlines only grow, and only while no end has begun.
    pub fn update(&mut self, update: Update) {
        if self.phase == Phase::Running {
            self.soft_at = self.soft_at.max(update.soft_boot_ms);
            self.hard_at = self.hard_at.max(update.hard_boot_ms);
        }
        match (update.end, self.phase) {
            (Some(EndNow::Soft { kill_boot_ms }), Phase::Running) => {
                self.phase = Phase::Ending { sent: false, kill_at: kill_boot_ms.min(self.hard_at) };
            }
            (Some(EndNow::Hard), Phase::Running | Phase::Ending { .. }) => {
                self.phase = Phase::Killing { sent: false };
            }
            _ => {}
        }
    }

    /// What is due now; each step is answered once.
    pub fn due(&mut self, now: i64) -> Step {
        match self.phase {
            Phase::Running | Phase::Ending { .. } if now >= self.hard_at => self.kill(),
            Phase::Running if now >= self.soft_at => {
                self.phase = Phase::Ending { sent: true, kill_at: self.hard_at };
                Step::Term { by_deadline: true }
            }
            Phase::Ending { kill_at, .. } if now >= kill_at => self.kill(),
            Phase::Ending { sent: false, kill_at } => {
                self.phase = Phase::Ending { sent: true, kill_at };
                Step::Term { by_deadline: false }
            }
            Phase::Killing { sent: false } => self.kill(),
            _ => Step::Wait,
        }
    }

    /// When [`Timeline::due`] next has something to say; none once the kill was ordered.
    pub fn next_wake(&self) -> Option<i64> {
        match self.phase {
            Phase::Running => Some(self.soft_at.min(self.hard_at)),
            Phase::Ending { sent: true, kill_at } => Some(kill_at.min(self.hard_at)),
            Phase::Ending { sent: false, .. } | Phase::Killing { sent: false } => Some(i64::MIN),
            Phase::Killing { sent: true } => None,
        }
    }

    /// Whether an end with a grace period has begun, and has not run out.
    pub fn is_ending_softly(&self) -> bool {
        matches!(self.phase, Phase::Ending { .. })
    }

    /// Whether the backend may be started now.
    pub fn may_start(&self, now: i64) -> bool {
        self.phase == Phase::Running && now < self.soft_at && now < self.hard_at
    }

    /// The latest moment at which anything may be alive, as far as is known by now.
    pub fn hard_at(&self) -> i64 {
        self.hard_at
    }

    /// From when on it may not, whatever comes.
    pub fn start_before(&self) -> i64 {
        self.soft_at.min(self.hard_at)
    }

    fn kill(&mut self) -> Step {
        self.phase = Phase::Killing { sent: true };
        Step::Kill
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(soft_boot_ms: i64, hard_boot_ms: i64, end: Option<EndNow>) -> Update {
        Update { soft_boot_ms, hard_boot_ms, end, ..Update::default() }
    }

    fn armed() -> Timeline {
        Timeline::new(update(100, 200, None))
    }

    #[test]
    fn left_alone_it_ends_softly_and_then_hard_each_once() {
        let mut timeline = armed();
        assert!(timeline.may_start(99) && !timeline.may_start(100));
        assert_eq!(timeline.due(99), Step::Wait);
        assert_eq!(timeline.next_wake(), Some(100));
        assert_eq!(timeline.due(100), Step::Term { by_deadline: true });
        assert_eq!(timeline.due(199), Step::Wait);
        assert_eq!(timeline.next_wake(), Some(200));
        assert_eq!(timeline.due(200), Step::Kill);
        assert_eq!(timeline.due(300), Step::Wait);
        assert_eq!(timeline.next_wake(), None);
    }

    #[test]
    fn renewed_deadlines_move_it_on_and_older_ones_do_not_move_it_back() {
        let mut timeline = armed();
        timeline.update(update(150, 250, None));
        timeline.update(update(90, 190, None));
        assert_eq!(timeline.due(149), Step::Wait);
        assert_eq!(timeline.due(150), Step::Term { by_deadline: true });
        timeline.update(update(1_000, 2_000, None));
        assert_eq!(timeline.due(250), Step::Kill, "an end that has begun is not put off");
    }

    #[test]
    fn a_soft_end_has_its_grace_but_never_past_the_hard_deadline() {
        let mut timeline = armed();
        timeline.update(update(100, 200, Some(EndNow::Soft { kill_boot_ms: 60 })));
        assert!(!timeline.may_start(10));
        assert_eq!(timeline.due(10), Step::Term { by_deadline: false });
        assert_eq!(timeline.due(59), Step::Wait);
        assert_eq!(timeline.due(60), Step::Kill);
        let mut timeline = armed();
        timeline.update(update(100, 200, Some(EndNow::Soft { kill_boot_ms: 900 })));
        timeline.due(10);
        assert_eq!(timeline.due(199), Step::Wait);
        assert_eq!(timeline.due(200), Step::Kill);
    }

    #[test]
    fn a_hard_end_kills_at_once_also_after_a_soft_one() {
        let mut timeline = armed();
        timeline.update(update(100, 200, Some(EndNow::Soft { kill_boot_ms: 60 })));
        timeline.due(10);
        timeline.update(update(100, 200, Some(EndNow::Hard)));
        assert_eq!(timeline.due(11), Step::Kill);
        timeline.update(update(100, 200, Some(EndNow::Hard)));
        assert_eq!(timeline.due(12), Step::Wait);
    }

    #[test]
    fn after_a_long_suspension_it_kills_without_asking() {
        assert_eq!(armed().due(5_000), Step::Kill);
    }
}
