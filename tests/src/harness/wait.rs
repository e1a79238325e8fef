//! Waiting for what can be looked at.

use std::fmt::Debug;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// Long enough for anything that takes an election or a lease on a busy machine.
pub const LONG: Duration = Duration::from_secs(25);
/// Long enough for anything that happens at once.
pub const SHORT: Duration = Duration::from_secs(10);

/// Time between two looks.
const POLL: Duration = Duration::from_millis(20);

/// Looks again and again until `look` says `Ok`. Panics after `patience` and shows what was seen last.
pub async fn wait_until<T, E: Debug>(
    what: &str,
    patience: Duration,
    mut look: impl AsyncFnMut() -> Result<T, E>,
) -> T {
    let begin = Instant::now();
    let end = begin + patience;
    let mut last: Option<E> = None;
    loop {
        match timeout_at(end, look()).await {
            Ok(Ok(value)) => return value,
            Ok(Err(seen)) => last = Some(seen),
            Err(_) => panic!("{what}: not within {patience:?}; a look did not end; seen before: {last:#?}"),
        }
        assert!(Instant::now() < end, "{what}: not within {patience:?}; last seen: {last:#?}");
        sleep(POLL).await;
    }
}

/// `CLOCK_BOOTTIME` in milliseconds, the clock of journals.
pub fn boot_ms() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME");
    u64::try_from(now.tv_sec() * 1000 + now.tv_nsec() / 1_000_000).expect("a positive time")
}
