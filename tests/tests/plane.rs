//! Drones of Plane's make, which know nothing of Holdfast.
//!
//! The client here has message types of its own, written from Plane 0.5.6's, and behaves as Plane's drone does where the
//! controllers can notice: it reports `scheduled` before anything else, renews each key once and by itself without a
//! token, does not acknowledge a spawn it has already had, and replays all unacknowledged events after a reconnection.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

#[path = "plane/drone.rs"]
mod drone;

#[path = "plane/types.rs"]
mod types;

use drone::PlaneDrone;
use holdfast_tests::harness::{Cluster, LONG, SHORT, wait_until};
use holdfast_wire::BackendStatus;
use serde_json::{Value, json};
use types::{BackendAction, MessageToDrone, TerminationKind, TerminationReason};

const LEASE: &str = "renew=600ms,soft=2s,hard=2500ms,expiry=3s";
const EXPIRY_MS: u64 = 3_000;

/// Everything that Plane's Docker executor knows.
fn docker_executable() -> Value {
    json!({
        "image": "registry.local/app:1",
        "pull_policy": "IfNotPresent",
        "credentials": {"username": "u", "password": "p"},
        "env": {"A": "1"},
        "resource_limits": {
            "cpu_period": 100_000, "cpu_period_percent": 50, "cpu_time_limit": 60,
            "memory_limit_bytes": 10_000_000, "disk_limit_bytes": null,
        },
        "mount": true,
        "network_name": "net",
    })
}

/// As Plane's client asks.
async fn connect(cluster: &Cluster, key: &str, executable: &Value) -> Value {
    let body = json!({
        "key": {"name": key, "namespace": "", "tag": ""},
        "spawn_config": {
            "id": null, "cluster": cluster.name, "pool": "", "executable": executable,
            "lifetime_limit_seconds": null, "max_idle_seconds": null, "use_static_token": true, "subdomain": null,
        },
        "user": null,
        "auth": {},
    });
    wait_until("a connect succeeds", LONG, async || {
        let answer = cluster.http.post(&format!("{}/ctrl/connect", cluster.url(0)), &body).await;
        if answer.status.is_success() { Ok(answer.json()) } else { Err(answer) }
    })
    .await
}

