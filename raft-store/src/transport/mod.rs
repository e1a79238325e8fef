//! Peer traffic: a binary stream on its own listener.
//!
//! Every connection begins with a [`wire::Hello`] that says who connects to whom and for what ([`hello`] decides whether it
//! is taken), or with a question to a process that has no name yet ([`crate::membership::waiting`]):
//!
//! ```text
//! rpc       requests with ids, answered in any order: votes, heartbeats, forwarded proposals, read confirmations
//! append    AppendEntries in order, answered in order, many under way at once
//! snapshot  one snapshot: header, checksummed chunks, one answer
//! ```

pub mod client;
mod contradiction;
pub mod hello;
mod hold;
mod learner_gate;
pub mod network;
pub mod server;
pub mod wire;

use crate::boot_clock::boot_ms;
use crate::checksums::Checksums;
use crate::membership::Standing;
use crate::membership::naming::{DiskIdentity, Me, Start, Starts};
use hello::Sender;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use wire::Refusal;

/// Longest frame in bytes: an append of the largest batch, with room.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// Longest first frame of a connection, in bytes: who sends it is not known yet.
pub const OPENING_BYTES_MAX: usize = 64 << 10;
/// Time to connect and say hello.
pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Bytes of one chunk of a snapshot.
pub const SNAPSHOT_CHUNK_BYTES: usize = 256 << 10;
/// A snapshot transfer without progress for this long is given up.
pub const SNAPSHOT_STALL: Duration = Duration::from_secs(20);
/// AppendEntries under way on one append connection.
pub const APPENDS_IN_FLIGHT_MAX: usize = 64;

/// Peers whose URLs are remembered.
pub const PEERS_KNOWN_MAX: usize = 1024;

/// A framed connection.
pub type Frames = Framed<TcpStream, LengthDelimitedCodec>;

/// Frames a connected stream.
pub fn frames(stream: TcpStream) -> Frames {
    // Small messages wait for nobody; a failure to set it costs speed only.
    let _ = stream.set_nodelay(true);
    keep_alive(&stream);
    Framed::new(
        stream,
        LengthDelimitedCodec::builder().little_endian().max_frame_length(FRAME_BYTES_MAX).new_codec(),
    )
}

/// A peer that vanished without a word must not hold a place for ever: probe idle connections, and give up on data that
/// nobody acknowledges.
fn keep_alive(stream: &TcpStream) {
    let set = |level: libc::c_int, name: libc::c_int, value: libc::c_int| {
        // SAFETY: the descriptor is open, and the option's value is a c_int that outlives the call.
        let code = unsafe {
            libc::setsockopt(
                stream.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if code != 0 {
            tracing::debug!(name, "a socket option can't be set; a vanished peer is noticed later");
        }
    };
    set(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    set(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 10);
    set(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 3);
    set(libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3);
    set(libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 15_000);
}

/// What keeps this node from talking to a member, until it can.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// What answers at the member's address has a new disk.
    #[error("lost disk: remove this member, then add the new one")]
    LostDisk,
    /// A newer process of it was seen.
    #[error(
        "its data directory is a copy or was set back: remove this member, empty its directory, then add it"
    )]
    SetBack,
    /// It lacks what it had acknowledged to this leader.
    #[error(
        "it lacks entries that it had acknowledged: remove this member, empty its directory, then add it"
    )]
    LostAcknowledged,
    /// Something else answers there, or it refuses us.
    #[error("{0}")]
    Refuses(String),
}

