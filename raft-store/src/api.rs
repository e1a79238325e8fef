//! What the rest of Holdfast sees of a replica: no openraft and no RocksDB type appears here.

use crate::membership::naming::DiskIdentity;
use crate::state_db::StateHandle;
use bincode::{Decode, Encode};
use holdfast_core::outcome::Outcome;
use holdfast_core::view::View;
use std::net::SocketAddr;
use std::path::PathBuf;

/// How to open a replica.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Directory of this replica alone.
    pub data_dir: PathBuf,
    /// Where to listen for peers.
    pub peer_listen: SocketAddr,
    /// Where clients reach this replica's HTTP API; told to the peers.
    pub advertise_url: String,
    /// How long terminated backends are kept, in milliseconds of cluster time; used when this one is asked to form a cluster.
    pub terminated_keep_ms: u64,
    /// Time without a leader's message after which a follower asks for an election, in milliseconds.
    pub election_timeout_ms: u64,
    /// Log entries between snapshots.
    pub snapshot_every: u64,
    /// Disk space to keep free, in bytes: with less than that this replica does not lead.
    pub disk_reserve_bytes: u64,
}

/// The replica can't be opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A setting is wrong.
    #[error("{field} {problem}")]
    Config {
        /// The setting.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// Another process uses the data directory.
    #[error("the data directory {0} is in use by another process")]
    Locked(PathBuf),
    /// The disk or the database failed, or what it holds is damaged.
    #[error("{what}: {error}")]
    Storage {
        /// What was being done, and the file or directory.
        what: String,
        /// The cause.
        error: String,
    },
    /// The peer listener can't be bound.
    #[error("can't listen for peers on {addr}: {error}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// The cause.
        error: std::io::Error,
    },
}

/// The answer to a proposal that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// What became of it.
    pub outcome: Outcome,
    /// The outcome is the recorded one of an earlier proposal with the same idempotency key.
    pub replayed: bool,
    /// Log index of the entry.
    pub index: u64,
    /// Cluster time of the entry, in milliseconds.
    pub cluster_time_ms: u64,
}

/// A change of the membership.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum MemberChange {
    /// Adds the process that waits at this address, as a learner, which the leader makes a voter when it has caught up.
    Add {
        /// Its peer address, `HOST:PORT`; it must answer there.
        peer_addr: String,
    },
    /// Changes a member's address. Its id and its disk stay.
    Move {
        /// The member.
        id: u64,
        /// Its new peer address, `HOST:PORT`; it must answer there.
        peer_addr: String,
    },
    /// Removes a member, forever.
    Remove {
        /// The member.
        id: u64,
    },
}

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum MemberRole {
    /// Receives the log; becomes a voter when it has caught up.
    Learner,
    /// Votes.
    Voter,
    /// Is none any more.
    Removed,
}

/// A change that was made, or was not needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct MemberChanged {
    /// The member.
    pub id: u64,
    /// What the member is now.
    pub role: MemberRole,
    /// Whether anything had to be done.
    pub changed: bool,
}

/// A change of the membership that was not made. Only [`MemberError::OutcomeUnknown`] leaves that open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Encode, Decode)]
pub enum MemberError {
    /// No leader was found in time. Try again.
    #[error("no leader was found in time; nothing was done")]
    NotLeader,
    /// Made or not made. Asking again is safe.
    #[error("the outcome is unknown: {0}; asking again is safe")]
    OutcomeUnknown(String),
    /// The id was that of a member that was removed.
    #[error(
        "member {0} was removed, and no id is used twice: empty its data directory and add it as a new member"
    )]
    IdUsed(u64),
    /// The address is that of a member whose disk was lost: what answers there is a new process.
    #[error(
        "peer_addr is that of member {0}, but what answers there has a new disk: what member {0} had acknowledged is lost. \
         Remove member {0}, then add the new process"
    )]
    LostDisk(u64),
    /// The process is not waiting: its disk is a member already.
    #[error(
        "peer_addr {peer_addr} is answered by member {member} of cluster {cluster_id}, which is no waiting process: empty \
         its data directory first"
    )]
    Named {
        /// The address.
        peer_addr: String,
        /// Who answers there.
        member: u64,
        /// Its cluster.
        cluster_id: String,
    },
    /// A field breaks a rule.
    #[error("{field} {problem}")]
    Invalid {
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Never was a member.
    #[error("there is no member {0}")]
    NoSuchMember(u64),
    /// One change at a time. Try again.
    #[error("{0}; nothing was done")]
    Busy(String),
    /// The cluster could not go on after it.
    #[error("{0}; nothing was done")]
    Unsafe(String),
    /// This replica has failed, is stopping or was removed. Ask another.
    #[error("this replica has stopped: {0}")]
    Stopped(String),
}

