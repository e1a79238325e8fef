//! The drone's clock, and a timer that suspension cannot stretch.
//!
//! The drone's time is the wall clock read *once*, at the start of the process, plus what `CLOCK_BOOTTIME` has counted
//! since: NTP steps do not touch it, and a suspended machine's leases run out while it sleeps. Guards, which outlive the
//! drone, are given plain `CLOCK_BOOTTIME` instead.

use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Below this, a timer sleeps for the whole remaining time, in milliseconds; above, for half of it at most.
const FINE_MS: i64 = 100;
/// Setting a timer may take this long, in milliseconds; longer means that the machine was suspended in between.
const SET_MS_MAX: i64 = 5;
/// How often setting a timer is repeated for that reason.
const SET_ATTEMPTS_MAX: u32 = 10;

/// `CLOCK_BOOTTIME`, in milliseconds: counts suspension, unlike `CLOCK_MONOTONIC`, and is the same in every process.
pub fn boot_ms() -> i64 {
    let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `at` is a valid timespec to write to. The call is async-signal-safe, so it may run between fork and exec.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut at) };
    assert_eq!(rc, 0, "every Linux since 2.6.39 has CLOCK_BOOTTIME");
    at.tv_sec * 1_000 + at.tv_nsec / 1_000_000
}

/// The drone's clock: see the module.
#[derive(Debug, Clone, Copy)]
pub struct DroneClock {
    /// Drone time minus `CLOCK_BOOTTIME`, in milliseconds; fixed for the life of the process.
    offset_ms: i64,
}

impl DroneClock {
    /// Reads the wall clock, for the only time.
    pub fn start() -> Self {
        let wall_ms = match SystemTime::now().duration_since(UNIX_EPOCH) {
            Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX / 2),
            Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(0),
        };
        Self { offset_ms: wall_ms - boot_ms() }
    }

    /// A clock whose drone time is `CLOCK_BOOTTIME` plus this.
    #[cfg(test)]
    pub(crate) fn with_offset(offset_ms: i64) -> Self {
        Self { offset_ms }
    }

    /// Now, in milliseconds of drone time.
    pub fn now_ms(&self) -> i64 {
        boot_ms() + self.offset_ms
    }

    /// The moment of drone time that is `boot_ms` of `CLOCK_BOOTTIME`, both in milliseconds.
    pub fn of_boot_ms(&self, boot_ms: i64) -> i64 {
        boot_ms.saturating_add(self.offset_ms)
    }

    /// The moment of `CLOCK_BOOTTIME` that is `drone_ms` in drone time, both in milliseconds.
    pub fn to_boot_ms(&self, drone_ms: i64) -> i64 {
        drone_ms.saturating_sub(self.offset_ms)
    }
}

/// A one-shot timer on `CLOCK_BOOTTIME`.
///
/// It may fire early, never (but for scheduling) late: whoever waits for it reads the clock again and arms it anew.
/// It is armed with *relative* times, because libfaketime, which the tests put the drone's clock wrong with, shifts the
/// clock's readings but not the kernel's timers; for half the remaining time, so that a faked clock's wrong rate leaves
/// no more than a few milliseconds; and again if the machine was suspended between the reading and the arming.
#[derive(Debug)]
pub struct BootTimer {
    fd: TimerFd,
}

impl BootTimer {
    /// An unarmed timer, closed on exec.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Self { fd: TimerFd::new(ClockId::CLOCK_BOOTTIME, flags)? })
    }

    /// Arms it for a moment of `CLOCK_BOOTTIME` in milliseconds, or disarms it. A moment that has passed fires at once.
    pub fn arm(&self, at_boot_ms: Option<i64>) -> io::Result<()> {
        let Some(at_boot_ms) = at_boot_ms else {
            self.fd.unset()?;
            return Ok(());
        };
        for _ in 0..SET_ATTEMPTS_MAX {
            let before_ms = boot_ms();
            let remaining_ms = at_boot_ms.saturating_sub(before_ms);
            let sleep = match remaining_ms {
                // Zero would disarm it.
                ..=0 => TimeSpec::nanoseconds(1),
                1..=FINE_MS => TimeSpec::milliseconds(remaining_ms),
                _ => TimeSpec::milliseconds((remaining_ms / 2).max(FINE_MS)),
            };
            self.fd.set(Expiration::OneShot(sleep), TimerSetTimeFlags::empty())?;
            if boot_ms() - before_ms <= SET_MS_MAX {
                break;
            }
        }
        Ok(())
    }

    /// Takes the expiry, if it has fired. Never blocks.
    pub fn clear(&self) -> io::Result<()> {
        let mut count = [0u8; 8];
        match nix::unistd::read(self.fd.as_fd(), &mut count) {
            Ok(_) | Err(nix::errno::Errno::EAGAIN) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl AsRawFd for BootTimer {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_fd().as_raw_fd()
    }
}

impl AsFd for BootTimer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// [`BootTimer`] for tokio.
#[derive(Debug)]
pub struct AsyncBootTimer {
    timer: AsyncFd<BootTimer>,
}

impl AsyncBootTimer {
    /// An unarmed timer. Must be called in a tokio runtime.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a BootTimer owns its descriptor, and is the same one, until it is dropped.
        let timer = unsafe { AsyncFd::register_with_interest(BootTimer::new()?, Interest::READABLE) }?;
        Ok(Self { timer })
    }

    /// See [`BootTimer::arm`].
    pub fn arm(&self, at_boot_ms: Option<i64>) -> io::Result<()> {
        self.timer.get_ref().arm(at_boot_ms)
    }

    /// Waits until it fires; for ever while it is unarmed.
    pub async fn fired(&self) -> io::Result<()> {
        let mut ready = self.timer.readable().await?;
        ready.get_inner().clear()?;
        ready.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drone_time_and_boot_time_run_in_step() {
        let clock = DroneClock::start();
        let (drone_ms, boot) = (clock.now_ms(), boot_ms());
        assert!((clock.to_boot_ms(drone_ms) - boot).abs() <= 50);
        assert_eq!(clock.to_boot_ms(drone_ms + 1_000) - clock.to_boot_ms(drone_ms), 1_000);
    }

    #[tokio::test]
    async fn a_timer_that_is_armed_anew_until_the_moment_has_come_is_on_time() {
        let timer = AsyncBootTimer::new().unwrap();
        let at_ms = boot_ms() + 350;
        let mut wakes = 0;
        while boot_ms() < at_ms {
            timer.arm(Some(at_ms)).unwrap();
            timer.fired().await.unwrap();
            wakes += 1;
        }
        assert!(wakes >= 2, "it sleeps for half the time at first");
        assert!(boot_ms() - at_ms < 200);
    }

    #[tokio::test]
    async fn a_moment_that_has_passed_fires_at_once() {
        let timer = AsyncBootTimer::new().unwrap();
        timer.arm(Some(boot_ms() - 1_000)).unwrap();
        tokio::time::timeout(std::time::Duration::from_secs(5), timer.fired()).await.unwrap().unwrap();
    }
}
