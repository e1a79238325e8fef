//! Backups of a running cluster and restores into a new one, by the command line, while drones of the old cluster live on.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, EventKind, LONG, binary, wait_until};
use holdfast_wire::http::ConnectResponse;
use holdfast_wire::{ApiError, ApiErrorKind, BackendStatus, TerminationReason};
use serde_json::{Value, json as value};
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

/// Kills every controller, and restores the first into a new directory, as the only member of a new cluster.
async fn restore(cluster: &mut Cluster, file: &Path) -> Value {
    cluster.controllers.iter_mut().for_each(|controller| controller.kill9());
    let dir = cluster.dir().join("restored").display().to_string();
    let (file, addr) = (file.display().to_string(), cluster.peer_addr(0));
    let restored = json(&["snapshot", "restore", &file, "--data-dir", &dir, "--advertise-peer", &addr]).await;
    cluster.controllers[0].set_flag("--data-dir", &dir);
    cluster.restart_controller(0);
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
        let restore = ["snapshot", "restore", &damaged_name, "--data-dir", &into, "--advertise-peer", "a:1"];
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
    let args = ["snapshot", "restore", &file_name, "--data-dir", &used, "--advertise-peer", "a:1"];
    let output = holdfast(&args).await;
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    assert!(said(&output).contains("in use"), "{}", said(&output));
    // Wrong use is told apart.
    let args = ["snapshot", "restore", &file_name, "--data-dir", &into, "--advertise-peer", "nonsense"];
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

    // One drone can't be reached any more: its backends live on to their hard deadline, and nobody can ask them not to.
    cluster.links[1].cut();
    let restored = restore(&mut cluster, &file).await;
    let began = Instant::now();
    let index = backup["index"].as_u64().unwrap();
    assert_eq!((restored["index"].as_u64(), restored["id"].as_u64()), (Some(index + JUMP), Some(1)));
    cluster.wait_controller(0).await;
    let new_cluster = cluster.info().await.cluster_id;
    assert!(new_cluster.is_some() && new_cluster != old_cluster);
    assert_eq!(restored["cluster_id"].as_str(), new_cluster.as_deref());
    cluster.wait_drone(0).await;

    // Each key is asked for again and again: refused with a reason and a time, and then acquired.
    let mut refusals = 0;
    let mut taken = Vec::new();
    let url = cluster.url(0);
    for (name, before) in &old {
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

    // A member of the old cluster is no member of the new one. Emptied, it is added under the next id.
    cluster.restart_controller(1);
    let addr = cluster.peer_addr(1);
    let refused = wait_until("the old member is refused by name", LONG, async || {
        let answer =
            cluster.http.post(&format!("{url}/ctrl/cluster/members"), &value!({"peer_addr": addr})).await;
        let error: ApiError = answer.read();
        if error.kind == ApiErrorKind::MemberIdUsed { Ok(error) } else { Err(answer) }
    })
    .await;
    assert!(refused.message.contains(old_cluster.as_deref().unwrap()), "{refused:?}");
    for (index, id) in [(1, 2), (2, 3)] {
        cluster.wipe(index);
        cluster.restart_controller(index);
        assert_eq!(cluster.add(index).await, id);
        cluster.wait_role(index, &["follower", "leader"]).await;
        cluster.wait_controller(index).await;
    }
    for (n, (name, answer)) in taken.iter().enumerate() {
        let seen: ConnectResponse =
            cluster.http.connect(&cluster.url(n % 3), &backend.request(name)).await.ok();
        assert_eq!((seen.spawned, seen.fencing_token), (false, answer.fencing_token), "{name}");
    }

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
