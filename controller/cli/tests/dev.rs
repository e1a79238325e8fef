//! `holdfast dev` with stand-ins for its children: what it starts, and that nothing it starts outlives it.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a failed test")]

use axum::Router;
use axum::http::StatusCode;
use axum::routing::{get, post};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::time::{sleep, timeout};

/// No step of a test takes longer, unless it hangs.
const STEP_MAX: Duration = Duration::from_secs(30);

/// Not a test of its own: the stand-in that the scripts below run. A controller forms a cluster once, writing down what it
/// was asked, and answers that it and its drones are ready; a drone does nothing until it is ended.
#[tokio::test]
#[ignore = "run by the other tests, as a child process"]
async fn stand_in() {
    let args: Vec<String> = std::env::var("STAND_IN").unwrap().split(' ').map(str::to_owned).collect();
    let flag = |name: &str| args.iter().position(|arg| arg == name).and_then(|at| args.get(at + 1)).cloned();
    assert!(std::env::var_os("HOLDFAST_DATA_DIR").is_none(), "settings of dev reach its children");
    let Some(listen) = flag("--listen") else {
        // A drone that ends in its own time at SIGTERM, and says whether there is still somebody to tell.
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).unwrap();
        std::fs::create_dir_all(flag("--data-dir").unwrap()).unwrap();
        terminate.recv().await;
        let urls = flag("--controller").unwrap();
        let there = |url: &str| std::net::TcpStream::connect(url.trim_start_matches("http://")).is_ok();
        println!("asked to end, controllers there: {}", urls.split(',').all(there));
        return;
    };
    let drones = r#"{"drones":[{"id":1,"name":"dr-a","cluster":"CLUSTER","pool":"","ready":true,
        "draining":false,"backend_count":0,"version":"0"}]}"#
        .replace("CLUSTER", &flag("--default-cluster").unwrap());
    let formed = Path::new(&flag("--data-dir").unwrap()).join("formed");
    let init = move |asked: String| async move {
        if formed.exists() {
            let refused = r#"{"id":"e","kind":"AlreadyInitialised","message":"it is a member already"}"#;
            return (StatusCode::CONFLICT, refused);
        }
        std::fs::create_dir_all(formed.parent().unwrap()).unwrap();
        std::fs::write(&formed, asked).unwrap();
        (StatusCode::OK, r#"{"cluster_id":"c","members":[]}"#)
    };
    let app = Router::new()
        .route("/ctrl/cluster/init", post(init))
        .route("/ctrl/ready", get(|| async { "{}" }))
        .route("/ctrl/drones", get(move || async move { drones }));
    let listener = tokio::net::TcpListener::bind(listen).await.unwrap();
    axum::serve(listener, app).await.unwrap();
}

/// A directory with the real `holdfast` and stand-ins for its neighbours, and a port below which nothing listens.
struct House {
    dir: TempDir,
    base_port: u16,
}

impl House {
    fn new(controller_script: Option<&str>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_holdfast"), dir.path().join("holdfast")).unwrap();
        let this = std::env::current_exe().unwrap();
        let stand_in = format!(
            "#!/bin/sh\nSTAND_IN=\"$*\" exec {} --ignored --exact stand_in --nocapture\n",
            this.display()
        );
        let script = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        script("holdfast-controller", controller_script.unwrap_or(&stand_in));
        script("holdfast-drone", &stand_in);
        Self { dir, base_port: free_base_port() }
    }

    fn data(&self) -> std::path::PathBuf {
        self.dir.path().join("data")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.dir.path().join("holdfast"));
        command
            .args(["dev", "--base-port", &self.base_port.to_string()])
            .args(args)
            .env("HOLDFAST_DATA_DIR", "/must/not/be/passed/on")
            .env("TMPDIR", self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Starts it and waits for its summary.
    async fn start(&self, args: &[&str]) -> Dev {
        let mut child = self.command(&[args, &["--json"]].concat()).spawn().unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let mut text = Vec::new();
        let summary = timeout(STEP_MAX, async {
            loop {
                if let Ok(summary) = serde_json::from_slice::<Value>(&text) {
                    return summary;
                }
                assert_ne!(stdout.read_buf(&mut text).await.unwrap(), 0, "it ended");
            }
        })
        .await
        .expect("no summary");
        let stderr = BufReader::new(child.stderr.take().unwrap()).lines();
        Dev { child, summary, stderr, _stdout: stdout }
    }
}

struct Dev {
    child: Child,
    summary: Value,
    stderr: Lines<BufReader<ChildStderr>>,
    _stdout: ChildStdout,
}

impl Dev {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().unwrap().try_into().unwrap()), signal).unwrap();
    }

    /// The children's pids, controllers first.
    fn pids(&self) -> Vec<i32> {
        let of = |what: &str| self.summary[what].as_array().unwrap().clone();
        let all = [of("controllers"), of("drones")].concat();
        all.iter().map(|child| i32::try_from(child["pid"].as_i64().unwrap()).unwrap()).collect()
    }

    async fn code(&mut self) -> Option<i32> {
        timeout(STEP_MAX, self.child.wait()).await.expect("it hangs").unwrap().code()
    }

    async fn line(&mut self) -> String {
        timeout(STEP_MAX, self.stderr.next_line()).await.expect("silence").unwrap().unwrap_or_default()
    }
}

/// A port after which four and, a hundred further, four more are free.
fn free_base_port() -> u16 {
    (0..200u16)
        .map(|_| 20_000 + rand_u16() % 10_000)
        .find(|base| {
            (0..4).all(|n| {
                [base + n, base + 100 + n].iter().all(|p| TcpListener::bind(("127.0.0.1", *p)).is_ok())
            })
        })
        .unwrap()
}

