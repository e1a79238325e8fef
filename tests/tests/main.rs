//! What a key promises, on real processes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use futures::StreamExt;
use futures::future::join_all;
use holdfast_client::{ClientError, RequestOptions};
use holdfast_tests::harness::{Cluster, EventKind, LONG, SHORT, wait_until};
use holdfast_wire::http::{ConnectRequest, ConnectResponse, DrainResult, KeyInfo};
use holdfast_wire::{ApiErrorKind, BackendStatus, KeyConfig, TerminationKind, TerminationReason};
use reqwest::Method;
use serde_json::json;
use std::collections::BTreeSet;
use std::time::Instant;

/// For tests in which nothing is to expire.
const CALM: &str = "renew=2s,soft=8s,hard=10s,expiry=15s";

fn key(namespace: &str, name: &str, tag: &str) -> KeyConfig {
    KeyConfig { name: name.to_owned(), namespace: namespace.to_owned(), tag: tag.to_owned() }
}

fn kind(error: &ClientError) -> ApiErrorKind {
    error.kind().unwrap_or_else(|| panic!("not a refusal: {error}"))
}

#[tokio::test]
async fn the_same_key_twice_is_the_same_backend() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let first = cluster.connect_ready("k").await;
    assert!(first.spawned);
    for index in 0..3 {
        let again: ConnectResponse =
            cluster.http.connect(&cluster.url(index), &cluster.backend().request("k")).await.ok();
        assert!(!again.spawned);
        assert_eq!(again.backend_id, first.backend_id);
        assert_eq!(again.fencing_token, first.fencing_token);
        assert_eq!(again.status, BackendStatus::Ready);
        assert!(again.address.is_some() && again.drone.as_deref() == Some("dr-0"));
    }
    // To a held key no spawn_config is needed; to a free one it is.
    let held = ConnectRequest { key: Some(key("", "k", "")), ..ConnectRequest::default() };
    assert_eq!(cluster.client().connect(&held).await.unwrap().backend_id, first.backend_id);
    let free = ConnectRequest { key: Some(key("", "free", "")), ..ConnectRequest::default() };
    let refused = cluster.http.connect(&cluster.url(1), &free).await;
    refused.refused(ApiErrorKind::KeyUnheldNoSpawnConfig);
    assert_eq!(cluster.journal.kinds("k"), [EventKind::Start]);
}

#[tokio::test]
async fn another_tag_is_refused_and_changes_nothing() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let request = cluster.backend().request_for(key("", "k", "blue"));
    let first = cluster.client().connect(&request).await.unwrap();
    cluster.wait_status(&first.backend_id, BackendStatus::Ready).await;
    let before = cluster.key("k").await.unwrap();
    let begin = Instant::now();
    for (index, tag) in ["green", "", "Blue"].into_iter().enumerate() {
        let other = cluster.backend().request_for(key("", "k", tag));
        cluster.http.connect(&cluster.url(index), &other).await.refused(ApiErrorKind::KeyHeld);
    }
    assert!(begin.elapsed() < SHORT, "a wrong tag is said at once, without waiting");
    let after = cluster.key("k").await.unwrap();
    assert_eq!((after.tag.as_str(), &after.backend, after.token), ("blue", &before.backend, before.token));
    assert_eq!(cluster.keys().await.len(), 1);
    assert_eq!(cluster.journal.events().len(), 1);
}

#[tokio::test]
async fn another_namespace_is_another_backend() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let client = cluster.client();
    let mut backends = BTreeSet::new();
    // The last two differ only in where the namespace ends.
    for (namespace, name) in [("", "k"), ("a", "k"), ("b", "k"), ("x", "yz"), ("xy", "z")] {
        let answer = client.connect(&cluster.backend().request_for(key(namespace, name, ""))).await.unwrap();
        assert!(answer.spawned, "{namespace}/{name}");
        assert_eq!(answer.key, key(namespace, name, ""));
        cluster.wait_status(&answer.backend_id, BackendStatus::Ready).await;
        backends.insert(answer.backend_id);
    }
    assert_eq!(backends.len(), 5);
    let in_a = client.key("k", "a").await.unwrap();
    assert_eq!(in_a.namespace, "a");
    cluster.journal.assert_no_overlap();
}

