//! Backups of a running replica: the state as of one instant, as a stream of [`holdfast_backup`] bytes.
//!
//! ```text
//!   Store::backup ──▶ blocking thread: RocksDB snapshot ──rows──▶ Writer ──frames──▶ [channel] ──▶ HTTP body
//! ```
//!
//! Nothing is copied on disk and nothing is flushed for it: the rows are read from a RocksDB snapshot (in RocksDB's sense:
//! a sequence number) while entries go on being applied. Memory is bounded by the frames in the channel. A reader that
//! stops reading is given up: the snapshot that it holds keeps overwritten values on disk.

use crate::boot_clock::wall_ms;
use crate::state_db::{Frozen, StateHandle, is_position};
use crate::store::Store;
use bytes::Bytes;
use holdfast_backup::{Header, Writer};
use holdfast_core::kv::Table;
use holdfast_core::view::View;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::Instant;

/// Backups under way on one replica; each keeps a thread and overwritten values.
pub(crate) const BACKUPS_MAX: usize = 2;
/// Frames that wait for the reader of one backup.
const FRAMES_QUEUED_MAX: usize = 8;
/// A backup whose reader takes nothing for this long is given up.
const STALL: Duration = Duration::from_secs(20);
/// A backup may take this long in all.
const BACKUP_MAX: Duration = Duration::from_secs(3600);

/// A backup that has begun.
#[derive(Debug)]
pub struct Backup {
    /// What it is of.
    pub header: Header,
    /// Its bytes. An error ends them early; without the last ones a backup is refused by whoever reads it.
    pub chunks: mpsc::Receiver<io::Result<Bytes>>,
}

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupRefused {
    /// Others are under way. Try again later, or at another replica.
    #[error("{BACKUPS_MAX} backups are under way at this controller")]
    Busy,
    /// There is nothing to back up yet.
    #[error("the cluster is not formed yet")]
    NotFormed,
    /// The state can't be read.
    #[error("reading the state failed: {0}")]
    State(String),
}

impl Store {
    /// Begins a backup of the state as this replica has it now. (After [`Store::linearizable`], that is everything that
    /// was acknowledged before.)
    pub async fn backup(&self) -> Result<Backup, BackupRefused> {
        let place = Arc::clone(&self.inner.backups).try_acquire_owned().map_err(|_| BackupRefused::Busy)?;
        let (state, member) = (self.inner.state.clone(), self.inner.id);
        let cancel = self.inner.cancel.clone();
        let (begun, begins) = oneshot::channel();
        let (sender, chunks) = mpsc::channel(FRAMES_QUEUED_MAX);
        let sink =
            Sink { sender, runtime: tokio::runtime::Handle::current(), ends: Instant::now() + BACKUP_MAX };
        tokio::task::spawn_blocking(move || {
            let _place = place;
            write(&state, member, begun, &sink, &|| cancel.is_cancelled());
        });
        match begins.await {
            Ok(header) => Ok(Backup { header: header?, chunks }),
            Err(_) => Err(BackupRefused::State("the backup ended before it began".to_owned())),
        }
    }
}

pub(crate) fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(BACKUPS_MAX))
}

/// Where the frames go.
struct Sink {
    sender: mpsc::Sender<io::Result<Bytes>>,
    runtime: tokio::runtime::Handle,
    ends: Instant,
}

impl Sink {
    /// Waits for room. An error ends the backup.
    fn put(&self, bytes: Vec<u8>) -> io::Result<()> {
        let late = |what: &str| io::Error::new(io::ErrorKind::TimedOut, what.to_owned());
        if Instant::now() >= self.ends {
            return Err(late("the backup took too long"));
        }
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "nobody reads the backup any more");
        match self.sender.try_send(Ok(Bytes::from(bytes))) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(gone()),
            Err(TrySendError::Full(bytes)) => {
                let wait = async { tokio::time::timeout(STALL, self.sender.send(bytes)).await };
                match self.runtime.block_on(wait) {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err(gone()),
                    Err(_) => Err(late("the reader of the backup has stopped reading")),
                }
            }
        }
    }
}

fn header(frozen: &Frozen<'_>, member: u64) -> Result<Header, BackupRefused> {
    let failed = |error: holdfast_core::kv::StateError| BackupRefused::State(error.to_string());
    let view = View(frozen);
    let cluster = view.cluster().map_err(failed)?.ok_or(BackupRefused::NotFormed)?;
    let progress = view.progress().map_err(failed)?;
    let (applied, membership) = frozen.applied().map_err(failed)?;
    let applied = applied.ok_or(BackupRefused::NotFormed)?;
    Ok(Header {
        cluster_id: cluster.cluster_id,
        member,
        index: applied.index,
        term: applied.leader_id.term,
        cluster_time_ms: progress.cluster_time_ms,
        made_at_ms: wall_ms(),
        members: membership.membership().nodes().map(|(id, node)| (*id, node.peer_addr.clone())).collect(),
        voters: membership.membership().voter_ids().collect(),
        lease: cluster.lease,
        keys_held: progress.keys_held,
        state_checksum: progress.checksum,
        program: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

fn write(
    state: &StateHandle,
    member: u64,
    begun: oneshot::Sender<Result<Header, BackupRefused>>,
    sink: &Sink,
    stopping: &dyn Fn() -> bool,
) {
    let mut begun = Some(begun);
    let frozen = state.frozen(|frozen| {
        let Some(begun) = begun.take() else { return };
        let header = match header(frozen, member) {
            Ok(header) => header,
            Err(refused) => {
                // Whoever asked may be gone.
                let _ = begun.send(Err(refused));
                return;
            }
        };
        if begun.send(Ok(header.clone())).is_err() {
            return;
        }
        if let Err(error) = write_rows(frozen, &header, sink, stopping) {
            tracing::warn!(%error, "a backup was not finished");
            let _ = sink.sender.try_send(Err(error));
        }
    });
    if let (Err(error), Some(begun)) = (frozen, begun) {
        let _ = begun.send(Err(BackupRefused::State(error.to_string())));
    }
}

fn write_rows(
    frozen: &Frozen<'_>,
    header: &Header,
    sink: &Sink,
    stopping: &dyn Fn() -> bool,
) -> io::Result<()> {
    let (mut writer, first) = Writer::new(header);
    sink.put(first)?;
    for table in Table::ALL {
        for row in frozen.rows(table).map_err(io::Error::other)? {
            let (key, value) = row?;
            if is_position(table, &key) {
                continue;
            }
            if let Some(frame) = writer.row(table, &key, &value).map_err(io::Error::other)? {
                if stopping() {
                    return Err(io::Error::new(io::ErrorKind::Interrupted, "this controller is stopping"));
                }
                sink.put(frame)?;
            }
        }
    }
    sink.put(writer.finish())
}
