//! Power loss at hundreds of moments of a run with load: of every controller at once, of one of them, of some.
//!
//! One run is journaled (see `holdfast_tests::power`); then the journal is cut at random places, each node's disk is rebuilt
//! as a power loss there leaves it, and opened with the checks of a start. From some of the cuts the real cluster is started.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use futures::future::join_all;
use holdfast_tests::harness::{Cluster, LONG, target_tmp, wait_until};
use holdfast_tests::power::{Disk, Journal, Loss, Op, Shim, clean_tmpfs_dir};
use holdfast_tests::sim_drone::{AutoDrone, Identity};
use holdfast_wire::http::{ConnectResponse, KeyPage};
use nix::sys::signal::Signal;
use raft_store::inspect::{self, Inspected};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reqwest::Method;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

const NODES: usize = 3;
/// Renewed often, expired never within a test.
const LEASE: &str = "renew=1s,soft=40s,hard=50s,expiry=60s";
/// Clients that connect to new keys.
const CLIENTS: usize = 8;
/// Keys acquired in each part of the run.
const KEYS_PER_PART: usize = 120;

/// How much is done: little under `make test`, much under `make soak`.
struct Size {
    parts: usize,
    cuts: usize,
    starts: usize,
}

fn node_dir(dir: &Path, index: usize) -> PathBuf {
    dir.join(format!("node-{}", index + 1))
}

/// Runs a cluster under load with changes of leaders and a restart, writing everything to `journal`.
async fn run(dir: &Path, journal: &Path, size: &Size) -> Cluster {
    let mut builder = Cluster::builder().drones(0).lease(LEASE).controller_flag("--snapshot-every", "150");
    for index in 0..NODES {
        let data = node_dir(dir, index);
        fs::create_dir_all(&data).unwrap();
        let shim = Shim::new(&data, &dir.join("control"));
        let env = shim.journal(journal, u8::try_from(index + 1).unwrap()).env();
        builder = builder.controller_disk(index, &data, env);
    }
    let mut cluster = builder.start().await;
    let drones: Vec<_> = (0..2)
        .map(|n| AutoDrone::start(cluster.urls(), Identity::new(&cluster.name, &format!("dr-{n}"), "one")))
        .collect();
    let connected = || drones.iter().all(|drone| drone.stats.connected.load(Ordering::Relaxed));
    wait_until("the drones are connected", LONG, async || connected().then_some(()).ok_or("not yet")).await;

    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let marks = Arc::new(Journal::append_to(journal));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let (http, urls, backend) = (cluster.http.clone(), cluster.urls(), cluster.backend());
            let (stop, acknowledged, marks) = (stop.clone(), acknowledged.clone(), marks.clone());
            tokio::spawn(async move {
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let key = format!("key-{client}-{n}");
                    let body = serde_json::to_vec(&backend.request(&key)).unwrap();
                    let url = format!("{}/ctrl/connect", urls[(client + n) % urls.len()]);
                    // Refused or without an answer: nothing was acknowledged, and the next key is tried.
                    if let Ok(answer) = http.send(Method::POST, &url, &[], Some(body)).await
                        && answer.status.is_success()
                    {
                        let answer: ConnectResponse = answer.read();
                        assert!(answer.spawned);
                        Journal::mark(&marks, &format!("{key} {}", answer.fencing_token));
                        acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    for part in 0..size.parts {
        let goal = acknowledged.load(Ordering::Relaxed) + KEYS_PER_PART;
        wait_until("keys are acquired", LONG, async || {
            let now = acknowledged.load(Ordering::Relaxed);
            if now >= goal { Ok(()) } else { Err(now) }
        })
        .await;
        let leader = cluster.leader().await;
        match part % 4 {
            0 => {
                let url = format!("{}/ctrl/cluster/transfer-leader", cluster.url(leader));
                // It may have lost leadership by itself meanwhile.
                let _ = cluster.http.send(Method::POST, &url, &[], None).await;
            }
            1 => {
                let follower = (leader + 1) % NODES;
                cluster.controllers[follower].signal(Signal::SIGTERM);
                assert!(cluster.controllers[follower].wait(LONG).await.success());
                cluster.restart_controller(follower);
                cluster.wait_controller(follower).await;
            }
            2 => {
                cluster.controllers[leader].signal(Signal::SIGSTOP);
                cluster.leader_other_than(leader).await;
                cluster.controllers[leader].signal(Signal::SIGCONT);
                cluster.wait_controller(leader).await;
            }
            _ => {}
        }
    }
    stop.store(true, Ordering::Relaxed);
    join_all(clients).await.into_iter().for_each(|client| client.unwrap());
    drop(drones);
    // Told to stop, not killed: a killed process may have done something that it had no time to write down.
    for controller in &mut cluster.controllers {
        controller.signal(Signal::SIGTERM);
    }
    for controller in &mut cluster.controllers {
        assert!(controller.wait(LONG).await.success(), "{}", controller.log());
    }
    cluster
}

fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(next) = todo.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                todo.push(entry.path());
            } else if !entry.file_name().to_string_lossy().starts_with("LOG") {
                let name = entry.path().strip_prefix(dir).unwrap().to_owned();
                found.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    found
}

/// The journal holds all that was done: replayed without loss it gives what is on the real disks. (RocksDB's LOG is written
/// by stdio, which the shim does not see, and read back by nobody.)
fn assert_complete(journal: &Journal, dir: &Path) {
    let mut disks = disks(journal);
    journal.records.iter().for_each(|record| take(&mut disks, record));
    for (index, disk) in disks.iter().enumerate() {
        let rebuilt = clean_tmpfs_dir("holdfast-rebuilt-");
        disk.rebuild(rebuilt.path(), Loss::Nothing, &mut StdRng::seed_from_u64(0));
        let (real, ours) = (files(&node_dir(dir, index)), files(rebuilt.path()));
        let names = |files: &BTreeMap<PathBuf, Vec<u8>>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&ours), names(&real), "node {}", index + 1);
        for (name, content) in &real {
            assert!(ours[name] == *content, "node {}: {} differs", index + 1, name.display());
        }
    }
}

