//! What every request and session shares.

use crate::config::Settings;
use crate::http::args::Consistency;
use crate::http::error::Failure;
use crate::hub::Hub;
use crate::schedule::DroneCache;
use crate::session::drift::Drifts;
use crate::session::registry::Registry;
use crate::session::{heartbeats, together};
use holdfast_core::command::{Command, HeartbeatItem, Idempotency, Proposal};
use holdfast_wire::ApiErrorKind;
use raft_store::{Answer, ProposeError, ReadPoint, Store};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a request's proposal may take before it is answered with `NoLeader` or `OutcomeUnknown`.
pub const PROPOSE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a linearizable read may take before it is answered with `NoLeader`.
pub const READ_DEADLINE: Duration = Duration::from_secs(5);
/// Most connects that wait for a key's release.
const WAITING_CONNECTS_MAX: usize = 10_000;
/// Most status streams.
const STREAMS_MAX: usize = 10_000;
/// Most drone sockets.
const SOCKETS_MAX: usize = 10_000;

/// Shared by all requests and sessions. Cloning it is cheap.
#[derive(Clone)]
pub struct App(Arc<Shared>);

/// See [`App`].
pub struct Shared {
    /// The replica.
    pub store: Store,
    /// What this controller runs with.
    pub settings: Settings,
    /// Wakes waiters.
    pub hub: Arc<Hub>,
    /// Drones that may take a backend.
    pub drones: DroneCache,
    /// Drone sockets of this controller.
    pub sessions: Registry,
    /// How far off the drones' clocks are.
    pub drifts: Drifts,
    /// To the batcher.
    pub heartbeats: mpsc::Sender<HeartbeatItem>,
    /// To the batcher of the sessions' other commands.
    pub together: mpsc::Sender<together::Item>,
    /// Cancelled when this controller stops: streams, waiters and sockets end.
    pub stopping: CancellationToken,
    /// Background tasks and drone sessions.
    pub tasks: TaskTracker,
    waiting_connects: Semaphore,
    /// Arc: a stream or session outlives the handler that opened it.
    streams: Arc<Semaphore>,
    sockets: Arc<Semaphore>,
    token_secret: OnceLock<[u8; 32]>,
    failing: Mutex<Option<Failing>>,
    behind: Mutex<Behind>,
}

/// How far this replica is behind the entries that answers have named.
#[derive(Debug, Clone, Copy, Default)]
struct Behind {
    /// The newest index that was named.
    newest: u64,
    /// The index that is waited for, and since when.
    waits: Option<(u64, Instant)>,
}

impl Behind {
    /// An answer says that `index` is applied at the leader.
    fn named(&mut self, index: u64, now: Instant) {
        self.newest = self.newest.max(index);
        self.waits.get_or_insert((index, now));
    }

    /// How long this replica, which has applied up to `applied`, has lacked an entry that was named.
    fn behind_for(&mut self, applied: u64, now: Instant) -> Duration {
        if self.waits.is_some_and(|(index, _)| index <= applied) {
            // When the newest was named is not known any more; it counts from here.
            self.waits = (self.newest > applied).then_some((self.newest, now));
        }
        self.waits.map_or(Duration::ZERO, |(_, since)| now.saturating_duration_since(since))
    }
}

