//! Bounds of the replicated state. All of them are constants and none is configuration of one node, because `apply`
//! depends on them (invariant 6).

/// How long the answer to a request with an `Idempotency-Key` is kept, in milliseconds of cluster time.
pub const IDEMPOTENCY_KEEP_MS: u64 = 10 * 60 * 1000;
/// Most idempotency records; past it connects that carry a key are refused as overloaded. Other requests, which may be
/// repeated without harm, are done without a record.
pub const IDEMPOTENCY_RECORDS_MAX: u64 = 1_000_000;
/// How long a terminated backend is kept, in milliseconds of cluster time, unless configured otherwise.
pub const TERMINATED_KEEP_MS_DEFAULT: u64 = 60 * 60 * 1000;
/// Most keys that one sweep entry names.
pub const SWEEP_KEYS_MAX: usize = 512;
/// Most terminated backends or idempotency records that one sweep entry deletes, each.
pub const SWEEP_RECORDS_MAX: usize = 512;
/// Most backends that one entry asks to end because of their limits.
pub const ENDS_PER_ENTRY_MAX: usize = 512;
/// Most backends of drones whose drain is due that one entry asks to end.
pub const DRAIN_ENDS_PER_ENTRY_MAX: usize = 512;
/// Most due drains that one entry looks at.
pub const DRAINS_PER_ENTRY_MAX: usize = 512;
/// Most activity reports in one entry.
pub const ACTIVITIES_PER_ENTRY_MAX: usize = 1024;
/// Most backend ids supplied by callers that are remembered as used; past it a supplied id is refused until others are
/// forgotten.
pub const SUPPLIED_IDS_MAX: u64 = 10_000_000;
/// For how long a supplied backend id is refused after its backend ended, in milliseconds of cluster time: thirty days.
pub const SUPPLIED_ID_KEEP_MS: u64 = 30 * 24 * 60 * 60 * 1000;
/// For how long the record of a drone is kept that is silent, has no backends and is not drained, in milliseconds of cluster
/// time: one day.
pub const DRONE_KEEP_MS: u64 = 24 * 60 * 60 * 1000;
/// A drone is filed under a newer time once it was heard of so much later, in milliseconds: not with every heartbeat.
pub const HEARD_REFILE_MS: u64 = 10_000;
/// Most backends that one entry of a drone's list names.
pub const LISTED_PER_ENTRY_MAX: usize = 1024;
/// Most users whose tokens are revoked for one backend.
pub const REVOKED_USERS_MAX: usize = 1000;
/// Most renewals in one entry.
pub const RENEWALS_PER_ENTRY_MAX: usize = 4096;
/// Most heartbeats in one entry.
pub const HEARTBEATS_PER_ENTRY_MAX: usize = 1024;
/// Most state reports in one entry.
pub const REPORTS_PER_ENTRY_MAX: usize = 1024;
/// Most action ids that one entry acknowledges.
pub const ACKS_PER_ENTRY_MAX: usize = 4096;
/// Most items ([`crate::command::FromDrone::items`]) in one entry of several sessions' commands; the largest command of
/// each kind fits.
pub const TOGETHER_ITEMS_MAX: usize = 8192;
const _: () = assert!(
    RENEWALS_PER_ENTRY_MAX < TOGETHER_ITEMS_MAX
        && REPORTS_PER_ENTRY_MAX < TOGETHER_ITEMS_MAX
        && ACKS_PER_ENTRY_MAX < TOGETHER_ITEMS_MAX
        && ACTIVITIES_PER_ENTRY_MAX < TOGETHER_ITEMS_MAX
);
/// How long a drone's name stays with a session that was heard of, in milliseconds of cluster time, against another
/// incarnation that does not take it over; with short leases half of `renew` if that is less.
pub const NAME_HELD_MS: u64 = 5_000;
/// Most drone candidates that an acquisition names.
pub const CANDIDATES_MAX: usize = 2;
/// Most drones ever registered (ids are never reused; the counter is an i32).
pub const DRONE_ID_MAX: i32 = i32::MAX;
/// Most backends listed as pending actions that one read returns to a drone session.
pub const ACTIONS_PER_READ_MAX: usize = 256;
/// The checksum is published at every multiple of this log index.
pub const CHECKSUM_EVERY: u64 = 64;
/// How many published checksums are kept, so that replicas at different positions can be compared.
pub const CHECKSUMS_KEPT: usize = 64;
/// Most runs of successive member ids that were ever used; past it a leader takes only an id next to a used one.
pub const MEMBER_ID_RANGES_MAX: usize = 1000;
/// Tokens stay below 2^53, so that JSON readers that use doubles keep them exact.
pub const TOKEN_MAX: u64 = (1 << 53) - 1;
