//! The records of the state: one type for each kind. [`crate::kv::Table`] says where each lives and under what key.

use bincode::{Decode, Encode};
use holdfast_wire::{
    BackendState, BackendStatus, KeyConfig, LeaseConfig, TerminationKind, TerminationReason,
};

/// `meta/cluster`: made by `FormCluster`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ClusterRecord {
    /// Random id of the cluster.
    pub cluster_id: String,
    /// MAC key of connection tokens.
    pub token_secret: [u8; 32],
    /// Lease durations.
    pub lease: LeaseConfig,
    /// How long terminated backends are kept, in milliseconds of cluster time.
    pub terminated_keep_ms: u64,
}

/// `meta/progress`: changes with every entry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ProgressRecord {
    /// Cluster time in milliseconds; never falls.
    pub cluster_time_ms: u64,
    /// Running checksum over every write so far.
    pub checksum: u64,
    /// Published (index, checksum) pairs, oldest first; at most [`crate::limits::CHECKSUMS_KEPT`].
    pub published: Vec<(u64, u64)>,
    /// Held keys.
    pub keys_held: u64,
    /// Idempotency records.
    pub idempotency_records: u64,
    /// Supplied backend ids ever used.
    pub supplied_ids: u64,
    /// Last drone id given out.
    pub last_drone_id: i32,
}

/// `meta/checksums`: what is known of replicas whose checksums differ (invariant 6). Absent until that happens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct ChecksumsRecord {
    /// While it is set, no key is acquired.
    pub split: Option<ChecksumSplit>,
    /// The operator's last decision.
    pub accepted: Option<AcceptedChecksum>,
}

impl ChecksumsRecord {
    /// Whether the checksum published at that index is still needed.
    pub fn names(&self, index: u64) -> bool {
        self.split.as_ref().is_some_and(|split| split.index == index)
            || self.accepted.is_some_and(|accepted| accepted.index == index)
    }
}

/// Voters' checksums differ at one index, and none is held by a majority.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ChecksumSplit {
    /// The log index.
    pub index: u64,
    /// Member id and its checksum there, in the order of ids; at most [`crate::limits::CHECKSUM_SPLIT_VALUES_MAX`].
    pub values: Vec<(u64, u64)>,
}

/// Which of the checksums an operator chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct AcceptedChecksum {
    /// The log index.
    pub index: u64,
    /// The checksum that is right there.
    pub value: u64,
    /// When it was accepted, cluster time in milliseconds.
    pub at_ms: u64,
}

/// `meta/member_ids`: every member id that a membership entry ever named, those of removed members too. An id stands for
/// one log for ever, so none is given out twice; who is in here and not in the membership was removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct MemberIdsRecord {
    /// Ranges, both ends included, in ascending order with a gap between them.
    ranges: Vec<(u64, u64)>,
}

impl MemberIdsRecord {
    /// Whether the id was ever used.
    pub fn contains(&self, id: u64) -> bool {
        self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&id))
    }

    /// Adds an id.
    pub fn insert(&mut self, id: u64) {
        if self.contains(id) {
            return;
        }
        let at = self.ranges.partition_point(|(first, _)| *first < id);
        self.ranges.insert(at, (id, id));
        self.ranges.dedup_by(|next, before| {
            let touches = before.1.checked_add(1) == Some(next.0);
            if touches {
                before.1 = next.1;
            }
            touches
        });
    }

    /// The largest id that was ever used; 0 if none was.
    pub fn largest(&self) -> u64 {
        self.ranges.last().map_or(0, |(_, last)| *last)
    }

    /// How many ranges there are; at most [`crate::limits::MEMBER_ID_RANGES_MAX`], which the leader keeps.
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }
}

/// `keys/{namespace}\0{name}`: a held key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct KeyRecord {
    /// Tag.
    pub tag: String,
    /// Backend that holds it.
    pub backend_id: String,
    /// Drone of that backend.
    pub drone_id: i32,
    /// Fencing token: log index of the acquisition.
    pub token: u64,
    /// Whether renewals are accepted.
    pub allow_renew: bool,
    /// Cluster time in milliseconds.
    pub acquired_at_ms: u64,
    /// Cluster time in milliseconds.
    pub expires_at_ms: u64,
    /// Expiry under which the expiry index has this key (stale after renewals; the sweep re-files it).
    pub indexed_at_ms: u64,
}

