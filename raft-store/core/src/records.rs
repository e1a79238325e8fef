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

/// Whether the drone of a backend that has not ended has it, as far as the controllers know. No value frees a key: only a
/// `terminated` report or the expiry does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Presence {
    /// The drone has it, or its spawn is still to be delivered.
    Expected,
    /// Only with a drone of Plane's: the spawn was not acknowledged and is not sent again. A connect waits for the end of
    /// the backend. A report of a living state shows that it is there after all.
    Doubtful,
    /// The drone did not list it and does not get its spawn again, or it has ended but its spawn was sent twice. Its key
    /// is not renewed, a connect waits for its release, and a report of a living state is answered with a hard end.
    Leaving,
}

/// What a [`BackendRecord`] begins with: all that a renewal has to know of a backend, a million times in half a minute.
#[derive(Debug, Clone, PartialEq, Eq, Decode)]
pub struct BackendHead {
    /// Its key.
    pub key: KeyConfig,
    /// Cluster it was scheduled in.
    pub cluster: String,
    /// Drone it was scheduled to.
    pub drone_id: i32,
    /// Whether the drone has it.
    pub presence: Presence,
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
    /// Whether the drone has it.
    pub presence: Presence,
    /// That drone's name.
    pub drone: String,
    /// Data directory for which the spawn was made; `None` for a drone of Plane's. Only a drone that runs on it can say
    /// that the backend has ended.
    pub data_id: Option<String>,
    /// The spawn was sent to a drone of Plane's more than once, so two processes may have been started: a `terminated`
    /// report does not free the key.
    pub spawn_repeated: bool,
    /// Whether the caller chose the backend's id.
    pub id_supplied: bool,
    /// Fencing token of its acquisition.
    pub token: u64,
    /// Every state with the cluster time (ms) at which it was recorded, oldest first; statuses strictly rise, so there
    /// are at most eight.
    pub history: Vec<(u64, BackendState)>,
    /// The hardest end that was asked for.
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
    /// What its drone said last of its connections. Absent without `max_idle_seconds`.
    pub activity: Option<ActivityRecord>,
    /// Time under which `backend_ends` has it: [`Self::ends_at_ms`] as of the last write.
    pub end_filed_at_ms: Option<u64>,
}

impl BackendRecord {
    /// The latest state.
    pub fn state(&self) -> &BackendState {
        self.history.last().map_or(&BackendState::Scheduled, |(_, state)| state)
    }

    /// When its lifetime is over, cluster time in milliseconds. `None` if it has no such limit or is ending already.
    /// (The limit of idle time needs no index: a notice of the drone ends the backend, see `apply/ends.rs`.)
    pub fn ends_at_ms(&self) -> Option<u64> {
        self.lifetime_ends_at_ms.filter(|_| !self.is_ending())
    }

    /// Whether its end was asked for or has begun.
    pub fn is_ending(&self) -> bool {
        self.termination_asked.is_some() || self.state().status() >= BackendStatus::Terminating
    }

    /// Whether a connect waits for the release of its key.
    pub fn is_waited_for(&self) -> bool {
        self.presence != Presence::Expected || self.is_ending()
    }
}

/// The last activity notice about a backend.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ActivityRecord {
    /// Incarnation of the drone that sent it. Notices of different incarnations have no order.
    pub incarnation: String,
    /// Its `activity_id`, which grows within the incarnation: an older notice that arrives late is ignored.
    pub activity_id: i64,
    /// Since when the backend has had no connection, cluster time in milliseconds; `None` while it has some.
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
    /// Current incarnation. For a drone of Plane's, which has none, one is made for each session.
    pub incarnation: String,
    /// Data directory of this incarnation; `None` for a drone of Plane's.
    pub data_id: Option<String>,
    /// Current session.
    pub session: String,
    /// IP address that the session came from; empty if it is not known.
    pub address: String,
    /// Log index of the entry that registered the session.
    pub registered_index: u64,
    /// The session's list of backends was applied, or it is a drone of Plane's, which sends none. Until then the drone
    /// gets no action and no new backend.
    pub is_listed: bool,
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
    /// Time under which `drones_heard` has it: at most [`crate::limits::HEARD_REFILE_MS`] before the last sign of life.
    pub heard_filed_at_ms: Option<u64>,
}

impl DroneRecord {
    /// When it was heard of last, cluster time in milliseconds.
    pub fn heard_at_ms(&self) -> u64 {
        self.heartbeat.map_or(0, |heartbeat| heartbeat.at_ms).max(self.registered_at_ms)
    }

    /// Whether it is a drone of Plane's, which gives no incarnation and lists no backends.
    pub fn is_planes(&self) -> bool {
        self.data_id.is_none()
    }
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

/// To whom a spawn may be sent.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum SpawnTarget {
    /// The incarnation that runs as one of our drones, in every session. It starts no backend twice.
    Incarnation(String),
    /// One session of a drone of Plane's, once: it may start a backend twice.
    Session {
        /// The session.
        session: String,
        /// Address of the session for which the key was acquired; later sessions must come from there.
        address: String,
    },
}

/// See [`ActionRecord`].
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum PendingAction {
    /// Start it.
    Spawn {
        /// To whom it may be sent.
        target: SpawnTarget,
        /// The drone's clock at the heartbeat of the acquisition, in milliseconds. For a drone of Plane's the deadlines
        /// start there; for one of ours at the same moment on the clock of the incarnation that gets it.
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
    /// What the new cluster's id begins with: the same on all members that were restored from one backup with the same
    /// arguments, and on no others.
    pub id_prefix: String,
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