#[tokio::test]
async fn without_a_key_the_answer_names_a_random_one() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let mut names = BTreeSet::new();
    for index in 0..3 {
        let request = ConnectRequest {
            spawn_config: Some(cluster.backend().spawn_config(&format!("none-{index}"))),
            ..ConnectRequest::default()
        };
        let answer: ConnectResponse = cluster.http.connect(&cluster.url(index), &request).await.ok();
        assert!(answer.spawned && answer.key.name.starts_with("lk-"), "{answer:?}");
        let held = cluster.key(&answer.key.name).await.unwrap();
        assert_eq!(held.backend, answer.backend_id);
        // The name is good for a later connect.
        let again = ConnectRequest { key: Some(answer.key.clone()), ..ConnectRequest::default() };
        assert_eq!(cluster.client().connect(&again).await.unwrap().backend_id, answer.backend_id);
        names.insert(answer.key.name);
    }
    assert_eq!(names.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_connects_to_a_free_key_over_all_controllers_make_one_backend() {
    let cluster = Cluster::builder().drones(2).lease(CALM).start().await;
    for round in 0..3 {
        let name = format!("k-{round}");
        let request = cluster.backend().request(&name);
        let connects = (0..64).map(|i| {
            let (http, url, request) = (cluster.http.clone(), cluster.url(i % 3), request.clone());
            tokio::spawn(async move { http.connect(&url, &request).await.ok::<ConnectResponse>() })
        });
        let answers: Vec<_> = join_all(connects).await.into_iter().map(Result::unwrap).collect();
        assert_eq!(answers.iter().filter(|answer| answer.spawned).count(), 1);
        let holders: BTreeSet<_> =
            answers.iter().map(|answer| (&answer.backend_id, answer.fencing_token)).collect();
        assert_eq!(holders.len(), 1, "{holders:?}");
        cluster.wait_status(&answers[0].backend_id, BackendStatus::Ready).await;
        assert_eq!(cluster.journal.kinds(&name), [EventKind::Start]);
    }
    cluster.journal.assert_no_overlap();
}

#[tokio::test]
async fn a_token_stays_through_renewals_and_grows_with_the_next_acquisition() {
    let cluster = Cluster::builder().lease("renew=600ms,soft=1600ms,hard=2s,expiry=3s").start().await;
    let client = cluster.client();
    let first = cluster.connect_ready("k").await;
    let said = cluster.ask(&first.backend_id).await;
    assert_eq!(said["SESSION_BACKEND_FENCING_TOKEN"], first.fencing_token.to_string());
    let acquired = cluster.key("k").await.unwrap();
    assert_eq!(acquired.token, first.fencing_token);
    // Three expiries later than the first one.
    let renewed: KeyInfo = wait_until("the key lives by renewal", LONG, async || {
        let now = cluster.key("k").await.expect("a renewed key does not expire");
        if now.expires_at >= acquired.acquired_at + 4 * 3_000 { Ok(now) } else { Err(now) }
    })
    .await;
    assert_eq!(
        (renewed.token, renewed.acquired_at, &renewed.backend),
        (acquired.token, acquired.acquired_at, &acquired.backend)
    );
    assert_eq!(cluster.ask(&first.backend_id).await["instance"], said["instance"]);

    client.terminate(&first.backend_id, TerminationKind::Soft).await.unwrap();
    let second = cluster.connect_ready("k").await;
    assert!(second.spawned && second.backend_id != first.backend_id);
    assert!(second.fencing_token > first.fencing_token);
    let said = cluster.ask(&second.backend_id).await;
    assert_eq!(said["SESSION_BACKEND_FENCING_TOKEN"], second.fencing_token.to_string());
    assert_eq!(said["SESSION_BACKEND_ID"], second.backend_id);
    cluster.journal.assert_no_overlap();
}

#[tokio::test]
async fn a_backend_gets_the_environment_of_the_contract_whatever_the_user_sets() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let backend = cluster
        .backend()
        .env("MINE", "yes")
        .env("PORT", "1")
        .env("SESSION_BACKEND_ID", "forged")
        .env("SESSION_BACKEND_KEY", "forged")
        .env("SESSION_BACKEND_FENCING_TOKEN", "999999999");
    let mut request = backend.request_for(key("space-of-keys", "the key ☃", "tag-of-key"));
    request.spawn_config.as_mut().unwrap().use_static_token = true;
    let answer = cluster.client().connect(&request).await.unwrap();
    let info = cluster.wait_status(&answer.backend_id, BackendStatus::Ready).await;
    let said = cluster.ask(&answer.backend_id).await;
    assert_eq!(said["MINE"], "yes");
    assert_eq!(said["PORT"], info.address.unwrap().port().to_string());
    assert_eq!(said["SESSION_BACKEND_ID"], answer.backend_id);
    assert_eq!(said["SESSION_BACKEND_KEY"], "the key ☃");
    assert_eq!(said["SESSION_BACKEND_FENCING_TOKEN"], answer.fencing_token.to_string());
    assert_eq!(said["SESSION_BACKEND_STATIC_TOKEN"], answer.token);
    for (name, value) in said.as_object().unwrap() {
        let value = value.to_string();
        assert!(!value.contains("space-of-keys") && !value.contains("tag-of-key"), "{name}={value}");
        assert!(!name.starts_with("HOLDFAST"), "{name}");
    }
}

