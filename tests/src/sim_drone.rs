//! A simulated drone: the drone's end of the socket without any policy of its own.
//!
//! [`SimDrone`] does only what a test tells it to, with whatever local clock the test gives it, so that a test can play
//! any schedule: acknowledgements that get lost, clocks that go back, reports that come late. [`AutoDrone`] is built on
//! it and behaves: it keeps heartbeats, states and renewals going, for figures where the drone's own work must not count.

use futures::{SinkExt, StreamExt};
use holdfast_wire::BackendState;
use holdfast_wire::drone::{
    Action, ActionMessage, BackendEvent, BackendsPage, ControllerHandshake, DroneHandshake, Heartbeat,
    ListedBackend, MessageFromDrone, MessageToDrone, RenewItem, RenewKeyRequest, RenewKeyResponse,
    RenewKeysRequest, RenewKeysResponse, VersionInfo,
};
use holdfast_wire::limits::{BACKENDS_PER_PAGE_MAX, RENEW_KEYS_MAX};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout_at;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// Messages that wait in either direction. A test that lets more pile up gets its session closed.
const QUEUE_MAX: usize = 16_384;
/// How long a controller may take to answer a handshake; it gives a registration three seconds itself.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an [`AutoDrone`] looks at which keys it must renew, unless the lease is so short that it must be oftener.
const AUTO_TICK_MAX: Duration = Duration::from_millis(500);
/// How long an [`AutoDrone`] waits for the answer to a renewal before it asks again, in milliseconds.
const AUTO_RENEW_AGAIN_MS: i64 = 2_000;
/// Pause before an [`AutoDrone`] tries the next controller.
const AUTO_RECONNECT_PAUSE: Duration = Duration::from_millis(50);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What can go wrong between a simulated drone and a controller.
#[derive(Debug, thiserror::Error)]
pub enum SimError {
    /// No connection, or the upgrade was refused.
    #[error("can't open the drone socket: {0}")]
    Connect(String),
    /// The session is over.
    #[error("the session was closed with {code:?}: {reason}")]
    Closed {
        /// The controller's close code, if it sent one.
        code: Option<u16>,
        /// Its reason.
        reason: String,
    },
    /// Nothing fitting came in time.
    #[error("no {0} came in time")]
    Timeout(&'static str),
    /// The controller sent something that is not a message.
    #[error("not a message: {0}")]
    Protocol(String),
}

impl SimError {
    /// The close code, if the controller closed the session with one.
    pub fn close_code(&self) -> Option<u16> {
        match self {
            Self::Closed { code, .. } => *code,
            _ => None,
        }
    }
}

/// Who a simulated drone says it is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Cluster (`HOST:PORT`).
    pub cluster: String,
    /// Name, beginning with `dr`.
    pub name: String,
    /// Pool.
    pub pool: String,
    /// `None` for a drone of Plane's.
    pub incarnation: Option<String>,
    /// Its data directory, which a drone of Plane's does not use.
    pub disk: Disk,
}

/// A simulated data directory: what a drone lists at registration. Clones are the same directory.
#[derive(Debug, Clone)]
pub struct Disk {
    data_id: String,
    backends: Arc<Mutex<BTreeMap<String, ListedBackend>>>,
}

impl Disk {
    fn new(data_id: String) -> Self {
        Self { data_id, backends: Arc::default() }
    }

    fn backends(&self) -> MutexGuard<'_, BTreeMap<String, ListedBackend>> {
        self.backends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn received(&self, message: &MessageToDrone) {
        if let MessageToDrone::Action(ActionMessage {
            backend_id, action: Action::Spawn { key, .. }, ..
        }) = message
        {
            let (backend, token) = (backend_id.clone(), Some(key.token));
            let listed = ListedBackend { backend, token, state: Some(BackendState::Loading) };
            self.backends().entry(backend_id.clone()).or_insert(listed);
        }
    }

    fn sent(&self, message: &MessageFromDrone) {
        if let MessageFromDrone::BackendEvent(event) = message
            && let Some(listed) = self.backends().get_mut(&event.backend_id)
        {
            listed.state = Some(event.state.clone());
        }
    }
}

