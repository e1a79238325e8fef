//! Messages between peers: bincode behind a version byte ([`holdfast_core::codec`]).

use crate::api::{MemberChange, MemberChanged, MemberError};
use crate::codec::{WireLogId, WireSnapshotMeta, WireVote, decode_entry, encode_entry};
use crate::membership::naming::{DiskIdentity, Naming, Starts};
use crate::types::{LogEntry, TypeConfig};
use bincode::{Decode, Encode};
use bytes::Bytes;
use holdfast_core::kv::StateError;
use holdfast_core::outcome::Outcome;
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult, VoteRequest,
    VoteResponse,
};
use std::io;

/// Oldest protocol that this program speaks.
pub const PROTOCOL_MIN: u32 = 3;
/// Newest protocol that this program speaks.
pub const PROTOCOL: u32 = 3;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum Mode {
    Rpc,
    Append,
    Snapshot,
}

/// First frame of the one who connects.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Opening {
    /// A member connects to a member.
    Hello(Hello),
    /// Asks a process who it is. Anyone may: the answer names nothing but the process itself.
    Identify,
    /// Names a waiting process.
    Bind(Bind),
}

/// Who connects, and to whom, by the membership that the sender has.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    pub protocol_min: u32,
    pub protocol_max: u32,
    pub cluster_id: String,
    pub from: u64,
    pub from_identity: DiskIdentity,
    /// Starts of the sender's disk.
    pub starts: Starts,
    pub to: u64,
    pub to_identity: DiskIdentity,
    pub url: String,
    pub mode: Mode,
}

/// The name that a waiting process gets, if it has this identity.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Bind {
    pub identity: DiskIdentity,
    pub naming: Naming,
}

/// First frame of the one connected to.
// One lives for a moment on its way to a socket: boxing the larger variant would only add an allocation.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum OpeningReply {
    /// The hello is accepted; messages follow.
    Welcome { identity: DiskIdentity, starts: Starts, url: String },
    /// The hello is refused, and nothing else happens.
    Refused(Refusal),
    /// The answer to [`Opening::Identify`] and [`Opening::Bind`]: who this is, now.
    Identified { identity: DiskIdentity, naming: Option<Naming> },
}

/// Why a hello is refused.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode, thiserror::Error)]
pub enum Refusal {
    /// The receiver is no member: its disk is new.
    #[error("it is waiting to be named by \"holdfast cluster init\" or \"holdfast cluster add\" (disk {0})")]
    Waiting(DiskIdentity),
    #[error("it speaks the peer protocols {min} to {max}")]
    Protocol { min: u32, max: u32 },
    #[error("it belongs to cluster {0}")]
    OtherCluster(String),
    #[error("it is member {id} with disk {identity}")]
    OtherReceiver { id: u64, identity: DiskIdentity },
    #[error("the membership records disk {0} for the member that connects")]
    OtherSender(DiskIdentity),
    /// The sender's removal is committed.
    #[error("the member that connects was removed from the cluster")]
    Removed,
    #[error(
        "the member that connects lacks its own start number {0}, which was seen here: its data directory is a copy, or was \
         set back"
    )]
    SetBack(u64),
}

/// A request on an rpc connection.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Request {
    Append(Append),
    Vote(VoteAsk),
    PreVote(VoteAsk),
    Transfer {
        from: WireVote,
        to: u64,
        last_log_id: Option<WireLogId>,
    },
    Propose {
        proposal: Vec<u8>,
        deadline_ms: u64,
    },
    ReadIndex,
    ChangeMembers(MemberChange),
    /// Asked by a leader that wants to hand over.
    MayLead,
    /// The sender's published checksums; asks for the receiver's.
    Checksums {
        from: u64,
        published: Vec<(u64, u64)>,
    },
    /// An operator's decision which checksum is right at an index.
    AcceptChecksum {
        index: u64,
        value: u64,
    },
}

