//! `cluster init` on real processes: what it forms, what it refuses, and what is left when it is cut short.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_tests::harness::{Answer, Cluster, LONG, wait_until};
use holdfast_wire::http::{ClusterInfo, InitResult};
use holdfast_wire::{ApiErrorKind, LeaseConfig};
use reqwest::Method;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::io::AsyncWriteExt;

const SHORT_LEASE: &str = "renew=1s,soft=2500ms,hard=3500ms,expiry=5s";
const LONG_LEASE: &str = "renew=10s,soft=20s,hard=30s,expiry=40s";

/// Asks the controller at `index`.
async fn init(cluster: &Cluster, index: usize, members: &[String], lease: &str) -> Answer {
    let lease: LeaseConfig = lease.parse().unwrap();
    let url = format!("{}/ctrl/cluster/init", cluster.url(index));
    cluster.http.post(&url, &json!({"members": members, "lease": lease})).await
}

/// The same, until it is answered other than that a member can't be reached yet: peer ports are opened a moment later.
async fn init_patiently(cluster: &Cluster, index: usize, members: &[String], lease: &str) -> Answer {
    wait_until("the init is answered", LONG, async || {
        let answer = init(cluster, index, members, lease).await;
        if answer.text.contains("does not answer") { Err(answer) } else { Ok(answer) }
    })
    .await
}

fn peers(cluster: &Cluster) -> Vec<String> {
    (0..cluster.controllers.len()).map(|index| cluster.peer_addr(index)).collect()
}

