//! The session with a controller: one WebSocket at a time, found anew when it is lost.
//!
//! ```text
//!   agent ──MessageFromDrone──▶ [queue] ──▶ writer ──▶ controller (the leader, if it can be reached)
//!     ▲                            heartbeats, pings ──▲     │
//!     └──────SessionEvent─────────────────── reader ◀────────┘
//! ```

use crate::agent::Event;
use crate::clock::DroneClock;
use crate::discovery::Discovery;
use futures::{SinkExt, StreamExt};
use holdfast_wire::drone::{
    CLOSE_GO_ELSEWHERE, CLOSE_NAME_TAKEN, ControllerHandshake, DroneHandshake, Heartbeat, MessageFromDrone,
    MessageToDrone, VersionInfo,
};
use holdfast_wire::limits::BODY_BYTES_MAX;
use rand::Rng;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Message, WebSocketConfig};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Longest time between two heartbeats, in milliseconds. Short leases shorten it: see [`heartbeat_interval`].
pub const HEARTBEAT_MS_MAX: u64 = 1_500;
/// Shortest time between two heartbeats, in milliseconds.
pub const HEARTBEAT_MS_MIN: u64 = 15;
/// Time between two pings.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// A session in which nothing arrives for this long is dropped.
const READ_TIMEOUT: Duration = Duration::from_secs(3);
/// A session in which nothing can be sent for this long is dropped.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes that one read of the socket asks for: the library fills as much with zeroes before each read.
const READ_BUFFER_BYTES: usize = 8 * 1024;
/// Longest wait for a connection, and again for the handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the controller is asked whether another one leads.
const LEADER_CHECK_INTERVAL: Duration = Duration::from_secs(3);
/// Pause after the first lost session; it doubles.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
/// Longest pause between two attempts.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// A session that lived this long starts the pauses anew.
const SETTLED: Duration = Duration::from_secs(1);
/// Messages to the controller that wait. A session that lets more of them wait is replaced: so no message is lost within a
/// session.
const QUEUE_MAX: usize = 32_768;
/// Messages that are sent with one flush.
const FLUSH_MAX: usize = 64;
/// Largest message, in bytes: a spawn holds an executable of at most [`BODY_BYTES_MAX`], and more around it.
const MESSAGE_BYTES_MAX: usize = 2 * BODY_BYTES_MAX;

/// What the agent hears of a session.
#[derive(Debug)]
pub enum SessionEvent {
    /// A controller has answered the handshake.
    Connected {
        /// The number of the session; each has a larger one.
        session: u64,
        /// What it said.
        handshake: ControllerHandshake,
        /// Takes messages for it.
        sender: mpsc::Sender<MessageFromDrone>,
    },
    /// It has sent something.
    Message {
        /// The number of the session.
        session: u64,
        /// What it has sent.
        message: MessageToDrone,
    },
    /// The session is over.
    Lost {
        /// The number of the session.
        session: u64,
    },
}

/// Who connects.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The drone's name.
    pub name: String,
    /// Its cluster.
    pub cluster: String,
    /// Its pool.
    pub pool: String,
    /// Random, one for each start of the process.
    pub incarnation: String,
    /// The data directory's: see [`crate::data_id`].
    pub data_id: String,
}

impl Identity {
    fn socket_url(&self, controller: &str) -> String {
        let host = controller.trim_start_matches("http://");
        // Brackets (of IPv6 addresses) are the only characters of a cluster name that a path does not allow.
        let cluster = self.cluster.replace('[', "%5B").replace(']', "%5D");
        format!("ws://{host}/ctrl/c/{cluster}/drone-socket?pool={}", self.pool)
    }
}

/// 128 random bits.
pub fn random_id() -> String {
    format!("{:032x}", rand::rng().random::<u128>())
}

/// Time between two heartbeats: well below half of `renew`, beyond which controllers don't choose a drone.
pub fn heartbeat_interval(renew_ms: Option<u64>) -> Duration {
    let ms = renew_ms.map_or(HEARTBEAT_MS_MAX, |renew_ms| renew_ms / 6);
    Duration::from_millis(ms.clamp(HEARTBEAT_MS_MIN, HEARTBEAT_MS_MAX))
}

