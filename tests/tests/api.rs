//! The HTTP API, whichever controller is asked.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, LONG, wait_until};
use holdfast_wire::http::{BackendPage, ClusterInfo, ConnectRequest, DrainResult, DronePage, KeyPage};
use holdfast_wire::{ApiErrorKind, BackendStatus};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use std::collections::BTreeSet;

const CALM: &str = "renew=2s,soft=8s,hard=10s,expiry=15s";

#[tokio::test]
async fn every_controller_serves_every_path_and_names_the_leader() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let held = cluster.connect_ready("k").await;
    let leader = cluster.url(cluster.leader().await);
    let id = &held.backend_id;
    let name = &cluster.name;
    for index in 0..3 {
        let base = cluster.url(index);
        // The statuses are those of the contract; 409 and 404 are answers too.
        let mine = format!("k-{index}");
        let spawn = serde_json::to_value(cluster.backend().request(&mine)).unwrap();
        let key = json!({"name": "k"});
        let user = json!({"backend_id": id, "user": "ann"});
        let requests: Vec<(Method, String, Option<Value>, u16)> = vec![
            (Method::GET, "/pub/health".into(), None, 200),
            (Method::GET, format!("/pub/b/{id}/status"), None, 200),
            (Method::GET, "/pub/b/ba-unknown/status".into(), None, 404),
            (Method::GET, "/pub/b/ba-unknown/status-stream".into(), None, 404),
            (Method::GET, "/ctrl/status".into(), None, 200),
            (Method::GET, "/ctrl/ready".into(), None, 200),
            (Method::GET, "/ctrl/cluster".into(), None, 200),
            (Method::GET, format!("/ctrl/c/{name}/state"), None, 200),
            (Method::GET, "/ctrl/keys?limit=10&prefix=k".into(), None, 200),
            (Method::GET, "/ctrl/key?name=k".into(), None, 200),
            (Method::GET, "/ctrl/key?name=free".into(), None, 404),
            (Method::GET, "/ctrl/backends".into(), None, 200),
            (Method::GET, "/ctrl/drones".into(), None, 200),
            (Method::POST, "/ctrl/connect".into(), Some(spawn), 200),
            (Method::POST, "/ctrl/key/prevent-renewal".into(), Some(key.clone()), 200),
            (Method::POST, "/ctrl/key/allow-renewal".into(), Some(key), 200),
            (Method::DELETE, "/ctrl/key?name=k".into(), None, 409),
            (Method::DELETE, "/ctrl/key?name=free".into(), None, 404),
            (Method::POST, "/ctrl/b/revoke".into(), Some(user.clone()), 200),
            (Method::POST, "/ctrl/revoke".into(), Some(user), 200),
            (Method::POST, "/ctrl/b/ba-unknown/soft-terminate".into(), None, 404),
            (Method::POST, "/ctrl/b/ba-unknown/hard-terminate".into(), Some(Value::Null), 404),
            (Method::POST, format!("/ctrl/c/{name}/d/dr-unknown/drain"), None, 404),
            (Method::GET, "/no/such/path".into(), None, 404),
        ];
        for (method, path, body, status) in requests {
            let url = format!("{base}{path}");
            let body = body.map(|body| body.to_string().into_bytes());
            let answer = cluster.http.send(method.clone(), &url, &[], body).await.unwrap();
            assert_eq!(answer.status.as_u16(), status, "{method} {url}: {answer:?}");
            assert_eq!(answer.leader(), Some(leader.as_str()), "{method} {url}");
            if status == 404 {
                answer.refused(ApiErrorKind::NotFound);
            }
        }
        // What the controller just did is in the listings that follow, here and everywhere (linearizable).
        for other in cluster.urls() {
            let keys: KeyPage = cluster.http.get(&format!("{other}/ctrl/keys?prefix={mine}")).await.ok();
            assert_eq!(keys.keys.len(), 1, "{other}");
        }
        let backend = cluster.client().key(&mine, "").await.unwrap().backend;
        cluster.wait_status(&backend, BackendStatus::Ready).await;
        let verb = if index == 0 { "soft" } else { "hard" };
        let url = format!("{base}/ctrl/b/{backend}/{verb}-terminate");
        let answer = cluster.http.send(Method::POST, &url, &[], None).await.unwrap();
        assert_eq!((answer.status, answer.text.as_str()), (StatusCode::OK, "null"));
        cluster.wait_free(&mine).await;
    }
}

#[tokio::test]
async fn wrong_methods_are_refused_as_such() {
    let cluster = Cluster::builder().controllers(1).drones(0).start().await;
    for (method, path) in
        [(Method::POST, "/ctrl/keys"), (Method::GET, "/ctrl/connect"), (Method::PUT, "/ctrl/key")]
    {
        let url = format!("{}{path}", cluster.url(0));
        let answer = cluster.http.send(method, &url, &[], None).await.unwrap();
        assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(answer.json()["kind"], "InvalidRequest");
    }
}

