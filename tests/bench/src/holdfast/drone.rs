//! A lean simulated drone: one socket, one task, frames written and read with as little work as possible, because it
//! shares the machine with the controllers.
//!
//! It does what a real drone does: heartbeats every 1.5 s, each action acknowledged, for a spawn the states `loading`,
//! `starting`, `waiting`, `ready` (all at once: there is no process whose start would take time), reports repeated until
//! acknowledged, renewals. What it has to say after the frames that have come is written with one flush.

use crate::problem::{During, Problem, Result, problem};
use futures::{FutureExt, SinkExt, StreamExt};
use holdfast_wire::drone::{
    BackendsPage, ControllerHandshake, DroneHandshake, ListedBackend, MessageFromDrone, VersionInfo,
};
use holdfast_wire::limits::BACKENDS_PER_PAGE_MAX;
use serde::Deserialize;
use serde::de::IgnoredAny;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::time::{Interval, MissedTickBehavior, interval};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

/// As a real drone's under the default lease.
const HEARTBEAT_EVERY: Duration = Duration::from_millis(1_500);
/// A handshake must be answered within this.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// A report that is not acknowledged is sent again after this, as a real drone's.
const REPORT_AGAIN: Duration = Duration::from_secs(2);
/// What the drone's clock reads when this process starts, in milliseconds.
const CLOCK_BASE_MS: i64 = 1_000_000;
/// What it counts in.
const CLOCK_STEP: Duration = Duration::from_millis(1);
/// Frames taken in one turn.
const FRAMES_PER_TURN: usize = 256;

/// Who it is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Cluster (`HOST:PORT`).
    pub cluster: String,
    /// Name, beginning with `dr`.
    pub name: String,
    /// Pool; may be empty.
    pub pool: String,
    /// One for each process.
    pub incarnation: String,
}

/// A key that it holds.
#[derive(Debug, Clone, Copy)]
pub struct Held {
    /// Fencing token.
    pub token: u64,
    /// When the request was sent whose answer gave the present deadlines; that of the spawn's arrival at first.
    pub renewed: Instant,
}

/// What it has counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Backends it was told to start.
    pub spawned: u64,
    /// Renewals granted.
    pub renewed: u64,
    /// Renewals refused, or left without deadlines.
    pub refused: u64,
    /// Backends that a controller told it to end.
    pub ended: u64,
    /// Longest time between two renewals of a key that were granted (or its start and the first).
    pub longest_gap: Duration,
}

/// What the controllers say, as far as it is looked at.
#[derive(Deserialize)]
enum Incoming<'a> {
    #[serde(borrow)]
    Action(ActionIn<'a>),
    AckEvent {
        event_id: i64,
    },
    AckBackends {},
    #[serde(borrow)]
    RenewKeyResponse(RenewedIn<'a>),
    #[serde(borrow)]
    RenewKeysResponse(RenewedManyIn<'a>),
}

#[derive(Deserialize)]
struct ActionIn<'a> {
    action_id: &'a str,
    backend_id: &'a str,
    action: WhatIn,
}

#[derive(Deserialize)]
enum WhatIn {
    Spawn { key: KeyIn },
    Terminate(IgnoredAny),
}

#[derive(Deserialize)]
struct KeyIn {
    token: u64,
}

#[derive(Deserialize)]
struct RenewedManyIn<'a> {
    #[serde(borrow)]
    keys: Vec<RenewedIn<'a>>,
}

#[derive(Deserialize)]
struct RenewedIn<'a> {
    backend: &'a str,
    deadlines: Option<DeadlinesIn>,
}

#[derive(Deserialize)]
struct DeadlinesIn {
    renew_at: i64,
}

/// See the module.
pub struct Drone {
    socket: WebSocketStream<TcpStream>,
    heartbeat: Interval,
    /// Renewals of the lease, in milliseconds.
    renew_ms: i64,
    start: Instant,
    next_event: i64,
    /// Reports that are not acknowledged.
    unacked: BTreeMap<i64, (Instant, String)>,
    /// What it holds, by backend.
    pub held: HashMap<String, Held>,
    /// What it has counted.
    pub counts: Counts,
    /// Pages of its list that were not sent yet.
    pages: VecDeque<Vec<ListedBackend>>,
}

/// What a drone keeps when its session ends.
#[derive(Debug, Default)]
pub struct Kept {
    held: HashMap<String, Held>,
    counts: Counts,
    unacked: BTreeMap<i64, (Instant, String)>,
    next_event: i64,
}

