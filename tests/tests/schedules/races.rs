//! What happens side by side: reigns of leaders, releases and acquisitions, everything at once.

use crate::support::{ADDRESS, SOON, connect, drone, hold, request};
use holdfast_tests::harness::{Cluster, LONG, SHORT, wait_until};
use holdfast_tests::sim_drone::{AutoDrone, Identity, LocalClock, SimDrone, SimError};
use holdfast_wire::drone::{Action, MessageFromDrone, MessageToDrone, RenewKeyRequest};
use holdfast_wire::http::{ClusterInfo, ConnectResponse, KeyPage};
use holdfast_wire::{ApiErrorKind, BackendState, TerminationKind};
use nix::sys::signal::Signal;
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Cluster time and the keys' tokens and expiries, as one linearizable look after the other sees them.
#[derive(Default)]
struct Seen {
    /// First look: cluster time and when it was asked for.
    first: Option<(u64, Instant)>,
    /// Term and cluster time of the last look.
    last: (u64, u64),
    looks: u32,
    keys: BTreeMap<String, (u64, u64)>,
}

impl Seen {
    /// Invariant 3 of the design, and that a token's expiry only moves ahead.
    fn look(&mut self, asked: Instant, info: &ClusterInfo, page: KeyPage) {
        let now_ms = info.cluster_time;
        // What a leader's clock said beyond its last entry dies with its reign; leases get longer by it.
        let last = std::mem::replace(&mut self.last, (info.term, now_ms));
        assert!((info.term, now_ms) >= last, "cluster time went back from {last:?} to {now_ms} in one term");
        let (first_ms, first_at) = *self.first.get_or_insert((now_ms, asked));
        let elapsed_ms = first_at.elapsed().as_millis() as u64;
        let limit_ms = elapsed_ms * 105 / 100 + 5;
        // It may stand below the first look: see above.
        let ran_ms = now_ms.saturating_sub(first_ms);
        assert!(ran_ms <= limit_ms, "cluster time ran {ran_ms} ms in {elapsed_ms} ms");
        for key in page.keys {
            let new = (key.token, key.expires_at);
            if let Some(old) = self.keys.insert(key.name.clone(), new) {
                // Ordered by token first: of one token the expiry, of different ones the token.
                assert!(new >= old, "{key:?} went back from {old:?}");
            }
        }
        self.looks += 1;
    }
}

