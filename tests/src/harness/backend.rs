//! The backend that tests run, and the journal that its instances write.

use super::process::binary;
use super::wait::wait_until;
use holdfast_wire::KeyConfig;
use holdfast_wire::http::{ConnectRequest, SpawnConfig};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How to start `test-backend`. Each instance writes to the journal and holds the lock of its key while it lives.
#[derive(Debug, Clone)]
pub struct TestBackend {
    env: BTreeMap<String, String>,
    cluster: Option<String>,
    pool: String,
    id: Option<String>,
}

impl TestBackend {
    pub(super) fn new(dir: &Path) -> Self {
        let path = |name: &str| dir.join(name).display().to_string();
        let env = [("JOURNAL", path("journal")), ("LOCKDIR", path("locks"))];
        let env = env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self { env, cluster: None, pool: String::new(), id: None }
    }

    /// An environment variable, as a user would set it.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    /// It ignores SIGTERM.
    #[must_use]
    pub fn ignoring_sigterm(self) -> Self {
        self.env("IGNORE_TERM", "1")
    }

    /// It listens only after this long.
    #[must_use]
    pub fn start_delay_ms(self, ms: u64) -> Self {
        self.env("START_DELAY_MS", &ms.to_string())
    }

    /// After SIGTERM it goes on for this long.
    #[must_use]
    pub fn term_delay_ms(self, ms: u64) -> Self {
        self.env("TERM_DELAY_MS", &ms.to_string())
    }

    /// It ends by itself after this long.
    #[must_use]
    pub fn exit_after_ms(self, ms: u64) -> Self {
        self.env("EXIT_AFTER_MS", &ms.to_string())
    }

    /// In a pool of drones.
    #[must_use]
    pub fn pool(mut self, pool: &str) -> Self {
        self.pool = pool.to_owned();
        self
    }

    /// Under this backend id.
    #[must_use]
    pub fn id(mut self, id: &str) -> Self {
        self.id = Some(id.to_owned());
        self
    }

    /// In this cluster rather than the controllers' default.
    #[must_use]
    pub fn cluster(mut self, cluster: &str) -> Self {
        self.cluster = Some(cluster.to_owned());
        self
    }

    /// The `spawn_config`; `lock` names the file that the backend locks.
    pub fn spawn_config(&self, lock: &str) -> SpawnConfig {
        let mut env = self.env.clone();
        env.insert("LOCK_NAME".to_owned(), lock.to_owned());
        SpawnConfig {
            id: self.id.clone(),
            cluster: self.cluster.clone(),
            pool: self.pool.clone(),
            executable: json!({"command": [binary("test-backend")], "env": env}),
            lifetime_limit_seconds: None,
            max_idle_seconds: None,
            use_static_token: false,
            subdomain: None,
        }
    }

    /// A request for a key of the default namespace, without a tag.
    pub fn request(&self, key: &str) -> ConnectRequest {
        self.request_for(KeyConfig { name: key.to_owned(), ..KeyConfig::default() })
    }

    /// A request for a key.
    pub fn request_for(&self, key: KeyConfig) -> ConnectRequest {
        // Hexadecimal, since a key's name may hold anything. Namespace and name together are the key.
        let lock: String =
            format!("{}\u{1}{}", key.namespace, key.name).bytes().map(|b| format!("{b:02x}")).collect();
        ConnectRequest {
            spawn_config: Some(self.spawn_config(&lock)),
            key: Some(key),
            ..ConnectRequest::default()
        }
    }
}

/// What an instance wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It began, and got the lock of its key.
    Start,
    /// It got SIGTERM.
    Term,
    /// It ended by itself or after SIGTERM. One that is killed writes nothing.
    Stop,
    /// Another instance of its key was alive when it began.
    Overlap,
    /// It lives; written again and again by one that was told `ALIVE_EVERY_MS`.
    Alive,
}

