//! A controller that the test plays itself, and a real drone that talks to it.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]
#![allow(missing_docs, reason = "only the tests beside it use it")]

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::{SinkExt, StreamExt};
use holdfast_wire::drone::{
    AcquiredKey, Action, ActionMessage, BackendEvent, ControllerHandshake, DroneHandshake, ListedBackend,
    MessageFromDrone, MessageToDrone, RenewKeysRequest, RenewKeysResponse, RenewedKey, VersionInfo,
};
use holdfast_wire::{BackendState, BackendStatus, KeyConfig, LeaseConfig};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::timeout;

/// Longest wait for anything that should happen.
pub const PATIENCE: Duration = Duration::from_secs(20);
pub const TOKEN: u64 = 42;

/// Waits for what should happen, within [`PATIENCE`].
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

pub fn lease(renew_ms: u64, soft_terminate_ms: u64, hard_terminate_ms: u64) -> LeaseConfig {
    LeaseConfig { renew_ms, soft_terminate_ms, hard_terminate_ms, expiry_ms: hard_terminate_ms * 2 }
}

/// Short enough that renewals are seen, long enough for a loaded machine.
pub fn short_lease() -> LeaseConfig {
    lease(600, 3_000, 4_000)
}

/// What each test sets before a drone connects.
#[derive(Clone)]
pub struct Setting {
    pub lease: LeaseConfig,
    pub cluster_id: String,
    pub leader: Option<String>,
    /// Close new sockets with this code instead of answering the handshake.
    pub refuse_with: Option<u16>,
}

struct Shared {
    /// Handshakes that were answered with a close code.
    refused: tokio::sync::watch::Sender<usize>,
    setting: Mutex<Setting>,
    conns: UnboundedSender<Conn>,
}

pub struct Fake {
    pub url: String,
    shared: Arc<Shared>,
    conns: UnboundedReceiver<Conn>,
    server: tokio::task::JoinHandle<()>,
}

enum Out {
    Message(Box<MessageToDrone>),
    Raw(String),
    Drop,
}

/// One drone socket, after the drone's handshake and its list.
pub struct Conn {
    pub handshake: DroneHandshake,
    /// What the drone said that it has.
    pub listed: Vec<ListedBackend>,
    pub path_cluster: String,
    pub pool: String,
    pub lease: LeaseConfig,
    from: UnboundedReceiver<MessageFromDrone>,
    to: UnboundedSender<Out>,
    pub latest_heartbeat: i64,
    /// The latest notice of activity that the test took.
    pub activity_id: i64,
    /// Answer every renewal.
    pub renew: bool,
    /// Acknowledge every event.
    pub acknowledge: bool,
}

async fn health(State(shared): State<Arc<Shared>>) -> Response {
    let leader = shared.setting.lock().unwrap().leader.clone();
    match leader {
        Some(leader) => ([("x-holdfast-leader", leader)], "ok").into_response(),
        None => "ok".into_response(),
    }
}

async fn socket(
    State(shared): State<Arc<Shared>>,
    Path(cluster): Path<String>,
    Query(query): Query<HashMap<String, String>>,
    upgrade: WebSocketUpgrade,
) -> Response {
    upgrade.on_upgrade(move |socket| talk(socket, shared, cluster, query))
}

