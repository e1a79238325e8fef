//! Who a process is. Its disk says so, not its command line: an id belongs to the disk that the votes are on.
//!
//! ```text
//!   new data directory ──first start──▶ waiting ──Bind, synced──▶ named ──▶ a member for as long as the disk lives
//!                                      (identity)              (cluster id, member id)
//! ```
//!
//! All of it is in the database of the log, beside the vote and the entries. So a disk that is lost takes the name with it:
//! what starts on the emptied disk is one more waiting process, which nothing that was promised under the old id can be
//! asked of.

use super::MEMBERS_MAX;
use bincode::{Decode, Encode};
use holdfast_wire::LeaseConfig;
use std::fmt;

/// Longest id of a cluster, in bytes.
const CLUSTER_ID_BYTES_MAX: usize = 64;
/// Largest member id: it is a JSON number too.
pub const MEMBER_ID_MAX: u64 = (1 << 53) - 1;

/// A random number that is written with the database of the log when that is made, and lost only with it.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct DiskIdentity(u128);

impl DiskIdentity {
    /// A new one.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

impl fmt::Display for DiskIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for DiskIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Starts of a disk that are remembered with it. A peer that has not met a member for more starts than these takes its word
/// for what lies between. They are in every hello: 8 KiB.
pub const STARTS_KEPT: usize = 1024;

/// The starts of a disk. Each start draws a random number and writes it down, so that of two directories with one history
/// (a copy, or one that was set back) each lacks what the other has done since.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Starts {
    /// How many there were.
    count: u64,
    /// Their random numbers, the newest last; at most [`STARTS_KEPT`].
    recent: Vec<u64>,
}

/// One start of a disk, as others have seen it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Its number, from 1.
    pub number: u64,
    /// Its random number.
    pub random: u64,
}

impl Starts {
    /// Adds a start.
    pub fn begin(&mut self) {
        self.count = self.count.saturating_add(1);
        self.recent.push(rand::random());
        let excess = self.recent.len().saturating_sub(STARTS_KEPT);
        self.recent.drain(..excess);
    }

    /// The newest.
    pub fn last(&self) -> Start {
        Start { number: self.count, random: self.recent.last().copied().unwrap_or(0) }
    }

    /// Whether they can be those of a disk: what came over the network has to be checked.
    pub fn are_plausible(&self) -> bool {
        let known = self.recent.len() as u64;
        (1..=STARTS_KEPT as u64).contains(&known) && known == self.count.min(STARTS_KEPT as u64)
    }

    /// Whether that start is one of this history, as far as it is remembered.
    pub fn include(&self, start: Start) -> bool {
        let Some(back) = self.count.checked_sub(start.number) else { return false };
        let place =
            usize::try_from(back).ok().and_then(|back| self.recent.len().checked_sub(back.checked_add(1)?));
        place.is_none_or(|place| self.recent[place] == start.random)
    }
}

/// What the log's database knows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// See there.
    pub identity: DiskIdentity,
    /// Its starts, this one the last.
    pub starts: Starts,
}

/// Which member of which cluster a disk is. It is given once; only the coordinator of an init adds to its own who the others
/// are.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Naming {
    /// The cluster.
    pub cluster_id: String,
    /// The id in it.
    pub member_id: u64,
    /// Of the members that `cluster init` named: what the cluster is formed with.
    pub founding: Option<Founding>,
}

/// What `cluster init` said. Each of the founding members has it, so that each of them can lead first.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Founding {
    /// Peer addresses of the founding members; their ids are 1..n in this order.
    pub members: Vec<String>,
    /// Id of the one that the operator asked, and that alone writes the initial membership.
    pub coordinator: u64,
    /// Lease durations of the new cluster.
    pub lease: LeaseConfig,
    /// How long terminated backends are kept, in milliseconds of cluster time.
    pub terminated_keep_ms: u64,
    /// Disk identities in the order of `members`, once all of them have answered. Only the coordinator has them, and
    /// with them it writes the initial membership.
    pub identities: Vec<DiskIdentity>,
}

impl Naming {
    /// Whether this disk began an init that has not been answered by everybody yet.
    pub fn is_unfinished_init(&self) -> bool {
        self.founding
            .as_ref()
            .is_some_and(|founding| founding.coordinator == self.member_id && founding.identities.is_empty())
    }

    /// Whether it is one that another process can have sent: the name that a coordinator has is its own to give.
    pub fn is_plausible(&self) -> bool {
        let named = (1..=CLUSTER_ID_BYTES_MAX).contains(&self.cluster_id.len())
            && (1..=MEMBER_ID_MAX).contains(&self.member_id);
        named
            && self.founding.as_ref().is_none_or(|founding| {
                let ids = 1..=founding.members.len() as u64;
                founding.members.len() <= MEMBERS_MAX
                    && ids.contains(&self.member_id)
                    && ids.contains(&founding.coordinator)
                    && founding.coordinator != self.member_id
                    && founding.identities.is_empty()
                    && founding.lease.check().is_ok()
            })
    }

    /// Whether both name the same member of the same cluster.
    pub fn is_same_member(&self, other: &Self) -> bool {
        self.cluster_id == other.cluster_id && self.member_id == other.member_id
    }
}

impl Founding {
    /// Address of the member that was asked.
    pub fn coordinator_addr(&self) -> &str {
        let place = usize::try_from(self.coordinator).ok().and_then(|id| id.checked_sub(1));
        place.and_then(|place| self.members.get(place)).map_or("an unknown address", String::as_str)
    }
}

/// A named process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Me {
    /// Member id.
    pub id: u64,
    /// The cluster's id.
    pub cluster_id: String,
    /// The disk.
    pub disk: Disk,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What claims to have started so often and remembers one start.
    fn first_of(count: u64) -> Starts {
        Starts { count, recent: vec![7] }
    }

    #[test]
    fn a_history_lacks_what_its_copy_has_done() {
        let mut starts = Starts::default();
        starts.begin();
        let first = starts.last();
        let mut copy = starts.clone();
        assert!(copy.include(first));
        starts.begin();
        let second = starts.last();
        assert!(starts.include(first) && starts.include(second));
        assert!(!copy.include(second), "set back");
        copy.begin();
        assert!(!copy.include(second), "and started again");
        copy.begin();
        assert!(!copy.include(second) && !starts.include(copy.last()));
        for _ in 0..2 * STARTS_KEPT {
            starts.begin();
        }
        assert!(starts.include(second), "too long ago to tell");
        assert!(starts.recent.len() == STARTS_KEPT && starts.are_plausible() && first_of(1).are_plausible());
        assert!(!first_of(0).are_plausible() && !first_of(2).are_plausible());
        assert!(
            !first_of(u64::MAX).include(Start { number: 0, random: 0 })
                || !first_of(u64::MAX).are_plausible()
        );
    }

    #[test]
    fn an_init_is_unfinished_until_its_coordinator_has_all_identities() {
        let founding = |coordinator, identities: usize| Founding {
            members: vec!["a:1".into(), "b:2".into()],
            coordinator,
            lease: LeaseConfig::default(),
            terminated_keep_ms: 0,
            identities: vec![DiskIdentity::random(); identities],
        };
        let named = |founding| Naming { cluster_id: "c".into(), member_id: 2, founding };
        assert!(named(Some(founding(2, 0))).is_unfinished_init());
        assert!(!named(Some(founding(2, 2))).is_unfinished_init());
        assert!(!named(Some(founding(1, 0))).is_unfinished_init());
        assert!(!named(None).is_unfinished_init());
        assert_eq!(founding(2, 0).coordinator_addr(), "b:2");
    }
}