/// A line of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: EventKind,
    /// `SESSION_BACKEND_KEY`.
    pub key: String,
    /// `SESSION_BACKEND_FENCING_TOKEN`.
    pub token: u64,
    /// `SESSION_BACKEND_ID`.
    pub backend: String,
    /// Random, of this instance alone. (Process numbers repeat: each backend has its own PID namespace.)
    pub instance: String,
    /// `CLOCK_BOOTTIME`, in milliseconds.
    pub boot_ms: u64,
    /// The file that the instance locks: of its key, namespace and name.
    pub lock: String,
}

/// The file to which all backends of a cluster write.
#[derive(Debug, Clone)]
pub struct Journal {
    path: PathBuf,
}

impl Journal {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Everything written so far, oldest first.
    pub fn events(&self) -> Vec<Event> {
        let Ok(text) = std::fs::read_to_string(&self.path) else { return Vec::new() };
        // A line that is just being written has no end yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| parse(line).unwrap_or_else(|| panic!("journal line {line:?}"))).collect()
    }

    /// What was written of one key (by name).
    pub fn of_key(&self, key: &str) -> Vec<Event> {
        self.events().into_iter().filter(|event| event.key == key).collect()
    }

    /// Which kinds of events there are of one key, in their order.
    pub fn kinds(&self, key: &str) -> Vec<EventKind> {
        self.of_key(key).into_iter().map(|event| event.kind).collect()
    }

    /// Waits for an event of a backend.
    pub async fn wait_for(&self, backend: &str, kind: EventKind, patience: Duration) -> Event {
        wait_until(&format!("{kind:?} of {backend}"), patience, async || {
            let events = self.events();
            events.iter().find(|e| e.backend == backend && e.kind == kind).cloned().ok_or(events)
        })
        .await
    }

    /// Invariant 1 of the design: no key ever had two live backends. And tokens grew from one to the next.
    pub fn assert_no_overlap(&self) {
        let events = self.events();
        let overlap = events.iter().find(|event| event.kind == EventKind::Overlap);
        assert!(overlap.is_none(), "two backends of a key at once: {overlap:?} in {events:#?}");
        let mut last: BTreeMap<&str, u64> = BTreeMap::new();
        for event in events.iter().filter(|event| event.kind == EventKind::Start) {
            if let Some(before) = last.insert(&event.key, event.token) {
                assert!(event.token > before, "token {} after {before} in {events:#?}", event.token);
            }
        }
        // The lines are in the order in which they happened: each was written under the file's lock, with its time read
        // under that lock. From the start of an instance on no other one of its key writes anything.
        let mut newest: BTreeMap<(&str, &str), &Event> = BTreeMap::new();
        for event in &events {
            let key = (event.lock.as_str(), event.key.as_str());
            if event.kind == EventKind::Start {
                newest.insert(key, event);
            }
            let start = newest.get(&key).copied();
            assert!(
                start.is_some_and(|start| start.instance == event.instance),
                "{event:?} was written after {start:?}"
            );
        }
        let backwards = events.windows(2).find(|pair| pair[1].boot_ms < pair[0].boot_ms);
        assert!(backwards.is_none(), "the record's clock went back: {backwards:?}");
    }
}

fn parse(line: &str) -> Option<Event> {
    let mut words = line.split('\t');
    let kind = match words.next()? {
        "start" => EventKind::Start,
        "term" => EventKind::Term,
        "stop" => EventKind::Stop,
        "OVERLAP" => EventKind::Overlap,
        "alive" => EventKind::Alive,
        _ => return None,
    };
    let key = words.next()?.to_owned();
    let token = words.next()?.parse().ok()?;
    let (backend, instance) = (words.next()?.to_owned(), words.next()?.to_owned());
    let boot_ms = words.next()?.parse().ok()?;
    Some(Event { kind, key, token, backend, instance, boot_ms, lock: words.next()?.to_owned() })
}