impl MemberError {
    /// A field that breaks a rule.
    pub(crate) fn invalid(field: &str, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.to_owned(), problem: problem.into() }
    }
}

/// A proposal without an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// Certainly not done: no leader was found before the deadline. Try again.
    #[error("no leader was found in time; nothing was done")]
    NoLeader,
    /// Done or not done. Repeat it if it is safe to repeat.
    #[error("the outcome is unknown: {0}")]
    OutcomeUnknown(String),
    /// Certainly not done: the proposal is larger than an entry may be.
    #[error("the proposal has {0} bytes, at most {1} are allowed")]
    TooLarge(usize, usize),
    /// Certainly not done: too much is under way on this replica.
    #[error("too many proposals are under way; nothing was done")]
    Overloaded,
    /// This replica has failed or is stopping.
    #[error("this replica has stopped: {0}")]
    Stopped(String),
    /// Certainly not done: this replica's disk is full or stuck, and nobody else leads.
    #[error("nothing was done: {0}")]
    Unfit(String),
}

/// A read without an answer. Reads change nothing, so all of these can be tried again, here or elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader confirmed the read before the deadline.
    #[error("no leader confirmed the read in time")]
    NoLeader,
    /// This replica has failed or is stopping.
    #[error("this replica has stopped: {0}")]
    Stopped(String),
}

/// The state as of some moment.
pub struct ReadPoint {
    /// Typed reads.
    pub view: View<StateHandle>,
    /// Cluster time of the read in milliseconds: the leader's live clock for a linearizable read, that of the last
    /// applied entry for a local one.
    pub now_ms: u64,
    /// Term of the leader that confirmed it (linearizable reads), or this replica's.
    pub term: u64,
    /// Log index up to which this replica had applied at least.
    pub applied: u64,
}

/// The leader, as this replica knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaderInfo {
    /// Member id.
    pub id: u64,
    /// URL of its HTTP API, once it told us.
    pub url: Option<String>,
}

/// How the replicas' checksums compare, as far as this replica knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChecksumStatus {
    /// What follows for this replica.
    pub state: ChecksumState,
    /// Log index at which it follows; 0 while nothing is known.
    pub index: u64,
    /// Member id and checksum at that index, where members differ without a majority.
    pub values: Vec<(u64, u64)>,
    /// Other members whose checksum differs from the majority's.
    pub differing: Vec<u64>,
}

/// See [`ChecksumStatus`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ChecksumState {
    /// Too few checksums are known, and none contradicts another.
    #[default]
    Waiting,
    /// This replica's is that of a majority.
    Agrees,
    /// They differ, and too few are known to say whether a majority agrees. No key is acquired here.
    Undecided,
    /// They differ and no majority agrees. No key is acquired until an operator decides.
    Split,
    /// A majority has another one than this replica, which stops for good.
    Minority,
}

impl ChecksumState {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Waiting, Self::Agrees, Self::Undecided, Self::Split, Self::Minority];

    /// Its name in the API and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Agrees => "agrees",
            Self::Undecided => "undecided",
            Self::Split => "split",
            Self::Minority => "minority",
        }
    }
}

/// A member, as this replica knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// Member id.
    pub id: u64,
    /// Peer address.
    pub peer_addr: String,
    /// Its disk.
    pub identity: DiskIdentity,
    /// URL of its HTTP API, once it told us.
    pub url: Option<String>,
    /// What keeps this replica from talking to it, and what to do.
    pub problem: Option<String>,
    /// Whether it votes.
    pub voter: bool,
    /// Last log index known to be on it (of all members on the leader, of itself elsewhere).
    pub last_log: Option<u64>,
}

/// This replica and its cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// This member.
    pub id: u64,
    /// Current term.
    pub term: u64,
    /// The leader, if known.
    pub leader: Option<LeaderInfo>,
    /// Whether this replica leads.
    pub is_leader: bool,
    /// Last log index here.
    pub last_log: u64,
    /// Last applied index here.
    pub applied: u64,
    /// Index of the last snapshot here.
    pub snapshot: u64,
    /// Members.
    pub members: Vec<MemberStatus>,
    /// How the replicas' checksums compare.
    pub checksums: ChecksumStatus,
}
