//! What the leader does by itself: forms a new cluster, keeps cluster time moving while keys are held, sweeps, and asks
//! backends to end whose time is over.

use crate::boot_clock::{boot_ms, wall_ms};
use crate::store::Inner;
use crate::transport::wire::ProposeRefusal;
use bytes::Bytes;
use holdfast_core::codec::encode;
use holdfast_core::command::{Command, FormCluster, Proposal, Sweep};
use holdfast_core::kv::StateError;
use holdfast_core::limits::{CHECKSUM_EVERY, SWEEP_KEYS_MAX, TERMINATED_KEEP_MS_DEFAULT};
use holdfast_core::view::View;
use openraft::async_runtime::watch::WatchReceiver;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often the keeper looks.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A leader of held keys proposes a tick when no entry was applied for this long.
const TICK_AFTER_MS: u64 = 1_000;
/// When no entry was applied for this long, the leader proposes ticks up to the next index at which checksums are published,
/// so that what was written last is compared too.
const COMPARE_AFTER_MS: u64 = 10_000;
/// Bytes of log entries between snapshots at most. Two such intervals are kept at most, and what RocksDB has not compacted
/// yet.
const LOG_BYTES_PER_SNAPSHOT: u64 = 256 << 20;
/// Entries in a row that end what is due, before the keeper looks at everything else again.
const ENDS_IN_A_ROW_MAX: usize = 64;
/// Deadline of the keeper's own proposals; it looks again afterwards.
const PROPOSE_DEADLINE: Duration = Duration::from_secs(2);

/// Runs until the replica stops.
pub async fn run(inner: Arc<Inner>) {
    let mut applied = inner.applied.clone();
    let mut last_applied = (0, boot_ms());
    let mut snapshot = (0, 0);
    loop {
        bound_log(&inner, &mut snapshot).await;
        let result = look(&inner, &mut last_applied).await;
        if let Err(error) = result {
            inner.fail(error.to_string());
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            // The entry that forms the cluster is seen at once.
            changed = applied.changed(), if !inner.formed.load(Ordering::Acquire) => {
                if changed.is_err() { return }
            }
            () = inner.cancel.cancelled() => return,
        }
    }
}

async fn look(inner: &Arc<Inner>, last_applied: &mut (u64, u64)) -> Result<(), StateError> {
    let view = View(inner.state.clone());
    if !inner.formed.load(Ordering::Acquire)
        && let Some(cluster) = view.cluster()?
    {
        if cluster.cluster_id != inner.naming.cluster_id {
            let (named, formed) = (&inner.naming.cluster_id, cluster.cluster_id);
            inner.fail(format!("this disk is that of cluster {named}, but its log formed cluster {formed}"));
            return Ok(());
        }
        inner.formed.store(true, Ordering::Release);
    }
    let applied = inner.applied.borrow().index;
    let sound = !inner.directory.checksums.is_stopped();
    inner.raft.runtime_config().elect(sound && inner.removed().is_none() && inner.disk.may_lead());
    if applied != last_applied.0 {
        *last_applied = (applied, boot_ms());
    }
    let (leads, term) = {
        let metrics = inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        (metrics.current_leader == Some(inner.id) && metrics.state.is_leader(), metrics.current_term)
    };
    if !leads || !inner.disk.may_lead() {
        return Ok(());
    }
    if !inner.formed.load(Ordering::Acquire) {
        propose(inner, form(inner), Some(wall_ms())).await;
        return Ok(());
    }
    let progress = view.progress()?;
    if progress.keys_held > 0 && boot_ms().saturating_sub(last_applied.1) >= TICK_AFTER_MS {
        propose(inner, Command::Tick, None).await;
    }
    let quiet = boot_ms().saturating_sub(last_applied.1) >= COMPARE_AFTER_MS;
    let awaited = inner.directory.checksums.is_awaited_beyond(applied - applied % CHECKSUM_EVERY);
    if !applied.is_multiple_of(CHECKSUM_EVERY) && (quiet || awaited) {
        for _ in applied..applied.next_multiple_of(CHECKSUM_EVERY) {
            if !propose(inner, Command::Tick, None).await {
                break;
            }
        }
    }
    sweep(inner, &view, term).await?;
    end_due(inner, &view, term).await
}

