//! The handle of a replica: opens it, forwards to the leader, waits for what is applied.

use crate::api::{
    Answer, LeaderInfo, MemberChange, MemberChanged, MemberError, MemberStatus, OpenError, ProposeError,
    ReadError, ReadPoint, ReplicaStatus, StoreConfig,
};
use crate::background::Background;
use crate::checksums::{self, Checksums};
use crate::disk::{self, DiskWatch};
use crate::effects::Effects;
use crate::inspect;
use crate::keeper;
use crate::log_files::sync_parent;
use crate::log_store::LogStore;
use crate::membership;
use crate::membership::Standing;
use crate::membership::init::InitError;
use crate::membership::naming::{DiskIdentity, Founding, Me, Naming};
use crate::membership::waiting::{Opened, Waiting};
use crate::metrics::lost_majority;
use crate::raft_thread::RaftThread;
use crate::snapshots::Snapshots;
use crate::state_db::StateHandle;
use crate::state_machine::{AppliedTo, StateMachine};
use crate::transport::client::{RpcClient, RpcError};
use crate::transport::network::PeerFactory;
use crate::transport::server::{Forwarded, PeerServer};
use crate::transport::wire::{ProposeRefusal, ProposedReply, ReadIndexReply, Reply, Request};
use crate::transport::{Directory, Problem};
use crate::types::{LogId, Member, Proposed, Stamper, TypeConfig};
use bytes::Bytes;
use holdfast_core::codec::{decode, encode};
use holdfast_core::command::{Command, Proposal};
use holdfast_core::outcome::{Effect, Outcome};
use holdfast_core::view::View;
use openraft::async_runtime::instant::Instant as _;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::ReadPolicy;
use openraft::{Config, RaftMetrics, SnapshotPolicy};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) type Raft = openraft::Raft<TypeConfig, StateMachine>;

/// Longest proposal in bytes.
pub const PROPOSAL_BYTES_MAX: usize = 4 << 20;
/// Proposals in flight on one replica.
const PROPOSALS_IN_FLIGHT_MAX: usize = 16_384;
/// How long to wait for news of a leader before looking again.
const LEADER_POLL: Duration = Duration::from_millis(50);
/// The first such wait; it doubles. A leader that is being replaced says no for a few milliseconds.
const LEADER_POLL_MIN: Duration = Duration::from_millis(2);
/// How long one forwarded confirmation of a read may take before it is asked again.
const READ_INDEX_TIMEOUT: Duration = Duration::from_millis(1000);
/// A leader that no quorum has answered for this many election time-outs is taken to be cut off.
const CUT_OFF_TIMEOUTS: u64 = 4;

pub(crate) struct Inner {
    /// Member id.
    pub(crate) id: u64,
    pub(crate) naming: Naming,
    pub(crate) config: StoreConfig,
    pub(crate) raft: Raft,
    pub(crate) state: StateHandle,
    pub(crate) stamper: Arc<Stamper>,
    pub(crate) directory: Arc<Directory>,
    pub(crate) formed: AtomicBool,
    pub(crate) cancel: CancellationToken,
    effects: Arc<Effects>,
    pub(crate) applied: watch::Receiver<AppliedTo>,
    pub(crate) disk: Arc<DiskWatch>,
    leader: watch::Sender<Option<LeaderInfo>>,
    pub(crate) failed: watch::Sender<Option<String>>,
    forward_clients: Mutex<HashMap<u64, (Member, Arc<RpcClient>)>>,
    in_flight: Semaphore,
    pub(crate) backups: Arc<Semaphore>,
    /// Held while the membership is changed.
    pub(crate) changing: tokio::sync::Mutex<()>,
    pub(crate) snapshots: Arc<Snapshots>,
    pub(crate) log: LogStore,
    pub(crate) tasks: TaskTracker,
    _lock: File,
}

/// A running replica. Cloning it is cheap. When the last clone is dropped without [`Store::stop`], the replica ends as
/// in a crash.
#[derive(Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
    /// Not in `Inner`, which the thread's own tasks hold.
    thread: Arc<Mutex<Option<RaftThread>>>,
    /// What holds the databases now and then.
    background: Arc<Mutex<Vec<Background>>>,
}

pub(crate) fn storage(what: &str, path: &Path) -> impl FnOnce(String) -> OpenError {
    let what = format!("{what} ({})", path.display());
    move |error| OpenError::Storage { what, error }
}

