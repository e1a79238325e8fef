//! A real container engine, an image from scratch, and a drone that runs containers. What a test makes is removed when it
//! ends, also when it fails; what a killed one has left is removed by the next.

#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]
#![allow(missing_docs, reason = "only the tests beside it use it")]

pub mod engine;
pub mod proxy;

use crate::common::*;
use holdfast_wire::drone::{AcquiredKey, Action};
use holdfast_wire::{BackendStatus, KeyConfig, LeaseConfig};
use nix::fcntl::{Flock, FlockArg};
use proxy::Proxy;
use serde_json::{Value, json};
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const ENGINE: &str = "/var/run/docker.sock";
const PREFIX: &str = "holdfast-drone-test-";

fn docker_at(engine: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("docker");
    command.arg("-H").arg(format!("unix://{}", engine.display())).args(arguments).stdin(Stdio::null());
    command
}

/// Runs `docker`; whether it succeeds.
pub fn docker_can_at(engine: &Path, arguments: &[&str]) -> bool {
    let status = docker_at(engine, arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// The test's own part of the engine.
pub struct Ground {
    /// In the names of all that it makes.
    pub name: String,
    pub image: String,
    pub cluster: String,
    pub dir: tempfile::TempDir,
    engine: PathBuf,
}

impl Drop for Ground {
    fn drop(&mut self) {
        remove_all_of(&self.engine, &self.name);
    }
}

/// Removes all containers, networks and images with this name in theirs. Nothing here may panic.
fn remove_all_of(engine: &Path, name: &str) {
    let list = |arguments: &[&str]| -> Vec<String> {
        let output = docker_at(engine, arguments).output();
        output.map(|o| lines(&String::from_utf8_lossy(&o.stdout))).unwrap_or_default()
    };
    let filter = format!("name={name}");
    for container in list(&["ps", "-aq", "--filter", &filter]) {
        docker_can_at(engine, &["rm", "-f", "-v", &container]);
    }
    for network in list(&["network", "ls", "-q", "--filter", &filter]) {
        docker_can_at(engine, &["network", "rm", &network]);
    }
    for image in list(&["images", "--format", "{{.Repository}}:{{.Tag}}"]) {
        if image.contains(name) {
            docker_can_at(engine, &["image", "rm", "-f", &image]);
        }
    }
}

/// Removes what test processes that live no more have left.
fn remove_leftovers(engine: &Path) {
    for what in [
        ["ps", "-a", "--format", "{{.Names}}"].as_slice(),
        &["images", "--format", "{{.Repository}}"],
        &["network", "ls", "--format", "{{.Name}}"],
    ] {
        let output = docker_at(engine, what).output().unwrap();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Some(at) = line.find(PREFIX) else { continue };
            let mut parts = line[at + PREFIX.len()..].split(['-', '.', ':', '_']);
            let (Some(pid), Some(count)) = (parts.next(), parts.next()) else { continue };
            if !Path::new("/proc").join(pid).exists() {
                remove_all_of(engine, &format!("{PREFIX}{pid}-{count}"));
            }
        }
    }
}

/// Builds the backend, once for all tests.
pub fn program() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(dir).unwrap();
    let lock = std::fs::File::create(dir.join("docker-backend.lock")).unwrap();
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/docker_support/backend.rs");
    let program = dir.join("docker-backend");
    let changed = |path: &Path| std::fs::metadata(path).and_then(|meta| meta.modified());
    if changed(&program).is_ok_and(|at| at > changed(&source).unwrap()) {
        return program;
    }
    let output = Command::new("rustc")
        .args(["--edition", "2024", "-O", "-C", "target-feature=+crt-static", "-C", "strip=symbols", "-o"])
        .arg(dir.join("docker-backend.new"))
        .arg(source)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::rename(dir.join("docker-backend.new"), &program).unwrap();
    program
}

impl Ground {
    /// None where there is no container engine: a test has nothing to run on there.
    pub fn new() -> Option<Self> {
        Self::on(Path::new(ENGINE))
    }

