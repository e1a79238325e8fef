//! Watches the disk of a replica: full, slow or broken, it must not lead.
//!
//! ```text
//!  "disk-watch" thread: free space, RocksDB's background errors ──▶ Looked ─┐
//!  log writer, state machine: Gauge (work under way since …) ───────────────┼─▶ judge() ─▶ Unfit? ─▶ hand over
//!                                                                           │
//!                                     task on the runtime, every LOOK_EVERY ┘
//! ```
//!
//! What hangs must not be what looks: asking the file system may hang with the disk, so it is done on a thread of its own,
//! and its last answer is used meanwhile. Nothing here reads or writes a file of the replica.
//!
//! An unfit replica does not stand for election, refuses proposals with a definite "not done here", and if it leads, hands
//! over to a peer that says it is fit ([`hand_over`]). It goes on voting and storing what the leader sends: the reserve is
//! for that. Nothing of this decides about a key: expiry and renewal are entries, decided when they are applied.
//!
//! openraft's hand-over needs nothing written on this node's disk: the successor asks for votes, and this node's own vote is
//! the only one that waits for its disk. A hand-over that does not happen within [`HAND_OVER_TIMEOUTS`] would leave a leader
//! that proposes nothing for ever; so its heartbeats are stopped then until somebody else leads.

use crate::background::Background;
use crate::boot_clock::boot_ms;
use crate::store::Inner;
use crate::transport::wire::{Reply, Request};
use openraft::async_runtime::watch::WatchReceiver;
use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// Disk space to keep free unless told otherwise, in bytes.
pub const DISK_RESERVE_BYTES_DEFAULT: u64 = 64 << 20;
/// A full disk is taken to have room again when this much of the reserve is free, in percent: not at every freed block.
const ROOM_PERCENT: u64 = 125;
/// How often free space is asked for.
const SPACE_EVERY: Duration = Duration::from_millis(250);
/// How often a decision is made.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Disk work under way for this many election time-outs means that the disk is stuck …
const STUCK_TIMEOUTS: u64 = 4;
/// … but never less than this, in milliseconds: an ordinary disk may take so long now and then.
const STUCK_MS_MIN: u64 = 1_000;
/// A disk that was stuck is fit again after this many times the limit without being stuck. More than one, so that a disk
/// whose every sync takes longer than the limit does not look fit between two of them.
const WELL_AGAIN_LIMITS: u64 = 2;
/// A hand-over that took longer than this many election time-outs did not happen.
const HAND_OVER_TIMEOUTS: u64 = 4;
/// Time between two questions who could take over, in milliseconds.
const ASK_AGAIN_MS: u64 = 500;
/// How long a peer may take to say whether it is fit.
const ASK_TIMEOUT: Duration = Duration::from_millis(250);

/// Why a replica must not lead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unfit {
    /// Less space is free than the reserve.
    Full {
        /// Bytes that are free.
        free: u64,
        /// Bytes that should be.
        reserve: u64,
    },
    /// Work for the disk has been under way for too long, or was a moment ago.
    Stuck {
        /// What waits: `the log` or `the state`.
        what: &'static str,
        /// For how long it has waited, or did, in milliseconds.
        ms: u64,
    },
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full { free, reserve } => {
                write!(f, "the disk is full: {free} bytes are free, and {reserve} are to be kept free")
            }
            Self::Stuck { what, ms } => {
                write!(
                    f,
                    "the disk is stuck: a write of {what} has been waiting for it (the longest: {ms} ms)"
                )
            }
        }
    }
}

/// Disk work under way, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Waits {
    log_ms: Option<u64>,
    state_ms: Option<u64>,
}

/// What the decision depends on.
#[derive(Debug, Clone, Copy)]
struct Seen {
    now_ms: u64,
    /// Unknown until it was first asked, or while it can't be.
    free: Option<u64>,
    waits: Waits,
}

/// The deciding part: pure.
#[derive(Debug, Clone)]
struct Judge {
    reserve: u64,
    stuck_after_ms: u64,
    full: bool,
    /// What was stuck last, for how long, and when that was seen last.
    stuck: Option<(&'static str, u64, u64)>,
}

impl Judge {
    fn new(reserve: u64, election_timeout_ms: u64) -> Self {
        let stuck_after_ms = (election_timeout_ms * STUCK_TIMEOUTS).max(STUCK_MS_MIN);
        Self { reserve, stuck_after_ms, full: false, stuck: None }
    }

