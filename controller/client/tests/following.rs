//! The client against controllers that behave badly in known ways.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a panic is a failed test")]

mod fake;

use fake::{CONNECTED, Fake, json, led_by, nobody, refusal, retry_after, sse};
use futures::TryStreamExt;
use holdfast_client::wire::http::{ConnectRequest, SpawnConfig};
use holdfast_client::wire::{ApiErrorKind, BackendStatus, KeyConfig, TerminationKind};
use holdfast_client::{Client, ClientError, KeyFilter, RequestOptions};
use std::time::{Duration, Instant};

fn client(urls: &[&str]) -> Client {
    Client::new(urls.iter().map(|url| (*url).to_owned()).collect()).unwrap()
}

fn keyed() -> ConnectRequest {
    ConnectRequest { key: Some(KeyConfig { name: "k".into(), ..Default::default() }), ..Default::default() }
}

fn keyless() -> ConnectRequest {
    let spawn: SpawnConfig = serde_json::from_str(r#"{"executable":{"command":["true"]}}"#).unwrap();
    ConnectRequest { spawn_config: Some(spawn), ..Default::default() }
}

fn short(deadline_ms: u64) -> RequestOptions {
    RequestOptions { deadline_ms, all_unreachable_ms: deadline_ms, ..RequestOptions::default() }
}

#[tokio::test]
async fn after_one_answer_requests_go_straight_to_the_leader() {
    let leader = Fake::start(|_, _| json(CONNECTED)).await;
    let leader_url = leader.url.clone();
    let follower = Fake::start(move |_, _| led_by(json(CONNECTED), &leader_url)).await;
    let client = client(&[&follower.url]);
    for _ in 0..3 {
        client.connect(&keyed()).await.unwrap();
    }
    assert_eq!((follower.asked().len(), leader.asked().len()), (1, 2));
}

#[tokio::test]
async fn a_dead_controller_is_passed_over() {
    let alive = Fake::start(|_, _| json(CONNECTED)).await;
    let client = client(&[&nobody().await, &alive.url]);
    assert_eq!(client.connect(&keyed()).await.unwrap().fencing_token, 7);
    // … and not asked again.
    client.connect(&keyed()).await.unwrap();
    assert_eq!(alive.asked().len(), 2);
}

#[tokio::test]
async fn a_leader_lost_in_the_middle_is_replaced_under_the_same_idempotency_key() {
    // Once before any answer, once in the middle of one.
    for bytes in ["", "HTTP/1.1 200 OK\r\ncontent-length: 900\r\n\r\n{\"backend_id\":"] {
        let dying = Fake::breaking(bytes).await;
        let alive = Fake::start(|_, _| json(CONNECTED)).await;
        let client = client(&[&dying.url, &alive.url]);
        client.connect(&keyless()).await.unwrap();
        let (first, second) = (dying.asked(), alive.asked());
        assert_eq!((first.len(), second.len()), (1, 1), "{bytes:?}");
        assert!(first[0].idempotency_key.is_some());
        assert_eq!(first[0].idempotency_key, second[0].idempotency_key);
    }
}

#[tokio::test]
async fn an_unknown_outcome_is_asked_again_with_a_key_only_where_it_must_be() {
    let answers = |last: &'static str| {
        Fake::start(move |number, _| match number {
            0 => refusal(ApiErrorKind::OutcomeUnknown),
            1 => refusal(ApiErrorKind::NoLeader),
            _ => json(last),
        })
    };
    // A second connect without a key would start a second backend.
    let controller = answers(CONNECTED).await;
    client(&[&controller.url]).connect(&keyless()).await.unwrap();
    let asked = controller.asked();
    assert_eq!(asked.len(), 3);
    assert!(asked[0].idempotency_key.is_some());
    assert!(asked.iter().all(|a| a.idempotency_key == asked[0].idempotency_key), "{asked:?}");
    // A second order to end does no harm, and takes no room in the controllers' table.
    let controller = answers("null").await;
    client(&[&controller.url]).terminate("ba-1", TerminationKind::Soft).await.unwrap();
    let asked = controller.asked();
    assert_eq!(asked.len(), 3);
    assert!(asked.iter().all(|a| a.line == "POST /ctrl/b/ba-1/soft-terminate"), "{asked:?}");
    assert!(asked.iter().all(|a| a.idempotency_key.is_none()), "{asked:?}");
}

