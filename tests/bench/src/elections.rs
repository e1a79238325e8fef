//! `bench elections`: full load for as long as it is told, counting what nobody asked for: elections, and pauses in which
//! no connect is acknowledged.

use crate::holdfast::fleet::{Fleet, Following, Notes, Rounds, Sample, fill};
use crate::holdfast::{Cluster, Settings};
use crate::load::{micros, quantile};
use crate::place::Place;
use crate::problem::{During, Result, problem};
use crate::usage;
use holdfast_wire::http::ClusterInfo;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Time between two looks at the term.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Time between two lines of output.
const SAY_EVERY: Duration = Duration::from_secs(30);
/// Pause of a client after an error.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Keys in one renewal frame.
const BATCH: usize = 1_000;

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// For how long.
    pub minutes: f64,
    /// Clients that acquire.
    pub clients: usize,
    /// Drones.
    pub drones: usize,
    /// Keys that are held throughout.
    pub keys: u64,
    /// How long a key that is acquired under load is kept.
    pub keep: Duration,
    /// Where clients and drones connect.
    pub place: Place,
    /// The result.
    pub json: PathBuf,
    /// Settings of the controllers.
    pub settings: Settings,
}

/// What a run found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// For how long, in minutes.
    pub minutes: f64,
    /// The controllers' `--election-timeout`, or that it was their default.
    pub election_timeout: String,
    /// Elections: by how much the term has grown.
    pub elections: u64,
    /// Times at which another controller led than at the look before.
    pub leader_changes: u64,
    /// Longest time without an acknowledged connect, in milliseconds, and when it began, in seconds.
    pub longest_pause_ms: f64,
    /// See above.
    pub longest_pause_at_s: f64,
    /// Connects acknowledged.
    pub connects: u64,
    /// Connects that failed.
    pub failed_connects: u64,
    /// Median of a connect, in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
    /// The worst.
    pub max_ms: f64,
    /// Renewals granted.
    pub renewed: u64,
    /// Renewals refused.
    pub refused: u64,
    /// Sessions that drones lost.
    pub lost_sessions: u64,
    /// Largest resident memory of a controller, in bytes.
    pub resident_bytes: u64,
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

/// The longest time between two answers, and when it began; `last` is the newest answer so far.
fn longest_pause(samples: &[Sample], last: &mut Instant, longest: &mut (Duration, Instant)) {
    for sample in samples {
        let pause = sample.answered.saturating_duration_since(*last);
        if pause > longest.0 {
            *longest = (pause, *last);
        }
        *last = (*last).max(sample.answered);
    }
}

/// The highest term that any controller knows, and the leader it names.
async fn look(cluster: &Cluster) -> Option<(u64, Option<u64>)> {
    let mut newest = None;
    for url in cluster.inner.urls() {
        let asked =
            cluster.inner.http.raw.get(format!("{url}/ctrl/cluster")).timeout(LOOK_EVERY).send().await;
        // A controller that does not answer now answers at the next look.
        let Ok(answer) = asked else { continue };
        let Ok(text) = answer.text().await else { continue };
        if let Ok(info) = serde_json::from_str::<ClusterInfo>(&text) {
            newest = newest.max(Some((info.term, info.leader)));
        }
    }
    newest
}

