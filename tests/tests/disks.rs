//! Slow, full and failing disks under real controllers.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, LONG, target_tmp, wait_until};
use holdfast_tests::power::Shim;
use holdfast_wire::http::ConnectResponse;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use reqwest::Method;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn work_dir(prefix: &str) -> TempDir {
    tempfile::Builder::new().prefix(prefix).tempdir_in(target_tmp().canonicalize().unwrap()).unwrap()
}

/// `/ctrl/ready` of a controller that is not: the reason.
async fn not_ready_reason(cluster: &Cluster, index: usize) -> Result<String, String> {
    let url = format!("{}/ctrl/ready", cluster.url(index));
    match cluster.http.send(Method::GET, &url, &[], None).await {
        Ok(answer) if answer.status.as_u16() == 503 => {
            let body = answer.json();
            assert_eq!(body["ready"], false, "{body}");
            Ok(body["reason"].as_str().unwrap().to_owned())
        }
        other => Err(format!("{other:?}")),
    }
}

async fn wait_not_ready(cluster: &Cluster, index: usize, word: &str) -> String {
    wait_until(&format!("controller {} is not ready: {word}", index + 1), LONG, async || {
        let seen = not_ready_reason(cluster, index).await;
        if seen.as_ref().is_ok_and(|reason| reason.contains(word)) { seen } else { Err(format!("{seen:?}")) }
    })
    .await
}

/// One metric of a controller.
async fn metric(cluster: &Cluster, index: usize, name: &str) -> String {
    let text = cluster.http.get(&format!("{}/metrics", cluster.url(index))).await.text;
    let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    line.unwrap_or_else(|| panic!("{name} in\n{text}")).rsplit(' ').next().unwrap().to_owned()
}

/// Waits for a metric; there may be nobody to ask for a moment.
async fn wait_metric(cluster: &Cluster, index: usize, name: &str, value: &str) {
    let url = format!("{}/metrics", cluster.url(index));
    wait_until(&format!("{name} is {value}"), LONG, async || {
        let answer = cluster.http.send(Method::GET, &url, &[], None).await.map_err(|e| e.to_string())?;
        let line = answer.text.lines().find(|line| line.split([' ', '{']).next() == Some(name));
        if line.is_some_and(|line| line.ends_with(&format!(" {value}"))) { Ok(()) } else { Err(answer.text) }
    })
    .await;
}

async fn hold(cluster: &Cluster, count: usize) -> BTreeMap<String, ConnectResponse> {
    let mut held = BTreeMap::new();
    for n in 0..count {
        let key = format!("held-{n}");
        held.insert(key.clone(), cluster.connect_ready(&key).await);
    }
    held
}

async fn assert_held(cluster: &Cluster, held: &BTreeMap<String, ConnectResponse>) {
    for (name, answer) in held {
        let key = cluster.key(name).await.unwrap_or_else(|| panic!("{name} is free"));
        assert_eq!((&key.backend, key.token), (&answer.backend_id, answer.fencing_token), "{name}");
    }
    cluster.journal.assert_no_overlap();
}

