//! A drone that behaves as Plane's: see `plane.rs`. It "runs" a backend by answering HTTP at one address for all of them.

use crate::types::{
    BackendAction, BackendActionMessage, BackendMetricsMessage, BackendState, BackendStateMessage,
    BackendStatus, Handshake, Heartbeat, KeyDeadlines, MessageFromDrone, MessageToDrone, PlaneVersionInfo,
    RenewKeyRequest, RenewKeyResponse, TerminationKind, TerminationReason,
};
use futures::{SinkExt, StreamExt};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// Plane's is 7 s, for leases of a minute; the tests' are shorter by as much.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(100);
/// What its backends answer.
pub const PAGE: &str = "a backend of Plane's";

struct Key {
    deadlines: KeyDeadlines,
    /// Plane asks once for each deadlines that it gets, and once more after a reconnection.
    asked: bool,
    renewals: u64,
    last: BackendStatus,
}

/// See the module.
pub struct PlaneDrone {
    /// What its backends exit with.
    pub exit_code: Option<i32>,
    /// Whether it acknowledges spawns: Plane's does only once it has applied them.
    pub acknowledges: bool,
    /// Everything that came.
    pub received: Vec<MessageToDrone>,
    /// Keys whose soft deadline it had to see pass.
    pub lapsed: Vec<String>,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    cluster: String,
    name: String,
    address: SocketAddr,
    serving: JoinHandle<()>,
    keys: BTreeMap<String, Key>,
    unacked: BTreeMap<i64, BackendStateMessage>,
    next_event: i64,
    next_heartbeat: Instant,
}

impl Drop for PlaneDrone {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

async fn serve(listener: TcpListener) {
    while let Ok((mut stream, _)) = listener.accept().await {
        tokio::spawn(async move {
            let _ = stream.read(&mut [0; 1024]).await;
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", PAGE.len());
            let _ = stream.write_all(format!("{head}{PAGE}").as_bytes()).await;
        });
    }
}

async fn open(controller: &str, cluster: &str, name: &str) -> WebSocketStream<MaybeTlsStream<TcpStream>> {
    let url = format!("{}/ctrl/c/{cluster}/drone-socket?pool=", controller.replacen("http", "ws", 1));
    let (mut socket, _) = connect_async(url).await.expect("the drone socket");
    let version = PlaneVersionInfo { version: "0.5.6".to_owned(), git_hash: "0000000".to_owned() };
    let handshake = Handshake { version, name: name.to_owned() };
    socket.send(Message::text(serde_json::to_string(&handshake).unwrap())).await.unwrap();
    // Plane's client takes the very first frame for the handshake, and gives up if it is anything else.
    let first =
        timeout(Duration::from_secs(10), socket.next()).await.expect("a first frame").unwrap().unwrap();
    let Message::Text(text) = first else { panic!("the first frame is {first:?}") };
    let answer: Handshake = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(answer.name.starts_with("co"), "Plane's prefix of controllers: {answer:?}");
    socket
}

impl PlaneDrone {
    /// Opens a session with one controller.
    pub async fn connect(controller: &str, cluster: &str, name: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self {
            exit_code: None,
            acknowledges: true,
            received: Vec::new(),
            lapsed: Vec::new(),
            socket: open(controller, cluster, name).await,
            cluster: cluster.to_owned(),
            name: name.to_owned(),
            address,
            serving: tokio::spawn(serve(listener)),
            keys: BTreeMap::new(),
            unacked: BTreeMap::new(),
            next_event: 1,
            next_heartbeat: Instant::now(),
        }
    }

    /// Drops its session and opens another, as Plane's does now and then: unacknowledged events are sent again, and what
    /// is due is asked for again.
    pub async fn reconnect(&mut self, controller: &str) {
        self.socket.close(None).await.unwrap();
        self.socket = open(controller, &self.cluster, &self.name).await;
        self.next_heartbeat = Instant::now();
        self.keys.values_mut().for_each(|key| key.asked = false);
        for event in self.unacked.clone().into_values() {
            self.send(&MessageFromDrone::BackendEvent(event)).await;
        }
    }

    /// Holds what another one held.
    pub fn take_over(&mut self, other: &Self) {
        for (backend, key) in &other.keys {
            let key = Key { deadlines: key.deadlines.clone(), asked: false, renewals: 0, last: key.last };
            self.keys.insert(backend.clone(), key);
        }
        self.next_event = other.next_event;
    }