pub(crate) fn lock_dir(dir: &Path) -> Result<File, OpenError> {
    std::fs::create_dir_all(dir)
        .and_then(|()| sync_parent(dir))
        .map_err(|e| storage("making the data directory", dir)(e.to_string()))?;
    let path = dir.join("LOCK");
    let file = File::create(&path).map_err(|e| storage("making the lock file", &path)(e.to_string()))?;
    // SAFETY: the descriptor is open for the length of the call.
    if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        return Err(OpenError::Locked(PathBuf::from(dir)));
    }
    Ok(file)
}

fn raft_config(config: &StoreConfig) -> Result<Config, OpenError> {
    let timeout = config.election_timeout_ms;
    let raft = Config {
        cluster_name: "holdfast".into(),
        // Counted from the end of the leader's lease, which is the maximum: so nobody stands within 160 % of the time-out. A
        // wide range, since two that stand within a round trip and a sync of each other both fail.
        election_timeout_min: timeout * 2 / 5,
        election_timeout_max: timeout * 6 / 5,
        heartbeat_interval: (timeout / 4).max(1),
        max_payload_entries: 1024,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(config.snapshot_every),
        // A follower that is further behind than a snapshot's worth gets a snapshot.
        replication_lag_threshold: config.snapshot_every * 2,
        max_in_snapshot_log_to_keep: config.snapshot_every / 2,
        purge_batch_size: 256,
        install_snapshot_timeout: 600_000,
        enable_pre_vote: Some(true),
        // A restarted leader must not go on in its old term: its clock's reign is over.
        enable_leader_restore: Some(false),
        // No member may lack what it acknowledged: a lost disk has lost its id too (see `membership::naming`).
        allow_log_reversion: Some(false),
        backoff: "50ms".into(),
        ..Config::default()
    };
    raft.validate()
        .map_err(|e| OpenError::Config { field: "election-timeout", problem: format!("is not usable: {e}") })
}

/// The first membership of a new cluster, if this is the process that writes it.
fn initial_membership(founding: &Founding) -> Option<BTreeMap<u64, Member>> {
    let members = founding.members.iter().zip(&founding.identities).enumerate();
    let member = |(at, (addr, identity)): (usize, (&String, &DiskIdentity))| {
        (at as u64 + 1, Member { peer_addr: addr.clone(), identity: *identity })
    };
    (!founding.identities.is_empty()).then(|| members.map(member).collect())
}

impl Store {
    /// Opens the data directory: as the member that its disk is, or as a process that waits to be named.
    pub async fn open(config: StoreConfig) -> Result<Opened, OpenError> {
        match Waiting::open(&config).await? {
            Some(waiting) => Ok(Opened::Waiting(waiting)),
            None => Ok(Opened::Member(Self::open_member(config).await?)),
        }
    }

    /// Opens the replica of a named disk, starts its tasks and, as the coordinator of a new cluster, initialises it.
    pub async fn open_member(config: StoreConfig) -> Result<Self, OpenError> {
        let starting = |error: &dyn std::fmt::Display| OpenError::Storage {
            what: "starting the raft thread".to_owned(),
            error: error.to_string(),
        };
        let thread = RaftThread::start().map_err(|e| starting(&e))?;
        let inner = thread.handle().spawn(Self::open_here(config)).await.map_err(|e| starting(&e))??;
        // It reads the state, which the raft thread must not.
        inner.tasks.spawn(keeper::run(inner.clone()));
        inner.tasks.spawn(checksums::run(inner.clone()));
        // Not on the raft thread either, which is one of those that it watches.
        let watch = disk::start(&inner).map_err(|e| starting(&e))?;
        let scrub = crate::scrub::start(&inner).map_err(|e| starting(&e))?;
        Ok(Self {
            inner,
            thread: Arc::new(Mutex::new(Some(thread))),
            background: Arc::new(Mutex::new(vec![watch, scrub])),
        })
    }

