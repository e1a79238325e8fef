//! A task that watches a backend and panics: the backend ends, and is not renewed forever.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{alive, populated, soon};
use futures::future::BoxFuture;
use holdfast_drone::adopt::Link;
use holdfast_drone::backend_state::{Desired, Observation};
use holdfast_drone::clock::DroneClock;
use holdfast_drone::data_dir::DataDir;
use holdfast_drone::runtime::process::ProcessRuntime;
use holdfast_drone::runtime::supervised::Supervised;
use holdfast_drone::runtime::{BackendSpec, Runtime};
use holdfast_wire::KeyConfig;
use holdfast_wire::http::{Executable, ProcessExecutable};
use std::sync::Arc;
use tokio::sync::{Notify, mpsc, watch};

/// Runs real processes under real guards, and panics when it is told to.
struct Panicking {
    inner: ProcessRuntime,
    now: Arc<Notify>,
}

impl Runtime for Panicking {
    fn run(
        &self,
        spec: BackendSpec,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        let (run, now) = (self.inner.run(spec, want, facts), Arc::clone(&self.now));
        Box::pin(async move {
            tokio::select! {
                () = run => {}
                () = now.notified() => panic!("as the test wants it"),
            }
        })
    }

    fn adopt(
        &self,
        id: String,
        link: Link,
        want: watch::Receiver<Desired>,
        facts: mpsc::Sender<Observation>,
    ) -> BoxFuture<'static, ()> {
        self.inner.adopt(id, link, want, facts)
    }

    fn end_left(&self, id: String) -> BoxFuture<'static, ()> {
        self.inner.end_left(id)
    }
}

#[tokio::test]
async fn a_backend_whose_watcher_panics_is_ended_and_reported() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = DataDir::open(dir.path()).unwrap();
    let clock = DroneClock::start();
    let inner = ProcessRuntime::new(clock, data_dir.backends())
        .unwrap()
        .with_guard_program(env!("CARGO_BIN_EXE_holdfast-drone").into());
    let now = Arc::new(Notify::new());
    let runtime = Supervised::new(Arc::new(Panicking { inner, now: Arc::clone(&now) }));
    let lease = common::lease(30_000, 40_000, 50_000);
    let deadlines = lease.deadlines(clock.now_ms());
    let first = Desired {
        deadlines,
        end: None,
        kill_at: deadlines.hard_terminate_at,
        expiry_ms: lease.expiry_ms,
        ready: false,
        deliveries: 0,
        kill_ms: lease.kill_ms(),
    };
    let (_want, wants) = watch::channel(first);
    let (sender, mut facts) = mpsc::channel(16);
    let backend = "ba-unwatched";
    let command = ["sh", "-c", "trap '' TERM; setsid sleep 300 & while :; do sleep 300; done"];
    let spec = BackendSpec {
        id: backend.to_owned(),
        executable: Executable::Process(ProcessExecutable {
            command: command.map(str::to_owned).into(),
            env: std::collections::BTreeMap::new(),
            cwd: None,
        }),
        key: KeyConfig::default(),
        token: 1,
        static_token: None,
        address: "127.0.0.1:20001".parse().unwrap(),
    };
    let task = tokio::spawn(runtime.run(spec, wants, sender));
    while soon("it starts", facts.recv()).await.unwrap() != Observation::Started {}
    populated(backend, 2).await;
    now.notify_one();
    assert_eq!(soon("its end", facts.recv()).await, Some(Observation::Failed));
    assert_eq!(soon("its end", facts.recv()).await, Some(Observation::Gone));
    assert_eq!(alive(backend), 0);
    soon("the task ends", task).await.unwrap();
}
