//! Wrong wall clocks: nothing depends on them, only on their rate.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, EventKind, LONG, libfaketime, wait_until};
use holdfast_wire::http::{ClusterInfo, ConnectResponse, KeyInfo};
use reqwest::Method;
use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const LEASE: &str = "renew=700ms,soft=3s,hard=3500ms,expiry=5s";
const EXPIRY_MS: u64 = 5_000;
/// More than a tick: what a leader's live clock showed beyond its last entry is forgotten with it.
const FORGOTTEN_MS: u64 = 1_500;
/// A request's time, twice.
const REQUEST_MS: u64 = 300;

/// A look at cluster time: when it was asked for, when it came, and by which leader.
#[derive(Debug, Clone, Copy)]
struct Look {
    asked: Instant,
    came: Instant,
    cluster_ms: u64,
    term: u64,
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap()
}

/// One look, at any controller that gives one at once.
async fn look(cluster: &Cluster) -> Option<Look> {
    for index in (0..3).filter(|index| cluster.controllers[*index].pid().is_some()) {
        let asked = Instant::now();
        let url = format!("{}/ctrl/cluster", cluster.url(index));
        let answer = tokio::time::timeout(
            Duration::from_millis(REQUEST_MS),
            cluster.http.send(Method::GET, &url, &[], None),
        );
        if let Ok(Ok(answer)) = answer.await
            && answer.status.is_success()
        {
            let info: ClusterInfo = answer.read();
            return Some(Look {
                asked,
                came: Instant::now(),
                cluster_ms: info.cluster_time,
                term: info.term,
            });
        }
    }
    None
}

/// Cluster time never runs ahead of real time, keeps its rate within a term, and between terms only stands still or forgets
/// a tick.
fn assert_steady(looks: &[Look]) {
    for pair in looks.windows(2) {
        let [a, b] = pair else { unreachable!("windows of two") };
        let real_ms = ms(b.came - a.asked);
        let ahead = b.cluster_ms.cast_signed() - a.cluster_ms.cast_signed();
        let ahead_max = (real_ms + real_ms / 20 + 50).cast_signed();
        assert!(ahead <= ahead_max, "cluster time went {ahead} ms ahead in {real_ms} ms: {a:?} {b:?}");
        if a.term == b.term {
            let least_ms = ms(b.asked - a.came);
            let least = (least_ms - least_ms / 20).cast_signed() - 50;
            assert!(ahead >= least, "cluster time went only {ahead} ms in {least_ms} ms: {a:?} {b:?}");
        } else {
            assert!(ahead >= -FORGOTTEN_MS.cast_signed(), "cluster time fell back: {a:?} {b:?}");
        }
    }
}

/// Looks at cluster time until every key was renewed past `until_ms`; keys are never missing or somebody else's.
async fn follow(cluster: &Cluster, looks: &mut Vec<Look>, held: &[ConnectResponse], until_ms: u64) {
    wait_until("all keys are renewed", LONG, async || {
        looks.extend(look(cluster).await);
        let keys: Vec<KeyInfo> = cluster.keys().await;
        for answer in held {
            let key = keys.iter().find(|key| key.name == answer.key.name);
            let key = key.unwrap_or_else(|| panic!("{} is lost: {keys:?}", answer.key.name));
            assert_eq!((&key.backend, key.token), (&answer.backend_id, answer.fencing_token));
        }
        if keys.iter().all(|key| key.expires_at > until_ms) { Ok(()) } else { Err(keys) }
    })
    .await;
}

/// The year that a wall clock moved by some days shows.
fn year(days: i64) -> u64 {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    1970 + now_s.saturating_add_signed(days * 86_400) / 31_556_952
}

#[tokio::test]
async fn keys_live_on_by_renewal_through_two_leader_changes_whatever_the_wall_clocks_say() {
    if libfaketime().is_none() {
        println!("SKIPPED: libfaketime is not installed");
        return;
    }
    let mut cluster = Cluster::builder()
        .lease(LEASE)
        .drones(2)
        .controller_clock(0, "+3650d")
        .controller_clock(1, "-800d")
        .drone_clock(0, "-5000d")
        .drone_clock(1, "+400d")
        .start()
        .await;
    // The clocks are wrong indeed.
    for (process, days) in
        [(&cluster.controllers[0], 3650), (&cluster.controllers[1], -800), (&cluster.drones[0], -5000)]
    {
        let shown = format!("{}-", year(days));
        assert!(process.log().contains(&shown), "{} does not show {shown}: {}", process.label, process.log());
    }
    let mut held = Vec::new();
    for i in 0..6 {
        held.push(cluster.connect_ready(&format!("k-{i}")).await);
    }
    let drones: BTreeSet<_> = held.iter().map(|answer| answer.drone.clone()).collect();
    assert_eq!(drones.len(), 2, "both drones have some");
    let mut looks = Vec::new();
    let mut leaders = vec![cluster.leader().await];
    let acquired_ms = held_until(&cluster).await;
    follow(&cluster, &mut looks, &held, acquired_ms + EXPIRY_MS).await;

    // First one that dies, then one that hands over: leaders of two other clocks.
    let first = leaders[0];
    cluster.controllers[first].kill9();
    let second = cluster.leader_other_than(first).await;
    leaders.push(second);
    let renewed_ms = held_until(&cluster).await;
    follow(&cluster, &mut looks, &held, renewed_ms + EXPIRY_MS).await;
    cluster.restart_controller(first);
    cluster.wait_controller(first).await;

    cluster.controllers[second].kill9();
    let third = cluster.leader_other_than(second).await;
    leaders.push(third);
    let renewed_ms = held_until(&cluster).await;
    follow(&cluster, &mut looks, &held, renewed_ms + EXPIRY_MS).await;
    cluster.restart_controller(second);
    cluster.wait_controller(second).await;

    println!("leaders: {leaders:?}, looks at cluster time: {}", looks.len());
    assert_steady(&looks);
    let terms: BTreeSet<_> = looks.iter().map(|look| look.term).collect();
    assert!(terms.len() >= 3, "two leader changes were looked at: {terms:?}");
    for answer in &held {
        assert_eq!(cluster.journal.kinds(&answer.key.name), [EventKind::Start], "{}", answer.key.name);
    }
    cluster.journal.assert_no_overlap();
}

/// The latest expiry of any key, in cluster time.
async fn held_until(cluster: &Cluster) -> u64 {
    cluster.keys().await.iter().map(|key| key.expires_at).max().expect("keys are held")
}
