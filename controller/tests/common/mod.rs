//! A controller of one member and a drone that a test plays by hand.
#![allow(dead_code, missing_docs, reason = "each test uses its part")]

use futures::{SinkExt, StreamExt};
use holdfast_controller::config::Settings;
use holdfast_controller::serve::serve_on;
use holdfast_wire::LeaseConfig;
use raft_store::{Store, StoreConfig};
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// The cluster of every test.
pub const CLUSTER: &str = "127.0.0.1:9090";
/// Long enough that a drone of one heartbeat stays fit for a whole test on a busy machine.
pub const LEASE: &str = "renew=60s,soft=70s,hard=80s,expiry=100s";
/// What a test drone's clock shows at first.
pub const LOCAL_TIME_MS: i64 = 1_000_000;
/// Longest that anything is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn process() -> Value {
    json!({"cluster": CLUSTER, "executable": {"command": ["true"]}})
}

pub async fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = tokio::time::Instant::now() + PATIENCE;
    while !done() {
        assert!(tokio::time::Instant::now() < end, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[derive(Clone)]
pub struct Server {
    pub url: String,
    pub addr: SocketAddr,
    pub store: Store,
    pub lease: LeaseConfig,
    client: reqwest::Client,
    running: Arc<Mutex<Option<Running>>>,
}

struct Running {
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
    dir: tempfile::TempDir,
}

impl Server {
    /// A cluster of one.
    pub async fn start() -> Self {
        Self::start_with_lease(LEASE).await
    }

    /// A cluster of one with other lease durations.
    pub async fn start_with_lease(lease: &str) -> Self {
        let mut servers = Self::start_cluster_with_lease(1, lease).await;
        servers.remove(0)
    }

    /// A cluster of `count` controllers, all ready.
    pub async fn start_cluster(count: u64) -> Vec<Self> {
        Self::start_cluster_with_lease(count, LEASE).await
    }

    async fn start_cluster_with_lease(count: u64, lease: &str) -> Vec<Self> {
        // Free when looked at, and nobody else is likely to take them.
        let held: Vec<_> = (1..=count).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let members: BTreeMap<u64, String> =
            (1..=count).zip(&held).map(|(id, held)| (id, held.local_addr().unwrap().to_string())).collect();
        drop(held);
        let mut servers = Vec::new();
        for id in 1..=count {
            servers.push(Self::start_member(id, &members, lease.parse().unwrap()).await);
        }
        for server in &servers {
            let end = tokio::time::Instant::now() + PATIENCE;
            while server.get("/ctrl/ready").await.0 != StatusCode::OK {
                assert!(tokio::time::Instant::now() < end, "not ready");
            }
        }
        servers
    }

    async fn start_member(id: u64, members: &BTreeMap<u64, String>, lease: LeaseConfig) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let url = format!("http://{addr}");
        let config = StoreConfig {
            id,
            data_dir: dir.path().to_owned(),
            peer_listen: members[&id].parse().unwrap(),
            advertise_url: url.clone(),
            initial_cluster: members.clone(),
            lease: Some(lease),
            terminated_keep_ms: 60_000,
            election_timeout_ms: 300,
            snapshot_every: 10_000,
            disk_reserve_bytes: 0,
        };
        let settings = Settings {
            store: config.clone(),
            listen: addr,
            advertise_url: url.clone(),
            join: Vec::new(),
            advertise_peer: members[&id].clone(),
            default_cluster: Some(CLUSTER.to_owned()),
            log: None,
        };
        let store = Store::open(config).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn({
            let store = store.clone();
            async move {
                let stop = async {
                    let _ = stopped.await;
                };
                serve_on(listener, store, settings, stop).await.unwrap();
            }
        });
        let running = Arc::new(Mutex::new(Some(Running { stop, served, dir })));
        Self { url, addr, store, lease, client: reqwest::Client::new(), running }
    }

    pub async fn stop(&self) {
        let running = self.running.lock().unwrap().take().unwrap();
        running.stop.send(()).unwrap();
        tokio::time::timeout(PATIENCE, running.served).await.unwrap().unwrap();
        self.store.stop().await;
        drop(running.dir);
    }

    /// Waits for the first heartbeat.
    pub async fn wait_for_drone(&self, name: &str) {
        wait_until(name, || {
            let drone = self.store.local().view.drone_by_name(CLUSTER, name).unwrap();
            drone.is_some_and(|(_, drone)| drone.heartbeat.is_some() && drone.is_listed)
        })
        .await;
    }

    pub async fn wait_until_no_action(&self, name: &str) {
        wait_until("the acknowledgements of all actions", || {
            let local = self.store.local();
            let (id, drone) = local.view.drone_by_name(CLUSTER, name).unwrap().unwrap();
            local.view.due_actions(id, &drone.session, None, local.now_ms, 1).unwrap().is_empty()
        })
        .await;
    }

    pub async fn answer(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> Response {
        let method: Method = method.parse().unwrap();
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            // Without a content type, which is tolerated.
            request = request.body(body.to_string());
        }
        request.send().await.unwrap()
    }

    pub async fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> (StatusCode, Value) {
        let answer = self.answer(method, path, headers, body).await;
        let status = answer.status();
        let text = answer.text().await.unwrap();
        (status, serde_json::from_str(&text).unwrap_or_else(|_| panic!("{method} {path}: not JSON: {text}")))
    }

    pub async fn post(&self, path: impl AsRef<str>, body: &Value) -> (StatusCode, Value) {
        self.request("POST", path.as_ref(), &[], Some(body)).await
    }

    pub async fn send_raw(&self, path: &str, body: String) -> (StatusCode, Value) {
        let answer = self.client.post(format!("{}{path}", self.url)).body(body).send().await.unwrap();
        (answer.status(), answer.json().await.unwrap())
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.request("GET", path, &[], None).await
    }

    /// A body up to its end.
    pub async fn text(&self, path: &str, headers: &[(&str, &str)]) -> String {
        let answer = self.answer("GET", path, headers, None).await;
        tokio::time::timeout(PATIENCE, answer.text()).await.unwrap().unwrap()
    }
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

pub struct Drone {
    socket: Socket,
}

impl Drone {
    async fn open(server: &Server, name: &str, incarnation: Option<&str>, pool: &str) -> Self {
        Self::open_on(server, name, incarnation, pool, &format!("disk of {name}")).await
    }

    /// As [`Self::connect`], on a data directory of its own.
    pub async fn connect_on(server: &Server, name: &str, incarnation: &str, disk: &str) -> Self {
        let mut drone = Self::open_on(server, name, Some(incarnation), "", disk).await;
        drone.begin(server).await;
        drone.list(json!([])).await;
        drone
    }

    async fn open_on(server: &Server, name: &str, incarnation: Option<&str>, pool: &str, disk: &str) -> Self {
        let url = format!("ws://{}/ctrl/c/{CLUSTER}/drone-socket?pool={pool}", server.addr);
        let (socket, _) = tokio_tungstenite::connect_async(url).await.unwrap();
        let mut drone = Self { socket };
        let mut handshake = json!({"version": {"version": "1", "git_hash": "x"}, "name": name});
        if let Some(incarnation) = incarnation {
            handshake["incarnation"] = json!(incarnation);
            handshake["data_id"] = json!(disk);
        }
        drone.send(&handshake).await;
        drone
    }

    /// Opens a session, lists nothing, and sends the first heartbeat.
    pub async fn connect(server: &Server, name: &str, incarnation: Option<&str>, pool: &str) -> Self {
        let mut drone = Self::unlisted(server, name, incarnation, pool).await;
        if incarnation.is_some() {
            drone.list(json!([])).await;
        }
        drone
    }

    /// Sends a list of one page and waits until it has taken effect.
    pub async fn list(&mut self, backends: Value) {
        self.send(&json!({"Backends": {"backends": backends, "last": true}})).await;
        self.next("AckBackends").await;
    }

    /// Opens a session and sends the first heartbeat, but no list.
    pub async fn unlisted(server: &Server, name: &str, incarnation: Option<&str>, pool: &str) -> Self {
        let mut drone = Self::open(server, name, incarnation, pool).await;
        drone.begin(server).await;
        drone
    }

    /// Reads the controller's handshake and sends the first heartbeat.
    async fn begin(&mut self, server: &Server) {
        let handshake = self.read().await;
        assert!(handshake["name"].as_str().unwrap().starts_with("controller-"));
        assert_eq!(handshake["lease"]["expiry_ms"], server.lease.expiry_ms);
        assert!(handshake["cluster_id"].is_string());
        self.send(&json!({"Heartbeat": {"local_time": LOCAL_TIME_MS}})).await;
    }

    /// The close code of a session that must not begin.
    pub async fn refused(server: &Server, name: &str, incarnation: Option<&str>) -> u16 {
        Self::open(server, name, incarnation, "").await.closed().await
    }

    pub async fn send(&mut self, message: &Value) {
        self.send_raw(Message::text(message.to_string())).await;
    }

    pub async fn send_raw(&mut self, message: Message) {
        self.socket.send(message).await.unwrap();
    }

    async fn read(&mut self) -> Value {
        loop {
            let message = tokio::time::timeout(PATIENCE, self.socket.next()).await.unwrap();
            match message.unwrap().unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Close(frame) => panic!("closed: {frame:?}"),
                _ => {}
            }
        }
    }

    /// The content of the next message of a kind.
    pub async fn next(&mut self, kind: &str) -> Value {
        loop {
            if let Some(content) = self.read().await.get(kind) {
                return content.clone();
            }
        }
    }

    /// Reports a state and waits for its acknowledgement.
    pub async fn report(&mut self, event_id: i64, backend: &str, state: Value, token: u64) {
        self.send(&json!({"BackendEvent": {"event_id": event_id, "backend_id": backend, "state": state,
                          "timestamp": LOCAL_TIME_MS, "token": token}}))
            .await;
        assert_eq!(self.next("AckEvent").await["event_id"], event_id);
    }

    /// Reads until the controller closes, and returns its code.
    pub async fn closed(mut self) -> u16 {
        loop {
            match tokio::time::timeout(PATIENCE, self.socket.next()).await.unwrap() {
                Some(Ok(Message::Close(Some(frame)))) => return frame.code.into(),
                Some(Ok(_)) => {}
                other => panic!("no close frame: {other:?}"),
            }
        }
    }

    /// Goes on reading, and so answering pings.
    pub fn in_background(mut self) -> Reading {
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = &mut stopped => return self,
                    message = self.socket.next() => assert!(matches!(message, Some(Ok(_))), "{message:?}"),
                }
            }
        });
        Reading { stop, task }
    }
}

pub struct Reading {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Drone>,
}

impl Reading {
    pub async fn stop_reading(self) -> Drone {
        self.stop.send(()).unwrap();
        self.task.await.unwrap()
    }
}