#[tokio::test]
async fn every_state_is_reported_in_order_and_terminated_frees_the_key_at_once() {
    use BackendStatus as S;
    let cluster = Cluster::builder().lease(CALM).start().await;
    let client = cluster.client();
    for (name, end, states) in [
        ("soft", Some(TerminationKind::Soft), &[S::Terminating, S::Terminated][..]),
        ("hard", Some(TerminationKind::Hard), &[S::HardTerminating, S::Terminated]),
        ("by-itself", None, &[S::Terminated]),
    ] {
        let backend = cluster.backend();
        let backend = if end.is_none() { backend.exit_after_ms(1_000) } else { backend };
        let answer = client.connect(&backend.request(name)).await.unwrap();
        let mut stream = std::pin::pin!(client.status_stream(&answer.backend_id));
        let mut seen = Vec::new();
        let mut last_time = 0;
        while let Some(message) = tokio::time::timeout(LONG, stream.next()).await.expect("a next status") {
            let message = message.unwrap();
            assert!(message.time >= last_time);
            last_time = message.time;
            seen.push(message.status);
            match (message.status, end) {
                (S::Ready, Some(end)) => client.terminate(&answer.backend_id, end).await.unwrap(),
                (S::Terminated, _) => {
                    let reason = end.map(|_| TerminationReason::External);
                    assert_eq!((message.termination_kind, message.termination_reason), (end, reason));
                    // Not soon: now.
                    assert_eq!(cluster.key(name).await, None);
                }
                _ => {}
            }
        }
        let alive = [S::Scheduled, S::Loading, S::Starting, S::Waiting, S::Ready];
        assert_eq!(seen, [&alive, states].concat(), "{name}");
    }
    assert_eq!(cluster.journal.kinds("soft"), [EventKind::Start, EventKind::Term, EventKind::Stop]);
    assert_eq!(cluster.journal.kinds("hard"), [EventKind::Start]);
    assert_eq!(cluster.journal.kinds("by-itself"), [EventKind::Start, EventKind::Stop]);
}

#[tokio::test]
async fn a_backend_that_ignores_a_soft_end_keeps_its_key_until_a_hard_one() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let client = cluster.client();
    let answer = client.connect(&cluster.backend().ignoring_sigterm().request("k")).await.unwrap();
    cluster.wait_status(&answer.backend_id, BackendStatus::Ready).await;
    client.terminate(&answer.backend_id, TerminationKind::Soft).await.unwrap();
    cluster.wait_status(&answer.backend_id, BackendStatus::Terminating).await;
    cluster.journal.wait_for(&answer.backend_id, EventKind::Term, SHORT).await;
    assert_eq!(cluster.key("k").await.unwrap().backend, answer.backend_id);
    client.terminate(&answer.backend_id, TerminationKind::Hard).await.unwrap();
    let end = cluster.wait_status(&answer.backend_id, BackendStatus::Terminated).await;
    assert_eq!(end.termination_kind, Some(TerminationKind::Hard));
    assert_eq!(end.exit_code, None);
    assert_eq!(cluster.key("k").await, None);
    // Of a backend that has ended nothing more can be asked, and nothing is wrong with asking.
    client.terminate(&answer.backend_id, TerminationKind::Hard).await.unwrap();
    assert_eq!(cluster.journal.kinds("k"), [EventKind::Start, EventKind::Term]);
}

