//! Backups of a running cluster and restores into a new one, by the command line, while drones of the old cluster live on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, EventKind, LONG, binary, wait_until};
use holdfast_wire::http::ConnectResponse;
use holdfast_wire::{ApiErrorKind, BackendStatus, TerminationReason};
use serde_json::Value;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

/// Ends a backend within seconds; a test waits for a full expiry.
const LEASE: &str = "renew=1s,soft=2s,hard=3s,expiry=4s";
const EXPIRY: Duration = Duration::from_secs(4);
/// How far a restore moves the log on.
const JUMP: u64 = 1 << 32;

async fn holdfast(args: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(binary("holdfast"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("HOLDFAST_")) {
        command.env_remove(name);
    }
    command.args(args).output().await.expect("the command line runs")
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A command that must succeed, with `--json`.
async fn json(args: &[&str]) -> Value {
    let output = holdfast(&[&["--json"], args].concat()).await;
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", said(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", said(&output)))
}

/// Peer addresses, as `--initial-cluster` has them.
async fn initial_cluster(cluster: &Cluster) -> String {
    let members = cluster.info().await.members;
    members.iter().map(|m| format!("{}={}", m.id, m.peer_addr)).collect::<Vec<_>>().join(",")
}

/// Kills every controller, restores each member into a new directory, and starts them on the old addresses.
async fn restore_all(cluster: &mut Cluster, file: &Path, initial: &str) -> Vec<Value> {
    cluster.controllers.iter_mut().for_each(|controller| controller.kill9());
    let mut restored = Vec::new();
    for index in 0..cluster.controllers.len() {
        let dir = cluster.dir().join(format!("restored-{}", index + 1)).display().to_string();
        let (id, file) = ((index + 1).to_string(), file.display().to_string());
        let args =
            ["snapshot", "restore", &file, "--data-dir", &dir, "--id", &id, "--initial-cluster", initial];
        restored.push(json(&args).await);
        cluster.controllers[index].set_flag("--data-dir", &dir);
    }
    for controller in &mut cluster.controllers {
        controller.start();
    }
    restored
}

#[tokio::test]
async fn a_backup_is_saved_from_any_member_checked_and_refused_when_damaged() {
    let cluster = Cluster::builder().start().await;
    for n in 0..5 {
        cluster.connect_ready(&format!("k{n}")).await;
    }
    let dir = cluster.dir();
    let leader = cluster.leader().await;
    for index in 0..3 {
        let file = dir.join(format!("backup-{index}")).display().to_string();
        let saved = json(&["--controller", &cluster.url(index), "snapshot", "save", &file]).await;
        let inspected = json(&["snapshot", "inspect", &file]).await;
        assert_eq!(saved["backup"], inspected, "member {} (the leader is {})", index + 1, leader + 1);
        assert_eq!(inspected["member"], index as u64 + 1);
        assert_eq!((inspected["keys_held"].as_u64(), inspected["drones"].as_u64()), (Some(5), Some(1)));
        assert_eq!(inspected["cluster_id"].as_str().map(str::to_owned), cluster.info().await.cluster_id);
    }
    let file = dir.join("backup-0");
    let text = holdfast(&["snapshot", "inspect", &file.display().to_string()]).await;
    for shown in ["keys held", "cluster time", "sha256", "(checked)"] {
        assert!(said(&text).contains(shown), "{}", said(&text));
    }
    // Secrets are in it.
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&file).unwrap());
    assert_eq!(mode & 0o077, 0, "others can read the backup");

    let whole = std::fs::read(&file).unwrap();
    let damaged = dir.join("damaged");
    let damaged_name = damaged.display().to_string();
    let mut flipped = whole.clone();
    flipped[whole.len() / 3] ^= 0x10;
    let into = dir.join("into").display().to_string();
    for (content, named) in [(flipped, "wrong checksum"), (whole[..whole.len() - 9].to_vec(), "cut off")] {
        std::fs::write(&damaged, content).unwrap();
        let restore = [
            "snapshot",
            "restore",
            &damaged_name,
            "--data-dir",
            &into,
            "--id",
            "1",
            "--initial-cluster",
            "1=a:1",
        ];
        for args in [&["snapshot", "inspect", &damaged_name][..], &restore] {
            let output = holdfast(args).await;
            assert_eq!(output.status.code(), Some(1), "{}", said(&output));
            let said = said(&output);
            assert!(said.contains(named) && said.contains(&damaged_name), "{said}");
        }
        assert!(!Path::new(&into).exists());
    }
    // A save that can't be done leaves an older file alone, and nothing beside it.
    let before: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    let file_name = file.display().to_string();
    let output =
        holdfast(&["--controller", "http://127.0.0.1:9", "--timeout", "1s", "snapshot", "save", &file_name])
            .await;
    assert_eq!(output.status.code(), Some(3), "{}", said(&output));
    assert_eq!(std::fs::read(&file).unwrap(), whole);
    let after: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(before.len(), after.len(), "{before:?} {after:?}");
    // The directory of a member is in use, and not empty.
    let used = dir.join("controller-1").display().to_string();
    let args =
        ["snapshot", "restore", &file_name, "--data-dir", &used, "--id", "1", "--initial-cluster", "1=a:1"];
    let output = holdfast(&args).await;
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("in use"), "{}", said(&output));
    // Wrong use is told apart.
    let args =
        ["snapshot", "restore", &file_name, "--data-dir", &into, "--id", "2", "--initial-cluster", "1=a:1"];
    assert_eq!(holdfast(&args).await.status.code(), Some(2));
}

