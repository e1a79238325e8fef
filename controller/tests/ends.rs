//! How backends end without anybody asking for each: lost drones, drains, limits, shutdown.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{CLUSTER, Drone, Server, process};
use serde_json::{Value, json};
use std::time::Duration;

/// Keys expire within seconds.
const SHORT_LEASE: &str = "renew=1s,soft=2s,hard=3s,expiry=4s";

fn drain_path(drone: &str) -> String {
    format!("/ctrl/c/{CLUSTER}/d/{drone}/drain")
}

fn ready() -> Value {
    json!({"status": "ready", "address": "127.0.0.1:4000"})
}

fn terminated() -> Value {
    json!({"status": "terminated", "last_status": "ready", "exit_code": 0})
}

/// Acquires a key with these limits; gives its backend and token once the drone has the spawn and is ready.
async fn start(server: &Server, drone: &mut Drone, key: &str, limits: Value) -> (String, u64) {
    let mut spawn = process();
    spawn.as_object_mut().unwrap().extend(limits.as_object().unwrap().clone());
    let request = json!({"key": {"name": key}, "spawn_config": spawn});
    let (status, connected) = server.post("/ctrl/connect", &request).await;
    assert_eq!(status.as_u16(), 200, "{connected}");
    let id = connected["backend_id"].as_str().unwrap().to_owned();
    let token = connected["fencing_token"].as_u64().unwrap();
    let action = drone.next("Action").await;
    assert_eq!((&action["backend_id"], action["action"].get("Spawn").is_some()), (&json!(id), true));
    drone.send(&json!({"AckAction": {"action_id": action["action_id"]}})).await;
    drone.report(1, &id, ready(), token).await;
    (id, token)
}

/// The next action, which must be a graceful end for want of a reason of its own.
async fn swept(drone: &mut Drone) -> String {
    let action = drone.next("Action").await;
    assert_eq!(action["action"], json!({"Terminate": {"kind": "soft", "reason": "swept"}}), "{action}");
    drone.send(&json!({"AckAction": {"action_id": action["action_id"]}})).await;
    action["backend_id"].as_str().unwrap().to_owned()
}

async fn drone_row(server: &Server) -> Value {
    server.get("/ctrl/drones").await.1["drones"][0].clone()
}

