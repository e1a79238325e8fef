//! The process table, looked at all the time.
//!
//! A process belongs to a backend if its environment says so, which everything that a backend starts inherits. A process
//! that has ended but is not reaped has no environment, so it does not count.

use crate::harness::boot_ms;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{sleep, spawn};
use std::time::Duration;

/// Time between two looks.
const EVERY: Duration = Duration::from_millis(8);
/// After so many looks, processes that were there before the watch are looked at too: their numbers may be others' now.
const ALL_AFTER_LOOKS: u64 = 128;
/// Problems that are kept.
const PROBLEMS_MAX: usize = 50;

/// The time in which a backend was seen. All moments are of `CLOCK_BOOTTIME`, in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Life {
    /// Its key's name.
    pub key: String,
    /// Its token.
    pub token: u64,
    /// The end of the first look that found it.
    pub first_ms: u64,
    /// The beginning of the last look that found it.
    pub last_ms: u64,
    /// Most processes at once.
    pub processes_max: usize,
}

/// What a process's environment says.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Owner {
    key: String,
    token: u64,
    backend: String,
}

/// When a key was last known to be somebody's.
#[derive(Debug, Clone, Default)]
struct Lost {
    /// A look that begins after this …
    at_ms: u64,
    /// … and finds a token below this is proof.
    below: u64,
}

#[derive(Debug, Default)]
struct Seen {
    looks: u64,
    last_look_ms: u64,
    longest_pause_ms: u64,
    lives: BTreeMap<String, Life>,
    /// By key.
    lost: BTreeMap<String, Lost>,
    problems: Vec<String>,
}

impl Seen {
    fn problem(&mut self, problem: String) {
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(problem);
        }
    }

    /// Notes what a look from `begin_ms` to `end_ms` found.
    fn found(&mut self, begin_ms: u64, end_ms: u64, found: &BTreeMap<Owner, Vec<u32>>) {
        self.looks += 1;
        if self.last_look_ms > 0 {
            self.longest_pause_ms = self.longest_pause_ms.max(begin_ms.saturating_sub(self.last_look_ms));
        }
        self.last_look_ms = begin_ms;
        for (owner, pids) in found {
            let life = self.lives.entry(owner.backend.clone()).or_insert_with(|| Life {
                key: owner.key.clone(),
                token: owner.token,
                first_ms: end_ms,
                last_ms: begin_ms,
                processes_max: 0,
            });
            life.last_ms = begin_ms.max(life.first_ms);
            life.processes_max = life.processes_max.max(pids.len());
            let lost = self.lost.get(&owner.key).filter(|lost| owner.token < lost.below);
            if let Some(lost) = lost.filter(|lost| lost.at_ms < begin_ms) {
                let late_ms = begin_ms - lost.at_ms;
                self.problem(format!(
                    "{owner:?} has processes {pids:?} at {begin_ms}, {late_ms} ms after its key was not its own"
                ));
            }
        }
    }

    /// Notes an answer to a question from `asked_ms` on that came at `came_ms`: who held which keys.
    fn holders(&mut self, asked_ms: u64, came_ms: u64, held: &BTreeMap<String, u64>) {
        // Whoever was seen before the question had acquired its key by then.
        let seen = self.lives.values().filter(|life| life.first_ms < asked_ms);
        let mut newest: BTreeMap<String, u64> = BTreeMap::new();
        for life in seen {
            let token = newest.entry(life.key.clone()).or_default();
            *token = life.token.max(*token);
        }
        for (key, token) in newest {
            // Tokens grow: below the holder's all are lost; without a holder all that were seen.
            let below = held.get(&key).copied().unwrap_or(token + 1);
            let lost = self.lost.entry(key).or_default();
            if below > lost.below {
                *lost = Lost { at_ms: came_ms, below };
            }
        }
    }
}

/// See the module. Ends with the last handle.
#[derive(Debug)]
pub struct ProcessWatch {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
}

