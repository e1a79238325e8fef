//! The judge of exclusion, for processes on hosts of their own: see [`crate::checker`]. It asks each controller from that
//! controller's own host, so an isolated leader is asked too.

use super::host::HostClient;
use crate::checker::{ProcessWatch, Resource};
use crate::harness::boot_ms;
use holdfast_wire::http::KeyPage;
use reqwest::Method;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Time between two looks at who holds the keys.
const HOLDERS_EVERY: Duration = Duration::from_millis(100);
/// Longest wait for one controller's answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// Fewest looks at the process table a second; below, the run has not been watched.
const LOOKS_PER_S_MIN: u64 = 5;

/// See the module.
#[derive(Debug)]
pub struct Watch {
    /// The process table.
    pub processes: Arc<ProcessWatch>,
    journal: PathBuf,
    began_ms: u64,
    asking: Vec<JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.asking.iter().for_each(JoinHandle::abort);
    }
}

impl Watch {
    /// Watches backends that write to `journal`, and asks these controllers who holds the keys.
    pub(super) fn start(journal: &Path, controllers: Vec<(String, HostClient)>) -> Self {
        let mark = ("JOURNAL".to_owned(), journal.display().to_string());
        let processes = ProcessWatch::start(mark);
        let asking = controllers
            .into_iter()
            .map(|(url, client)| tokio::spawn(ask(url, client, Arc::clone(&processes))))
            .collect();
        Self { processes, journal: journal.to_owned(), began_ms: boot_ms(), asking }
    }

    /// Asks the controller at this index no more: what runs there now belongs to another cluster.
    pub fn ignore(&self, controller: usize) {
        self.asking[controller].abort();
    }

    /// What is wrong so far.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.processes.problems();
        let journal = std::fs::read_to_string(&self.journal).unwrap_or_default();
        problems.extend(journal.lines().filter(|line| line.starts_with("overlap")).map(str::to_owned));
        problems
    }

    /// Panics if anything is wrong so far.
    #[track_caller]
    pub fn assert_clean(&self) {
        let problems = self.problems();
        assert!(problems.is_empty(), "{problems:#?}");
    }

    /// Panics if anything was wrong, or too little was looked at. `resource` is what the backends wrote to.
    #[track_caller]
    pub fn finish(&self, resource: &Resource) {
        self.assert_clean();
        assert_eq!(resource.problems(), Vec::<String>::new());
        let (looks, watched_ms) = (self.processes.looks(), boot_ms() - self.began_ms);
        assert!(looks * 1_000 >= watched_ms * LOOKS_PER_S_MIN, "only {looks} looks in {watched_ms} ms");
    }

    /// The tokens of the backends of a key that were seen, in the order in which they began.
    pub fn tokens(&self, key: &str) -> Vec<u64> {
        let lives = self.processes.lives();
        let mut seen: Vec<_> = lives.values().filter(|life| life.key == key).collect();
        seen.sort_by_key(|life| life.first_ms);
        seen.into_iter().map(|life| life.token).collect()
    }
}

/// Reports who holds the keys by one controller's linearizable reads.
async fn ask(url: String, client: HostClient, processes: Arc<ProcessWatch>) {
    let url = format!("{url}/ctrl/keys?limit=1000");
    loop {
        let asked_ms = boot_ms();
        let answer = tokio::time::timeout(ANSWER_WITHIN, client.send(Method::GET, &url, None)).await;
        if let Ok(Ok(answer)) = answer
            && answer.status.is_success()
        {
            let page: KeyPage = answer.read();
            let held = page.keys.into_iter().filter(|key| key.expires_in_ms > 0);
            let held: BTreeMap<String, u64> = held.map(|key| (key.name, key.token)).collect();
            processes.holders(asked_ms, boot_ms(), held);
        }
        tokio::time::sleep(HOLDERS_EVERY).await;
    }
}
