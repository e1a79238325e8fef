//! openraft's view of the state: applies entries in batches, builds and installs snapshots.
//!
//! Entries are applied on a thread of their own: the database may stall or read the disk, and the thread that runs Raft
//! must never wait for that. The answers go from there straight to those who wait for them.

use crate::effects::Effects;
use crate::membership::AppliedMembers;
use crate::row_cache::{CachedState, RowCache};
use crate::snapshots::{SnapshotDir, Snapshots};
use crate::state_db::StateHandle;
use crate::types::{Applied, LogId, Response, SnapshotMeta, Stamper, StoredMembership, TypeConfig};
use futures::{Stream, StreamExt};
use holdfast_core::apply::{Position, apply, apply_blank, apply_membership};
use holdfast_core::codec::decode;
use holdfast_core::command::Proposal;
use holdfast_core::kv::{Head, Txn};
use holdfast_core::outcome::Effect;
use openraft::OptionalSend;
use openraft::entry::EntryPayload;
use openraft::storage::{ApplyResponder, EntryResponder, RaftSnapshotBuilder, RaftStateMachine, Snapshot};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use tokio::sync::{oneshot, watch};

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

/// Entries for the state thread, and where to say that they are applied.
struct Job {
    batch: Vec<EntryResponder<TypeConfig>>,
    done: oneshot::Sender<io::Result<()>>,
}

/// See the module.
pub struct StateMachine {
    applier: Arc<Applier>,
    jobs: mpsc::Sender<Job>,
}

/// What applies entries, on the state thread.
struct Applier {
    state: StateHandle,
    snapshots: Arc<Snapshots>,
    stamper: Arc<Stamper>,
    applied: watch::Sender<AppliedTo>,
    members: watch::Sender<AppliedMembers>,
    effects: Arc<Effects>,
    /// What one batch leaves for the next one.
    kept: Mutex<Kept>,
}

/// See [`Applier::kept`].
#[derive(Default)]
struct Kept {
    cache: RowCache,
    head: Option<Head>,
}

fn io_error(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(error.to_string())
}

impl StateMachine {
    /// A state machine on an opened state. Starts its thread, which ends when this is dropped.
    pub fn new(
        state: StateHandle,
        snapshots: Arc<Snapshots>,
        stamper: Arc<Stamper>,
        applied: watch::Sender<AppliedTo>,
        members: watch::Sender<AppliedMembers>,
        effects: Arc<Effects>,
    ) -> io::Result<Self> {
        let kept = Mutex::default();
        let applier = Arc::new(Applier { state, snapshots, stamper, applied, members, effects, kept });
        applier.publish_progress()?;
        let (jobs, queue) = mpsc::channel::<Job>();
        let works = applier.clone();
        std::thread::Builder::new().name("state".into()).spawn(move || {
            while let Ok(job) = queue.recv() {
                // Nobody waits any more when the replica stops.
                let _ = job.done.send(works.apply_batch(job.batch));
            }
        })?;
        Ok(Self { applier, jobs })
    }
}

impl Applier {
    fn publish_progress(&self) -> io::Result<()> {
        let (applied, membership) = self.state.applied().map_err(io_error)?;
        self.publish_members(&membership)?;
        let progress = holdfast_core::view::View(&self.state).progress().map_err(io_error)?;
        self.publish(AppliedTo {
            index: applied.map_or(0, |id: LogId| id.index),
            cluster_time_ms: progress.cluster_time_ms,
        });
        Ok(())
    }

    /// Called only where nothing else is applied meanwhile, so that the two records are of one instant: a membership beside
    /// the used ids of a later one would make a new member look removed.
    fn publish_members(&self, membership: &StoredMembership) -> io::Result<()> {
        let used = holdfast_core::view::View(&self.state).member_ids().map_err(io_error)?;
        let members = membership.membership().nodes().map(|(id, node)| (*id, node.identity)).collect();
        self.members.send_replace(AppliedMembers { used, members });
        Ok(())
    }

    fn publish(&self, to: AppliedTo) {
        self.stamper.last_applied_ms.store(to.cluster_time_ms, Ordering::Release);
        self.applied.send_replace(to);
    }

    fn apply_batch(&self, batch: Vec<EntryResponder<TypeConfig>>) -> io::Result<()> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Kept { cache, head } = &mut *kept;
        let state = CachedState { state: &self.state, cache };
        let mut txn = Txn::after(&state, head.take());
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
                    cluster_time_ms = applied.cluster_time_ms;
                    Response(Some(Applied {
                        outcome: applied.outcome,
                        replayed: applied.replayed,
                        cluster_time_ms,
                    }))
                }
                EntryPayload::Membership(m) => {
                    membership = Some(StoredMembership::new(Some(entry.log_id), m.clone()));
                    apply_membership(&mut txn, at, m.nodes().map(|(id, _)| *id)).map_err(io_error)?;
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
        *head = txn.head();
        let writes = txn.into_writes();
        cache.absorb(&writes);
        self.state.commit(writes, last, membership.clone())?;
        if let Some(membership) = membership {
            self.publish_members(&membership)?;
        }
        self.publish(AppliedTo { index: last.index, cluster_time_ms });
        for (responder, response) in answers {
            responder.send(response);
        }
        self.effects.tell(&effects);
        Ok(())
    }
}

/// The state thread ended in the middle of something: an assertion failed there.
fn thread_ended() -> io::Error {
    io::Error::other("the state thread has ended")
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        self.applier.state.applied().map_err(io_error)
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = io::Result<EntryResponder<TypeConfig>>> + Unpin + OptionalSend,
    {
        let mut batches = entries.ready_chunks(APPLY_BATCH_MAX);
        while let Some(batch) = batches.next().await {
            let batch = batch.into_iter().collect::<io::Result<Vec<_>>>()?;
            let (done, applied) = oneshot::channel();
            self.jobs.send(Job { batch, done }).map_err(|_| thread_ended())?;
            applied.await.map_err(|_| thread_ended())??;
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder { state: self.applier.state.clone(), snapshots: self.applier.snapshots.clone() }
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<SnapshotBuilder> {
        let snapshots = &self.applier.snapshots;
        if snapshots.is_closed() || (!force && (snapshots.is_held() || snapshots.is_paused())) {
            return None;
        }
        Some(self.get_snapshot_builder().await)
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: SnapshotData) -> io::Result<()> {
        let (applier, meta) = (self.applier.clone(), meta.clone());
        let install = move || {
            let (applied, _) = applier.state.applied().map_err(io_error)?;
            if applied >= meta.last_log_id {
                return Ok(false);
            }
            *applier.kept.lock().unwrap_or_else(PoisonError::into_inner) = Kept::default();
            let ours = applier.snapshots.adopt(&snapshot, &meta)?;
            applier.state.replace(&ours.path)?;
            applier.publish_progress()?;
            Ok(true)
        };
        let installed: io::Result<bool> = tokio::task::spawn_blocking(install).await.map_err(io_error)?;
        if !installed? {
            return Ok(());
        }
        // What the skipped entries did is not known in detail.
        self.applier.effects.tell(&[Effect::Everything]);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> io::Result<Option<SnapshotOf>> {
        Ok(self.applier.snapshots.current().map(|(meta, snapshot)| Snapshot { meta, snapshot }))
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