impl Identity {
    /// A drone of the default pool.
    pub fn new(cluster: &str, name: &str, incarnation: &str) -> Self {
        Self {
            cluster: cluster.to_owned(),
            name: name.to_owned(),
            pool: String::new(),
            incarnation: Some(incarnation.to_owned()),
            disk: Disk::new(format!("disk of {name}")),
        }
    }

    /// A drone of that name with an empty data directory.
    pub fn on_another_disk(&self, incarnation: &str) -> Self {
        let disk = Disk::new(format!("another disk of {}", self.name));
        Self { disk, ..self.restarted(incarnation) }
    }

    /// A drone as Plane's, which has no incarnation.
    pub fn of_plane(cluster: &str, name: &str) -> Self {
        Self { incarnation: None, ..Self::new(cluster, name, "") }
    }

    /// The same drone after a restart.
    pub fn restarted(&self, incarnation: &str) -> Self {
        Self { incarnation: Some(incarnation.to_owned()), ..self.clone() }
    }

    fn url(&self, controller_url: &str) -> String {
        let base = controller_url.trim_end_matches('/').replacen("http", "ws", 1);
        let pool = if self.pool.is_empty() { String::new() } else { format!("?pool={}", self.pool) };
        format!("{base}/ctrl/c/{}/drone-socket{pool}", self.cluster)
    }
}

/// A spawn as a test looks at it.
#[derive(Debug, Clone)]
pub struct SpawnSeen {
    /// The action to acknowledge.
    pub action_id: String,
    /// The backend.
    pub backend_id: String,
    /// The drone's number.
    pub drone_id: i32,
    /// The key with deadlines in this drone's time.
    pub key: holdfast_wire::drone::AcquiredKey,
}

impl SpawnSeen {
    fn from_action(message: &ActionMessage) -> Option<Self> {
        match &message.action {
            Action::Spawn { key, .. } => Some(Self {
                action_id: message.action_id.clone(),
                backend_id: message.backend_id.clone(),
                drone_id: message.drone_id,
                key: key.clone(),
            }),
            Action::Terminate { .. } => None,
        }
    }
}

enum Incoming {
    Message(Box<MessageToDrone>),
    End(SimError),
}

/// See the module. Dropping it breaks the connection without a word, as a crash does.
pub struct SimDrone {
    /// What the controller answered to the handshake.
    pub handshake: ControllerHandshake,
    out: mpsc::Sender<Message>,
    incoming: mpsc::Receiver<Incoming>,
    /// Came while something else was waited for.
    stash: VecDeque<MessageToDrone>,
    next_event_id: i64,
    pump: JoinHandle<()>,
    heartbeats: Option<JoinHandle<()>>,
    disk: Disk,
}

impl Drop for SimDrone {
    fn drop(&mut self) {
        self.stop_heartbeats();
        self.pump.abort();
    }
}

/// Moves frames between the socket and the queues; answers pings by reading.
async fn pump(mut socket: Socket, mut out: mpsc::Receiver<Message>, incoming: mpsc::Sender<Incoming>) {
    let end = loop {
        tokio::select! {
            message = out.recv() => {
                let Some(message) = message else { return };
                if let Err(error) = socket.send(message).await {
                    break SimError::Closed { code: None, reason: error.to_string() };
                }
            }
            frame = socket.next() => match read(frame) {
                Ok(None) => {}
                Ok(Some(text)) => {
                    let message = match serde_json::from_str::<MessageToDrone>(&text) {
                        Ok(message) => message,
                        Err(error) => break SimError::Protocol(format!("{text}: {error}")),
                    };
                    if incoming.try_send(Incoming::Message(Box::new(message))).is_err() {
                        break SimError::Closed { code: None, reason: "the test does not read".into() };
                    }
                }
                Err(end) => break end,
            },
        }
    };
    // Whoever would read it may be gone.
    let _ = incoming.send(Incoming::End(end)).await;
}