async fn handshake(
    addr: SocketAddr,
    identity: &Identity,
) -> Result<(WebSocketStream<TcpStream>, ControllerHandshake)> {
    let stream = TcpStream::connect(addr).await.during(addr)?;
    stream.set_nodelay(true).during("TCP_NODELAY")?;
    let query = if identity.pool.is_empty() { String::new() } else { format!("?pool={}", identity.pool) };
    let url = format!("ws://{addr}/ctrl/c/{}/drone-socket{query}", identity.cluster);
    // The library fills its read buffer with zeroes before each read: the default's 128 KiB would measure that.
    let config = WebSocketConfig::default().read_buffer_size(8 * 1024);
    let opened = client_async_with_config(url, stream, Some(config)).await;
    let (mut socket, _) = opened.during("opening a drone socket")?;
    let hello = DroneHandshake {
        version: VersionInfo::current(),
        name: identity.name.clone(),
        incarnation: Some(identity.incarnation.clone()),
        data_id: Some(format!("disk of {}", identity.name)),
    };
    let hello = serde_json::to_string(&hello).during("a handshake")?;
    socket.send(Message::Text(hello.into())).await.during("a handshake")?;
    loop {
        match socket.next().await {
            Some(Ok(Message::Text(text))) => {
                let answer = serde_json::from_str(&text).during("a handshake")?;
                return Ok((socket, answer));
            }
            Some(Ok(Message::Close(close))) => return problem(format!("a drone was closed with {close:?}")),
            Some(Ok(_)) => {}
            Some(Err(error)) => return problem(format!("a drone socket: {error}")),
            None => return problem("a drone socket ended"),
        }
    }
}

/// A backend as it is listed: whether it is still being started does not matter.
fn listed((backend, token): &(String, u64)) -> ListedBackend {
    ListedBackend { backend: backend.clone(), token: Some(*token), state: None }
}

impl Drone {
    /// Opens a session. `start` is the origin of the drone's clock, the same for all its sessions.
    /// What it has kept comes back if there is no session.
    pub async fn connect(
        addr: SocketAddr,
        identity: &Identity,
        start: Instant,
        kept: Kept,
    ) -> std::result::Result<Self, (Kept, Problem)> {
        let shaken = tokio::time::timeout(HANDSHAKE_MAX, handshake(addr, identity))
            .await
            .during("a drone's handshake")
            .and_then(|shaken| shaken);
        let (socket, answer) = match shaken {
            Ok(shaken) => shaken,
            Err(problem) => return Err((kept, problem)),
        };
        let renew_ms = answer.lease.unwrap_or_default().renew_ms;
        let mut heartbeat = interval(HEARTBEAT_EVERY);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut drone = Self {
            socket,
            heartbeat,
            renew_ms: i64::try_from(renew_ms).unwrap_or(i64::MAX),
            start,
            // Event ids begin at 1.
            next_event: kept.next_event.max(1),
            unacked: kept.unacked,
            held: kept.held,
            counts: kept.counts,
            pages: VecDeque::new(),
        };
        for (sent, _) in drone.unacked.values_mut() {
            // Nothing of the old session counts.
            *sent = drone.start;
        }
        let mut pages: Vec<_> = drone
            .keys()
            .chunks(BACKENDS_PER_PAGE_MAX)
            .map(|page| page.iter().map(listed).collect::<Vec<_>>())
            .collect();
        if pages.is_empty() {
            pages.push(Vec::new());
        }
        drone.pages = pages.into();
        match drone.page().await {
            Ok(()) => Ok(drone),
            Err(problem) => Err((drone.into_kept(), problem)),
        }
    }

    /// Sends the next page of the list of what it holds; the one before was acknowledged.
    async fn page(&mut self) -> Result<()> {
        let Some(backends) = self.pages.pop_front() else { return Ok(()) };
        let page = MessageFromDrone::Backends(BackendsPage { backends, last: self.pages.is_empty() });
        self.feed(serde_json::to_string(&page).during("a list")?).await?;
        self.flush().await
    }

    /// What outlives the session.
    pub fn into_kept(self) -> Kept {
        Kept { held: self.held, counts: self.counts, unacked: self.unacked, next_event: self.next_event }
    }

    fn now_ms(&self) -> i64 {
        CLOCK_BASE_MS.saturating_add(i64::try_from(self.start.elapsed().as_millis()).unwrap_or(i64::MAX))
    }

    /// Reports that wait for their acknowledgement.
    pub fn reports_open(&self) -> usize {
        self.unacked.len()
    }

    async fn feed(&mut self, text: String) -> Result<()> {
        self.socket.feed(Message::Text(text.into())).await.during("sending to a controller")
    }

    async fn flush(&mut self) -> Result<()> {
        self.socket.flush().await.during("sending to a controller")
    }

