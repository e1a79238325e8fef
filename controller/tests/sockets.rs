//! The drone socket's rules: names, sessions, bad frames.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Drone, Server, process};
use serde_json::json;
use std::time::Duration;
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn a_second_live_drone_of_a_name_is_refused_and_a_dead_ones_name_is_given_at_once() {
    let server = Server::start().await;
    let first = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    // Something has to answer the controller's ping.
    let first = first.in_background();
    assert_eq!(Drone::refused(&server, "dr-a", Some("two")).await, 4409);
    // No answer to a ping any more, but the connection stands: a machine that hangs.
    let hung = first.stop_reading().await;
    let second = Drone::connect(&server, "dr-a", Some("two"), "").await;
    server.wait_for_drone("dr-a").await;
    // The older socket learns it once it reads again.
    assert_eq!(hung.closed().await, 4409);
    drop(second);
    // A connection that is gone leaves the name at once.
    let _third = Drone::connect(&server, "dr-a", Some("three"), "").await;
    server.stop().await;
}

#[tokio::test]
async fn a_drone_that_reconnects_replaces_its_own_older_socket() {
    let server = Server::start().await;
    let first = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let (_, connected) =
        server.post("/ctrl/connect", &json!({"key": {"name": "k"}, "spawn_config": process()})).await;
    let mut second = Drone::connect(&server, "dr-a", Some("one"), "").await;
    assert_eq!(first.closed().await, 4409);
    // The same incarnation still gets its spawn.
    assert_eq!(second.next("Action").await["backend_id"], connected["backend_id"]);
    server.stop().await;
}

#[tokio::test]
async fn frames_that_are_no_messages_close_the_session_and_unknown_ones_do_not() {
    let server = Server::start().await;
    for frame in [
        Message::text("not json"),
        Message::text(r#"{"Heartbeat":{}}"#),
        Message::text("x".repeat((1 << 20) + 1)),
        Message::binary(vec![1, 2, 3]),
    ] {
        let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
        drone.send_raw(frame).await;
        assert_eq!(drone.closed().await, 4400);
    }
    for name in ["x", "dr-A", ""] {
        assert_eq!(Drone::refused(&server, name, None).await, 4400, "{name:?}");
    }
    let mut drone = Drone::connect(&server, "dr-a", None, "").await;
    drone.send(&json!({"FromTheFuture": {"x": 1}})).await;
    drone.send(&json!({"BackendMetrics": {"any": "thing"}})).await;
    drone.send(&json!({"RenewKey": {"backend": "ba-none", "local_time": 5}})).await;
    let response = drone.next("RenewKeyResponse").await;
    assert_eq!(response, json!({"backend": "ba-none", "deadlines": null}));
    assert_eq!(drone.next("Action").await["action"]["Terminate"]["kind"], "hard");
    server.stop().await;
}

#[tokio::test]
async fn a_connection_that_answers_nothing_is_closed_in_seconds() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::start().await;
    // A machine that was cut off answers no ping, and its end of the connection never says that it is gone.
    let mut raw = tokio::net::TcpStream::connect(server.addr).await.unwrap();
    let request = "GET /ctrl/c/127.0.0.1:9090/drone-socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    raw.write_all(request.as_bytes()).await.unwrap();
    let handshake = r#"{"version":{"version":"1","git_hash":"x"},"name":"dr-a"}"#;
    let length = u8::try_from(handshake.len()).unwrap();
    assert!(length < 126);
    // Masked with zeros.
    let frame = [&[0x81, 0x80 | length, 0, 0, 0, 0], handshake.as_bytes()].concat();
    raw.write_all(&frame).await.unwrap();
    let begun = std::time::Instant::now();
    let mut received = Vec::new();
    let end = Duration::from_secs(12);
    tokio::time::timeout(end, raw.read_to_end(&mut received)).await.unwrap().unwrap();
    assert!(begun.elapsed() > Duration::from_secs(4), "it was given time: {:?}", begun.elapsed());
    let told = received.windows(4).any(|bytes| bytes[0] == 0x88 && bytes[2..] == 4503_u16.to_be_bytes());
    assert!(told, "the reason is said, in case it still hears");
    // Its name is free for another.
    let _next = Drone::connect(&server, "dr-a", Some("two"), "").await;
    server.wait_for_drone("dr-a").await;
    server.stop().await;
}

