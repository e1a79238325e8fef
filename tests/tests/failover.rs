//! Controllers that are killed, stopped and paused while keys are held.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use futures::future::{join_all, ready};
use futures::{StreamExt, TryStreamExt};
use holdfast_client::Client;
use holdfast_tests::harness::{Cluster, EventKind, LONG, TestBackend, wait_until};
use holdfast_wire::http::ConnectResponse;
use holdfast_wire::{ApiErrorKind, BackendStatus, TerminationKind};
use nix::sys::signal::Signal;
use reqwest::Method;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Outlives an election on a busy machine, and expires within a test.
const LEASE: &str = "renew=1s,soft=5s,hard=6s,expiry=8s";
const EXPIRY_MS: u64 = 8_000;

/// Gets `count` keys and waits for their backends. Key → answer.
async fn hold(cluster: &Cluster, count: usize) -> BTreeMap<String, ConnectResponse> {
    let client = cluster.client();
    let names: Vec<_> = (0..count).map(|i| format!("held-{i:02}")).collect();
    let requests: Vec<_> = names.iter().map(|name| cluster.backend().request(name)).collect();
    let answers = join_all(requests.iter().map(|request| client.connect(request))).await;
    let held: BTreeMap<_, _> = names.into_iter().zip(answers.into_iter().map(Result::unwrap)).collect();
    for answer in held.values() {
        cluster.assert_ready(&answer.backend_id).await;
    }
    held
}

/// Every key is where it was, and its backend has not noticed anything.
async fn assert_undisturbed(cluster: &Cluster, held: &BTreeMap<String, ConnectResponse>) {
    let keys: BTreeMap<_, _> = cluster.keys().await.into_iter().map(|key| (key.name.clone(), key)).collect();
    for (name, answer) in held {
        let key = keys.get(name).unwrap_or_else(|| panic!("key {name} of {answer:?} is lost"));
        assert_eq!((&key.backend, key.token), (&answer.backend_id, answer.fencing_token), "{name}");
        assert_eq!(cluster.journal.kinds(name), [EventKind::Start], "{name}");
    }
    cluster.journal.assert_no_overlap();
}

/// Waits until each key was renewed after `from_ms` (cluster time).
async fn wait_renewed(cluster: &Cluster, held: &BTreeMap<String, ConnectResponse>, from_ms: u64) {
    wait_until("every key is renewed", LONG, async || {
        let keys = cluster.keys().await;
        let late: Vec<_> = keys.into_iter().filter(|key| held.contains_key(&key.name)).collect();
        assert_eq!(late.len(), held.len(), "a key is lost");
        let late: Vec<_> = late.into_iter().filter(|key| key.expires_at <= from_ms + EXPIRY_MS).collect();
        if late.is_empty() { Ok(()) } else { Err(late) }
    })
    .await;
}

