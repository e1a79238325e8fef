//! Standard error that cannot be written to does not end a controller.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a failed test")]

use std::fs::OpenOptions;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Longest that anything is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// Ended with the test.
struct Controller(Child);

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Standard errors that take nothing, and what has to be kept for them meanwhile.
fn useless_stderrs() -> Vec<(&'static str, Stdio, Option<std::io::PipeReader>)> {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (closed_reader, closed) = std::io::pipe().unwrap();
    drop(closed_reader);
    let (unread_reader, unread) = std::io::pipe().unwrap();
    vec![
        ("full", full.into(), None),
        ("closed", closed.into(), None),
        ("unread", unread.into(), Some(unread_reader)),
    ]
}

fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[tokio::test]
async fn a_controller_that_cannot_log_serves() {
    for (what, stderr, _reader) in useless_stderrs() {
        let dir = tempfile::tempdir().unwrap();
        let (listen, peer) = (free_address(), free_address());
        let url = format!("http://{listen}");
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-controller"));
        command
            .args(["--id", "1", "--listen", &listen, "--advertise-url", &url, "--peer-listen", &peer])
            .args(["--initial-cluster", &format!("1={peer}"), "--data-dir"])
            .arg(dir.path())
            .env("RUST_LOG", "debug")
            .stderr(stderr);
        let mut controller = Controller(command.spawn().unwrap());
        drop(command);
        let client = reqwest::Client::new();
        let end = tokio::time::Instant::now() + PATIENCE;
        loop {
            assert!(controller.0.try_wait().unwrap().is_none(), "{what}: it has ended");
            let ready = client.get(format!("{url}/ctrl/ready")).timeout(PATIENCE).send().await;
            if ready.is_ok_and(|answer| answer.status().is_success()) {
                break;
            }
            assert!(tokio::time::Instant::now() < end, "{what}: not ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[test]
fn wrong_use_without_a_log_ends_with_its_exit_code() {
    for (what, stderr, _reader) in useless_stderrs() {
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-controller"));
        let status = command.args(["--listen", "nowhere"]).stderr(stderr).status().unwrap();
        assert_eq!(status.code(), Some(2), "{what}");
    }
}
