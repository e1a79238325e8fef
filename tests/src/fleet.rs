//! Many drones in one process: the real drone's session (discovery, backoff, heartbeats) and lease keeper, with backends
//! that are only said to run. For what a fleet does together: see `tests/reconnect.rs`.

use crate::harness::boot_ms;
use holdfast_drone::agent::Input;
use holdfast_drone::clock::DroneClock;
use holdfast_drone::discovery::Discovery;
use holdfast_drone::lease::{Duty, LeaseKeeper};
use holdfast_drone::session::{Identity, Session, SessionEvent, random_incarnation};
use holdfast_wire::drone::{
    Action, ActionMessage, BackendEvent, BackendsPage, ListedBackend, MessageFromDrone, MessageToDrone,
    RenewItem, RenewKeysRequest,
};
use holdfast_wire::limits::{BACKENDS_PER_PAGE_MAX, RENEW_KEYS_MAX};
use holdfast_wire::{BackendState, BackendStatus};
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Inputs of a drone that wait.
const INPUTS_MAX: usize = 1_024;
/// Longest time between two looks at what is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A session that was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arrival {
    /// The drone's number.
    pub drone: usize,
    /// `CLOCK_BOOTTIME`, in milliseconds.
    pub boot_ms: u64,
    /// The controller's name.
    pub controller: String,
}

/// What all drones of a fleet have done.
#[derive(Debug, Default)]
pub struct FleetStats {
    arrivals: Mutex<Vec<Arrival>>,
    /// Drones with a session.
    pub connected: AtomicUsize,
    /// Renewals that were granted.
    pub renewed: AtomicU64,
    /// Leases whose soft deadline passed, or that were refused.
    pub lapsed: AtomicU64,
}

impl FleetStats {
    /// The first session of each drone that was opened after a moment of `CLOCK_BOOTTIME`, in milliseconds.
    pub fn first_arrivals(&self, after_ms: u64) -> Vec<Arrival> {
        let mut first: BTreeMap<usize, Arrival> = BTreeMap::new();
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        for arrival in arrivals.iter().filter(|arrival| arrival.boot_ms > after_ms) {
            first.entry(arrival.drone).or_insert_with(|| arrival.clone());
        }
        first.into_values().collect()
    }

    /// All sessions that were opened after a moment of `CLOCK_BOOTTIME`, in milliseconds.
    pub fn arrivals(&self, after_ms: u64) -> usize {
        let arrivals = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        arrivals.iter().filter(|arrival| arrival.boot_ms > after_ms).count()
    }
}

/// See the module. The drones end when it is dropped, without a word, as killed ones do.
pub struct Fleet {
    /// What they have done.
    pub stats: Arc<FleetStats>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Fleet {
    /// Starts `dr-fleet-0`, `dr-fleet-1`, …
    pub fn start(urls: &[String], cluster: &str, count: usize) -> Self {
        let stats: Arc<FleetStats> = Arc::default();
        let mut tasks = Vec::new();
        for number in 0..count {
            let clock = DroneClock::start();
            let (inputs, waiting) = mpsc::channel(INPUTS_MAX);
            let identity = Identity {
                name: format!("dr-fleet-{number}"),
                cluster: cluster.to_owned(),
                pool: String::new(),
                incarnation: random_incarnation(),
            };
            let discovery = Discovery::new(urls.to_vec()).expect("an HTTP client");
            let session = Session::new(identity, clock, discovery, inputs);
            tasks.push(tokio::spawn(session.run(CancellationToken::new())));
            let drone = Drone {
                number,
                clock,
                keeper: LeaseKeeper::new(),
                session: None,
                unacked: BTreeMap::new(),
                next_event_id: 1,
                held: BTreeMap::new(),
                pages: VecDeque::new(),
                stats: Arc::clone(&stats),
            };
            tasks.push(tokio::spawn(drone.run(waiting)));
        }
        Self { stats, tasks }
    }
}

struct Drone {
    number: usize,
    clock: DroneClock,
    keeper: LeaseKeeper,
    session: Option<mpsc::Sender<MessageFromDrone>>,
    unacked: BTreeMap<i64, BackendEvent>,
    next_event_id: i64,
    stats: Arc<FleetStats>,
    /// Backends that it was told to start and not to end, with their tokens.
    held: BTreeMap<String, u64>,
    /// Pages of its list that were not sent yet on this session.
    pages: VecDeque<Vec<ListedBackend>>,
}

impl Drone {
    async fn run(mut self, mut inputs: mpsc::Receiver<Input>) {
        loop {
            let now_ms = self.clock.now_ms();
            let wake_ms = self.keeper.next_wake().map_or(i64::MAX, |at| at.saturating_sub(now_ms));
            let wait = Duration::from_millis(u64::try_from(wake_ms).unwrap_or(0)).min(LOOK_EVERY);
            match tokio::time::timeout(wait, inputs.recv()).await {
                Ok(Some(Input::Session(event))) => self.session(event),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(_) => {}
            }
            self.due();
        }
    }