fn disks(journal: &Journal) -> Vec<Disk> {
    (0..NODES).map(|_| Disk::new(journal.bytes.clone())).collect()
}

fn take(disks: &mut [Disk], record: &holdfast_tests::power::Record) {
    if record.node > 0 {
        disks[usize::from(record.node) - 1].take(record);
    }
}

/// An acknowledged acquisition.
#[derive(Debug, Clone)]
struct Acknowledged {
    key: String,
    token: u64,
}

/// What the clients were told before each record.
fn acknowledged(journal: &Journal) -> Vec<(usize, Acknowledged)> {
    let marks = journal.records.iter().enumerate().filter_map(|(at, record)| match &record.op {
        Op::Mark(text) => Some((at, text)),
        _ => None,
    });
    marks
        .map(|(at, text)| {
            let (key, token) = text.split_once(' ').unwrap();
            (at, Acknowledged { key: key.to_owned(), token: token.parse().unwrap() })
        })
        .collect()
}

/// Whether a replica has what was acknowledged, and the term of its entry if it is in the log.
fn holds(replica: &Inspected, wanted: &Acknowledged) -> (bool, u64) {
    let in_log = replica.acquisition(wanted.token).unwrap().filter(|(_, key)| key.name == wanted.key);
    let in_state = || {
        let key = replica.view().key("", &wanted.key).unwrap();
        key.is_some_and(|key| key.token == wanted.token)
    };
    (in_log.is_some() || in_state(), in_log.map_or(0, |(term, _)| term))
}

/// Opens every node's directory below `dir` and checks that nothing acknowledged is lost.
fn check(dir: &Path, acknowledged: &[Acknowledged], what: &str) {
    let replicas: Vec<Inspected> = (0..NODES)
        .map(|index| {
            inspect::open(&node_dir(dir, index))
                .unwrap_or_else(|error| panic!("{what}: node {}: {error}", index + 1))
        })
        .collect();
    let ends: Vec<_> = replicas.iter().map(|replica| replica.ends().unwrap()).collect();
    for wanted in acknowledged {
        let found: Vec<_> = replicas.iter().map(|replica| holds(replica, wanted)).collect();
        let count = found.iter().filter(|(held, _)| *held).count();
        assert!(count * 2 > NODES, "{what}: {wanted:?} is on {found:?}, not on a quorum; {ends:?}");
        // Who acknowledged an entry of a term had voted in it, or followed its leader: that is not forgotten either.
        let term = found.iter().map(|(_, term)| *term).max().unwrap();
        let voted = ends.iter().filter(|ends| ends.vote_term >= term).count();
        assert!(voted * 2 > NODES, "{what}: the votes of term {term} are lost: {ends:?}");
    }
}

/// Starts the real controllers from the directories below `dir`.
async fn start_and_check(cluster: &mut Cluster, dir: &Path, acknowledged: &[Acknowledged], what: &str) {
    for index in 0..NODES {
        cluster.controllers[index].set_flag("--data-dir", &node_dir(dir, index).display().to_string());
        cluster.controllers[index].clear_env();
        cluster.restart_controller(index);
    }
    // The power may have failed while the cluster was formed. Then the operator repeats that; else it is refused.
    cluster.form_again(LEASE).await;
    for index in 0..NODES {
        cluster.wait_controller(index).await;
    }
    let mut held = BTreeMap::new();
    let mut cursor = String::new();
    loop {
        let url = format!("{}/ctrl/keys?limit=1000{cursor}", cluster.url(0));
        let page: KeyPage = cluster.http.get(&url).await.ok();
        held.extend(page.keys.into_iter().map(|key| (key.name.clone(), key.token)));
        let Some(next) = page.next_cursor else { break };
        cursor = format!("&cursor={next}");
    }
    for wanted in acknowledged {
        assert_eq!(held.get(&wanted.key), Some(&wanted.token), "{what}: {wanted:?}");
    }
    let identity = Identity::new(&cluster.name, "dr-0", "two");
    let _drone = AutoDrone::start(cluster.urls(), identity);
    let new = wait_until("a new key is acquired", LONG, async || {
        let answer = cluster.http.connect(&cluster.url(1), &cluster.backend().request("new")).await;
        if answer.status.is_success() { Ok(answer.read::<ConnectResponse>()) } else { Err(answer) }
    })
    .await;
    let newest = acknowledged.iter().map(|held| held.token).max().unwrap_or(0);
    assert!(new.fencing_token > newest, "{what}: {new:?}");
    cluster.controllers.iter_mut().for_each(|controller| controller.kill9());
}

