//! The figures of the closing note: connects per second and their latency, and how long a killed leader is missed.
//!
//! ```text
//!   figures [--runs 20] [--seconds 5] [--election-timeout 200ms] [--json FILE]
//! ```
//!
//! Real controllers with their write-ahead logs synced as always, on one machine with the load generator; the drones are
//! simulated, because what a drone does to start a process is not a connect's time.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "figures that can't be taken are not given")]

use futures::future::join_all;
use holdfast_client::{Client, RequestOptions};
use holdfast_tests::harness::{Cluster, LONG, wait_until};
use holdfast_tests::sim_drone::{AutoDrone, Identity};
use holdfast_wire::KeyConfig;
use holdfast_wire::http::{ConnectRequest, ConnectResponse, SpawnConfig};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str = "usage: figures [--runs N] [--seconds N] [--election-timeout DURATION] [--json FILE]";
/// The default lease: no test's.
const LEASE: &str = "renew=30s,soft=40s,hard=50s,expiry=60s";
/// Numbers of clients to measure with.
const CLIENTS: [usize; 3] = [1, 16, 64];
/// Time before a measurement in which the same load runs and is not counted.
const WARM_UP: Duration = Duration::from_secs(2);
/// Pause of the plain client after an error.
const RETRY_PAUSE: Duration = Duration::from_millis(5);
/// The plain client gives an attempt up after this.
const ATTEMPT: Duration = Duration::from_secs(2);
/// A killed leader must be replaced within this.
const FAILOVER_MAX: Duration = Duration::from_secs(60);
/// Files synced to say what this disk can do.
const SYNCS: usize = 200;

struct Options {
    runs: usize,
    seconds: u64,
    election_timeout: String,
    json: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { runs: 20, seconds: 5, election_timeout: "200ms".to_owned(), json: None };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{flag} needs a value"));
        let number = |text: String| text.parse::<u64>().map_err(|e| format!("{text:?}: {e}"));
        match flag.as_str() {
            "--runs" => options.runs = usize::try_from(number(value()?)?).map_err(|e| e.to_string())?,
            "--seconds" => options.seconds = number(value()?)?.max(1),
            "--election-timeout" => options.election_timeout = value()?,
            "--json" => options.json = Some(value()?),
            other => return Err(format!("{other:?} is not known")),
        }
    }
    Ok(options)
}

fn request(cluster: &str, key: String) -> ConnectRequest {
    ConnectRequest {
        key: Some(KeyConfig { name: key, ..KeyConfig::default() }),
        spawn_config: Some(SpawnConfig {
            id: None,
            cluster: Some(cluster.to_owned()),
            pool: String::new(),
            executable: json!({"command": ["true"]}),
            lifetime_limit_seconds: None,
            max_idle_seconds: None,
            use_static_token: false,
            subdomain: None,
        }),
        ..ConnectRequest::default()
    }
}

/// One connect that must start a backend; anything else is an error.
async fn connect(
    http: &reqwest::Client,
    url: &str,
    request: &ConnectRequest,
) -> Result<ConnectResponse, String> {
    let response =
        http.post(format!("{url}/ctrl/connect")).json(request).send().await.map_err(|e| e.to_string())?;
    let status = response.status();
    let text = response.text().await.map_err(|e| e.to_string())?;
    if !status.is_success() {
        return Err(format!("{status}: {text}"));
    }
    serde_json::from_str(&text).map_err(|e| format!("{e}: {text}"))
}

/// The value below which `share` of the sorted values lie.
fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let last = sorted.len().saturating_sub(1);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    let at = (last as f64 * share).round() as usize;
    sorted.get(at).copied().unwrap_or_default()
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 100_000.0).round() / 100.0
}

