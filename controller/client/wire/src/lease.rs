//! The lease timeline and the rule that makes it safe.

use crate::error::FieldError;
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Tolerated deviation of a clock's *rate*, in percent (ρ of the design).
pub const CLOCK_RATE_TOLERANCE_PERCENT: u64 = 5;
/// The least time left, after a hard deadline on the slowest clock, for the kill itself to take effect. Leases with an
/// expiry shorter than ten seconds (tests) scale it down to a twentieth of the expiry.
pub const KILL_MS_MAX: u64 = 2_000;
/// Longest expiry that can be set, in milliseconds (a day).
pub const EXPIRY_MS_MAX: u64 = 86_400_000;
/// Shortest `renew`, in milliseconds.
pub const RENEW_MS_MIN: u64 = 100;

/// Lease durations, replicated configuration of a cluster. All in milliseconds from the moment of acquisition or
/// renewal; the first three on the drone's clock, the last in cluster time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
pub struct LeaseConfig {
    /// When the drone should renew.
    pub renew_ms: u64,
    /// When the drone ends the backend gracefully.
    pub soft_terminate_ms: u64,
    /// When the drone kills the backend.
    pub hard_terminate_ms: u64,
    /// When the controllers treat the key as free.
    pub expiry_ms: u64,
}

impl Default for LeaseConfig {
    fn default() -> Self {
        Self { renew_ms: 30_000, soft_terminate_ms: 40_000, hard_terminate_ms: 50_000, expiry_ms: 60_000 }
    }
}

impl LeaseConfig {
    /// Time allowed for a kill to take effect under these durations, in milliseconds.
    pub fn kill_ms(&self) -> u64 {
        KILL_MS_MAX.min(self.expiry_ms / 20)
    }

    /// Checks order, bounds and `hard · (1+ρ)/(1−ρ) + time to kill ≤ expiry` (invariant 1).
    pub fn check(&self) -> Result<(), FieldError> {
        let err = |problem: String| Err(FieldError::new("lease", problem));
        if self.renew_ms < RENEW_MS_MIN {
            return err(format!("has renew={}ms; at least {RENEW_MS_MIN}ms is needed", self.renew_ms));
        }
        if !(self.renew_ms < self.soft_terminate_ms
            && self.soft_terminate_ms < self.hard_terminate_ms
            && self.hard_terminate_ms < self.expiry_ms)
        {
            return err(format!("must have renew < soft < hard < expiry, but is {self}"));
        }
        if self.expiry_ms > EXPIRY_MS_MAX {
            return err(format!("has expiry={}ms; at most {EXPIRY_MS_MAX}ms is allowed", self.expiry_ms));
        }
        let rho = CLOCK_RATE_TOLERANCE_PERCENT;
        let needed_ms = (self.hard_terminate_ms * (100 + rho)).div_ceil(100 - rho) + self.kill_ms();
        if needed_ms > self.expiry_ms {
            return err(format!(
                "leaves no margin: with clock rates {rho}% off and {}ms to kill, hard={}ms needs expiry ≥ {needed_ms}ms, but it is {}ms",
                self.kill_ms(),
                self.hard_terminate_ms,
                self.expiry_ms
            ));
        }
        Ok(())
    }

    /// Deadlines that start at `local_time_ms`, a moment of the drone's own clock.
    pub fn deadlines(&self, local_time_ms: i64) -> Deadlines {
        let at = |ms: u64| local_time_ms.saturating_add_unsigned(ms);
        Deadlines {
            renew_at: at(self.renew_ms),
            soft_terminate_at: at(self.soft_terminate_ms),
            hard_terminate_at: at(self.hard_terminate_ms),
        }
    }
}

/// The text form: `renew=30s,soft=40s,hard=50s,expiry=60s`.
impl fmt::Display for LeaseConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let d = |ms: u64| if ms.is_multiple_of(1000) { format!("{}s", ms / 1000) } else { format!("{ms}ms") };
        write!(
            f,
            "renew={},soft={},hard={},expiry={}",
            d(self.renew_ms),
            d(self.soft_terminate_ms),
            d(self.hard_terminate_ms),
            d(self.expiry_ms)
        )
    }
}

/// Parses a duration with a unit: `250ms`, `30s`, `2m`, `1h`. Returns milliseconds.
pub fn parse_duration_ms(field: &'static str, text: &str) -> Result<u64, FieldError> {
    let text = text.trim();
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let scale = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => {
            return Err(FieldError::new(
                field,
                format!("has {text:?}, which is not a duration like 250ms, 30s or 2m"),
            ));
        }
    };
    digits.parse::<u64>().ok().and_then(|n| n.checked_mul(scale)).ok_or_else(|| {
        FieldError::new(field, format!("has {text:?}, which is not a duration like 250ms, 30s or 2m"))
    })
}

impl FromStr for LeaseConfig {
    type Err = FieldError;

    /// Parses and checks. Parts that are left out keep their defaults.
    fn from_str(text: &str) -> Result<Self, FieldError> {
        let mut lease = Self::default();
        for part in text.split(',').filter(|p| !p.trim().is_empty()) {
            let Some((name, value)) = part.split_once('=') else {
                return Err(FieldError::new("lease", format!("has {part:?}, which is not NAME=DURATION")));
            };
            let ms = parse_duration_ms("lease", value)?;
            match name.trim() {
                "renew" => lease.renew_ms = ms,
                "soft" => lease.soft_terminate_ms = ms,
                "hard" => lease.hard_terminate_ms = ms,
                "expiry" => lease.expiry_ms = ms,
                other => {
                    return Err(FieldError::new(
                        "lease",
                        format!("has {other:?}; it knows renew, soft, hard and expiry"),
                    ));
                }
            }
        }
        lease.check()?;
        Ok(lease)
    }
}

/// Deadlines of one lease, milliseconds of the *drone's* clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
pub struct Deadlines {
    /// When the drone should renew.
    pub renew_at: i64,
    /// When the drone ends the backend gracefully.
    pub soft_terminate_at: i64,
    /// When the drone kills the backend.
    pub hard_terminate_at: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_safe_and_survives_its_text_form() {
        let lease = LeaseConfig::default();
        lease.check().unwrap();
        assert_eq!(lease.to_string(), "renew=30s,soft=40s,hard=50s,expiry=60s");
        assert_eq!(lease.to_string().parse::<LeaseConfig>().unwrap(), lease);
    }

    #[test]
    fn a_hard_deadline_too_near_the_expiry_is_refused() {
        // 54 s · 1.05/0.95 = 59.7 s, plus 2 s to kill: past 60 s.
        assert!("hard=54s".parse::<LeaseConfig>().unwrap_err().problem.contains("margin"));
        // 52 s · 1.05/0.95 = 57.5 s, plus 2 s: inside.
        assert!("hard=52s".parse::<LeaseConfig>().is_ok());
    }

    #[test]
    fn order_and_syntax_are_checked() {
        for bad in [
            "renew=40s",
            "soft=30s",
            "renew=1",
            "renew",
            "x=1s",
            "renew=10ms",
            "expiry=100h",
            "renew=99999999999999999999s",
        ] {
            assert_eq!(bad.parse::<LeaseConfig>().map_err(|e| e.field), Err("lease"), "{bad}");
        }
    }

    #[test]
    fn short_leases_for_tests_are_possible() {
        assert!("renew=1s,soft=2s,hard=3s,expiry=4s".parse::<LeaseConfig>().is_ok());
    }
}
