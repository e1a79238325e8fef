//! Bounds of the replicated state. All of them are constants and none is configuration of one node, because `apply`
//! depends on them (invariant 6).

/// How long the answer to a request with an `Idempotency-Key` is kept, in milliseconds of cluster time.
pub const IDEMPOTENCY_KEEP_MS: u64 = 10 * 60 * 1000;
/// Most idempotency records; past it requests that carry a key are refused as overloaded.
pub const IDEMPOTENCY_RECORDS_MAX: u64 = 1_000_000;
/// How long a terminated backend is kept, in milliseconds of cluster time, unless configured otherwise.
pub const TERMINATED_KEEP_MS_DEFAULT: u64 = 60 * 60 * 1000;
/// Most keys that one sweep entry names.
pub const SWEEP_KEYS_MAX: usize = 512;
/// Most terminated backends or idempotency records that one sweep entry deletes, each.
pub const SWEEP_RECORDS_MAX: usize = 512;
/// Most backends that one entry asks to end because of their limits.
pub const ENDS_PER_ENTRY_MAX: usize = 512;
/// Most backends that one entry looks at to find those of drones whose drain is due.
pub const DRAIN_LOOKS_PER_ENTRY_MAX: usize = 512;
/// Most due drains that one entry looks at.
pub const DRAINS_PER_ENTRY_MAX: usize = 512;
/// Most activity reports in one entry.
pub const ACTIVITIES_PER_ENTRY_MAX: usize = 1024;
/// Least difference between two times since which a backend is said to be idle that counts, in milliseconds: the way of a
/// report takes time, and one that is repeated must not make its backend younger.
pub const IDLE_SLACK_MS: u64 = 1000;
/// Most backend ids supplied by callers that are remembered as used; past it a supplied id is refused.
pub const SUPPLIED_IDS_MAX: u64 = 10_000_000;
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
/// The checksum is published at every multiple of this log index. The spacing is small, so that a cluster with few
/// entries compares soon: an idle leader proposes ticks up to the next multiple, which are fifteen at most. It depends on
/// the index alone. Were it a matter of cluster time, a replica with a wrong clock record would publish at indexes of its
/// own and never be found out.
pub const CHECKSUM_EVERY: u64 = 16;
/// Published checksums are kept in levels. Each level keeps the newest [`CHECKSUMS_PER_LEVEL`] multiples of its spacing,
/// which is [`CHECKSUM_EVERY`] on the first level and grows by this factor from level to level.
pub const CHECKSUM_LEVEL_FACTOR: u64 = 16;
/// Number of levels. With four of them the newest 256 entries are covered in steps of 16, and the newest million
/// (16 · 16³ · 16) in steps of 65,536. So two replicas have common indexes even if one of them is two snapshot intervals
/// behind, or thousands of entries were applied since its last answer.
pub const CHECKSUM_LEVELS: u32 = 4;
/// Published checksums that one level keeps.
pub const CHECKSUMS_PER_LEVEL: u64 = 16;
/// Most published checksums that are kept: those of all levels, those at the index of a recorded split and at the index
/// of the operator's last decision.
pub const CHECKSUMS_KEPT: usize = CHECKSUM_LEVELS as usize * CHECKSUMS_PER_LEVEL as usize + 2;
/// Most values that the record of a split names, one for each member.
pub const CHECKSUM_SPLIT_VALUES_MAX: usize = 32;
/// Most runs of successive member ids that were ever used; past it a leader takes only an id next to a used one.
pub const MEMBER_ID_RANGES_MAX: usize = 1000;
/// Tokens stay below 2^53, so that JSON readers that use doubles keep them exact.
pub const TOKEN_MAX: u64 = (1 << 53) - 1;