/// How long this disk takes to make 4 KiB durable: no acknowledged write is faster.
fn sync_time(dir: &Path) -> Duration {
    let mut file = std::fs::File::create(dir.join("sync-probe")).expect("a file");
    let mut times: Vec<Duration> = (0..SYNCS)
        .map(|_| {
            file.write_all(&[7; 4096]).expect("a write");
            let begin = Instant::now();
            file.sync_data().expect("a sync");
            begin.elapsed()
        })
        .collect();
    times.sort_unstable();
    quantile(&times, 0.5)
}

/// Connects to free keys from `clients` clients, each at one controller, one request at a time.
async fn throughput(cluster: &Cluster, clients: usize, seconds: u64) -> Value {
    let urls = cluster.urls();
    let begin = Instant::now() + WARM_UP;
    let end = begin + Duration::from_secs(seconds);
    let workers = (0..clients).map(|worker| {
        let (url, name) = (urls[worker % urls.len()].clone(), cluster.name.clone());
        tokio::spawn(async move {
            let http = reqwest::Client::builder().no_proxy().build().expect("an HTTP client");
            let (mut times, mut errors) = (Vec::new(), Vec::new());
            for number in 0u64.. {
                let request = request(&name, format!("load-{clients}-{worker}-{number}"));
                let asked = Instant::now();
                if asked >= end {
                    break;
                }
                match connect(&http, &url, &request).await {
                    Ok(answer) => {
                        assert!(answer.spawned, "a free key was held: {answer:?}");
                        // Counted by its end: what began in the warm-up may end in the measurement, and the other way.
                        if (begin..end).contains(&Instant::now()) {
                            times.push(asked.elapsed());
                        }
                    }
                    Err(error) => errors.push(error),
                }
            }
            (times, errors)
        })
    });
    let (mut times, mut errors) = (Vec::new(), Vec::new());
    for done in join_all(workers).await {
        let (worker_times, worker_errors) = done.expect("a client");
        times.extend(worker_times);
        errors.extend(worker_errors);
    }
    times.sort_unstable();
    let per_second = times.len() as u64 / seconds;
    let (p50, p99) = (ms(quantile(&times, 0.5)), ms(quantile(&times, 0.99)));
    println!("{clients:>8} {per_second:>14} {p50:>10.2} {p99:>10.2} {:>8}", errors.len());
    if let Some(error) = errors.first() {
        println!("         first error: {error}");
    }
    json!({"clients": clients, "connects_per_second": per_second, "p50_ms": p50, "p99_ms": p99, "errors": errors.len()})
}

