//! What a drone's list of backends brings about, over the socket.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Drone, LOCAL_TIME_MS, Server, process};
use serde_json::{Value, json};

const NAME: &str = "dr-a";
const ONE: Option<&str> = Some("one");

async fn connect(server: &Server, wait_ms: u64) -> (u16, Value) {
    let request = json!({"key": {"name": "k"}, "spawn_config": process(), "wait_ms": wait_ms});
    let (status, answer) = server.post("/ctrl/connect", &request).await;
    (status.as_u16(), answer)
}

/// A drone with one backend that is ready.
async fn with_a_backend(server: &Server) -> (Drone, String) {
    let mut drone = Drone::connect(server, NAME, ONE, "").await;
    server.wait_for_drone(NAME).await;
    let (status, connected) = connect(server, 0).await;
    assert_eq!(status, 200, "{connected}");
    let backend = connected["backend_id"].as_str().unwrap().to_owned();
    let action = drone.next("Action").await;
    drone.send(&json!({"AckAction": {"action_id": action["action_id"]}})).await;
    let ready = json!({"status": "ready", "address": "127.0.0.1:9"});
    drone.report(1, &backend, ready, connected["fencing_token"].as_u64().unwrap()).await;
    (drone, backend)
}

fn page(backends: &[&str], last: bool) -> Value {
    let backends: Vec<_> = backends.iter().map(|backend| json!({"backend": backend})).collect();
    json!({"Backends": {"backends": backends, "last": last}})
}

#[tokio::test]
async fn a_drone_is_not_chosen_before_its_list_and_is_served_meanwhile() {
    let server = Server::start().await;
    let mut drone = Drone::unlisted(&server, NAME, ONE, "").await;
    drone.send(&json!({"RenewKeys": {"local_time": 5, "keys": [{"backend": "ba-none", "token": 1}]}})).await;
    assert_eq!(drone.next("RenewKeysResponse").await["keys"][0]["refused"], "unknown");
    let (status, refused) = connect(&server, 0).await;
    assert_eq!((status, &refused["kind"]), (503, &json!("NoDroneAvailable")), "{refused}");
    // The order to end what holds no key comes after the list.
    drone.send(&page(&[], true)).await;
    drone.next("AckBackends").await;
    assert_eq!(drone.next("Action").await["backend_id"], "ba-none");
    server.wait_for_drone(NAME).await;
    assert_eq!(connect(&server, 0).await.0, 200);
    // There is one list in a session.
    drone.send(&page(&[], true)).await;
    assert_eq!(drone.closed().await, 4400);
    server.stop().await;
}

#[tokio::test]
async fn a_list_takes_effect_with_its_last_page_and_an_interrupted_one_not() {
    let server = Server::start().await;
    let (drone, backend) = with_a_backend(&server).await;
    drop(drone);
    // Interrupted before the page that names the backend.
    let mut drone = Drone::unlisted(&server, NAME, ONE, "").await;
    drone.send(&page(&["ba-x"], false)).await;
    drone.next("AckBackends").await;
    drop(drone);
    // Repeated to the end.
    let mut drone = Drone::unlisted(&server, NAME, ONE, "").await;
    drone.send(&page(&["ba-x"], false)).await;
    drone.next("AckBackends").await;
    drone.send(&page(&[&backend], true)).await;
    drone.next("AckBackends").await;
    assert_eq!(drone.next("Action").await["backend_id"], "ba-x", "it holds no key");
    let (status, found) = connect(&server, 0).await;
    assert_eq!((status, &found["backend_id"]), (200, &json!(backend)));
    drop(drone);
    // A complete list without it: a connect waits, and a report that it lives is answered by its end.
    let mut drone = Drone::connect(&server, NAME, ONE, "").await;
    let (status, held) = connect(&server, 0).await;
    assert_eq!((status, &held["kind"]), (409, &json!("KeyHeld")), "{held}");
    let ready = json!({"status": "ready", "address": "127.0.0.1:9"});
    drone.report(2, &backend, ready, found["fencing_token"].as_u64().unwrap()).await;
    let action = drone.next("Action").await;
    assert_eq!(
        (&action["backend_id"], &action["action"]["Terminate"]["kind"]),
        (&json!(backend), &json!("hard"))
    );
    server.stop().await;
}

#[tokio::test]
async fn an_acknowledged_end_is_asked_for_again_after_the_list_and_by_a_repeat() {
    let server = Server::start().await;
    let (mut drone, backend) = with_a_backend(&server).await;
    let path = format!("/ctrl/b/{backend}/soft-terminate");
    for _ in 0..2 {
        assert_eq!(server.post(&path, &Value::Null).await.0.as_u16(), 200);
        let action = drone.next("Action").await;
        assert_eq!(action["action"]["Terminate"], json!({"kind": "soft", "reason": "external"}));
        drone.send(&json!({"AckAction": {"action_id": action["action_id"]}})).await;
        // Recorded once a later report is.
        drone.send(&json!({"RenewKeys": {"local_time": 5, "keys": []}})).await;
        drone.next("RenewKeysResponse").await;
        server.wait_until_no_action(NAME).await;
    }
    drop(drone);
    let mut drone = Drone::unlisted(&server, NAME, Some("two"), "").await;
    drone.send(&page(&[&backend], true)).await;
    drone.next("AckBackends").await;
    let action = drone.next("Action").await;
    assert_eq!(action["action"]["Terminate"], json!({"kind": "soft", "reason": "external"}));
    server.stop().await;
}

#[tokio::test]
async fn a_spawn_is_handed_to_the_next_process_on_the_same_disk_only() {
    for (disk, is_same) in [("disk of dr-a", true), ("another", false)] {
        let server = Server::start().await;
        let first = Drone::connect(&server, NAME, ONE, "").await;
        server.wait_for_drone(NAME).await;
        drop(first);
        let (status, connected) = connect(&server, 0).await;
        assert_eq!(status, 200, "{connected}");
        let mut second = Drone::connect_on(&server, NAME, "two", disk).await;
        let (status, again) = connect(&server, 0).await;
        if is_same {
            let action = second.next("Action").await;
            assert_eq!(action["backend_id"], connected["backend_id"]);
            let spawn = &action["action"]["Spawn"];
            assert_eq!(spawn["incarnation"], "two");
            let hard = spawn["key"]["deadlines"]["hard_terminate_at"].as_i64().unwrap();
            let latest = LOCAL_TIME_MS + i64::try_from(server.lease.hard_terminate_ms).unwrap();
            assert!(hard <= latest, "never later than the acquisition's: {hard} after {latest}");
            assert_eq!((status, &again["backend_id"]), (200, &connected["backend_id"]));
        } else {
            assert_eq!((status, &again["kind"]), (409, &json!("KeyHeld")), "{again}");
        }
        server.stop().await;
    }
}