async fn talk(
    mut socket: WebSocket,
    shared: Arc<Shared>,
    path_cluster: String,
    query: HashMap<String, String>,
) {
    let Some(Ok(Message::Text(text))) = socket.recv().await else { return };
    let handshake: DroneHandshake = serde_json::from_str(&text).unwrap();
    let setting = shared.setting.lock().unwrap().clone();
    if let Some(code) = setting.refuse_with {
        shared.refused.send_modify(|count| *count += 1);
        let _ = socket.send(Message::Close(Some(CloseFrame { code, reason: "refused".into() }))).await;
        return;
    }
    let answer = ControllerHandshake {
        version: VersionInfo::current(),
        name: "fake".to_owned(),
        cluster_id: Some(setting.cluster_id),
        lease: Some(setting.lease),
    };
    socket.send(Message::text(serde_json::to_string(&answer).unwrap())).await.unwrap();
    let (sender, from) = unbounded_channel();
    let (to, mut outgoing) = unbounded_channel();
    let mut conn = Some(Conn {
        handshake,
        listed: Vec::new(),
        path_cluster,
        pool: query.get("pool").cloned().unwrap_or_default(),
        lease: setting.lease,
        from,
        to,
        latest_heartbeat: i64::MIN,
        activity_id: 0,
        renew: true,
        acknowledge: true,
    });
    let (mut sink, mut stream) = socket.split();
    loop {
        tokio::select! {
            frame = stream.next() => match frame {
                Some(Ok(Message::Text(text))) => {
                    let message = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
                    if let (MessageFromDrone::Backends(page), Some(unlisted)) = (&message, &mut conn) {
                        unlisted.listed.extend(page.backends.clone());
                        let ack = serde_json::to_string(&MessageToDrone::AckBackends {}).unwrap();
                        if sink.send(Message::text(ack)).await.is_err() {
                            return;
                        }
                        // Like a controller: no action is sent before the list has come.
                        if page.last && conn.take().is_some_and(|conn| shared.conns.send(conn).is_err()) {
                            return;
                        }
                        continue;
                    }
                    if sender.send(message).is_err() {
                        return;
                    }
                }
                Some(Ok(_)) => {}
                _ => return,
            },
            out = outgoing.recv() => {
                let text = match out {
                    Some(Out::Message(message)) => serde_json::to_string(&message).unwrap(),
                    Some(Out::Raw(text)) => text,
                    Some(Out::Drop) | None => return,
                };
                if sink.send(Message::text(text)).await.is_err() {
                    return;
                }
            }
        }
    }
}

impl Fake {
    pub async fn start(lease: LeaseConfig) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (sender, conns) = unbounded_channel();
        let setting = Setting {
            lease,
            cluster_id: "cluster-1".to_owned(),
            leader: Some(url.clone()),
            refuse_with: None,
        };
        let shared = Arc::new(Shared {
            refused: tokio::sync::watch::Sender::new(0),
            setting: Mutex::new(setting),
            conns: sender,
        });
        let app = axum::Router::new()
            .route("/pub/health", get(health))
            .route("/ctrl/c/{cluster}/drone-socket", get(socket))
            .with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { url, shared, conns, server }
    }

    pub fn set(&self, change: impl FnOnce(&mut Setting)) {
        change(&mut self.shared.setting.lock().unwrap());
    }

    /// Waits until so many handshakes were refused.
    pub async fn refusals(&self, count: usize) {
        let mut refused = self.shared.refused.subscribe();
        soon("refused handshakes", refused.wait_for(|n| *n >= count)).await.unwrap();
    }

    /// The next drone that connects.
    pub async fn conn(&mut self) -> Conn {
        soon("a drone connects", self.conns.recv()).await.unwrap()
    }
}

impl Conn {
    pub fn send(&self, message: MessageToDrone) {
        let _ = self.to.send(Out::Message(Box::new(message)));
    }

    pub fn send_raw(&self, text: &str) {
        let _ = self.to.send(Out::Raw(text.to_owned()));
    }

    /// Cuts the connection.
    pub fn drop_it(&self) {
        let _ = self.to.send(Out::Drop);
    }

    /// The next message, heartbeats and what is answered by itself included.
    pub async fn any(&mut self) -> MessageFromDrone {
        let message =
            soon("the drone says something", self.from.recv()).await.expect("the drone is connected");
        self.react(&message);
        message
    }

    /// The next message; never, once the drone has hung up.
    pub async fn any_or_never(&mut self) -> MessageFromDrone {
        match self.from.recv().await {
            Some(message) => {
                self.react(&message);
                message
            }
            None => std::future::pending().await,
        }
    }

    /// The next message; nothing once the drone has hung up.
    pub async fn any_until_gone(&mut self) -> Option<MessageFromDrone> {
        let message = soon("the drone says something or hangs up", self.from.recv()).await?;
        self.react(&message);
        Some(message)
    }

    /// Waits until an action is acknowledged.
    pub async fn acknowledged(&mut self, action_id: &str) {
        self.until("an acknowledgement", |message| {
            matches!(message, MessageFromDrone::AckAction { action_id: id } if id == action_id).then_some(())
        })
        .await;
    }