/// Asks one controller after the other until a connect is acknowledged.
async fn until_acknowledged(urls: &[String], first: usize, request: &ConnectRequest) {
    let http = reqwest::Client::builder().no_proxy().timeout(ATTEMPT).build().expect("an HTTP client");
    let mut at = first;
    while connect(&http, &urls[at % urls.len()], request).await.is_err() {
        at += 1;
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

/// Kills the leader; gives the time until a connect to a free key is acknowledged, by the plain client and by ours.
async fn failover(cluster: &mut Cluster, run: usize) -> (Duration, Duration) {
    let urls = cluster.urls();
    let leader = cluster.leader().await;
    // Ours has found the leader before, as a running program's would have.
    let options = RequestOptions { retry_no_drone: true, ..RequestOptions::default() };
    let client = Client::new(urls.clone()).expect("URLs").with_options(options);
    client
        .connect(&request(&cluster.name, format!("before-{run}")))
        .await
        .expect("a connect before the kill");
    let (plain, ours) =
        (request(&cluster.name, format!("plain-{run}")), request(&cluster.name, format!("ours-{run}")));

    let begin = Instant::now();
    cluster.controllers[leader].kill9();
    let timed = async {
        tokio::join!(
            async {
                until_acknowledged(&urls, leader, &plain).await;
                begin.elapsed()
            },
            async {
                client.connect(&ours).await.expect("a connect after the kill");
                begin.elapsed()
            }
        )
    };
    let times = tokio::time::timeout(FAILOVER_MAX, timed).await.expect("a new leader");

    cluster.restart_controller(leader);
    cluster.wait_controller(leader).await;
    caught_up(cluster).await;
    times
}

/// Waits until all followers have what the leader has, so that the next kill meets a whole cluster.
async fn caught_up(cluster: &Cluster) {
    wait_until("all controllers are caught up", LONG, async || {
        let leader = cluster.leader().await;
        let info: holdfast_wire::http::ClusterInfo =
            cluster.http.get(&format!("{}/ctrl/cluster", cluster.url(leader))).await.ok();
        // Heartbeats never stop, so a follower may always be a few entries behind.
        let behind = info.members.iter().filter(|member| member.lag.is_none_or(|lag| lag > 8)).count();
        if behind == 0 { Ok(()) } else { Err(info.members) }
    })
    .await;
}

async fn measure(options: &Options) -> Value {
    let mut cluster =
        Cluster::builder().drones(0).lease(LEASE).election_timeout(&options.election_timeout).start().await;
    let urls = cluster.urls();
    let drones: Vec<AutoDrone> = (0..urls.len())
        .map(|at| {
            let mut urls = urls.clone();
            urls.rotate_left(at);
            AutoDrone::start(urls, Identity::new(&cluster.name, &format!("dr-{at}"), "figures"))
        })
        .collect();
    let client = cluster.client();
    wait_until("the drones are ready", LONG, async || {
        let page = client.drones_page(&holdfast_client::DroneFilter::default(), None).await;
        let ready = page.as_ref().map_or(0, |page| page.drones.iter().filter(|drone| drone.ready).count());
        if ready == drones.len() { Ok(()) } else { Err(page) }
    })
    .await;

    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let sync = ms(sync_time(&cluster.dir()));
    println!("3 controllers, {} simulated drones, {cores} cores for all of it;", drones.len());
    println!("election time-out {}; 4 KiB made durable in {sync} ms (median)\n", options.election_timeout);

    println!("{:>8} {:>14} {:>10} {:>10} {:>8}", "clients", "connects/s", "p50 ms", "p99 ms", "errors");
    let mut rates = Vec::new();
    for clients in CLIENTS {
        rates.push(throughput(&cluster, clients, options.seconds).await);
    }

    println!("\nkill -9 of the leader to the next acknowledged connect to a free key:");
    let (mut plain, mut ours) = (Vec::new(), Vec::new());
    for run in 0..options.runs {
        let (plain_time, ours_time) = failover(&mut cluster, run).await;
        println!(
            "  run {:>2}: {:>8.0} ms plain client, {:>8.0} ms holdfast-client",
            run + 1,
            ms(plain_time),
            ms(ours_time)
        );
        plain.push(plain_time);
        ours.push(ours_time);
    }
    let summary = |name: &str, times: &mut Vec<Duration>| {
        times.sort_unstable();
        let (median, worst) = (ms(quantile(times, 0.5)), ms(times.last().copied().unwrap_or_default()));
        println!("{name:<16} median {median:>8.0} ms, worst {worst:>8.0} ms, {} runs", times.len());
        let all: Vec<f64> = times.iter().map(|time| ms(*time)).collect();
        json!({"median_ms": median, "worst_ms": worst, "runs": times.len(), "all_ms": all})
    };
    let failover = json!({
        "plain_client": summary("plain client", &mut plain),
        "holdfast_client": summary("holdfast-client", &mut ours),
    });
    json!({
        "cores": cores,
        "sync_4k_ms": sync,
        "election_timeout": options.election_timeout,
        "seconds": options.seconds,
        "connect": rates,
        "failover": failover,
    })
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(problem) => {
            eprintln!("figures: {problem}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let figures = measure(&options).await;
    if let Some(path) = &options.json
        && let Err(error) = std::fs::write(path, format!("{figures:#}\n"))
    {
        eprintln!("figures: {path}: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
