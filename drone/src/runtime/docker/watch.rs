//! The drone's watch over one container's guard: passes on what it reports and what the drone wants, ends the container in
//! its place if it dies or is too slow, and tells what the container uses.

use super::DockerRuntime;
use super::end;
use super::stats::{self, Counters, METRICS_FIRST, METRICS_INTERVAL};
use crate::activity::Place;
use crate::backend_state::{Desired, Observation};
use crate::guard::Report;
use crate::runtime::process::update;
use crate::runtime::watcher::{Guard, GuardProcess, Unsent, line, patience, tell};
use bollard::models::ContainerStatsResponse;
use futures::future::{Fuse, FusedFuture, FutureExt};
use holdfast_wire::TerminationKind;
use std::path::Path;
use std::time::Duration;
use tokio::io::AsyncBufReadExt;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

pub(super) struct Watch<'a> {
    runtime: &'a DockerRuntime,
    backend: &'a str,
    container: &'a str,
    permit: &'a Path,
    facts: &'a mpsc::Sender<Observation>,
    running: bool,
    exited: bool,
    gone: bool,
    /// Of the last time, to count on from.
    counters: Option<Counters>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        runtime: &'a DockerRuntime,
        backend: &'a str,
        container: &'a str,
        permit: &'a Path,
        facts: &'a mpsc::Sender<Observation>,
    ) -> Self {
        Self {
            runtime,
            backend,
            container,
            permit,
            facts,
            running: false,
            exited: false,
            gone: false,
            counters: None,
        }
    }

    /// Watches until nothing is left.
    pub(super) async fn watch(mut self, guard: Guard, mut want: watch::Receiver<Desired>, mut told: Desired) {
        let Guard { process: mut guard, known, input: mut stdin, output, arm_line } = guard;
        let mut unsent = Unsent::new(arm_line);
        // What is wanted by now is not in `unsent`. Only the latest counts.
        let mut newer = false;
        // The sender's end does not make the backend end: its guard goes on without us.
        let mut wants_open = true;
        if let Some(output) = output {
            let mut lines = output.lines();
            let mut impatient = false;
            let out_of_patience = sleep(patience(told.kill_ms));
            let asking = Fuse::terminated();
            tokio::pin!(out_of_patience, asking);
            // At first at once, to have something to count from.
            let ask_at = sleep(Duration::ZERO);
            tokio::pin!(ask_at);
            loop {
                if newer && unsent.is_empty() {
                    newer = false;
                    match line(&update(self.runtime.clock, told)) {
                        Ok(bytes) => unsent = Unsent::new(bytes),
                        Err(e) => warn!(backend = self.backend, "an update that is no JSON: {e}"),
                    }
                }
                let killing = told.end == Some(TerminationKind::Hard);
                tokio::select! {
                    () = &mut out_of_patience, if killing && !impatient => {
                        impatient = true;
                        warn!(backend = self.backend, "the guard does not finish; ending the container in its place");
                        kill(&mut guard, self.backend);
                    }
                    line = lines.next_line() => match line {
                        Ok(Some(line)) => self.report(&line).await,
                        Ok(None) => break,
                        Err(e) => {
                            warn!(backend = self.backend, "cannot read the guard's reports: {e}");
                            break;
                        }
                    },
                    changed = want.changed(), if wants_open => {
                        wants_open = changed.is_ok();
                        let now = *want.borrow_and_update();
                        if now == told {
                            continue;
                        }
                        told = now;
                        newer = true;
                        if told.end == Some(TerminationKind::Hard) && !killing {
                            out_of_patience.as_mut().reset(Instant::now() + patience(told.kill_ms));
                        }
                    }
                    written = unsent.send(&mut stdin), if stdin.is_some() && !unsent.is_empty() => {
                        if written.is_err() {
                            stdin = None;
                        }
                    }
                    () = &mut ask_at, if self.running && asking.is_terminated() => {
                        let first = self.counters.is_none();
                        let wait = if first { METRICS_FIRST } else { METRICS_INTERVAL };
                        ask_at.as_mut().reset(Instant::now() + wait);
                        let turn = std::sync::Arc::clone(&self.runtime.stats_turn);
                        let id = self.container.to_owned();
                        asking.set(stats::ask(self.runtime.docker.clone(), turn, id).fuse());
                    }
                    stats = &mut asking => self.measured(stats),
                }
            }
        }
        if self.gone {
            wait(&mut guard, self.backend).await;
            return;
        }
        warn!(backend = self.backend, "the guard has died; ending what is left of the container");
        // It may be stopped, or have closed its output: it must not start anything any more.
        kill(&mut guard, self.backend);
        wait(&mut guard, self.backend).await;
        drop(known);
        if !self.exited {
            tell(self.facts, Observation::Failed).await;
        }
        end::end(&self.runtime.docker, self.container, self.permit).await;
        self.runtime.family.reap();
    }

    async fn report(&mut self, line: &str) {
        let backend = self.backend;
        let report = match serde_json::from_str::<Report>(line) {
            Ok(report) => report,
            Err(e) => {
                warn!(backend, "unreadable report of the guard: {e}");
                return;
            }
        };
        match report {
            Report::Started { pid } => {
                info!(backend, container = self.container, pid, "started");
                self.running = true;
                if pid > 0 {
                    // Connections from elsewhere come by the kernel's address translation, and are in its tables alone.
                    let place = Place { pid: Some(pid), port: super::create::CONTAINER_PORT };
                    tell(self.facts, Observation::ConnectionsAt(place)).await;
                }
                tell(self.facts, Observation::Started).await;
            }
            Report::NotStarted { late, problem } => {
                warn!(backend, late, "not started: {problem}");
                self.running = false;
                tell(self.facts, if late { Observation::StartedTooLate } else { Observation::Failed }).await;
            }
            Report::Ready => tell(self.facts, Observation::Ready).await,
            Report::SoftDeadline => tell(self.facts, Observation::SoftDeadline).await,
            Report::Killing => tell(self.facts, Observation::Killing).await,
            Report::Exited { code, .. } => {
                info!(backend, container = self.container, code, "the container has ended");
                self.running = false;
                self.exited = true;
                tell(self.facts, Observation::Exited(code)).await;
            }
            Report::Gone => self.gone = true,
            // Of processes' guards.
            Report::Contained { .. } | Report::Uncontained { .. } => {}
        }
    }

    fn measured(&mut self, stats: Option<ContainerStatsResponse>) {
        if !self.running {
            return;
        }
        let Some(stats) = stats else { return };
        let last = self.counters.unwrap_or_default();
        let Some((metrics, counters)) = stats::metrics(self.backend, &stats, last) else { return };
        if self.counters.replace(counters).is_none() {
            return;
        }
        // Figures that there is no room for are told by the next ones.
        if let Ok(metrics) = serde_json::to_value(metrics) {
            let _ = self.facts.try_send(Observation::Metrics(metrics));
        }
    }
}

fn kill(guard: &mut GuardProcess, backend: &str) {
    if let Err(e) = guard.start_kill() {
        warn!(backend, "cannot kill the guard: {e}");
    }
}

async fn wait(guard: &mut GuardProcess, backend: &str) {
    if let Err(e) = guard.wait().await {
        warn!(backend, "cannot wait for the guard: {e}");
    }
}