#[tokio::test]
async fn two_requests_never_share_a_random_idempotency_key_and_a_given_one_is_used() {
    let controller = Fake::start(|_, _| json(CONNECTED)).await;
    let client = client(&[&controller.url]);
    client.connect(&keyless()).await.unwrap();
    client.connect(&keyless()).await.unwrap();
    client.connect(&keyed()).await.unwrap();
    let mine = RequestOptions { idempotency_key: Some("mine".into()), ..RequestOptions::default() };
    client.with_options(mine).connect(&keyed()).await.unwrap();
    let keys: Vec<_> = controller.asked().into_iter().map(|a| a.idempotency_key).collect();
    assert!(keys[0].is_some() && keys[1].is_some() && keys[0] != keys[1], "{keys:?}");
    assert_eq!(keys[2..], [None, Some("mine".to_owned())]);
}

#[tokio::test]
async fn retry_after_is_honoured() {
    let controller = Fake::start(|number, _| match number {
        0 => retry_after(refusal(ApiErrorKind::NoLeader), 1),
        _ => json(CONNECTED),
    })
    .await;
    let begun = Instant::now();
    client(&[&controller.url]).connect(&keyed()).await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    assert_eq!(controller.asked().len(), 2);
}

#[tokio::test]
async fn refusals_are_passed_through_at_once() {
    for kind in [
        ApiErrorKind::KeyHeld,
        ApiErrorKind::KeyUnheldNoSpawnConfig,
        ApiErrorKind::NoDroneAvailable,
        ApiErrorKind::InvalidRequest,
        ApiErrorKind::Overloaded,
        ApiErrorKind::Other,
    ] {
        let controller = Fake::start(move |_, _| refusal(kind)).await;
        match client(&[&controller.url]).connect(&keyed()).await {
            Err(ClientError::Refused(error, status)) => {
                assert_eq!((error.kind, status), (kind, kind.http_status()));
                assert_eq!(error.message, format!("this is {kind:?}"));
            }
            other => panic!("{kind:?}: {other:?}"),
        }
        assert_eq!(controller.asked().len(), 1, "{kind:?}");
    }
}

#[tokio::test]
async fn a_missing_drone_is_waited_for_when_asked() {
    let controller = Fake::start(|number, _| match number {
        0..3 => refusal(ApiErrorKind::NoDroneAvailable),
        _ => json(CONNECTED),
    })
    .await;
    let options = RequestOptions { retry_no_drone: true, ..RequestOptions::default() };
    client(&[&controller.url]).with_options(options).connect(&keyed()).await.unwrap();
    assert_eq!(controller.asked().len(), 4);
}

#[tokio::test]
async fn the_deadline_ends_it_with_what_is_known() {
    // Nobody there: nothing was done.
    let nobody = nobody().await;
    let unreachable = client(&[&nobody]).with_options(short(100)).connect(&keyed()).await;
    assert!(matches!(unreachable, Err(ClientError::Unreachable { .. })), "{unreachable:?}");
    // No leader: the service's own refusal.
    let leaderless = Fake::start(|_, _| refusal(ApiErrorKind::NoLeader)).await;
    let refused = client(&[&leaderless.url]).with_options(short(100)).connect(&keyed()).await;
    assert_eq!(refused.unwrap_err().kind(), Some(ApiErrorKind::NoLeader));
    // Lost after sending, then nobody there: it may have taken effect.
    let dying = Fake::breaking("").await;
    let unknown = client(&[&dying.url, &nobody]).with_options(short(100)).connect(&keyed()).await;
    assert!(matches!(unknown, Err(ClientError::OutcomeUnknown { .. })), "{unknown:?}");
    // A read has no outcome to be unknown.
    let read = client(&[&dying.url]).with_options(short(100)).backend_status("ba-1").await;
    assert!(matches!(read, Err(ClientError::Unreachable { .. })), "{read:?}");
}

