//! Every bound on what the outside world may send, in one place.

/// Longest name of a backend, drone, pool or subdomain, in bytes.
pub const NAME_BYTES_MAX: usize = 45;
/// Longest key name, in bytes.
pub const KEY_NAME_BYTES_MAX: usize = 1024;
/// Longest key namespace, in bytes.
pub const KEY_NAMESPACE_BYTES_MAX: usize = 256;
/// Longest key tag, in bytes.
pub const KEY_TAG_BYTES_MAX: usize = 256;
/// Longest HTTP body and longest drone socket message, in bytes.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Longest `Idempotency-Key` header, in bytes.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;
/// Longest user name of a connection token, in bytes.
pub const USER_BYTES_MAX: usize = 256;
/// Longest cluster name (`HOST:PORT`), in bytes.
pub const CLUSTER_BYTES_MAX: usize = 255;
/// Longest wait of a connect request, in milliseconds; a longer `wait_ms` is capped to it.
pub const WAIT_MS_MAX: u64 = 120_000;
/// `wait_ms` of a connect request that gives none, in milliseconds.
pub const WAIT_MS_DEFAULT: u64 = 30_000;
/// Most keys in one `RenewKeys` message.
pub const RENEW_KEYS_MAX: usize = 4096;
/// Most backends in one `BackendActivity` message.
pub const ACTIVITIES_MAX: usize = 1024;
/// Most backends in one `Backends` message.
pub const BACKENDS_PER_PAGE_MAX: usize = 1024;
/// Most backends that a drone lists in one session. Drones of 20,000 backends are supported; the rest is room for what has
/// ended and is not acknowledged yet.
pub const BACKENDS_LISTED_MAX: usize = 65_536;
/// Longest time until the deadline of a drain, in milliseconds: thirty days.
pub const DRAIN_DEADLINE_MS_MAX: u64 = 30 * 24 * 60 * 60 * 1000;
/// Rows of a listing that names no limit.
pub const LIST_LIMIT_DEFAULT: usize = 100;
/// Most rows of one page of a listing.
pub const LIST_LIMIT_MAX: usize = 1000;