/// The disk of the leader takes longer for a sync than a lease lasts. It must hand over, must not expire or extend anything,
/// and must not be missed: keys are acquired and renewed all the time (etcd issues 15247 and 12528).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_stuck_hands_over_and_comes_back_as_a_follower() {
    let dir = work_dir("slow-");
    let mut builder = Cluster::builder().lease("renew=1s,soft=5s,hard=6s,expiry=8s");
    let mut shims = Vec::new();
    for index in 0..3 {
        let data = dir.path().join(format!("node-{index}"));
        fs::create_dir_all(&data).unwrap();
        let shim = Shim::new(&data, &dir.path().join(format!("control-{index}")));
        builder = builder.controller_disk(index, &data, shim.env());
        shims.push(shim);
    }
    let cluster = builder.start().await;
    let held = hold(&cluster, 3).await;
    let old = cluster.leader().await;
    let term: u64 = metric(&cluster, old, "holdfast_term").await.parse().unwrap();

    // Somebody wants new keys all the time.
    let (stop, acquired) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let worker = {
        let (client, backend) = (cluster.client(), cluster.backend());
        let (stop, acquired) = (stop.clone(), acquired.clone());
        tokio::spawn(async move {
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let answer = client.connect(&backend.request(&format!("new-{n}"))).await;
                answer.unwrap_or_else(|e| panic!("new-{n}: {e}"));
                acquired.fetch_add(1, Ordering::Relaxed);
                // Not faster than the drone can start them.
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        })
    };
    let began = Instant::now();
    shims[old].delay_syncs_ms(3_600_000);
    let new = cluster.leader_other_than(old).await;
    println!("another leader {:?} after the disk got stuck", began.elapsed());
    let reason = wait_not_ready(&cluster, old, "stuck").await;
    assert!(reason.contains("the log"), "{reason}");
    assert_eq!(metric(&cluster, old, "holdfast_disk_stuck").await, "1");
    assert!(metric(&cluster, old, "holdfast_log_sync_under_way_ms").await.parse::<u64>().unwrap() >= 2_000);
    let later: u64 = metric(&cluster, new, "holdfast_term").await.parse().unwrap();
    assert_eq!(later, term + 1, "one hand-over, no other election");

    // Longer than a lease: whoever were to expire by the stuck leader's clock, or to count on its renewals, would be gone.
    let from = cluster.info().await.cluster_time;
    wait_until("a lease and more has passed, and keys are acquired", LONG, async || {
        let now = cluster.http.get(&format!("{}/ctrl/cluster", cluster.url(new))).await.json();
        let past = now["cluster_time"].as_u64().unwrap().saturating_sub(from);
        if past >= 9_000 { Ok(()) } else { Err(past) }
    })
    .await;
    assert_held(&cluster, &held).await;
    assert!(acquired.load(Ordering::Relaxed) >= 10, "acquisitions went on");
    // What the stuck one is asked it passes on, or says that it can't: never an answer of its own.
    let request = cluster.backend().request("held-0");
    let answer = cluster.http.connect(&cluster.url(old), &request).await;
    if answer.status.is_success() {
        assert_eq!(answer.read::<ConnectResponse>().fencing_token, held["held-0"].fencing_token);
    }

    shims[old].heal();
    cluster.wait_controller(old).await;
    assert_eq!(metric(&cluster, old, "holdfast_is_leader").await, "0");
    stop.store(true, Ordering::Relaxed);
    worker.await.unwrap();
    assert_held(&cluster, &held).await;
}

