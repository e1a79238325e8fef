//! Three controllers: every one of them serves everything.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Drone, Server, process, wait_until};
use serde_json::{Value, json};

fn leader_of(servers: &[Server]) -> usize {
    servers.iter().position(|server| server.store.status().is_leader).unwrap()
}

#[tokio::test]
async fn a_follower_serves_connects_drones_streams_and_reads() {
    let servers = Server::start_cluster(3).await;
    let leader = leader_of(&servers);
    let (one, two) = (&servers[(leader + 1) % 3], &servers[(leader + 2) % 3]);
    let mut drone = Drone::connect(one, "dr-a", Some("one"), "").await;
    for server in &servers {
        server.wait_for_drone("dr-a").await;
    }
    let request = json!({"key": {"name": "k"}, "spawn_config": process()});
    let answer = two.answer("POST", "/ctrl/connect", &[], Some(&request)).await;
    assert_eq!(answer.headers()["x-holdfast-leader"], servers[leader].url.as_str());
    let first: Value = answer.json().await.unwrap();
    assert_eq!(first["spawned"], true, "{first}");
    let backend = first["backend_id"].as_str().unwrap().to_owned();
    let token = first["fencing_token"].as_u64().unwrap();
    // The drone gets it from the applied state of its own controller.
    assert_eq!(drone.next("Action").await["backend_id"], backend.as_str());
    let stream = tokio::spawn({
        let (server, path) = (servers[leader].clone(), format!("/pub/b/{backend}/status-stream"));
        async move { server.text(&path, &[]).await }
    });
    drone.report(1, &backend, json!({"status": "ready", "address": "127.0.0.1:5"}), token).await;
    for server in &servers {
        // Linearizable: every one has seen what was acknowledged.
        let (_, status) = server.get(&format!("/pub/b/{backend}/status")).await;
        assert_eq!(status["status"], "ready");
    }
    drone
        .report(2, &backend, json!({"status": "terminated", "last_status": "ready", "exit_code": 3}), token)
        .await;
    let stream = stream.await.unwrap();
    assert!(stream.contains("terminated") && stream.contains(r#""exit_error":true"#), "{stream}");
    let (_, cluster) = one.get("/ctrl/cluster").await;
    assert_eq!(cluster["members"].as_array().unwrap().len(), 3, "{cluster}");
    futures::future::join_all(servers.iter().map(Server::stop)).await;
}

#[tokio::test]
async fn a_follower_says_who_can_hand_over_leadership() {
    let servers = Server::start_cluster(3).await;
    let leader = leader_of(&servers);
    let (status, answer) =
        servers[(leader + 1) % 3].post("/ctrl/cluster/transfer-leader", &Value::Null).await;
    assert_eq!((status.as_u16(), &answer["kind"]), (400, &json!("InvalidRequest")), "{answer}");
    assert!(answer["message"].as_str().unwrap().contains(&servers[leader].url), "{answer}");
    let (status, answer) = servers[leader].post("/ctrl/cluster/transfer-leader", &Value::Null).await;
    assert_eq!((status.as_u16(), answer), (200, json!({"updated": true})));
    futures::future::join_all(servers.iter().map(Server::stop)).await;
}

#[tokio::test]
async fn sixty_four_connects_over_three_controllers_start_one_backend() {
    let servers = Server::start_cluster(3).await;
    let _drone = Drone::connect(&servers[0], "dr-a", Some("one"), "").await;
    for server in &servers {
        server.wait_for_drone("dr-a").await;
    }
    let request = json!({"key": {"name": "same"}, "spawn_config": process()});
    let connects = (0..64).map(|at| {
        let (server, request) = (servers[at % 3].clone(), request.clone());
        tokio::spawn(async move { server.post("/ctrl/connect", &request).await.1 })
    });
    let answers = futures::future::join_all(connects).await;
    let answers: Vec<Value> = answers.into_iter().map(Result::unwrap).collect();
    assert_eq!(answers.iter().filter(|answer| answer["spawned"] == true).count(), 1, "{answers:?}");
    assert_eq!(answers.iter().filter(|answer| answer["spawned"] == false).count(), 63);
    assert!(answers.iter().all(|answer| answer["fencing_token"] == answers[0]["fencing_token"]));
    futures::future::join_all(servers.iter().map(Server::stop)).await;
}

#[tokio::test]
async fn renewals_and_reports_go_on_across_a_change_of_leader() {
    let servers = Server::start_cluster(3).await;
    let leader = leader_of(&servers);
    let follower = &servers[(leader + 1) % 3];
    let mut drone = Drone::connect(follower, "dr-a", Some("one"), "").await;
    for server in &servers {
        server.wait_for_drone("dr-a").await;
    }
    let (_, first) =
        follower.post("/ctrl/connect", &json!({"key": {"name": "k"}, "spawn_config": process()})).await;
    let (backend, token) =
        (first["backend_id"].as_str().unwrap().to_owned(), first["fencing_token"].as_u64().unwrap());
    servers[leader].stop().await;
    // Asked while nobody may lead: held, and answered after it.
    let keys = json!([{"backend": backend, "token": token}]);
    drone.send(&json!({"RenewKeys": {"local_time": 2_000_000, "keys": keys}})).await;
    let renewed = drone.next("RenewKeysResponse").await;
    assert_eq!(renewed["keys"][0]["deadlines"]["renew_at"], 2_060_000, "{renewed}");
    drone.report(1, &backend, json!({"status": "loading"}), token).await;
    let (_, again) =
        follower.post("/ctrl/connect", &json!({"key": {"name": "k"}, "spawn_config": process()})).await;
    assert_eq!((&again["spawned"], &again["fencing_token"]), (&json!(false), &json!(token)), "{again}");
    wait_until("the other one leads", || {
        servers.iter().enumerate().any(|(at, server)| at != leader && server.store.status().is_leader)
    })
    .await;
    for at in (0..3).filter(|at| *at != leader) {
        servers[at].stop().await;
    }
}