    /// On this engine.
    pub fn on(engine: &Path) -> Option<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        if !docker_can_at(engine, &["version"]) {
            let _ = writeln!(std::io::stderr(), "SKIP: no container engine answers `docker version`");
            return None;
        }
        remove_leftovers(engine);
        let name = format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let dir = tempfile::tempdir().unwrap();
        let ground = Self {
            image: format!("{name}:test"),
            cluster: format!("{name}.example:1"),
            name,
            dir,
            engine: engine.to_owned(),
        };
        std::fs::create_dir(ground.mount_base()).unwrap();
        let root = ground.dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::copy(program(), root.join("backend")).unwrap();
        std::fs::write(
            root.join("Dockerfile"),
            "FROM scratch\nCOPY backend /backend\nENTRYPOINT [\"/backend\"]\n",
        )
        .unwrap();
        // Without the cache: it would share a layer with the image of a test beside, which removes that when it has ended.
        let root = root.to_str().unwrap();
        ground.docker(&["build", "--quiet", "--no-cache", "-t", &ground.image, root]);
        Some(ground)
    }

    /// Runs `docker`, which must succeed; what it prints.
    pub fn docker(&self, arguments: &[&str]) -> String {
        let output = docker_at(&self.engine, arguments).output().unwrap();
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "docker {arguments:?}: {problem}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    /// Runs `docker`; whether it succeeds.
    pub fn docker_can(&self, arguments: &[&str]) -> bool {
        docker_can_at(&self.engine, arguments)
    }

    pub fn mount_base(&self) -> PathBuf {
        self.dir.path().join("mounts")
    }

    /// A drone on the engine itself.
    pub fn drone(&self, fake: &Fake) -> Drone {
        self.drone_at(fake, &self.engine)
    }

    /// A drone that sees the engine at another socket.
    pub fn drone_at(&self, fake: &Fake, socket: &Path) -> Drone {
        let data_dir = self.dir.path().join("data");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log_path()).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_holdfast-drone"))
            .args(["--name", "dr-test", "--cluster", &self.cluster, "--controller", &fake.url])
            .args(["--runtime", "docker"])
            .arg("--docker-socket")
            .arg(socket)
            .arg("--mount-base")
            .arg(self.mount_base())
            .arg("--data-dir")
            .arg(&data_dir)
            .env("RUST_LOG", "holdfast_drone=debug,info")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Drone { process, data_dir }
    }

    pub fn proxy(&self) -> Proxy {
        Proxy::start(&self.dir.path().join("engine.sock"), &self.engine)
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("drone.log")
    }

    /// What the drones have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap()
    }

    /// The name of a backend's container.
    pub fn container(&self, backend: &str) -> String {
        format!("holdfast_{}.example_1_dr-test_{backend}", self.name)
    }

    /// What the engine knows of a backend's container.
    pub fn inspect(&self, backend: &str) -> Value {
        let all: Value = serde_json::from_str(&self.docker(&["inspect", &self.container(backend)])).unwrap();
        all[0].clone()
    }

    pub fn exists(&self, backend: &str) -> bool {
        self.docker_can(&["inspect", &self.container(backend)])
    }

    /// An executable with this environment and the other fields of `with`.
    pub fn executable(&self, env: Value, with: Value) -> Value {
        let mut executable = json!({"image": self.image, "env": env});
        executable.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        executable
    }

    /// Whether the program in a backend's container has ever begun; the backend must have `mount: "marks"`, and a key
    /// without a namespace.
    pub fn has_begun(&self, backend: &str) -> bool {
        self.mount_base().join("marks").join(format!("started-{backend}")).exists()
    }
}

/// Long enough for a container to start on a loaded machine.
pub fn container_lease() -> LeaseConfig {
    lease(1_000, 6_000, 8_000)
}

pub fn key(name: &str, namespace: &str) -> KeyConfig {
    KeyConfig { name: name.into(), namespace: namespace.into(), tag: "t".into() }
}

/// Spawns a container with deadlines from the latest heartbeat.
pub async fn spawn(conn: &mut Conn, backend: &str, executable: Value, key: KeyConfig) {
    if conn.latest_heartbeat == i64::MIN {
        conn.heartbeat().await;
    }
    let deadlines = conn.lease.deadlines(conn.latest_heartbeat);
    let key = AcquiredKey { key, deadlines, token: TOKEN };
    conn.act(
        &format!("spawn-{backend}"),
        backend,
        Action::Spawn { executable, key, static_token: None, incarnation: None },
    );
}

/// Spawns a container and brings it to `waiting`; returns its address.
pub async fn waiting(conn: &mut Conn, backend: &str, executable: Value) -> SocketAddr {
    spawn(conn, backend, executable, key("room", "")).await;
    conn.expect(backend, BackendStatus::Loading).await;
    conn.expect(backend, BackendStatus::Starting).await;
    conn.expect(backend, BackendStatus::Waiting).await.address().unwrap()
}

/// Spawns a container and brings it to `ready`; returns its address.
pub async fn ready(conn: &mut Conn, backend: &str, executable: Value) -> SocketAddr {
    let address = waiting(conn, backend, executable).await;
    conn.expect(backend, BackendStatus::Ready).await;
    address
}

/// What a backend answers.
pub async fn page(address: SocketAddr) -> String {
    soon("the backend answers", async {
        reqwest::get(format!("http://{address}/")).await.unwrap().text().await.unwrap()
    })
    .await
}

/// Waits until this holds.
pub async fn until(what: &str, holds: impl Fn() -> bool) {
    soon(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}
