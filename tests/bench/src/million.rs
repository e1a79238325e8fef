//! `bench million`: very many held keys on very many drones, renewed as real drones would, by three controllers.
//!
//! ```text
//!   for each stage (1 k, 10 k, 100 k, … keys):
//!     fill    64 clients connect to free keys, as fast as they are answered; drones acknowledge, report and renew
//!     hold    nothing but renewals, and connects to free keys at a fixed rate, whose times are the latency of that stage
//!   at the end: every key is listed and must have the backend and token that its drone has; nothing was refused
//! ```

use crate::holdfast::fleet::{Fleet, Notes, Probes, Rounds, Sample, fill};
use crate::holdfast::{Cluster, Settings};
use crate::load::quantile;
use crate::place::Place;
use crate::plot;
use crate::problem::{During, Result, problem};
use crate::usage::{self, Memory};
use holdfast_wire::http::KeyPage;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Connections that fill.
const FILL_CLIENTS: usize = 64;
/// Connections that probe.
const PROBE_CLIENTS: usize = 32;
/// A probe's backend is ended after this.
const PROBE_KEEP: Duration = Duration::from_secs(2);
/// Time between two samples.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
/// The issue's bar for connects while all keys are held, in milliseconds.
const CONNECT_P99_MS_BAR: f64 = 50.0;
/// The issue's bar for a controller's resident memory, in bytes.
const RESIDENT_BYTES_BAR: u64 = 2 << 30;
/// The default lease's expiry.
const EXPIRY: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// Keys to hold.
    pub keys: u64,
    /// Drones that hold them.
    pub drones: usize,
    /// How long all are held.
    pub minutes: f64,
    /// Keys at which the fill is interrupted to measure.
    pub stages: Vec<u64>,
    /// How long each of these is held, in seconds.
    pub stage_seconds: u64,
    /// Connects per second while keys are held.
    pub probes_per_second: u32,
    /// Keys in one renewal frame.
    pub batch: usize,
    /// Where clients and drones connect.
    pub place: Place,
    /// Data for the plot.
    pub json: PathBuf,
    /// The plot.
    pub svg: PathBuf,
    /// Settings of the controllers.
    pub settings: Settings,
}

/// Filling from one number of keys to the next.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Filled {
    /// Keys held at the end of it.
    pub keys: u64,
    /// Connects per second.
    pub connects_per_s: f64,
    /// Median, in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
}

/// Holding a number of keys.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Holding {
    /// Keys that are held.
    pub keys: u64,
    /// For how long, in seconds.
    pub seconds: f64,
    /// Renewals granted per second.
    pub renewals_per_s: f64,
    /// Connects per second.
    pub connects_per_s: f64,
    /// Their median, in milliseconds.
    pub p50_ms: f64,
    /// Their 99th percentile.
    pub p99_ms: f64,
    /// The worst of them.
    pub max_ms: f64,
    /// CPU of all controllers, as a share of one core.
    pub controllers_cpu: f64,
    /// CPU of this process.
    pub driver_cpu: f64,
    /// Largest resident memory of a controller, in bytes.
    pub resident_bytes: u64,
    /// Bytes that reached the disk per second.
    pub written_bytes_per_s: f64,
}

/// One look.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Look {
    /// Since the start, in seconds.
    pub at_s: f64,
    /// Keys that the drones hold.
    pub held: usize,
    /// Renewals granted since the last look.
    pub renewed: u64,
    /// Connects since the last look, their median and 99th percentile in milliseconds.
    pub connects: usize,
    /// See above.
    pub p50_ms: f64,
    /// See above.
    pub p99_ms: f64,
    /// Resident memory of each controller, in bytes.
    pub resident_bytes: Vec<u64>,
    /// The same without mapped files.
    pub anonymous_bytes: Vec<u64>,
    /// Raft term.
    pub term: u64,
}

/// What a run found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Keys.
    pub keys: u64,
    /// Drones.
    pub drones: usize,
    /// Cores of the machine.
    pub cores: usize,
    /// How long all were held, in minutes.
    pub minutes: f64,
    /// Keys whose lease ended, or whose token changed, or that were not found.
    pub lapsed: u64,
    /// Renewals refused.
    pub refused: u64,
    /// Longest time between two renewals of one key that were granted, in seconds.
    pub longest_gap_s: f64,
    /// Elections after the first.
    pub elections: u64,
    /// Sessions that drones lost.
    pub lost_sessions: u64,
    /// Connects that failed.
    pub failed_connects: u64,
    /// Filling.
    pub fill: Vec<Filled>,
    /// Holding.
    pub hold: Vec<Holding>,
    /// Looks.
    pub looks: Vec<Look>,
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

