//! Containers whose processes cannot be seen from the drone: it does not start, or believes the engine that they run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]

mod common;
mod docker_support;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use common::*;
use docker_support::{Ground, key, spawn};
use holdfast_wire::BackendStatus;
use holdfast_wire::drone::MessageFromDrone;
use nix::sys::signal::{Signal, kill};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tokio::net::UnixListener;
use tokio::sync::watch;

const CONTAINER: &str = "9ec397f5a2c45418b39b2461873f3c2705c5896aec1cc1cfc59c84422ed512a0";

/// An engine that says that its container runs, in a place where it is not seen.
struct Unseen {
    socket: PathBuf,
    /// It removes the container when it is asked to.
    removes: watch::Sender<bool>,
    started: watch::Sender<bool>,
    /// Requests to remove it that were refused.
    refused: watch::Sender<usize>,
}

#[derive(Clone)]
struct Engine {
    removes: watch::Sender<bool>,
    started: watch::Sender<bool>,
    refused: watch::Sender<usize>,
    removed: watch::Sender<bool>,
}

async fn answer(State(engine): State<Engine>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let is = |end: &str| path.ends_with(end);
    let json = |status, body: serde_json::Value| (status, axum::Json(body)).into_response();
    match *request.method() {
        Method::GET if is("/version") => json(StatusCode::OK, json!({"ApiVersion": "1.41"})),
        Method::GET if is("/containers/json") => json(StatusCode::OK, json!([])),
        Method::GET if path.contains("/images/") => json(StatusCode::OK, json!({"Id": "sha256:1"})),
        Method::POST if is("/containers/create") => {
            json(StatusCode::CREATED, json!({"Id": CONTAINER, "Warnings": []}))
        }
        Method::POST if is("/start") => {
            engine.started.send_replace(true);
            StatusCode::NO_CONTENT.into_response()
        }
        Method::GET if is(&format!("/containers/{CONTAINER}/json")) && !*engine.removed.borrow() => {
            let state = json!({"Status": "running", "Running": true, "Pid": 4_194_303, "ExitCode": 0});
            json(StatusCode::OK, json!({"Id": CONTAINER, "State": state}))
        }
        Method::DELETE if *engine.removes.borrow() => {
            engine.removed.send_replace(true);
            StatusCode::NO_CONTENT.into_response()
        }
        Method::DELETE => {
            engine.refused.send_modify(|count| *count += 1);
            json(StatusCode::INTERNAL_SERVER_ERROR, json!({"message": "device or resource busy"}))
        }
        Method::POST if is("/kill") => StatusCode::NO_CONTENT.into_response(),
        _ => json(StatusCode::NOT_FOUND, json!({"message": "no such thing"})),
    }
}

impl Unseen {
    fn start(dir: &Path) -> Self {
        let socket = dir.join("engine.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let engine = Engine {
            removes: watch::Sender::new(false),
            started: watch::Sender::new(false),
            refused: watch::Sender::new(0),
            removed: watch::Sender::new(false),
        };
        let Engine { removes, started, refused, .. } = engine.clone();
        let app = Router::new().fallback(answer).with_state(engine);
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { socket, removes, started, refused }
    }

    fn drone(&self, fake: &Fake, data_dir: &Path) -> Drone {
        let mut command = Drone::command(&fake.url, data_dir);
        command.args(["--runtime", "docker", "--docker-socket"]).arg(&self.socket);
        Drone { process: command.spawn().unwrap(), data_dir: data_dir.to_owned() }
    }

    /// Until the engine has refused so many removals, no end is reported; when it has removed the container, one is.
    async fn ends_when_removed(&self, conn: &mut Conn, backend: &str) {
        let mut refused = self.refused.subscribe();
        let asked = async { refused.wait_for(|count| *count >= 4).await.unwrap() };
        soon("requests to remove it", async {
            tokio::pin!(asked);
            loop {
                tokio::select! {
                    _ = &mut asked => return,
                    message = conn.any() => {
                        if let MessageFromDrone::BackendEvent(event) = message {
                            assert_ne!(event.state.status(), BackendStatus::Terminated, "the engine says it runs");
                        }
                    }
                }
            }
        })
        .await;
        self.removes.send_replace(true);
        loop {
            let event = conn.event().await;
            assert_eq!(event.backend_id, backend);
            if event.state.status() == BackendStatus::Terminated {
                return;
            }
        }
    }
}

#[tokio::test]
async fn a_container_that_runs_unseen_is_not_reported_as_ended_before_it_is_removed() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let engine = Unseen::start(dir.path());
    let _drone = engine.drone(&fake, &dir.path().join("data"));
    let mut conn = fake.conn().await;
    let backend = "ba-unseen";
    spawn(&mut conn, backend, json!({"image": "app"}), key("room", "")).await;
    // Its guard gives it up, since it cannot watch it.
    engine.ends_when_removed(&mut conn, backend).await;
}

#[tokio::test]
async fn nor_is_one_whose_guard_is_killed() {
    let mut fake = Fake::start(lease(30_000, 40_000, 50_000)).await;
    let dir = tempfile::tempdir().unwrap();
    let engine = Unseen::start(dir.path());
    let drone = engine.drone(&fake, &dir.path().join("data"));
    let mut conn = fake.conn().await;
    let backend = "ba-unseen-unguarded";
    spawn(&mut conn, backend, json!({"image": "app"}), key("room", "")).await;
    soon("it is started", engine.started.subscribe().wait_for(|started| *started)).await.unwrap();
    for guard in drone.guards() {
        kill(guard, Signal::SIGKILL).unwrap();
    }
    engine.ends_when_removed(&mut conn, backend).await;
    // Its deputy was of the same mind, and is done too.
    soon("nothing of its guard is left", async {
        while !drone.guards().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// The arguments of a drone on the machine's engine, run by a shell with other surroundings.
fn refused(ground: &Ground, surroundings: &str) -> (Option<i32>, String) {
    let data_dir = ground.dir.path().join("data");
    let output = Command::new("sh")
        .args(["-c", surroundings, "sh", env!("CARGO_BIN_EXE_holdfast-drone")])
        .args([
            "--name",
            "dr-test",
            "--cluster",
            "c",
            "--controller",
            "http://127.0.0.1:9",
            "--runtime",
            "docker",
        ])
        .arg("--data-dir")
        .arg(data_dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn a_drone_that_cannot_see_the_engine_does_not_start() {
    let Some(ground) = Ground::new() else { return };
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make such surroundings");
        return;
    }
    let other_namespace = "exec timeout -k 1 60 unshare --pid --fork --kill-child --mount-proc \"$@\"";
    let hidden = "exec timeout -k 1 60 unshare --mount sh -c 'mount -t proc -o hidepid=2 proc /proc && \
                  exec setpriv --regid 65534 --clear-groups --bounding-set=-sys_ptrace --inh-caps=-sys_ptrace \"$@\"' sh \"$@\"";
    for surroundings in [other_namespace, hidden] {
        let (code, message) = refused(&ground, surroundings);
        assert_eq!(code, Some(1), "{surroundings}: {message}");
        assert!(message.contains("cannot be seen"), "{surroundings}: {message}");
    }
}