/// Brings a controller to its next reign. The only other one that answers hands over to it.
async fn lead_again(cluster: &Cluster, old: usize) {
    let now = cluster.leader().await;
    if now == old {
        return;
    }
    let third = 3 - old - now;
    cluster.controllers[third].signal(Signal::SIGSTOP);
    wait_until("the controller leads again", LONG, async || {
        let now = cluster.leader().await;
        if now == old {
            return Ok(());
        }
        // Longer than an election time-out, after which the leader counts the stopped one as dead.
        tokio::time::sleep(Duration::from_millis(700)).await;
        let transfer = format!("{}/ctrl/cluster/transfer-leader", cluster.url(now));
        Err((now, cluster.http.post(&transfer, &serde_json::json!({})).await))
    })
    .await;
    cluster.controllers[third].signal(Signal::SIGCONT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proposal_queued_in_one_reign_of_a_leader_and_appended_in_its_next_makes_no_key_expire_early() {
    /// How often the leader is stopped and made leader again.
    const ROUNDS: u64 = 2;
    /// Connects begun around each stop.
    const IN_FLIGHT: u64 = 32;
    let cluster = Cluster::builder().drones(0).lease("renew=1s,soft=6s,hard=7s,expiry=9s").start().await;
    let old = cluster.leader().await;
    let url = cluster.url(old);
    // Drones that keep their keys through it all stay away from the leader that is stopped.
    let others: Vec<String> = (0..3).filter(|at| *at != old).map(|at| cluster.url(at)).collect();
    let keepers: Vec<AutoDrone> = (0..2)
        .map(|at| {
            let mut urls = others.clone();
            urls.rotate_left(at);
            AutoDrone::start(urls, Identity::new(&cluster.name, &format!("dr-keep{at}"), "a"))
        })
        .collect();
    let mut kept: HashMap<String, ConnectResponse> = HashMap::new();
    for at in 0..6 {
        let key = format!("kept-{at}");
        kept.insert(key.clone(), connect(&cluster, &key).await);
    }
    // One that has its session with that leader, in a pool of its own so that it gets this key alone.
    let clock = LocalClock::reading(40_000);
    let mut identity = Identity::new(&cluster.name, "dr-old", "a");
    identity.pool = "old".to_owned();
    let mut with_old = SimDrone::connect(&url, &identity).await.unwrap();
    with_old.start_heartbeats(clock.clone(), Duration::from_millis(100));
    let mut asked = request(&cluster, "renewed");
    asked.spawn_config.as_mut().unwrap().pool = "old".to_owned();
    let client = crate::support::patient(&cluster);
    let renewed = client.connect(&asked).await.unwrap();
    let spawn = with_old.next_spawn(SOON).await.unwrap();
    crate::support::start_backend(&mut with_old, &spawn).await;

    let seen = Arc::new(Mutex::new(Seen::default()));
    let done = Arc::new(AtomicBool::new(false));
    let watcher = {
        let (client, seen, done) = (client.clone(), Arc::clone(&seen), Arc::clone(&done));
        tokio::spawn(async move {
            while !done.load(Ordering::Relaxed) {
                let asked = Instant::now();
                let filter = holdfast_client::KeyFilter::default();
                let (page, info) = (client.keys_page(&filter, None).await, client.cluster_info().await);
                if let (Ok(page), Ok(info)) = (page, info) {
                    seen.lock().unwrap().look(asked, &info, page);
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
    };

    let mut acknowledged = BTreeMap::new();
    let own = [(renewed.backend_id.clone(), renewed.fencing_token)];
    for round in 0..ROUNDS {
        // In flight at the leader that is stopped: acquisitions at all stages of their way, and a renewal.
        let connects: Vec<_> = (0..IN_FLIGHT)
            .map(|at| {
                let key = format!("flight-{round}-{at}");
                let (http, url, request) = (cluster.http.clone(), url.clone(), request(&cluster, &key));
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(at / 4)).await;
                    (key, http.connect(&url, &request).await)
                })
            })
            .collect();
        let asked_at_ms = clock.now_ms();
        with_old.send_renewals(&own, asked_at_ms).await.unwrap();
        tokio::time::sleep(Duration::from_millis(IN_FLIGHT / 8)).await;
        cluster.controllers[old].signal(Signal::SIGSTOP);
        cluster.leader_other_than(old).await;
        let in_flight = connects.iter().filter(|connect| !connect.is_finished()).count();
        assert!(in_flight > 0, "nothing was in flight in round {round}");
        println!("round {round}: {in_flight} of {IN_FLIGHT} connects in flight at the stop");
        cluster.controllers[old].signal(Signal::SIGCONT);
        match with_old.renewals_answered(SOON).await {
            Ok(answer) => {
                let deadlines = answer.keys[0].deadlines.expect("renewed, then or now");
                assert_eq!(deadlines.renew_at, asked_at_ms + 1_000, "counted from the request");
            }
            // Sent elsewhere by a controller that leads no more.
            Err(SimError::Closed { .. }) => {}
            Err(other) => panic!("the renewal in flight: {other}"),
        }

        lead_again(&cluster, old).await;
        for connect in connects {
            let (key, answer) = connect.await.unwrap();
            if answer.status.is_success() {
                acknowledged.insert(key, answer.ok::<ConnectResponse>());
            } else {
                let kind = answer.read::<holdfast_wire::ApiError>().kind;
                // It may have seen no drone when it was asked; anything else must be a word about the leader.
                assert!(
                    matches!(
                        kind,
                        ApiErrorKind::OutcomeUnknown
                            | ApiErrorKind::NoLeader
                            | ApiErrorKind::NoDroneAvailable
                    ),
                    "{answer:?}"
                );
            }
        }
        drop(with_old);
        with_old = SimDrone::connect_any(std::slice::from_ref(&url), &identity, LONG).await.unwrap();
        let again = with_old.renew_many(&own, clock.now_ms(), SOON).await.unwrap();
        assert!(again.keys[0].deadlines.is_some(), "{again:?}");
    }
    // Longer than a lease in the new reign: what would expire early has expired.
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        with_old.renew_many(&own, clock.now_ms(), SOON).await.unwrap();
        tokio::time::sleep(Duration::from_millis(700)).await;
    }
    done.store(true, Ordering::Relaxed);
    watcher.await.unwrap();
    assert!(seen.lock().unwrap().looks > 50, "too few looks to show anything");

    kept.insert("renewed".to_owned(), renewed);
    kept.extend(acknowledged);
    for (key, answer) in &kept {
        let held = cluster.key(key).await.unwrap_or_else(|| panic!("{key} was lost: {answer:?}"));
        assert_eq!((held.token, &held.backend), (answer.fencing_token, &answer.backend_id), "{key}");
    }
    drop(keepers);
}

/// What is known of the holders of one key, by token.
#[derive(Default)]
struct Holders {
    /// Spawned here and not yet reported terminated.
    live: Option<u64>,
    spawned: Vec<u64>,
    /// Renewals that raced the report of the end, and were refused.
    racing_refused: u32,
    /// Renewals asked for after the end was acknowledged; all must be refused.
    late_refused: u32,
    problems: Vec<String>,
}

/// A drone that ends each backend soon and then says everything late and twice.
async fn restless(mut sim: SimDrone, clock: LocalClock, holders: Arc<Mutex<Holders>>) -> SimError {
    let mut known: BTreeSet<String> = BTreeSet::new();
    // Reports of ends, until they are acknowledged.
    let mut ends: HashMap<i64, (String, u64)> = HashMap::new();
    loop {
        let message = match sim.recv(Duration::from_secs(60)).await {
            Ok(message) => message,
            Err(end) => return end,
        };
        match message {
            MessageToDrone::Action(action) => {
                if let Err(end) = sim.ack(&action.action_id).await {
                    return end;
                }
                let (backend, Action::Spawn { key, .. }) = (action.backend_id, action.action) else {
                    continue;
                };
                if !known.insert(backend.clone()) {
                    continue;
                }
                {
                    let mut holders = holders.lock().unwrap();
                    if let Some(live) = holders.live.replace(key.token) {
                        holders.problems.push(format!("token {} beside the live {live}", key.token));
                    }
                    if holders.spawned.last().is_some_and(|last| *last >= key.token) {
                        let problem = format!("token {} after {:?}", key.token, holders.spawned.last());
                        holders.problems.push(problem);
                    }
                    holders.spawned.push(key.token);
                }
                let token = Some(key.token);
                let pause_ms = rand::rng().random_range(0..15);
                let ready = BackendState::Ready { address: ADDRESS };
                let said = async {
                    sim.report(&backend, token, ready.clone()).await?;
                    tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                    // From here on the controllers may give the key away.
                    holders.lock().unwrap().live = None;
                    let end = sim.report(&backend, token, crate::support::exited()).await?;
                    ends.insert(end, (backend.clone(), key.token));
                    // Late and twice: none of it may touch the next holder.
                    sim.report(&backend, token, crate::support::exited()).await?;
                    sim.report(&backend, token, ready).await?;
                    sim.send_renewals(&[(backend.clone(), key.token)], clock.now_ms()).await
                };
                if let Err(end) = said.await {
                    return end;
                }
            }
            MessageToDrone::RenewKeysResponse(answer) => {
                let mut holders = holders.lock().unwrap();
                for key in answer.keys {
                    // It may overtake the report, which stands in another entry; then the backend still held its key.
                    if key.refused.is_some() {
                        holders.racing_refused += 1;
                    }
                }
            }
            MessageToDrone::AckEvent { event_id } => {
                // Now the key is surely no longer its.
                let Some((backend, token)) = ends.remove(&event_id) else { continue };
                let local_time = clock.now_ms();
                let renew = RenewKeyRequest { backend, local_time, token: Some(token) };
                if let Err(end) = sim.send(&MessageFromDrone::RenewKey(renew)).await {
                    return end;
                }
            }
            MessageToDrone::RenewKeyResponse(answer) => {
                let mut holders = holders.lock().unwrap();
                match answer.deadlines {
                    None => holders.late_refused += 1,
                    Some(_) => holders.problems.push(format!("renewed after its end: {answer:?}")),
                }
            }
            MessageToDrone::AckDraining {}
            | MessageToDrone::AckActivity { .. }
            | MessageToDrone::AckBackends {} => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn release_and_reacquisition_side_by_side_leave_one_holder_at_a_time_and_tokens_that_grow() {
    let cluster = Cluster::builder().drones(0).lease("renew=20s,soft=25s,hard=30s,expiry=60s").start().await;
    let holders = Arc::new(Mutex::new(Holders::default()));
    let clock = LocalClock::reading(1_000);
    let mut drones = Vec::new();
    for (at, url) in cluster.urls().into_iter().enumerate() {
        let identity = Identity::new(&cluster.name, &format!("dr-{at}"), "a");
        let mut sim = SimDrone::connect(&url, &identity).await.unwrap();
        sim.start_heartbeats(clock.clone(), Duration::from_millis(500));
        drones.push(tokio::spawn(restless(sim, clock.clone(), Arc::clone(&holders))));
    }
    connect(&cluster, "warm-up").await;
    wait_until("the warm-up's backend has ended", SHORT, async || {
        cluster.key("warm-up").await.map_or(Ok(()), Err)
    })
    .await;
    *holders.lock().unwrap() = Holders::default();

    let end = Instant::now() + Duration::from_secs(6);
    let connectors: Vec<_> = (0..12)
        .map(|at| {
            let (http, url) = (cluster.http.clone(), cluster.url(at % 3));
            let request = request(&cluster, "k");
            tokio::spawn(async move {
                let mut got: Vec<ConnectResponse> = Vec::new();
                while Instant::now() < end {
                    let answer = http.connect(&url, &request).await;
                    if answer.status.is_success() {
                        got.push(answer.ok());
                    } else {
                        // With so many after it, somebody may wait in vain; that is said as it is.
                        answer.refused(ApiErrorKind::KeyHeld);
                    }
                }
                got
            })
        })
        .collect();
    let mut by_token: BTreeMap<u64, String> = BTreeMap::new();
    let mut spawned = BTreeSet::new();
    let mut answers = 0;
    for connector in connectors {
        let mut last = 0;
        for answer in connector.await.unwrap() {
            let token = answer.fencing_token;
            assert!(token >= last, "one client's answers went back from token {last} to {token}");
            last = token;
            let backend = by_token.entry(token).or_insert_with(|| answer.backend_id.clone());
            assert_eq!(*backend, answer.backend_id, "two backends under token {token}");
            assert!(!answer.spawned || spawned.insert(token), "token {token} was spawned twice");
            answers += 1;
        }
    }
    wait_until("the last backend has ended", SHORT, async || cluster.key("k").await.map_or(Ok(()), Err))
        .await;
    for drone in &drones {
        assert!(!drone.is_finished(), "a drone's session ended");
        drone.abort();
    }
    let holders = holders.lock().unwrap();
    assert!(holders.problems.is_empty(), "{:#?}", holders.problems);
    assert_eq!(holders.live, None);
    // A client may be told of an acquisition of which the drone learns later, but not the other way.
    let seen: BTreeSet<u64> = holders.spawned.iter().copied().collect();
    assert!(spawned.is_subset(&seen), "acknowledged but never delivered: {:?}", spawned.difference(&seen));
    assert!(holders.spawned.len() >= 20, "only {} acquisitions", holders.spawned.len());
    assert!(holders.late_refused >= 20, "only {} late renewals", holders.late_refused);
    println!(
        "{answers} answers, {} acquisitions, {} late renewals refused, {} racing ones",
        holders.spawned.len(),
        holders.late_refused,
        holders.racing_refused
    );
}

/// One random operation at a random controller.
async fn operate(cluster: &Cluster, urls: &[String]) {
    let (url, key, dice) = {
        let mut rng = rand::rng();
        (
            urls[rng.random_range(0..urls.len())].clone(),
            format!("key-{}", rng.random_range(0..40)),
            rng.random_range(0..100),
        )
    };
    let http = &cluster.http;
    let name = serde_json::json!({"name": key});
    let held = async || -> Option<holdfast_wire::http::KeyInfo> {
        let answer = http.get(&format!("{url}/ctrl/key?name={key}&consistency=local")).await;
        answer.status.is_success().then(|| answer.read())
    };
    // Whatever it is answered, a refusal included: replicas must agree on that too.
    match dice {
        0..60 => {
            let mut request = request(cluster, &key);
            request.wait_ms = Some(200);
            http.connect(&url, &request).await;
        }
        60..80 => {
            if let Some(held) = held().await {
                let kind = if dice < 70 { "soft" } else { "hard" };
                http.post(
                    &format!("{url}/ctrl/b/{}/{kind}-terminate", held.backend),
                    &serde_json::Value::Null,
                )
                .await;
            }
        }
        80..86 => {
            http.post(&format!("{url}/ctrl/key/prevent-renewal"), &name).await;
        }
        86..94 => {
            http.post(&format!("{url}/ctrl/key/allow-renewal"), &name).await;
        }
        _ => {
            if let Some(held) = held().await {
                let body = serde_json::json!({"backend_id": held.backend, "user": "ann"});
                http.post(&format!("{url}/ctrl/b/revoke"), &body).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_have_equal_checksums_after_a_random_run() {
    let mut cluster =
        Cluster::builder().drones(0).lease("renew=500ms,soft=1500ms,hard=2s,expiry=3s").start().await;
    let urls = cluster.urls();
    let _drones: Vec<AutoDrone> = (0..3)
        .map(|at| {
            let mut urls = urls.clone();
            urls.rotate_left(at);
            AutoDrone::start(urls, Identity::new(&cluster.name, &format!("dr-{at}"), "a"))
        })
        .collect();
    connect(&cluster, "first").await;
    let mut checksums: BTreeMap<u64, [Option<String>; 3]> = BTreeMap::new();
    let collect = async |cluster: &Cluster, checksums: &mut BTreeMap<u64, [Option<String>; 3]>| {
        for at in 0..3 {
            if cluster.controllers[at].pid().is_some() {
                let url = format!("{}/ctrl/cluster?consistency=local", cluster.url(at));
                let info: ClusterInfo = cluster.http.get(&url).await.ok();
                checksums.entry(info.checksum.index).or_default()[at] = Some(info.checksum.value);
            }
        }
    };
    for phase in 0..3 {
        let end = Instant::now() + Duration::from_secs(3);
        let live: Vec<String> =
            (0..3).filter(|at| cluster.controllers[*at].pid().is_some()).map(|at| cluster.url(at)).collect();
        let operations = async {
            let workers = (0..8).map(|_| async {
                while Instant::now() < end {
                    operate(&cluster, &live).await;
                }
            });
            futures::future::join_all(workers).await;
        };
        let watch = async {
            while Instant::now() < end {
                collect(&cluster, &mut checksums).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::join!(operations, watch);
        // Another leader, and a replica that catches up.
        match phase {
            0 => {
                let leader = cluster.leader().await;
                let url = format!("{}/ctrl/cluster/transfer-leader", cluster.url(leader));
                cluster.http.post(&url, &serde_json::json!({})).await;
            }
            1 => {
                let leader = cluster.leader().await;
                cluster.controllers[leader].kill9();
                cluster.leader_other_than(leader).await;
                cluster.restart_controller(leader);
                cluster.wait_controller(leader).await;
            }
            _ => {}
        }
    }
    // At rest: the same index on all three.
    let (index, values) = wait_until("all replicas publish a checksum at one index", LONG, async || {
        collect(&cluster, &mut checksums).await;
        let (index, values) = checksums.last_key_value().expect("collected");
        if values.iter().all(Option::is_some) { Ok((*index, values.clone())) } else { Err(checksums.clone()) }
    })
    .await;
    assert!(index > 0, "no checksum was ever published: {values:?}");
    let mut compared = 0;
    for (index, values) in &checksums {
        let known: BTreeSet<&String> = values.iter().flatten().collect();
        assert!(known.len() <= 1, "replicas differ at {index}: {values:?}");
        compared += usize::from(values.iter().flatten().count() > 1);
    }
    assert!(compared >= 3, "too few checksums met to show anything: {checksums:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connect_that_meets_a_leaving_backend_waits_for_its_end_and_gets_the_next() {
    let cluster = Cluster::builder().drones(0).lease("renew=20s,soft=25s,hard=30s,expiry=60s").start().await;
    let clock = LocalClock::reading(1_000);
    let mut sim = drone(&cluster, &Identity::new(&cluster.name, "dr-a", "a"), &clock).await;
    let (first, _) = hold(&cluster, &mut sim, "k").await;
    let client = cluster.client();
    client.terminate(&first.backend_id, TerminationKind::Soft).await.unwrap();
    let end = sim.next_action(SOON).await.unwrap();
    assert!(matches!(end.action, Action::Terminate { kind: TerminationKind::Soft, .. }), "{end:?}");
    sim.ack(&end.action_id).await.unwrap();
    let mut impatient = request(&cluster, "k");
    impatient.wait_ms = Some(1);
    let refused = client.connect(&impatient).await.map_err(|error| error.kind());
    assert_eq!(refused, Err(Some(ApiErrorKind::KeyHeld)), "a leaving backend was handed out");
    let waiting = {
        let (client, request) = (client.clone(), request(&cluster, "k"));
        tokio::spawn(async move { client.connect(&request).await })
    };
    // Long enough for it to be waiting; if it is not yet, the test still holds.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    sim.report_and_wait(&first.backend_id, None, crate::support::exited(), SOON).await.unwrap();
    let next = waiting.await.unwrap().unwrap();
    assert!(next.spawned && next.fencing_token > first.fencing_token, "{next:?} after {first:?}");
}