    fn judge(&mut self, seen: Seen) -> Option<Unfit> {
        if let Some(free) = seen.free {
            let enough =
                if self.full { self.reserve.saturating_mul(ROOM_PERCENT) / 100 } else { self.reserve };
            self.full = free < enough;
        }
        let waits = [("the log", seen.waits.log_ms), ("the state", seen.waits.state_ms)];
        let longest = waits.into_iter().filter_map(|(what, ms)| Some((what, ms?))).max_by_key(|(_, ms)| *ms);
        match (longest, self.stuck) {
            (Some((what, ms)), _) if ms >= self.stuck_after_ms => self.stuck = Some((what, ms, seen.now_ms)),
            (_, Some((_, _, last_ms)))
                if seen.now_ms.saturating_sub(last_ms) >= self.stuck_after_ms * WELL_AGAIN_LIMITS =>
            {
                self.stuck = None;
            }
            _ => {}
        }
        // A stuck disk says more than a full one: nothing can be written at all.
        match (self.stuck, self.full) {
            (Some((what, ms, _)), _) => Some(Unfit::Stuck { what, ms }),
            (None, true) => Some(Unfit::Full { free: seen.free.unwrap_or(0), reserve: self.reserve }),
            (None, false) => None,
        }
    }
}

/// What the rest of the replica asks.
pub(crate) struct DiskWatch {
    dir: PathBuf,
    /// Free bytes; [`u64::MAX`] = not known.
    free: AtomicU64,
    unfit: watch::Sender<Option<Unfit>>,
    /// Since when it has been unfit, as [`boot_ms`]; 0 = it is fit.
    unfit_since_ms: AtomicU64,
    /// What RocksDB failed at in the background, found by the thread.
    background: Mutex<Option<String>>,
}

impl DiskWatch {
    /// A watch of the disk that holds `dir`.
    pub fn new(dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            dir: dir.to_owned(),
            free: AtomicU64::new(u64::MAX),
            unfit: watch::Sender::new(None),
            unfit_since_ms: AtomicU64::new(0),
            background: Mutex::default(),
        })
    }

    /// Why this replica must not lead, if so.
    pub fn unfit(&self) -> Option<Unfit> {
        self.unfit.borrow().clone()
    }

    /// Whether this replica may lead.
    pub fn may_lead(&self) -> bool {
        self.unfit.borrow().is_none()
    }

    /// Whether the disk is stuck: what this replica knows of itself may be old.
    pub fn is_stuck(&self) -> bool {
        matches!(*self.unfit.borrow(), Some(Unfit::Stuck { .. }))
    }

    /// For how long it has been unfit.
    pub fn unfit_for(&self) -> Duration {
        match self.unfit_since_ms.load(Ordering::Acquire) {
            0 => Duration::ZERO,
            since => Duration::from_millis(boot_ms().saturating_sub(since)),
        }
    }

    /// Free bytes, if known.
    pub fn free_bytes(&self) -> Option<u64> {
        Some(self.free.load(Ordering::Relaxed)).filter(|free| *free != u64::MAX)
    }

    /// Wakes when it becomes fit or unfit.
    pub fn changes(&self) -> watch::Receiver<Option<Unfit>> {
        self.unfit.subscribe()
    }

    fn set(&self, unfit: Option<Unfit>) {
        let changed = self.unfit.send_replace(unfit.clone());
        match (&changed, &unfit) {
            (None, Some(why)) => {
                self.unfit_since_ms.store(boot_ms().max(1), Ordering::Release);
                tracing::error!(%why, "this replica steps back: it neither leads nor takes proposals");
            }
            (Some(_), None) => {
                self.unfit_since_ms.store(0, Ordering::Release);
                tracing::info!("the disk is well again: this replica may lead");
            }
            _ => {}
        }
    }
}