/// A text frame's text; `None` for frames that say nothing.
fn read(
    frame: Option<Result<Message, tokio_tungstenite::tungstenite::Error>>,
) -> Result<Option<String>, SimError> {
    match frame {
        Some(Ok(Message::Text(text))) => Ok(Some(text.to_string())),
        Some(Ok(Message::Close(Some(close)))) => {
            Err(SimError::Closed { code: Some(close.code.into()), reason: close.reason.to_string() })
        }
        Some(Ok(Message::Close(None))) | None => {
            Err(SimError::Closed { code: None, reason: "the connection ended".into() })
        }
        Some(Ok(_)) => Ok(None),
        Some(Err(error)) => Err(SimError::Closed { code: None, reason: error.to_string() }),
    }
}

fn text(message: &impl serde::Serialize) -> Result<Message, SimError> {
    serde_json::to_string(message)
        .map(|text| Message::Text(text.into()))
        .map_err(|e| SimError::Protocol(e.to_string()))
}

impl SimDrone {
    /// Opens the socket of one controller, exchanges handshakes, and lists what is on the disk.
    pub async fn connect(controller_url: &str, identity: &Identity) -> Result<Self, SimError> {
        let open = async {
            let (mut socket, _) = connect_async(identity.url(controller_url))
                .await
                .map_err(|error| SimError::Connect(error.to_string()))?;
            let handshake = DroneHandshake {
                version: VersionInfo::current(),
                name: identity.name.clone(),
                incarnation: identity.incarnation.clone(),
                data_id: identity.incarnation.as_ref().map(|_| identity.disk.data_id.clone()),
            };
            socket.send(text(&handshake)?).await.map_err(|error| SimError::Connect(error.to_string()))?;
            loop {
                if let Some(text) = read(socket.next().await)? {
                    let answer: ControllerHandshake = serde_json::from_str(&text)
                        .map_err(|error| SimError::Protocol(format!("{text}: {error}")))?;
                    return Ok((socket, answer));
                }
            }
        };
        let (socket, handshake) = tokio::time::timeout(HANDSHAKE_TIMEOUT, open)
            .await
            .map_err(|_| SimError::Timeout("handshake"))??;
        let (out, out_queue) = mpsc::channel(QUEUE_MAX);
        let (incoming_queue, incoming) = mpsc::channel(QUEUE_MAX);
        let pump = tokio::spawn(pump(socket, out_queue, incoming_queue));
        let mut drone = Self {
            handshake,
            out,
            incoming,
            stash: VecDeque::new(),
            next_event_id: 1,
            pump,
            heartbeats: None,
            disk: identity.disk.clone(),
        };
        if identity.incarnation.is_some() {
            drone.list().await?;
        }
        Ok(drone)
    }

    /// Lists what is on the disk, and waits until the list has taken effect.
    async fn list(&mut self) -> Result<(), SimError> {
        let all: Vec<ListedBackend> = self.disk.backends().values().cloned().collect();
        let mut pages: Vec<Vec<ListedBackend>> =
            all.chunks(BACKENDS_PER_PAGE_MAX).map(<[ListedBackend]>::to_vec).collect();
        let last = pages.pop().unwrap_or_default();
        let pages = pages.into_iter().map(|page| (page, false)).chain([(last, true)]);
        for (backends, last) in pages {
            self.send(&MessageFromDrone::Backends(BackendsPage { backends, last })).await?;
            self.pick("acknowledgement of a list", HANDSHAKE_TIMEOUT, |message| {
                matches!(message, MessageToDrone::AckBackends {}).then_some(())
            })
            .await?;
        }
        Ok(())
    }

    /// As [`Self::connect`], trying each controller in turn until one lets it in or `within` has passed. A name that is
    /// taken (an older session that has not been given up yet) is tried again too.
    pub async fn connect_any(
        urls: &[String],
        identity: &Identity,
        within: Duration,
    ) -> Result<Self, SimError> {
        let end = Instant::now() + within;
        let mut at = 0;
        loop {
            let url = urls.get(at % urls.len().max(1)).ok_or(SimError::Timeout("controller"))?;
            match Self::connect(url, identity).await {
                Ok(drone) => return Ok(drone),
                Err(error) if Instant::now() >= end => return Err(error),
                Err(_) => tokio::time::sleep(AUTO_RECONNECT_PAUSE).await,
            }
            at += 1;
        }
    }

