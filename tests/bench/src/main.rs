//! Benchmarks of Holdfast beside its peers, and its long runs.
//!
//! ```text
//!   bench compare [--quick] [--clients 1,16,64,256] [--systems holdfast,etcd,postgres]
//!                 [--operations acquire,renew,renew_batched] [--seconds 6] [--repeat 1] [--json target/bench.json]
//!                 [--holdfast-place leader|spread] [--etcd-place leader|spread] [--postgres-connections 20]
//!                 [--drones 12] [--dir target/tmp] [--election-timeout 200ms]
//!   bench million [--keys 1000000] [--drones 1000] [--minutes 10] [--stages 1000,10000,100000] [--stage-seconds 30]
//!                 [--probes-per-second 50] [--batch 1000] [--place leader|spread] [--election-timeout 200ms]
//!                 [--json docs/benchmarks/million.json] [--svg docs/benchmarks/million.svg]
//!   bench plot FILE.json FILE.svg
//!   bench elections [--minutes 60] [--clients 64] [--drones 30] [--keys 100000] [--keep-seconds 10] [--place leader|spread]
//!                 [--election-timeout 200ms] [--terminated-keep 1m] [--json target/elections.json]
//! ```
//!
//! What each row means, and why it is fair, is said where it is measured ([`holdfast`], [`etcd`], [`postgres`]) and in
//! `docs/benchmarks.md`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]

mod child;
mod compare;
mod disk;
mod elections;
mod etcd;
mod holdfast;
mod load;
mod million;
mod place;
mod plot;
mod postgres;
mod problem;
mod report;
mod usage;

use crate::place::Place;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::Duration;

const USAGE: &str = "usage: bench compare|million|elections [OPTIONS], bench plot FILE.json FILE.svg (see docs/benchmarks.md)";

/// Numbers of clients unless told otherwise.
const CLIENTS: [usize; 4] = [1, 16, 64, 256];
/// The one of `--quick`.
const CLIENTS_QUICK: [usize; 1] = [64];

fn list<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<Vec<T>, String> {
    text.split(',').map(|item| item.trim().parse().map_err(|e| format!("{item:?}: {e}"))).collect()
}

fn known(items: Vec<String>, all: &[&str]) -> Result<Vec<String>, String> {
    match items.iter().find(|item| !all.contains(&item.as_str())) {
        Some(item) => Err(format!("{item:?} is none of {}", all.join(", "))),
        None => Ok(items),
    }
}

fn number<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, String> {
    text.parse().map_err(|e| format!("{text:?}: {e}"))
}

/// A count that must not be 0.
fn positive(text: &str) -> Result<usize, String> {
    match number(text)? {
        0 => Err(format!("{text:?}: at least 1")),
        count => Ok(count),
    }
}

fn compare_options(args: &mut impl Iterator<Item = String>) -> Result<compare::Options, String> {
    const OPERATIONS: [&str; 3] = ["acquire", "renew", "renew_batched"];
    let mut options = compare::Options {
        clients: CLIENTS.to_vec(),
        systems: report::SYSTEMS.map(str::to_owned).to_vec(),
        operations: OPERATIONS.map(str::to_owned).to_vec(),
        seconds: 6,
        repeat: 1,
        holdfast_place: Place::Leader,
        etcd_place: Place::Leader,
        postgres_connections: 20,
        drones: 12,
        dir: PathBuf::from("target/tmp"),
        json: PathBuf::from("target/bench.json"),
        settings: holdfast::Settings::default(),
    };
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--quick" => options.clients = CLIENTS_QUICK.to_vec(),
            "--clients" => {
                options.clients = value()?.split(',').map(positive).collect::<Result<_, _>>()?;
            }
            "--systems" => options.systems = known(list(&value()?)?, &report::SYSTEMS)?,
            "--operations" => options.operations = known(list(&value()?)?, &OPERATIONS)?,
            "--seconds" => options.seconds = positive(&value()?)? as u64,
            "--repeat" => options.repeat = positive(&value()?)?,
            "--holdfast-place" => options.holdfast_place = value()?.parse()?,
            "--etcd-place" => options.etcd_place = value()?.parse()?,
            "--postgres-connections" => options.postgres_connections = positive(&value()?)?,
            "--drones" => options.drones = positive(&value()?)?,
            "--dir" => options.dir = PathBuf::from(value()?),
            "--json" => options.json = PathBuf::from(value()?),
            "--election-timeout" => options.settings.election_timeout = Some(value()?),
            other => return Err(format!("{other:?} is not known")),
        }
    }
    Ok(options)
}

