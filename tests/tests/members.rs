//! Members come, go, move and are restarted, on real processes.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use holdfast_client::{Client, ClientError};
use holdfast_tests::harness::{Answer, Cluster, LONG, SHORT, wait_until};
use holdfast_tests::load::{Load, Report, drones};
use holdfast_wire::ApiErrorKind;
use holdfast_wire::http::{ClusterInfo, MemberChangeResult};
use nix::sys::signal::Signal;
use reqwest::Method;
use serde_json::json;
use std::time::Duration;

/// Nothing expires in these tests.
const LEASE: &str = "renew=30s,soft=40s,hard=50s,expiry=60s";
/// Long enough for a busy machine: in these tests an election by time-out is a mistake.
const ELECTION_TIMEOUT: &str = "1s";

async fn calm_cluster() -> Cluster {
    Cluster::builder().drones(0).lease(LEASE).election_timeout(ELECTION_TIMEOUT).start().await
}

/// Asks the controller at `index` to change a member's address.
async fn set(cluster: &Cluster, index: usize, id: u64, peer_addr: &str) -> Answer {
    let url = format!("{}/ctrl/cluster/members", cluster.url(index));
    cluster.http.post(&url, &json!({"id": id, "peer_addr": peer_addr})).await
}

/// Asks the controller at `index` to add what waits at an address.
async fn add(cluster: &Cluster, index: usize, peer_addr: &str) -> Answer {
    let url = format!("{}/ctrl/cluster/members", cluster.url(index));
    cluster.http.post(&url, &json!({"peer_addr": peer_addr})).await
}

async fn remove(cluster: &Cluster, index: usize, id: u64) -> Answer {
    let url = format!("{}/ctrl/cluster/members/{id}", cluster.url(index));
    cluster.http.send(Method::DELETE, &url, &[], None).await.unwrap()
}

/// Removes, with a linearizable read of the outcome, and asks again while something else is under way.
async fn remove_patiently(client: &Client, id: u64) -> MemberChangeResult {
    wait_until(&format!("member {id} is removed"), LONG, async || match client.remove_member(id).await {
        Ok(result) => Ok(result),
        Err(error @ ClientError::Refused(..)) if error.kind() == Some(ApiErrorKind::ChangeInProgress) => {
            Err(error)
        }
        Err(error) => panic!("removing member {id}: {error}"),
    })
    .await
}

/// All controllers that run have the same checksum at the same index, which is not the first one.
async fn assert_equal_checksums(cluster: &Cluster) {
    let running: Vec<String> = (0..cluster.controllers.len())
        .filter(|index| cluster.controllers[*index].pid().is_some())
        .map(|index| cluster.url(index))
        .collect();
    // More entries than there are between two checksums.
    for _ in 0..64 {
        let url = format!("{}/ctrl/c/{}/d/dr-none/drain", running[0], cluster.name);
        cluster.http.post(&url, &json!(null)).await.refused(ApiErrorKind::NotFound);
    }
    wait_until("the checksums are those of one index", LONG, async || {
        let mut seen = Vec::new();
        for url in &running {
            let url = format!("{url}/ctrl/cluster?consistency=local");
            seen.push(cluster.http.get(&url).await.ok::<ClusterInfo>().checksum);
        }
        if seen[0].index > 0 && seen.iter().all(|checksum| checksum.index == seen[0].index) {
            assert!(seen.iter().all(|checksum| checksum.value == seen[0].value), "replicas differ: {seen:?}");
            return Ok(());
        }
        Err(seen)
    })
    .await;
}

fn assert_no_failure(report: &Report) {
    assert!(report.failures().is_empty(), "failed client requests: {:#?}", report.failures());
    assert!(report.seen.len() > 100, "only {} requests were made", report.seen.len());
}