async fn power_loss(size: Size, seed: u64) {
    let dir = tempfile::Builder::new().prefix("power-").tempdir_in(target_tmp()).unwrap();
    let path = dir.path().canonicalize().unwrap();
    let in_memory = clean_tmpfs_dir("holdfast-journal-");
    let journal_path = in_memory.path().join("journal");
    let mut cluster = run(&path, &journal_path, &size).await;
    let journal = Journal::read(&journal_path);
    assert_complete(&journal, &path);
    let told = acknowledged(&journal);
    assert!(told.len() >= size.parts * KEYS_PER_PART);

    let mut rng = StdRng::seed_from_u64(seed);
    let mut cuts: Vec<usize> = (0..size.cuts).map(|_| rng.random_range(0..=journal.records.len())).collect();
    // Before the first acknowledgement the cluster is formed.
    let forming = told.first().map_or(journal.records.len(), |(at, _)| *at);
    cuts.extend((0..size.cuts / 10).map(|_| rng.random_range(0..=forming)));
    cuts.sort_unstable();
    let early: Vec<usize> = (1..=size.starts).map(|n| forming * n / (size.starts + 1)).collect();
    let early: Vec<usize> = early.iter().map(|at| cuts.partition_point(|cut| cut < at)).collect();
    let start_every = size.cuts / size.starts;
    let mut disks = disks(&journal);
    let mut done = 0;
    let mut to_start = Vec::new();
    let all: Vec<Acknowledged> = told.iter().map(|(_, told)| told.clone()).collect();
    std::thread::scope(|scope| {
        let (todo, work) = mpsc::sync_channel::<(tempfile::TempDir, usize, String)>(4);
        let work = Arc::new(std::sync::Mutex::new(work));
        let checkers: Vec<_> = (0..2)
            .map(|_| {
                let (work, all) = (work.clone(), &all);
                scope.spawn(move || {
                    loop {
                        let next = work.lock().unwrap().recv();
                        let Ok((dir, told, what)) = next else { return };
                        check(dir.path(), &all[..told], &what);
                    }
                })
            })
            .collect();
        // So that sending fails, rather than waits, once no checker is left.
        drop(work);
        for (number, cut) in cuts.iter().enumerate() {
            journal.records[done..*cut].iter().for_each(|record| take(&mut disks, record));
            done = *cut;
            let told_before = told.partition_point(|(at, _)| at < cut);
            // Everybody, or one of them, or any of them.
            let loses = |index: usize, which: usize, mask: u8| match which {
                0 => true,
                1 => index == usize::from(mask) % NODES,
                _ => mask & (1 << index) != 0,
            };
            let (which, mask) = (rng.random_range(0..3), rng.random());
            let what = format!(
                "seed {seed}, cut {number} at {cut} of {}, loss {which}/{mask}",
                journal.records.len()
            );
            let rebuilt = clean_tmpfs_dir("holdfast-cut-");
            for (index, disk) in disks.iter().enumerate() {
                let loss = if loses(index, which, mask) { Loss::Mixed } else { Loss::Nothing };
                disk.rebuild(&node_dir(rebuilt.path(), index), loss, &mut rng);
            }
            if number % start_every == start_every / 2 || early.contains(&number) {
                // Again, since the check changes what it opens.
                let kept = clean_tmpfs_dir("holdfast-start-");
                for index in 0..NODES {
                    copy_dir(&node_dir(rebuilt.path(), index), &node_dir(kept.path(), index));
                }
                to_start.push((kept, told_before, what.clone()));
            }
            if todo.send((rebuilt, told_before, what)).is_err() {
                break;
            }
        }
        drop(todo);
        checkers.into_iter().for_each(|checker| {
            if let Err(panic) = checker.join() {
                std::panic::resume_unwind(panic);
            }
        });
    });
    for (dir, told, what) in to_start {
        start_and_check(&mut cluster, dir.path(), &all[..told], &what).await;
    }
    println!("{} records, {} acknowledged, {} cuts", journal.records.len(), all.len(), cuts.len());
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_when_the_power_fails_at_any_of_three_hundred_moments() {
    power_loss(Size { parts: 4, cuts: 300, starts: 3 }, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "minutes long: make soak"]
async fn nothing_acknowledged_is_lost_when_the_power_fails_at_any_of_thousands_of_moments() {
    let seed = std::env::var("HOLDFAST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| rand::rng().random());
    println!("HOLDFAST_SEED={seed}");
    power_loss(Size { parts: 16, cuts: 3_000, starts: 100 }, seed).await;
}