impl Drop for ProcessWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl ProcessWatch {
    /// Watches backends that have `mark`, a variable and its value, in their environment: those of one cluster.
    pub fn start(mark: (String, String)) -> Arc<Self> {
        let watch = Arc::new(Self { seen: Arc::default(), stop: Arc::default() });
        let (seen, stop) = (Arc::clone(&watch.seen), Arc::clone(&watch.stop));
        spawn(move || {
            let mark = format!("{}={}", mark.0, mark.1).into_bytes();
            let others = pids();
            let mut looks = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let skip = if looks.is_multiple_of(ALL_AFTER_LOOKS) { None } else { Some(&others) };
                look(&seen, &mark, skip);
                looks += 1;
                sleep(EVERY);
            }
        });
        watch
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is wrong so far.
    pub fn problems(&self) -> Vec<String> {
        self.seen().problems.clone()
    }

    /// How often the table was looked at.
    pub fn looks(&self) -> u64 {
        self.seen().looks
    }

    /// The longest time between the beginnings of two looks, in milliseconds.
    pub fn longest_pause_ms(&self) -> u64 {
        self.seen().longest_pause_ms
    }

    /// By backend id.
    pub fn lives(&self) -> BTreeMap<String, Life> {
        self.seen().lives.clone()
    }

    /// One of them.
    pub fn life(&self, backend: &str) -> Option<Life> {
        self.seen().lives.get(backend).cloned()
    }

    /// Waits until a look that began after now has found nothing of a backend, and gives the last moment at which one had.
    pub async fn gone(&self, backend: &str, patience: Duration) -> u64 {
        let from_ms = boot_ms();
        crate::harness::wait_until(&format!("nothing of {backend} is left"), patience, async || {
            let seen = self.seen();
            let life = seen.lives.get(backend).cloned();
            match life {
                Some(life) if seen.last_look_ms <= from_ms.max(life.last_ms) => Err(Some(life)),
                Some(life) => Ok(life.last_ms),
                None => Err(None),
            }
        })
        .await
    }

    /// See [`Seen::holders`].
    pub(crate) fn holders(&self, asked_ms: u64, came_ms: u64, held: BTreeMap<String, u64>) {
        self.seen().holders(asked_ms, came_ms, &held);
    }
}

fn pids() -> BTreeSet<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return BTreeSet::new() };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Whose a process is, if it lives and has the mark.
fn owner(pid: u32, mark: &[u8]) -> Option<Owner> {
    let environ = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut marked = false;
    let (mut key, mut token, mut backend) = (None, None, None);
    for variable in environ.split(|byte| *byte == 0) {
        marked |= variable == mark;
        let Ok(text) = std::str::from_utf8(variable) else { continue };
        match text.split_once('=') {
            Some(("SESSION_BACKEND_KEY", value)) => key = Some(value.to_owned()),
            Some(("SESSION_BACKEND_FENCING_TOKEN", value)) => token = value.parse().ok(),
            Some(("SESSION_BACKEND_ID", value)) => backend = Some(value.to_owned()),
            _ => {}
        }
    }
    if marked { Some(Owner { key: key?, token: token?, backend: backend? }) } else { None }
}

fn look(seen: &Mutex<Seen>, mark: &[u8], skip: Option<&BTreeSet<u32>>) {
    let begin_ms = boot_ms();
    let mut found: BTreeMap<Owner, Vec<u32>> = BTreeMap::new();
    for pid in pids().into_iter().filter(|pid| skip.is_none_or(|skip| !skip.contains(pid))) {
        if let Some(owner) = owner(pid, mark) {
            found.entry(owner).or_default().push(pid);
        }
    }
    let end_ms = boot_ms();
    let mut problems = Vec::new();
    let mut by_key: BTreeMap<&str, Vec<&Owner>> = BTreeMap::new();
    found.keys().for_each(|of| by_key.entry(&of.key).or_default().push(of));
    for (key, owners) in by_key.into_iter().filter(|(_, owners)| owners.len() > 1) {
        // One may have ended before the other's process was read. Those that are still there after all of them were
        // read the first time were there together.
        let still: Vec<_> = owners
            .into_iter()
            .filter(|of| found[*of].iter().any(|pid| owner(*pid, mark).as_ref() == Some(*of)))
            .collect();
        if still.len() > 1 {
            problems.push(format!("two backends of {key} at {end_ms}: {still:?}"));
        }
    }
    let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
    seen.found(begin_ms, end_ms, &found);
    problems.into_iter().for_each(|problem| seen.problem(problem));
}