/// A file system in memory of its own, gone when this is dropped.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// `None`, with a word why, where nothing can be mounted.
    fn mount(path: &Path, mib: usize) -> Option<Self> {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={mib}m");
        match mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())) {
            Ok(()) => Some(Self { path: path.to_owned() }),
            Err(error) => {
                eprintln!("SKIPPED: a tmpfs can't be mounted here ({error}); this test needs root");
                None
            }
        }
    }

    /// Leaves `free` bytes.
    fn fill(&self, free: u64) {
        let now = raft_store::disk::free_bytes(&self.path).unwrap();
        let mut ballast = File::options().create(true).append(true).open(self.path.join("ballast")).unwrap();
        let mut left = now.saturating_sub(free);
        let chunk = vec![7; 64 << 10];
        while left > 0 {
            let len = usize::try_from(left).unwrap().min(chunk.len());
            match ballast.write(&chunk[..len]) {
                Ok(written) => left -= written as u64,
                // Somebody else took the rest: as full as can be.
                Err(_) => return,
            }
        }
    }

    fn empty(&self) {
        fs::remove_file(self.path.join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // What still uses it is killed by the cluster's end; the kernel frees it then.
        let _ = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_costs_its_node_the_lead_and_later_its_service_and_nothing_else() {
    let dir = work_dir("full-");
    // Too small for RocksDB's preallocation, so that every write asks for space.
    let Some(disk) = SmallDisk::mount(&dir.path().join("small"), 32) else { return };
    let mut builder = Cluster::builder().controller_flag("--disk-reserve", "6MiB");
    builder = builder.controller_disk(0, &disk.path.join("data"), Vec::new());
    let mut cluster = builder.start().await;
    let mut held = hold(&cluster, 2).await;
    // The one with the small disk is to lead.
    while cluster.leader().await != 0 {
        let leader = cluster.leader().await;
        let url = format!("{}/ctrl/cluster/transfer-leader", cluster.url(leader));
        cluster.http.send(Method::POST, &url, &[], None).await.unwrap();
        cluster.leader_other_than(leader).await;
    }
    assert_eq!(metric(&cluster, 0, "holdfast_disk_full").await, "0");

    // Less than the reserve: it hands over, says so, and follows.
    disk.fill(3 << 20);
    let new = cluster.leader_other_than(0).await;
    let reason = wait_not_ready(&cluster, 0, "the disk is full").await;
    assert!(reason.contains("6291456"), "{reason}");
    assert_eq!(metric(&cluster, 0, "holdfast_disk_full").await, "1");
    assert!(cluster.controllers[0].log().contains("the disk is full"), "{}", cluster.controllers[0].log());
    held.insert("meanwhile".into(), cluster.connect_ready("meanwhile").await);
    let url = format!("{}/ctrl/cluster/transfer-leader", cluster.url(new));
    cluster.http.send(Method::POST, &url, &[], None).await.unwrap();
    assert_ne!(cluster.leader_other_than(new).await, new);
    wait_until("a fit one leads", LONG, async || {
        let leader = cluster.leader().await;
        if leader == 0 { Err(leader) } else { Ok(()) }
    })
    .await;
    disk.empty();
    cluster.wait_controller(0).await;
    assert_eq!(metric(&cluster, 0, "holdfast_disk_full").await, "0");

    // Nothing at all is left: a write fails, the node says why it does not serve, and starts afresh when there is space.
    let pid = cluster.controllers[0].pid();
    let mut n = 0;
    let reason = wait_until("a write has failed", LONG, async || {
        // Again and again: RocksDB gives back what it had preallocated.
        disk.fill(0);
        let key = format!("full-{n}");
        n += 1;
        held.insert(key.clone(), cluster.client().connect(&cluster.backend().request(&key)).await.unwrap());
        let seen = not_ready_reason(&cluster, 0).await;
        if seen.as_ref().is_ok_and(|reason| reason.contains("No space left")) {
            seen
        } else {
            Err(format!("{seen:?}"))
        }
    })
    .await;
    println!("not ready: {reason}");
    wait_metric(&cluster, 0, "holdfast_failed", "1").await;
    wait_metric(&cluster, 0, "holdfast_disk_full", "1").await;
    held.insert("without-it".into(), cluster.connect_ready("without-it").await);
    disk.empty();
    cluster.wait_controller(0).await;
    assert_eq!(cluster.controllers[0].pid(), pid, "the same process, started afresh");
    assert!(cluster.controllers[0].ended().is_none());
    assert_held(&cluster, &held).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_stops_the_node_for_good_and_nothing_acknowledged_is_lost() {
    let dir = work_dir("failing-");
    let data = dir.path().join("node");
    fs::create_dir_all(&data).unwrap();
    let shim = Shim::new(&data, &dir.path().join("control"));
    let mut cluster = Cluster::builder().controller_disk(0, &data, shim.env()).start().await;
    let held = hold(&cluster, 2).await;
    shim.fail_syncs(nix::libc::EIO);
    cluster.connect_ready("while-failing").await;
    let status = cluster.controllers[0].wait(LONG).await;
    assert_eq!(status.code(), Some(1), "{}", cluster.controllers[0].log());
    let log = cluster.controllers[0].log();
    assert!(log.contains("Input/output error"), "{log}");
    shim.heal();
    cluster.restart_controller(0);
    cluster.wait_controller(0).await;
    assert_held(&cluster, &held).await;
}
