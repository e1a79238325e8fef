//! Peer traffic: a binary stream on its own listener.
//!
//! Every connection begins with a [`wire::Hello`] that says who connects to whom and for what:
//!
//! ```text
//! rpc       requests with ids, answered in any order: votes, heartbeats, forwarded proposals, read confirmations
//! append    AppendEntries in order, answered in order, many under way at once
//! snapshot  one snapshot: header, checksummed chunks, one answer
//! ```

pub mod client;
mod hold;
pub mod network;
pub mod server;
pub mod wire;

use crate::boot_clock::boot_ms;
use crate::checksums::Checksums;
use crate::members::Standing;
use crate::rejoin::Rejoin;
use crate::restore::is_prefix;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio_util::codec::{Framed, LengthDelimitedCodec};

/// Longest frame in bytes: an append of the largest batch, with room.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// Time to connect and say hello.
pub const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Bytes of one chunk of a snapshot.
pub const SNAPSHOT_CHUNK_BYTES: usize = 256 << 10;
/// A snapshot transfer without progress for this long is given up.
pub const SNAPSHOT_STALL: Duration = Duration::from_secs(20);
/// AppendEntries under way on one append connection.
pub const APPENDS_IN_FLIGHT_MAX: usize = 64;

/// How a member begins to say that it belongs to another cluster.
pub const OTHER_CLUSTER: &str = "this member belongs to cluster";

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

/// What this node tells its peers and learns from them.
pub struct Directory {
    /// This member.
    pub id: u64,
    /// This member's URL.
    pub url: String,
    /// The cluster's id, once formed here.
    pub cluster_id: Mutex<Option<String>>,
    /// Told of formed peers while this member is not formed.
    pub rejoin: Arc<Rejoin>,
    /// Who belongs to the cluster, and where.
    pub standing: Standing,
    /// The replicas' checksums.
    pub checksums: Checksums,
    urls: Mutex<BTreeMap<u64, String>>,
    /// Term and id of the newest leader that sent anything.
    leader: Mutex<Option<(u64, u64)>>,
    /// Members that say they belong to another cluster, and what they say.
    foreign: Mutex<BTreeMap<u64, String>>,
    /// For each peer that appends are sent to: to be told that somebody waits there for the commit index.
    hurries: Mutex<BTreeMap<u64, Arc<Notify>>>,
    changed: watch::Sender<u64>,
}

impl Directory {
    /// A directory that knows this member only.
    pub fn new(id: u64, url: String, rejoin: Arc<Rejoin>) -> Self {
        let urls = Mutex::new(BTreeMap::from([(id, url.clone())]));
        Self {
            id,
            url,
            cluster_id: Mutex::new(None),
            rejoin,
            standing: Standing::default(),
            checksums: Checksums::default(),
            urls,
            leader: Mutex::default(),
            foreign: Mutex::default(),
            hurries: Mutex::default(),
            changed: watch::Sender::new(0),
        }
    }

    /// With what an earlier run left about checksums.
    pub fn with_checksums(self, checksums: Checksums) -> Self {
        Self { checksums, ..self }
    }

    /// A peer said which cluster it belongs to. An error refuses the peer.
    pub fn compare_cluster(&self, theirs: Option<&str>) -> Result<(), String> {
        match (self.cluster_id(), theirs) {
            // Restored from one backup, and one of the two has not heard of the forming of the cluster yet.
            (Some(ours), Some(theirs)) if is_prefix(theirs) && ours.starts_with(theirs) => Ok(()),
            (Some(ours), Some(theirs))
                if ours != theirs && !(is_prefix(&ours) && theirs.starts_with(&ours)) =>
            {
                Err(format!("{OTHER_CLUSTER} {ours}, not {theirs}"))
            }
            (ours, Some(theirs)) if ours.as_deref() != Some(theirs) => {
                self.rejoin.met_formed_peer().map_err(|e| format!("marking a rejoin failed: {e}"))
            }
            _ => Ok(()),
        }
    }

