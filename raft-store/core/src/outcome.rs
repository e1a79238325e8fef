//! What applying an entry answers.

use bincode::{Decode, Encode};
use holdfast_wire::{BackendState, KeyConfig, TerminationKind};

/// Answer of one entry.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Outcome {
    /// Done, and there is nothing to add (heartbeats, acknowledgements, lists, tick, sweep).
    Done,
    /// [`crate::command::Command::FormCluster`]: whether this entry formed it.
    Formed(bool),
    /// The key was free and is now held.
    Acquired(Holder),
    /// The key was held with the same tag.
    Found(Holder),
    /// The key is held under the same tag by a backend that is going away: wait for its release, then ask again.
    Leaving(Holder),
    /// Refused; nothing changed.
    Refused(Refusal),
    /// [`crate::command::Command::Renew`]: one for each key, in order.
    Renewed(Vec<RenewOutcome>),
    /// [`crate::command::Command::RegisterDrone`]: the drone's id.
    Registered {
        /// Never reused.
        drone_id: i32,
    },
    /// [`crate::command::Command::SetAllowRenew`], [`crate::command::Command::Terminate`], [`crate::command::Command::RevokeTokens`],
    /// [`crate::command::Command::RevokeKey`], [`crate::command::Command::SetLease`]: whether anything changed.
    Updated(bool),
    /// [`crate::command::Command::ReportStates`]: one for each report, in order.
    Reported(Vec<ReportOutcome>),
    /// [`crate::command::FromDrone::Activity`]: backends that end as idle unless they are used before, and after how many
    /// milliseconds.
    Idle(Vec<(String, u64)>),
    /// [`crate::command::Command::Together`]: the outcome of each, in order.
    Together(Vec<Outcome>),
    /// [`crate::command::Command::Drain`].
    Drained {
        /// Whether anything changed.
        updated: bool,
        /// Backends of the drone that have not terminated.
        remaining: u64,
    },
}

/// Who holds a key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Holder {
    /// The key, with the holder's tag.
    pub key: KeyConfig,
    /// The backend.
    pub backend_id: String,
    /// Its cluster.
    pub cluster: String,
    /// Name of its drone.
    pub drone: String,
    /// Fencing token.
    pub token: u64,
    /// State of the backend.
    pub state: BackendState,
    /// The hardest end that was asked for.
    pub termination_asked: Option<TerminationKind>,
    /// Its drone may not have it, or it is ending: see [`crate::records::BackendRecord::is_waited_for`].
    pub is_waited_for: bool,
    /// One token for all connections.
    pub static_token: Option<String>,
    /// Proxy secret.
    pub secret_token: String,
    /// Subdomain of its URL.
    pub subdomain: Option<String>,
}

/// Why nothing was done.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum Refusal {
    /// The cluster is not formed.
    #[error("the cluster is not formed yet")]
    NotFormed,
    /// The key is held with another tag.
    #[error("the key is held with another tag ({held:?})")]
    TagMismatch {
        /// The holder's tag.
        held: String,
    },
    /// The key is free and nothing says what to start.
    #[error("the key is free and the request has no spawn_config")]
    NoSpawnConfig,
    /// No named candidate is fit.
    #[error("no drone of that cluster and pool can take a backend now")]
    NoDrone,
    /// That backend id was used before.
    #[error("backend id {0:?} was used before")]
    BackendIdUsed(String),
    /// No such key.
    #[error("the key is not held")]
    NoSuchKey,
    /// Only an expired key can be revoked.
    #[error("the key is held until its expiry; only an expired key can be revoked")]
    NotExpired,
    /// No such backend.
    #[error("there is no backend {0:?}")]
    NoSuchBackend(String),
    /// No such drone.
    #[error("there is no drone {0:?}")]
    NoSuchDrone(String),
    /// Another session holds the drone's name and was heard of lately.
    #[error("another live drone has that name")]
    NameTaken,
    /// Same idempotency key, other request.
    #[error("this Idempotency-Key was used for another request")]
    IdempotencyMismatch,
    /// A bound of [`crate::limits`] is reached.
    #[error("{0} is at its bound")]
    Full(String),
    /// Lease durations can't be changed while keys are held, or break the rule of the timeline.
    #[error("{0}")]
    Lease(String),
    /// The cluster was restored from a backup, and backends that its old cluster started may still be running.
    #[error(
        "this cluster was restored from a backup; keys can be acquired in {} s, when every backend of the old cluster \
         has ended", .wait_ms.div_ceil(1000)
    )]
    Restored {
        /// How long until keys can be acquired, in milliseconds.
        wait_ms: u64,
    },
}

/// What became of one renewal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum RenewOutcome {
    /// Extended.
    Renewed,
    /// `allow_renew` is false; the deadlines stand.
    Prevented,
    /// Another drone's, another token, expired or released.
    NotHolder,
    /// No such backend.
    Unknown,
}

/// What became of one report. All of them are acknowledged to the drone. A living state that is answered by another
/// outcome than the first two is of a backend that must not run: the drone is told to end it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum ReportOutcome {
    /// Recorded.
    Recorded,
    /// Not later than what is recorded.
    Old,
    /// It is recorded as terminated, or it is [leaving](crate::records::Presence::Leaving).
    Ended,
    /// The drone does not hold that backend: another drone, data directory or token has it.
    NotHolder,
    /// No such backend.
    Unknown,
}

impl ReportOutcome {
    /// Whether a backend that lives must be ended.
    pub fn must_end(self) -> bool {
        !matches!(self, Self::Recorded | Self::Old)
    }
}

/// Who has to look after an entry was applied.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// This drone has a new pending action. That one is gone concerns nobody.
    Actions {
        /// The drone.
        drone_id: i32,
    },
    /// This backend's state changed.
    Backend {
        /// The backend.
        backend_id: String,
    },
    /// This key was released, revoked or expired.
    KeyFreed {
        /// Key namespace.
        namespace: String,
        /// Key name.
        name: String,
    },
    /// A newer session of this drone was registered.
    Session {
        /// The drone.
        drone_id: i32,
        /// The newer session.
        session: String,
    },
    /// The cluster was formed.
    Formed,
    /// A snapshot replaced the whole state: everybody has to look. No entry has this effect.
    Everything,
}