    async fn report(&mut self, backend: &str, token: u64, state: &str) -> Result<()> {
        let event_id = self.next_event;
        self.next_event += 1;
        let timestamp = self.now_ms();
        let text = format!(
            r#"{{"BackendEvent":{{"event_id":{event_id},"backend_id":"{backend}","state":{state},"timestamp":{timestamp},"token":{token}}}}}"#
        );
        self.unacked.insert(event_id, (Instant::now(), text.clone()));
        self.feed(text).await
    }

    /// Ends a backend that it holds, by itself: reports `terminated`. It is not renewed any more.
    pub async fn end(&mut self, backend: &str) -> Result<()> {
        let Some(held) = self.held.remove(backend) else { return Ok(()) };
        let state = r#"{"status":"terminated","last_status":"ready","exit_code":0}"#;
        self.report(backend, held.token, state).await?;
        self.flush().await
    }

    /// Waits for something to come, or for the next heartbeat, or until `end`, and deals with it and with all that has come
    /// with it. Gives the number of renewals that were granted. It must not be dropped halfway.
    pub async fn turn(&mut self, end: Option<Instant>) -> Result<u64> {
        let mut granted = 0;
        tokio::select! {
            frame = self.socket.next() => {
                let mut frame = Some(frame);
                for _ in 0..FRAMES_PER_TURN {
                    let Some(come) = frame else { break };
                    granted += self.frame(come).await?;
                    frame = self.socket.next().now_or_never();
                }
                if let Some(come) = frame {
                    granted += self.frame(come).await?;
                }
            }
            _ = self.heartbeat.tick() => {
                let beat = format!(r#"{{"Heartbeat":{{"local_time":{}}}}}"#, self.now_ms());
                self.feed(beat).await?;
                self.repeat_reports().await?;
            }
            () = tokio::time::sleep_until(end.unwrap_or_else(Instant::now).into()), if end.is_some() => {}
        }
        self.flush().await?;
        Ok(granted)
    }

    async fn repeat_reports(&mut self) -> Result<()> {
        let now = Instant::now();
        let mut again = Vec::new();
        for (sent, text) in self.unacked.values_mut() {
            if now.duration_since(*sent) >= REPORT_AGAIN {
                *sent = now;
                again.push(text.clone());
            }
        }
        for text in again {
            self.feed(text).await?;
        }
        Ok(())
    }

    async fn frame(
        &mut self,
        frame: Option<std::result::Result<Message, tokio_tungstenite::tungstenite::Error>>,
    ) -> Result<u64> {
        let text = match frame {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Close(close))) => return problem(format!("a drone was closed with {close:?}")),
            Some(Ok(_)) => return Ok(0),
            Some(Err(error)) => return problem(format!("a drone socket: {error}")),
            None => return problem("a drone socket ended"),
        };
        match serde_json::from_str(&text).during(&text)? {
            Incoming::Action(action) => {
                let ack = format!(r#"{{"AckAction":{{"action_id":"{}"}}}}"#, action.action_id);
                self.feed(ack).await?;
                match action.action {
                    WhatIn::Spawn { key } => self.spawn(action.backend_id, key.token).await?,
                    WhatIn::Terminate(_) => {
                        self.counts.ended += 1;
                        self.end(action.backend_id).await?;
                    }
                }
                Ok(0)
            }
            Incoming::AckBackends {} => {
                self.page().await?;
                Ok(0)
            }
            Incoming::AckEvent { event_id } => {
                self.unacked.remove(&event_id);
                Ok(0)
            }
            Incoming::RenewKeyResponse(answer) => Ok(self.answered(&answer, Instant::now())),
            Incoming::RenewKeysResponse(answer) => {
                let now = Instant::now();
                Ok(answer.keys.iter().map(|key| self.answered(key, now)).sum())
            }
        }
    }

    async fn spawn(&mut self, backend: &str, token: u64) -> Result<()> {
        let now = Instant::now();
        if self.held.contains_key(backend) {
            // It came again before the acknowledgement was recorded.
            return Ok(());
        }
        self.held.insert(backend.to_owned(), Held { token, renewed: now });
        self.counts.spawned += 1;
        // Nothing listens there; nobody connects.
        for state in [
            r#"{"status":"loading"}"#,
            r#"{"status":"starting"}"#,
            r#"{"status":"waiting","address":"127.0.0.1:9"}"#,
            r#"{"status":"ready","address":"127.0.0.1:9"}"#,
        ] {
            self.report(backend, token, state).await?;
        }
        Ok(())
    }

    /// 1 for a granted renewal.
    fn answered(&mut self, answer: &RenewedIn<'_>, now: Instant) -> u64 {
        let Some(deadlines) = &answer.deadlines else {
            // One that it ended meanwhile says nothing.
            self.counts.refused += u64::from(self.held.contains_key(answer.backend));
            return 0;
        };
        let asked_ms = deadlines.renew_at - self.renew_ms - CLOCK_BASE_MS;
        let asked = self.start + Duration::from_millis(u64::try_from(asked_ms).unwrap_or(0));
        if let Some(held) = self.held.get_mut(answer.backend) {
            self.counts.longest_gap =
                self.counts.longest_gap.max(now.saturating_duration_since(held.renewed));
            held.renewed = held.renewed.max(asked);
        }
        self.counts.renewed += 1;
        1
    }