/// Asks for a snapshot when the log has grown by many bytes since the last one: entries can be few and large. openraft
/// counts entries by itself. `last` is the last snapshot's index, and how much had been appended when it was seen.
async fn bound_log(inner: &Inner, last: &mut (u64, u64)) {
    let index = inner.snapshot_index();
    let appended = inner.log.appended_bytes();
    if index != last.0 {
        // openraft keeps a number of entries behind a snapshot, whatever their size; what the one before this holds goes.
        if last.0 > 0 {
            let _ = inner.raft.trigger().purge_log(last.0).await;
        }
        *last = (index, appended);
    }
    if appended - last.1 >= LOG_BYTES_PER_SNAPSHOT {
        last.1 = appended;
        // A replica that is stopping needs none.
        let _ = inner.raft.trigger().snapshot().await;
    }
}

async fn sweep(
    inner: &Arc<Inner>,
    view: &View<crate::state_db::StateHandle>,
    term: u64,
) -> Result<(), StateError> {
    loop {
        let now_ms = now_ms(inner, term);
        let keys = view.expired_candidates(now_ms, SWEEP_KEYS_MAX)?;
        let records = view.has_old_records(now_ms)?;
        let more = keys.len() == SWEEP_KEYS_MAX;
        if keys.is_empty() && !records {
            return Ok(());
        }
        let done = propose(inner, Command::Sweep(Sweep { keys, records }), None).await;
        if !done || !more || inner.cancel.is_cancelled() {
            return Ok(());
        }
    }
}

/// Asks for the end of what has reached a limit or whose drone's drain is due. Entries decide by themselves what that is.
async fn end_due(
    inner: &Arc<Inner>,
    view: &View<crate::state_db::StateHandle>,
    term: u64,
) -> Result<(), StateError> {
    for _ in 0..ENDS_IN_A_ROW_MAX {
        if !view.has_ends_due(now_ms(inner, term))? || inner.cancel.is_cancelled() {
            break;
        }
        if !propose(inner, Command::EndDue, None).await {
            break;
        }
    }
    Ok(())
}

/// Cluster time as this leader's clock has it.
fn now_ms(inner: &Inner, term: u64) -> u64 {
    // Without a stamp of this reign there is no live clock yet; applied time alone says what is surely past.
    inner.stamper.now_ms(term).unwrap_or(0).max(inner.applied.borrow().cluster_time_ms)
}

/// What forms the cluster. A member without a founding leads an unformed cluster only after a restore, and then lease and
/// retention are those of the backup.
fn form(inner: &Inner) -> Command {
    let founding = inner.naming.founding.as_ref();
    Command::FormCluster(FormCluster {
        cluster_id: inner.naming.cluster_id.clone(),
        token_secret: rand::random(),
        lease: founding.map_or_else(Default::default, |founding| founding.lease),
        terminated_keep_ms: founding
            .map_or(TERMINATED_KEEP_MS_DEFAULT, |founding| founding.terminated_keep_ms),
    })
}

async fn propose(inner: &Arc<Inner>, command: Command, anchor_ms: Option<u64>) -> bool {
    let bytes = Bytes::from(encode(&Proposal { command, idempotency: None }));
    match inner.propose_with(bytes, anchor_ms, PROPOSE_DEADLINE).await {
        Ok(_) => true,
        Err(ProposeRefusal::NotLeader) => false,
        Err(refusal) => {
            tracing::debug!(?refusal, "the keeper's proposal has no answer; it will look again");
            false
        }
    }
}