fn million_options(args: &mut impl Iterator<Item = String>) -> Result<million::Options, String> {
    let mut options = million::Options {
        keys: 1_000_000,
        drones: 1_000,
        minutes: 10.0,
        stages: vec![1_000, 10_000, 100_000],
        stage_seconds: 30,
        probes_per_second: 50,
        batch: 1_000,
        place: Place::Leader,
        json: PathBuf::from("docs/benchmarks/million.json"),
        svg: PathBuf::from("docs/benchmarks/million.svg"),
        settings: holdfast::Settings::default(),
    };
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--keys" => options.keys = positive(&value()?)? as u64,
            "--drones" => options.drones = positive(&value()?)?,
            "--minutes" => options.minutes = number(&value()?)?,
            "--stages" => options.stages = list(&value()?)?,
            "--stage-seconds" => options.stage_seconds = positive(&value()?)? as u64,
            "--probes-per-second" => options.probes_per_second = number(&value()?)?,
            "--batch" => options.batch = positive(&value()?)?,
            "--place" => options.place = value()?.parse()?,
            "--json" => options.json = PathBuf::from(value()?),
            "--svg" => options.svg = PathBuf::from(value()?),
            "--election-timeout" => options.settings.election_timeout = Some(value()?),
            other => return Err(format!("{other:?} is not known")),
        }
    }
    Ok(options)
}

fn elections_options(args: &mut impl Iterator<Item = String>) -> Result<elections::Options, String> {
    let mut options = elections::Options {
        minutes: 60.0,
        clients: 64,
        drones: 30,
        keys: 100_000,
        keep: Duration::from_secs(10),
        place: Place::Leader,
        json: PathBuf::from("target/elections.json"),
        // What was terminated is kept for an hour by default: at thousands per second that would be a test of the disk.
        settings: holdfast::Settings { terminated_keep: Some("1m".to_owned()), ..Default::default() },
    };
    while let Some(flag) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{flag} needs a value"));
        match flag.as_str() {
            "--minutes" => options.minutes = number(&value()?)?,
            "--clients" => options.clients = positive(&value()?)?,
            "--drones" => options.drones = positive(&value()?)?,
            "--keys" => options.keys = number(&value()?)?,
            "--keep-seconds" => options.keep = Duration::from_secs(number(&value()?)?),
            "--place" => options.place = value()?.parse()?,
            "--json" => options.json = PathBuf::from(value()?),
            "--election-timeout" => options.settings.election_timeout = Some(value()?),
            "--terminated-keep" => options.settings.terminated_keep = Some(value()?),
            other => return Err(format!("{other:?} is not known")),
        }
    }
    Ok(options)
}

/// One thread for the load: the machine's cores are the servers', and threads that steal from each other cost more than
/// they bring.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

/// As many open files as are allowed: a thousand drones are a thousand sockets here and in a controller, which inherits
/// this. Without it the run would say which socket failed.
fn raise_open_files() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both are given a valid struct of this thread's.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            let _ = libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

fn main() -> ExitCode {
    raise_open_files();
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let wrong = |problem: String| {
        eprintln!("bench: {problem}\n{USAGE}");
        ExitCode::from(2)
    };
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bench: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = match command.as_str() {
        "compare" => match compare_options(&mut args) {
            Ok(options) => runtime.block_on(compare::run(&options)),
            Err(problem) => return wrong(problem),
        },
        "million" => match million_options(&mut args) {
            Ok(options) => runtime.block_on(million::run(&options)),
            Err(problem) => return wrong(problem),
        },
        "elections" => match elections_options(&mut args) {
            Ok(options) => runtime.block_on(elections::run(&options)),
            Err(problem) => return wrong(problem),
        },
        "plot" => match (args.next(), args.next()) {
            (Some(json), Some(svg)) => million::redraw(json.as_ref(), svg.as_ref()),
            _ => return wrong("plot needs two files".to_owned()),
        },
        other => return wrong(format!("{other:?} is not a command")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("bench: {problem}");
            ExitCode::FAILURE
        }
    }
}