fn rand_u16() -> u16 {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    port.wrapping_mul(31)
}

fn alive(pid: i32) -> bool {
    // A zombie that its new parent has not reaped yet is not alive.
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().trim_start().starts_with('Z'))
}

async fn wait_until_gone(pids: &[i32]) {
    timeout(STEP_MAX, async {
        while pids.iter().any(|pid| alive(*pid)) {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("a child outlives dev");
}

/// Until the drone's stand-in listens for signals.
async fn wait_for_drone(data: &Path) {
    timeout(STEP_MAX, async {
        while !data.join("drone-1").exists() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .expect("no drone");
}

fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[tokio::test]
async fn it_runs_until_it_is_asked_to_end_and_leaves_nothing_running() {
    let house = House::new(None);
    let data = house.data();
    let mut dev = house.start(&["--data-dir", data.to_str().unwrap()]).await;
    let pids = dev.pids();
    assert_eq!(pids.len(), 4);
    assert!(pids.iter().all(|pid| alive(*pid)));
    wait_for_drone(&data).await;
    let first = &dev.summary["controllers"][0];
    assert_eq!(first["url"], format!("http://127.0.0.1:{}", house.base_port + 1));
    dev.signal(Signal::SIGINT);
    assert_eq!(dev.code().await, Some(0));
    assert!(!pids.iter().any(|pid| alive(*pid)));
    // The drone was asked, not killed, and the directory stays.
    let log = std::fs::read_to_string(data.join("drone-1.log")).unwrap();
    assert!(log.contains("asked to end, controllers there: true"), "{log}");
    assert_eq!(
        entries(&data),
        [
            "controller-1",
            "controller-1.log",
            "controller-2.log",
            "controller-3.log",
            "drone-1",
            "drone-1.log"
        ]
    );
}

#[tokio::test]
async fn the_first_controller_forms_the_cluster_once() {
    let house = House::new(None);
    let data = house.data();
    let args = ["--controllers", "2", "--drones", "0", "--data-dir", data.to_str().unwrap()];
    let lease = ["--lease", "renew=1s,soft=2s,hard=3s,expiry=5s"];
    let mut asked = String::new();
    // The second time the directories are those of a cluster already.
    for args in [[&args[..], &lease].concat(), args.to_vec()] {
        let mut dev = house.start(&args).await;
        asked = std::fs::read_to_string(data.join("controller-1/formed")).unwrap();
        dev.signal(Signal::SIGTERM);
        assert_eq!(dev.code().await, Some(0));
    }
    let asked: Value = serde_json::from_str(&asked).unwrap();
    let members: Vec<_> = (101..=102).map(|n| format!("127.0.0.1:{}", house.base_port + n)).collect();
    assert_eq!((&asked["members"], &asked["lease"]["expiry_ms"]), (&json!(members), &json!(5_000)));
    assert!(!data.join("controller-2/formed").exists(), "only one is asked");
}

#[tokio::test]
async fn a_directory_of_its_own_is_removed_at_the_end() {
    let house = House::new(None);
    let mut dev = house.start(&["--controllers", "1"]).await;
    let dir = dev.summary["data_dir"].as_str().unwrap().to_owned();
    assert!(Path::new(&dir).join("controller-1.log").exists());
    dev.signal(Signal::SIGTERM);
    assert_eq!(dev.code().await, Some(0));
    assert!(!Path::new(&dir).exists());
}

#[tokio::test]
async fn a_child_that_ends_by_itself_is_reported_and_the_others_go_on() {
    let house = House::new(None);
    let mut dev = house.start(&["--controllers", "2"]).await;
    let pids = dev.pids();
    kill(Pid::from_raw(pids[1]), Signal::SIGKILL).unwrap();
    let line = dev.line().await;
    assert!(line.starts_with("controller 2 (pid ") && line.contains("killed by SIGKILL"), "{line}");
    assert!(alive(pids[0]) && alive(pids[2]));
    dev.signal(Signal::SIGTERM);
    assert_eq!(dev.code().await, Some(0));
    wait_until_gone(&pids).await;
}

#[tokio::test]
async fn children_die_with_it_even_when_it_is_killed() {
    let house = House::new(None);
    let data = house.data();
    let mut dev = house.start(&["--data-dir", data.to_str().unwrap()]).await;
    let pids = dev.pids();
    wait_for_drone(&data).await;
    dev.signal(Signal::SIGKILL);
    dev.code().await;
    wait_until_gone(&pids).await;
    // The drone had the time to end its backends.
    let log = std::fs::read_to_string(data.join("drone-1.log")).unwrap();
    assert!(log.contains("asked to end"), "{log}");
}

#[tokio::test]
async fn a_controller_that_does_not_come_up_ends_it_with_the_log() {
    let house = House::new(Some("#!/bin/sh\necho 'no such disk' >&2\nexit 7\n"));
    let output = timeout(STEP_MAX, house.command(&[]).output()).await.expect("it hangs").unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("exit code 7") && stderr.contains("no such disk"), "{stderr}");
    assert!(!entries(house.dir.path()).iter().any(|name| name.starts_with("holdfast-dev-")));
}

#[tokio::test]
async fn a_port_in_use_is_named_before_anything_starts() {
    let house = House::new(None);
    let _taken = TcpListener::bind(("127.0.0.1", house.base_port + 102)).unwrap();
    let output = timeout(STEP_MAX, house.command(&[]).output()).await.expect("it hangs").unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains(&format!("127.0.0.1:{} can't be used", house.base_port + 102)), "{stderr}");
}