/// Why the controller at `index` is not ready.
async fn reason(cluster: &Cluster, index: usize) -> String {
    let url = format!("{}/ctrl/ready", cluster.url(index));
    wait_until("a controller says why it is not ready", LONG, async || {
        match cluster.http.send(Method::GET, &url, &[], None).await {
            Ok(answer) if answer.status.as_u16() == 503 => {
                Ok(answer.json()["reason"].as_str().unwrap().to_owned())
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await
}

/// Lets so many connections through to `to`, and all once it is opened.
async fn gate(to: SocketAddr, mut free: usize) -> (SocketAddr, Arc<AtomicBool>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let open = Arc::new(AtomicBool::new(false));
    let opened = Arc::clone(&open);
    tokio::spawn(async move {
        while let Ok((mut from, _)) = listener.accept().await {
            if free == 0 && !opened.load(Ordering::SeqCst) {
                continue;
            }
            free = free.saturating_sub(1);
            tokio::spawn(async move {
                let mut there = tokio::net::TcpStream::connect(to).await?;
                tokio::io::copy_bidirectional(&mut from, &mut there).await
            });
        }
    });
    (addr, open)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_controllers_say_so_and_one_init_makes_them_a_cluster() {
    let mut cluster = Cluster::builder().waiting().start().await;
    for index in 0..3 {
        assert!(reason(&cluster, index).await.starts_with("waiting for \"holdfast cluster init\""));
        let metrics = cluster.http.get(&format!("{}/metrics", cluster.url(index))).await.text;
        assert!(
            metrics.lines().any(|line| line.starts_with("holdfast_waiting{") && line.ends_with(" 1")),
            "{metrics}"
        );
        cluster.http.get(&format!("{}/ctrl/keys", cluster.url(index))).await.refused(ApiErrorKind::NoLeader);
    }
    let members = peers(&cluster);
    // Nothing is changed by an init that is refused.
    let nobody = cluster.free_addr().to_string();
    wait_until("the member that does not answer is named", LONG, async || {
        let answer = init(&cluster, 0, &[members[0].clone(), nobody.clone()], SHORT_LEASE).await;
        let error = answer.refused(ApiErrorKind::ChangeUnsafe);
        if error.message.contains(&format!("member {nobody} does not answer")) { Ok(()) } else { Err(error) }
    })
    .await;
    let elsewhere = init_patiently(&cluster, 2, &members[..2], SHORT_LEASE).await;
    let elsewhere = elsewhere.refused(ApiErrorKind::InvalidRequest);
    assert!(elsewhere.message.contains("does not name this controller"), "{elsewhere:?}");
    assert!(reason(&cluster, 0).await.starts_with("waiting for"));
    // Asked at the second: ids are those of the list all the same.
    let formed: InitResult = init_patiently(&cluster, 1, &members, SHORT_LEASE).await.ok();
    let ids: Vec<_> = formed.members.iter().map(|member| (member.id, member.peer_addr.clone())).collect();
    assert_eq!(ids, (1..=3_u64).zip(members.clone()).collect::<Vec<_>>());
    for index in 0..3 {
        cluster.wait_controller(index).await;
    }
    let info = cluster.info().await;
    assert_eq!(info.cluster_id.as_deref(), Some(formed.cluster_id.as_str()));
    assert_eq!(info.lease.map(|lease| lease.expiry_ms), Some(5_000));
    let mut seen: Vec<_> = info.members.iter().map(|member| (member.id, member.peer_addr.clone())).collect();
    seen.sort();
    assert_eq!(seen, ids);
    assert!(info.members.iter().all(|member| member.identity.len() == 32), "{info:?}");
    // Restarts need nothing; and no init changes what is there, its lease included.
    cluster.controllers.iter_mut().for_each(|controller| controller.kill9());
    (0..3).for_each(|index| cluster.restart_controller(index));
    for index in 0..3 {
        cluster.wait_controller(index).await;
        init(&cluster, index, &members, LONG_LEASE).await.refused(ApiErrorKind::AlreadyInitialised);
    }
    let after: ClusterInfo = cluster.info().await;
    assert_eq!((after.cluster_id, after.lease), (info.cluster_id, info.lease));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_init_that_was_cut_short_is_repeated_where_it_began_and_nowhere_else() {
    let mut cluster = Cluster::builder().waiting().start().await;
    // The third says who it is, and does not hear its name.
    let (gate_addr, open) = gate(cluster.peer_addr(2).parse().unwrap(), 1).await;
    let members = vec![cluster.peer_addr(0), cluster.peer_addr(1), gate_addr.to_string()];
    let refused = wait_until("the init is cut short", LONG, async || {
        let error = init(&cluster, 0, &members, SHORT_LEASE).await.refused(ApiErrorKind::ChangeUnsafe);
        if reason(&cluster, 0).await.starts_with("an init of") { Ok(error) } else { Err(error) }
    })
    .await;
    assert!(refused.message.contains(&format!("member {gate_addr} does not answer")), "{refused:?}");
    assert!(refused.message.contains("repeat the init at this controller"), "{refused:?}");
    // Before and after a restart of the one that began it.
    for _ in 0..2 {
        assert!(reason(&cluster, 0).await.contains(&members.join(",")));
        let other = init_patiently(&cluster, 0, &peers(&cluster)[..1], SHORT_LEASE).await;
        let other = other.refused(ApiErrorKind::InvalidRequest);
        assert!(other.message.contains(&members.join(",")), "{other:?}");
        init_patiently(&cluster, 0, &members[..2], SHORT_LEASE).await.refused(ApiErrorKind::InvalidRequest);
        // The second is bound, so it forms nothing else and begins nothing.
        let bound =
            init(&cluster, 1, &peers(&cluster), SHORT_LEASE).await.refused(ApiErrorKind::ChangeUnsafe);
        assert!(bound.message.contains(&members[0]), "{bound:?}");
        // Nor does the third form a cluster with one of them.
        let third = [cluster.peer_addr(2), members[1].clone()];
        let third =
            init_patiently(&cluster, 2, &third, SHORT_LEASE).await.refused(ApiErrorKind::ChangeUnsafe);
        assert!(third.message.contains("is bound to the init of"), "{third:?}");
        cluster.controllers[0].kill9();
        cluster.restart_controller(0);
    }
    reason(&cluster, 0).await;
    open.store(true, Ordering::SeqCst);
    let repeated = init_patiently(&cluster, 0, &members, SHORT_LEASE).await;
    let formed: InitResult = repeated.ok();
    assert_eq!(formed.members.len(), 3);
    for index in 0..3 {
        cluster.wait_controller(index).await;
    }
    init(&cluster, 0, &members, SHORT_LEASE).await.refused(ApiErrorKind::AlreadyInitialised);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_whose_body_never_comes_keeps_no_one_from_being_named() {
    let cluster = Cluster::builder().waiting().start().await;
    let mut stalled = Vec::new();
    for url in cluster.urls() {
        let mut stream = tokio::net::TcpStream::connect(url.trim_start_matches("http://")).await.unwrap();
        let head = "POST /ctrl/cluster/init HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                    content-length: 100\r\n\r\n{";
        stream.write_all(head.as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    init(&cluster, 0, &peers(&cluster), SHORT_LEASE).await.ok::<InitResult>();
    for index in 0..3 {
        cluster.wait_controller(index).await;
        // The coordinator is a member first, and meets the others while they still wait: it names no one twice.
        let named = cluster.controllers[index].log().matches("this process has a name").count();
        assert!(named <= 3, "named {named} times");
    }
}