/// Runs, prints as it goes, writes the result. An election is an error.
pub async fn run(options: &Options) -> Result<()> {
    let cluster = Cluster::start(&options.settings).await?;
    let rounds = Rounds { every: Duration::from_secs(30), batch: BATCH };
    let fleet = Fleet::start(&cluster, options.drones, rounds, options.place);
    cluster.wait_fit("", options.place).await?;
    let (first_term, mut leader) = look(&cluster).await.during("no controller answers")?;
    let mut term = first_term;

    println!("filling with {} keys", options.keys);
    let base = Arc::new(Notes::default());
    fill(&cluster, options.clients, options.place, "base", 0..options.keys, &base).await?;
    base.take();

    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(options.minutes * 60.0);
    let stop = Arc::new(AtomicBool::new(false));
    let notes = Arc::new(Notes::default());
    let orders = fleet.orders();
    let clients: Vec<_> = (0..options.clients)
        .map(|client| {
            let mut http = Following::new(&cluster, client, options.place);
            let (stop, notes, orders, keep) =
                (Arc::clone(&stop), Arc::clone(&notes), orders.clone(), options.keep);
            tokio::spawn(async move {
                let mut number = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    number += 1;
                    let asked = Instant::now();
                    match http.connect(&format!("load-{client}-{number}")).await {
                        Ok((drone, backend)) => {
                            let answered = Instant::now();
                            notes.answered(Sample { answered, took_us: micros(answered - asked) });
                            orders.end(&drone, &backend, keep);
                        }
                        Err(problem) => {
                            notes.failed(&problem);
                            tokio::time::sleep(RETRY_PAUSE).await;
                        }
                    }
                }
            })
        })
        .collect();

    let mut leader_changes = 0;
    let (mut times_us, mut last, mut longest) = (Vec::new(), begin, (Duration::ZERO, begin));
    let mut resident_bytes = 0;
    let mut say_at = begin + SAY_EVERY;
    let mut said = 0;
    loop {
        let now = Instant::now();
        if now >= end {
            break;
        }
        tokio::time::sleep_until((now + LOOK_EVERY).min(end).into()).await;
        if let Some((seen, leads)) = look(&cluster).await {
            if seen > term {
                println!("{:>6.0} s  term {term} → {seen}", begin.elapsed().as_secs_f64());
            }
            term = term.max(seen);
            if leads.is_some() && leads != leader {
                leader_changes += 1;
                leader = leads;
            }
        }
        let mut samples = notes.take();
        samples.sort_by_key(|sample| sample.answered);
        longest_pause(&samples, &mut last, &mut longest);
        times_us.extend(samples.iter().map(|sample| sample.took_us));
        if Instant::now() >= say_at {
            say_at += SAY_EVERY;
            let memory: Vec<_> = cluster.pids().into_iter().filter_map(usage::memory).collect();
            if memory.len() < cluster.addrs.len() {
                return problem("a controller has ended");
            }
            resident_bytes = memory.iter().map(|m| m.resident_bytes).max().unwrap_or(0).max(resident_bytes);
            let published = fleet.published();
            println!(
                "{:>6.0} s  {:>6.0} connects/s  term {term}  longest pause {:.0} ms  held {}  renewed {}  refused {}  errors {}  rss {} MiB",
                begin.elapsed().as_secs_f64(),
                float((times_us.len() - said) as u64) / SAY_EVERY.as_secs_f64(),
                longest.0.as_secs_f64() * 1000.0,
                published.held,
                published.counts.renewed,
                published.counts.refused,
                notes.errors().0,
                resident_bytes >> 20,
            );
            said = times_us.len();
        }
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.during("a client")?;
    }
    let published = fleet.published();
    fleet.stop().await?;
    times_us.sort_unstable();
    let ms = |share| float(quantile(&times_us, share)) / 1000.0;
    let (failed_connects, first_error) = notes.errors();
    if let Some(error) = first_error {
        println!("{failed_connects} connects failed; the first: {error}");
    }
    let report = Report {
        minutes: options.minutes,
        election_timeout: options.settings.election_timeout.clone().unwrap_or_else(|| "default".to_owned()),
        elections: term.saturating_sub(first_term),
        leader_changes,
        longest_pause_ms: longest.0.as_secs_f64() * 1000.0,
        longest_pause_at_s: longest.1.saturating_duration_since(begin).as_secs_f64(),
        connects: times_us.len() as u64,
        failed_connects,
        p50_ms: ms(0.5),
        p99_ms: ms(0.99),
        max_ms: ms(1.0),
        renewed: published.counts.renewed,
        refused: published.counts.refused,
        lost_sessions: published.lost_sessions,
        resident_bytes,
    };
    let text = serde_json::to_string_pretty(&report).during("the report")?;
    println!("{text}");
    if let Some(parent) = options.json.parent() {
        std::fs::create_dir_all(parent).during(parent.display())?;
    }
    std::fs::write(&options.json, text + "\n").during(options.json.display())?;
    match report.elections {
        0 => Ok(()),
        count => problem(format!("{count} elections that nobody asked for")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_pause_is_found_across_batches() {
        let begin = Instant::now();
        let at = |ms| Sample { answered: begin + Duration::from_millis(ms), took_us: 1 };
        let (mut last, mut longest) = (begin, (Duration::ZERO, begin));
        longest_pause(&[at(10), at(30)], &mut last, &mut longest);
        longest_pause(&[at(80), at(90)], &mut last, &mut longest);
        assert_eq!(longest, (Duration::from_millis(50), begin + Duration::from_millis(30)));
    }
}