    /// Asks for one key in a frame of its own; the answer comes by [`Self::turn`].
    pub async fn ask_one(&mut self, backend: &str, token: u64) -> Result<()> {
        let now_ms = self.now_ms();
        let text =
            format!(r#"{{"RenewKey":{{"backend":"{backend}","local_time":{now_ms},"token":{token}}}}}"#);
        self.feed(text).await?;
        self.flush().await
    }

    /// Asks for many keys in one frame.
    pub async fn ask_many(&mut self, keys: &[(String, u64)]) -> Result<()> {
        let mut text = String::with_capacity(64 + keys.len() * 48);
        let fmt = |_| Problem("a frame".to_owned());
        write!(text, r#"{{"RenewKeys":{{"local_time":{},"keys":["#, self.now_ms()).map_err(fmt)?;
        for (at, (backend, token)) in keys.iter().enumerate() {
            let comma = if at == 0 { "" } else { "," };
            write!(text, r#"{comma}{{"backend":"{backend}","token":{token}}}"#).map_err(fmt)?;
        }
        text.push_str("]}}");
        self.feed(text).await?;
        self.flush().await
    }

    /// Keys that were last renewed before `before`, but for the fraction of a millisecond that the drone's clock leaves out.
    pub fn due(&self, before: Instant) -> Vec<(String, u64)> {
        self.held
            .iter()
            .filter(|(_, held)| held.renewed + CLOCK_STEP <= before)
            .map(|(backend, held)| (backend.clone(), held.token))
            .collect()
    }

    /// Everything that it holds.
    pub fn keys(&self) -> Vec<(String, u64)> {
        self.held.iter().map(|(backend, held)| (backend.clone(), held.token)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::drone::{MessageToDrone, RenewKeysResponse, RenewedKey};

    #[test]
    fn what_controllers_send_is_understood() {
        let action = r#"{"Action":{"action_id":"ak-1-0","backend_id":"ba-1","drone_id":3,"action":{"Spawn":{"executable":{"command":["x"]},"key":{"key":{"name":"k","namespace":"","tag":""},"deadlines":{"renew_at":1,"soft_terminate_at":2,"hard_terminate_at":3},"token":9},"static_token":null}}}}"#;
        serde_json::from_str::<MessageToDrone>(action).unwrap();
        let Incoming::Action(ActionIn { action: WhatIn::Spawn { key }, .. }) =
            serde_json::from_str(action).unwrap()
        else {
            panic!("{action}")
        };
        assert_eq!(key.token, 9);
        let answer = MessageToDrone::RenewKeysResponse(RenewKeysResponse {
            keys: vec![RenewedKey {
                backend: "ba-1".into(),
                deadlines: Some(holdfast_wire::LeaseConfig::default().deadlines(5)),
                refused: None,
            }],
        });
        let text = serde_json::to_string(&answer).unwrap();
        let Incoming::RenewKeysResponse(read) = serde_json::from_str(&text).unwrap() else {
            panic!("{text}")
        };
        assert_eq!(read.keys[0].deadlines.as_ref().unwrap().renew_at, 30_005);
        let end = r#"{"Action":{"action_id":"a","backend_id":"b","drone_id":3,"action":{"Terminate":{"kind":"hard","reason":"keyexpired"}}}}"#;
        assert!(matches!(
            serde_json::from_str(end).unwrap(),
            Incoming::Action(ActionIn { action: WhatIn::Terminate(_), .. })
        ));
    }

    #[test]
    fn what_it_sends_are_messages() {
        for text in [
            r#"{"Heartbeat":{"local_time":1}}"#,
            r#"{"AckAction":{"action_id":"ak-1-0"}}"#,
            r#"{"RenewKey":{"backend":"ba","local_time":1,"token":2}}"#,
            r#"{"RenewKeys":{"local_time":1,"keys":[{"backend":"a","token":1},{"backend":"b","token":2}]}}"#,
            r#"{"BackendEvent":{"event_id":1,"backend_id":"b","state":{"status":"waiting","address":"127.0.0.1:9"},"timestamp":1,"token":2}}"#,
            r#"{"BackendEvent":{"event_id":1,"backend_id":"b","state":{"status":"terminated","last_status":"ready","exit_code":0},"timestamp":1,"token":2}}"#,
        ] {
            serde_json::from_str::<MessageFromDrone>(text).unwrap();
        }
    }
}
