//! The disks of a minority are lost while the leader of before is isolated, and what starts on the emptied disks meets it.
//!
//! ```text
//!   L │ A, W         L is cut off; A is elected and acquires K; its backend runs on dr-0, which L does not reach either
//!   L, W │ A         W has lost its disk, A is stopped; L and W meet: they must form no quorum
//!   L, W, A          A is back: A and L are the good disks, and serve without help
//! ```

use crate::{KEY, LOST, WAITS};
use futures::future::join_all;
use holdfast_tests::hosts::{Held, Hosts};
use nix::sys::signal::Signal;

/// A cluster with an isolated leader, and who is who in it.
struct Stage {
    hosts: Hosts,
    /// The isolated leader.
    l: usize,
    /// The leader that was elected without it.
    a: usize,
    /// The other members, which are to lose their disks or to stop.
    others: Vec<usize>,
}

impl Stage {
    /// Forms a cluster, isolates its leader together with the second drone, and waits for the next leader.
    async fn set(members: usize) -> Self {
        let mut hosts = Hosts::formed(members, 2).await;
        let all: Vec<usize> = (0..members).collect();
        let l = hosts.leader_of(&all).await;
        let mut others: Vec<usize> = all.into_iter().filter(|at| *at != l).collect();
        let side: Vec<usize> = others.iter().copied().chain([hosts.drones[0].at]).collect();
        let alone = [l, hosts.drones[1].at];
        hosts.cut(&alone, &side);
        let a = hosts.leader_of(&others).await;
        others.retain(|at| *at != a);
        hosts.wait_drone(a, 0).await;
        Self { hosts, l, a, others }
    }

    /// The key is acquired by the new leader; its backend runs where the old leader does not reach.
    async fn acquire(&self) -> Held {
        let held = self.hosts.connect(self.a, KEY, 0).await;
        assert_eq!(held.drone, "dr-0");
        held
    }

    /// What emptied processes say, and what the isolated leader says of them; it serves nothing with their help.
    async fn assert_meets_lost(&self, lost: &[usize]) {
        let (hosts, l) = (&self.hosts, &self.hosts.members[self.l]);
        let met = lost.iter().map(|at| async move {
            let (w, shown) = (&hosts.members[*at], format!("member {}: {LOST}", at + 1));
            w.wait_not_ready(WAITS).await;
            let (status, said) = tokio::join!(l.wait_status(&shown), w.cli(&["cluster", "status"]));
            assert!(status.contains("no leader answers"), "{status}");
            said.refused(&[WAITS]);
        });
        join_all(met).await;
        join_all(lost.iter().chain([&self.l]).map(|at| hosts.assert_serves_nothing(*at, KEY))).await;
    }

    /// The good disks are together again: they serve without help, and the key goes on with a larger token if its backend
    /// has ended.
    async fn assert_serves_again(&self, good: &[usize], held: &Held) {
        self.hosts.wait_ready(good).await;
        let next = self.hosts.connect(self.l, KEY, 0).await;
        assert!(next == *held || next.token > held.token, "{next:?} after {held:?}");
        let tokens = self.hosts.watch.tokens(KEY);
        assert!(tokens.is_sorted_by(|a, b| a < b), "{tokens:?}");
    }

    /// Lost members are replaced by what runs on their emptied disks, under new ids; then all agree.
    async fn replace_and_finish(self, lost: &[usize], good: &[usize]) {
        let members = self.hosts.members.len();
        for (n, at) in lost.iter().enumerate() {
            let id = self.hosts.replace(good[0], *at as u64 + 1, *at).await;
            assert_eq!(id, (members + n) as u64 + 1, "an id that was never used");
        }
        let all: Vec<usize> = (0..members).collect();
        self.hosts.wait_ready(&all).await;
        self.hosts.finish(&all).await;
    }
}

/// The schedule of the issue, which gave two running backends of one key while an emptied member kept its id.
#[tokio::test(flavor = "multi_thread")]
async fn an_isolated_leader_and_an_emptied_member_are_no_quorum() {
    let mut stage = Stage::set(3).await;
    let held = stage.acquire().await;
    let (l, a, w) = (stage.l, stage.a, stage.others[0]);
    stage.hosts.lose_disk(w);
    stage.hosts.members[a].process.signal(Signal::SIGSTOP);
    stage.hosts.join(&[l, stage.hosts.drones[1].at], &[w]);
    stage.hosts.start(&[w]);
    stage.assert_meets_lost(&[w]).await;
    stage.hosts.net.heal();
    stage.assert_meets_lost(&[w]).await;
    stage.hosts.members[a].process.signal(Signal::SIGCONT);
    stage.assert_serves_again(&[l, a], &held).await;
    stage.replace_and_finish(&[w], &[a, l]).await;
}

