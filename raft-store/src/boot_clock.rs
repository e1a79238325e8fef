//! `CLOCK_BOOTTIME`: counts suspension, never steps with NTP or `settimeofday`.

/// Milliseconds since the machine booted.
pub fn boot_ms() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec for the kernel to fill in.
    let code = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    assert!(code == 0, "CLOCK_BOOTTIME exists on every Linux since 2.6.39");
    now.tv_sec.cast_unsigned() * 1000 + now.tv_nsec.cast_unsigned() / 1_000_000
}

/// The wall clock in milliseconds since the epoch: read once, to anchor a new cluster's time.
pub fn wall_ms() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
        .max(1)
}
