//! The compose file on this machine's container engine: `deploy/compose-test.sh`, where there is an engine.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The script's exit code where there is nothing to run it on.
const SKIPPED: i32 = 77;
/// Longest time for the whole script: it builds an image, waits for two leaders' deaths and several leases.
const WITHIN: Duration = Duration::from_secs(360);
/// Longest time for it to remove what it made, once it is told to end.
const TIDY_WITHIN: Duration = Duration::from_secs(60);

#[test]
fn three_controllers_and_two_drones_in_containers_survive_the_loss_of_their_leader() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut child = Command::new("bash")
        .args(["-c", "exec deploy/compose-test.sh 2>&1"])
        .current_dir(root)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .expect("bash");
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap());
    let output = BufReader::new(child.stdout.take().expect("its output"));
    let (lines, seen) = channel();
    let reader = std::thread::spawn(move || {
        for line in output.lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });

    let mut end = Instant::now() + WITHIN;
    let mut told_to_end = false;
    let mut last = String::new();
    loop {
        match seen.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                // Past the capture of the test's own output: it takes minutes, and somebody may be watching.
                let _ = writeln!(std::io::stderr(), "compose: {line}");
                last = line;
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if !told_to_end => {
                told_to_end = true;
                end = Instant::now() + TIDY_WITHIN;
                // To the script alone: it removes its containers when it ends.
                let _ = nix::sys::signal::kill(group, Signal::SIGTERM);
            }
            Err(RecvTimeoutError::Timeout) => {
                let _ = killpg(group, Signal::SIGKILL);
                break;
            }
        }
    }
    let status = child.wait().expect("its end");
    assert!(!told_to_end, "compose-test.sh did not end within {WITHIN:?}; it said last: {last}");
    reader.join().unwrap();
    match status.code() {
        Some(0) => {}
        Some(SKIPPED) => {
            let why = last.strip_prefix("SKIP: ").unwrap_or(&last);
            let _ = writeln!(std::io::stderr(), "SKIP: {why}");
        }
        _ => panic!("compose-test.sh ended with {status}; it said last: {last}"),
    }
}