    /// [`Self::open`], on the thread that the replica will run on.
    async fn open_here(config: StoreConfig) -> Result<Arc<Inner>, OpenError> {
        let raft_config = Arc::new(raft_config(&config)?);
        let dir = config.data_dir.clone();
        let lock = lock_dir(&dir)?;
        if dir.join(crate::restore::MARK).exists() {
            let unfinished = "a restore into it was not finished; run it again".to_owned();
            return Err(storage("opening the data directory", &dir)(unfinished));
        }
        let checksums = Checksums::open(&dir)?;
        let stamper = Arc::new(Stamper::default());
        let state_dir = dir.join("state");
        let state = StateHandle::open(&state_dir)
            .map_err(|e| storage("opening the state", &state_dir)(e.to_string()))?;
        let snapshot_dir = dir.join("snapshots");
        let snapshots = Arc::new(
            Snapshots::open(&snapshot_dir)
                .map_err(|e| storage("opening the snapshots", &snapshot_dir)(e.to_string()))?,
        );
        let log_dir = dir.join("log");
        let durable_state = state.clone();
        let log = LogStore::open(&log_dir, stamper.clone(), Box::new(move || durable_state.make_durable()))
            .map_err(|e| storage("opening the log", &log_dir)(e.to_string()))?;
        let naming = log
            .naming()
            .ok_or_else(|| storage("opening the log", &log_dir)("this disk has no name".to_owned()))?;
        let cluster =
            View(&state).cluster().map_err(|e| storage("reading the state", &state_dir)(e.to_string()))?;
        if let Some(cluster) = cluster.as_ref().filter(|cluster| cluster.cluster_id != naming.cluster_id) {
            return Err(storage("comparing log and state", &dir)(format!(
                "the log is that of cluster {}, the state that of cluster {}",
                naming.cluster_id, cluster.cluster_id
            )));
        }
        let pristine = log.is_pristine();
        let (applied_at, _) =
            state.applied().map_err(|e| storage("reading the state", &state_dir)(e.to_string()))?;
        if pristine && applied_at.is_some() {
            return Err(storage("opening the log", &log_dir)(
                "it is empty, but the state is not: this member has lost its log and its vote; remove the member and give \
                 it an empty data directory"
                    .to_owned(),
            ));
        }
        log.note_applied(applied_at);
        inspect::check_ends(&log, &state, &snapshots)
            .map_err(|e| storage("comparing log and state", &dir)(e.to_string()))?;
        let listener = TcpListener::bind(config.peer_listen)
            .await
            .map_err(|error| OpenError::Listen { addr: config.peer_listen, error })?;

        let applied = watch::Sender::new(AppliedTo::default());
        let applied_rx = applied.subscribe();
        let (effects, members) = (Arc::new(Effects::default()), watch::Sender::default());
        let machine = StateMachine::new(
            state.clone(),
            snapshots.clone(),
            stamper.clone(),
            applied,
            members.clone(),
            effects.clone(),
        )
        .map_err(|e| storage("reading the state", &state_dir)(e.to_string()))?;
        let me = Me { id: naming.member_id, cluster_id: naming.cluster_id.clone(), disk: log.disk().clone() };
        let id = me.id;
        tracing::info!(id, cluster = %me.cluster_id, disk = %me.disk.identity, start = me.disk.starts.last().number, "this is a member");
        let directory = Directory::new(me, config.advertise_url.clone(), Standing::new(members));
        let directory = Arc::new(directory.with_checksums(checksums));
        let network = PeerFactory {
            directory: directory.clone(),
            snapshots: snapshots.clone(),
            append_timeout: Duration::from_millis((config.election_timeout_ms * 4).max(1000)),
        };
        let raft = Raft::new(id, raft_config, network, log.clone(), machine)
            .await
            .map_err(|e| storage("starting the replica", &dir)(e.to_string()))?;

        let inner = Arc::new(Inner {
            id,
            naming: naming.clone(),
            raft: raft.clone(),
            state,
            stamper: stamper.clone(),
            directory: directory.clone(),
            formed: AtomicBool::new(cluster.is_some()),
            cancel: CancellationToken::new(),
            effects,
            applied: applied_rx,
            disk: DiskWatch::new(&dir),
            leader: watch::Sender::new(None),
            failed: watch::Sender::new(None),
            forward_clients: Mutex::default(),
            in_flight: Semaphore::new(PROPOSALS_IN_FLIGHT_MAX),
            backups: crate::backup::places(),
            changing: tokio::sync::Mutex::default(),
            snapshots: snapshots.clone(),
            log,
            tasks: TaskTracker::new(),
            _lock: lock,
            config,
        });
        let server = Arc::new(PeerServer {
            directory,
            naming: naming.clone(),
            raft: raft.clone(),
            forwarded: inner.clone(),
            snapshots,
            incoming: Default::default(),
            stamper,
        });
        let cancel = inner.cancel.clone();
        inner.tasks.spawn(async move { server.run(listener, cancel).await });
        inner.tasks.spawn(watch_raft(inner.clone()));
        inner.tasks.spawn(membership::run(inner.clone()));
        inner.tasks.spawn(membership::greet(inner.clone()));
        if let Some(members) = naming.founding.as_ref().and_then(initial_membership).filter(|_| pristine) {
            match raft.initialize(members).await {
                Ok(()) | Err(RaftError::APIError(openraft::errors::InitializeError::NotAllowed(_))) => {}
                Err(error) => {
                    inner.stop().await;
                    return Err(storage("initialising the cluster", &dir)(error.to_string()));
                }
            }
        }
        Ok(inner)
    }

