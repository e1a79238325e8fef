//! What a thousand drones do when their leader dies: the real drone's session code, in one process.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use futures::{StreamExt, TryStreamExt};
use holdfast_tests::fleet::Fleet;
use holdfast_tests::harness::{Cluster, boot_ms, target_tmp, wait_until};
use holdfast_tests::load::request;
use holdfast_wire::http::KeyInfo;
use serde_json::json;
use std::fmt::Write;
use std::sync::atomic::Ordering;
use std::time::Duration;

const DRONES: usize = 1_000;
const KEYS: usize = 3_000;
const LEASE: &str = "renew=10s,soft=15s,hard=18s,expiry=22s";
const EXPIRY_MS: u64 = 22_000;
/// Connects under way.
const AT_ONCE: usize = 64;
/// Width of a bucket of arrivals, in milliseconds.
const BUCKET_MS: u64 = 50;
/// Everything here takes its time on two cores.
const PATIENCE: Duration = Duration::from_secs(120);

async fn keys(cluster: &Cluster) -> Vec<KeyInfo> {
    cluster.client().keys(Default::default()).try_collect().await.unwrap()
}

/// Arrivals in each bucket from the death on.
fn buckets(after_ms: &[u64]) -> Vec<u64> {
    let mut buckets = vec![0; usize::try_from(after_ms.iter().max().unwrap() / BUCKET_MS + 1).unwrap()];
    for at in after_ms {
        buckets[usize::try_from(at / BUCKET_MS).unwrap()] += 1;
    }
    buckets
}

fn svg(buckets: &[u64]) -> String {
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 240.0;
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let (highest, step) = (*buckets.iter().max().unwrap() as f64, WIDTH / buckets.len() as f64);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <text x=\"40\" y=\"16\">New sessions in each {BUCKET_MS} ms after the death of the leader; highest: {highest}</text>\n",
        WIDTH + 60.0,
        HEIGHT + 60.0
    );
    for (at, count) in buckets.iter().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "small numbers")]
        let (x, height) = (40.0 + at as f64 * step, *count as f64 / highest * HEIGHT);
        let y = 26.0 + HEIGHT - height;
        let width = step * 0.9;
        writeln!(
            out,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"#36c\"/>"
        )
        .unwrap();
        if at % 10 == 0 {
            let ms = at as u64 * BUCKET_MS;
            writeln!(out, "<text x=\"{x:.1}\" y=\"{:.1}\">{ms} ms</text>", 44.0 + HEIGHT).unwrap();
        }
    }
    out + "</svg>\n"
}

#[ignore = "a thousand drones: make soak"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_drones_whose_leader_dies_come_back_spread_out_and_lose_no_key() {
    let mut cluster = Cluster::builder().drones(0).lease(LEASE).start().await;
    let fleet = Fleet::start(&cluster.urls(), &cluster.name, DRONES);
    wait_until("all have a session", PATIENCE, async || {
        let connected = fleet.stats.connected.load(Ordering::Relaxed);
        if connected == DRONES { Ok(()) } else { Err(connected) }
    })
    .await;
    let client = cluster.client();
    let acquired: Vec<_> = futures::stream::iter(0..KEYS)
        .map(|i| {
            let (client, request) = (client.clone(), request(&cluster.name, &format!("k-{i}")));
            async move { client.connect(&request).await }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
        .unwrap();
    assert!(acquired.len() == KEYS && acquired.iter().all(|answer| answer.spawned));
    let before = keys(&cluster).await;
    assert_eq!(before.len(), KEYS);

    let leader = cluster.leader().await;
    let died_ms = boot_ms();
    cluster.controllers[leader].kill9();
    let led = tokio::join!(
        async {
            cluster.leader_other_than(leader).await;
            boot_ms() - died_ms
        },
        wait_until("all are back", PATIENCE, async || {
            let back = fleet.stats.first_arrivals(died_ms).len();
            if back == DRONES { Ok(()) } else { Err(back) }
        })
    );
    let arrivals = fleet.stats.first_arrivals(died_ms);
    let mut after_ms: Vec<u64> = arrivals.iter().map(|arrival| arrival.boot_ms - died_ms).collect();
    after_ms.sort_unstable();
    let buckets = buckets(&after_ms);
    println!("{DRONES} drones, {KEYS} keys; another controller leads after {} ms", led.0);
    println!("| ms after the leader's death | new sessions |\n| --- | --- |");
    for (at, count) in buckets.iter().enumerate().filter(|(_, count)| **count > 0) {
        println!("| {} | {count} |", at as u64 * BUCKET_MS);
    }
    let at = |percent: usize| after_ms[(DRONES - 1) * percent / 100];
    println!("half are back after {} ms, 99 % after {} ms, all after {} ms", at(50), at(99), at(100));

    // Everybody renews with the new leader, past what was granted by the old one.
    let now_ms = cluster.info().await.cluster_time;
    let after = wait_until("all keys are renewed past an expiry", PATIENCE, async || {
        let keys = keys(&cluster).await;
        let behind = keys.iter().filter(|key| key.expires_at < now_ms + EXPIRY_MS + 3_000).count();
        if behind == 0 { Ok(keys) } else { Err((behind, keys.len())) }
    })
    .await;
    let holders = |keys: &[KeyInfo]| -> Vec<(String, String, u64)> {
        keys.iter().map(|key| (key.name.clone(), key.backend.clone(), key.token)).collect()
    };
    assert_eq!(holders(&after), holders(&before), "a key has another holder");
    assert_eq!(fleet.stats.lapsed.load(Ordering::Relaxed), 0, "a lease has lapsed");
    let sessions = fleet.stats.arrivals(died_ms);
    println!("{sessions} sessions were opened by {DRONES} drones since the death");
    assert!(sessions <= 3 * DRONES, "they go on coming: {sessions}");
    // No stampede: were they not spread, all would come in the bucket after the election.
    let highest = buckets.iter().max().unwrap();
    assert!(*highest <= DRONES as u64 / 2, "{highest} came in one {BUCKET_MS} ms");

    let data = json!({
        "drones": DRONES, "keys": KEYS, "lease": LEASE, "new_leader_after_ms": led.0, "bucket_ms": BUCKET_MS,
        "sessions_by_bucket": buckets, "half_ms": at(50), "p99_ms": at(99), "all_ms": at(100),
        "sessions_opened": sessions, "leases_lapsed": 0,
    });
    let dir = target_tmp();
    std::fs::write(dir.join("reconnect.json"), serde_json::to_string_pretty(&data).unwrap() + "\n").unwrap();
    std::fs::write(dir.join("reconnect.svg"), svg(&buckets)).unwrap();
    println!("written: {}/reconnect.{{json,svg}}", dir.display());
}