/// Median and 99th percentile of some samples, and the worst, in milliseconds.
fn times(samples: &[Sample]) -> (f64, f64, f64) {
    let mut sorted: Vec<u32> = samples.iter().map(|sample| sample.took_us).collect();
    sorted.sort_unstable();
    let ms = |share| float(quantile(&sorted, share)) / 1000.0;
    (ms(0.5), ms(0.99), ms(1.0))
}

/// 1, 2, 5, 10, 20, 50, … thousand: where the fill is cut for the plot.
fn cuts(keys: u64) -> Vec<u64> {
    let mut cuts: Vec<u64> =
        (3..).map(|power| 10u64.saturating_pow(power)).take_while(|ten| *ten < keys).collect();
    cuts = cuts.iter().flat_map(|ten| [*ten, 2 * ten, 5 * ten]).filter(|cut| *cut < keys).collect();
    cuts.push(keys);
    cuts
}

/// One row for each cut that lies between `first` and the number of samples. Samples are in the order of their answers.
fn filled(samples: &[Sample], begin: Instant, first: u64, keys: u64) -> Vec<Filled> {
    let mut rows = Vec::new();
    let (mut from, mut since) = (0usize, begin);
    for cut in cuts(keys) {
        let Ok(to) = usize::try_from(cut.saturating_sub(first)) else { break };
        if to <= from || to > samples.len() {
            continue;
        }
        let part = &samples[from..to];
        let Some(last) = part.last() else { continue };
        let seconds = last.answered.saturating_duration_since(since).as_secs_f64();
        let (p50_ms, p99_ms, _) = times(part);
        rows.push(Filled {
            keys: cut,
            connects_per_s: float(part.len() as u64) / seconds.max(1e-6),
            p50_ms,
            p99_ms,
        });
        (from, since) = (to, last.answered);
    }
    rows
}

/// Looks at everything every ten seconds.
struct Looker<'a> {
    cluster: &'a Cluster,
    fleet: &'a Fleet,
    begin: Instant,
    renewed: u64,
    looks: Vec<Look>,
}

impl Looker<'_> {
    async fn look(&mut self, samples: &[Sample]) -> Result<()> {
        let published = self.fleet.published();
        let memory: Vec<Memory> = self.cluster.pids().into_iter().filter_map(usage::memory).collect();
        if memory.len() < self.cluster.addrs.len() {
            return problem("a controller has ended");
        }
        let (p50_ms, p99_ms, _) = times(samples);
        let look = Look {
            at_s: self.begin.elapsed().as_secs_f64(),
            held: published.held,
            renewed: published.counts.renewed - self.renewed,
            connects: samples.len(),
            p50_ms,
            p99_ms,
            resident_bytes: memory.iter().map(|memory| memory.resident_bytes).collect(),
            anonymous_bytes: memory.iter().map(|memory| memory.anonymous_bytes).collect(),
            term: self.cluster.inner.info().await.term,
        };
        self.renewed = published.counts.renewed;
        println!(
            "{:>7.0} s {:>9} held {:>8} renewed {:>7} connects p50 {:>8.2} p99 {:>8.2} ms  rss {} MiB  term {}  refused {} gap {:.0} s",
            look.at_s,
            look.held,
            look.renewed,
            look.connects,
            p50_ms,
            p99_ms,
            look.resident_bytes.iter().map(|bytes| (bytes >> 20).to_string()).collect::<Vec<_>>().join("/"),
            look.term,
            published.counts.refused,
            published.counts.longest_gap.as_secs_f64(),
        );
        self.looks.push(look);
        Ok(())
    }
}

/// Fills up to `to` keys, with looks.
async fn fill_to(
    looker: &mut Looker<'_>,
    from: u64,
    to: u64,
    options: &Options,
    notes: &Arc<Notes>,
) -> Result<Vec<Filled>> {
    let begin = Instant::now();
    let mut all = Vec::new();
    let filling = fill(looker.cluster, FILL_CLIENTS, options.place, "fill", from..to, notes);
    tokio::pin!(filling);
    let mut tick = tokio::time::interval(SAMPLE_EVERY);
    tick.tick().await;
    loop {
        tokio::select! {
            done = &mut filling => {
                done?;
                all.extend(notes.take());
                break;
            }
            _ = tick.tick() => {
                let samples = notes.take();
                looker.look(&samples).await?;
                all.extend(samples);
            }
        }
    }
    all.sort_by_key(|sample| sample.answered);
    Ok(filled(&all, begin, from, options.keys.max(to)).into_iter().filter(|row| row.keys <= to).collect())
}