#[tokio::test]
async fn something_else_that_answers_is_named() {
    let web_server = Fake::start(|_, _| json("<html>")).await;
    match client(&[&web_server.url]).connect(&keyed()).await {
        Err(ClientError::BadResponse { url, .. }) => assert_eq!(url, web_server.url),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn listings_are_walked_page_by_page_and_strange_names_arrive_whole() {
    let key = |name: &str| {
        format!(
            r#"{{"name":"{name}","namespace":"n","tag":"","backend":"ba-1","drone":"dr-a","token":1,
                "allow_renew":true,"acquired_at":1,"expires_at":2,"expires_in_ms":1}}"#
        )
    };
    let (first, second) = (
        format!(r#"{{"keys":[{},{}],"next_cursor":"c &1"}}"#, key("a"), key("b")),
        format!(r#"{{"keys":[{}]}}"#, key("c")),
    );
    let one = key("a/b?ü");
    let controller = Fake::start(move |number, _| {
        json(match number {
            0 => &first,
            1 => &second,
            _ => &one,
        })
    })
    .await;
    let client = client(&[&controller.url]);
    let filter = KeyFilter { namespace: Some("n".into()), page_rows: Some(2), ..KeyFilter::default() };
    let names: Vec<_> = client.keys(filter).map_ok(|key| key.name).try_collect().await.unwrap();
    assert_eq!(names, ["a", "b", "c"]);
    assert_eq!(client.key("a/b?ü", "").await.unwrap().name, "a/b?ü");
    assert_eq!(
        controller.lines(),
        [
            "GET /ctrl/keys?namespace=n&limit=2",
            "GET /ctrl/keys?namespace=n&limit=2&cursor=c+%261",
            "GET /ctrl/key?name=a%2Fb%3F%C3%BC&namespace=",
        ]
    );
}

#[tokio::test]
async fn a_status_stream_resumes_and_gives_each_status_once() {
    let event = |status: &str| format!("id: {status}\ndata: {{\"status\":\"{status}\",\"time\":1}}\n\n");
    let first = event("scheduled") + &event("loading") + "id: ready\ndata: {\"sta";
    // The second controller begins anew, with the history.
    let second = event("scheduled") + ": still here\n\n" + &event("ready") + &event("terminated");
    let controller = Fake::start(move |number, _| match number {
        0 => sse(&first),
        1 => refusal(ApiErrorKind::NoLeader),
        _ => sse(&second),
    })
    .await;
    let statuses: Vec<_> =
        client(&[&controller.url]).status_stream("ba-1").map_ok(|m| m.status).try_collect().await.unwrap();
    assert_eq!(
        statuses,
        [BackendStatus::Scheduled, BackendStatus::Loading, BackendStatus::Ready, BackendStatus::Terminated]
    );
    let resumed_from: Vec<_> = controller.asked().into_iter().map(|a| a.last_event_id).collect();
    assert_eq!(resumed_from, [None, Some("loading".to_owned()), Some("loading".to_owned())]);
}

#[tokio::test]
async fn the_stream_of_an_unknown_backend_is_one_refusal() {
    let controller = Fake::start(|_, _| refusal(ApiErrorKind::NotFound)).await;
    let stream = client(&[&controller.url]).status_stream("ba-none");
    let seen: Result<Vec<_>, _> = stream.try_collect().await;
    assert_eq!(seen.unwrap_err().kind(), Some(ApiErrorKind::NotFound));
    assert_eq!(controller.asked().len(), 1);
}

#[tokio::test]
async fn readiness_is_of_the_controller_asked() {
    let ready = Fake::start(|_, _| json("{}")).await;
    let unready = Fake::start(|_, _| refusal(ApiErrorKind::NoLeader)).await;
    let client = client(&[&ready.url]);
    assert_eq!(client.ready_at(&ready.url).await, Ok(true));
    assert_eq!(client.ready_at(&unready.url).await, Ok(false));
    assert!(matches!(client.health_at(&nobody().await).await, Err(ClientError::Unreachable { .. })));
    assert_eq!(unready.lines(), ["GET /ctrl/ready"]);
}