#[tokio::test]
async fn an_idempotency_key_replays_the_answer_and_refuses_another_request() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let request = ConnectRequest {
        spawn_config: Some(cluster.backend().spawn_config("none")),
        ..ConnectRequest::default()
    };
    let body = serde_json::to_value(&request).unwrap();
    let connect = |index: usize| format!("{}/ctrl/connect", cluster.url(index));
    let headers = [("idempotency-key", "once")];
    let first = cluster.http.post_with(&connect(0), &body, &headers).await;
    assert!(!first.replayed());
    let first: ConnectResponse = first.ok();
    for index in 0..3 {
        let again = cluster.http.post_with(&connect(index), &body, &headers).await;
        assert!(again.replayed(), "{again:?}");
        let again: ConnectResponse = again.ok();
        assert_eq!(
            (&again.backend_id, &again.key, again.fencing_token, again.spawned),
            (&first.backend_id, &first.key, first.fencing_token, first.spawned)
        );
    }
    let mut other = body.clone();
    other["user"] = json!("somebody");
    let refused = cluster.http.post_with(&connect(1), &other, &headers).await;
    assert!(refused.refused(ApiErrorKind::InvalidRequest).message.contains("Idempotency-Key"));
    assert_eq!(cluster.keys().await.len(), 1);

    // Any request can carry one.
    cluster.wait_status(&first.backend_id, BackendStatus::Ready).await;
    let url = format!("{}/ctrl/c/{}/d/dr-0/drain", cluster.url(2), cluster.name);
    for replayed in [false, true] {
        let answer = cluster.http.post_with(&url, &json!(null), &[("idempotency-key", "drain")]).await;
        assert_eq!(answer.replayed(), replayed);
        assert!(answer.ok::<DrainResult>().updated, "the recorded answer, not a new one");
    }
    let again: DrainResult = cluster.http.post(&url, &json!(null)).await.ok();
    assert!(!again.updated);
}

#[tokio::test]
async fn a_connect_to_a_key_whose_backend_is_ending_waits_and_acquires_anew() {
    let cluster = Cluster::builder().drones(2).lease(CALM).start().await;
    let client = cluster.client();
    let backend = cluster.backend().term_delay_ms(1_500);
    let first = client.connect(&backend.request("k")).await.unwrap();
    cluster.wait_status(&first.backend_id, BackendStatus::Ready).await;
    client.terminate(&first.backend_id, TerminationKind::Soft).await.unwrap();

    let impatient = ConnectRequest { wait_ms: Some(0), ..backend.request("k") };
    let refused = cluster.http.connect(&cluster.url(0), &impatient).await.refused(ApiErrorKind::KeyHeld);
    assert!(refused.message.contains(&first.backend_id), "{refused:?}");
    let other_tag = backend.request_for(key("", "k", "other"));
    cluster.http.connect(&cluster.url(1), &other_tag).await.refused(ApiErrorKind::KeyHeld);

    // All of them wait, at every controller; one of them spawns.
    let waiting = (0..9).map(|i| {
        let (http, url, request) = (cluster.http.clone(), cluster.url(i % 3), backend.request("k"));
        async move { http.connect(&url, &request).await.ok::<ConnectResponse>() }
    });
    let answers = join_all(waiting).await;
    assert_eq!(answers.iter().filter(|answer| answer.spawned).count(), 1);
    for answer in &answers {
        assert_eq!(answer.backend_id, answers[0].backend_id);
        assert!(answer.fencing_token > first.fencing_token);
    }
    cluster.wait_status(&answers[0].backend_id, BackendStatus::Ready).await;
    cluster.journal.assert_no_overlap();
    let kinds = cluster.journal.kinds("k");
    assert_eq!(kinds, [EventKind::Start, EventKind::Term, EventKind::Stop, EventKind::Start]);
}

