//! One exhaustive run, and what it found.

use std::fmt;
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

use crate::Holdfast;
use crate::config::Step;

/// What a run found.
#[derive(Debug)]
pub struct Outcome {
    /// States that were different.
    pub unique: usize,
    /// States that steps led to, counted each time.
    pub total: usize,
    /// The number of steps to the farthest state.
    pub depth: usize,
    /// Whether every reachable state within the bounds was visited.
    pub complete: bool,
    /// Each violated property with the steps that lead to it.
    pub counterexamples: Vec<(&'static str, Vec<Step>)>,
    /// The "reached" properties that no state satisfies.
    pub unreached: Vec<&'static str>,
    /// How long the run took.
    pub took: Duration,
}

/// Explores breadth first until the first counterexample, the last state, or so many states in total. One
/// thread finds a shortest counterexample; two are faster.
pub fn check(model: Holdfast, threads: usize, states: usize) -> Outcome {
    let started = Instant::now();
    let scripted = model.script.clone();
    let builder = model.checker().threads(threads).target_state_count(states);
    let checker = builder.finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let took = started.elapsed();
    let found = checker.discoveries();
    let mut counterexamples = Vec::new();
    let mut unreached = Vec::new();
    for property in checker.model().properties() {
        let path = found.get(property.name);
        match (&property.expectation, path) {
            (stateright::Expectation::Sometimes, None) => unreached.push(property.name),
            (stateright::Expectation::Sometimes, Some(_)) | (_, None) => {}
            (_, Some(path)) => {
                let steps = scripted.iter().copied().chain(path.clone().into_actions()).collect();
                counterexamples.push((property.name, steps));
            }
        }
    }
    Outcome {
        unique: checker.unique_state_count(),
        total: checker.state_count(),
        depth: checker.max_depth().saturating_sub(1) + scripted.len(),
        complete: counterexamples.is_empty() && checker.state_count() < states,
        counterexamples,
        unreached,
        took,
    }
}

impl Outcome {
    /// The states and the result in one line.
    pub fn summary(&self) -> String {
        let Outcome { unique, total, depth, took, .. } = self;
        let seconds = took.as_secs_f64();
        format!("{unique} unique states, {total} in total, depth {depth}, {seconds:.1} s: {}", self.result())
    }

    /// What the run says about the properties.
    pub fn result(&self) -> &'static str {
        match self.counterexamples.first() {
            Some((property, _)) => property,
            None if self.complete => "holds",
            None => "holds as far as explored",
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.summary())?;
        for (property, steps) in &self.counterexamples {
            write!(f, "\n\"{property}\" is violated after {} steps:", steps.len())?;
            for step in steps {
                write!(f, "\n  {step:?}")?;
            }
        }
        for property in &self.unreached {
            write!(f, "\nnot {property}")?;
        }
        Ok(())
    }
}