    /// Proposes a command through whoever leads (followers forward it over the peer transport) and waits until it is
    /// applied there. Retries by itself while the answer is a definite "not done", until `deadline` from now.
    pub async fn propose(&self, proposal: Proposal, deadline: Duration) -> Result<Answer, ProposeError> {
        let bytes = Bytes::from(encode(&proposal));
        if bytes.len() > PROPOSAL_BYTES_MAX {
            return Err(ProposeError::TooLarge(bytes.len(), PROPOSAL_BYTES_MAX));
        }
        let inner = &self.inner;
        let until = Instant::now() + deadline;
        let mut leader = inner.leader.subscribe();
        let mut poll = LEADER_POLL_MIN;
        loop {
            if let Some(why) = inner.stopped() {
                return Err(ProposeError::Stopped(why));
            }
            if let Some(ProposedReply { outcome, replayed, index, cluster_time_ms }) =
                inner.refused_for_checksums(&proposal.command)
            {
                return Ok(Answer { outcome, replayed, index, cluster_time_ms });
            }
            let left = until.saturating_duration_since(Instant::now());
            if let Some(why) = inner.no_use_waiting(left) {
                return Err(ProposeError::Unfit(why));
            }
            if left.is_zero() {
                return Err(ProposeError::NoLeader);
            }
            let known = leader.borrow_and_update().clone();
            let answer = match known {
                Some(info) if info.id == inner.id => inner.propose_here(bytes.clone(), left).await,
                Some(info) => inner.propose_there(info.id, &bytes, left).await,
                None => Err(ProposeRefusal::NotLeader),
            };
            match answer {
                Ok(reply) => {
                    return Ok(Answer {
                        outcome: reply.outcome,
                        replayed: reply.replayed,
                        index: reply.index,
                        cluster_time_ms: reply.cluster_time_ms,
                    });
                }
                Err(ProposeRefusal::Overloaded) => return Err(ProposeError::Overloaded),
                Err(ProposeRefusal::Unknown(why)) => return Err(ProposeError::OutcomeUnknown(why)),
                Err(ProposeRefusal::NotLeader) => wait_for_change(&mut leader, left, &mut poll).await,
            }
        }
    }

