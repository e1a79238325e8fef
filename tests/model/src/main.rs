//! Explores the model and prints a table.

use clap::Parser;
use holdfast_model::{check, scenarios};

#[derive(Parser)]
struct Options {
    #[arg(long, default_value = "")]
    only: String,
    #[arg(long, default_value_t = 20_000_000)]
    states: usize,
    #[arg(long, default_value_t = 2)]
    threads: usize,
}

fn main() {
    let options = Options::parse();
    for scenario in scenarios::protocol(true).into_iter().chain(scenarios::variants()).chain(scenarios::examined()) {
        if !scenario.name.contains(&options.only) {
            continue;
        }
        let threads = if scenario.violates.is_some() { 1 } else { options.threads };
        let outcome = check(scenario.model, threads, options.states);
        println!("== {} (must violate {:?}): {outcome}", scenario.name, scenario.violates);
    }
}