/// A run of proposals without one that reached a leader.
#[derive(Debug, Clone, Copy)]
struct Failing {
    first: Instant,
    last: Instant,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl App {
    /// Starts the shared tasks. They end when `stopping` is cancelled.
    pub fn start(store: Store, settings: Settings, stopping: CancellationToken) -> Self {
        let (heartbeats, items) = mpsc::channel(heartbeats::QUEUE_MAX);
        let (together, commands) = mpsc::channel(together::QUEUE_MAX);
        let app = Self(Arc::new(Shared {
            store,
            settings,
            hub: Arc::new(Hub::default()),
            drones: DroneCache::default(),
            sessions: Registry::default(),
            drifts: Drifts::default(),
            heartbeats,
            together,
            stopping,
            tasks: TaskTracker::new(),
            waiting_connects: Semaphore::new(WAITING_CONNECTS_MAX),
            streams: Arc::new(Semaphore::new(STREAMS_MAX)),
            sockets: Arc::new(Semaphore::new(SOCKETS_MAX)),
            token_secret: OnceLock::new(),
            failing: Mutex::new(None),
            behind: Mutex::new(Behind::default()),
        }));
        let hub = Arc::clone(&app.hub);
        app.store.listen(move |effects| hub.wake(effects));
        app.tasks.spawn(heartbeats::run(app.clone(), items));
        app.tasks.spawn(together::run(app.clone(), commands));
        app
    }

    /// Name of this controller in handshakes and cluster states.
    pub fn controller_name(id: u64) -> String {
        format!("controller-{id}")
    }

    /// Proposes a request's command.
    pub async fn propose(
        &self,
        command: Command,
        idempotency: Option<Idempotency>,
    ) -> Result<Answer, Failure> {
        Ok(self.propose_within(Proposal { command, idempotency }, PROPOSE_DEADLINE).await?)
    }

    /// Proposes, and notes whether this controller reaches a leader.
    pub async fn propose_within(
        &self,
        proposal: Proposal,
        deadline: Duration,
    ) -> Result<Answer, ProposeError> {
        let answer = self.store.propose(proposal, deadline).await;
        match &answer {
            Ok(answer) => {
                *self.failing() = None;
                self.behind().named(answer.index, Instant::now());
            }
            Err(ProposeError::NoLeader | ProposeError::OutcomeUnknown(_) | ProposeError::Unfit(_)) => {
                let now = Instant::now();
                self.failing().get_or_insert(Failing { first: now, last: now }).last = now;
            }
            Err(ProposeError::TooLarge(..) | ProposeError::Overloaded | ProposeError::Stopped(_)) => {}
        }
        answer
    }

    fn failing(&self) -> MutexGuard<'_, Option<Failing>> {
        self.failing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn behind(&self) -> MutexGuard<'_, Behind> {
        self.behind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how long this replica has not applied something that an answer to one of its proposals said was applied. Such a
    /// replica still forwards, but what it reads from its own state is out of date.
    pub fn behind_for(&self) -> Duration {
        self.behind().behind_for(self.store.local().applied, Instant::now())
    }

    /// How long proposals of this controller have failed for want of a leader, from the first to the last of them with
    /// none in between that succeeded. Silence after a failure says nothing and does not count.
    pub fn failing_for(&self) -> Duration {
        self.failing().map_or(Duration::ZERO, |run| run.last.duration_since(run.first))
    }

    /// The state, as fresh as asked.
    pub async fn read(&self, consistency: Consistency) -> Result<ReadPoint, Failure> {
        match consistency {
            Consistency::Linearizable => Ok(self.store.linearizable(READ_DEADLINE).await?),
            Consistency::Local => Ok(self.store.local()),
        }
    }

    /// MAC key of the connection tokens. Made when the cluster is formed, and never changed after.
    pub async fn token_secret(&self) -> Result<[u8; 32], Failure> {
        if let Some(secret) = self.token_secret.get() {
            return Ok(*secret);
        }
        let mut cluster = self.store.local().view.cluster()?;
        if cluster.is_none() {
            // An answer that came from the leader can be ahead of what this replica has applied.
            cluster = self.read(Consistency::Linearizable).await?.view.cluster()?;
        }
        let cluster =
            cluster.ok_or_else(|| Failure::new(ApiErrorKind::NoLeader, "the cluster is not formed yet"))?;
        Ok(*self.token_secret.get_or_init(|| cluster.token_secret))
    }

    /// A place among the connects that wait.
    pub fn wait_for_key(&self) -> Result<SemaphorePermit<'_>, Failure> {
        self.waiting_connects
            .try_acquire()
            .map_err(|_| Failure::new(ApiErrorKind::Overloaded, "too many connects wait for keys"))
    }

    /// A place among the status streams.
    pub fn open_stream(&self) -> Result<OwnedSemaphorePermit, Failure> {
        Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| Failure::new(ApiErrorKind::Overloaded, "too many streams are open"))
    }

    /// A place among the drone sockets.
    pub fn open_socket(&self) -> Result<OwnedSemaphorePermit, Failure> {
        Arc::clone(&self.sockets)
            .try_acquire_owned()
            .map_err(|_| Failure::new(ApiErrorKind::Overloaded, "too many drone sockets are open"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_behind_only_while_it_lacks_what_was_named() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut behind = Behind::default();
        assert_eq!(behind.behind_for(0, at(0)), Duration::ZERO);
        behind.named(10, at(0));
        behind.named(12, at(500));
        assert_eq!(behind.behind_for(9, at(900)), Duration::from_millis(900));
        // It goes on, if slowly.
        assert_eq!(behind.behind_for(11, at(1_000)), Duration::ZERO);
        assert_eq!(behind.behind_for(11, at(3_500)), Duration::from_millis(2_500));
        behind.named(11, at(3_500));
        assert_eq!(behind.behind_for(12, at(9_000)), Duration::ZERO);
        assert_eq!(behind.behind_for(12, at(99_000)), Duration::ZERO);
    }
}
