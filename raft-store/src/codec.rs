//! Bytes of what openraft gives us: entries, votes, memberships. Our own structures with bincode behind a version byte,
//! because openraft promises no stable format of its own types.

use crate::membership::naming::DiskIdentity;
use crate::types::{
    CommittedLeader, LeaderId, LogEntry, LogId, Member, Payload, Proposed, StoredMembership, Vote,
};
use bincode::{Decode, Encode};
use bytes::Bytes;
use holdfast_core::codec::{decode, encode};
use holdfast_core::command::Stamp;
use holdfast_core::kv::StateError;
use openraft::Membership;
use openraft::entry::EntryPayload;
use std::collections::{BTreeMap, BTreeSet};
use std::io;

/// Term and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WireLogId {
    pub term: u64,
    pub index: u64,
}

impl From<LogId> for WireLogId {
    fn from(id: LogId) -> Self {
        Self { term: id.leader_id.term, index: id.index }
    }
}

impl From<WireLogId> for LogId {
    fn from(id: WireLogId) -> Self {
        LogId { leader_id: CommittedLeader::new(id.term), index: id.index }
    }
}

/// A vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct WireVote {
    pub term: u64,
    pub node: u64,
    pub committed: bool,
}

impl From<Vote> for WireVote {
    fn from(vote: Vote) -> Self {
        Self { term: vote.leader_id.term, node: vote.leader_id.voted_for, committed: vote.committed }
    }
}

impl From<WireVote> for Vote {
    fn from(vote: WireVote) -> Self {
        Vote { leader_id: LeaderId { term: vote.term, voted_for: vote.node }, committed: vote.committed }
    }
}

/// A membership.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WireMembership {
    pub configs: Vec<BTreeSet<u64>>,
    /// Peer address and disk identity of each.
    pub nodes: BTreeMap<u64, (String, DiskIdentity)>,
}

impl From<&Membership<u64, Member>> for WireMembership {
    fn from(membership: &Membership<u64, Member>) -> Self {
        Self {
            configs: membership.get_joint_config().clone(),
            nodes: membership
                .nodes()
                .map(|(id, member)| (*id, (member.peer_addr.clone(), member.identity)))
                .collect(),
        }
    }
}

impl TryFrom<WireMembership> for Membership<u64, Member> {
    type Error = StateError;
    fn try_from(wire: WireMembership) -> Result<Self, StateError> {
        if wire.configs.is_empty() && wire.nodes.is_empty() {
            return Ok(Membership::default());
        }
        let member = |(id, (peer_addr, identity))| (id, Member { peer_addr, identity });
        let nodes: BTreeMap<u64, Member> = wire.nodes.into_iter().map(member).collect();
        Membership::new(wire.configs, nodes).map_err(|e| StateError::Damaged(format!("a membership: {e}")))
    }
}

/// A membership with the log id that set it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WireStoredMembership {
    pub log_id: Option<WireLogId>,
    pub membership: WireMembership,
}

impl From<&StoredMembership> for WireStoredMembership {
    fn from(stored: &StoredMembership) -> Self {
        Self { log_id: stored.log_id().map(Into::into), membership: stored.membership().into() }
    }
}

impl TryFrom<WireStoredMembership> for StoredMembership {
    type Error = StateError;
    fn try_from(wire: WireStoredMembership) -> Result<Self, StateError> {
        Ok(StoredMembership::new(wire.log_id.map(Into::into), wire.membership.try_into()?))
    }
}

/// What a snapshot's state holds.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct WireSnapshotMeta {
    pub last_log_id: Option<WireLogId>,
    pub membership: WireStoredMembership,
}

const KIND_BLANK: u8 = 0;
const KIND_NORMAL: u8 = 1;
const KIND_MEMBERSHIP: u8 = 2;
/// Version of the entry layout: `{version}{kind}{term: u64 LE}` and, for an ordinary entry,
/// `{cluster time ms: u64 LE}{flags}{proposal bytes}`.
const ENTRY_VERSION: u8 = 1;
const FLAG_OWN_TERM_ONLY: u8 = 1;
const HEADER_BYTES: usize = 10;
const STAMP_BYTES: usize = 9;