    /// Waits until this replica has applied everything that was acknowledged before the call.
    pub async fn linearizable(&self, deadline: Duration) -> Result<ReadPoint, ReadError> {
        let inner = &self.inner;
        let until = Instant::now() + deadline;
        let mut leader = inner.leader.subscribe();
        let mut poll = LEADER_POLL_MIN;
        loop {
            if let Some(why) = inner.stopped() {
                return Err(ReadError::Stopped(why));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ReadError::NoLeader);
            }
            let known = leader.borrow_and_update().clone();
            let confirm = async {
                match known {
                    Some(info) if info.id == inner.id => inner.read_index_here().await,
                    Some(info) => inner.read_index_there(info.id, left.min(READ_INDEX_TIMEOUT)).await,
                    None => None,
                }
            };
            let confirmed = tokio::time::timeout(left.min(READ_INDEX_TIMEOUT), confirm).await.ok().flatten();
            let Some(at) = confirmed else {
                wait_for_change(&mut leader, left, &mut poll).await;
                continue;
            };
            let left = until.saturating_duration_since(Instant::now());
            self.wait_applied(at.index, left).await?;
            return Ok(ReadPoint {
                view: View(inner.state.clone()),
                now_ms: at.now_ms.max(inner.applied.borrow().cluster_time_ms),
                term: at.term,
                applied: at.index,
            });
        }
    }

    /// This member's id.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// The answer to an operator who asks this member to form a cluster.
    pub fn refuse_init(&self) -> InitError {
        let Naming { cluster_id, member_id, founding } = &self.inner.naming;
        match founding {
            Some(founding) if self.waits_for_init() => InitError::Bound {
                addr: "(this one)".to_owned(),
                to: format!(
                    "the init of {} that began at {}",
                    founding.members.join(","),
                    founding.coordinator_addr()
                ),
            },
            _ => InitError::AlreadyInitialised { member: *member_id, cluster_id: cluster_id.clone() },
        }
    }

    /// Whether this member was named by an init of which it has heard nothing since.
    fn waits_for_init(&self) -> bool {
        let metrics = self.inner.raft.metrics();
        !self.inner.formed.load(Ordering::Acquire)
            && metrics.borrow_watched().membership_config.membership().nodes().next().is_none()
    }

    /// What a member that has just been named waits for, and what to do if it does not come.
    pub(crate) fn not_heard_yet(&self) -> Option<String> {
        if !self.waits_for_init() {
            return None;
        }
        let Naming { member_id, founding, .. } = &self.inner.naming;
        Some(match founding {
            Some(founding) => format!(
                "named member {member_id} by the init that began at {}; waiting for its leader. If \"holdfast cluster status\" \
                 there and at the other members says that no cluster was formed, repeat \"holdfast cluster init\" there. Only \
                 if none was ever formed and that disk is lost, empty the data directories of all members",
                founding.coordinator_addr()
            ),
            None => format!("named member {member_id} by \"holdfast cluster add\"; waiting for the leader"),
        })
    }

    /// The state as this replica has it, possibly stale.
    pub fn local(&self) -> ReadPoint {
        let inner = &self.inner;
        let applied = *inner.applied.borrow();
        let term = inner.raft.metrics().borrow_watched().current_term;
        ReadPoint {
            view: View(inner.state.clone()),
            now_ms: inner.stamper.now_ms(term).unwrap_or(0).max(applied.cluster_time_ms),
            term,
            applied: applied.index,
        }
    }

    /// Sets who is told of the effects of entries after they are applied here, from now on and in their order. It is called
    /// by the thread that applies: it must neither block nor wait.
    ///
    /// # Panics
    ///
    /// If there is a listener already.
    pub fn listen(&self, listener: impl Fn(&[Effect]) + Send + Sync + 'static) {
        self.inner.effects.listen(listener);
    }

    /// The leader as this replica knows it, and its changes.
    pub fn leader(&self) -> watch::Receiver<Option<LeaderInfo>> {
        self.inner.leader.subscribe()
    }

    /// Waits until this replica has applied `index` (so that a follower that proposed sees its own write).
    pub async fn wait_applied(&self, index: u64, deadline: Duration) -> Result<(), ReadError> {
        let mut applied = self.inner.applied.clone();
        let reached = applied.wait_for(|to| to.index >= index);
        tokio::select! {
            reached = tokio::time::timeout(deadline, reached) => match reached {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(_)) => Err(ReadError::Stopped("the state machine has ended".into())),
                Err(_) => Err(ReadError::NoLeader),
            },
            () = self.inner.cancel.cancelled() => Err(ReadError::Stopped("stopping".into())),
        }
    }

    /// This replica and its cluster.
    pub fn status(&self) -> ReplicaStatus {
        let inner = &self.inner;
        let metrics = inner.raft.metrics().borrow_watched().clone();
        let id = inner.id;
        let is_leader = metrics.current_leader == Some(id);
        let voters: Vec<u64> = metrics.membership_config.membership().voter_ids().collect();
        let problems: BTreeMap<u64, Problem> = metrics
            .membership_config
            .membership()
            .nodes()
            .filter_map(|(member, _)| Some((*member, inner.directory.problem(*member)?)))
            .collect();
        let of_voters = voters.iter().filter_map(|voter| problems.get(voter));
        let lost_majority = lost_majority(voters.len(), of_voters);
        let problem = |member: u64| {
            let Some(problem) = problems.get(&member) else { return inner.directory.standing.awaits(member) };
            let lost = lost_majority.clone().filter(|_| *problem == Problem::LostDisk);
            Some(lost.unwrap_or_else(|| problem.to_string()))
        };
        let members = metrics
            .membership_config
            .membership()
            .nodes()
            .map(|(member, node)| MemberStatus {
                id: *member,
                peer_addr: node.peer_addr.clone(),
                identity: node.identity,
                problem: problem(*member),
                url: inner.directory.url_of(*member),
                voter: voters.contains(member),
                last_log: if *member == id {
                    metrics.last_log_index
                } else {
                    // What a lost disk once had says nothing about what answers there now.
                    let reached = !problems.contains_key(member);
                    let replicated = metrics.replication.as_ref().filter(|_| reached);
                    replicated.and_then(|r| r.get(member).copied().flatten()).map(|at| at.index)
                },
            })
            .collect();
        ReplicaStatus {
            id,
            term: metrics.current_term,
            leader: inner.leader.borrow().clone(),
            is_leader,
            last_log: metrics.last_log_index.unwrap_or(0),
            applied: inner.applied.borrow().index,
            snapshot: inner
                .snapshots
                .current()
                .and_then(|(meta, _)| meta.last_log_id)
                .map_or(0, |at| at.index),
            members,
            checksums: inner.directory.checksums.status(),
        }
    }

    /// First log index that is still in this replica's log; what comes before is in its snapshot.
    pub fn log_begins_at(&self) -> u64 {
        let metrics = self.inner.raft.metrics();
        let purged = metrics.borrow_watched().purged;
        purged.map_or(0, |at| at.index + 1)
    }

    /// Resolves with the reason when the replica fails for good (disk, damage, other lease durations): the process
    /// should exit.
    pub async fn failed(&self) -> String {
        let mut failed = self.inner.failed.subscribe();
        match failed.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            // The sender lives as long as this store.
            Err(_) => "the replica has ended".to_owned(),
        }
    }

    /// If this replica leads, hands leadership to the most advanced follower and waits for the change, at most
    /// `deadline`. Returns whether it no longer leads.
    pub async fn transfer_leadership(&self, deadline: Duration) -> bool {
        membership::hand_over(&self.inner, None, deadline).await
    }

    /// As [`Store::transfer_leadership`], to that member only.
    pub async fn transfer_leadership_to(&self, member: u64, deadline: Duration) -> bool {
        membership::hand_over(&self.inner, Some(member), deadline).await
    }

    /// Stops the replica's tasks and closes its databases.
    pub async fn stop(&self) {
        let background = std::mem::take(&mut *self.background.lock().unwrap_or_else(PoisonError::into_inner));
        let ended =
            tokio::task::spawn_blocking(move || background.into_iter().for_each(Background::end)).await;
        if let Err(error) = ended {
            tracing::warn!(%error, "waiting for the background threads failed");
        }
        self.inner.stop().await;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && let Err(error) = tokio::task::spawn_blocking(move || thread.end()).await
        {
            tracing::warn!(%error, "waiting for the raft thread failed");
        }
    }
}