    async fn queue(&self, message: Message) -> Result<(), SimError> {
        self.out
            .send(message)
            .await
            .map_err(|_| SimError::Closed { code: None, reason: "the session is over".into() })
    }

    /// Sends any message.
    pub async fn send(&self, message: &MessageFromDrone) -> Result<(), SimError> {
        self.disk.sent(message);
        self.queue(text(message)?).await
    }

    /// Sends a text frame as it is.
    pub async fn send_text(&self, text: &str) -> Result<(), SimError> {
        self.queue(Message::Text(text.to_owned().into())).await
    }

    /// Gives the controllers this drone's clock, in milliseconds. Nothing answers it.
    pub async fn heartbeat(&self, local_time_ms: i64) -> Result<(), SimError> {
        self.send(&MessageFromDrone::Heartbeat(Heartbeat { local_time: local_time_ms })).await
    }

    /// Sends heartbeats by itself until [`Self::stop_heartbeats`] or the end of the session.
    pub fn start_heartbeats(&mut self, clock: LocalClock, every: Duration) {
        self.stop_heartbeats();
        let out = self.out.clone();
        self.heartbeats = Some(tokio::spawn(async move {
            let mut tick = tokio::time::interval(every);
            loop {
                tick.tick().await;
                let heartbeat = MessageFromDrone::Heartbeat(Heartbeat { local_time: clock.now_ms() });
                let Ok(message) = text(&heartbeat) else { return };
                if out.send(message).await.is_err() {
                    return;
                }
            }
        }));
    }

    /// See [`Self::start_heartbeats`].
    pub fn stop_heartbeats(&mut self) {
        if let Some(task) = self.heartbeats.take() {
            task.abort();
        }
    }

    /// The next message, whatever it is.
    pub async fn recv(&mut self, within: Duration) -> Result<MessageToDrone, SimError> {
        match self.stash.pop_front() {
            Some(message) => Ok(message),
            None => self.receive("message", tokio::time::Instant::now() + within).await,
        }
    }

    async fn receive(
        &mut self,
        what: &'static str,
        end: tokio::time::Instant,
    ) -> Result<MessageToDrone, SimError> {
        match timeout_at(end, self.incoming.recv()).await.map_err(|_| SimError::Timeout(what))? {
            Some(Incoming::Message(message)) => {
                self.disk.received(&message);
                Ok(*message)
            }
            Some(Incoming::End(end)) => Err(end),
            None => Err(SimError::Closed { code: None, reason: "the session is over".into() }),
        }
    }

    /// The next message in which `look` finds something. Others are kept, in order, for whoever asks for them.
    async fn pick<T>(
        &mut self,
        what: &'static str,
        within: Duration,
        look: impl Fn(&MessageToDrone) -> Option<T>,
    ) -> Result<T, SimError> {
        let kept = self.stash.iter().enumerate().find_map(|(at, message)| Some((at, look(message)?)));
        if let Some((at, found)) = kept {
            self.stash.remove(at);
            return Ok(found);
        }
        let end = tokio::time::Instant::now() + within;
        loop {
            let message = self.receive(what, end).await?;
            match look(&message) {
                Some(found) => return Ok(found),
                None => self.stash.push_back(message),
            }
        }
    }

    /// The next action. An action that is not acknowledged comes again every two seconds.
    pub async fn next_action(&mut self, within: Duration) -> Result<ActionMessage, SimError> {
        self.pick("action", within, |message| match message {
            MessageToDrone::Action(action) => Some(action.clone()),
            _ => None,
        })
        .await
    }

    /// The next spawn; other actions are kept.
    pub async fn next_spawn(&mut self, within: Duration) -> Result<SpawnSeen, SimError> {
        self.pick("spawn", within, |message| match message {
            MessageToDrone::Action(action) => SpawnSeen::from_action(action),
            _ => None,
        })
        .await
    }