#[tokio::test]
async fn listings_give_every_row_once_page_after_page() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let client = cluster.client();
    for i in 0..7 {
        client.connect(&cluster.backend().request(&format!("k-{i}"))).await.unwrap();
    }
    let (mut keys, mut cursor, mut pages) = (Vec::new(), None::<String>, 0);
    loop {
        // Another controller for each page.
        let base = cluster.url(pages % 3);
        let more = cursor.map(|cursor| format!("&cursor={cursor}")).unwrap_or_default();
        let page: KeyPage = cluster.http.get(&format!("{base}/ctrl/keys?limit=3{more}")).await.ok();
        assert!(page.keys.len() <= 3);
        keys.extend(page.keys.into_iter().map(|key| key.name));
        pages += 1;
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    assert_eq!(keys, (0..7).map(|i| format!("k-{i}")).collect::<Vec<_>>());
    let first: BackendPage =
        cluster.http.get(&format!("{}/ctrl/backends?limit=7", cluster.url(1))).await.ok();
    let ids: BTreeSet<_> = first.backends.iter().map(|backend| &backend.id).collect();
    assert_eq!(ids.len(), 7);
    let drones: DronePage = cluster.http.get(&format!("{}/ctrl/drones", cluster.url(2))).await.ok();
    assert_eq!(drones.drones.len(), 1);
    wait_until("the drone's backends are counted", LONG, async || {
        let drones: DronePage = cluster.http.get(&format!("{}/ctrl/drones", cluster.url(2))).await.ok();
        if drones.drones[0].backend_count == 7 { Ok(()) } else { Err(drones) }
    })
    .await;
    for query in ["limit=0", "limit=1001", "limit=x", "cursor=%3F", "consistency=never"] {
        let answer = cluster.http.get(&format!("{}/ctrl/keys?{query}", cluster.url(0))).await;
        let error = answer.refused(ApiErrorKind::InvalidRequest);
        assert!(error.message.starts_with(query.split('=').next().unwrap()), "{error:?}");
    }
}

#[tokio::test]
async fn without_a_majority_local_reads_are_served_and_everything_else_says_no_leader() {
    let mut cluster = Cluster::builder().lease("renew=5s,soft=20s,hard=25s,expiry=35s").start().await;
    let held = cluster.connect_ready("k").await;
    let left = cluster.leader().await;
    // Everything is there, also on the one that is left alone.
    for index in (0..3).filter(|index| *index != left) {
        cluster.controllers[index].kill9();
    }
    let base = cluster.url(left);
    for path in ["/ctrl/keys", "/ctrl/key?name=k", "/ctrl/backends", "/ctrl/drones", "/ctrl/cluster"] {
        let sign = if path.contains('?') { '&' } else { '?' };
        let local = cluster.http.get(&format!("{base}{path}{sign}consistency=local")).await;
        assert!(local.status.is_success(), "{path}: {local:?}");
        if path == "/ctrl/key?name=k" {
            assert_eq!(local.json()["backend"], held.backend_id);
        }
    }
    // Each of these takes as long as the controller looks for a leader: all at once.
    let (http, key_url, ready_url) =
        (&cluster.http, format!("{base}/ctrl/key?name=k"), format!("{base}/ctrl/ready"));
    let held_connect = ConnectRequest { key: Some(held.key.clone()), ..ConnectRequest::default() };
    let new_connect = cluster.backend().request("new");
    let (read, ready, old, new) = tokio::join!(
        http.get(&key_url),
        http.get(&ready_url),
        http.connect(&base, &held_connect),
        http.connect(&base, &new_connect),
    );
    read.refused(ApiErrorKind::NoLeader);
    assert!(read.headers.contains_key("retry-after"), "{read:?}");
    assert_eq!(ready.status, StatusCode::SERVICE_UNAVAILABLE);
    // Not even a held key, without a read that is sure.
    old.refused(ApiErrorKind::NoLeader);
    // Nobody can say whether a write of a leader without followers takes effect, but never that it did.
    let kind = new.json()["kind"].as_str().unwrap_or_default().to_owned();
    assert!(["NoLeader", "OutcomeUnknown"].contains(&kind.as_str()), "{new:?}");
    assert_eq!(http.get(&format!("{base}/pub/health")).await.status, StatusCode::OK);

    for index in (0..3).filter(|index| *index != left) {
        cluster.restart_controller(index);
    }
    cluster.wait_controller(left).await;
    let again = cluster.client().connect(&cluster.backend().request("k")).await.unwrap();
    assert_eq!((again.backend_id, again.fencing_token), (held.backend_id, held.fencing_token));
}

#[tokio::test]
async fn leadership_is_handed_over_on_request() {
    let cluster = Cluster::builder().drones(0).start().await;
    let old = cluster.leader().await;
    let answer: DrainResult = cluster
        .http
        .post(&format!("{}/ctrl/cluster/transfer-leader", cluster.url(old)), &json!(null))
        .await
        .ok();
    assert!(answer.updated);
    let new = cluster.leader_other_than(old).await;
    let info: ClusterInfo = cluster.http.get(&format!("{}/ctrl/cluster", cluster.url(old))).await.ok();
    assert_eq!(info.leader, Some(new as u64 + 1));
    let follower = (0..3).find(|index| *index != new).unwrap();
    let url = format!("{}/ctrl/cluster/transfer-leader", cluster.url(follower));
    // A follower has nothing to hand over, and says whom to ask.
    let error = cluster.http.post(&url, &json!(null)).await.refused(ApiErrorKind::InvalidRequest);
    assert!(error.message.contains(&cluster.url(new)), "{error:?}");
}