/// Free bytes of the file system that holds `path`, for processes without privileges.
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zeroes is a valid statvfs; the path ends with a zero byte; the kernel fills in what we own.
    let (code, stat) = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(path.as_ptr(), &raw mut stat), stat)
    };
    if code != 0 {
        return Err(io::Error::last_os_error());
    }
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast, reason = "their types differ by platform")]
    Ok((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
}

/// Whether `reason`, an error of RocksDB or of the system, says that there was no space. RocksDB passes errors on as text.
pub fn is_out_of_space(reason: &str) -> bool {
    ["No space left on device", "Disk quota exceeded", "NoSpace"].iter().any(|text| reason.contains(text))
}

/// Whether a disk that was full has room again to run on.
pub fn has_room(dir: &Path, reserve: u64) -> io::Result<bool> {
    // Without any reserve there still must be something to write a first block to.
    let enough = (reserve.saturating_mul(ROOM_PERCENT) / 100).max(1 << 20);
    Ok(free_bytes(dir)? >= enough)
}

/// Starts the thread and the task; both end with the replica.
pub(crate) fn start(inner: &Arc<Inner>) -> io::Result<Background> {
    let looked = Arc::downgrade(inner);
    let watch = inner.disk.clone();
    let thread = Background::start("disk-watch", move |ended| {
        loop {
            match free_bytes(&watch.dir) {
                Ok(free) => watch.free.store(free, Ordering::Relaxed),
                Err(error) => tracing::warn!(%error, dir = %watch.dir.display(), "free space is not known"),
            }
            let Some(inner) = looked.upgrade() else { return };
            let errors = inner.background_errors();
            drop(inner);
            if errors.is_some() {
                *watch.background.lock().unwrap_or_else(PoisonError::into_inner) = errors;
            }
            if !ended.pause(SPACE_EVERY) {
                return;
            }
        }
    })?;
    inner.tasks.spawn(run(inner.clone()));
    Ok(thread)
}

impl Inner {
    /// Why there is no use in waiting for a leader with a proposal: this replica leads, must not, and nobody has taken over
    /// in all the time that this takes; or `left`, the time to wait, is over and its own disk is the likely reason.
    pub(crate) fn no_use_waiting(&self, left: Duration) -> Option<String> {
        let why = self.disk.unfit()?;
        let patience = Duration::from_millis(self.config.election_timeout_ms * HAND_OVER_TIMEOUTS * 2);
        let leads = {
            let metrics = self.raft.metrics();
            let now = metrics.borrow_watched();
            now.current_leader == Some(self.id) && self.directory.leader_after(now.current_term).is_none()
        };
        (left.is_zero() || (leads && self.disk.unfit_for() > patience)).then(|| why.to_string())
    }

    fn disk_waits_ms(&self) -> (Option<u64>, Option<u64>) {
        (self.log.gauge().under_way_ms(), self.state.gauge().under_way_ms())
    }

    /// May wait for the disk.
    fn background_errors(&self) -> Option<String> {
        let (log, state) = (self.log.background_errors(), self.state.background_errors());
        if log == 0 && state == 0 {
            return None;
        }
        let full = match free_bytes(&self.config.data_dir) {
            Ok(free) if free < self.config.disk_reserve_bytes => " (No space left on device)",
            _ => "",
        };
        Some(format!(
            "RocksDB has failed in the background{full}: {log} errors of the log, {state} of the state; its LOG files in \
             {} say more",
            self.config.data_dir.display()
        ))
    }

    async fn ask_may_lead(&self, peer: u64, timeout: Duration) -> bool {
        let Some(client) = self.forward_client(peer) else { return false };
        matches!(client.request(&Request::MayLead, timeout).await, Ok(Reply::MayLead(true)))
    }
}

async fn run(inner: Arc<Inner>) {
    let watch = inner.disk.clone();
    let mut judge = Judge::new(inner.config.disk_reserve_bytes, inner.config.election_timeout_ms);
    let mut hand_over = HandOver::default();
    loop {
        let background = watch.background.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(why) = background {
            // RocksDB writes nothing any more, or soon will not: the same as a failed write.
            inner.fail(why);
            return;
        }
        let (log_ms, state_ms) = inner.disk_waits_ms();
        let seen = Seen { now_ms: boot_ms(), free: watch.free_bytes(), waits: Waits { log_ms, state_ms } };
        let unfit = judge.judge(seen);
        if watch.unfit() != unfit {
            watch.set(unfit);
        }
        step_back(&inner, &mut hand_over).await;
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = inner.cancel.cancelled() => return,
        }
    }
}

/// Handing over, over some time.
#[derive(Default)]
struct HandOver {
    /// The term that this replica leads and has handed over in, and when.
    began: Option<(u64, u64)>,
    /// Heartbeats are off, so that the followers hold an election.
    silent: bool,
    /// When peers may be asked again.
    ask_at_ms: u64,
}

/// If this replica leads and should not, hands over; finds out whether it worked.
async fn step_back(inner: &Arc<Inner>, over: &mut HandOver) {
    let (leads, term) = {
        let metrics = inner.raft.metrics();
        let now = metrics.borrow_watched();
        (now.current_leader == Some(inner.id) && now.state.is_leader(), now.current_term)
    };
    let now_ms = boot_ms();
    match over.began {
        Some((began, _)) if !leads || term != began => {
            if over.silent {
                inner.raft.runtime_config().heartbeat(true);
            }
            *over = HandOver::default();
        }
        Some((_, since_ms)) => {
            let patience_ms = inner.config.election_timeout_ms * HAND_OVER_TIMEOUTS;
            if !over.silent && now_ms.saturating_sub(since_ms) >= patience_ms {
                tracing::warn!(
                    "the hand-over has not happened; this leader falls silent until another is elected"
                );
                inner.raft.runtime_config().heartbeat(false);
                over.silent = true;
            }
            return;
        }
        None => {}
    }
    if !leads || inner.disk.may_lead() || now_ms < over.ask_at_ms {
        return;
    }
    over.ask_at_ms = now_ms + ASK_AGAIN_MS;
    // Once asked for, openraft's hand-over can't be taken back: only with somebody who takes over.
    let Some(to) = fit_successor(inner).await else { return };
    tracing::warn!(to, "handing leadership over");
    // A Raft task that waits for the disk takes no orders, and sends no heartbeats either: then there will be an election.
    let _ = tokio::time::timeout(ASK_TIMEOUT, inner.raft.trigger().transfer_leader(to)).await;
    over.began = Some((term, now_ms));
}