    /// The close code with which the controller ends this session; what else comes is kept.
    pub async fn closed(&mut self, within: Duration) -> Result<Option<u16>, SimError> {
        match self.pick("close", within, |_| None::<()>).await {
            Err(SimError::Closed { code, .. }) => Ok(code),
            Err(other) => Err(other),
            Ok(()) => Ok(None),
        }
    }

    /// Acknowledges an action. Nothing answers it.
    pub async fn ack(&self, action_id: &str) -> Result<(), SimError> {
        self.send(&MessageFromDrone::AckAction { action_id: action_id.to_owned() }).await
    }

    /// Reports a state without waiting for its acknowledgement; the answer is the event's id.
    pub async fn report(
        &mut self,
        backend_id: &str,
        token: Option<u64>,
        state: BackendState,
    ) -> Result<i64, SimError> {
        let event_id = self.next_event_id;
        self.next_event_id += 1;
        self.send(&MessageFromDrone::BackendEvent(BackendEvent {
            event_id,
            backend_id: backend_id.to_owned(),
            state,
            timestamp: 0,
            token,
        }))
        .await?;
        Ok(event_id)
    }

    /// Waits for the acknowledgement of a report.
    pub async fn event_acked(&mut self, event_id: i64, within: Duration) -> Result<(), SimError> {
        self.pick("acknowledgement of an event", within, |message| match message {
            MessageToDrone::AckEvent { event_id: acked } if *acked == event_id => Some(()),
            _ => None,
        })
        .await
    }

    /// Reports a state and waits until it is recorded.
    pub async fn report_and_wait(
        &mut self,
        backend_id: &str,
        token: Option<u64>,
        state: BackendState,
        within: Duration,
    ) -> Result<(), SimError> {
        let event_id = self.report(backend_id, token, state).await?;
        self.event_acked(event_id, within).await
    }

    /// Renews one key in Plane's form.
    pub async fn renew_one(
        &mut self,
        backend_id: &str,
        token: Option<u64>,
        local_time_ms: i64,
        within: Duration,
    ) -> Result<RenewKeyResponse, SimError> {
        let backend = backend_id.to_owned();
        self.send(&MessageFromDrone::RenewKey(RenewKeyRequest { backend, local_time: local_time_ms, token }))
            .await?;
        self.pick("answer to a renewal", within, |message| match message {
            MessageToDrone::RenewKeyResponse(response) if response.backend == backend_id => {
                Some(response.clone())
            }
            _ => None,
        })
        .await
    }

    /// Asks for many renewals without waiting for the answer.
    pub async fn send_renewals(&self, keys: &[(String, u64)], local_time_ms: i64) -> Result<(), SimError> {
        let keys = keys
            .iter()
            .map(|(backend, token)| RenewItem { backend: backend.clone(), token: *token })
            .collect();
        self.send(&MessageFromDrone::RenewKeys(RenewKeysRequest { local_time: local_time_ms, keys })).await
    }

    /// The next answer to [`Self::send_renewals`].
    pub async fn renewals_answered(&mut self, within: Duration) -> Result<RenewKeysResponse, SimError> {
        self.pick("answer to renewals", within, |message| match message {
            MessageToDrone::RenewKeysResponse(response) => Some(response.clone()),
            _ => None,
        })
        .await
    }

    /// Renews many keys and waits for the answer.
    pub async fn renew_many(
        &mut self,
        keys: &[(String, u64)],
        local_time_ms: i64,
        within: Duration,
    ) -> Result<RenewKeysResponse, SimError> {
        self.send_renewals(keys, local_time_ms).await?;
        self.renewals_answered(within).await
    }

    /// Forgets everything that came and was not asked for.
    pub fn forget_received(&mut self) {
        self.stash.clear();
        while let Ok(Incoming::Message(_)) = self.incoming.try_recv() {}
    }
}

/// A drone's clock that a test sets: real time elapses on it from any starting point.
#[derive(Debug, Clone)]
pub struct LocalClock {
    start: Instant,
    offset_ms: Arc<AtomicI64>,
}

