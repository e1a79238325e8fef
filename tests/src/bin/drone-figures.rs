//! What a drone costs, and how long a backend takes to be ready.
//!
//! ```text
//!   drone-figures [--latencies 100] [--backends 1000] [--seconds 30]
//! ```
//!
//! First connects to free keys, one after the other, and follows each backend until it is ready. The parts are the cluster
//! times at which its states were recorded; its own start is what it notes itself. Then as many backends at once, held by
//! one drone: memory of the guards (proportional share, which counts shared pages once), and CPU of the drone while it
//! renews.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "without what it measures it has nothing to say")]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures"
)]

use futures::StreamExt;
use holdfast_tests::harness::{Cluster, LONG, wait_until};
use holdfast_wire::BackendStatus;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: drone-figures [--latencies N] [--backends N] [--seconds N]";
/// Connects under way at once while the backends are started.
const AT_ONCE: usize = 8;
/// Milliseconds of one tick of `/proc/PID/stat`.
const TICK_MS: u64 = 10;

fn options() -> Result<[usize; 3], String> {
    let mut options = [100, 1_000, 30];
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let at = ["--latencies", "--backends", "--seconds"].iter().position(|known| *known == flag);
        let at = at.ok_or_else(|| format!("{flag:?} is not known"))?;
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        options[at] = value.parse().map_err(|e| format!("{flag} {value:?}: {e}"))?;
    }
    Ok(options)
}

fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
}

/// From the request until the status stream says `ready`, and between the states on the way.
async fn latency(cluster: &Cluster, key: &str) -> (f64, f64, BTreeMap<BackendStatus, u64>) {
    let client = cluster.client();
    let begin = Instant::now();
    let answer = client.connect(&cluster.backend().request(key)).await.expect("a connect to a free key");
    let answered = begin.elapsed();
    let mut stream = std::pin::pin!(client.status_stream(&answer.backend_id));
    let mut times = BTreeMap::new();
    while let Some(message) = stream.next().await {
        let message = message.expect("a status");
        times.insert(message.status, message.time);
        if message.status == BackendStatus::Ready {
            return (answered.as_secs_f64() * 1e3, begin.elapsed().as_secs_f64() * 1e3, times);
        }
        assert!(message.status < BackendStatus::Ready, "{message:?}");
    }
    panic!("the stream of {key} ended");
}

async fn latencies(cluster: &Cluster, count: usize) {
    use BackendStatus as S;
    let mut parts: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for n in 0..count {
        let (answered, ready, times) = latency(cluster, &format!("latency-{n}")).await;
        let between = |from: S, to: S| (times[&to] - times[&from]) as f64;
        for (part, value) in [
            ("1 request to answer", answered),
            (
                "2 scheduled to loading: the spawn is delivered and taken on",
                between(S::Scheduled, S::Loading),
            ),
            ("3 loading to starting: the journal is durable", between(S::Loading, S::Starting)),
            ("4 starting to waiting: guard, namespace, exec", between(S::Starting, S::Waiting)),
            ("5 waiting to ready: the backend listens and answers", between(S::Waiting, S::Ready)),
            ("all: request to ready", ready),
        ] {
            parts.entry(part).or_default().push(value);
        }
    }
    println!("{count} connects, one after the other; ms{:>43} {:>8} {:>8}", "p50", "p99", "worst");
    for (part, mut values) in parts {
        let (p50, p99) = (quantile(&mut values, 0.5), quantile(&mut values, 0.99));
        println!("  {part:<64} {p50:>8.1} {p99:>8.1} {:>8.1}", quantile(&mut values, 1.0));
    }
}

/// Processes by what their name is, with their proportional and private memory in KiB.
fn memory() -> BTreeMap<String, (u64, u64, u64, u64)> {
    let mut found: BTreeMap<String, (u64, u64, u64, u64)> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let path = entry.path();
        let Ok(name) = std::fs::read_to_string(path.join("comm")) else { continue };
        if !name.starts_with("holdfast-") {
            continue;
        }
        let Ok(rollup) = std::fs::read_to_string(path.join("smaps_rollup")) else { continue };
        let kib = |field: &str| -> u64 {
            let lines = rollup.lines().filter(|line| line.starts_with(field));
            lines.filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok()).sum()
        };
        let sum = found.entry(name.trim().to_owned()).or_default();
        sum.0 += 1;
        sum.1 += kib("Rss:");
        sum.2 += kib("Pss:");
        sum.3 += kib("Private_Dirty:") + kib("Private_Clean:");
    }
    found
}

/// CPU that a process has used, in milliseconds.
fn cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the drone runs");
    let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 1..].split_ascii_whitespace().collect();
    (fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * TICK_MS
}

async fn costs(cluster: &Cluster, backends: usize, seconds: u64) {
    let begin = Instant::now();
    let started = futures::stream::iter(0..backends).map(|n| async move {
        let request = cluster.backend().request(&format!("many-{n}"));
        cluster.client().connect(&request).await.expect("a connect to a free key").backend_id
    });
    let ids: Vec<String> = started.buffer_unordered(AT_ONCE).collect().await;
    for id in &ids {
        cluster.assert_ready(id).await;
    }
    println!(
        "\n{backends} backends were ready after {:.1} s ({AT_ONCE} connects at once)",
        begin.elapsed().as_secs_f64()
    );
    println!(
        "{:<20} {:>8} {:>14} {:>14} {:>14}",
        "process", "count", "rss KiB each", "pss KiB each", "own KiB each"
    );
    for (name, (count, rss, pss, own)) in memory() {
        println!("{name:<20} {count:>8} {:>14} {:>14} {:>14}", rss / count, pss / count, own / count);
    }
    let drone = cluster.drones[0].pid().expect("the drone runs");
    let (before, begin) = (cpu_ms(drone), Instant::now());
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let used = (cpu_ms(drone) - before) as f64 / begin.elapsed().as_secs_f64() / 10.0;
    println!(
        "the drone uses {used:.1} % of a core while it renews {backends} keys every 30 s and looks at connections"
    );
    wait_until("all keys are held", LONG, async || {
        let held = cluster.keys().await.iter().filter(|key| key.name.starts_with("many-")).count();
        if held == backends.min(1_000) { Ok(()) } else { Err(held) }
    })
    .await;
}

fn main() {
    let [latency_count, backends, seconds] = match options() {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("drone-figures: {problem}\n{USAGE}");
            std::process::exit(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let cluster = Cluster::builder().lease("renew=30s,soft=40s,hard=50s,expiry=60s").start().await;
        latencies(&cluster, latency_count).await;
        drop(cluster);
        let cluster = Cluster::builder().lease("renew=30s,soft=40s,hard=50s,expiry=60s").start().await;
        costs(&cluster, backends, seconds as u64).await;
    });
}