/// Encodes an entry without its index (which is the key that it is stored under).
pub fn encode_entry(entry: &LogEntry) -> Result<Vec<u8>, io::Error> {
    let header = |kind: u8, room: usize| {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + room);
        bytes.push(ENTRY_VERSION);
        bytes.push(kind);
        bytes.extend_from_slice(&entry.log_id.leader_id.term.to_le_bytes());
        bytes
    };
    Ok(match &entry.payload {
        EntryPayload::Blank => header(KIND_BLANK, 0),
        EntryPayload::Normal(proposed) => {
            // An entry without a stamp would have no time; nothing appends one but a bug.
            let stamp =
                proposed.stamp.ok_or_else(|| io::Error::other("an entry was appended without a stamp"))?;
            let mut bytes = header(KIND_NORMAL, STAMP_BYTES + proposed.bytes.len());
            bytes.extend_from_slice(&stamp.cluster_time_ms.to_le_bytes());
            bytes.push(if stamp.own_term_only { FLAG_OWN_TERM_ONLY } else { 0 });
            bytes.extend_from_slice(&proposed.bytes);
            bytes
        }
        EntryPayload::Membership(membership) => {
            let encoded = encode(&WireMembership::from(membership));
            let mut bytes = header(KIND_MEMBERSHIP, encoded.len());
            bytes.extend_from_slice(&encoded);
            bytes
        }
    })
}

/// Decodes an entry that was stored or sent with `index`.
pub fn decode_entry(index: u64, bytes: &Bytes) -> Result<LogEntry, StateError> {
    let damaged = |what: &str| StateError::Damaged(format!("log entry {index}: {what}"));
    let (header, rest) = bytes.split_at_checked(HEADER_BYTES).ok_or_else(|| damaged("too short"))?;
    if header[0] != ENTRY_VERSION {
        return Err(damaged("unknown version"));
    }
    let mut term = [0; 8];
    term.copy_from_slice(&header[2..]);
    let log_id = WireLogId { term: u64::from_le_bytes(term), index }.into();
    let payload = match header[1] {
        KIND_BLANK if rest.is_empty() => Payload::Blank,
        KIND_NORMAL => {
            let (time, rest) = rest.split_first_chunk::<8>().ok_or_else(|| damaged("too short"))?;
            let flags = *rest.first().ok_or_else(|| damaged("too short"))?;
            let stamp = Stamp {
                cluster_time_ms: u64::from_le_bytes(*time),
                own_term_only: flags & FLAG_OWN_TERM_ONLY != 0,
            };
            Payload::Normal(Proposed::decoded(bytes.slice(HEADER_BYTES + STAMP_BYTES..), Some(stamp)))
        }
        KIND_MEMBERSHIP => Payload::Membership(decode::<WireMembership>(rest)?.try_into()?),
        _ => return Err(damaged("unknown kind")),
    };
    Ok(LogEntry { log_id, payload })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(payload: Payload) -> LogEntry {
        LogEntry { log_id: WireLogId { term: 7, index: 42 }.into(), payload }
    }

    #[test]
    fn entries_survive_their_bytes() {
        let stamp = Stamp { cluster_time_ms: 1_700_000_000_123, own_term_only: true };
        let members = BTreeMap::from([
            (1, Member { peer_addr: "a:1".into(), identity: DiskIdentity::random() }),
            (2, Member::default()),
        ]);
        let membership = Membership::new(vec![BTreeSet::from([1, 2])], members).unwrap();
        for payload in [
            Payload::Blank,
            Payload::Normal(Proposed::decoded(Bytes::from_static(b"\x01abc"), Some(stamp))),
            Payload::Membership(membership),
        ] {
            let entry = entry(payload);
            let bytes = Bytes::from(encode_entry(&entry).unwrap());
            assert_eq!(decode_entry(42, &bytes).unwrap(), entry);
            for cut in 0..HEADER_BYTES {
                assert!(decode_entry(42, &bytes.slice(..cut)).is_err());
            }
        }
    }

    #[test]
    fn an_unstamped_ordinary_entry_is_not_stored() {
        let payload = Payload::Normal(Proposed::decoded(Bytes::from_static(b"x"), None));
        assert!(encode_entry(&entry(payload)).is_err());
    }
}