impl Inner {
    /// Index of the last snapshot here; 0 if there is none.
    pub(crate) fn snapshot_index(&self) -> u64 {
        self.snapshots.current().and_then(|(meta, _)| meta.last_log_id).map_or(0, |at| at.index)
    }

    async fn stop(&self) {
        let inner = self;
        inner.cancel.cancel();
        inner.tasks.close();
        inner.tasks.wait().await;
        if let Err(error) = inner.raft.shutdown().await {
            tracing::warn!(%error, "the replica did not stop cleanly");
        }
        let (log, state) = (inner.log.clone(), inner.state.clone());
        let closed = tokio::task::spawn_blocking(move || {
            log.stop();
            state.make_durable()
        });
        match closed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(%error, "the state was not made durable; the log will replay it")
            }
            Err(error) => tracing::warn!(%error, "closing the databases failed"),
        }
    }
}

async fn wait_for_change(
    leader: &mut watch::Receiver<Option<LeaderInfo>>,
    left: Duration,
    poll: &mut Duration,
) {
    let _ = tokio::time::timeout(left.min(*poll), leader.changed()).await;
    *poll = (*poll * 2).min(LEADER_POLL);
}

impl Inner {
    /// When this replica last heard of a leader, in [`boot_ms`](crate::boot_clock::boot_ms); 0 = never.
    pub(crate) fn leader_heard_ms(&self) -> u64 {
        self.stamper.leader_heard_boot_ms.load(Ordering::Acquire)
    }

    pub(crate) fn stopped(&self) -> Option<String> {
        if let Some(why) = self.failed.borrow().clone().or_else(|| self.removed()) {
            return Some(why);
        }
        if self.directory.checksums.is_stopped() {
            return Some("its state is not that of the majority".to_owned());
        }
        self.cancel.is_cancelled().then(|| "it is stopping".to_owned())
    }

