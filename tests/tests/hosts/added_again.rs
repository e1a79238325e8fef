//! Emptied machines: added again by hand and by `--join`, replaced one by one, or found to be most of the cluster.

use crate::{KEY, LOST, WAITS};
use holdfast_tests::harness::LONG;
use holdfast_tests::hosts::Hosts;

/// What is said of a lost disk where no majority is left to remove it.
const RESTORE: &str = "2 of 3 voters have lost their disks, so that what a majority had acknowledged may be gone: restore a \
                       backup into a new cluster of one, and add the others with empty data directories";

/// A follower of a cluster of three.
pub async fn follower(hosts: &Hosts) -> usize {
    let leader = hosts.leader_of(&[0, 1, 2]).await;
    (0..3).find(|at| *at != leader).unwrap()
}

/// Under the old address an emptied machine is refused while its old id is a member, and the refusal says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_machine_is_added_again_after_its_old_id_is_removed() {
    let mut hosts = Hosts::formed(3, 1).await;
    let held = hosts.connect(0, KEY, 0).await;
    let by_hand = follower(&hosts).await;
    let (asked, addr) = (hosts.leader_of(&[0, 1, 2]).await, hosts.members[by_hand].peer_addr());
    let remove_first = format!("Remove member {0}, then add the new process", by_hand + 1);
    hosts.lose_disk(by_hand);
    hosts.start(&[by_hand]);
    hosts.members[by_hand].wait_not_ready(WAITS).await;
    hosts.members[asked].wait_status(&format!("member {}: {LOST}", by_hand + 1)).await;
    hosts.members[asked].cli(&["cluster", "add", &addr]).await.refused(&[&remove_first]);
    assert_eq!(hosts.replace(asked, by_hand as u64 + 1, by_hand).await, 4);
    // Asked again, it is the same member.
    assert_eq!(hosts.add(asked, by_hand).await, 4);
    hosts.wait_ready(&[0, 1, 2]).await;

    let by_join = (0..3).find(|at| *at != by_hand && *at != asked).unwrap();
    let remove_first = format!("Remove member {0}, then add the new process", by_join + 1);
    hosts.lose_disk(by_join);
    let urls = format!("{},{}", hosts.members[by_hand].url(), hosts.members[asked].url());
    hosts.members[by_join].process.set_flag("--join", &urls);
    let from = hosts.members[by_join].process.log_len();
    hosts.start(&[by_join]);
    hosts.members[by_join].process.wait_log(from, &remove_first, LONG).await;
    hosts.members[by_join].wait_not_ready(WAITS).await;
    hosts.remove(asked, by_join as u64 + 1).await;
    hosts.wait_ready(&[by_join]).await;
    // It asks for itself: adding it by hand finds what is there.
    assert_eq!(hosts.add(asked, by_join).await, 5);

    let next = hosts.connect(by_join, KEY, 0).await;
    assert_eq!(next, held, "renewed all the time");
    hosts.finish(&[0, 1, 2]).await;
}

/// After all machines were replaced, the emptied old ones are waiting processes and no second cluster.
#[tokio::test(flavor = "multi_thread")]
async fn emptied_machines_of_before_a_replacement_form_nothing() {
    let mut hosts = Hosts::formed_with_spares(3, 3, 1).await;
    let held = hosts.connect(0, KEY, 0).await;
    for old in 0..3 {
        let new = old + 3;
        hosts.start(&[new]);
        hosts.wait_answers(new).await;
        let asked = if old == 0 { 0 } else { 3 };
        assert_eq!(hosts.add(asked, new).await, new as u64 + 1);
        hosts.wait_ready(&[new]).await;
        hosts.remove(new, old as u64 + 1).await;
        hosts.members[old].wait_not_ready("was removed from the cluster").await;
    }
    for old in 0..3 {
        hosts.lose_disk(old);
        hosts.start(&[old]);
    }
    for old in 0..3 {
        hosts.members[old].wait_not_ready(WAITS).await;
        hosts.assert_serves_nothing(old, KEY).await;
    }
    let leader = hosts.leader_of(&[3, 4, 5]).await;
    let view = hosts.members[leader].local_view().await.unwrap();
    assert_eq!(view.members.iter().map(|member| member.id).collect::<Vec<_>>(), [4, 5, 6]);
    assert_eq!(hosts.connect(3, KEY, 0).await, held, "renewed all the time");
    hosts.finish(&[3, 4, 5]).await;
}

/// Two of three disks are lost: nothing forms, nothing is acquired, and all say what to do. Then a backup is restored into a
/// new cluster of one, to which the emptied ones are added.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_majority_serves_nothing_until_a_backup_is_restored() {
    let mut hosts = Hosts::formed(3, 1).await;
    let held = hosts.connect(0, KEY, 0).await;
    let survivor = hosts.leader_of(&[0, 1, 2]).await;
    let lost: Vec<usize> = (0..3).filter(|at| *at != survivor).collect();
    let backup = hosts.dir().join("backup").display().to_string();
    hosts.members[survivor].cli(&["snapshot", "save", &backup]).await.ok();
    lost.iter().for_each(|at| hosts.lose_disk(*at));
    hosts.start(&lost);
    for at in &lost {
        hosts.members[*at].wait_not_ready(WAITS).await;
        hosts.members[*at].cli(&["cluster", "status"]).await.refused(&[WAITS]);
        hosts.members[survivor].wait_status(&format!("member {}: {RESTORE}", at + 1)).await;
    }
    hosts.members[survivor].wait_not_ready(RESTORE).await;
    for at in 0..3 {
        hosts.assert_serves_nothing(at, KEY).await;
    }
    assert_eq!(hosts.watch.tokens(KEY), [held.token]);

    hosts.members[survivor].process.kill9();
    let (dir, addr) =
        (hosts.dir().join("restored").display().to_string(), hosts.members[survivor].peer_addr());
    let restore = ["snapshot", "restore", &backup, "--data-dir", &dir, "--advertise-peer", &addr];
    hosts.members[survivor].cli(&restore).await.ok();
    hosts.members[survivor].process.set_flag("--data-dir", &dir);
    hosts.start(&[survivor]);
    hosts.wait_ready(&[survivor]).await;
    for (n, at) in lost.iter().enumerate() {
        assert_eq!(
            hosts.add(survivor, *at).await,
            n as u64 + 2,
            "the new cluster counts from its first member"
        );
    }
    hosts.wait_ready(&[0, 1, 2]).await;
    hosts.connect(survivor, KEY, held.token).await;
    hosts.finish(&[0, 1, 2]).await;
}
