//! Lease durations are the cluster's, not one controller's.

use holdfast_tests::harness::{Cluster, LONG, PortBlock, binary, wait_until};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::{Child, Command};

const SHORT_LEASE: &str = "renew=1s,soft=2500ms,hard=3500ms,expiry=5s";
const LONG_LEASE: &str = "renew=10s,soft=20s,hard=30s,expiry=40s";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_controllers_started_with_different_lease_durations_one_says_so_and_ends() {
    let mut ports = PortBlock::take();
    let dir = tempfile::tempdir().unwrap();
    let addrs: Vec<_> = (0..2).map(|_| (ports.give(), ports.give())).collect();
    let initial: Vec<_> = addrs.iter().zip(1..).map(|((_, peer), id)| format!("{id}={peer}")).collect();
    let leases = [SHORT_LEASE, LONG_LEASE];
    let mut children: Vec<Option<Child>> = Vec::new();
    for (index, (listen, peer)) in addrs.iter().enumerate() {
        let child = Command::new(binary("holdfast-controller"))
            .args(["--id", &(index + 1).to_string(), "--listen", &listen.to_string()])
            .args(["--peer-listen", &peer.to_string(), "--initial-cluster", &initial.join(",")])
            .args(["--lease", leases[index], "--log", "warn"])
            .arg("--data-dir")
            .arg(dir.path().join(format!("c{index}")))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        children.push(Some(child));
    }
    let loser = wait_until("one of the two ends", LONG, async || {
        children.iter_mut().position(|child| child.as_mut().unwrap().try_wait().unwrap().is_some()).ok_or(())
    })
    .await;
    let output = children[loser].take().unwrap().wait_with_output().await.unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    // In the form in which they were given, or any other of the same meaning.
    assert!(said.contains("expiry=5s") && said.contains("expiry=40s"), "both are named: {said}");
    // The other one is the cluster's, and goes on (it has no majority now, but no reason to end either).
    let other = children[1 - loser].as_mut().unwrap();
    assert!(other.try_wait().unwrap().is_none(), "both ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_restarted_with_other_lease_durations_refuses_and_with_the_right_ones_comes_back() {
    let mut cluster = Cluster::builder().drones(0).lease(SHORT_LEASE).start().await;
    let at = (cluster.leader().await + 1) % 3;
    cluster.controllers[at].kill9();
    cluster.controllers[at].set_flag("--lease", LONG_LEASE);
    cluster.controllers[at].start();
    let status = cluster.controllers[at].wait(LONG).await;
    let log = cluster.controllers[at].log();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.lines().any(|line| line.contains("expiry=5s") && line.contains("expiry=40s")), "{log}");
    // The others did not notice, and nothing of the cluster changed.
    let info = cluster.info().await;
    assert_eq!(info.lease.unwrap().expiry_ms, Duration::from_secs(5).as_millis() as u64);
    cluster.controllers[at].set_flag("--lease", SHORT_LEASE);
    cluster.restart_controller(at);
    cluster.wait_controller(at).await;
}