    pub(crate) fn fail(&self, why: String) {
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            if first {
                tracing::error!(%why, "this replica has failed");
                *failed = Some(why);
            }
            first
        });
    }

    /// The answer to an acquisition while the replicas' checksums differ and the state has no record of it yet.
    fn refused_for_checksums(&self, command: &Command) -> Option<ProposedReply> {
        let refusal = self.directory.checksums.refusal().filter(|_| command.acquires())?;
        let applied = *self.applied.borrow();
        Some(ProposedReply {
            outcome: Outcome::Refused(refusal),
            replayed: false,
            index: applied.index,
            cluster_time_ms: applied.cluster_time_ms,
        })
    }

    fn is_cut_off(&self, metrics: &RaftMetrics<TypeConfig>) -> bool {
        let alone = metrics.membership_config.membership().voter_ids().count() <= 1;
        let limit = Duration::from_millis(self.config.election_timeout_ms * CUT_OFF_TIMEOUTS);
        !alone && metrics.last_quorum_acked.is_some_and(|at| at.into_inner().elapsed() > limit)
    }

    pub(crate) async fn propose_with(
        &self,
        bytes: Bytes,
        anchor_ms: Option<u64>,
        deadline: Duration,
    ) -> Result<ProposedReply, ProposeRefusal> {
        let Ok(_place) = self.in_flight.try_acquire() else { return Err(ProposeRefusal::Overloaded) };
        let proposed = Proposed::new(bytes, self.stamper.clone(), anchor_ms);
        let unknown = |why: String| Err(ProposeRefusal::Unknown(why));
        match tokio::time::timeout(deadline, self.raft.client_write(proposed)).await {
            Err(_) => unknown(format!("it was not applied within {} ms", deadline.as_millis())),
            Ok(Ok(written)) => match written.data.0 {
                Some(applied) => Ok(ProposedReply {
                    outcome: applied.outcome,
                    replayed: applied.replayed,
                    index: written.log_id.index,
                    cluster_time_ms: applied.cluster_time_ms,
                }),
                None => unknown("the entry has no answer".into()),
            },
            Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => {
                Err(ProposeRefusal::NotLeader)
            }
            Ok(Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)))) => {
                unknown("the leader changed after the entry was appended".into())
            }
            Ok(Err(error)) => unknown(error.to_string()),
        }
    }

    async fn propose_there(
        &self,
        leader: u64,
        bytes: &Bytes,
        deadline: Duration,
    ) -> Result<ProposedReply, ProposeRefusal> {
        let Some(client) = self.forward_client(leader) else { return Err(ProposeRefusal::NotLeader) };
        let Ok(_place) = self.in_flight.try_acquire() else { return Err(ProposeRefusal::Overloaded) };
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let request = Request::Propose { proposal: bytes.to_vec(), deadline_ms };
        match client.request(&request, deadline).await {
            Ok(Reply::Proposed(result)) => result,
            Ok(other) => Err(ProposeRefusal::Unknown(format!("the leader answered {other:?}"))),
            Err(RpcError::NotSent(_)) => Err(ProposeRefusal::NotLeader),
            Err(RpcError::NoAnswer(why)) => Err(ProposeRefusal::Unknown(why)),
        }
    }

    async fn read_index_there(&self, leader: u64, timeout: Duration) -> Option<ReadIndexReply> {
        match self.forward_client(leader)?.request(&Request::ReadIndex, timeout).await {
            Ok(Reply::ReadIndex(at)) => at,
            _ => None,
        }
    }

    pub(crate) fn forward_client(&self, target: u64) -> Option<Arc<RpcClient>> {
        let node = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            metrics.membership_config.membership().get_node(&target)?.clone()
        };
        let mut clients = self.forward_clients.lock().unwrap_or_else(PoisonError::into_inner);
        match clients.get(&target) {
            Some((known, client)) if *known == node => Some(client.clone()),
            _ => {
                let client = Arc::new(RpcClient::new(self.directory.clone(), target, node.clone()));
                clients.insert(target, (node, client.clone()));
                Some(client)
            }
        }
    }
}

impl Forwarded for Inner {
    async fn propose_here(
        &self,
        proposal: Bytes,
        deadline: Duration,
    ) -> Result<ProposedReply, ProposeRefusal> {
        // The first command of a cluster forms it, and anchors its time; nothing may come before.
        if !self.formed.load(Ordering::Acquire)
            || !self.disk.may_lead()
            || self.directory.checksums.is_stopped()
            || self.is_cut_off(&self.raft.metrics().borrow_watched())
        {
            return Err(ProposeRefusal::NotLeader);
        }
        if self.directory.checksums.refusal().is_some()
            && let Ok(decoded) = decode::<Proposal>(&proposal)
            && let Some(refused) = self.refused_for_checksums(&decoded.command)
        {
            return Ok(refused);
        }
        self.propose_with(proposal, None, deadline).await
    }