/// `termination_asked` of a backend whose undelivered spawn became void because its drone was started anew: it will
/// never run, but only its key's expiry (or a report that nothing of it is left) frees the key, so a connect waits. If
/// the spawn had been delivered after all, the drone's first report of the backend clears the mark.
pub const VOIDED: (TerminationKind, TerminationReason) = (TerminationKind::Hard, TerminationReason::Lost);

/// What a [`BackendRecord`] begins with: all that a renewal has to know of a backend, a million times in half a minute.
#[derive(Debug, Clone, PartialEq, Eq, Decode)]
pub struct BackendHead {
    /// Its key.
    pub key: KeyConfig,
    /// Cluster it was scheduled in.
    pub cluster: String,
    /// Drone it was scheduled to.
    pub drone_id: i32,
}

/// `backends/{id}`: a backend, living or recently terminated.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct BackendRecord {
    /// Its key.
    pub key: KeyConfig,
    /// Cluster it was scheduled in.
    pub cluster: String,
    /// Drone it was scheduled to.
    pub drone_id: i32,
    /// That drone's name.
    pub drone: String,
    /// Incarnation of the drone for which the spawn was made; only that one may receive it.
    pub incarnation: String,
    /// Fencing token of its acquisition.
    pub token: u64,
    /// Every state with the cluster time (ms) at which it was recorded, oldest first; statuses strictly rise, so there
    /// are at most eight.
    pub history: Vec<(u64, BackendState)>,
    /// Whether somebody asked for its end. [`VOIDED`] marks one whose spawn became void.
    pub termination_asked: Option<(TerminationKind, TerminationReason)>,
    /// When it must end, cluster time in milliseconds.
    pub lifetime_ends_at_ms: Option<u64>,
    /// Ended after this long without a connection, in seconds.
    pub max_idle_seconds: Option<u32>,
    /// One token for all connections.
    pub static_token: Option<String>,
    /// Proxy secret.
    pub secret_token: String,
    /// Subdomain of its URL.
    pub subdomain: Option<String>,
    /// Users whose tokens are revoked; at most [`crate::limits::REVOKED_USERS_MAX`].
    pub revoked_users: Vec<String>,
    /// Log index and sub-number of its latest `Terminate` action, so that it is found without a search; the action
    /// itself may have been received and deleted since. (That of its `Spawn` is `(token, 0)`.)
    pub terminate_action: Option<(u64, u32)>,
    /// What its drone says of its connections. Absent as long as it has said nothing, and without `max_idle_seconds`:
    /// only a drone that looks at connections has its backends ended for want of them.
    pub activity: Option<ActivityRecord>,
    /// Time under which `backend_ends` has it: [`Self::ends_at_ms`] as of the last write.
    pub end_filed_at_ms: Option<u64>,
}

impl BackendRecord {
    /// The latest state.
    pub fn state(&self) -> &BackendState {
        self.history.last().map_or(&BackendState::Scheduled, |(_, state)| state)
    }

    /// When one of its limits ends it, cluster time in milliseconds. `None` if none will: it has no limit, or is busy, or
    /// is going away already.
    pub fn ends_at_ms(&self) -> Option<u64> {
        if self.termination_asked.is_some() || self.state().status() >= BackendStatus::Terminating {
            return None;
        }
        let idle_since_ms = self.activity.as_ref().and_then(|activity| activity.idle_since_ms);
        let idle_ends_at_ms = self
            .max_idle_seconds
            .zip(idle_since_ms)
            .map(|(seconds, since_ms)| since_ms.saturating_add(u64::from(seconds) * 1000));
        self.lifetime_ends_at_ms.into_iter().chain(idle_ends_at_ms).min()
    }
}