async fn hold(
    looker: &mut Looker<'_>,
    keys: u64,
    seconds: f64,
    options: &Options,
    prefix: &str,
) -> Result<(Holding, u64)> {
    let orders = looker.fleet.orders();
    let probes = Probes::start(
        looker.cluster,
        &orders,
        PROBE_CLIENTS,
        options.place,
        options.probes_per_second,
        PROBE_KEEP,
        prefix,
    );
    let servers = looker.cluster.servers();
    let (cpu_s, written) = (servers.cpu_s()?, servers.written_bytes()?);
    let (own, renewed) = (usage::own_cpu_s()?, looker.fleet.published().counts.renewed);
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(seconds);
    let mut all = Vec::new();
    let first_look = looker.looks.len();
    while Instant::now() < end {
        tokio::time::sleep_until((Instant::now() + SAMPLE_EVERY).min(end).into()).await;
        let samples = probes.notes.take();
        looker.look(&samples).await?;
        all.extend(samples);
    }
    let took = begin.elapsed().as_secs_f64();
    let (cpu_s, written) = (servers.cpu_s()? - cpu_s, servers.written_bytes()?.saturating_sub(written));
    let driver = usage::own_cpu_s()? - own;
    let renewed = looker.fleet.published().counts.renewed - renewed;
    let notes = probes.stop().await?;
    let (failed, first) = notes.errors();
    if let Some(first) = first {
        println!("{failed} connects failed; the first: {first}");
    }
    let (p50_ms, p99_ms, max_ms) = times(&all);
    let resident = looker.looks[first_look..].iter().flat_map(|look| &look.resident_bytes).max();
    let holding = Holding {
        keys,
        seconds: took,
        renewals_per_s: float(renewed) / took,
        connects_per_s: float(all.len() as u64) / took,
        p50_ms,
        p99_ms,
        max_ms,
        controllers_cpu: cpu_s / took,
        driver_cpu: driver / took,
        resident_bytes: resident.copied().unwrap_or_default(),
        written_bytes_per_s: float(written) / took,
    };
    println!(
        "held {keys} keys for {took:.0} s: {:.0} renewals/s, {:.0} connects/s, p50 {p50_ms:.2} p99 {p99_ms:.2} max {max_ms:.0} ms, controllers {:.2} cores, driver {:.2}, {:.1} MB/s written",
        holding.renewals_per_s,
        holding.connects_per_s,
        holding.controllers_cpu,
        holding.driver_cpu,
        holding.written_bytes_per_s / 1e6,
    );
    Ok((holding, failed))
}

/// Keys of the fill that are not held as their drones hold them.
async fn lapsed(cluster: &Cluster, fleet: &Fleet, keys: u64) -> Result<u64> {
    let begin = Instant::now();
    let held: HashMap<String, u64> = fleet.keys().await?.into_iter().collect();
    let leader = cluster.inner.leader().await;
    let (mut right, mut cursor) = (0, None::<String>);
    loop {
        let after = cursor.map(|cursor| format!("&cursor={cursor}")).unwrap_or_default();
        let url = format!("{}/ctrl/keys?prefix=fill-&limit=1000{after}", cluster.inner.url(leader));
        let page: KeyPage = cluster.inner.http.get(&url).await.ok();
        right += page.keys.iter().filter(|key| held.get(&key.backend) == Some(&key.token)).count() as u64;
        cursor = page.next_cursor;
        if cursor.is_none() {
            break;
        }
    }
    println!("listed and compared {keys} keys in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(keys.saturating_sub(right))
}

/// Runs, prints as it goes, writes data and plot. A bar that is missed is an error.
pub async fn run(options: &Options) -> Result<()> {
    let cluster = Cluster::start(&options.settings).await?;
    let rounds = Rounds { every: Duration::from_secs(30), batch: options.batch };
    let fleet = Fleet::start(&cluster, options.drones, rounds, options.place);
    cluster.wait_fit("", options.place).await?;
    let mut looker =
        Looker { cluster: &cluster, fleet: &fleet, begin: Instant::now(), renewed: 0, looks: vec![] };
    let first_term = cluster.inner.info().await.term;
    let (mut fills, mut holds, mut failed) = (Vec::new(), Vec::new(), 0);
    let fill_notes = Arc::new(Notes::default());
    let mut stages: Vec<u64> = options.stages.iter().copied().filter(|stage| *stage < options.keys).collect();
    stages.push(options.keys);
    let mut at = 0;
    for stage in stages {
        println!("filling from {at} to {stage} keys");
        fills.extend(fill_to(&mut looker, at, stage, options, &fill_notes).await?);
        at = stage;
        let last = stage == options.keys;
        let seconds = if last { options.minutes * 60.0 } else { float(options.stage_seconds) };
        // Names must not repeat: one prefix for each stage.
        let prefix = format!("probe-{stage}");
        let (holding, probes_failed) = hold(&mut looker, stage, seconds, options, &prefix).await?;
        holds.push(holding);
        failed += probes_failed;
    }
    let (fill_failed, first) = fill_notes.errors();
    if let Some(first) = first {
        println!("{fill_failed} connects failed while filling; the first: {first}");
    }
    let published = fleet.published();
    let lapsed = lapsed(&cluster, &fleet, options.keys - fill_failed).await?;
    let report = Report {
        keys: options.keys,
        drones: options.drones,
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        minutes: options.minutes,
        lapsed,
        refused: published.counts.refused,
        longest_gap_s: published.counts.longest_gap.as_secs_f64(),
        elections: cluster.inner.info().await.term.saturating_sub(first_term),
        lost_sessions: published.lost_sessions,
        failed_connects: failed + fill_failed,
        fill: fills,
        hold: holds,
        looks: std::mem::take(&mut looker.looks),
    };
    fleet.stop().await?;
    write(&report, options)?;
    verdict(&report)
}

fn write(report: &Report, options: &Options) -> Result<()> {
    for path in [&options.json, &options.svg] {
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).during(parent.display())?;
        }
    }
    let text = serde_json::to_string_pretty(report).during("the report")?;
    std::fs::write(&options.json, text + "\n").during(options.json.display())?;
    std::fs::write(&options.svg, plot::svg(report)).during(options.svg.display())?;
    println!("written to {} and {}", options.json.display(), options.svg.display());
    Ok(())
}