/// What this node tells its peers and learns from them.
pub struct Directory {
    /// This member.
    pub me: Me,
    /// This member's URL.
    pub url: String,
    /// Who belongs to the cluster, and where.
    pub standing: Standing,
    /// The replicas' checksums.
    pub checksums: Checksums,
    urls: Mutex<BTreeMap<u64, String>>,
    /// Term and id of the newest leader that sent anything.
    leader: Mutex<Option<(u64, u64)>>,
    /// The newest start of each disk that was seen.
    seen: watch::Sender<BTreeMap<DiskIdentity, Start>>,
    /// Why the last hello in the name of each id was refused.
    refused: Mutex<BTreeMap<u64, Refusal>>,
    problems: Mutex<BTreeMap<u64, Problem>>,
    /// Of each member that this node appends to: the last term of ours in which it acknowledged anything, and up to where.
    acknowledged: Mutex<BTreeMap<u64, (u64, u64)>>,
    /// For each peer that appends are sent to: to be told that somebody waits there for the commit index.
    hurries: Mutex<BTreeMap<u64, Arc<Notify>>>,
    changed: watch::Sender<u64>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Directory {
    /// A directory that knows this member only.
    pub fn new(me: Me, url: String, standing: Standing) -> Self {
        let urls = Mutex::new(BTreeMap::from([(me.id, url.clone())]));
        Self {
            me,
            url,
            standing,
            checksums: Checksums::default(),
            urls,
            leader: Mutex::default(),
            seen: watch::Sender::default(),
            refused: Mutex::default(),
            problems: Mutex::default(),
            acknowledged: Mutex::default(),
            hurries: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// With what an earlier run left about checksums.
    pub fn with_checksums(self, checksums: Checksums) -> Self {
        Self { checksums, ..self }
    }

    /// What this node knows of a member that connects.
    pub fn sender(&self, id: u64, identity: DiskIdentity) -> Sender {
        Sender {
            // Not by the membership in force: an entry that was never committed may name another disk for this id, and
            // would keep away the very leader that could have it removed (the model found it).
            recorded: self.standing.committed_identity(id),
            removed: self.standing.is_gone(id),
            seen: self.seen.borrow().get(&identity).copied(),
        }
    }

    /// A process on that disk, with these starts, was met. False if a start of it was seen that it lacks.
    pub fn saw(&self, identity: DiskIdentity, starts: &Starts) -> bool {
        let mut may = true;
        self.seen.send_if_modified(|seen| {
            let newest = seen.get(&identity).copied();
            may = newest.is_none_or(|newest| starts.include(newest));
            if may && (seen.len() < PEERS_KNOWN_MAX || newest.is_some()) {
                seen.insert(identity, starts.last());
            }
            may && newest != Some(starts.last())
        });
        may
    }

    /// Resolves when a newer start of that disk is seen than this one.
    pub async fn until_newer(&self, identity: DiskIdentity, than: Start) {
        let mut seen = self.seen.subscribe();
        if seen.wait_for(|seen| seen.get(&identity).is_some_and(|now| *now != than)).await.is_err() {
            // The sender lives as long as this.
            std::future::pending::<()>().await;
        }
    }

    /// A member's hello was refused. Says so once: a refused member asks many times a second.
    pub fn refused(&self, id: u64, identity: DiskIdentity, refusal: &Refusal) {
        let mut refused = locked(&self.refused);
        if refused.get(&id) == Some(refusal) {
            tracing::debug!(from = id, %refusal, "refused a peer again");
        } else {
            tracing::warn!(from = id, disk = %identity, %refusal, "refused a peer");
            // An id that is made up must not make this grow.
            if refused.len() < PEERS_KNOWN_MAX || refused.contains_key(&id) {
                refused.insert(id, refusal.clone());
            }
        }
    }

    /// What keeps this node from talking to a member; `None` once it does.
    pub fn set_problem(&self, id: u64, problem: Option<Problem>) {
        let mut problems = locked(&self.problems);
        let Some(problem) = problem else {
            problems.remove(&id);
            return;
        };
        if problems.get(&id) != Some(&problem) {
            tracing::error!(member = id, %problem, "can't talk to a member");
            problems.insert(id, problem);
        }
    }

    /// A member was reached. What it has lost of what it acknowledged, it has still lost.
    pub fn reached(&self, id: u64) {
        let mut problems = locked(&self.problems);
        if problems.get(&id) != Some(&Problem::LostAcknowledged) {
            problems.remove(&id);
        }
    }

    /// This node does not lead: what it found as a leader says nothing about the next term.
    pub fn forget_losses(&self) {
        locked(&self.problems).retain(|_, problem| *problem != Problem::LostAcknowledged);
    }

    /// See [`Directory::set_problem`].
    pub fn problem(&self, id: u64) -> Option<Problem> {
        locked(&self.problems).get(&id).cloned()
    }

    /// A follower holds everything up to `index`, as it told us while we led `term`.
    pub fn acknowledged(&self, id: u64, term: u64, index: u64) {
        let mut acknowledged = locked(&self.acknowledged);
        let known = acknowledged.entry(id).or_insert((term, index));
        if term > known.0 {
            *known = (term, index);
            drop(acknowledged);
            if self.problem(id) == Some(Problem::LostAcknowledged) {
                self.set_problem(id, None);
            }
        } else if term == known.0 {
            known.1 = known.1.max(index);
        }
    }

    /// Whether a follower that lacks `index` has acknowledged it in this same term of ours, in which no other leader can have
    /// had it removed: then it does not count in this term. The next leader begins with it anew.
    pub fn has_lost(&self, id: u64, term: u64, index: u64) -> bool {
        let lost = locked(&self.acknowledged)
            .get(&id)
            .is_some_and(|(in_term, upto)| *in_term == term && *upto >= index);
        if lost {
            self.set_problem(id, Some(Problem::LostAcknowledged));
        }
        lost
    }

    /// A leader sent something.
    pub fn heard_leader(&self, term: u64, id: u64) {
        let mut leader = locked(&self.leader);
        *leader = (*leader).max(Some((term, id)));
    }

    /// The leader of a later term than `term`, if one has sent anything.
    pub fn leader_after(&self, term: u64) -> Option<u64> {
        let leader = *locked(&self.leader);
        leader.filter(|(heard, id)| *heard > term && *id != self.me.id).map(|(_, id)| id)
    }

    /// What tells the connection that appends to a member that it has to send the commit index now. Called for members alone,
    /// which are few; their ids are never used twice, so none is forgotten.
    pub fn hurry(&self, id: u64) -> Arc<Notify> {
        locked(&self.hurries).entry(id).or_default().clone()
    }

    /// A peer said where its HTTP API is.
    pub fn learn(&self, id: u64, url: &str) {
        let mut urls = locked(&self.urls);
        let room = urls.len() < PEERS_KNOWN_MAX || urls.contains_key(&id);
        if room && urls.get(&id).map(String::as_str) != Some(url) {
            urls.insert(id, url.to_owned());
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// URL of a member, once known.
    pub fn url_of(&self, id: u64) -> Option<String> {
        locked(&self.urls).get(&id).cloned()
    }

    /// Changes whenever a URL is learnt.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }
}

/// Milliseconds since `then`, a [`boot_ms`].
pub fn since_ms(then: u64) -> u64 {
    boot_ms().saturating_sub(then)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::membership::naming::Disk;

    fn directory() -> Directory {
        let disk = Disk { identity: DiskIdentity::default(), starts: Starts::default() };
        let me = Me { id: 1, cluster_id: "c".into(), disk };
        Directory::new(me, "http://a".into(), Standing::new(watch::Sender::default()))
    }

    #[test]
    fn only_what_was_acknowledged_in_this_term_can_be_lost() {
        let directory = directory();
        directory.acknowledged(2, 3, 10);
        directory.acknowledged(2, 3, 7);
        assert!(!directory.has_lost(2, 3, 11) && directory.problem(2).is_none());
        assert!(
            !directory.has_lost(2, 4, 10),
            "another leader may have had it removed between two terms of ours"
        );
        assert!(directory.has_lost(2, 3, 10));
        assert_eq!(directory.problem(2), Some(Problem::LostAcknowledged));
        directory.acknowledged(3, 3, 10);
        directory.acknowledged(3, 5, 4);
        assert!(!directory.has_lost(3, 5, 10) && directory.has_lost(3, 5, 4));
    }

    #[test]
    fn an_older_process_of_a_member_is_not_taken_for_it() {
        let (directory, disk) = (directory(), DiskIdentity::random());
        let mut starts = Starts::default();
        starts.begin();
        let mut copy = starts.clone();
        assert!(directory.saw(disk, &starts) && directory.saw(disk, &copy));
        starts.begin();
        assert!(directory.saw(disk, &starts));
        assert!(!directory.saw(disk, &copy));
        copy.begin();
        copy.begin();
        assert!(!directory.saw(disk, &copy), "however often it is started");
        assert_eq!(directory.sender(2, disk).seen, Some(starts.last()));
    }
}