#[tokio::test]
async fn no_key_gets_a_second_backend_after_a_restore_not_even_one_acquired_after_the_backup() {
    let mut cluster = Cluster::builder().drones(2).lease(LEASE).proxied_drones().start().await;
    let client = cluster.client();
    let file = cluster.dir().join("backup");
    let backend = cluster.backend().ignoring_sigterm();
    // In the backup; then more than it knows of, some of them on each drone.
    let mut old: Vec<(String, ConnectResponse)> = Vec::new();
    for (n, name) in (0..12).map(|n| (n, format!("k{n}"))) {
        if n == 4 {
            let name = file.display().to_string();
            json(&["--controller", &cluster.urls().join(","), "snapshot", "save", &name]).await;
        }
        let answer = client.connect(&backend.request(&name)).await.unwrap();
        cluster.assert_ready(&answer.backend_id).await;
        old.push((name, answer));
    }
    let backup = json(&["snapshot", "inspect", &file.display().to_string()]).await;
    assert_eq!(backup["keys_held"].as_u64(), Some(4));
    let on = |drone: &str| old.iter().filter(|(_, a)| a.drone.as_deref() == Some(drone)).count();
    assert!(on("dr-0") > 0 && on("dr-1") > 0, "both drones hold keys: {old:?}");
    let old_cluster = cluster.info().await.cluster_id;
    let initial = initial_cluster(&cluster).await;

    // One drone can't be reached any more: its backends live on to their hard deadline, and nobody can ask them not to.
    cluster.links[1].cut();
    let restored = restore_all(&mut cluster, &file, &initial).await;
    let began = Instant::now();
    let index = backup["index"].as_u64().unwrap();
    for member in &restored {
        assert_eq!(member["index"].as_u64(), Some(index + JUMP));
        assert_eq!(member["cluster_id_prefix"], restored[0]["cluster_id_prefix"]);
    }
    for index in 0..3 {
        cluster.wait_controller(index).await;
    }
    let new_cluster = cluster.info().await.cluster_id;
    assert!(new_cluster.is_some() && new_cluster != old_cluster);
    cluster.wait_drone(0).await;

    // Each key is asked for again and again, at any member: refused with a reason and a time, and then acquired anew.
    let mut refusals = 0;
    let mut taken = Vec::new();
    for (n, (name, before)) in old.iter().enumerate() {
        let url = cluster.url(n % 3);
        let answer = wait_until(&format!("{name} is acquired in the restored cluster"), LONG, async || {
            let answer = cluster.http.connect(&url, &backend.request(name)).await;
            if answer.status.is_success() {
                return Ok(answer.read::<ConnectResponse>());
            }
            let kind = answer.json()["kind"].as_str().unwrap_or_default().to_owned();
            if kind == "NoDroneAvailable" {
                return Err(answer);
            }
            let refused = answer.refused(ApiErrorKind::NoLeader);
            if refused.message.contains("restored from a backup") {
                refusals += 1;
                let after: u64 = answer.headers["retry-after"].to_str().unwrap().parse().unwrap();
                assert!((1..=4).contains(&after), "{answer:?}");
            }
            Err(answer)
        })
        .await;
        assert!(
            began.elapsed() >= EXPIRY - Duration::from_millis(100),
            "acquired after {:?}",
            began.elapsed()
        );
        assert!(answer.spawned && answer.fencing_token > before.fencing_token);
        assert!(answer.fencing_token > index + JUMP && answer.fencing_token < 1 << 53);
        assert_eq!(answer.drone.as_deref(), Some("dr-0"));
        taken.push((name.clone(), answer));
    }
    assert!(refusals > 0, "it never said why it refuses");
    for (_, answer) in &taken {
        cluster.assert_ready(&answer.backend_id).await;
    }
    cluster.journal.assert_no_overlap();

    // The other drone comes over: what it had was ended long ago, and it takes nothing from anybody.
    cluster.links[1].heal();
    cluster.wait_drone(1).await;
    for (name, answer) in &taken {
        let key = cluster.key(name).await.expect("held");
        assert_eq!((&key.backend, key.token), (&answer.backend_id, answer.fencing_token));
        let starts = cluster.journal.kinds(name).iter().filter(|kind| **kind == EventKind::Start).count();
        assert_eq!(starts, 2, "{name}: {:?}", cluster.journal.of_key(name));
    }
    cluster.journal.assert_no_overlap();
    // What the backup knew is told as lost.
    let lost = cluster.wait_status(&old[0].1.backend_id, BackendStatus::Terminated).await;
    assert_eq!(lost.termination_reason, Some(TerminationReason::Lost), "{lost:?}");
}
