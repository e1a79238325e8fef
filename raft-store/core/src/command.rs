//! What can be asked of the state machine: the payload of a log entry.

use bincode::{Decode, Encode};
use holdfast_wire::{BackendState, KeyConfig, LeaseConfig, TerminationKind, TerminationReason};

/// When an entry was appended, made by the leader of its term at append ([`crate::clock::ClusterClock`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Stamp {
    /// Cluster time in milliseconds since the epoch.
    pub cluster_time_ms: u64,
    /// Set while the leader does not trust heartbeats of earlier terms (it has just seen a long time without a
    /// leader, in which cluster time stood still): acquisitions choose only drones heard of in this term.
    pub own_term_only: bool,
}

/// Makes a request safe to repeat.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Idempotency {
    /// The caller's `Idempotency-Key`.
    pub key: String,
    /// Digest of the request (method, path, body); another body under the same key is refused.
    pub body_digest: [u8; 16],
}

/// A command with what goes with it. This is what a proposer encodes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Proposal {
    /// What to do.
    pub command: Command,
    /// Set when the request carried an `Idempotency-Key`.
    pub idempotency: Option<Idempotency>,
}

/// The commands. The order of variants and fields is the log's format: append only.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Command {
    /// First ordinary command of a new cluster: its stamp anchors cluster time. Changes nothing once formed.
    FormCluster(FormCluster),
    /// Changes the lease durations for later acquisitions and renewals. Refused while a key is held (a shorter expiry
    /// must not cut a lease that a drone was given).
    SetLease(LeaseConfig),
    /// Gets a key and schedules its backend, or finds its holder.
    Acquire(Box<Acquire>),
    /// Renews keys of one drone.
    Renew(Renew),
    /// Allows or prevents renewal.
    SetAllowRenew {
        /// Key namespace.
        namespace: String,
        /// Key name.
        name: String,
        /// Whether renewals are accepted.
        allow: bool,
    },
    /// Deletes an expired key.
    RevokeKey {
        /// Key namespace.
        namespace: String,
        /// Key name.
        name: String,
    },
    /// A drone opened a session.
    RegisterDrone(RegisterDrone),
    /// Heartbeats, coalesced.
    Heartbeats(Vec<HeartbeatItem>),
    /// State reports of one drone, in the order it made them.
    ReportStates(ReportStates),
    /// A drone received actions.
    AckActions {
        /// The drone.
        drone_id: i32,
        /// Their ids.
        action_ids: Vec<String>,
    },
    /// Asks for the end of a backend.
    Terminate {
        /// The backend.
        backend_id: String,
        /// How.
        kind: TerminationKind,
        /// Why.
        reason: TerminationReason,
    },
    /// Sets or clears draining.
    Drain {
        /// Cluster of the drone.
        cluster: String,
        /// Name of the drone.
        drone: String,
        /// Whether it takes no new backends. `false` undoes it, deadline and all.
        draining: bool,
        /// How much later what is left on it is asked to end, in milliseconds of cluster time. Without it a deadline that
        /// was set before stands.
        deadline_in_ms: Option<u64>,
    },
    /// Revokes the connection tokens of a user of a backend.
    RevokeTokens {
        /// The backend.
        backend_id: String,
        /// The user.
        user: String,
    },
    /// Tidies up: see [`Sweep`].
    Sweep(Sweep),
    /// Only moves cluster time.
    Tick,
    /// What drones' sessions ask for, in one entry for many of them. Each is done as if it had an entry of its own, in
    /// this order. Acquisitions can't be among them: a token is the index of an entry.
    Together(Vec<FromDrone>),
    /// Asks a bounded number of backends to end softly whose limits have passed, or whose drone's drain is due. Which ones
    /// is decided when it is applied, as of its own cluster time.
    EndDue,
}

/// Part of [`Command::Together`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum FromDrone {
    /// As [`Command::Renew`].
    Renew(Renew),
    /// As [`Command::ReportStates`].
    ReportStates(ReportStates),
    /// As [`Command::AckActions`].
    AckActions {
        /// The drone.
        drone_id: i32,
        /// Their ids.
        action_ids: Vec<String>,
    },
    /// What a drone sees of its backends' connections. Of another incarnation than the drone's it is ignored.
    Activity {
        /// The reporting drone.
        drone_id: i32,
        /// The incarnation that says so.
        incarnation: String,
        /// Number of the notice, which grows within the incarnation: of two about one backend the later one holds.
        activity_id: i64,
        /// What it sees.
        items: Vec<ActivityReport>,
    },
    /// A drone is shutting down and takes no new backends. Of another session than the drone's it is ignored.
    Leaving {
        /// The drone.
        drone_id: i32,
        /// The session it came on.
        session: String,
    },
    /// What follows from a drone's list of backends: see [`crate::listing`]. Of another session than the drone's it is
    /// ignored.
    Listed(Listed),
}

impl FromDrone {
    /// How much of an entry it takes ([`crate::limits::TOGETHER_ITEMS_MAX`]): its keys, reports or ids, and itself.
    pub fn items(&self) -> usize {
        1 + match self {
            Self::Renew(renew) => renew.keys.len(),
            Self::ReportStates(report) => report.reports.len(),
            Self::AckActions { action_ids, .. } => action_ids.len(),
            Self::Activity { items, .. } => items.len(),
            Self::Leaving { .. } => 0,
            Self::Listed(listed) => listed.items(),
        }
    }
}