/// The answer to a [`Request`].
// One lives for a moment on its way through a channel: boxing the larger variant would only add an allocation.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Reply {
    Append(AppendReply),
    Vote(VoteReply),
    Transferred(Result<(), String>),
    Proposed(Result<ProposedReply, ProposeRefusal>),
    ReadIndex(Option<ReadIndexReply>),
    /// The peer could not handle the request.
    Failed(String),
    MembersChanged(Result<MemberChanged, MemberError>),
    /// Whether the peer would be a good leader.
    MayLead(bool),
    /// The peer's published checksums: log index and value.
    Checksums(Vec<(u64, u64)>),
    /// Whether the decision changed anything.
    ChecksumAccepted(Result<bool, MemberError>),
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Append {
    pub vote: WireVote,
    pub prev: Option<WireLogId>,
    pub commit: Option<WireLogId>,
    pub entries: Vec<(u64, Vec<u8>)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum AppendReply {
    Success,
    Partial(Option<WireLogId>),
    Conflict,
    HigherVote(WireVote),
}

/// The answer to one request of an append connection.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum StreamReply {
    Matching(Option<WireLogId>),
    Conflict(WireLogId),
    HigherVote(WireVote),
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VoteAsk {
    pub vote: WireVote,
    pub last_log_id: Option<WireLogId>,
    pub leadership_transfer: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct VoteReply {
    pub vote: WireVote,
    pub granted: bool,
    pub last_log_id: Option<WireLogId>,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ProposedReply {
    pub outcome: Outcome,
    pub replayed: bool,
    pub index: u64,
    pub cluster_time_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum ProposeRefusal {
    /// Certainly not done.
    NotLeader,
    /// Certainly not done.
    Overloaded,
    /// Done or not done.
    Unknown(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct ReadIndexReply {
    pub index: u64,
    pub term: u64,
    pub now_ms: u64,
}

/// First frame of a snapshot after the hello. The receiver answers with [`SnapshotReply::Go`]; then comes a
/// [`SnapshotBegin`], and from there on the chunks of all files in order: `{crc32: u32 LE}{bytes}`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SnapshotHeader {
    pub vote: WireVote,
    pub meta: WireSnapshotMeta,
    pub files: Vec<(String, u64)>,
}

/// Where the sender of a snapshot begins: at the place the receiver named, or at the start of the first file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct SnapshotBegin {
    pub file: u64,
    pub offset: u64,
}

/// The answers to a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum SnapshotReply {
    Installed(WireVote),
    Failed(String),
    /// What is there already: this many whole files, this much of the next, and the CRC-32 of all of it.
    Go {
        file: u64,
        offset: u64,
        crc: u32,
    },
}

impl Append {
    pub fn of(request: &AppendEntriesRequest<TypeConfig>) -> io::Result<Self> {
        Ok(Self {
            vote: request.vote.into(),
            prev: request.prev_log_id.map(Into::into),
            commit: request.leader_commit.map(Into::into),
            entries: request
                .entries
                .iter()
                .map(|entry| Ok((entry.log_id.index, encode_entry(entry)?)))
                .collect::<io::Result<_>>()?,
        })
    }

    pub fn into_request(self) -> Result<AppendEntriesRequest<TypeConfig>, StateError> {
        let first = self.prev.map_or(0, |prev| prev.index + 1);
        if !self.entries.iter().map(|(index, _)| *index).eq(first..first + self.entries.len() as u64) {
            return Err(StateError::Damaged("an append has entries that do not follow each other".into()));
        }
        Ok(AppendEntriesRequest {
            vote: self.vote.into(),
            prev_log_id: self.prev.map(Into::into),
            leader_commit: self.commit.map(Into::into),
            entries: self
                .entries
                .into_iter()
                .map(|(index, bytes)| decode_entry(index, &Bytes::from(bytes)))
                .collect::<Result<Vec<LogEntry>, _>>()?,
        })
    }
}

impl From<AppendEntriesResponse<TypeConfig>> for AppendReply {
    fn from(response: AppendEntriesResponse<TypeConfig>) -> Self {
        match response {
            AppendEntriesResponse::Success => Self::Success,
            AppendEntriesResponse::PartialSuccess(id) => Self::Partial(id.map(Into::into)),
            AppendEntriesResponse::Conflict => Self::Conflict,
            AppendEntriesResponse::HigherVote(vote) => Self::HigherVote(vote.into()),
        }
    }
}

impl From<AppendReply> for AppendEntriesResponse<TypeConfig> {
    fn from(reply: AppendReply) -> Self {
        match reply {
            AppendReply::Success => Self::Success,
            AppendReply::Partial(id) => Self::PartialSuccess(id.map(Into::into)),
            AppendReply::Conflict => Self::Conflict,
            AppendReply::HigherVote(vote) => Self::HigherVote(vote.into()),
        }
    }
}

impl From<StreamAppendResult<TypeConfig>> for StreamReply {
    fn from(result: StreamAppendResult<TypeConfig>) -> Self {
        match result {
            Ok(id) => Self::Matching(id.map(Into::into)),
            Err(StreamAppendError::Conflict(id)) => Self::Conflict(id.into()),
            Err(StreamAppendError::HigherVote(vote)) => Self::HigherVote(vote.into()),
        }
    }
}

impl From<StreamReply> for StreamAppendResult<TypeConfig> {
    fn from(reply: StreamReply) -> Self {
        match reply {
            StreamReply::Matching(id) => Ok(id.map(Into::into)),
            StreamReply::Conflict(id) => Err(StreamAppendError::Conflict(id.into())),
            StreamReply::HigherVote(vote) => Err(StreamAppendError::HigherVote(vote.into())),
        }
    }
}

impl From<&VoteRequest<TypeConfig>> for VoteAsk {
    fn from(request: &VoteRequest<TypeConfig>) -> Self {
        Self {
            vote: request.vote.into(),
            last_log_id: request.last_log_id.map(Into::into),
            leadership_transfer: request.leadership_transfer,
        }
    }
}

impl From<VoteAsk> for VoteRequest<TypeConfig> {
    fn from(ask: VoteAsk) -> Self {
        let mut request = VoteRequest::new(ask.vote.into(), ask.last_log_id.map(Into::into));
        request.leadership_transfer = ask.leadership_transfer;
        request
    }
}

impl From<VoteResponse<TypeConfig>> for VoteReply {
    fn from(response: VoteResponse<TypeConfig>) -> Self {
        Self {
            vote: response.vote.into(),
            granted: response.vote_granted,
            last_log_id: response.last_log_id.map(Into::into),
        }
    }
}

impl From<VoteReply> for VoteResponse<TypeConfig> {
    fn from(reply: VoteReply) -> Self {
        let vote: crate::types::Vote = reply.vote.into();
        VoteResponse::new(vote, reply.last_log_id.map(Into::into), reply.granted)
    }
}