async fn wait_drones(client: &Client, count: usize) {
    wait_until("the simulated drones are ready", LONG, async || {
        let page = client.drones_page(&Default::default(), None).await.map_err(|e| e.to_string())?;
        let ready = page.drones.iter().filter(|drone| drone.ready).count();
        if ready == count { Ok(()) } else { Err(format!("{ready} are")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_three_members_are_replaced_one_at_a_time_under_load_and_no_request_fails() {
    let mut cluster = calm_cluster().await;
    let old_urls = cluster.urls();
    for _ in 0..3 {
        cluster.new_controller(&old_urls);
    }
    // The clients know the old members alone; how simulated drones find theirs is not what is tested.
    let drones = drones(&cluster.name, 4, &cluster.urls());
    let client = Client::new(old_urls.clone()).unwrap();
    wait_drones(&client, 4).await;
    let load = Load::start("replaced", &cluster.name, &old_urls, 8, Duration::from_millis(40));
    for old in 0..3 {
        let new = old + 3;
        cluster.restart_controller(new);
        cluster.wait_role(new, &["follower", "leader"]).await;
        let removed = remove_patiently(&client, cluster.id(old)).await;
        assert_eq!((removed.role.as_str(), removed.id), ("removed", cluster.id(old)));
        cluster.controllers[old].signal(Signal::SIGTERM);
        assert!(cluster.controllers[old].wait(LONG).await.success());
    }
    let report = load.stop().await;
    assert_no_failure(&report);
    let info = client.cluster_info().await.expect("none of the URLs that the client was given lives");
    let ids: Vec<u64> = info.members.iter().map(|member| member.id).collect();
    assert_eq!(ids, [4, 5, 6]);
    assert_eq!(info.leader.map(|leader| ids.contains(&leader)), Some(true));
    drop(drones);
    assert_equal_checksums(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_fails_no_request_and_waits_for_no_election() {
    let mut cluster = calm_cluster().await;
    let urls = cluster.urls();
    let drones = drones(&cluster.name, 4, &urls);
    wait_drones(&cluster.client(), 4).await;
    let term_before = cluster.info().await.term;
    let load = Load::start("rolling", &cluster.name, &urls, 16, Duration::from_millis(80));
    let mut handed_over = 0;
    // Whoever leads goes first, so that each restart is of a leader or of a former one.
    for _ in 0..3 {
        let index = cluster.leader().await;
        handed_over += 1;
        cluster.controllers[index].signal(Signal::SIGTERM);
        assert!(cluster.controllers[index].wait(LONG).await.success());
        cluster.restart_controller(index);
        cluster.wait_controller(index).await;
    }
    let follower = (cluster.leader().await + 1) % 3;
    cluster.controllers[follower].signal(Signal::SIGTERM);
    assert!(cluster.controllers[follower].wait(LONG).await.success());
    cluster.restart_controller(follower);
    cluster.wait_controller(follower).await;
    // An election by time-out would have made a term of its own.
    assert_eq!(cluster.info().await.term - term_before, handed_over, "terms, and leaders that were stopped");
    let began = load.began();
    let report = load.stop().await;
    assert_no_failure(&report);
    println!("{:?}", report.between(began, report.seen.last().unwrap().ended));
    drop(drones);
    assert_equal_checksums(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_member_learns_of_it_says_so_and_disturbs_nobody() {
    let mut cluster = calm_cluster().await;
    let leader = cluster.leader().await;
    let (follower, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let id = follower as u64 + 1;
    // It sleeps through its removal, so nothing in its own log tells it.
    cluster.controllers[follower].signal(Signal::SIGSTOP);
    let removed: MemberChangeResult = remove(&cluster, other, id).await.ok();
    assert_eq!((removed.role.as_str(), removed.updated), ("removed", true));
    let again: MemberChangeResult = remove(&cluster, other, id).await.ok();
    assert_eq!((again.role.as_str(), again.updated), ("removed", false));
    let term = cluster.info().await.term;
    cluster.controllers[follower].signal(Signal::SIGCONT);
    let ready = format!("{}/ctrl/ready", cluster.url(follower));
    wait_until("the removed member says that it was removed", SHORT, async || {
        let answer = cluster.http.get(&ready).await;
        if answer.status.as_u16() == 503 && answer.text.contains("removed from the cluster") {
            return Ok(());
        }
        Err(answer)
    })
    .await;
    // It serves neither reads nor writes, and still lives.
    cluster.http.get(&format!("{}/ctrl/keys", cluster.url(follower))).await.refused(ApiErrorKind::NoLeader);
    assert!(cluster.http.get(&format!("{}/pub/health", cluster.url(follower))).await.status.is_success());
    // Its disk has a name already, so it is not added as it is.
    let addr = cluster.peer_addr(follower);
    let refused = add(&cluster, other, &addr).await.refused(ApiErrorKind::MemberIdUsed);
    assert!(refused.message.contains("empty its data directory first"), "{refused:?}");
    // Nor does it come back to life by a restart.
    cluster.controllers[follower].signal(Signal::SIGTERM);
    assert!(cluster.controllers[follower].wait(LONG).await.success());
    cluster.restart_controller(follower);
    wait_until("the removed member still says that it was removed", LONG, async || {
        match cluster.http.send(Method::GET, &ready, &[], None).await {
            Ok(answer) if answer.text.contains("removed from the cluster") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let info = cluster.info().await;
    assert_eq!((info.term, info.leader), (term, Some(leader as u64 + 1)), "the removed member has disturbed");
    assert_eq!(info.members.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_one_more_waiting_process_and_ids_stay_used() {
    let mut cluster = Cluster::builder()
        .drones(0)
        .lease(LEASE)
        .election_timeout(ELECTION_TIMEOUT)
        .controller_flag("--snapshot-every", "100")
        .start()
        .await;
    let leader = cluster.leader().await;
    let (lost, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let (other_id, addr) = (cluster.id(other), cluster.peer_addr(lost));
    let lost_id = cluster.wipe(lost);
    cluster.restart_controller(lost);
    // Both sides say what to do.
    let ready = format!("{}/ctrl/ready", cluster.url(lost));
    wait_until("the emptied process says that it waits", LONG, async || {
        match cluster.http.send(Method::GET, &ready, &[], None).await {
            Ok(answer) if answer.status.as_u16() == 503 && answer.text.contains("holdfast cluster add") => {
                Ok(())
            }
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    wait_until("the leader says that the disk is lost", LONG, async || {
        let info = cluster.info().await;
        let member = info.members.iter().find(|member| member.id == lost_id);
        let problem = member.and_then(|member| member.problem.as_deref()).unwrap_or_default();
        if problem.contains("lost disk: remove this member") { Ok(()) } else { Err(info) }
    })
    .await;
    // What it had acknowledged as the old member is lost: it does not become that member again.
    let refused = add(&cluster, other, &addr).await.refused(ApiErrorKind::MemberIdUsed);
    assert!(refused.message.contains(&format!("Remove member {lost_id}")), "{refused:?}");
    // The one that lives can't go: the lost one alone would be left with the leader.
    wait_until("the lost one does not count", LONG, async || {
        let refused = remove(&cluster, leader, other_id).await;
        assert_eq!(refused.status.as_u16(), 409, "{refused:?}");
        refused.text.contains("ChangeUnsafe").then_some(()).ok_or(refused)
    })
    .await;
    remove(&cluster, other, lost_id).await.ok::<MemberChangeResult>();
    // Entries enough for several snapshots: the new member gets no log from the beginning.
    let url = cluster.url(leader);
    for _ in 0..300 {
        let url = format!("{url}/ctrl/c/{}/d/dr-none/drain", cluster.name);
        cluster.http.post(&url, &json!(null)).await.refused(ApiErrorKind::NotFound);
    }
    assert_eq!(cluster.add(lost).await, 4);
    let again: MemberChangeResult = add(&cluster, other, &addr).await.ok();
    assert_eq!((again.id, again.updated), (4, false), "the same disk has the same id");
    cluster.wait_role(lost, &["follower", "leader"]).await;
    // It leads, and knows what it has from a snapshot alone.
    let transfer = format!("{url}/ctrl/cluster/transfer-leader");
    let done = cluster.http.post(&transfer, &json!({"to": 4})).await;
    assert_eq!(done.json(), json!({"updated": true}));
    assert_eq!(cluster.leader().await, lost);
    let somewhere = cluster.free_addr().to_string();
    set(&cluster, other, lost_id, &somewhere).await.refused(ApiErrorKind::MemberIdUsed);
    let joined = cluster.join_controller().await;
    assert_eq!(cluster.id(joined), 5, "ids are never used twice");
    assert_equal_checksums(&cluster).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_changes_are_refused_by_name_and_one_is_made_at_a_time() {
    let mut cluster = calm_cluster().await;
    remove(&cluster, 0, 77).await.refused(ApiErrorKind::NotFound);
    let nobody = cluster.free_addr().to_string();
    let taken = cluster.info().await.members[1].peer_addr.clone();
    for (peer_addr, problem) in
        [(nobody.as_str(), "is not usable"), ("nonsense", "must be HOST:PORT"), (&taken, "is that of member")]
    {
        let refused = set(&cluster, 0, 3, peer_addr).await.refused(ApiErrorKind::InvalidRequest);
        assert!(refused.message.contains("peer_addr") && refused.message.contains(problem), "{refused:?}");
    }
    for (peer_addr, problem) in [(nobody.as_str(), "is not usable"), ("nonsense", "must be HOST:PORT")] {
        let refused = add(&cluster, 0, peer_addr).await.refused(ApiErrorKind::InvalidRequest);
        assert!(refused.message.contains("peer_addr") && refused.message.contains(problem), "{refused:?}");
    }
    let known: MemberChangeResult = add(&cluster, 0, &taken).await.ok();
    assert_eq!((known.id, known.role.as_str(), known.updated), (2, "voter", false), "a member is added once");
    for unknown in [0, 9] {
        set(&cluster, 0, unknown, &nobody).await.refused(ApiErrorKind::NotFound);
    }
    // One that takes the connection and says nothing keeps the leader busy for a while.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_addr = silent.local_addr().unwrap().to_string();
    let slow = add(&cluster, 0, &silent_addr);
    let busy = async {
        loop {
            let answer = remove(&cluster, 1, 77).await;
            if answer.status.as_u16() == 409 {
                answer.refused(ApiErrorKind::ChangeInProgress);
                return answer;
            }
        }
    };
    let (slow, busy) = tokio::join!(slow, tokio::time::timeout(SHORT, busy));
    slow.refused(ApiErrorKind::InvalidRequest);
    assert_eq!(busy.expect("nothing was refused as busy").headers["retry-after"], "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_is_removed_hands_over_first() {
    let cluster = calm_cluster().await;
    let leader = cluster.leader().await;
    let before = cluster.info().await.term;
    // Asked at the leader itself.
    let removed: MemberChangeResult = remove(&cluster, leader, leader as u64 + 1).await.ok();
    assert_eq!((removed.role.as_str(), removed.updated), ("removed", true));
    let url = format!("{}/ctrl/cluster", cluster.url((leader + 1) % 3));
    let info: ClusterInfo = cluster.http.get(&url).await.ok();
    assert_eq!(info.term, before + 1, "one handover and no election");
    assert!(info.leader.is_some_and(|now| now != leader as u64 + 1));
    assert_eq!(info.members.len(), 2);
    let ready = format!("{}/ctrl/ready", cluster.url(leader));
    wait_until("the old leader knows that it was removed", SHORT, async || {
        let answer = cluster.http.get(&ready).await;
        answer.text.contains("removed from the cluster").then_some(()).ok_or(answer)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_moves_to_another_address_and_keeps_its_id_and_data() {
    let mut cluster = calm_cluster().await;
    let leader = cluster.leader().await;
    let (moved, other) = ((leader + 1) % 3, (leader + 2) % 3);
    let id = moved as u64 + 1;
    let new_addr = cluster.free_addr().to_string();
    // Nobody is there yet, so the change would cut it off.
    set(&cluster, leader, id, &new_addr).await.refused(ApiErrorKind::InvalidRequest);
    cluster.controllers[moved].signal(Signal::SIGTERM);
    assert!(cluster.controllers[moved].wait(LONG).await.success());
    cluster.controllers[moved].set_flag("--peer-listen", &new_addr);
    cluster.restart_controller(moved);
    // An address at which another member answers is refused: a hello names who is meant.
    let wrong = set(&cluster, leader, other as u64 + 1, &new_addr);
    let done: MemberChangeResult = wait_until("the member is moved", LONG, async || {
        let answer = set(&cluster, other, id, &new_addr).await;
        if answer.status.is_success() { Ok(answer.ok()) } else { Err(answer) }
    })
    .await;
    wrong.await.refused(ApiErrorKind::InvalidRequest);
    assert_eq!((done.role.as_str(), done.updated), ("voter", true));
    cluster.wait_controller(moved).await;
    let info = cluster.info().await;
    assert!(info.members.iter().any(|member| member.id == id && member.peer_addr == new_addr), "{info:?}");
    // With the third one gone its vote and its disk are needed.
    cluster.controllers[other].kill9();
    let url = format!("{}/ctrl/c/{}/d/dr-none/drain", cluster.url(moved), cluster.name);
    cluster.http.post(&url, &json!(null)).await.refused(ApiErrorKind::NotFound);
    assert_equal_checksums(&cluster).await;
}

/// Lets one connection through to `to`, and more only when told to.
async fn gate(
    to: std::net::SocketAddr,
) -> (std::net::SocketAddr, std::sync::Arc<std::sync::atomic::AtomicBool>) {
    use std::sync::atomic::{AtomicBool, Ordering};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let open = std::sync::Arc::new(AtomicBool::new(false));
    let opened = std::sync::Arc::clone(&open);
    tokio::spawn(async move {
        let mut first = true;
        while let Ok((mut from, _)) = listener.accept().await {
            if !std::mem::take(&mut first) && !opened.load(Ordering::SeqCst) {
                continue;
            }
            tokio::spawn(async move {
                let mut there = tokio::net::TcpStream::connect(to).await?;
                tokio::io::copy_bidirectional(&mut from, &mut there).await
            });
        }
    });
    (addr, open)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_becomes_a_voter_although_the_leader_that_added_it_dies() {
    let mut cluster = calm_cluster().await;
    let leader = cluster.leader().await;
    let new = cluster.new_controller(&cluster.urls()[..3]);
    // The leader's question whether it is there gets through, and nothing that would let it catch up.
    let peer_listen = cluster.free_addr();
    let (gate_addr, open) = gate(peer_listen).await;
    cluster.controllers[new].set_flag("--peer-listen", &peer_listen.to_string());
    cluster.controllers[new].set_flag("--advertise-peer", &gate_addr.to_string());
    cluster.restart_controller(new);
    cluster.wait_role(new, &["learner"]).await;
    // It restarts in the middle of joining.
    cluster.controllers[new].kill9();
    cluster.restart_controller(new);
    cluster.controllers[leader].kill9();
    cluster.leader_other_than(leader).await;
    cluster.wait_role(new, &["learner"]).await;
    open.store(true, std::sync::atomic::Ordering::SeqCst);
    // Of four voters three would be needed, and two answer: the learner must not be the third.
    cluster.wait_problem(new, "is no voter while voters").await;
    cluster.restart_controller(leader);
    cluster.wait_role(new, &["follower", "leader"]).await;
    cluster.wait_controller(new).await;
    assert_equal_checksums(&cluster).await;
}
