//! Replicas check themselves (invariant 6): each one exchanges published checksums with all others, compares
//! ([`holdfast_core::checksums`], which is pure) and acts on what follows.
//!
//! ```text
//!   state ──own values──▶ exchange with every member ──▶ compare ─┬─ Agrees ───▶ snapshots may be sent up to here
//!                                                                ├─ Minority ─▶ mark on disk, hand over, stop for good
//!                                                                ├─ Undecided ▶ acquire nothing here; after a while: Split
//!                                                                └─ Split ────▶ acquire nothing: note on disk here, and
//!                                                                               the leader records it for all
//! ```
//!
//! *Undecided* lasts [`UNDECIDED_MAX`] at most: a member whose value is missing for longer is not waited for. The refusal
//! begins at once, in memory; only what lasts is recorded, so that a follower that publishes a moment later than another
//! leaves nothing behind.
//!
//! A snapshot makes its receiver agree with its sender, so a wrong state must not spread by one. A replica sends no
//! snapshot before a majority has confirmed the state that it holds, unless too few answer ([`CONFIRM_WAIT`]); none while
//! values differ; and none at all once it is in the minority.

pub(crate) mod accept;
mod disk;

use crate::api::{ChecksumState, ChecksumStatus, OpenError};
use crate::membership::duties::hand_over;
use crate::store::Inner;
use crate::transport::PEERS_KNOWN_MAX;
use crate::transport::wire::{Reply, Request};
use disk::Note;
use futures::future::join_all;
use holdfast_core::checksums::{Comparison, Known, Published, Verdict, compare, show_value, show_values};
use holdfast_core::command::{Command, Proposal};
use holdfast_core::kv::StateError;
use holdfast_core::limits::CHECKSUMS_KEPT;
use holdfast_core::outcome::Refusal;
use holdfast_core::records::{ChecksumSplit, ChecksumsRecord};
use holdfast_core::view::View;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// How often a replica looks whether it has published a checksum since it last asked.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often it asks although it has published none.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long one member may take to answer.
const ASK_TIMEOUT: Duration = Duration::from_millis(500);
/// Values that differ without a majority are waited for so long; from then on it is as if the missing ones never came.
const UNDECIDED_MAX: Duration = Duration::from_secs(10);
/// How long a snapshot waits for a majority to confirm the state that it holds.
const CONFIRM_WAIT: Duration = Duration::from_secs(5);
/// How long a leader that is about to stop may take to hand over.
const HAND_OVER_DEADLINE: Duration = Duration::from_secs(2);
/// How long the mark of a replica that stops for good may take to be durable before it stops all the same.
const MARK_DEADLINE: Duration = Duration::from_secs(5);
/// How long the record of a split may take to be committed; the leader tries again afterwards.
const RECORD_DEADLINE: Duration = Duration::from_secs(2);

/// What this replica knows of the checksums. Shared with the peer transport, which must not read the state.
#[derive(Debug, Default)]
pub struct Checksums {
    known: Mutex<Seen>,
    /// The newest index at which a majority has this replica's value.
    agreed: watch::Sender<u64>,
    /// This replica is in the minority.
    stopped: AtomicBool,
    /// A snapshot that ends there waits to be confirmed; 0 if none does.
    awaited: AtomicU64,
}

#[derive(Debug, Default)]
struct Seen {
    own: Published,
    others: BTreeMap<u64, Published>,
    status: ChecksumStatus,
    /// Values differ without a majority, as far as is known here: at this index.
    split: Option<u64>,
    /// The state has the record of a split, so that applying an acquisition refuses it.
    recorded: bool,
    note: Option<Note>,
}