impl LocalClock {
    /// Reads `now_ms` now.
    pub fn reading(now_ms: i64) -> Self {
        Self { start: Instant::now(), offset_ms: Arc::new(AtomicI64::new(now_ms)) }
    }

    /// What it reads, in milliseconds.
    pub fn now_ms(&self) -> i64 {
        let elapsed_ms = i64::try_from(self.start.elapsed().as_millis()).unwrap_or(i64::MAX);
        self.offset_ms.load(Ordering::Relaxed).saturating_add(elapsed_ms)
    }

    /// Sets it forward or back.
    pub fn step(&self, by_ms: i64) {
        self.offset_ms.fetch_add(by_ms, Ordering::Relaxed);
    }
}

/// What an [`AutoDrone`] has done.
#[derive(Debug, Default)]
pub struct AutoStats {
    /// Backends it was told to start.
    pub spawned: AtomicU64,
    /// Renewals that were granted.
    pub renewed: AtomicU64,
    /// Renewals that were refused.
    pub refused: AtomicU64,
    /// Sessions it has opened.
    pub sessions: AtomicU64,
    /// Whether it has a session now.
    pub connected: AtomicBool,
}

/// A simulated drone that behaves: see the module. Ends when dropped.
pub struct AutoDrone {
    /// What it has done.
    pub stats: Arc<AutoStats>,
    task: JoinHandle<()>,
}

impl Drop for AutoDrone {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl AutoDrone {
    /// Starts it. It stays with the first of `urls` as long as that answers, then goes to the next.
    pub fn start(urls: Vec<String>, identity: Identity) -> Self {
        let stats = Arc::new(AutoStats::default());
        let task = tokio::spawn(auto(urls, identity, Arc::clone(&stats)));
        Self { stats, task }
    }
}

struct Held {
    token: u64,
    renew_at_ms: i64,
}

/// What an [`AutoDrone`] keeps from session to session.
struct Auto {
    clock: LocalClock,
    held: HashMap<String, Held>,
    /// Reports that are not acknowledged, by event id.
    unacked: BTreeMap<i64, BackendEvent>,
    next_event_id: i64,
    address: SocketAddr,
    stats: Arc<AutoStats>,
}

async fn auto(urls: Vec<String>, identity: Identity, stats: Arc<AutoStats>) {
    let mut auto = Auto {
        clock: LocalClock::reading(1_000_000),
        held: HashMap::new(),
        unacked: BTreeMap::new(),
        next_event_id: 1,
        // Nothing listens there; nobody connects.
        address: SocketAddr::from(([127, 0, 0, 1], 9)),
        stats,
    };
    let mut at = 0;
    while let Some(url) = urls.get(at % urls.len().max(1)) {
        if let Ok(mut drone) = SimDrone::connect(url, &identity).await {
            auto.stats.sessions.fetch_add(1, Ordering::Relaxed);
            auto.stats.connected.store(true, Ordering::Relaxed);
            // It ends with the session, however that ends.
            let _ = auto.session(&mut drone).await;
            auto.stats.connected.store(false, Ordering::Relaxed);
        }
        at += 1;
        tokio::time::sleep(AUTO_RECONNECT_PAUSE).await;
    }
}

impl Auto {
    async fn session(&mut self, drone: &mut SimDrone) -> Result<(), SimError> {
        let lease = drone.handshake.lease.unwrap_or_default();
        let tick_every = AUTO_TICK_MAX.min(Duration::from_millis(lease.renew_ms / 8));
        drone.start_heartbeats(self.clock.clone(), tick_every);
        for event in self.unacked.values() {
            drone.send(&MessageFromDrone::BackendEvent(event.clone())).await?;
        }
        let mut next_tick = Instant::now() + tick_every;
        loop {
            match drone.recv(next_tick.saturating_duration_since(Instant::now())).await {
                Ok(message) => self.message(drone, message).await?,
                Err(SimError::Timeout(_)) => {}
                Err(end) => return Err(end),
            }
            if Instant::now() >= next_tick {
                next_tick = Instant::now() + tick_every;
                self.renew(drone).await?;
            }
        }
    }

