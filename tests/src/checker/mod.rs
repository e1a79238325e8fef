//! The judge of exclusion that believes no drone.
//!
//! ```text
//!   /proc ──▶ ProcessWatch ─┐   which backends of a key have processes, all the time
//!   keys  ──▶ holders ──────┼─▶ Checker ──▶ what is wrong
//!   TCP   ──▶ Resource ─────┘   which tokens were used, and in what order
//! ```
//!
//! Rules (numbers in brackets are the design's):
//!
//! 1. At no moment have two backends of a key processes, children of children included (1).
//! 2. Once a controller has answered that a key is another's, free or expired, no look at the process table that begins
//!    after that finds anything of its old holder (1).
//! 3. A resource that refuses tokens lower than the highest it saw has nothing to refuse, and accepts them in rising
//!    order (2).
//! 4. Nothing is judged that was not looked at: a run with too few looks, or with backends that wrote nothing, fails.
//!
//! Each rule reports only what is certain from the order of reads; an overlap shorter than the time between two looks can
//! be missed by the first, but not by the lock and the record that each `test-backend` keeps (`Journal`).

mod processes;
mod resource;

pub use processes::{Life, ProcessWatch, guard_of, processes_of};
pub use resource::{Resource, Turn};

use crate::harness::{Cluster, Http, TestBackend, boot_ms};
use holdfast_wire::http::KeyPage;
use reqwest::Method;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Time between two looks at who holds the keys.
const HOLDERS_EVERY: Duration = Duration::from_millis(60);
/// Longest wait for one controller's answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// A backend that lived this long must have written: it connects at its start.
const WROTE_BY_MS: u64 = 1_500;
/// And at least so often.
const WRITES_MIN: u64 = 3;
/// Least looks at the process table a second; below, the run has not been watched.
const LOOKS_PER_S_MIN: u64 = 5;

/// Watches a cluster until [`Checker::finish`].
pub struct Checker {
    /// The processes.
    pub processes: Arc<ProcessWatch>,
    /// The resource.
    pub resource: Resource,
    began_ms: u64,
    holders: JoinHandle<()>,
}

impl Drop for Checker {
    fn drop(&mut self) {
        self.holders.abort();
    }
}

impl Checker {
    /// Begins to watch.
    pub fn start(cluster: &Cluster) -> Self {
        let journal = cluster.dir().join("journal").display().to_string();
        let processes = ProcessWatch::start(("JOURNAL".to_owned(), journal));
        let holders = tokio::spawn(holders(cluster.http.clone(), cluster.urls(), Arc::clone(&processes)));
        Self { processes, resource: Resource::start(), began_ms: boot_ms(), holders }
    }

    /// A backend that uses the resource all the time, notes that it lives, and has children that outlive it if nobody
    /// ends them.
    pub fn backend(&self, cluster: &Cluster) -> TestBackend {
        let resource = self.resource.addr().to_string();
        cluster.backend().env("RESOURCE", &resource).env("ALIVE_EVERY_MS", "50").env("SITTERS", "1")
    }

    /// What is wrong so far.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.processes.problems();
        problems.extend(self.resource.problems());
        problems
    }

    /// Panics if anything is wrong so far.
    pub fn assert_clean(&self) {
        let problems = self.problems();
        assert!(problems.is_empty(), "{problems:#?}");
    }

    /// Judges the whole run, and gives a line about it.
    pub fn finish(&self, cluster: &Cluster) -> String {
        self.holders.abort();
        self.assert_clean();
        cluster.journal.assert_no_overlap();
        let watched_ms = boot_ms() - self.began_ms;
        let looks = self.processes.looks();
        assert!(looks * 1_000 >= watched_ms * LOOKS_PER_S_MIN, "only {looks} looks in {watched_ms} ms");
        let lives = self.processes.lives();
        assert!(!lives.is_empty(), "no backend was seen");
        let mut writes_all = 0;
        for (backend, life) in &lives {
            let writes = self.resource.accepted(backend);
            writes_all += writes;
            let lived_ms = life.last_ms - life.first_ms;
            assert!(
                lived_ms < WROTE_BY_MS || writes >= WRITES_MIN,
                "{backend} lived {lived_ms} ms and wrote {writes} times: {life:?}"
            );
        }
        format!(
            "{} backends, {looks} looks at the process table in {watched_ms} ms (longest pause {} ms), \
             {writes_all} writes accepted and {} refused by the resource",
            lives.len(),
            self.processes.longest_pause_ms(),
            self.resource.refused(),
        )
    }
}

/// Tells the process watch whose keys are whose no more.
async fn holders(http: Http, urls: Vec<String>, processes: Arc<ProcessWatch>) {
    let mut at = 0;
    loop {
        let url = format!("{}/ctrl/keys?limit=1000", urls[at % urls.len()]);
        let asked_ms = boot_ms();
        // Linearizable: what it says was true at some moment after it was asked for.
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, http.send(Method::GET, &url, &[], None)).await;
        match answer {
            Ok(Ok(answer)) if answer.status.is_success() => {
                let page: KeyPage = answer.read();
                let held = page.keys.into_iter().filter(|key| key.expires_in_ms > 0);
                processes.holders(asked_ms, boot_ms(), held.map(|key| (key.name, key.token)).collect());
            }
            // Down or without a leader: the next one.
            _ => at += 1,
        }
        tokio::time::sleep(HOLDERS_EVERY).await;
    }
}
