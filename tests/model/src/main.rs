//! Explores the model and prints a table: `make model`.

use std::process::ExitCode;

use clap::Parser;
use comfy_table::Table;
use holdfast_model::{Holdfast, Limits, Outcome, check, scenarios};

/// Explores the model of the membership protocol. Without bounds of its own: all scenarios.
#[derive(Parser)]
struct Options {
    /// Only scenarios whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Stops a scenario after so many states in total.
    #[arg(long, default_value_t = 10_000_000)]
    states: usize,
    /// Threads per scenario of the protocol. Broken rules are explored by one, which finds a shortest
    /// counterexample.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Prints the steps of each counterexample.
    #[arg(long)]
    steps: bool,
    /// Explores one cluster of so many members instead of the scenarios, with the bounds that follow.
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=5))]
    members: Option<u8>,
    /// Waiting processes that can be added.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=2))]
    spare: u8,
    /// Disks that are lost.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=4))]
    lost_disks: u8,
    /// The highest term.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=9))]
    terms: u8,
    /// The longest log.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=20))]
    log: u8,
    /// Acquisitions.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=6))]
    acquires: u8,
    /// Membership changes.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=9))]
    changes: u8,
    /// Checks in each state that a majority of good disks serves in the end.
    #[arg(long)]
    recovery: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let scenarios = match options.members {
        Some(members) => vec![scenarios::Scenario {
            name: "given bounds",
            model: Holdfast::new(given(&options, members)),
            violates: None,
        }],
        None => scenarios::all(),
    };
    let mut table = Table::new();
    table.set_header(["scenario", "unique states", "in total", "depth", "seconds", "result", "steps"]);
    let mut as_expected = true;
    for scenario in scenarios.into_iter().filter(|scenario| scenario.name.contains(&options.only)) {
        let threads = if scenario.violates.is_some() { 1 } else { options.threads };
        let outcome = check(scenario.model.clone(), threads, options.states);
        as_expected &= scenario.accepts(&outcome);
        println!("{}: {}", scenario.name, outcome.summary());
        if options.steps || !scenario.accepts(&outcome) {
            println!("{outcome}");
        }
        table.add_row(row(&scenario, &outcome));
    }
    println!("{table}");
    if as_expected { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The bounds that the command line gives.
fn given(options: &Options, members: u8) -> Limits {
    Limits {
        slots: members + options.spare,
        terms: options.terms,
        log: options.log,
        acquires: options.acquires,
        lost: options.lost_disks,
        changes: options.changes,
        adds: options.spare > 0 && options.changes > 0,
        removes: options.changes > 0,
        recovery: options.recovery,
        symmetry: true,
        ..Limits::formed(members)
    }
}

fn row(scenario: &scenarios::Scenario, outcome: &Outcome) -> [String; 7] {
    let length = outcome.counterexamples.iter().map(|(_, steps)| steps.len()).min();
    [
        scenario.name.to_string(),
        outcome.unique.to_string(),
        outcome.total.to_string(),
        outcome.depth.to_string(),
        format!("{:.1}", outcome.took.as_secs_f64()),
        outcome.result().to_string(),
        length.map_or_else(String::new, |length| length.to_string()),
    ]
}