    async fn message(&mut self, drone: &SimDrone, message: MessageToDrone) -> Result<(), SimError> {
        match message {
            MessageToDrone::Action(ActionMessage { action_id, backend_id, action, .. }) => {
                drone.ack(&action_id).await?;
                match action {
                    Action::Spawn { key, .. } => self.spawn(drone, backend_id, &key).await,
                    Action::Terminate { kind, reason } => {
                        let token = self.held.remove(&backend_id).map(|held| held.token);
                        let state = BackendState::Terminated {
                            last_status: holdfast_wire::BackendStatus::Ready,
                            termination: Some(kind),
                            reason: Some(reason),
                            exit_code: None,
                        };
                        self.report(drone, &backend_id, token, state).await
                    }
                }
            }
            MessageToDrone::AckEvent { event_id } => {
                self.unacked.remove(&event_id);
                Ok(())
            }
            MessageToDrone::RenewKeysResponse(response) => {
                for key in response.keys {
                    match key.deadlines {
                        Some(deadlines) => {
                            self.stats.renewed.fetch_add(1, Ordering::Relaxed);
                            if let Some(held) = self.held.get_mut(&key.backend) {
                                held.renew_at_ms = deadlines.renew_at;
                            }
                        }
                        None => {
                            self.stats.refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
                Ok(())
            }
            MessageToDrone::RenewKeyResponse(_)
            | MessageToDrone::AckDraining {}
            | MessageToDrone::AckBackends {}
            | MessageToDrone::AckActivity { .. } => Ok(()),
        }
    }

    async fn spawn(
        &mut self,
        drone: &SimDrone,
        backend_id: String,
        key: &holdfast_wire::drone::AcquiredKey,
    ) -> Result<(), SimError> {
        let held = Held { token: key.token, renew_at_ms: key.deadlines.renew_at };
        if self.held.insert(backend_id.clone(), held).is_some() {
            // It came again before the acknowledgement was recorded.
            return Ok(());
        }
        self.stats.spawned.fetch_add(1, Ordering::Relaxed);
        self.report(drone, &backend_id, Some(key.token), BackendState::Loading).await?;
        let ready = BackendState::Ready { address: self.address };
        self.report(drone, &backend_id, Some(key.token), ready).await
    }

    async fn report(
        &mut self,
        drone: &SimDrone,
        backend_id: &str,
        token: Option<u64>,
        state: BackendState,
    ) -> Result<(), SimError> {
        let event_id = self.next_event_id;
        self.next_event_id += 1;
        let event = BackendEvent {
            event_id,
            backend_id: backend_id.to_owned(),
            state,
            timestamp: self.clock.now_ms(),
            token,
        };
        self.unacked.insert(event_id, event.clone());
        drone.send(&MessageFromDrone::BackendEvent(event)).await
    }

    async fn renew(&mut self, drone: &SimDrone) -> Result<(), SimError> {
        let now_ms = self.clock.now_ms();
        let due: Vec<(String, u64)> = self
            .held
            .iter_mut()
            .filter(|(_, held)| held.renew_at_ms <= now_ms)
            .map(|(backend, held)| {
                held.renew_at_ms = now_ms + AUTO_RENEW_AGAIN_MS;
                (backend.clone(), held.token)
            })
            .collect();
        for batch in due.chunks(RENEW_KEYS_MAX) {
            drone.send_renewals(batch, now_ms).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_url_names_cluster_and_pool() {
        let mut drone = Identity::new("c.example:80", "dr-a", "one");
        assert_eq!(drone.url("http://127.0.0.1:1/"), "ws://127.0.0.1:1/ctrl/c/c.example:80/drone-socket");
        drone.pool = "gpu".into();
        assert_eq!(drone.url("https://h"), "wss://h/ctrl/c/c.example:80/drone-socket?pool=gpu");
    }

    #[test]
    fn a_local_clock_runs_and_can_be_set_back() {
        let clock = LocalClock::reading(10_000_000);
        let before_ms = clock.now_ms();
        assert!(before_ms >= 10_000_000);
        clock.step(-3_600_000);
        assert!(clock.now_ms() < before_ms);
    }
}
