//! What answers at a member's address and is not that member: a process of another cluster, and directories that were copied
//! or set back.

use crate::KEY;
use crate::added_again::follower;
use holdfast_tests::hosts::Hosts;

/// A process of another cluster at a member's address silences no one, and status shows it.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_another_cluster_at_a_members_address_harms_no_one() {
    let mut hosts = Hosts::formed(3, 1).await;
    let held = hosts.connect(0, KEY, 0).await;
    let at = follower(&hosts).await;
    let good: Vec<usize> = (0..3).filter(|other| *other != at).collect();
    let leader = hosts.leader_of(&good).await;
    let term = hosts.members[leader].local_view().await.unwrap().term;
    let own_dir = hosts.members[at].data_dir.display().to_string();
    let other_dir = hosts.dir().join("other").display().to_string();
    hosts.members[at].process.kill9();
    hosts.watch.ignore(at);
    hosts.members[at].process.set_flag("--data-dir", &other_dir);
    hosts.start(&[at]);
    hosts.init(at, &[at]).await.ok();
    hosts.wait_ready(&[at]).await;
    let other = hosts.members[at].local_view().await.unwrap().cluster_id.unwrap();
    let shown = format!("belongs to cluster {other}");
    let status = hosts.members[leader].wait_status(&shown).await;
    assert!(
        status.lines().any(|line| line.starts_with(&format!("member {}: ", at + 1)) && line.contains(&shown))
    );
    hosts.wait_ready(&[0, 1, 2]).await;
    let view = hosts.members[leader].local_view().await.unwrap();
    assert_eq!((view.leader, view.term), (Some(leader as u64 + 1), term), "no election");
    assert_eq!(hosts.connect(leader, KEY, 0).await, held, "renewed all the time");

    hosts.members[at].process.kill9();
    hosts.members[at].process.set_flag("--data-dir", &own_dir);
    hosts.start(&[at]);
    hosts.wait_ready(&[0, 1, 2]).await;
    hosts.finish(&[0, 1, 2]).await;
}

/// What peers say of it.
const SET_BACK: &str =
    "its data directory is a copy or was set back: remove this member, empty its directory, then add it";

/// A directory that was set back is refused by peers that know a newer start. Both say so.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_was_set_back_is_refused() {
    let mut hosts = Hosts::formed(3, 0).await;
    let at = follower(&hosts).await;
    let good: Vec<usize> = (0..3).filter(|other| *other != at).collect();
    hosts.members[at].process.kill9();
    let copy = hosts.members[at].copy_data();
    hosts.start(&[at]);
    hosts.wait_ready(&[at]).await;
    hosts.members[at].process.kill9();
    hosts.members[at].set_back(&copy);
    hosts.start(&[at]);
    assert_refused(&hosts, &good, at as u64 + 1, at).await;
    // However often it is started: what its peers have seen is not in its history.
    for _ in 0..3 {
        hosts.members[at].process.kill9();
        hosts.start(&[at]);
        hosts.members[at].wait_not_ready("copy").await;
    }
    assert_refused(&hosts, &good, at as u64 + 1, at).await;
    hosts.lose_disk(at);
    hosts.start(&[at]);
    hosts.wait_answers(at).await;
    hosts.replace(good[0], at as u64 + 1, at).await;
    hosts.wait_ready(&[0, 1, 2]).await;
    hosts.finish(&[0, 1, 2]).await;
}

/// A copy that runs beside the member that it was taken of is refused, and that member goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_copied_directory_is_refused_and_the_member_serves_on() {
    let mut hosts = Hosts::formed_with_spares(3, 1, 0).await;
    let at = follower(&hosts).await;
    hosts.members[at].process.kill9();
    let copy = hosts.members[at].copy_data();
    hosts.start(&[at]);
    hosts.wait_ready(&[at]).await;
    hosts.members[3].process.set_flag("--data-dir", &copy.display().to_string());
    hosts.start(&[3]);
    hosts.members[3].wait_not_ready("copy").await;
    hosts.assert_serves_nothing(3, KEY).await;
    hosts.wait_ready(&[0, 1, 2]).await;
    hosts.finish(&[0, 1, 2]).await;
}

async fn assert_refused(hosts: &Hosts, good: &[usize], id: u64, at: usize) {
    let leader = hosts.leader_of(good).await;
    hosts.members[leader].wait_status(&format!("member {id}: {SET_BACK}")).await;
    hosts.members[at].wait_not_ready("copy").await;
    hosts.members[at].wait_status("copy").await;
    hosts.assert_serves_nothing(at, KEY).await;
    hosts.wait_ready(good).await;
}