    fn react(&mut self, message: &MessageFromDrone) {
        match message {
            MessageFromDrone::Heartbeat(heartbeat) => self.latest_heartbeat = heartbeat.local_time,
            MessageFromDrone::RenewKeys(request) if self.renew => self.grant(request),
            MessageFromDrone::BackendEvent(event) if self.acknowledge => {
                self.send(MessageToDrone::AckEvent { event_id: event.event_id });
            }
            _ => {}
        }
    }

    pub fn grant(&self, request: &RenewKeysRequest) {
        let deadlines = self.lease.deadlines(request.local_time);
        let keys = request
            .keys
            .iter()
            .map(|key| RenewedKey { backend: key.backend.clone(), deadlines: Some(deadlines), refused: None })
            .collect();
        self.send(MessageToDrone::RenewKeysResponse(RenewKeysResponse { keys }));
    }

    /// Passes over messages until `pick` finds what it looks for.
    pub async fn until<T>(&mut self, what: &str, mut pick: impl FnMut(MessageFromDrone) -> Option<T>) -> T {
        soon(what, async {
            loop {
                if let Some(found) = pick(self.any().await) {
                    return found;
                }
            }
        })
        .await
    }

    pub async fn event(&mut self) -> BackendEvent {
        self.until("an event", |message| match message {
            MessageFromDrone::BackendEvent(event) => Some(event),
            _ => None,
        })
        .await
    }

    pub async fn renewal(&mut self) -> RenewKeysRequest {
        self.until("a renewal", |message| match message {
            MessageFromDrone::RenewKeys(request) => Some(request),
            _ => None,
        })
        .await
    }

    /// The next state of a backend, which must have this status.
    pub async fn expect(&mut self, backend: &str, status: BackendStatus) -> BackendState {
        let event = self.event().await;
        assert_eq!(event.backend_id, backend);
        assert_eq!(event.token, Some(TOKEN));
        assert_eq!(event.state.status(), status, "{:?}", event.state);
        event.state
    }

    pub async fn heartbeat(&mut self) -> i64 {
        self.until("a heartbeat", |message| match message {
            MessageFromDrone::Heartbeat(heartbeat) => Some(heartbeat.local_time),
            _ => None,
        })
        .await
    }

    pub fn act(&self, action_id: &str, backend: &str, action: Action) {
        self.send(MessageToDrone::Action(ActionMessage {
            action_id: action_id.to_owned(),
            backend_id: backend.to_owned(),
            drone_id: 1,
            action,
        }));
    }

    /// Spawns a shell script with deadlines from the latest heartbeat.
    pub async fn spawn(&mut self, backend: &str, script: &str) {
        if self.latest_heartbeat == i64::MIN {
            self.heartbeat().await;
        }
        self.act(&format!("spawn-{backend}"), backend, self.spawn_action(script, self.latest_heartbeat));
    }

    pub fn spawn_action(&self, script: &str, local_time: i64) -> Action {
        Action::Spawn {
            executable: serde_json::json!({"command": ["sh", "-c", script], "env": {"PORT": "1", "MINE": "yes"}}),
            key: AcquiredKey {
                key: KeyConfig { name: "room".into(), namespace: "ns".into(), tag: "t".into() },
                deadlines: self.lease.deadlines(local_time),
                token: TOKEN,
            },
            static_token: Some("st".to_owned()),
            incarnation: None,
        }
    }

    /// Spawns a script and brings it to `waiting`; returns its address.
    pub async fn waiting(&mut self, backend: &str, script: &str) -> SocketAddr {
        self.spawn(backend, script).await;
        self.expect(backend, BackendStatus::Loading).await;
        self.expect(backend, BackendStatus::Starting).await;
        self.expect(backend, BackendStatus::Waiting).await.address().unwrap()
    }
}

/// A running `holdfast-drone`.
pub struct Drone {
    pub process: Child,
    pub data_dir: std::path::PathBuf,
}