/// One client: a new key, a held key, a new key, … until told to stop. Everything acknowledged goes to `acknowledged`.
async fn keep_connecting(
    client: Client,
    backend: TestBackend,
    name: String,
    held: BTreeMap<String, ConnectResponse>,
    acknowledged: Arc<Mutex<Vec<ConnectResponse>>>,
    stop: Arc<AtomicBool>,
) {
    for (i, (held_name, holder)) in held.iter().cycle().enumerate() {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let answer = client.connect(&backend.request(&format!("{name}-{i}"))).await;
        let answer = answer.unwrap_or_else(|e| panic!("{name}-{i}: {e}"));
        acknowledged.lock().unwrap().push(answer.clone());
        let again = client.connect(&backend.request(held_name)).await;
        let again = again.unwrap_or_else(|e| panic!("{held_name}: {e}"));
        assert_eq!((&again.backend_id, again.spawned), (&holder.backend_id, false));
        // Not faster than drones can start them.
        let runs = client
            .status_stream(&answer.backend_id)
            .try_skip_while(|message| ready(Ok(message.status < BackendStatus::Waiting)));
        let runs = tokio::time::timeout(LONG, std::pin::pin!(runs).next()).await.expect("it runs in time");
        runs.expect("its states go on to the end").expect("the stream is made anew when it is lost");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_keys_and_their_clients_survive_the_death_of_the_leader() {
    let mut cluster = Cluster::builder().drones(2).lease(LEASE).start().await;
    let mut held = hold(&cluster, 50).await;
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged: Vec<Arc<Mutex<Vec<ConnectResponse>>>> = (0..3).map(|_| Arc::default()).collect();
    let clients: Vec<_> = acknowledged
        .iter()
        .enumerate()
        .map(|(i, acknowledged)| {
            let (client, backend, stop) = (cluster.client(), cluster.backend(), Arc::clone(&stop));
            let (name, acknowledged) = (format!("client-{i}"), Arc::clone(acknowledged));
            tokio::spawn(keep_connecting(client, backend, name, held.clone(), acknowledged, stop))
        })
        .collect();
    let counts = || acknowledged.iter().map(|all| all.lock().unwrap().len()).collect::<Vec<_>>();
    wait_until("all clients are at work", LONG, async || {
        let counts = counts();
        if counts.iter().all(|count| *count >= 3) { Ok(()) } else { Err(counts) }
    })
    .await;

    let killed_ms = cluster.info().await.cluster_time;
    let old = cluster.leader().await;
    let before = counts();
    cluster.controllers[old].kill9();
    let begin = Instant::now();
    // Two more each may have been on their way.
    wait_until("all clients succeed again", LONG, async || {
        let counts = counts();
        if counts.iter().zip(&before).all(|(now, before)| *now >= before + 5) { Ok(()) } else { Err(counts) }
    })
    .await;
    println!("all clients went on {:?} after the death of the leader", begin.elapsed());
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.unwrap();
    }
    assert_ne!(cluster.leader().await, old);

    // Every acknowledged connect is still true.
    held.extend(
        acknowledged.iter().flat_map(|all| all.lock().unwrap().clone()).map(|a| (a.key.name.clone(), a)),
    );
    assert_undisturbed(&cluster, &held).await;
    // The new leader renews them all, the old one catches up and agrees.
    wait_renewed(&cluster, &held, killed_ms + 1_000).await;
    cluster.restart_controller(old);
    cluster.wait_controller(old).await;
    for answer in held.values().take(5) {
        let request = cluster.backend().request(&answer.key.name);
        let again: ConnectResponse = cluster.http.connect(&cluster.url(old), &request).await.ok();
        assert_eq!(again.backend_id, answer.backend_id);
    }
    assert_undisturbed(&cluster, &held).await;
}

#[tokio::test]
async fn everything_acknowledged_survives_the_death_of_all_controllers_at_once() {
    let mut cluster = Cluster::builder().drones(2).lease(LEASE).start().await;
    let held = hold(&cluster, 20).await;
    for round in 0..2 {
        let before = cluster.info().await;
        cluster.controllers.iter_mut().for_each(|controller| controller.signal(Signal::SIGKILL));
        cluster.controllers.iter_mut().for_each(|controller| controller.kill9());
        for index in 0..3 {
            cluster.restart_controller(index);
        }
        for index in 0..3 {
            cluster.wait_controller(index).await;
        }
        let after = cluster.info().await;
        assert_eq!(after.cluster_id, before.cluster_id);
        assert!(after.term > before.term, "{before:?} {after:?}");
        // The last entry's, not the last that a leader's live clock has shown: that may be up to a tick (1 s) more.
        assert!(after.cluster_time + 1_500 > before.cluster_time, "{before:?} {after:?}");
        assert_undisturbed(&cluster, &held).await;
        wait_renewed(&cluster, &held, before.cluster_time + 1_000).await;
        // Tokens go on growing.
        let new = cluster.connect_ready(&format!("new-{round}")).await;
        assert!(held.values().all(|answer| answer.fencing_token < new.fencing_token));
    }
    assert_undisturbed(&cluster, &held).await;
}

#[tokio::test]
async fn a_leader_that_is_told_to_stop_hands_over_and_finishes_what_it_has_begun() {
    // An election alone would take far longer than this test allows.
    let mut cluster = Cluster::builder()
        .lease("renew=2s,soft=15s,hard=18s,expiry=25s")
        .election_timeout("4s")
        .start()
        .await;
    let held = hold(&cluster, 5).await;
    let old = cluster.leader().await;
    let url = format!("{}/ctrl/connect", cluster.url(old));
    // Connections first, so that all requests are under way when the signal comes.
    let requests = (0..40).map(|i| {
        let (http, url) = (cluster.http.clone(), url.clone());
        let body = serde_json::to_vec(&cluster.backend().request(&format!("under-way-{i}"))).unwrap();
        tokio::spawn(async move { http.send(Method::POST, &url, &[], Some(body)).await })
    });
    let requests: Vec<_> = requests.collect();
    tokio::task::yield_now().await;
    let begin = Instant::now();
    cluster.controllers[old].signal(Signal::SIGTERM);

    let (mut acknowledged, mut under_way, mut unanswered) = (held, 0, Vec::new());
    for (i, request) in requests.into_iter().enumerate() {
        match request.await.unwrap() {
            Ok(answer) if answer.status.is_success() => {
                under_way += 1;
                let answer: ConnectResponse = answer.read();
                acknowledged.insert(answer.key.name.clone(), answer);
            }
            Ok(answer) => drop(answer.refused(ApiErrorKind::NoLeader)),
            // Too late to be let in: no connection, or an idle one that was closed just then. Looked at below. Silence is
            // neither.
            Err(error) => {
                assert!(!error.is_timeout(), "{error:?}");
                unanswered.push(format!("under-way-{i}"));
            }
        }
    }
    println!("{under_way} of the requests under way were acknowledged");
    assert!(under_way > 0, "none was under way: this test has tested nothing");
    let status = cluster.controllers[old].wait(LONG).await;
    assert_eq!(status.code(), Some(0), "{}", cluster.controllers[old].log());
    let new = cluster.leader_other_than(old).await;
    let took = begin.elapsed();
    assert!(took < Duration::from_millis(3_500), "{took:?}: that was an election, not a hand-over");
    for name in unanswered {
        assert!(cluster.key(&name).await.is_none(), "{name} was let in, and has got no answer");
    }
    for answer in acknowledged.values() {
        cluster.wait_status(&answer.backend_id, BackendStatus::Waiting).await;
    }
    assert_undisturbed(&cluster, &acknowledged).await;
    let later: ConnectResponse =
        cluster.http.connect(&cluster.url(new), &cluster.backend().request("later")).await.ok();
    assert!(later.spawned);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_slept_through_its_deposition_neither_answers_from_old_state_nor_acknowledges() {
    let lease = "renew=2s,soft=8s,hard=10s,expiry=14s";
    let cluster = Cluster::builder().drones(2).lease(lease).start().await;
    let first = cluster.connect_ready("moved").await;
    let old = cluster.leader().await;
    cluster.controllers[old].signal(Signal::SIGSTOP);
    let new = cluster.leader_other_than(old).await;
    let http = &cluster.http;

    // While it sleeps, the key moves on to another backend.
    let request = cluster.backend().request("moved");
    let terminate = format!("{}/ctrl/b/{}/hard-terminate", cluster.url(new), first.backend_id);
    assert!(http.send(Method::POST, &terminate, &[], None).await.unwrap().status.is_success());
    let second = wait_until("the key has another backend", LONG, async || {
        let answer = http.connect(&cluster.url(new), &request).await;
        let moved =
            answer.status.is_success() && answer.read::<ConnectResponse>().backend_id != first.backend_id;
        if moved { Ok(answer.read::<ConnectResponse>()) } else { Err(answer) }
    })
    .await;
    assert!(second.fencing_token > first.fencing_token);

    // What it finds when it wakes: requests for the moved key and for free ones, of before it knows anything.
    let ask = |i: usize| {
        let (http, url) = (http.clone(), cluster.url(old));
        let name = if i.is_multiple_of(2) { "moved".to_owned() } else { format!("free-{}", i / 4) };
        let request = cluster.backend().request(&name);
        tokio::spawn(async move { http.connect(&url, &request).await })
    };
    let asleep: Vec<_> = (0..16).map(ask).collect();
    tokio::task::yield_now().await;
    cluster.controllers[old].signal(Signal::SIGCONT);
    let awake: Vec<_> = (16..32).map(ask).collect();
    let mut acknowledged = BTreeMap::new();
    for answer in asleep.into_iter().chain(awake) {
        let answer = answer.await.unwrap();
        if answer.status.is_success() {
            let answer: ConnectResponse = answer.read();
            if answer.key.name == "moved" {
                assert_eq!(answer.backend_id, second.backend_id, "an answer from before it fell asleep");
            }
            acknowledged.insert(answer.key.name.clone(), answer);
        } else {
            let kind = answer.json()["kind"].as_str().unwrap().to_owned();
            assert!(["NoLeader", "OutcomeUnknown"].contains(&kind.as_str()), "{answer:?}");
        }
    }
    cluster.wait_controller(old).await;
    for (name, answer) in &acknowledged {
        let key = cluster.key(name).await.unwrap_or_else(|| panic!("{name} was acknowledged and is free"));
        assert_eq!((&key.backend, key.token), (&answer.backend_id, answer.fencing_token));
    }
    cluster.journal.assert_no_overlap();
    // And its own word for it is that of the others.
    let status = cluster.client().backend_status(&first.backend_id).await.unwrap();
    assert_eq!(
        (status.status, status.termination_kind),
        (BackendStatus::Terminated, Some(TerminationKind::Hard))
    );
}

#[tokio::test]
async fn a_follower_that_was_away_catches_up_before_it_answers() {
    let mut cluster = Cluster::builder().lease(LEASE).start().await;
    let held = hold(&cluster, 5).await;
    let leader = cluster.leader().await;
    let follower = (0..3).find(|index| *index != leader).unwrap();
    cluster.controllers[follower].kill9();
    let while_away = cluster.connect_ready("while-away").await;
    cluster.restart_controller(follower);
    cluster.wait_controller(follower).await;
    let request = cluster.backend().request("while-away");
    let seen: ConnectResponse = cluster.http.connect(&cluster.url(follower), &request).await.ok();
    assert_eq!(seen.backend_id, while_away.backend_id);
    assert_undisturbed(&cluster, &held).await;
}
