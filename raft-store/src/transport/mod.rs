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
pub mod network;
pub mod server;
pub mod wire;

use crate::boot_clock::boot_ms;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;
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

/// A framed connection.
pub type Frames = Framed<TcpStream, LengthDelimitedCodec>;

/// Frames a connected stream.
pub fn frames(stream: TcpStream) -> Frames {
    // Small messages wait for nobody; a failure to set it costs speed only.
    let _ = stream.set_nodelay(true);
    Framed::new(
        stream,
        LengthDelimitedCodec::builder().little_endian().max_frame_length(FRAME_BYTES_MAX).new_codec(),
    )
}

/// What this node tells its peers and learns from them.
pub struct Directory {
    /// This member.
    pub id: u64,
    /// This member's URL.
    pub url: String,
    /// The cluster's id, once formed here.
    pub cluster_id: Mutex<Option<String>>,
    urls: Mutex<BTreeMap<u64, String>>,
    changed: watch::Sender<u64>,
}

impl Directory {
    /// A directory that knows this member only.
    pub fn new(id: u64, url: String) -> Self {
        let urls = Mutex::new(BTreeMap::from([(id, url.clone())]));
        Self { id, url, cluster_id: Mutex::new(None), urls, changed: watch::Sender::new(0) }
    }

    /// A peer said where its HTTP API is.
    pub fn learn(&self, id: u64, url: &str) {
        let mut urls = self.urls.lock().unwrap_or_else(PoisonError::into_inner);
        if urls.get(&id).map(String::as_str) != Some(url) {
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