#[tokio::test]
async fn a_draining_drone_takes_no_new_backends_and_keeps_those_it_has() {
    let cluster = Cluster::builder().drones(2).lease(CALM).start().await;
    let client = cluster.client();
    let mut on_first = None;
    for i in 0..8 {
        let answer = cluster.connect_ready(&format!("before-{i}")).await;
        if answer.drone.as_deref() == Some("dr-0") {
            on_first = Some(answer);
        }
    }
    let on_first = on_first.expect("the drone with fewer backends is chosen, so both got some");
    assert!(client.drain(&cluster.name, "dr-0").await.unwrap().updated);
    assert!(!client.drain(&cluster.name, "dr-0").await.unwrap().updated);
    for i in 0..8 {
        let answer = client.connect(&cluster.backend().request(&format!("after-{i}"))).await.unwrap();
        assert_eq!(answer.drone.as_deref(), Some("dr-1"));
    }
    assert_eq!(
        cluster.wait_status(&on_first.backend_id, BackendStatus::Ready).await.status,
        BackendStatus::Ready
    );
    assert!(client.drain(&cluster.name, "dr-1").await.unwrap().updated);
    let none = cluster.http.connect(&cluster.url(0), &cluster.backend().request("none")).await;
    none.refused(ApiErrorKind::NoDroneAvailable);
    assert_eq!(cluster.key("none").await, None);
    let state = client.cluster_state(&cluster.name).await.unwrap();
    assert!(state.drones.len() == 2 && state.drones.iter().all(|drone| drone.draining && drone.ready));
}

#[tokio::test]
async fn a_key_whose_renewal_is_prevented_ends_on_the_timeline() {
    let lease = "renew=800ms,soft=2s,hard=3s,expiry=4500ms";
    let cluster = Cluster::builder().drones(2).lease(lease).start().await;
    let client = cluster.client();
    let backend = cluster.backend().ignoring_sigterm();
    let first = client.connect(&backend.request("k")).await.unwrap();
    cluster.wait_status(&first.backend_id, BackendStatus::Ready).await;
    client.prevent_renewal("k", "").await.unwrap();
    let prevented = cluster.key("k").await.unwrap();
    assert!(!prevented.allow_renew && prevented.backend == first.backend_id);

    let term = cluster.journal.wait_for(&first.backend_id, EventKind::Term, SHORT).await;
    let end = cluster.wait_status(&first.backend_id, BackendStatus::Terminated).await;
    assert_eq!(end.termination_reason, Some(TerminationReason::KeyExpired));
    assert_eq!(end.termination_kind, Some(TerminationKind::Hard));
    assert!(end.status_at <= prevented.expires_at, "it ended before its key could: {end:?} {prevented:?}");

    let second = client.connect(&backend.request("k")).await.unwrap();
    cluster.wait_status(&second.backend_id, BackendStatus::Ready).await;
    assert!(second.spawned && second.fencing_token > first.fencing_token);
    assert!(cluster.key("k").await.unwrap().allow_renew);
    // It got the signal at the soft deadline, a second before it was killed.
    let started = cluster.journal.wait_for(&second.backend_id, EventKind::Start, SHORT).await;
    assert!(started.boot_ms >= term.boot_ms + 900, "{term:?} {started:?}");
    cluster.journal.assert_no_overlap();

    // Allowed again in time, nothing happens to it.
    client.prevent_renewal("k", "").await.unwrap();
    client.allow_renewal("k", "").await.unwrap();
    let from = cluster.key("k").await.unwrap();
    wait_until("the key is renewed again", SHORT, async || {
        let now = cluster.key("k").await.unwrap();
        if now.expires_at > from.expires_at + 4_500 { Ok(()) } else { Err(now) }
    })
    .await;
    assert_eq!(cluster.key("k").await.unwrap().backend, second.backend_id);
}