/// Whether a backend has connections.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ActivityRecord {
    /// Incarnation of the drone that said so last. What it saw says nothing once another has taken its place.
    pub incarnation: String,
    /// Session of the drone that said so last.
    pub session: String,
    /// Number of that report in its session, so that one that comes late is known.
    pub number: u64,
    /// Since when it has had none, cluster time in milliseconds; `None` while it has some.
    pub idle_since_ms: Option<u64>,
}

/// `drones/{id}`: a drone, by its id. `drone_names/{cluster}\0{name}` leads to the id.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DroneRecord {
    /// Cluster.
    pub cluster: String,
    /// Name, unique in the cluster.
    pub name: String,
    /// Pool.
    pub pool: String,
    /// Current incarnation.
    pub incarnation: String,
    /// Current session.
    pub session: String,
    /// Member id of the controller that serves the session.
    pub controller: u64,
    /// Drone's version.
    pub version: String,
    /// Drone's git hash.
    pub git_hash: String,
    /// Takes no new backends.
    pub draining: bool,
    /// Live backends.
    pub backend_count: u64,
    /// When the session was registered, cluster time in milliseconds.
    pub registered_at_ms: u64,
    /// The last heartbeat of this incarnation.
    pub heartbeat: Option<HeartbeatRecord>,
    /// When what is left on a draining drone is asked to end, cluster time in milliseconds.
    pub drain_deadline_ms: Option<u64>,
    /// This incarnation said that it is shutting down: it takes no new backends either, and its successor does.
    pub leaving: bool,
}

/// Last heartbeat of a drone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct HeartbeatRecord {
    /// Cluster time at which it was recorded, in milliseconds.
    pub at_ms: u64,
    /// Term of the entry that recorded it.
    pub term: u64,
    /// The drone's clock, in milliseconds; never falls within an incarnation.
    pub local_time_ms: i64,
}

/// `actions/{drone id}{log index}{sub}`: something a drone must be told, in order.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ActionRecord {
    /// The backend.
    pub backend_id: String,
    /// What.
    pub action: PendingAction,
}

/// See [`ActionRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum PendingAction {
    /// Start it.
    Spawn {
        /// Incarnation of the drone for which it was made.
        incarnation: String,
        /// The drone's clock at the heartbeat that the deadlines start from, in milliseconds.
        local_time_ms: i64,
        /// Cluster time of that heartbeat, in milliseconds: the spawn is void once `soft_terminate` later.
        heartbeat_at_ms: u64,
        /// Lease durations of the acquisition.
        lease: LeaseConfig,
        /// Fencing token.
        token: u64,
        /// The executable, JSON text.
        executable_json: String,
    },
    /// End it.
    Terminate {
        /// How.
        kind: TerminationKind,
        /// Why.
        reason: TerminationReason,
    },
}

/// `idempotency/{key}`: a recorded answer.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct IdempotencyRecord {
    /// Digest of the request.
    pub body_digest: [u8; 16],
    /// Cluster time at which it may be deleted, in milliseconds.
    pub expires_at_ms: u64,
    /// Log index of the entry that recorded it.
    pub index: u64,
    /// The answer.
    pub outcome: crate::outcome::Outcome,
}

/// `meta/restored`: written by a restore from a backup, before the first entry of the new cluster. While there is no
/// `meta/cluster` beside it, the cluster is not formed and nothing but `FormCluster` is done, which takes the lease
/// durations from here.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct RestoredRecord {
    /// Id of the cluster that the backup is of.
    pub from_cluster_id: String,
    /// Log index of the backup.
    pub from_index: u64,
    /// Lease durations of the backup.
    pub lease: LeaseConfig,
    /// How long terminated backends are kept, in milliseconds of cluster time.
    pub terminated_keep_ms: u64,
    /// For how long after the forming no key is acquired, in milliseconds of cluster time: at least one full expiry,
    /// in which every backend that the old cluster started has ended.
    pub quarantine_ms: u64,
    /// From when on keys are acquired, cluster time in milliseconds; set when the cluster is formed.
    pub acquisitions_from_ms: Option<u64>,
}