/// The most advanced voter that says it is fit to lead.
async fn fit_successor(inner: &Arc<Inner>) -> Option<u64> {
    let me = inner.id;
    let mut voters: Vec<(u64, Option<u64>)> = {
        let metrics = inner.raft.metrics();
        let now = metrics.borrow_watched();
        let matched = |id: &u64| now.replication.as_ref()?.get(id).copied().flatten().map(|at| at.index);
        now.membership_config
            .membership()
            .voter_ids()
            .filter(|id| *id != me)
            .map(|id| (id, matched(&id)))
            .collect()
    };
    voters.sort_by_key(|(_, matched)| std::cmp::Reverse(*matched));
    let answers = voters.into_iter().map(|(id, matched)| async move {
        (id, matched.is_some() && inner.ask_may_lead(id, ASK_TIMEOUT).await)
    });
    let answers = futures::future::join_all(answers).await;
    answers.into_iter().find(|(_, fit)| *fit).map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(now_ms: u64, free: Option<u64>, log_ms: Option<u64>) -> Seen {
        Seen { now_ms, free, waits: Waits { log_ms, state_ms: None } }
    }

    #[test]
    fn a_disk_is_full_below_the_reserve_and_has_room_only_well_above_it() {
        let mut judge = Judge::new(100, 200);
        assert_eq!(judge.judge(seen(0, None, None)), None, "what is not known is not held against it");
        assert_eq!(judge.judge(seen(1, Some(100), None)), None);
        assert_eq!(judge.judge(seen(2, Some(99), None)), Some(Unfit::Full { free: 99, reserve: 100 }));
        assert_eq!(judge.judge(seen(3, Some(124), None)), Some(Unfit::Full { free: 124, reserve: 100 }));
        assert_eq!(judge.judge(seen(4, Some(125), None)), None);
        assert_eq!(judge.judge(seen(5, Some(100), None)), None);
        assert_eq!(Judge::new(0, 200).judge(seen(0, Some(0), None)), None, "no reserve, no watch");
    }

    #[test]
    fn a_stuck_disk_is_not_well_between_two_slow_syncs() {
        let mut judge = Judge::new(0, 500);
        assert_eq!(judge.judge(seen(1_000, None, Some(1_999))), None);
        assert!(matches!(judge.judge(seen(1_001, None, Some(2_000))), Some(Unfit::Stuck { ms: 2_000, .. })));
        assert!(matches!(judge.judge(seen(4_000, None, Some(4_999))), Some(Unfit::Stuck { ms: 4_999, .. })));
        // The next sync has just begun.
        assert!(judge.judge(seen(4_100, None, Some(1))).is_some());
        assert!(judge.judge(seen(6_099, None, Some(2_000))).is_some());
        assert!(judge.judge(seen(10_098, None, None)).is_some());
        assert_eq!(judge.judge(seen(10_099, None, None)), None);
    }

    #[test]
    fn the_limit_follows_the_election_time_out_and_has_a_floor() {
        assert_eq!(Judge::new(0, 50).stuck_after_ms, STUCK_MS_MIN);
        assert_eq!(Judge::new(0, 1_000).stuck_after_ms, 4_000);
    }

    #[test]
    fn a_stuck_state_counts_as_a_stuck_log_does_and_comes_before_a_full_disk() {
        let mut judge = Judge::new(100, 200);
        let waits = Waits { log_ms: Some(3), state_ms: Some(1_500) };
        let unfit = judge.judge(Seen { now_ms: 0, free: Some(1), waits });
        assert_eq!(unfit, Some(Unfit::Stuck { what: "the state", ms: 1_500 }));
    }

    #[test]
    fn errors_of_a_full_disk_are_known_by_their_text() {
        assert!(is_out_of_space("IO error: No space left on device: While appending to file: /x/000004.log"));
        assert!(!is_out_of_space("Corruption: checksum mismatch"));
        let full = io::Error::from_raw_os_error(libc::ENOSPC).to_string();
        assert!(is_out_of_space(&full), "{full}");
    }

    #[test]
    fn free_space_is_asked_of_the_file_system_of_the_path() {
        assert!(free_bytes(Path::new("/")).unwrap() > 0);
        assert!(free_bytes(Path::new("/no/such/place")).is_err());
    }
}