/// The processes of a backend, wherever they hang.
pub fn processes_of(backend: &str) -> Vec<u32> {
    let variable = format!("SESSION_BACKEND_ID={backend}").into_bytes();
    let is_of = |pid: &u32| {
        let environ = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environ.split(|byte| *byte == 0).any(|have| have == variable)
    };
    pids().into_iter().filter(is_of).collect()
}

/// The guard above a backend: the parent of the first of its processes that is a guard.
pub fn guard_of(backend: &str) -> Option<u32> {
    processes_of(backend).into_iter().find_map(|pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()?;
        let command = std::fs::read(format!("/proc/{parent}/cmdline")).ok()?;
        let mut words = command.split(|byte| *byte == 0).skip(1);
        words.next().filter(|word| *word == b"guard").map(|_| parent)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    struct Killed(Child);

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = (self.0.kill(), self.0.wait());
        }
    }

    /// A process that looks like one of a backend's.
    fn fake(mark: &str, key: &str, token: u64) -> Killed {
        let child = Command::new("sleep")
            .arg("60")
            .env("MARK", mark)
            .env("SESSION_BACKEND_KEY", key)
            .env("SESSION_BACKEND_FENCING_TOKEN", token.to_string())
            .env("SESSION_BACKEND_ID", format!("ba-{key}-{token}"))
            .spawn();
        Killed(child.unwrap())
    }

    fn wait_for(what: &str, is: impl Fn() -> bool) {
        for _ in 0..1_000 {
            if is() {
                return;
            }
            sleep(Duration::from_millis(10));
        }
        panic!("{what}");
    }

    #[test]
    fn two_backends_of_a_key_are_seen_and_of_two_keys_or_two_marks_not() {
        let mark = format!("two-{}", std::process::id());
        let watch = ProcessWatch::start(("MARK".into(), mark.clone()));
        let _a = fake(&mark, "a", 1);
        let _b = fake(&mark, "b", 2);
        let _other = fake(&format!("{mark}-other"), "a", 3);
        wait_for("both are seen", || watch.lives().len() == 2);
        assert_eq!(watch.problems(), Vec::<String>::new());
        let _a_too = fake(&mark, "a", 4);
        wait_for("the overlap is seen", || watch.problems().iter().any(|p| p.contains("two backends of a")));
    }

    #[test]
    fn one_that_outlives_its_key_is_seen() {
        let mark = format!("late-{}", std::process::id());
        let watch = ProcessWatch::start(("MARK".into(), mark.clone()));
        let held =
            |keys: &[(&str, u64)]| keys.iter().map(|(key, token)| ((*key).to_owned(), *token)).collect();
        let a = fake(&mark, "a", 5);
        // Not seen yet, or asked before it was seen: proves nothing.
        watch.holders(0, boot_ms(), held(&[]));
        wait_for("it is seen", || watch.life("ba-a-5").is_some());
        let first_ms = watch.life("ba-a-5").unwrap().first_ms;
        watch.holders(first_ms, boot_ms(), held(&[]));
        watch.holders(first_ms + 1, boot_ms(), held(&[("a", 5)]));
        let looks = watch.looks();
        wait_for("it is looked at again", || watch.looks() > looks + 3);
        assert_eq!(watch.problems(), Vec::<String>::new());
        watch.holders(first_ms + 1, boot_ms(), held(&[("a", 6)]));
        wait_for("it is late", || watch.problems().iter().any(|p| p.contains("not its own")));
        drop(a);
    }

    #[test]
    fn one_that_ended_in_time_is_no_problem() {
        let mark = format!("fine-{}", std::process::id());
        let watch = ProcessWatch::start(("MARK".into(), mark.clone()));
        let a = fake(&mark, "a", 5);
        wait_for("it is seen", || watch.life("ba-a-5").is_some());
        drop(a);
        watch.holders(boot_ms(), boot_ms(), BTreeMap::new());
        let _next = fake(&mark, "a", 6);
        wait_for("the next is seen", || watch.life("ba-a-6").is_some());
        assert_eq!(watch.problems(), Vec::<String>::new());
    }
}