    /// The reports that a new process of Plane's makes of what its predecessor ran.
    pub fn restarted(&self) -> Vec<(String, BackendState)> {
        let ended = self.keys.iter().map(|(backend, key)| {
            let hard = BackendState::HardTerminating {
                last_status: key.last,
                reason: TerminationReason::KeyExpired,
            };
            let terminated = BackendState::Terminated {
                last_status: key.last,
                termination: None,
                reason: None,
                exit_code: None,
            };
            [(backend.clone(), hard), (backend.clone(), terminated)]
        });
        ended.flatten().collect()
    }

    /// Reports these.
    pub async fn replay(&mut self, events: Vec<(String, BackendState)>) {
        // Rows of the same database, whose numbers go on.
        self.next_event += 1_000;
        for (backend, state) in events {
            self.report(&backend, state).await;
        }
    }

    /// Whether it holds a backend's key.
    pub fn has(&self, backend: &str) -> bool {
        self.keys.contains_key(backend)
    }

    /// Reports without an acknowledgement.
    pub fn unacknowledged(&self) -> usize {
        self.unacked.len()
    }

    /// Renewals that were granted.
    pub fn renewals(&self, backend: &str) -> u64 {
        self.keys.get(backend).map_or(0, |key| key.renewals)
    }

    /// The latest action for a backend.
    pub fn action(&self, backend: &str) -> BackendActionMessage {
        let mut actions = self.received.iter().rev().filter_map(|message| match message {
            MessageToDrone::Action(action) if action.backend_id == backend => Some(action.clone()),
            _ => None,
        });
        actions.next().unwrap_or_else(|| panic!("no action for {backend} in {:?}", self.received))
    }

    async fn send(&mut self, message: &MessageFromDrone) {
        // A session that ends is noticed by what is not received.
        let _ = self.socket.send(Message::text(serde_json::to_string(message).unwrap())).await;
    }

    async fn report(&mut self, backend: &str, state: BackendState) {
        let event = BackendStateMessage {
            event_id: self.next_event,
            backend_id: backend.to_owned(),
            state,
            timestamp: now_ms(),
        };
        self.next_event += 1;
        self.unacked.insert(event.event_id, event.clone());
        self.send(&MessageFromDrone::BackendEvent(event)).await;
    }