impl Checksums {
    /// Reads what an earlier run left in the data directory. Refuses to open one whose replica was stopped for good.
    pub(crate) fn open(dir: &Path) -> Result<Self, OpenError> {
        let failed = |error: std::io::Error| OpenError::Storage {
            what: format!("reading what is known of checksums ({})", dir.display()),
            error: error.to_string(),
        };
        if let Some(why) = disk::stopped(dir).map_err(failed)? {
            return Err(OpenError::Storage {
                what: format!("opening the data directory ({})", dir.display()),
                error: why,
            });
        }
        let note = disk::read_note(dir).map_err(failed)?;
        let this = Self::default();
        {
            let mut seen = this.seen();
            seen.split = note.as_ref().map(|note| note.index);
            if let Some(note) = &note {
                seen.status = ChecksumStatus {
                    state: ChecksumState::Split,
                    index: note.index,
                    values: note.values.clone(),
                    differing: Vec::new(),
                };
            }
            seen.note = note;
        }
        Ok(this)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A member says which checksums it has published; the answer is what this one has.
    pub fn exchange(&self, from: u64, published: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
        self.answered(from, published);
        self.seen().own.iter().map(|(index, value)| (*index, *value)).collect()
    }

    fn answered(&self, member: u64, published: Vec<(u64, u64)>) {
        let mut seen = self.seen();
        if seen.others.len() < PEERS_KNOWN_MAX || seen.others.contains_key(&member) {
            seen.others.insert(member, published.into_iter().take(CHECKSUMS_KEPT).collect());
        }
    }

    /// How the replicas' checksums compare, as far as is known here.
    pub(crate) fn status(&self) -> ChecksumStatus {
        self.seen().status.clone()
    }

    /// This replica is in the minority and serves no more.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Why this replica acquires nothing, where no record in the state says so yet.
    pub(crate) fn refusal(&self) -> Option<Refusal> {
        let seen = self.seen();
        seen.split.filter(|_| !seen.recorded).map(|index| Refusal::ChecksumsDiffer { index })
    }

    /// An error while this replica must not send a snapshot that ends at `end`. What a majority has confirmed is right,
    /// whatever came after; and its receiver then replays the log by itself, so that it has a checksum of its own to add.
    pub fn check_sending(&self, end: u64) -> Result<(), String> {
        if self.is_stopped() {
            return Err("this replica's state is not that of the majority: it sends no snapshot".to_owned());
        }
        match self.seen().split.filter(|_| *self.agreed.borrow() < end) {
            Some(index) => Err(format!(
                "the replicas' checksums differ at index {index}: no snapshot is sent before it is known which are right"
            )),
            None => Ok(()),
        }
    }

    /// Whether values differ, as far as is known here, and none is that of a majority.
    pub(crate) fn is_contested(&self) -> bool {
        self.seen().split.is_some()
    }

    /// Whether the leader should write entries up to the next checksum although nothing else is written: a snapshot waits for
    /// one that covers it, and the newest one is that of `published`.
    pub(crate) fn is_awaited_beyond(&self, published: u64) -> bool {
        self.awaited.load(Ordering::Acquire) > published
    }

    /// Waits until a majority has confirmed the state of a snapshot that ends at `index`, or too few have answered.
    pub async fn confirm(&self, index: u64) -> Result<(), String> {
        self.confirm_within(index, CONFIRM_WAIT).await
    }

    async fn confirm_within(&self, index: u64, patience: Duration) -> Result<(), String> {
        let mut agreed = self.agreed.subscribe();
        // A checksum at or after its end covers all of the snapshot; one before it leaves a rest that no one has confirmed.
        let confirmed = agreed.wait_for(|agreed| *agreed >= index);
        self.awaited.store(index, Ordering::Release);
        let confirmed = tokio::time::timeout(patience, confirmed).await;
        self.awaited.store(0, Ordering::Release);
        if confirmed.is_err() {
            tracing::warn!(
                index,
                "no majority has confirmed this replica's checksum; its snapshot is sent all the same"
            );
        }
        self.check_sending(index)
    }
}

/// What the state says.
struct State {
    own: Published,
    record: ChecksumsRecord,
    voters: Vec<BTreeSet<u64>>,
    members: BTreeSet<u64>,
}

fn read_state(inner: &Inner) -> Result<State, StateError> {
    let view = View(inner.state.clone());
    let (_, membership) = inner.state.applied()?;
    let membership = membership.membership();
    Ok(State {
        own: view.progress()?.published.into_iter().collect(),
        record: view.checksums()?,
        voters: membership.get_joint_config().clone(),
        members: membership.nodes().map(|(id, _)| *id).collect(),
    })
}

impl State {
    fn compare(&self, me: u64, seen: &Seen) -> Comparison {
        compare(&Known { me, voters: &self.voters, own: &self.own, others: &seen.others })
    }

