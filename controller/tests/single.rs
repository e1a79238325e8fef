//! A controller of one member on a real store, driven over HTTP and WebSockets.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Drone, Server, process};
use holdfast_controller::token;
use reqwest::StatusCode;
use serde_json::{Value, json};
use std::time::Duration;

fn body(key: &str) -> Value {
    json!({"key": {"name": key}, "spawn_config": process()})
}

fn kind(answer: &Value) -> &str {
    answer["kind"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_key_is_acquired_found_and_freed_by_its_backends_end() {
    let server = Server::start().await;
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;

    let (status, first) = server.post("/ctrl/connect", &body("k")).await;
    assert_eq!(status, StatusCode::OK, "{first}");
    assert_eq!(first["spawned"], true);
    assert_eq!(first["status"], "scheduled");
    assert_eq!(first["drone"], "dr-a");
    let backend = first["backend_id"].as_str().unwrap().to_owned();
    let fencing = first["fencing_token"].as_u64().unwrap();
    assert!(fencing > 0 && backend.starts_with("ba-"));
    assert_eq!(first["url"], format!("http://127.0.0.1:9090/{}/", first["token"].as_str().unwrap()));
    let cluster = server.store.local().view.cluster().unwrap().unwrap();
    let payload = token::verify(&cluster.token_secret, first["token"].as_str().unwrap(), 0, |_, _| false);
    assert_eq!(payload.unwrap().backend_id, backend);

    let action = drone.next("Action").await;
    assert_eq!(action["backend_id"], backend);
    assert_eq!(action["action"]["Spawn"]["key"]["token"], fencing);
    assert_eq!(action["action"]["Spawn"]["executable"], process()["executable"]);
    let deadlines = &action["action"]["Spawn"]["key"]["deadlines"];
    let local_time = deadlines["renew_at"].as_i64().unwrap() - 60_000;
    assert!(local_time >= common::LOCAL_TIME_MS, "{deadlines}");
    drone.send(&json!({"AckAction": {"action_id": action["action_id"]}})).await;

    let (_, again) = server.post("/ctrl/connect", &body("k")).await;
    assert_eq!(again["spawned"], false);
    assert_eq!(
        (&again["backend_id"], &again["fencing_token"]),
        (&first["backend_id"], &first["fencing_token"])
    );

    let (status, other_tag) = server
        .post("/ctrl/connect", &json!({"key": {"name": "k", "tag": "t"}, "spawn_config": process()}))
        .await;
    assert_eq!((status, kind(&other_tag)), (StatusCode::CONFLICT, "KeyHeld"));

    drone.report(1, &backend, json!({"status": "loading"}), fencing).await;
    drone.report(2, &backend, json!({"status": "ready", "address": "127.0.0.1:5"}), fencing).await;
    let (_, ready) = server.post("/ctrl/connect", &body("k")).await;
    assert_eq!((&ready["status"], &ready["address"]), (&json!("ready"), &json!("127.0.0.1:5")));

    drone
        .send(&json!({"RenewKeys": {"local_time": 7_000_000, "keys": [
            {"backend": backend, "token": fencing}, {"backend": "ba-none", "token": 1}]}}))
        .await;
    let renewed = drone.next("RenewKeysResponse").await;
    assert_eq!(
        renewed["keys"],
        json!([{"backend": backend, "deadlines": {"renew_at": 7_060_000, "soft_terminate_at": 7_070_000,
                "hard_terminate_at": 7_080_000}}, {"backend": "ba-none", "refused": "unknown"}])
    );
    let end = drone.next("Action").await;
    assert_eq!(
        (&end["backend_id"], &end["action"]["Terminate"]["kind"]),
        (&json!("ba-none"), &json!("hard"))
    );

    // Asked to end: a connect waits for the release, then gets a new backend with a larger token.
    let (status, null) =
        server.post("/ctrl/b/".to_owned() + &backend + "/soft-terminate", &Value::Null).await;
    assert_eq!((status, null), (StatusCode::OK, Value::Null));
    let end = drone.next("Action").await;
    assert_eq!(end["action"]["Terminate"], json!({"kind": "soft", "reason": "external"}));
    let mut impatient = body("k");
    impatient["wait_ms"] = json!(50);
    let (status, held) = server.post("/ctrl/connect", &impatient).await;
    assert_eq!((status, kind(&held)), (StatusCode::CONFLICT, "KeyHeld"));
    assert!(held["message"].as_str().unwrap().contains("going away"), "{held}");
    let mut waiting = tokio::spawn({
        let server = server.clone();
        async move { server.post("/ctrl/connect", &body("k")).await }
    });
    // An answer within this time would be one that did not wait.
    let early = tokio::time::timeout(Duration::from_millis(100), &mut waiting).await;
    assert!(early.is_err(), "{early:?}");
    let terminated = json!({"status": "terminated", "last_status": "ready", "termination": "soft", "reason": "external", "exit_code": 0});
    drone.report(3, &backend, terminated, fencing).await;
    let (status, next) = waiting.await.unwrap();
    assert_eq!((status, &next["spawned"]), (StatusCode::OK, &json!(true)), "{next}");
    assert!(next["fencing_token"].as_u64().unwrap() > fencing);

    // The whole story as a stream that ends by itself, and its rest.
    let stream = server.text(&format!("/pub/b/{backend}/status-stream"), &[]).await;
    let ids: Vec<&str> =
        stream.lines().filter_map(|line| line.strip_prefix("id: ").or(line.strip_prefix("id:"))).collect();
    assert_eq!(ids, ["scheduled", "loading", "ready", "terminated"], "{stream}");
    assert!(stream.contains(r#""exit_error":false"#), "{stream}");
    let rest = server.text(&format!("/pub/b/{backend}/status-stream"), &[("last-event-id", "ready")]).await;
    assert_eq!(rest.matches("id:").count(), 1, "{rest}");
    let (_, status) = server.get(&format!("/pub/b/{backend}/status")).await;
    assert_eq!((&status["status"], &status["termination_kind"]), (&json!("terminated"), &json!("soft")));
    server.stop().await;
}

#[tokio::test]
async fn sixty_four_connects_to_one_free_key_start_one_backend() {
    let server = Server::start().await;
    let _drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let connects = (0..64).map(|_| {
        let server = server.clone();
        tokio::spawn(async move { server.post("/ctrl/connect", &body("same")).await })
    });
    let answers = futures::future::join_all(connects).await;
    let answers: Vec<Value> = answers.into_iter().map(|answer| answer.unwrap().1).collect();
    assert_eq!(answers.iter().filter(|answer| answer["spawned"] == true).count(), 1);
    assert_eq!(answers.iter().filter(|answer| answer["spawned"] == false).count(), 63);
    assert!(answers.iter().all(|answer| answer["fencing_token"] == answers[0]["fencing_token"]));
    server.stop().await;
}

#[tokio::test]
async fn bad_requests_get_their_named_error_and_change_nothing() {
    let server = Server::start().await;
    let _drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let before = server.store.local().view.progress().unwrap();
    for (request, status, wanted, named) in [
        (json!({"key": {"name": ""}, "spawn_config": process()}), 400, "InvalidRequest", "key.name"),
        (
            json!({"key": {"name": "x".repeat(1025)}, "spawn_config": process()}),
            400,
            "InvalidRequest",
            "key.name",
        ),
        (json!({"key": {"name": "a\u{7}"}, "spawn_config": process()}), 400, "InvalidRequest", "key.name"),
        (json!({"key": {"name": 5}}), 400, "InvalidRequest", "key.name"),
        (json!({"key": {"name": "k"}}), 409, "KeyUnheldNoSpawnConfig", ""),
        (
            json!({"key": {"name": "k"}, "spawn_config": {"executable": 5}}),
            400,
            "InvalidRequest",
            "spawn_config",
        ),
    ] {
        let (got, answer) = server.post("/ctrl/connect", &request).await;
        assert_eq!((got.as_u16(), kind(&answer)), (status, wanted), "{request} {answer}");
        assert!(answer["message"].as_str().unwrap().starts_with(named), "{answer}");
        assert!(answer["id"].as_str().unwrap().starts_with("err-"), "{answer}");
    }
    let mut elsewhere = body("k");
    elsewhere["spawn_config"]["pool"] = json!("gpu");
    let (status, answer) = server.post("/ctrl/connect", &elsewhere).await;
    assert_eq!((status.as_u16(), kind(&answer)), (503, "NoDroneAvailable"));

    for (body, status) in [("{", 400), ("", 400), ("[]", 400), (&" ".repeat(10 << 20), 413)] {
        let (got, answer) = server.send_raw("/ctrl/connect", body.to_owned()).await;
        assert_eq!((got.as_u16(), kind(&answer)), (status, "InvalidRequest"), "{answer}");
    }
    for (method, path, status, wanted) in [
        ("GET", "/nowhere", 404, "NotFound"),
        ("GET", "/", 404, "NotFound"),
        ("PUT", "/ctrl/connect", 405, "InvalidRequest"),
        ("GET", "/pub/b/ba-none/status", 404, "NotFound"),
        ("GET", "/pub/b/NONE/status-stream", 404, "NotFound"),
        ("GET", "/pub/b/%FF/status", 400, "InvalidRequest"),
        ("POST", "/ctrl/b/ba-none/soft-terminate", 404, "NotFound"),
        ("POST", "/ctrl/b/ba-none/hard-terminate", 404, "NotFound"),
        ("POST", "/ctrl/c/127.0.0.1:9090/d/dr-none/drain", 404, "NotFound"),
        ("GET", "/ctrl/key?name=free", 404, "NotFound"),
        ("GET", "/ctrl/key", 400, "InvalidRequest"),
        ("DELETE", "/ctrl/key?name=free", 404, "NotFound"),
        ("GET", "/ctrl/keys?limit=0", 400, "InvalidRequest"),
        ("GET", "/ctrl/keys?cursor=abc", 400, "InvalidRequest"),
        ("GET", "/ctrl/drones?cursor=!", 400, "InvalidRequest"),
        ("GET", "/ctrl/backends?consistency=eventual", 400, "InvalidRequest"),
        ("GET", "/ctrl/c/127.0.0.1:9090/drone-socket", 426, "InvalidRequest"),
    ] {
        let (got, answer) = server.request(method, path, &[], None).await;
        assert_eq!((got.as_u16(), kind(&answer)), (status, wanted), "{method} {path}: {answer}");
    }
    let after = server.store.local().view.progress().unwrap();
    assert_eq!((before.keys_held, before.supplied_ids), (after.keys_held, after.supplied_ids));
    server.stop().await;
}

#[tokio::test]
async fn an_idempotency_key_replays_the_recorded_answer() {
    let server = Server::start().await;
    let _drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    // Without a key: the random name is part of what is replayed.
    let request = json!({"spawn_config": process()});
    let header = [("idempotency-key", "once")];
    let (status, first) = server.request("POST", "/ctrl/connect", &header, Some(&request)).await;
    assert_eq!(status, StatusCode::OK, "{first}");
    assert!(first["key"]["name"].as_str().unwrap().starts_with("lk-"));
    let answer = server.answer("POST", "/ctrl/connect", &header, Some(&request)).await;
    assert_eq!(answer.headers()["x-holdfast-replayed"], "true");
    assert_eq!(answer.headers()["x-holdfast-leader"], server.url.as_str());
    let second: Value = answer.json().await.unwrap();
    for field in ["backend_id", "spawned", "key", "fencing_token", "secret_token"] {
        assert_eq!(first[field], second[field], "{field}");
    }
    let (status, answer) = server.request("POST", "/ctrl/connect", &header, Some(&body("other"))).await;
    assert_eq!((status.as_u16(), kind(&answer)), (400, "InvalidRequest"), "{answer}");
    let (status, answer) =
        server.request("POST", "/ctrl/connect", &[("idempotency-key", "a b")], Some(&request)).await;
    assert!(
        status == StatusCode::BAD_REQUEST && answer["message"].as_str().unwrap().contains("Idempotency-Key")
    );

    let (_, supplied) = server
        .post("/ctrl/connect", &json!({"spawn_config": {"id": "ba-mine", "cluster": "127.0.0.1:9090", "executable": {"command": ["x"]}}}))
        .await;
    assert_eq!(supplied["backend_id"], "ba-mine");
    let (status, used) = server
        .post("/ctrl/connect", &json!({"spawn_config": {"id": "ba-mine", "executable": {"command": ["x"]}}}))
        .await;
    assert_eq!((status.as_u16(), kind(&used)), (409, "BackendIdUsed"));
    server.stop().await;
}

#[tokio::test]
async fn listings_are_paged_and_keys_can_be_steered() {
    let server = Server::start().await;
    let _drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    for key in ["a1", "a2", "a3", "b1"] {
        let (status, answer) = server.post("/ctrl/connect", &body(key)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
    let (_, first) = server.get("/ctrl/keys?namespace=&prefix=a&limit=2").await;
    assert_eq!(first["keys"].as_array().unwrap().len(), 2);
    assert_eq!(first["keys"][0]["drone"], "dr-a");
    let cursor = first["next_cursor"].as_str().unwrap();
    let (_, rest) = server.get(&format!("/ctrl/keys?namespace=&prefix=a&limit=2&cursor={cursor}")).await;
    assert_eq!(rest["keys"][0]["name"], "a3");
    assert!(rest.get("next_cursor").is_none(), "{rest}");
    let (_, page) = server.get("/ctrl/backends?limit=3").await;
    let cursor = page["next_cursor"].as_str().unwrap();
    let (_, page) = server.get(&format!("/ctrl/backends?limit=3&cursor={cursor}")).await;
    assert_eq!(page["backends"].as_array().unwrap().len(), 1);

    let (_, updated) = server.post("/ctrl/key/prevent-renewal", &json!({"name": "a1"})).await;
    assert_eq!(updated, json!({"updated": true}));
    let (_, key) = server.get("/ctrl/key?name=a1").await;
    assert_eq!(key["allow_renew"], false);
    let (_, updated) = server.post("/ctrl/key/allow-renewal", &json!({"name": "a1"})).await;
    assert_eq!(updated, json!({"updated": true}));
    let (status, answer) = server.request("DELETE", "/ctrl/key?name=a1", &[], None).await;
    assert_eq!((status.as_u16(), kind(&answer)), (409, "KeyNotExpired"));
    let (status, answer) = server.post("/ctrl/key/prevent-renewal", &json!({"name": "none"})).await;
    assert_eq!((status.as_u16(), kind(&answer)), (404, "NotFound"));

    let backend = key["backend"].as_str().unwrap();
    let (status, answer) = server.post("/ctrl/revoke", &json!({"backend_id": backend, "user": "ann"})).await;
    assert!(status == StatusCode::OK && answer.is_string(), "{answer}");

    let (_, drones) = server.get("/ctrl/drones?cluster=127.0.0.1:9090").await;
    assert_eq!(
        (&drones["drones"][0]["name"], &drones["drones"][0]["backend_count"]),
        (&json!("dr-a"), &json!(4))
    );
    let (_, updated) = server.post("/ctrl/c/127.0.0.1:9090/d/dr-a/drain", &Value::Null).await;
    assert_eq!(updated, json!({"updated": true, "remaining": 4}));
    let (_, state) = server.get("/ctrl/c/127.0.0.1:9090/state").await;
    assert_eq!(
        (&state["drones"][0]["draining"], &state["drones"][0]["node"]["name"]),
        (&json!(true), &json!({"Drone": "dr-a"}))
    );
    let (status, answer) = server.post("/ctrl/connect", &body("new")).await;
    assert_eq!((status.as_u16(), kind(&answer)), (503, "NoDroneAvailable"), "{answer}");

    let (status, cluster) = server.get("/ctrl/cluster").await;
    assert_eq!(
        (status, &cluster["leader"], &cluster["members"][0]["role"]),
        (StatusCode::OK, &json!(1), &json!("leader"))
    );
    assert_eq!(cluster["lease"]["expiry_ms"], 100_000);
    for path in ["/ctrl/ready", "/ctrl/status", "/pub/health"] {
        assert_eq!(server.get(path).await.0, StatusCode::OK, "{path}");
    }
    server.stop().await;
}

#[tokio::test]
async fn an_unacknowledged_spawn_is_sent_again_and_an_acknowledged_one_is_not() {
    let server = Server::start().await;
    let mut drone = Drone::connect(&server, "dr-a", Some("one"), "").await;
    server.wait_for_drone("dr-a").await;
    let (_, first) =
        server.post("/ctrl/connect", &json!({"key": {"name": "k"}, "spawn_config": process()})).await;
    let action = drone.next("Action").await;
    let backend = first["backend_id"].as_str().unwrap();
    let (_, _) = server.post(format!("/ctrl/b/{backend}/soft-terminate"), &Value::Null).await;
    // The newer one does not wait for the older one's acknowledgement.
    let end = drone.next("Action").await;
    assert!(end["action"].get("Terminate").is_some(), "{end}");
    drone.send(&json!({"AckAction": {"action_id": action["action_id"]}})).await;
    let again = drone.next("Action").await;
    assert_eq!(again["action_id"], end["action_id"]);
    drone.send(&json!({"AckAction": {"action_id": end["action_id"]}})).await;
    server.wait_until_no_action("dr-a").await;
    server.stop().await;
}
