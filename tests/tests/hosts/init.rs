//! `cluster init` cut short at each member and between any two of its messages, repeated, doubled, and refused.

use crate::WAITS;
use futures::future::join_all;
use holdfast_tests::harness::{LONG, wait_until};
use holdfast_tests::hosts::{Hosts, Relay, Said};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;

/// The founding members; the first coordinates.
const ALL: [usize; 3] = [0, 1, 2];

/// Where an init is when a member is killed. The third member is reached through a door.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The others have said who they are, the third was not asked yet.
    Identifying,
    /// The coordinator and the second member are named, the third is not.
    Naming,
    /// The third is named too, but its answer has not arrived.
    Answering,
    /// The coordinator has written down that all have answered.
    Answered,
}

const MOMENTS: [Moment; 4] = [Moment::Identifying, Moment::Naming, Moment::Answering, Moment::Answered];

/// Three waiting controllers, the third of them behind a door.
struct Init {
    hosts: Hosts,
    door: Relay,
    /// The members' addresses as the init names them.
    members: [String; 3],
}

impl Init {
    async fn prepare() -> Self {
        let mut hosts = Hosts::make(3, 0);
        hosts.start(&ALL);
        for at in ALL {
            hosts.members[at].wait_not_ready(WAITS).await;
        }
        let door = Relay::start(&hosts.net, &hosts.members[2]).await;
        let members = [hosts.members[0].peer_addr(), hosts.members[1].peer_addr(), door.addr.to_string()];
        Self { hosts, door, members }
    }

    async fn init_at(&self, at: usize, members: &[String]) -> Said {
        self.hosts.members[at].cli(&["cluster", "init", "--members", &members.join(",")]).await
    }

    /// Begins an init, and kills a member at that moment.
    async fn interrupt(&mut self, moment: Moment, victim: usize) {
        let (asked, answered) = match moment {
            Moment::Identifying => (0, 0),
            Moment::Naming => (1, 1),
            Moment::Answering => (2, 1),
            Moment::Answered => (u64::MAX, u64::MAX),
        };
        self.door.allow(asked, answered);
        let kill = async {
            match moment {
                Moment::Identifying => self.door.wait(1, 0).await,
                Moment::Naming => self.door.wait(2, 1).await,
                Moment::Answering => self.door.wait(2, 2).await,
                Moment::Answered => {
                    let coordinator = &self.hosts.members[0].process;
                    coordinator.wait_log(0, "all members have answered the init", LONG).await;
                }
            }
            self.hosts.members[victim].process.signal(Signal::SIGKILL);
        };
        tokio::join!(self.init_at(0, &self.members), kill);
        self.hosts.members[victim].process.kill9();
        self.door.open();
        self.hosts.start(&[victim]);
        for at in ALL {
            self.hosts.wait_answers(at).await;
        }
    }

    /// Repeats the init where it began until the cluster is formed, by it or before it; all members are of one cluster.
    async fn repeat_and_finish(&self) {
        wait_until("the repeated init", LONG, async || {
            let said = self.init_at(0, &self.members).await;
            let formed = said.code == 0 || said.err.contains("AlreadyInitialised");
            if formed { Ok(()) } else { Err(said) }
        })
        .await;
        self.hosts.wait_ready(&ALL).await;
        let ids: BTreeSet<Option<String>> = join_all(
            ALL.iter()
                .map(|at| async move { self.hosts.members[*at].local_view().await.unwrap().cluster_id }),
        )
        .await
        .into_iter()
        .collect();
        assert_eq!(ids.len(), 1, "{ids:?}");
        self.hosts.finish(&ALL).await;
    }
}

async fn interrupted(victim: usize) {
    let runs = MOMENTS.map(|moment| async move {
        let mut init = Init::prepare().await;
        init.interrupt(moment, victim).await;
        init.repeat_and_finish().await;
    });
    join_all(runs).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_init_whose_coordinator_was_killed_is_repeated_there() {
    interrupted(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_init_during_which_a_member_was_killed_is_repeated() {
    interrupted(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_init_whose_last_member_was_killed_is_repeated() {
    interrupted(2).await;
}

/// What an unfinished init has named is not given to another list, nor to another coordinator, and both say why.
#[tokio::test(flavor = "multi_thread")]
async fn an_unfinished_init_is_continued_by_its_own_list_only() {
    let mut init = Init::prepare().await;
    init.interrupt(Moment::Naming, 0).await;
    init.hosts.members[0].wait_not_ready("repeat \"holdfast cluster init\" with the same members").await;
    let [first, second, third] = init.members.clone();
    let two = init.init_at(0, &[first.clone(), second.clone()]).await;
    two.refused(&["must be those of the init that began here", &init.members.join(",")]);
    let began = format!("that began at {first}");
    init.init_at(1, &init.members).await.refused(&[&first, "bound to the init of", &began]);
    init.init_at(2, &[third, second.clone()]).await.refused(&[&second, "bound to the init of", &began]);
    // What was named says for what it waits.
    init.hosts.members[1].wait_not_ready("init").await;
    init.repeat_and_finish().await;
}

/// Two inits at once at different members form one cluster at most, whether their lists are equal or not. Where none is
/// formed, the refusals say what to do, and doing it helps.
#[tokio::test(flavor = "multi_thread")]
async fn two_inits_at_once_form_one_cluster_at_most() {
    let lists: [[&[usize]; 2]; 3] = [[&ALL, &ALL], [&ALL, &[1, 2]], [&ALL, &[2, 1, 0]]];
    join_all(lists.map(|lists| async move {
        let mut hosts = Hosts::make(3, 0);
        hosts.start(&ALL);
        for at in ALL {
            hosts.wait_answers(at).await;
        }
        let (one, other) = tokio::join!(hosts.init_now(0, lists[0]), hosts.init_now(1, lists[1]));
        let formed: Vec<usize> = (0..2).filter(|n| [&one, &other][*n].code == 0).collect();
        assert!(formed.len() < 2, "{one:?}, {other:?}");
        let members = match formed.first() {
            Some(n) => lists[*n],
            None => {
                for said in [&one, &other] {
                    let nothing = ["Nothing was formed", "nothing was done"];
                    assert!(nothing.iter().any(|words| said.err.contains(words)), "{said:?}");
                }
                ALL.iter().for_each(|at| hosts.lose_disk(*at));
                hosts.start(&ALL);
                hosts.init(0, &ALL).await.ok();
                &ALL
            }
        };
        hosts.wait_ready(members).await;
        hosts.finish(members).await;
    }))
    .await;
}
