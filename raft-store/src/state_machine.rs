//! openraft's view of the state: applies entries in batches, builds and installs snapshots.

use crate::snapshots::{SnapshotDir, Snapshots};
use crate::state_db::StateHandle;
use crate::types::{Applied, LogId, Response, SnapshotMeta, Stamper, StoredMembership, TypeConfig};
use futures::{Stream, StreamExt};
use holdfast_core::apply::{Position, apply, apply_blank};
use holdfast_core::codec::decode;
use holdfast_core::command::Proposal;
use holdfast_core::kv::Txn;
use holdfast_core::outcome::Effect;
use openraft::OptionalSend;
use openraft::entry::EntryPayload;
use openraft::storage::{ApplyResponder, EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::{broadcast, watch};

/// Most entries applied in one write batch.
const APPLY_BATCH_MAX: usize = 512;

/// What a snapshot is in this process: a directory.
pub type SnapshotData = Arc<SnapshotDir>;

/// How far the state is applied, for those who wait for it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AppliedTo {
    /// Log index.
    pub index: u64,
    /// Cluster time in milliseconds.
    pub cluster_time_ms: u64,
}

/// See the module.
pub struct StateMachine {
    state: StateHandle,
    snapshots: Arc<Snapshots>,
    stamper: Arc<Stamper>,
    applied: watch::Sender<AppliedTo>,
    effects: broadcast::Sender<Arc<[Effect]>>,
}

fn io_error(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

impl StateMachine {
    /// A state machine on an opened state.
    pub fn new(
        state: StateHandle,
        snapshots: Arc<Snapshots>,
        stamper: Arc<Stamper>,
        applied: watch::Sender<AppliedTo>,
        effects: broadcast::Sender<Arc<[Effect]>>,
    ) -> io::Result<Self> {
        let this = Self { state, snapshots, stamper, applied, effects };
        this.publish_progress()?;
        Ok(this)
    }

    fn publish_progress(&self) -> io::Result<()> {
        let (applied, _) = self.state.applied().map_err(io_error)?;
        let progress = holdfast_core::view::View(&self.state).progress().map_err(io_error)?;
        self.stamper.last_applied_ms.store(progress.cluster_time_ms, Ordering::Release);
        self.applied.send_replace(AppliedTo {
            index: applied.map_or(0, |id: LogId| id.index),
            cluster_time_ms: progress.cluster_time_ms,
        });
        Ok(())
    }

    fn apply_batch(&self, batch: Vec<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let mut txn = Txn::new(&self.state);
        let mut answers: Vec<(ApplyResponder<TypeConfig>, Response)> = Vec::new();
        let mut effects = Vec::new();
        let mut membership = None;
        let mut last = None;
        let mut cluster_time_ms = self.stamper.last_applied_ms.load(Ordering::Acquire);
        for (entry, responder) in batch {
            let at = Position { term: entry.log_id.leader_id.term, index: entry.log_id.index };
            last = Some(entry.log_id);
            let response = match &entry.payload {
                EntryPayload::Normal(proposed) => {
                    let stamp = proposed.stamp.ok_or_else(|| io_error("an entry in the log has no stamp"))?;
                    let proposal: Proposal = decode(&proposed.bytes).map_err(io_error)?;
                    let applied = apply(&mut txn, at, stamp, &proposal).map_err(io_error)?;
                    effects.extend(applied.effects);
                    cluster_time_ms = cluster_time_ms.max(stamp.cluster_time_ms);
                    Response(Some(Applied {
                        outcome: applied.outcome,
                        replayed: applied.replayed,
                        cluster_time_ms,
                    }))
                }
                EntryPayload::Membership(m) => {
                    membership = Some(StoredMembership::new(Some(entry.log_id), m.clone()));
                    apply_blank(&mut txn, at).map_err(io_error)?;
                    Response(None)
                }
                EntryPayload::Blank => {
                    apply_blank(&mut txn, at).map_err(io_error)?;
                    Response(None)
                }
            };
            if let Some(responder) = responder {
                answers.push((responder, response));
            }
        }
        let Some(last) = last else { return Ok(()) };
        let writes = txn.into_writes();
        self.state.commit(&writes, last, membership.as_ref())?;
        self.publish_progress()?;
        for (responder, response) in answers {
            responder.send(response);
        }
        if !effects.is_empty() {
            // Nobody listening is fine.
            let _ = self.effects.send(effects.into());
        }
        Ok(())
    }
}

/// Runs what may wait for the disk without holding up the other tasks of this worker thread.
pub(crate) fn off_the_worker<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(tokio::runtime::RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        // There is no other worker to hand over to.
        _ => work(),
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        self.state.applied().map_err(io_error)
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut batches = entries.ready_chunks(APPLY_BATCH_MAX);
        while let Some(batch) = batches.next().await {
            let batch = batch.into_iter().collect::<io::Result<Vec<_>>>()?;
            off_the_worker(|| self.apply_batch(batch))?;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { state: self.state.clone(), snapshots: self.snapshots.clone() }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotData) -> io::Result<()> {
        let (applied, _) = self.state.applied().map_err(io_error)?;
        if applied >= meta.last_log_id {
            return Ok(());
        }
        off_the_worker(|| {
            let ours = self.snapshots.adopt(&snapshot, meta)?;
            self.state.replace(&ours.path)
        })?;
        self.publish_progress()?;
        // What the skipped entries did is not known in detail.
        let everything: Arc<[Effect]> = Arc::new([Effect::Everything]);
        let _ = self.effects.send(everything);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf>> {
        Ok(self.snapshots.current().map(|(meta, snapshot)| Snapshot { meta, snapshot }))
    }
}

type SnapshotOf = openraft::type_config::alias::SnapshotOf<TypeConfig, SnapshotData>;

/// Builds one snapshot.
pub struct SnapshotBuilder {
    state: StateHandle,
    snapshots: Arc<Snapshots>,
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf> {
        let (state, snapshots) = (self.state.clone(), self.snapshots.clone());
        tokio::task::spawn_blocking(move || {
            let aside = snapshots.aside("making")?;
            // The meta is read from the copy itself, so that it can't belong to another instant than the data.
            let meta = state.checkpoint(&aside)?;
            let snapshot = snapshots.publish(&aside, &meta)?;
            Ok(Snapshot { meta, snapshot })
        })
        .await
        .map_err(io_error)?
    }
}