/// Draws the plot of a report that was written before.
pub fn redraw(json: &std::path::Path, svg: &std::path::Path) -> Result<()> {
    let text = std::fs::read_to_string(json).during(json.display())?;
    let report: Report = serde_json::from_str(&text).during(json.display())?;
    std::fs::write(svg, plot::svg(&report)).during(svg.display())
}

fn verdict(report: &Report) -> Result<()> {
    let Some(last) = report.hold.last() else { return problem("nothing was held") };
    let bars = [
        ("keys that lapsed", float(report.lapsed), 0.0),
        ("renewals refused", float(report.refused), 0.0),
        ("longest time between renewals of a key, s", report.longest_gap_s, EXPIRY.as_secs_f64()),
        ("connect p99 while all are held, ms", last.p99_ms, CONNECT_P99_MS_BAR),
        (
            "resident memory of a controller, MiB",
            float(last.resident_bytes >> 20),
            float(RESIDENT_BYTES_BAR >> 20),
        ),
        ("elections", float(report.elections), 0.0),
    ];
    let mut missed = Vec::new();
    for (what, value, bar) in bars {
        let met = value <= bar;
        println!("{value:>10.1}  {what} (at most {bar:.0}){}", if met { "" } else { "  MISSED" });
        if !met {
            missed.push(what);
        }
    }
    if missed.is_empty() { Ok(()) } else { problem(format!("missed: {}", missed.join("; "))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fill_is_cut_at_one_two_five() {
        assert_eq!(cuts(1_000), [1_000]);
        assert_eq!(cuts(12_000), [1_000, 2_000, 5_000, 10_000, 12_000]);
    }

    #[test]
    fn each_part_of_the_fill_has_its_own_rate() {
        let begin = Instant::now();
        let sample = |n: u64, ms: u64| Sample {
            answered: begin + Duration::from_millis(ms),
            took_us: u32::try_from(n).unwrap(),
        };
        // A thousand in one second, a thousand in two.
        let mut samples: Vec<Sample> = (1..=1_000).map(|n| sample(n, n)).collect();
        samples.extend((1..=1_000).map(|n| sample(n, 1_000 + 2 * n)));
        let rows = filled(&samples, begin, 0, 2_000);
        assert_eq!(rows.iter().map(|row| row.keys).collect::<Vec<_>>(), [1_000, 2_000]);
        assert!((rows[0].connects_per_s - 1_000.0).abs() < 1.0, "{rows:?}");
        assert!((rows[1].connects_per_s - 500.0).abs() < 1.0, "{rows:?}");
        // From the second thousand on, only its cut is there.
        assert_eq!(filled(&samples[1_000..], begin, 1_000, 2_000).len(), 1);
    }

    #[test]
    fn a_missed_bar_is_said() {
        let holding = Holding {
            keys: 1,
            seconds: 1.0,
            renewals_per_s: 1.0,
            connects_per_s: 1.0,
            p50_ms: 1.0,
            p99_ms: 51.0,
            max_ms: 60.0,
            controllers_cpu: 1.0,
            driver_cpu: 1.0,
            resident_bytes: 1,
            written_bytes_per_s: 1.0,
        };
        let mut report = Report {
            keys: 1,
            drones: 1,
            cores: 2,
            minutes: 1.0,
            lapsed: 0,
            refused: 0,
            longest_gap_s: 31.0,
            elections: 0,
            lost_sessions: 0,
            failed_connects: 0,
            fill: Vec::new(),
            hold: vec![holding],
            looks: Vec::new(),
        };
        assert!(verdict(&report).unwrap_err().to_string().contains("p99"));
        report.hold[0].p99_ms = 49.0;
        assert!(verdict(&report).is_ok());
    }
}