/// Of five, two disks are lost and two members stopped: the isolated leader and the emptied ones would be a majority.
#[tokio::test(flavor = "multi_thread")]
async fn of_five_an_isolated_leader_and_two_emptied_are_no_quorum() {
    let mut stage = Stage::set(5).await;
    let held = stage.acquire().await;
    let (l, a, b) = (stage.l, stage.a, stage.others[0]);
    let lost = [stage.others[1], stage.others[2]];
    lost.iter().for_each(|at| stage.hosts.lose_disk(*at));
    [a, b].iter().for_each(|at| stage.hosts.members[*at].process.signal(Signal::SIGSTOP));
    stage.hosts.join(&[l, stage.hosts.drones[1].at], &lost);
    stage.hosts.start(&lost);
    stage.assert_meets_lost(&lost).await;
    stage.hosts.net.heal();
    stage.hosts.members[a].process.signal(Signal::SIGCONT);
    stage.assert_meets_lost(&lost).await;
    stage.hosts.assert_serves_nothing(a, KEY).await;
    stage.hosts.members[b].process.signal(Signal::SIGCONT);
    stage.assert_serves_again(&[l, a, b], &held).await;
    stage.replace_and_finish(&lost, &[a, l, b]).await;
}

/// The disk is lost before the new leader's acquisition reaches it: nothing acknowledges that acquisition, and it takes
/// effect once at most.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_lost_before_an_acquisition_leaves_it_unacknowledged() {
    let mut stage = Stage::set(3).await;
    let (l, a, w) = (stage.l, stage.a, stage.others[0]);
    stage.hosts.lose_disk(w);
    stage.hosts.assert_serves_nothing(a, KEY).await;
    stage.hosts.members[a].process.signal(Signal::SIGSTOP);
    stage.hosts.join(&[l, stage.hosts.drones[1].at], &[w]);
    stage.hosts.start(&[w]);
    stage.assert_meets_lost(&[w]).await;
    assert_eq!(stage.hosts.watch.tokens(KEY), [0_u64; 0], "nothing was started");
    stage.hosts.net.heal();
    stage.hosts.members[a].process.signal(Signal::SIGCONT);
    stage.hosts.wait_ready(&[l, a]).await;
    let held = stage.hosts.connect(l, KEY, 0).await;
    stage.assert_serves_again(&[l, a], &held).await;
    stage.replace_and_finish(&[w], &[a, l]).await;
}

/// The emptied member meets the isolated leader first, the new leader later, and both together at last.
#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_member_helps_neither_leader_it_meets() {
    let mut stage = Stage::set(3).await;
    let held = stage.acquire().await;
    let (l, a, w) = (stage.l, stage.a, stage.others[0]);
    stage.hosts.lose_disk(w);
    stage.hosts.cut(&[a], &[w]);
    stage.hosts.join(&[l, stage.hosts.drones[1].at], &[w]);
    stage.hosts.start(&[w]);
    stage.assert_meets_lost(&[w]).await;
    stage.hosts.join(&[a], &[w]);
    stage.hosts.members[a].wait_status(&format!("member {}: {LOST}", w + 1)).await;
    stage.hosts.assert_serves_nothing(a, KEY).await;
    stage.assert_meets_lost(&[w]).await;
    // In one direction only: what L says arrives, and what A answers does not.
    stage.hosts.net.unblock(l, a);
    stage.assert_meets_lost(&[w]).await;
    stage.hosts.net.heal();
    stage.assert_serves_again(&[l, a], &held).await;
    stage.replace_and_finish(&[w], &[a, l]).await;
}

/// The emptied member is killed and started again while it meets the isolated leader, once with its disk and once emptied
/// again.
#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_member_that_restarts_is_still_no_member() {
    let mut stage = Stage::set(3).await;
    let held = stage.acquire().await;
    let (l, a, w) = (stage.l, stage.a, stage.others[0]);
    stage.hosts.lose_disk(w);
    stage.hosts.net.set_link(a, false);
    stage.hosts.join(&[l, stage.hosts.drones[1].at], &[w]);
    for emptied in [false, true, false] {
        stage.hosts.start(&[w]);
        stage.assert_meets_lost(&[w]).await;
        stage.hosts.members[w].process.kill9();
        if emptied {
            stage.hosts.members[w].wipe();
        }
    }
    stage.hosts.start(&[w]);
    stage.hosts.net.heal();
    stage.hosts.net.set_link(a, true);
    stage.assert_serves_again(&[l, a], &held).await;
    stage.replace_and_finish(&[w], &[a, l]).await;
}