/// How a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("no handshake: {0}")]
    Handshake(String),
    #[error("nothing arrived for {READ_TIMEOUT:?}")]
    Silent,
    #[error("nothing could be sent for {SEND_TIMEOUT:?}")]
    Stuck,
    #[error("closed with code {code}: {reason}")]
    Closed { code: u16, reason: String },
    #[error("{0}")]
    Socket(#[from] tokio_tungstenite::tungstenite::Error),
    #[error("{0} leads now")]
    Moved(String),
    #[error("more than {QUEUE_MAX} messages wait")]
    Full,
    #[error("the drone is stopping")]
    Stopping,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// The session task.
pub struct Session {
    identity: Identity,
    clock: DroneClock,
    discovery: Discovery,
    inputs: mpsc::Sender<Event>,
    /// The number of the latest session.
    session: u64,
}

impl Session {
    /// Tells the agent at the other end of `inputs`.
    pub fn new(
        identity: Identity,
        clock: DroneClock,
        discovery: Discovery,
        inputs: mpsc::Sender<Event>,
    ) -> Self {
        Self { identity, clock, discovery, inputs, session: 0 }
    }

    /// Keeps a session until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut backoff = BACKOFF_MIN;
        let mut moved_to: Option<String> = None;
        while !stop.is_cancelled() {
            let candidates = match moved_to.take() {
                Some(url) => vec![url],
                None => self.discovery.candidates().await,
            };
            if candidates.is_empty() {
                debug!("no controller answers");
            }
            for url in candidates {
                let started = Instant::now();
                let end = self.one(&url, &stop).await;
                match &end {
                    End::Stopping => return,
                    End::Moved(leader) => {
                        info!(controller = url, "{end}");
                        self.discovery.set_leader(leader.clone());
                        moved_to = Some(leader.clone());
                    }
                    End::Closed { code: CLOSE_NAME_TAKEN, .. } => {
                        warn!(
                            controller = url,
                            name = self.identity.name,
                            "another drone has this name: {end}"
                        );
                        backoff = BACKOFF_MAX;
                    }
                    End::Connect(_) | End::Handshake(_) | End::Closed { code: CLOSE_GO_ELSEWHERE, .. } => {
                        info!(controller = url, "{end}");
                        self.discovery.avoid(&url);
                        // The next candidate, at once.
                        continue;
                    }
                    _ => warn!(controller = url, "session lost: {end}"),
                }
                if started.elapsed() >= SETTLED {
                    backoff = BACKOFF_MIN;
                }
                break;
            }
            if moved_to.is_some() {
                continue;
            }
            let pause = backoff.mul_f64(rand::random_range(0.5..=1.0));
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => return,
            }
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One session, to its end.
    async fn one(&mut self, url: &str, stop: &CancellationToken) -> End {
        let (mut socket, handshake) = match self.connect(url).await {
            Ok(connected) => connected,
            Err(end) => return end,
        };
        info!(controller = url, name = handshake.name, "connected");
        let renew_ms = handshake.lease.map(|lease| lease.renew_ms);
        // Before the agent hears of it, so that acquisitions can count from it.
        if let Err(end) = self.send(&mut socket, &self.heartbeat()).await {
            return end;
        }
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        self.session += 1;
        let session = self.session;
        let connected = SessionEvent::Connected { session, handshake, sender };
        if self.inputs.send(Event::Session(connected)).await.is_err() {
            return End::Stopping;
        }
        let (sink, stream) = socket.split();
        let end = tokio::select! {
            end = self.write(sink, queue, heartbeat_interval(renew_ms), stop) => end,
            end = self.read(stream) => end,
            end = self.watch_leader(url) => end,
        };
        if self.inputs.send(Event::Session(SessionEvent::Lost { session })).await.is_err() {
            return End::Stopping;
        }
        end
    }

    async fn connect(&self, url: &str) -> Result<(Socket, ControllerHandshake), End> {
        let mut config = WebSocketConfig::default();
        config.max_message_size = Some(MESSAGE_BYTES_MAX);
        config.max_frame_size = Some(MESSAGE_BYTES_MAX);
        config.read_buffer_size = READ_BUFFER_BYTES;
        let request = self.identity.socket_url(url);
        let connect = connect_async_with_config(request, Some(config), true);
        let mut socket = match timeout(CONNECT_TIMEOUT, connect).await {
            Ok(Ok((socket, _))) => socket,
            Ok(Err(e)) => return Err(End::Connect(e.to_string())),
            Err(_) => return Err(End::Connect(format!("no answer within {CONNECT_TIMEOUT:?}"))),
        };
        let handshake = DroneHandshake {
            version: VersionInfo::current(),
            name: self.identity.name.clone(),
            incarnation: Some(self.identity.incarnation.clone()),
            data_id: Some(self.identity.data_id.clone()),
        };
        self.send(&mut socket, &handshake).await?;
        let answer = async {
            loop {
                match socket.next().await {
                    Some(Ok(Message::Text(text))) => {
                        return serde_json::from_str(text.as_str())
                            .map_err(|e| End::Handshake(e.to_string()));
                    }
                    Some(Ok(Message::Close(frame))) => return Err(closed(frame)),
                    Some(Ok(_)) => {}
                    Some(Err(e)) => return Err(End::Handshake(e.to_string())),
                    None => return Err(End::Handshake("the controller hung up".to_owned())),
                }
            }
        };
        match timeout(CONNECT_TIMEOUT, answer).await {
            Ok(answer) => answer.map(|handshake| (socket, handshake)),
            Err(_) => Err(End::Handshake(format!("none within {CONNECT_TIMEOUT:?}"))),
        }
    }

    async fn send<T: serde::Serialize>(&self, socket: &mut Socket, message: &T) -> Result<(), End> {
        let text = serde_json::to_string(message).map_err(|e| End::Handshake(e.to_string()))?;
        match timeout(SEND_TIMEOUT, socket.send(Message::text(text))).await {
            Ok(sent) => Ok(sent?),
            Err(_) => Err(End::Stuck),
        }
    }

    fn heartbeat(&self) -> MessageFromDrone {
        MessageFromDrone::Heartbeat(Heartbeat { local_time: self.clock.now_ms() })
    }

    async fn write(
        &self,
        mut sink: futures::stream::SplitSink<Socket, Message>,
        mut queue: mpsc::Receiver<MessageFromDrone>,
        heartbeat_every: Duration,
        stop: &CancellationToken,
    ) -> End {
        let mut heartbeats = interval(heartbeat_every);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pings = interval(PING_INTERVAL);
        pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut taken = Vec::with_capacity(FLUSH_MAX);
        loop {
            let mut frames = Vec::new();
            tokio::select! {
                count = queue.recv_many(&mut taken, FLUSH_MAX) => {
                    if count == 0 {
                        return End::Full;
                    }
                    for message in taken.drain(..) {
                        match serde_json::to_string(&message) {
                            Ok(text) => frames.push(Message::text(text)),
                            Err(e) => warn!("a message that is no JSON: {e}"),
                        }
                    }
                }
                _ = heartbeats.tick() => match serde_json::to_string(&self.heartbeat()) {
                    Ok(text) => frames.push(Message::text(text)),
                    Err(e) => warn!("a heartbeat that is no JSON: {e}"),
                },
                _ = pings.tick() => frames.push(Message::Ping(Vec::new().into())),
                () = stop.cancelled() => {
                    let _ = timeout(SEND_TIMEOUT, sink.close()).await;
                    return End::Stopping;
                }
            }
            let write = async {
                for frame in frames {
                    sink.feed(frame).await?;
                }
                sink.flush().await
            };
            match timeout(SEND_TIMEOUT, write).await {
                Ok(Ok(())) => {}
                Ok(Err(e)) => return e.into(),
                Err(_) => return End::Stuck,
            }
        }
    }

    async fn read(&self, mut stream: futures::stream::SplitStream<Socket>) -> End {
        loop {
            let frame = match timeout(READ_TIMEOUT, stream.next()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(Some(Err(e))) => return e.into(),
                Ok(None) => return End::Closed { code: 0, reason: "the controller hung up".to_owned() },
                Err(_) => return End::Silent,
            };
            match frame {
                Message::Text(text) => match serde_json::from_str::<MessageToDrone>(text.as_str()) {
                    Ok(message) => {
                        if self
                            .inputs
                            .send(Event::Session(SessionEvent::Message { session: self.session, message }))
                            .await
                            .is_err()
                        {
                            return End::Stopping;
                        }
                    }
                    // A newer controller may say what this drone does not know yet.
                    Err(e) => warn!("a message that is not understood: {e}"),
                },
                Message::Close(frame) => return closed(frame),
                _ => {}
            }
        }
    }

    async fn watch_leader(&self, url: &str) -> End {
        let mut checks = interval(LEADER_CHECK_INTERVAL);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        checks.tick().await;
        loop {
            checks.tick().await;
            if let Some(leader) = self.discovery.better_than(url).await {
                return End::Moved(leader);
            }
        }
    }
}

fn closed(frame: Option<CloseFrame>) -> End {
    match frame {
        Some(frame) => End::Closed { code: frame.code.into(), reason: frame.reason.to_string() },
        None => End::Closed { code: 0, reason: "without a reason".to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heartbeats_stay_well_below_half_of_renew() {
        assert_eq!(heartbeat_interval(None), Duration::from_millis(1_500));
        assert_eq!(heartbeat_interval(Some(30_000)), Duration::from_millis(1_500));
        assert_eq!(heartbeat_interval(Some(600)), Duration::from_millis(100));
        assert_eq!(heartbeat_interval(Some(100)), Duration::from_millis(16));
    }

    #[test]
    fn the_socket_url_holds_cluster_and_pool() {
        let identity = Identity {
            name: "dr-a".into(),
            cluster: "[::1]:80".into(),
            pool: "gpu".into(),
            incarnation: random_id(),
            data_id: random_id(),
        };
        assert_eq!(identity.socket_url("http://h:1"), "ws://h:1/ctrl/c/%5B::1%5D:80/drone-socket?pool=gpu");
        assert_ne!(random_id(), random_id());
    }
}