    /// Asks for one renewal, and waits for the answer.
    pub async fn renew(&mut self, backend: &str) -> RenewKeyResponse {
        let request = RenewKeyRequest { backend: backend.to_owned(), local_time: now_ms() };
        self.send(&MessageFromDrone::RenewKey(request)).await;
        self.until("an answer to a renewal", Duration::from_secs(10), |plane| {
            matches!(plane.received.last(), Some(MessageToDrone::RenewKeyResponse(_)))
        })
        .await;
        match self.received.last() {
            Some(MessageToDrone::RenewKeyResponse(response)) => response.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// Goes on until this holds.
    pub async fn until(&mut self, what: &str, patience: Duration, is: impl Fn(&Self) -> bool) {
        let end = Instant::now() + patience;
        while !is(self) {
            assert!(Instant::now() < end, "{what}: not within {patience:?}; received {:?}", self.received);
            assert!(self.turn().await, "{what}: the session was closed");
        }
    }

    /// Goes on for as long as it is polled.
    pub async fn go_on(&mut self) {
        while self.turn().await {}
        panic!("the session was closed");
    }

    /// Waits for the end of its session.
    pub async fn until_closed(&mut self, patience: Duration) {
        let end = Instant::now() + patience;
        while self.turn().await {
            assert!(Instant::now() < end, "the session is still open");
        }
    }

    /// One message, or what is due; false if the session is over.
    async fn turn(&mut self) -> bool {
        if Instant::now() >= self.next_heartbeat {
            self.next_heartbeat = Instant::now() + HEARTBEAT_EVERY;
            self.send(&MessageFromDrone::Heartbeat(Heartbeat { local_time: now_ms() })).await;
        }
        let now = now_ms();
        let mut due = Vec::new();
        for (backend, key) in &mut self.keys {
            if now >= key.deadlines.soft_terminate_at {
                self.lapsed.push(backend.clone());
            }
            if now >= key.deadlines.renew_at && !key.asked {
                key.asked = true;
                due.push(backend.clone());
            }
        }
        for backend in due {
            let request = RenewKeyRequest { backend, local_time: now };
            self.send(&MessageFromDrone::RenewKey(request)).await;
        }
        let frame = match timeout(Duration::from_millis(20), self.socket.next()).await {
            Err(_) => return true,
            Ok(Some(Ok(frame))) => frame,
            Ok(_) => return false,
        };
        match frame {
            Message::Text(text) => {
                // Plane's drone drops what it can't parse; here nothing of that kind may come.
                let message: MessageToDrone =
                    serde_json::from_str(&text).unwrap_or_else(|e| panic!("not Plane's: {e}: {text}"));
                self.received.push(message.clone());
                self.message(message).await;
                true
            }
            Message::Close(_) => false,
            _ => true,
        }
    }

    async fn message(&mut self, message: MessageToDrone) {
        match message {
            MessageToDrone::AckEvent { event_id } => {
                self.unacked.remove(&event_id);
            }
            MessageToDrone::RenewKeyResponse(RenewKeyResponse { backend, deadlines }) => {
                if let (Some(key), Some(deadlines)) = (self.keys.get_mut(&backend), deadlines) {
                    key.deadlines = deadlines;
                    key.asked = false;
                    key.renewals += 1;
                }
            }
            MessageToDrone::Action(BackendActionMessage { action_id, backend_id, action, .. }) => {
                match action {
                    BackendAction::Spawn { key, .. } => {
                        let deadlines = key.deadlines;
                        assert!(deadlines.renew_at < deadlines.soft_terminate_at, "{deadlines:?}");
                        assert!(deadlines.soft_terminate_at < deadlines.hard_terminate_at, "{deadlines:?}");
                        if self.keys.contains_key(&backend_id) {
                            // Ignored, and not acknowledged either.
                            return;
                        }
                        let last = BackendStatus::Ready;
                        let key = Key { deadlines, asked: false, renewals: 0, last };
                        self.keys.insert(backend_id.clone(), key);
                        if !self.acknowledges {
                            // It is cut off before it has said anything.
                            for state in self.states() {
                                let event_id = self.next_event;
                                self.next_event += 1;
                                let event = BackendStateMessage {
                                    event_id,
                                    backend_id: backend_id.clone(),
                                    state,
                                    timestamp: now_ms(),
                                };
                                self.unacked.insert(event_id, event);
                            }
                            return;
                        }
                        for state in self.states() {
                            self.report(&backend_id, state).await;
                        }
                        let metrics = BackendMetricsMessage {
                            backend_id,
                            mem_used: 1,
                            mem_total: 2,
                            mem_active: 3,
                            mem_inactive: 4,
                            mem_unevictable: 5,
                            mem_limit: u64::MAX,
                            cpu_used: 7,
                            sys_cpu: 8,
                        };
                        self.send(&MessageFromDrone::BackendMetrics(metrics)).await;
                    }
                    BackendAction::Terminate { kind, reason } => {
                        self.terminate(&backend_id, kind, reason).await
                    }
                }
                self.send(&MessageFromDrone::AckAction { action_id }).await;
            }
        }
    }

    fn states(&self) -> [BackendState; 5] {
        let address = self.address;
        [
            BackendState::Scheduled,
            BackendState::Loading,
            BackendState::Starting,
            BackendState::Waiting { address },
            BackendState::Ready { address },
        ]
    }

    async fn terminate(&mut self, backend: &str, kind: TerminationKind, reason: TerminationReason) {
        let Some(key) = self.keys.remove(backend) else {
            // Plane's assumes that it was ready, and says that it is lost.
            let lost = BackendState::Terminated {
                last_status: BackendStatus::Ready,
                termination: None,
                reason: Some(TerminationReason::Lost),
                exit_code: None,
            };
            self.report(backend, lost).await;
            return;
        };
        let ending = match kind {
            TerminationKind::Soft => {
                BackendState::Terminating { last_status: key.last, termination: kind, reason }
            }
            TerminationKind::Hard => BackendState::HardTerminating { last_status: key.last, reason },
        };
        self.report(backend, ending).await;
        let ended = BackendState::Terminated {
            last_status: key.last,
            termination: Some(kind),
            reason: Some(reason),
            exit_code: self.exit_code,
        };
        self.report(backend, ended).await;
    }
}
