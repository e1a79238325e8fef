//! The tests' own means: what they are to notice, they notice, and nothing of them stays behind.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Cluster, EventKind, LONG, SHORT, wait_until};
use holdfast_wire::BackendStatus;
use holdfast_wire::http::ConnectRequest;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Processes whose output goes below `dir`, or that have it in their command.
fn left_of(dir: &Path) -> Vec<String> {
    let mut left = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let path = entry.path();
        let out = ["fd/1", "fd/2"].map(|fd| std::fs::read_link(path.join(fd)).unwrap_or_default());
        let command = std::fs::read_to_string(path.join("cmdline")).unwrap_or_default();
        // A killed process without a parent that reaps is no process any more.
        let zombie = std::fs::read_to_string(path.join("stat")).is_ok_and(|stat| stat.contains(") Z "));
        let ours = out.iter().any(|out| out.starts_with(dir)) || command.contains(dir.to_str().unwrap());
        if ours && !zombie {
            left.push(format!("{}: {command}", path.display()));
        }
    }
    left
}

#[tokio::test]
async fn two_backends_under_one_lock_are_noticed() {
    let cluster = Cluster::builder().controllers(1).start().await;
    let connect = async |key: &str| {
        let mut request: ConnectRequest = cluster.backend().request(key);
        request.spawn_config = Some(cluster.backend().spawn_config("one lock"));
        cluster.client().connect(&request).await.unwrap().backend_id
    };
    let first = connect("a").await;
    cluster.wait_status(&first, BackendStatus::Ready).await;
    cluster.journal.assert_no_overlap();
    let second = connect("b").await;
    cluster.journal.wait_for(&second, EventKind::Overlap, SHORT).await;
    assert!(catch_unwind(AssertUnwindSafe(|| cluster.journal.assert_no_overlap())).is_err());
    let end = cluster.wait_status(&second, BackendStatus::Terminated).await;
    assert_eq!(end.exit_code, Some(99));
}

#[tokio::test]
async fn nothing_of_a_cluster_stays_behind() {
    let mut cluster = Cluster::builder().controllers(3).drones(2).start().await;
    for i in 0..6 {
        cluster.connect_ready(&format!("k-{i}")).await;
    }
    // The guards of a killed drone are left to the cluster.
    cluster.drones[0].kill9();
    let dir = cluster.dir();
    assert!(left_of(&dir).len() >= 3 + 1 + 6, "{:?}", left_of(&dir));
    drop(cluster);
    // Those that are killed are soon gone, long before any lease is over.
    wait_until("nothing is left", LONG, async || {
        let left = left_of(&dir);
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    assert!(!dir.exists());
}

#[tokio::test]
async fn a_silenced_proxy_lets_nothing_through_until_it_is_healed() {
    let mut cluster = Cluster::builder().controllers(1).drones(0).start().await;
    let proxies = cluster.proxies().await;
    let url = format!("{}/ctrl/cluster", proxies.urls()[0]);
    let answer = cluster.http.get(&url).await;
    // The leader is named by its proxy, so that whoever follows it stays behind the proxy.
    assert_eq!(answer.leader(), Some(proxies.urls()[0].as_str()));
    proxies.silence();
    let get = cluster.http.get(&url);
    assert!(tokio::time::timeout(std::time::Duration::from_millis(300), get).await.is_err());
    proxies.cut();
    assert!(cluster.http.send(reqwest::Method::GET, &url, &[], None).await.is_err());
    proxies.heal();
    assert!(cluster.http.get(&url).await.status.is_success());
}