/// See [`Command::FormCluster`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct FormCluster {
    /// Random.
    pub cluster_id: String,
    /// Random; key of the connection tokens' MAC.
    pub token_secret: [u8; 32],
    /// Lease durations.
    pub lease: LeaseConfig,
    /// How long terminated backends are kept, in milliseconds of cluster time.
    pub terminated_keep_ms: u64,
}

/// See [`Command::Acquire`]. Everything random in it was made by the proposer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Acquire {
    /// The key.
    pub key: KeyConfig,
    /// What to start if it is free; without it a free key is `KeyUnheldNoSpawnConfig`.
    pub spawn: Option<Spawn>,
}

/// The backend to start.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Spawn {
    /// Id of the new backend.
    pub backend_id: String,
    /// Whether the caller chose that id (it must then never have been used).
    pub id_supplied: bool,
    /// Cluster to schedule in.
    pub cluster: String,
    /// Pool to schedule in.
    pub pool: String,
    /// Drone ids to choose from, at most [`crate::limits::CANDIDATES_MAX`]: the eligible one with the fewest backends.
    pub candidates: Vec<i32>,
    /// The executable, JSON text.
    pub executable_json: String,
    /// Ended this long after scheduling, in seconds of cluster time.
    pub lifetime_limit_seconds: Option<u32>,
    /// Ended after this long without a connection, in seconds.
    pub max_idle_seconds: Option<u32>,
    /// One token for all connections.
    pub static_token: Option<String>,
    /// Lets the backend check that a request came through a proxy.
    pub secret_token: String,
    /// Subdomain of its URL.
    pub subdomain: Option<String>,
}

/// See [`Command::Renew`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Renew {
    /// The drone that asks.
    pub drone_id: i32,
    /// What it asks for; at most [`crate::limits::RENEWALS_PER_ENTRY_MAX`].
    pub keys: Vec<RenewKey>,
}

/// One key of [`Renew`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RenewKey {
    /// The backend that holds the key.
    pub backend_id: String,
    /// The fencing token; absent from a Plane drone.
    pub token: Option<u64>,
}

/// See [`Command::RegisterDrone`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RegisterDrone {
    /// Cluster.
    pub cluster: String,
    /// Name, unique in the cluster.
    pub name: String,
    /// Pool.
    pub pool: String,
    /// One for each start of the drone's process. For a drone that gives none the controller makes one per session.
    pub incarnation: String,
    /// One for each data directory; `None` for a drone of Plane's.
    pub data_id: Option<String>,
    /// IP address that the session came from; empty if it is not known.
    pub address: String,
    /// Random, one per session: later commands of an older session are refused.
    pub session: String,
    /// Member id of the controller that serves the session.
    pub controller: u64,
    /// Take the name even if another session holds it and was heard of lately: the same incarnation reconnecting, or a
    /// proposer that found the old session dead.
    pub take_over: bool,
    /// Drone's version.
    pub version: String,
    /// Drone's git hash.
    pub git_hash: String,
}

/// One heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct HeartbeatItem {
    /// The drone.
    pub drone_id: i32,
    /// The session it came on; of another session it is ignored.
    pub session: String,
    /// The drone's clock, in milliseconds.
    pub local_time_ms: i64,
}

/// See [`Command::ReportStates`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ReportStates {
    /// The reporting drone.
    pub drone_id: i32,
    /// Data directory of the process that reports; `None` for a drone of Plane's.
    pub data_id: Option<String>,
    /// The reports.
    pub reports: Vec<StateReport>,
}

/// Part of what follows from a drone's complete list; at most [`crate::limits::LISTED_PER_ENTRY_MAX`] backends.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Listed {
    /// The drone.
    pub drone_id: i32,
    /// The session that sent the list.
    pub session: String,
    /// Backends that it did not list, with their tokens.
    pub absent: Vec<(String, u64)>,
    /// Listed backends whose end was asked for: the drone is asked again.
    pub ending: Vec<String>,
    /// Listed backends whose spawn was not acknowledged: the drone has it.
    pub received: Vec<String>,
    /// Nothing follows: the list takes effect.
    pub last: bool,
}

impl Listed {
    /// How many backends it names.
    pub fn items(&self) -> usize {
        self.absent.len() + self.ending.len() + self.received.len()
    }
}

/// One state report.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct StateReport {
    /// The backend.
    pub backend_id: String,
    /// Its state.
    pub state: BackendState,
    /// The fencing token, where the drone gives it.
    pub token: Option<u64>,
}

/// Part of [`FromDrone::Activity`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ActivityReport {
    /// The backend.
    pub backend_id: String,
    /// The fencing token, where the drone gives it.
    pub token: Option<u64>,
    /// For how long it has had no connection, in milliseconds; `None` if it has some.
    pub idle_ms: Option<u64>,
}

/// Tidies up, in bounded batches. The proposer names what it saw; apply checks everything again as of the entry's own
/// cluster time.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Sweep {
    /// Keys that looked expired, with the token that was seen; at most [`crate::limits::SWEEP_KEYS_MAX`].
    pub keys: Vec<SweepKey>,
    /// Also delete up to [`crate::limits::SWEEP_RECORDS_MAX`] each of the terminated backends, idempotency records,
    /// supplied ids and silent drones that are past their time.
    pub records: bool,
}

/// One key of [`Sweep`], by its entry in the expiry index.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SweepKey {
    /// Expiry under which the index has it (may be stale), cluster time in milliseconds.
    pub indexed_at_ms: u64,
    /// Key namespace.
    pub namespace: String,
    /// Key name.
    pub name: String,
    /// Token that was seen.
    pub token: u64,
}