impl Drone {
    pub fn command(controllers: &str, data_dir: &std::path::Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-drone"));
        command
            .args([
                "--name",
                "dr-test",
                "--cluster",
                "c.example:1",
                "--pool",
                "p",
                "--controller",
                controllers,
            ])
            .arg("--data-dir")
            .arg(data_dir)
            .env("RUST_LOG", "holdfast_drone=debug,info")
            // For tests that run it, or are run, without root.
            .env("HOLDFAST_SHARED_USER", "true")
            .stdin(Stdio::null());
        command
    }

    pub fn start(controllers: &str, data_dir: &std::path::Path) -> Self {
        let process = Self::command(controllers, data_dir).spawn().unwrap();
        Self { process, data_dir: data_dir.to_owned() }
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// The guards of this drone.
    pub fn guards(&self) -> Vec<nix::unistd::Pid> {
        let parent_of = |pid: i32| -> Option<u32> {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            stat[stat.rfind(')')? + 1..].split_ascii_whitespace().nth(1)?.parse().ok()
        };
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| parent_of(*pid) == Some(self.process.id()))
            .map(nix::unistd::Pid::from_raw)
            .collect()
    }

    pub async fn ended(&mut self) -> ExitStatus {
        soon("the drone ends", async {
            loop {
                if let Some(status) = self.process.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
    }

    pub fn output(&self, backend: &str) -> String {
        std::fs::read_to_string(self.data_dir.join("backends").join(backend).join("output.log"))
            .unwrap_or_default()
    }

    /// Waits until the backend has written this.
    pub async fn wrote(&self, backend: &str, text: &str) {
        soon("the backend writes", async {
            while !self.output(backend).contains(text) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
    }
}

impl Drop for Drone {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Makes a program whose `exec` hangs (for the 45 s of `fs.lease-break-time`) while the answer is held: a lease on it has
/// to be broken first.
pub fn leased_program(path: &std::path::Path) -> std::fs::File {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, "#!/bin/sh\nexec sleep 300\n").unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    let file = std::fs::File::open(path).unwrap();
    // SAFETY: ignores a signal that would end this process: it tells of the break.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let end = std::time::Instant::now() + PATIENCE;
    // SAFETY: an fcntl with an integer argument on an open descriptor.
    while unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) } != 0 {
        // A process that another test forks meanwhile has the file open until its exec.
        let error = std::io::Error::last_os_error();
        assert!(std::time::Instant::now() < end, "no lease: {error}");
        std::thread::sleep(Duration::from_millis(10));
    }
    file
}

/// Processes of a backend.
pub fn alive(backend: &str) -> usize {
    let mark = format!("SESSION_BACKEND_ID={backend}");
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<i32>().is_ok()))
        .filter_map(|entry| std::fs::read(entry.path().join("environ")).ok())
        .filter(|environment| environment.split(|b| *b == 0).any(|v| v == mark.as_bytes()))
        .count()
}

/// Waits until that many processes of a backend are there. One that is just replacing its program (`exec`) shows no
/// environment for a moment.
pub async fn populated(backend: &str, processes_min: usize) {
    soon("the backend's processes are there", async {
        while alive(backend) < processes_min {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// Waits until nothing of a backend is left.
pub async fn vanished(backend: &str) {
    soon("the backend ends", async {
        while alive(backend) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// Answers HTTP at a backend's address in its place.
pub async fn answer_http(address: SocketAddr) -> tokio::task::JoinHandle<()> {
    let listener = TcpListener::bind(address).await.unwrap();
    let app = axum::Router::new().fallback(|| async { axum::http::StatusCode::NOT_FOUND });
    tokio::spawn(async move { axum::serve(listener, app).await.unwrap() })
}

/// What a guard is armed with, but for the command and its environment. `dir` holds its control files.
pub fn arm(dir: &std::path::Path, update: holdfast_drone::guard::Update) -> holdfast_drone::guard::Arm {
    holdfast_drone::guard::Arm {
        command: Vec::new(),
        env: std::collections::BTreeMap::new(),
        cwd: dir.to_owned(),
        log: dir.join("output.log"),
        hide: None,
        open_files: None,
        container: None,
        update,
    }
}

/// Whether any user can run this program.
pub fn readable_by_others(path: &std::path::Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.ancestors().all(|p| std::fs::metadata(p).is_ok_and(|m| m.permissions().mode() & 0o001 != 0))
}