/// Waits, while the drone goes on, until the controllers say this of a backend.
async fn status(cluster: &Cluster, plane: &mut PlaneDrone, backend: &str, status: BackendStatus) {
    tokio::select! {
        _ = cluster.wait_status(backend, status) => {}
        () = plane.go_on() => {}
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drone_of_planes_make_runs_backends_from_spawn_to_both_kinds_of_end() {
    let cluster = Cluster::builder().drones(0).lease(LEASE).start().await;
    let mut plane = PlaneDrone::connect(&cluster.url(1), &cluster.name, "dr-plane").await;
    let process = json!({"command": ["/bin/app", "--flag"], "env": {"A": "1"}, "cwd": "/"});
    let ends = [
        ("docker", docker_executable(), "soft-terminate", TerminationKind::Soft, Some(0), 3),
        ("process", process, "hard-terminate", TerminationKind::Hard, None, 1),
    ];
    for (key, executable, path, kind, exit_code, expiries) in ends {
        let answer = tokio::select! {
            answer = connect(&cluster, key, &executable) => answer,
            () = plane.go_on() => unreachable!("it goes on until it is dropped"),
        };
        let backend = answer["backend_id"].as_str().unwrap().to_owned();
        let token = answer["fencing_token"].as_i64().unwrap();
        plane.until("the spawn", SHORT, |plane| plane.has(&backend)).await;
        let spawn = plane.action(&backend);
        assert!(spawn.action_id.starts_with("ak-"), "Plane's prefix of actions: {spawn:?}");
        let BackendAction::Spawn { executable: sent, key: acquired, static_token } = &spawn.action else {
            panic!("{spawn:?}");
        };
        // What Plane's runtime reads must be there; fields that were left out may be filled in.
        for (name, value) in executable.as_object().unwrap() {
            assert_eq!(&sent[name], value, "{name} in {sent}");
        }
        assert_eq!((acquired.key.name.as_str(), acquired.token), (key, token));
        assert!(static_token.as_ref().is_some_and(|token| answer["token"] == json!(token)), "{spawn:?}");

        // It is reported ready, and reached through what connect says.
        status(&cluster, &mut plane, &backend, BackendStatus::Ready).await;
        plane.until("all reports are acknowledged", SHORT, |plane| plane.unacknowledged() == 0).await;
        let again = connect(&cluster, key, &executable).await;
        assert_eq!((&again["backend_id"], &again["spawned"]), (&answer["backend_id"], &json!(false)));
        let address = again["address"].as_str().unwrap_or_else(|| panic!("no address in {again}"));
        let page = cluster.http.get(&format!("http://{address}/")).await;
        assert_eq!((page.status.as_u16(), page.text.as_str()), (200, drone::PAGE));

        // Renewed past several expiries, one key at a time, without a token.
        let acquired_at = cluster.key(key).await.unwrap().acquired_at;
        let renewed = async {
            wait_until("renewed past several expiries", LONG, async || {
                let held = cluster.key(key).await.unwrap();
                assert_eq!((held.token.cast_signed(), &held.backend), (token, &backend));
                if held.expires_at > acquired_at + (expiries + 1) * EXPIRY_MS { Ok(()) } else { Err(held) }
            })
            .await;
        };
        tokio::select! {
            () = renewed => {}
            () = plane.go_on() => {}
        }
        assert!(plane.renewals(&backend) > expiries, "{} renewals", plane.renewals(&backend));

        let url = format!("{}/ctrl/b/{backend}/{path}", cluster.url(2));
        assert_eq!(cluster.http.post(&url, &json!(null)).await.ok::<Value>(), json!(null));
        plane.exit_code = exit_code;
        plane.until("the end", SHORT, |plane| !plane.has(&backend)).await;
        let end = plane.action(&backend);
        assert!(
            matches!(&end.action, BackendAction::Terminate { kind: is, reason: TerminationReason::External } if *is == kind),
            "{end:?}"
        );
        status(&cluster, &mut plane, &backend, BackendStatus::Terminated).await;
        plane.until("all reports are acknowledged", SHORT, |plane| plane.unacknowledged() == 0).await;
        assert_eq!(cluster.key(key).await, None, "terminated frees the key");
        let info = cluster.client().backend(&backend).await.unwrap().unwrap();
        assert_eq!(info.exit_code, exit_code);
        let url = format!("{}/pub/b/{backend}/status", cluster.url(0));
        let public: Value = cluster.http.get(&url).await.ok();
        let kind = if kind == TerminationKind::Soft { "soft" } else { "hard" };
        assert_eq!(
            (&public["status"], &public["termination_kind"], &public["termination_reason"]),
            (&json!("terminated"), &json!(kind), &json!("external"))
        );
        // Plane says false for one without an exit code; we leave it out, which its clients read as well.
        assert_ne!(public["exit_error"], json!(true), "{public}");
    }
    assert_eq!(plane.lapsed, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drone_of_planes_make_reconnects_and_keeps_what_it_holds() {
    let cluster = Cluster::builder().drones(0).lease(LEASE).start().await;
    let mut plane = PlaneDrone::connect(&cluster.url(0), &cluster.name, "dr-plane").await;
    plane.acknowledges = false;
    let executable = docker_executable();
    let answer = tokio::select! {
        answer = connect(&cluster, "k", &executable) => answer,
        () = plane.go_on() => unreachable!("it goes on until it is dropped"),
    };
    let backend = answer["backend_id"].as_str().unwrap().to_owned();
    plane.until("the spawn", SHORT, |plane| plane.has(&backend)).await;
    // Plane's drone reconnects now and then by itself, here with an acknowledgement and reports that never arrived.
    for round in 1..=3 {
        plane.reconnect(&cluster.url(round % 3)).await;
        status(&cluster, &mut plane, &backend, BackendStatus::Ready).await;
        plane.until("replayed events are acknowledged", SHORT, |plane| plane.unacknowledged() == 0).await;
        let before = plane.renewals(&backend);
        plane
            .until("it is renewed in the new session", SHORT, |plane| plane.renewals(&backend) > before)
            .await;
        let held = cluster.key("k").await.unwrap();
        assert_eq!(held.token, answer["fencing_token"].as_u64().unwrap());
    }
    // A spawn that is over must not come again, though Plane's drone has never acknowledged it.
    let spawns = plane.received.iter().filter(
        |message| matches!(message, MessageToDrone::Action(a) if matches!(a.action, BackendAction::Spawn { .. })),
    );
    let spawns = spawns.count();
    assert!(spawns <= 2, "the spawn came {spawns} times");
    assert_eq!(plane.lapsed, Vec::<String>::new());

    // Plane's drone opens its new session while the old one is still open and answers pings, and has no other chance: it
    // closes the old one only when it has the new one.
    let mut newer = PlaneDrone::connect(&cluster.url(0), &cluster.name, "dr-plane").await;
    plane.until_closed(SHORT).await;
    newer.take_over(&plane);
    let before = newer.renewals(&backend);
    newer.until("it is renewed by the newer", SHORT, |plane| plane.renewals(&backend) > before).await;

    // A new process of Plane's ends what its predecessor ran, and then says so.
    let restarted = newer.restarted();
    drop(newer);
    let mut plane = PlaneDrone::connect(&cluster.url(2), &cluster.name, "dr-plane").await;
    plane.replay(restarted).await;
    status(&cluster, &mut plane, &backend, BackendStatus::Terminated).await;
    plane.until("all reports are acknowledged", SHORT, |plane| plane.unacknowledged() == 0).await;
    assert_eq!(cluster.key("k").await, None);
    // And what it does not hold is not renewed.
    let refused = plane.renew(&backend).await;
    assert_eq!(refused.deadlines, None, "{refused:?}");
}