#[tokio::test]
async fn backends_of_a_drone_that_never_comes_back_end_as_lost_by_themselves() {
    let server = Server::start_with_lease(SHORT_LEASE).await;
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let (running, token) = start(&server, &mut drone, "running", json!({})).await;
    let (ending, ending_token) = start(&server, &mut drone, "ending", json!({})).await;
    let state =
        json!({"status": "terminating", "last_status": "ready", "termination": "soft", "reason": "external"});
    drone.report(2, &ending, state, ending_token).await;
    drone.send(&json!({"Heartbeat": {"local_time": 1_000_100}})).await;
    // Answered in order: the heartbeat is on its way to an entry when this is.
    drone.send(&json!({"RenewKeys": {"local_time": 1_000_100, "keys": []}})).await;
    drone.next("RenewKeysResponse").await;
    // Nobody is there to take this one.
    let request = json!({"key": {"name": "undelivered"}, "spawn_config": process()});
    let (status, connected) = server.post("/ctrl/connect", &request).await;
    drop(drone);
    assert_eq!(status.as_u16(), 200, "{connected}");
    let undelivered = connected["backend_id"].as_str().unwrap().to_owned();
    for id in [&running, &ending, &undelivered] {
        // It ends with the last status.
        let stream = server.text(&format!("/pub/b/{id}/status-stream"), &[]).await;
        let last = stream.lines().rfind(|line| line.starts_with("data:")).unwrap();
        let last: Value = serde_json::from_str(last.trim_start_matches("data:")).unwrap();
        assert_eq!((&last["status"], &last["termination_reason"]), (&json!("terminated"), &json!("lost")));
        let (_, status) = server.get(&format!("/pub/b/{id}/status")).await;
        assert_eq!(status, last);
    }
    assert_eq!(server.get("/ctrl/keys").await.1["keys"], json!([]));
    assert_eq!(drone_row(&server).await["backend_count"], 0);

    // It comes back, and what it says of its lost backend is heard and changes nothing.
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    let action = drone.next("Action").await;
    assert_eq!(action["action"], json!({"Terminate": {"kind": "hard", "reason": "keyexpired"}}));
    for (event_id, state) in [(1, ready()), (2, terminated())] {
        drone.report(event_id, &running, state, token).await;
        let (_, status) = server.get(&format!("/pub/b/{running}/status")).await;
        assert_eq!(
            (&status["status"], &status["termination_reason"]),
            (&json!("terminated"), &json!("lost"))
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn a_drain_ends_what_is_left_at_its_deadline_and_counts_down() {
    let server = Server::start().await;
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let (id, token) = start(&server, &mut drone, "k", json!({})).await;
    for (body, named) in [
        (json!({"deadline_ms": -1}), "deadline_ms"),
        (json!({"deadline_ms": 1_u64 << 40}), "deadline_ms"),
        (json!({"deadline_ms": 1, "undo": true}), "deadline_ms"),
        (json!({"undo": "x"}), "undo"),
    ] {
        let (status, failure) = server.post(drain_path("dr-a"), &body).await;
        assert_eq!(status.as_u16(), 400, "{body}");
        assert!(failure["message"].as_str().unwrap().starts_with(named), "{failure}");
    }
    assert_eq!(drone_row(&server).await["draining"], false);
    // As Plane asks, and undone.
    for (body, updated) in [
        (Value::Null, true),
        (json!({}), false),
        (json!({"undo": true}), true),
        (json!({"undo": true}), false),
    ] {
        let (_, answer) = server.post(drain_path("dr-a"), &body).await;
        assert_eq!(answer, json!({"updated": updated, "remaining": 1}), "{body}");
    }
    let (_, answer) = server.post(drain_path("dr-a"), &json!({"deadline_ms": 100})).await;
    assert_eq!(answer, json!({"updated": true, "remaining": 1}));
    let row = drone_row(&server).await;
    assert_eq!(
        (&row["draining"], &row["ready"], &row["backend_count"]),
        (&json!(true), &json!(false), &json!(1))
    );
    let (_, state) = server.get(&format!("/ctrl/c/{CLUSTER}/state")).await;
    assert_eq!(state["drones"][0]["drain_deadline"], row["drain_deadline"]);
    assert!(row["drain_deadline"].is_u64());
    assert_eq!(swept(&mut drone).await, id);
    drone.report(2, &id, terminated(), token).await;
    let (_, answer) = server.post(drain_path("dr-a"), &Value::Null).await;
    assert_eq!(answer, json!({"updated": false, "remaining": 0}));
    server.stop().await;
}

#[tokio::test]
async fn limits_end_a_backend_and_connections_keep_it() {
    let server = Server::start().await;
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let (free, free_token) = start(&server, &mut drone, "free", json!({})).await;
    let idle_limit = json!({"max_idle_seconds": 1, "lifetime_limit_seconds": 3600});
    let (busy, busy_token) = start(&server, &mut drone, "busy", idle_limit.clone()).await;
    let activity = |id: i64, items: &[(&str, u64, Option<u64>)]| {
        let item = |(backend, token, idle_ms): &(&str, u64, Option<u64>)| {
            let connections = if idle_ms.is_some() { 0 } else { 2 };
            json!({"backend": backend, "token": token, "connections": connections, "idle_ms": idle_ms.unwrap_or(0)})
        };
        json!({"BackendActivity": {"activity_id": id, "backends": items.iter().map(item).collect::<Vec<_>>()}})
    };
    drone.send(&activity(1, &[(&busy, busy_token, None), (&free, free_token, Some(5_000))])).await;
    assert_eq!(drone.next("AckActivity").await, json!({"activity_id": 1}));
    let (idle, idle_token) = start(&server, &mut drone, "idle", idle_limit).await;
    let (old, _) = start(&server, &mut drone, "old", json!({"lifetime_limit_seconds": 1})).await;
    // Time alone ends no idle backend: the drone is asked to look again when the limit is due.
    drone.send(&activity(2, &[(&idle, idle_token, Some(0))])).await;
    let acknowledged = drone.next("AckActivity").await;
    let again = &acknowledged["again"][0];
    let in_ms = again["in_ms"].as_u64().unwrap();
    assert!(again["backend"] == json!(idle) && (1..=1000).contains(&in_ms), "{acknowledged}");
    tokio::time::sleep(Duration::from_millis(in_ms + 50)).await;
    drone.send(&activity(3, &[(&idle, idle_token, Some(in_ms + 50))])).await;
    let mut ended = [swept(&mut drone).await, swept(&mut drone).await];
    ended.sort();
    let mut expected = [idle, old];
    expected.sort();
    assert_eq!(ended, expected, "and neither the busy one nor the one without a limit");
    let (_, listed) = server.get(&format!("/ctrl/backends?prefix={busy}")).await;
    assert_eq!(listed["backends"][0].get("termination_reason"), None, "{listed}");
    drone.send(&activity(4, &[(&busy, busy_token, Some(1_000))])).await;
    assert_eq!(swept(&mut drone).await, busy);
    // Nothing of it is for drones that nobody asked: it is acknowledged all the same.
    drone.send(&activity(5, &[(&free, free_token, None)])).await;
    while drone.next("AckActivity").await["activity_id"] != 5 {}
    server.stop().await;
}

#[tokio::test]
async fn a_drone_that_shuts_down_takes_nothing_more_and_its_successor_does() {
    let server = Server::start().await;
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    // Said again, it is acknowledged again.
    for _ in 0..2 {
        drone.send(&json!({"Draining": {}})).await;
        drone.next("AckDraining").await;
    }
    let row = drone_row(&server).await;
    assert_eq!((&row["draining"], &row["stopping"]), (&json!(true), &json!(true)));
    let request = json!({"key": {"name": "k"}, "spawn_config": process()});
    let (status, refused) = server.post("/ctrl/connect", &request).await;
    assert_eq!((status.as_u16(), &refused["kind"]), (503, &json!("NoDroneAvailable")), "{refused}");
    drop(drone);
    let mut successor = Drone::connect(&server, "dr-a", Some("two"), "").await;
    server.wait_for_drone("dr-a").await;
    assert_eq!(drone_row(&server).await.get("stopping"), None);
    start(&server, &mut successor, "k", json!({})).await;
    server.stop().await;
}

#[tokio::test]
async fn a_report_of_a_drone_that_does_not_hold_the_backend_is_acknowledged_and_changes_nothing() {
    let server = Server::start().await;
    let mut holder = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let (id, token) = start(&server, &mut holder, "k", json!({})).await;
    let mut other = Drone::connect(&server, "dr-b", Some("one"), "").await;
    other.report(1, &id, terminated(), token).await;
    // Nor does the holder's own word under another token count.
    holder.report(2, &id, terminated(), token + 1).await;
    let (_, status) = server.get(&format!("/pub/b/{id}/status")).await;
    assert_eq!(status["status"], "ready");
    assert_eq!(server.get("/ctrl/key?name=k").await.1["backend"], json!(id));
    server.stop().await;
}

#[tokio::test]
async fn a_drain_and_a_limit_outlast_the_leader_that_took_them() {
    let servers = Server::start_cluster(3).await;
    let leader = servers.iter().position(|server| server.store.status().is_leader).unwrap();
    let follower = &servers[(leader + 1) % 3];
    let mut drone = Drone::connect(follower, "dr-a", Some("one"), "").await;
    for server in &servers {
        server.wait_for_drone("dr-a").await;
    }
    let (limited, token) = start(follower, &mut drone, "a", json!({"lifetime_limit_seconds": 2})).await;
    let (drained, _) = start(follower, &mut drone, "b", json!({})).await;
    let (_, answer) = servers[leader].post(drain_path("dr-a"), &json!({"deadline_ms": 3_500})).await;
    assert_eq!(answer, json!({"updated": true, "remaining": 2}));
    servers[leader].stop().await;
    assert_eq!(swept(&mut drone).await, limited);
    drone.report(2, &limited, terminated(), token).await;
    assert_eq!(drone_row(follower).await["backend_count"], 1);
    assert_eq!(swept(&mut drone).await, drained);
    for at in (0..3).filter(|at| *at != leader) {
        servers[at].stop().await;
    }
}