#[tokio::test]
async fn a_key_is_revoked_only_after_its_expiry() {
    let mut cluster = Cluster::builder().drones(1).start().await;
    let first = cluster.connect_ready("k").await;
    let url = |index: usize| format!("{}/ctrl/key?name=k", cluster.url(index));
    for index in 0..3 {
        let refused = cluster.http.send(Method::DELETE, &url(index), &[], None).await.unwrap();
        refused.refused(ApiErrorKind::KeyNotExpired);
    }
    let urls = [url(0), url(1), url(2)];
    cluster.drones[0].kill9();
    let last = cluster.key("k").await.expect("a key outlives its drone");
    wait_until("the key is gone", LONG, async || {
        let before = cluster.info().await.cluster_time;
        let answer = cluster.http.send(Method::DELETE, &urls[1], &[], None).await.unwrap();
        let after = cluster.info().await.cluster_time;
        if answer.status == 409 {
            // The sweep comes once a second.
            assert!(before < last.expires_at + 3_000, "expired, and still there: {answer:?}");
            answer.refused(ApiErrorKind::KeyNotExpired);
            return Err(answer);
        }
        // Revoked here, or swept already; in either case not early.
        assert!(after >= last.expires_at, "{after} is before the expiry of {last:?}: {answer:?}");
        assert!(answer.status.is_success() || answer.status == 404, "{answer:?}");
        Ok(())
    })
    .await;
    assert_eq!(cluster.key("k").await, None);
    let status = cluster.client().backend_status(&first.backend_id).await.unwrap();
    assert_eq!(status.status, BackendStatus::Terminated);
    assert_eq!(status.termination_reason, Some(TerminationReason::Lost));
    cluster.restart_drone(0);
    cluster.wait_drone(0).await;
    let second = cluster.connect_ready("k").await;
    assert!(second.fencing_token > first.fencing_token);
    cluster.journal.assert_no_overlap();
}

#[tokio::test]
async fn a_backend_id_is_used_once() {
    let cluster = Cluster::builder().lease(CALM).start().await;
    let client = cluster.client();
    let backend = cluster.backend().id("my-own-id");
    let first = client.connect(&backend.request("k")).await.unwrap();
    assert_eq!(first.backend_id, "my-own-id");
    cluster.wait_status("my-own-id", BackendStatus::Ready).await;
    // For its own key it is that backend; for another key it is refused, also after its end.
    assert_eq!(client.connect(&backend.request("k")).await.unwrap().backend_id, "my-own-id");
    assert_eq!(kind(&client.connect(&backend.request("j")).await.unwrap_err()), ApiErrorKind::BackendIdUsed);
    client.terminate("my-own-id", TerminationKind::Hard).await.unwrap();
    cluster.wait_free("k").await;
    assert_eq!(kind(&client.connect(&backend.request("k")).await.unwrap_err()), ApiErrorKind::BackendIdUsed);
    assert!(cluster.keys().await.is_empty());
}

#[tokio::test]
async fn a_request_without_a_drone_or_a_cluster_is_refused_and_leaves_the_key_free() {
    let mut cluster = Cluster::builder().lease(CALM).no_default_cluster().start().await;
    let backend = cluster.backend();
    let at = |index| cluster.url(index);
    let answer = cluster.http.connect(&at(0), &backend.request("k")).await;
    answer.refused(ApiErrorKind::NoClusterProvided);
    let elsewhere = backend.clone().cluster("elsewhere:1");
    cluster.http.connect(&at(1), &elsewhere.request("k")).await.refused(ApiErrorKind::NoDroneAvailable);
    let pool = backend.clone().cluster(&cluster.name).pool("gpu");
    cluster.http.connect(&at(2), &pool.request("k")).await.refused(ApiErrorKind::NoDroneAvailable);
    assert_eq!(cluster.key("k").await, None);

    // The client goes on asking if it is told to, until a drone is there.
    cluster.drones[0].kill9();
    cluster.drones[0].set_flag("--pool", "gpu");
    let options = RequestOptions { retry_no_drone: true, ..RequestOptions::default() };
    let client = cluster.client().with_options(options);
    let request = pool.request("k");
    let connect = tokio::spawn(async move { client.connect(&request).await });
    cluster.restart_drone(0);
    assert!(connect.await.unwrap().unwrap().spawned);
}
