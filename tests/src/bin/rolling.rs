//! How long clients pause while every controller is stopped by SIGTERM and started again, one after the other, under load.
//!
//! ```text
//!   rolling [--rounds 1] [--clients 16] [--pause-ms 50] [--election-timeout 200ms] [--json FILE]
//! ```
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "figures that can't be taken are not given")]

use holdfast_tests::harness::{Cluster, LONG, wait_until};
use holdfast_tests::load::{Figures, Load, Seen, drones};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::{Duration, Instant};

const USAGE: &str =
    "usage: rolling [--rounds N] [--clients N] [--pause-ms N] [--election-timeout DURATION] [--json FILE]";
/// The default lease: no test's.
const LEASE: &str = "renew=30s,soft=40s,hard=50s,expiry=60s";
/// Load before the first restart, after each, and for the figures without one.
const CALM: Duration = Duration::from_secs(2);
/// Requests that took longer are shown.
const SLOW: Duration = Duration::from_millis(50);
/// Simulated drones.
const DRONES: usize = 6;

struct Options {
    rounds: usize,
    clients: usize,
    pause: Duration,
    election_timeout: String,
    json: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options {
        rounds: 1,
        clients: 16,
        pause: Duration::from_millis(50),
        election_timeout: "200ms".to_owned(),
        json: None,
    };
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("{flag} needs a value"))?;
        let number = || value.parse::<usize>().map_err(|e| format!("{value:?}: {e}"));
        match flag.as_str() {
            "--rounds" => options.rounds = number()?,
            "--clients" => options.clients = number()?.max(1),
            "--pause-ms" => options.pause = Duration::from_millis(number()? as u64),
            "--election-timeout" => options.election_timeout = value,
            "--json" => options.json = Some(value),
            other => return Err(format!("{other:?} is not known")),
        }
    }
    Ok(options)
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}

fn line(what: &str, figures: Figures, stopping: Duration) -> Value {
    println!(
        "{what:<28} {:>8} {:>7} {:>16} {:>20} {:>14}",
        figures.requests,
        figures.failed,
        ms(figures.longest_gap),
        ms(figures.longest_request),
        ms(stopping)
    );
    json!({
        "what": what, "requests": figures.requests, "failed": figures.failed,
        "longest_gap_ms": ms(figures.longest_gap), "longest_request_ms": ms(figures.longest_request),
        "sigterm_to_exit_ms": ms(stopping),
    })
}

#[tokio::main]
async fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("rolling: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let mut cluster = Cluster::builder()
        .drones(0)
        .lease(LEASE)
        .election_timeout(&options.election_timeout)
        .controller_flag(
            "--log",
            &std::env::var("ROLLING_LOG").unwrap_or_else(|_| "info,openraft=error".to_owned()),
        )
        .start()
        .await;
    let urls = cluster.urls();
    let drones = drones(&cluster.name, DRONES, &urls);
    let client = cluster.client();
    wait_until("the simulated drones are ready", LONG, async || {
        let page = client.drones_page(&Default::default(), None).await.map_err(|e| e.to_string())?;
        let ready = page.drones.iter().filter(|drone| drone.ready).count();
        if ready == DRONES { Ok(()) } else { Err(format!("{ready} are")) }
    })
    .await;
    let load = Load::start("rolling", &cluster.name, &urls, options.clients, options.pause);
    tokio::time::sleep(CALM).await;
    let mut spans =
        vec![("without a restart".to_owned(), load.began() + CALM / 2, Instant::now(), Duration::ZERO)];
    let term_before = cluster.info().await.term;
    let mut handed_over = 0;
    for round in 0..options.rounds {
        for index in 0..3 {
            let led = cluster.leader().await == index;
            handed_over += u64::from(led);
            let began = Instant::now();
            cluster.controllers[index].signal(Signal::SIGTERM);
            let status = cluster.controllers[index].wait(LONG).await;
            let stopping = began.elapsed();
            assert!(status.success(), "{status}: {}", cluster.controllers[index].log());
            cluster.restart_controller(index);
            cluster.wait_controller(index).await;
            tokio::time::sleep(CALM).await;
            let role = if led { "leader" } else { "follower" };
            spans.push((format!("round {round}: {} ({role})", index + 1), began, Instant::now(), stopping));
        }
    }
    let terms = cluster.info().await.term - term_before;
    let report = load.stop().await;
    drop(drones);
    println!(
        "{:<28} {:>8} {:>7} {:>16} {:>20} {:>14}",
        "restarted", "requests", "failed", "longest gap (ms)", "longest request (ms)", "stopping (ms)"
    );
    let rows: Vec<Value> = spans
        .iter()
        .map(|(what, from, to, stopping)| line(what, report.between(*from, *to), *stopping))
        .collect();
    println!("terms: {terms} for {handed_over} handovers; requests: {}", report.seen.len());
    for (what, from, to, _) in &spans {
        let slow = |request: &&Seen| {
            request.ended >= *from && request.ended <= *to && request.ended - request.began >= SLOW
        };
        for request in report.seen.iter().filter(slow) {
            let after = ms(request.began.saturating_duration_since(*from));
            let took = ms(request.ended - request.began);
            println!("slow: {what}: {} {after} ms after SIGTERM took {took} ms", request.what);
        }
    }
    for failure in report.failures() {
        println!("failed: {failure}");
    }
    if let Some(path) = options.json {
        let all = json!({"spans": rows, "terms": terms, "handovers": handed_over});
        std::fs::write(&path, format!("{all:#}\n")).expect("the file of --json");
    }
    if std::env::var_os("ROLLING_KEEP_LOGS").is_some() {
        for controller in &cluster.controllers {
            eprintln!("── {}\n{}", controller.label, controller.log());
        }
    }
    if report.failures().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