    async fn accept_checksum_here(&self, index: u64, value: u64) -> Result<bool, MemberError> {
        checksums::accept::accept_here(self, index, value).await
    }

    async fn change_members_here(&self, change: MemberChange) -> Result<MemberChanged, MemberError> {
        membership::change_here(self, change).await
    }

    async fn read_index_here(&self) -> Option<ReadIndexReply> {
        if self.disk.is_stuck() || self.directory.checksums.is_stopped() {
            return None;
        }
        let linearizer = self.raft.get_read_linearizer(ReadPolicy::ReadIndex).await.ok()?;
        let log_id = *linearizer.read_log_id().log_id();
        let term = self.raft.metrics().borrow_watched().current_term;
        let now_ms = self.stamper.now_ms(term).unwrap_or(0).max(self.applied.borrow().cluster_time_ms);
        Some(ReadIndexReply { index: log_id.index, term, now_ms })
    }

    fn may_lead(&self) -> bool {
        self.disk.may_lead() && !self.directory.checksums.is_stopped()
    }

    fn committed(&self) -> Option<LogId> {
        self.log.committed()
    }

    fn fail(&self, why: String) {
        Inner::fail(self, why);
    }
}

impl Forwarded for Arc<Inner> {
    async fn propose_here(
        &self,
        proposal: Bytes,
        deadline: Duration,
    ) -> Result<ProposedReply, ProposeRefusal> {
        Inner::propose_here(self, proposal, deadline).await
    }
    async fn change_members_here(&self, change: MemberChange) -> Result<MemberChanged, MemberError> {
        Inner::change_members_here(self, change).await
    }
    async fn accept_checksum_here(&self, index: u64, value: u64) -> Result<bool, MemberError> {
        Inner::accept_checksum_here(self, index, value).await
    }
    async fn read_index_here(&self) -> Option<ReadIndexReply> {
        Inner::read_index_here(self).await
    }
    fn may_lead(&self) -> bool {
        Inner::may_lead(self)
    }
    fn committed(&self) -> Option<LogId> {
        self.log.committed()
    }
    fn fail(&self, why: String) {
        Inner::fail(self, why);
    }
}

/// Keeps the leader watch current and notices a failed replica.
async fn watch_raft(inner: Arc<Inner>) {
    let metrics = inner.raft.metrics();
    // The metrics change with every entry, and this part of them when there is something to see here. Both are sent
    // before this task runs, which shares its thread with their sender.
    let mut server = inner.raft.server_metrics();
    let mut urls = inner.directory.changes();
    let mut fitness = inner.disk.changes();
    loop {
        {
            let _seen = server.borrow_and_update();
            let now = metrics.borrow_watched();
            if let Err(fatal) = &now.running_state {
                let why = fatal.to_string();
                drop(now);
                if !inner.cancel.is_cancelled() {
                    inner.fail(why);
                }
                return;
            }
            // A leader that nobody answers can do nothing: better to look for another than to wait on it.
            let usable = !inner.is_cut_off(&now) && !inner.disk.is_stuck();
            let leader = now.current_leader.filter(|id| *id != inner.id || usable);
            // A replica whose disk is stuck can't take note of a new leader, but it hears of one.
            let leader = inner.directory.leader_after(now.current_term).or(leader);
            // Who was removed hears of no leader any more: what it knew is out of date.
            let leader = leader.filter(|_| inner.removed().is_none());
            let info = leader.map(|id| LeaderInfo { id, url: inner.directory.url_of(id) });
            if now.current_leader == Some(inner.id) && !inner.is_cut_off(&now) {
                inner.stamper.reign_began(now.current_term);
                inner.stamper.heard_of_leader();
            }
            inner.leader.send_if_modified(|known| {
                let changed = *known != info;
                *known = info;
                changed
            });
        }
        tokio::select! {
            changed = server.changed() => if changed.is_err() && inner.cancel.is_cancelled() { return },
            _ = urls.changed() => {}
            _ = fitness.changed() => {}
            () = tokio::time::sleep(Duration::from_millis(inner.config.election_timeout_ms)) => {}
            () = inner.cancel.cancelled() => return,
        }
    }
}