    fn session(&mut self, event: SessionEvent) {
        match event {
            SessionEvent::Connected { handshake, sender } => {
                let arrival = Arrival { drone: self.number, boot_ms: boot_ms(), controller: handshake.name };
                self.stats.arrivals.lock().unwrap_or_else(PoisonError::into_inner).push(arrival);
                self.stats.connected.fetch_add(1, Ordering::Relaxed);
                self.session = Some(sender);
                self.begin_list();
                self.keeper.ask_again(self.clock.now_ms());
                for event in self.unacked.clone().into_values() {
                    self.send(MessageFromDrone::BackendEvent(event));
                }
            }
            SessionEvent::Lost => {
                self.stats.connected.fetch_sub(1, Ordering::Relaxed);
                self.session = None;
            }
            SessionEvent::Message(message) => self.message(message),
        }
    }

    /// Lists what it holds, one page at a time.
    fn begin_list(&mut self) {
        let listed = |(backend, token): (&String, &u64)| ListedBackend {
            backend: backend.clone(),
            token: Some(*token),
            state: None,
        };
        let all: Vec<_> = self.held.iter().map(listed).collect();
        self.pages = all.chunks(BACKENDS_PER_PAGE_MAX).map(<[ListedBackend]>::to_vec).collect();
        if self.pages.is_empty() {
            self.pages.push_back(Vec::new());
        }
        self.page();
    }

    fn page(&mut self) {
        if let Some(backends) = self.pages.pop_front() {
            let last = self.pages.is_empty();
            self.send(MessageFromDrone::Backends(BackendsPage { backends, last }));
        }
    }

    /// Without room or a session it is made again later, as the drone's agent does.
    fn send(&self, message: MessageFromDrone) {
        if let Some(session) = &self.session {
            let _ = session.try_send(message);
        }
    }

    fn report(&mut self, backend_id: &str, token: Option<u64>, state: BackendState) {
        let event_id = self.next_event_id;
        self.next_event_id += 1;
        let timestamp = self.clock.now_ms();
        let event = BackendEvent { event_id, backend_id: backend_id.to_owned(), state, timestamp, token };
        self.unacked.insert(event_id, event.clone());
        self.send(MessageFromDrone::BackendEvent(event));
    }

    fn message(&mut self, message: MessageToDrone) {
        match message {
            MessageToDrone::Action(ActionMessage { action_id, backend_id, action, .. }) => {
                self.send(MessageFromDrone::AckAction { action_id });
                match action {
                    Action::Spawn { key, .. } => {
                        self.held.insert(backend_id.clone(), key.token);
                        if self.keeper.acquired(&backend_id, key.token, key.deadlines) {
                            let address = SocketAddr::from(([127, 0, 0, 1], 9));
                            self.report(&backend_id, Some(key.token), BackendState::Ready { address });
                        }
                    }
                    Action::Terminate { kind, reason } => {
                        self.keeper.ended(&backend_id);
                        self.held.remove(&backend_id);
                        let state = BackendState::Terminated {
                            last_status: BackendStatus::Ready,
                            termination: Some(kind),
                            reason: Some(reason),
                            exit_code: None,
                        };
                        self.report(&backend_id, None, state);
                    }
                }
            }
            MessageToDrone::AckEvent { event_id } => {
                self.unacked.remove(&event_id);
            }
            // It says neither.
            MessageToDrone::AckDraining {} | MessageToDrone::AckActivity { .. } => {}
            MessageToDrone::AckBackends {} => self.page(),
            MessageToDrone::RenewKeysResponse(response) => {
                let now_ms = self.clock.now_ms();
                for key in response.keys {
                    if let Some(deadlines) = key.deadlines {
                        self.keeper.renewed(&key.backend, deadlines, now_ms);
                        self.stats.renewed.fetch_add(1, Ordering::Relaxed);
                    } else if let Some(refusal) = key.refused
                        && self.keeper.refused(&key.backend, refusal).is_some()
                    {
                        self.stats.lapsed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            MessageToDrone::RenewKeyResponse(_) => {}
        }
    }

    fn due(&mut self) {
        let now_ms = self.clock.now_ms();
        let mut keys = Vec::new();
        for duty in self.keeper.due(now_ms, || rand::random_range(0.5..=1.0)) {
            match duty {
                Duty::RenewNow { backend, token } => keys.push(RenewItem { backend, token }),
                Duty::SoftTerminate { .. } => {
                    self.stats.lapsed.fetch_add(1, Ordering::Relaxed);
                }
                Duty::HardTerminate { .. } => {}
            }
        }
        for batch in keys.chunks(RENEW_KEYS_MAX) {
            let request = RenewKeysRequest { local_time: now_ms, keys: batch.to_vec() };
            self.send(MessageFromDrone::RenewKeys(request));
        }
    }
}