    /// The voters' values at one index, as far as they are known.
    fn values_at(&self, me: u64, seen: &Seen, index: u64) -> Vec<(u64, u64)> {
        let voters: BTreeSet<u64> = self.voters.iter().flatten().copied().collect();
        let value_of =
            |id: &u64| if *id == me { self.own.get(&index) } else { seen.others.get(id)?.get(&index) };
        voters.iter().filter_map(|id| Some((*id, *value_of(id)?))).collect()
    }

    /// Why an operator's decision makes this replica stop.
    fn rejected(&self) -> Option<String> {
        let accepted = self.record.accepted?;
        let own = *self.own.get(&accepted.index)?;
        (own != accepted.value).then(|| {
            format!(
                "its checksum at log index {} is {}, and an operator accepted {}",
                accepted.index,
                show_value(own),
                show_value(accepted.value)
            )
        })
    }
}

/// What the task remembers from one look to the next.
#[derive(Default)]
struct Watch {
    /// When the members were asked last, and the newest own index then.
    asked: Option<(Instant, u64)>,
    undecided_since: Option<Instant>,
    /// The note in memory is not the one on disk.
    note_unwritten: bool,
    said: Option<ChecksumState>,
}

/// This replica must stop for good.
struct Stop {
    why: String,
    /// Voters that have the right state: one of them should lead next.
    successors: Vec<u64>,
}

/// Compares and acts until the replica stops.
pub(crate) async fn run(inner: Arc<Inner>) {
    let mut watch = Watch::default();
    loop {
        match look(&inner, &mut watch).await {
            Ok(None) => {}
            Ok(Some(stop)) => return stop_for_good(&inner, stop).await,
            Err(error) => return inner.fail(error.to_string()),
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = inner.cancel.cancelled() => return,
        }
    }
}

/// Looks once.
async fn look(inner: &Inner, watch: &mut Watch) -> Result<Option<Stop>, StateError> {
    let checksums = &inner.directory.checksums;
    let me = inner.id;
    let state = read_state(inner)?;
    let newest = state.own.keys().next_back().copied().unwrap_or(0);
    checksums.seen().own.clone_from(&state.own);
    let now = Instant::now();
    if watch.asked.is_none_or(|(at, index)| index != newest || now.duration_since(at) >= ASK_EVERY) {
        watch.asked = Some((now, newest));
        ask_all(inner, &state).await;
    }
    // The answers came later than the state was read, which is no harm: values never change.
    let (comparison, note) = {
        let mut seen = checksums.seen();
        seen.others.retain(|member, _| state.members.contains(member));
        (state.compare(me, &seen), seen.note.clone())
    };
    if let Verdict::Minority { index, own, majority } = comparison.verdict {
        let mut seen = checksums.seen();
        seen.status = status_of(&comparison, None);
        let right = state.values_at(me, &seen, index).into_iter().filter(|(_, value)| *value == majority);
        let successors = right.map(|(member, _)| member).collect();
        let why = format!(
            "its checksum at log index {index} is {}, and a majority of the voters has {}",
            show_value(own),
            show_value(majority)
        );
        return Ok(Some(Stop { why, successors }));
    }
    if let Some(why) = state.rejected() {
        return Ok(Some(Stop { why, successors: Vec::new() }));
    }
    let doubt = state.record.split.is_some() || note.is_some();
    if let Some(removed) = inner.removed().filter(|_| doubt) {
        let why = format!("{removed} while the replicas' checksums differed");
        return Ok(Some(Stop { why, successors: Vec::new() }));
    }
    let overdue = match &comparison.verdict {
        Verdict::Undecided { .. } => {
            now.duration_since(*watch.undecided_since.get_or_insert(now)) >= UNDECIDED_MAX
        }
        _ => {
            watch.undecided_since = None;
            false
        }
    };
    let found = match &comparison.verdict {
        Verdict::Split { index, values } => Some(ChecksumSplit { index: *index, values: values.clone() }),
        Verdict::Undecided { index, values, .. } if overdue => {
            Some(ChecksumSplit { index: *index, values: values.clone() })
        }
        _ => None,
    };
    let note =
        keep_note(inner, note, &state.record, &comparison.verdict, found.as_ref(), &mut watch.note_unwritten)
            .await;
    let contested = match &comparison.verdict {
        Verdict::Undecided { index, .. } => Some(*index),
        _ => None,
    };
    {
        let mut seen = checksums.seen();
        let recorded = state.record.split.as_ref().map(|split| split.index);
        seen.split = recorded.or(note.as_ref().map(|note| note.index)).or(contested);
        seen.recorded = recorded.is_some();
        seen.status = status_of(&comparison, state.record.split.as_ref().or(note.as_ref()));
        seen.note = note;
        say(watch, &seen.status);
    }
    inner.snapshots.set_paused(checksums.is_contested());
    if let Some(index) = comparison.agreed {
        checksums.agreed.send_if_modified(|agreed| std::mem::replace(agreed, index.max(*agreed)) < index);
    }
    if found.is_some() || state.record.split.is_some() {
        record(inner).await?;
    }
    Ok(None)
}

async fn ask_all(inner: &Inner, state: &State) {
    let me = inner.id;
    let published: Vec<(u64, u64)> = state.own.iter().map(|(index, value)| (*index, *value)).collect();
    let request = Request::Checksums { from: me, published };
    let asked = state.members.iter().filter(|member| **member != me).map(|member| {
        let request = &request;
        async move {
            let client = inner.forward_client(*member)?;
            match client.request(request, ASK_TIMEOUT).await {
                Ok(Reply::Checksums(published)) => Some((*member, published)),
                _ => None,
            }
        }
    });
    for (member, published) in join_all(asked).await.into_iter().flatten() {
        inner.directory.checksums.answered(member, published);
    }
}

/// The note of a split in this replica's data directory, as it has to be now. It holds for a replica that learned of the
/// split and has no leader's record of it, over restarts.
async fn keep_note(
    inner: &Inner,
    note: Option<Note>,
    record: &ChecksumsRecord,
    verdict: &Verdict,
    found: Option<&ChecksumSplit>,
    unwritten: &mut bool,
) -> Option<Note> {
    let settled = |note: &Note| {
        // While the record stands, only an operator ends the split.
        record.split.is_none()
            && (record.accepted.is_some_and(|accepted| accepted.index >= note.index)
                || matches!(verdict, Verdict::Agrees { index } if *index >= note.index))
    };
    let wanted = match note.clone() {
        Some(note) if settled(&note) => None,
        Some(note) => Some(note),
        None if record.split.is_some() => None,
        None => found.cloned(),
    };
    if wanted != note {
        *unwritten = true;
    }
    if *unwritten {
        let (dir, to_write) = (inner.config.data_dir.clone(), wanted.clone());
        let written = tokio::task::spawn_blocking(move || disk::write_note(&dir, to_write.as_ref())).await;
        match written.map_err(std::io::Error::other).and_then(|written| written) {
            Ok(()) => *unwritten = false,
            // It stands in memory, and each look tries again.
            Err(error) => tracing::error!(%error, "what is known of checksums can't be written to disk"),
        }
    }
    wanted
}

/// If this replica leads, has the split recorded in the replicated state, with all values that are known.
async fn record(inner: &Inner) -> Result<(), StateError> {
    // Not while an operator's decision is being carried out, and not by what was read before it.
    let Ok(_alone) = inner.changing.try_lock() else { return Ok(()) };
    if !inner.leads(&inner.metrics()) || !inner.formed.load(Ordering::Acquire) {
        return Ok(());
    }
    let state = read_state(inner)?;
    let command = {
        let seen = inner.directory.checksums.seen();
        let me = inner.id;
        let index = match (&state.record.split, &seen.note, state.compare(me, &seen).verdict) {
            (Some(split), ..) => split.index,
            (None, _, Verdict::Split { index, .. }) | (None, Some(_), Verdict::Undecided { index, .. }) => {
                index
            }
            _ => return Ok(()),
        };
        let values = state.values_at(me, &seen, index);
        let known = state.record.split.map(|split| split.values).unwrap_or_default();
        if values.iter().all(|(member, _)| known.iter().any(|(named, _)| named == member)) {
            return Ok(());
        }
        Command::ChecksumSplit { index, values }
    };
    let bytes = holdfast_core::codec::encode(&Proposal { command, idempotency: None });
    if let Err(refusal) = inner.propose_with(bytes.into(), None, RECORD_DEADLINE).await {
        tracing::debug!(?refusal, "the split was not recorded; the next look tries again");
    }
    Ok(())
}

fn status_of(comparison: &Comparison, split: Option<&ChecksumSplit>) -> ChecksumStatus {
    let (state, index, values) = match (&comparison.verdict, split) {
        (Verdict::Minority { index, .. }, _) => (ChecksumState::Minority, *index, Vec::new()),
        (_, Some(split)) => (ChecksumState::Split, split.index, split.values.clone()),
        (Verdict::Split { index, values }, None) => (ChecksumState::Split, *index, values.clone()),
        (Verdict::Undecided { index, values, .. }, None) => {
            (ChecksumState::Undecided, *index, values.clone())
        }
        (Verdict::Agrees { index }, None) => (ChecksumState::Agrees, *index, Vec::new()),
        (Verdict::Waiting, None) => (ChecksumState::Waiting, 0, Vec::new()),
    };
    ChecksumStatus { state, index, values, differing: comparison.differing.iter().copied().collect() }
}

/// Logs what has changed since the last look.
fn say(watch: &mut Watch, status: &ChecksumStatus) {
    if watch.said == Some(status.state) {
        return;
    }
    let (index, values) = (status.index, show_values(&status.values));
    match status.state {
        ChecksumState::Split => tracing::error!(
            index,
            %values,
            "the replicas' checksums differ and none is that of a majority: no key is acquired until an operator decides \
             (holdfast cluster accept-checksum)"
        ),
        ChecksumState::Undecided => tracing::warn!(
            index,
            %values,
            "the replicas' checksums differ: no key is acquired here until enough of them are known"
        ),
        ChecksumState::Agrees if watch.said.is_some() => {
            tracing::info!(index, "this replica's checksum is that of a majority");
        }
        _ => {}
    }
    watch.said = Some(status.state);
}

/// This replica's state is wrong: it hands over, and never serves again.
async fn stop_for_good(inner: &Inner, Stop { why, successors }: Stop) {
    let why = format!(
        "{why}. The state of this replica (member {}) is wrong, so it has stopped for good. Remove the member (holdfast \
         cluster remove {}), empty {}, start the controller again and add it (holdfast cluster add)",
        inner.id,
        inner.id,
        inner.config.data_dir.display()
    );
    tracing::error!(%why, "this replica's checksum differs from the others'");
    inner.directory.checksums.stopped.store(true, Ordering::Release);
    inner.snapshots.close();
    inner.raft.runtime_config().elect(false);
    let (dir, text) = (inner.config.data_dir.clone(), why.clone());
    let mark = async {
        let marked = tokio::task::spawn_blocking(move || disk::mark_stopped(&dir, &text));
        let marked = tokio::time::timeout(MARK_DEADLINE, marked).await.map_err(std::io::Error::other);
        let marked = marked.and_then(|done| done.map_err(std::io::Error::other)?);
        if let Err(error) = marked {
            tracing::error!(%error, "the mark that keeps this replica stopped can't be written");
        }
    };
    let lead_away = async {
        for successor in successors {
            if hand_over(inner, Some(successor), HAND_OVER_DEADLINE / 4).await {
                return;
            }
        }
        if !hand_over(inner, None, HAND_OVER_DEADLINE).await {
            tracing::warn!("leadership was not handed over in time; the others elect a leader");
        }
    };
    // A disk that is slow must not keep the lead here.
    tokio::join!(mark, lead_away);
    inner.fail(why);
    // It neither votes nor stores anything from here on, although the process may live on for a while.
    inner.cancel.cancel();
    if let Err(error) = inner.raft.shutdown().await {
        tracing::warn!(%error, "the replica did not stop cleanly");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(own: &[(u64, u64)]) -> Checksums {
        let checksums = Checksums::default();
        checksums.seen().own = own.iter().copied().collect();
        checksums
    }

    #[tokio::test]
    async fn a_snapshot_waits_for_a_majority_and_for_too_few_answers_not_forever() {
        let checksums = with(&[(16, 1), (32, 2)]);
        let patience = Duration::from_millis(50);
        let began = Instant::now();
        assert_eq!(checksums.confirm_within(40, patience).await, Ok(()));
        assert!(began.elapsed() >= patience, "it was not waited for");
        assert!(!checksums.is_awaited_beyond(0), "no one waits any more");
        // A checksum of a majority that does not cover its end is not enough; one that does sends it at once.
        let forever = Duration::from_secs(3600);
        checksums.agreed.send_replace(32);
        let answers = async {
            assert!(checksums.is_awaited_beyond(32) && !checksums.is_awaited_beyond(40));
            checksums.agreed.send_replace(48)
        };
        let (sent, _) = tokio::join!(checksums.confirm_within(40, forever), answers);
        assert_eq!(sent, Ok(()));
    }

    #[tokio::test]
    async fn no_unconfirmed_snapshot_is_sent_while_values_differ() {
        let checksums = with(&[(16, 1)]);
        let soon = Duration::from_millis(10);
        checksums.agreed.send_replace(16);
        checksums.seen().split = Some(32);
        assert!(checksums.confirm_within(20, soon).await.unwrap_err().contains("index 32"));
        assert_eq!(checksums.confirm_within(15, soon).await, Ok(()), "a majority has confirmed it");
        checksums.seen().split = None;
        assert_eq!(checksums.confirm_within(20, soon).await, Ok(()));
        checksums.stopped.store(true, Ordering::Release);
        assert!(checksums.confirm_within(15, soon).await.unwrap_err().contains("majority"));
    }

    #[test]
    fn a_replica_that_was_stopped_for_good_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Checksums::open(dir.path()).is_ok());
        disk::mark_stopped(dir.path(), "its checksum differs; remove this member").unwrap();
        let refused = Checksums::open(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("remove this member"), "{refused}");
    }

    #[test]
    fn what_was_learned_of_a_split_holds_over_a_restart_without_a_leader() {
        let dir = tempfile::tempdir().unwrap();
        let note = Note { index: 64, values: vec![(1, 7), (2, 8)] };
        disk::write_note(dir.path(), Some(&note)).unwrap();
        let checksums = Checksums::open(dir.path()).unwrap();
        assert_eq!(checksums.refusal(), Some(Refusal::ChecksumsDiffer { index: 64 }));
        assert_eq!(checksums.status().state, ChecksumState::Split);
        // With the record in the state, applying an acquisition refuses it, and finds what is held.
        checksums.seen().recorded = true;
        assert_eq!(checksums.refusal(), None);
    }

    #[test]
    fn an_exchange_tells_both_sides() {
        let checksums = with(&[(16, 1)]);
        assert_eq!(checksums.exchange(2, vec![(16, 9)]), [(16, 1)]);
        assert_eq!(checksums.seen().others[&2], Published::from([(16, 9)]));
    }
}