    /// A leader sent something.
    pub fn heard_leader(&self, term: u64, id: u64) {
        let mut leader = self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        *leader = (*leader).max(Some((term, id)));
    }

    /// The leader of a later term than `term`, if one has sent anything.
    pub fn leader_after(&self, term: u64) -> Option<u64> {
        let leader = *self.leader.lock().unwrap_or_else(PoisonError::into_inner);
        leader.filter(|(heard, id)| *heard > term && *id != self.id).map(|(_, id)| id)
    }

    /// A member was reached; `refusal` is what it said if it would not have us.
    pub fn answered(&self, id: u64, refusal: Option<&str>) {
        let mut foreign = self.foreign.lock().unwrap_or_else(PoisonError::into_inner);
        match refusal {
            Some(why) if why.contains(OTHER_CLUSTER) => {
                foreign.insert(id, why.to_owned());
            }
            _ => {
                foreign.remove(&id);
            }
        }
    }

    /// Members that belong to another cluster, with what they say.
    pub fn foreign(&self) -> BTreeMap<u64, String> {
        self.foreign.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What tells the connection that appends to a member that it has to send the commit index now. Members are few, and
    /// their ids are never used twice, so none is forgotten.
    pub fn hurry(&self, id: u64) -> Arc<Notify> {
        self.hurries.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default().clone()
    }

    /// A peer said where its HTTP API is.
    pub fn learn(&self, id: u64, url: &str) {
        let mut urls = self.urls.lock().unwrap_or_else(PoisonError::into_inner);
        let room = urls.len() < PEERS_KNOWN_MAX || urls.contains_key(&id);
        if room && urls.get(&id).map(String::as_str) != Some(url) {
            urls.insert(id, url.to_owned());
            self.changed.send_modify(|n| *n += 1);
        }
    }

    /// URL of a member, once known.
    pub fn url_of(&self, id: u64) -> Option<String> {
        self.urls.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Changes whenever a URL is learnt.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The cluster's id, once formed here.
    pub fn cluster_id(&self) -> Option<String> {
        self.cluster_id.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the cluster's id.
    pub fn set_cluster_id(&self, id: String) {
        *self.cluster_id.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
    }
}

/// Milliseconds since `then`, a [`boot_ms`].
pub fn since_ms(then: u64) -> u64 {
    boot_ms().saturating_sub(then)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_restored_from_one_backup_know_each_other_before_and_after_the_forming_and_no_others() {
        const BACKUP: &str = "restored-0123456789abcdef-";
        let formed = format!("{BACKUP}00ff");
        let other = "restored-ffffffffffffffff-";
        let directory = |id: Option<&str>, dir: &std::path::Path| {
            let rejoin = Arc::new(Rejoin::open(dir, false).unwrap());
            let directory = Directory::new(1, "http://a".into(), rejoin);
            *directory.cluster_id.lock().unwrap() = id.map(str::to_owned);
            directory
        };
        for (ours, theirs, known, waits) in [
            (Some(BACKUP), Some(BACKUP), true, false),
            // It may have forgotten what it had acknowledged.
            (Some(BACKUP), Some(formed.as_str()), true, true),
            (Some(&formed), Some(BACKUP), true, false),
            (Some(&formed), Some(&formed), true, false),
            (Some(&formed), None, true, false),
            (None, Some(BACKUP), true, true),
            (Some(BACKUP), Some(other), false, false),
            (Some(other), Some(&formed), false, false),
            (Some(&formed), Some(&format!("{BACKUP}ee")), false, false),
            (Some(BACKUP), Some("0123"), false, false),
            (Some("0123"), Some(BACKUP), false, false),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let directory = directory(ours, dir.path());
            assert_eq!(directory.compare_cluster(theirs).is_ok(), known, "{ours:?} {theirs:?}");
            assert_eq!(directory.rejoin.may_vote(9).unwrap(), !waits, "{ours:?} {theirs:?}");
        }
    }
}