#[tokio::test]
async fn half_a_frame_ends_the_session_and_nothing_else() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let server = Server::start().await;
    let mut raw = tokio::net::TcpStream::connect(server.addr).await.unwrap();
    let request = "GET /ctrl/c/127.0.0.1:9090/drone-socket HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\
                   sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    raw.write_all(request.as_bytes()).await.unwrap();
    let mut answer = [0; 1024];
    let read = raw.read(&mut answer).await.unwrap();
    assert!(answer[..read].starts_with(b"HTTP/1.1 101"));
    // A text frame that promises 100 bytes and brings 3.
    raw.write_all(&[0x81, 0x80 | 100, 1, 2, 3, 4, b'{', b'"', b'v']).await.unwrap();
    drop(raw);
    let _drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    server.stop().await;
}

#[tokio::test]
async fn a_drone_cannot_renew_anothers_key() {
    let server = Server::start().await;
    let _holder = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let (_, held) =
        server.post("/ctrl/connect", &json!({"key": {"name": "k"}, "spawn_config": process()})).await;
    let (_, before) = server.get("/ctrl/key?name=k").await;
    let mut other = Drone::connect(&server, "dr-b", Some("one"), "").await;
    let keys = json!([{"backend": held["backend_id"], "token": held["fencing_token"]}]);
    other.send(&json!({"RenewKeys": {"local_time": 5, "keys": keys}})).await;
    assert_eq!(other.next("RenewKeysResponse").await["keys"][0]["refused"], "not_holder");
    let (_, after) = server.get("/ctrl/key?name=k").await;
    assert_eq!(before["expires_at"], after["expires_at"]);
    server.stop().await;
}

#[tokio::test]
async fn a_stopping_controller_sends_its_drones_elsewhere() {
    let server = Server::start().await;
    let drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    let (closed, ()) = tokio::join!(drone.closed(), server.stop());
    assert_eq!(closed, 4503);
}

#[tokio::test]
async fn thousands_of_answers_at_once_reach_a_drone_that_reads_them() {
    const COUNT: usize = 6_000;
    let server = Server::start().await;
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    for at in 0..COUNT {
        drone.send(&json!({"RenewKey": {"backend": format!("ba-{at}"), "local_time": 5}})).await;
    }
    // Each has one, in whatever order: several entries are under way.
    let mut answered = std::collections::BTreeSet::new();
    for _ in 0..COUNT {
        let answer = drone.next("RenewKeyResponse").await;
        assert!(answered.insert(answer["backend"].as_str().unwrap().to_owned()), "{answer}: twice");
    }
    assert!((0..COUNT).all(|at| answered.contains(&format!("ba-{at}"))));
    drone.send(&json!({"RenewKeys": {"local_time": 5, "keys": []}})).await;
    drone.next("RenewKeysResponse").await;
    server.stop().await;
}

#[tokio::test]
async fn hundreds_of_due_actions_reach_a_drone_that_reads_them() {
    const COUNT: usize = 500;
    let server = Server::start().await;
    let first = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    drop(first);
    for at in 0..COUNT {
        let request = json!({"key": {"name": format!("k{at}")}, "spawn_config": process()});
        assert_eq!(server.post("/ctrl/connect", &request).await.0.as_u16(), 200);
    }
    let mut second = Drone::connect(&server, "dr-a", Some("one"), "").await;
    let begun = std::time::Instant::now();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < COUNT {
        seen.insert(second.next("Action").await["action_id"].to_string());
    }
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "one turn after the other, not one tick: {:?}",
        begun.elapsed()
    );
    server.stop().await;
}
