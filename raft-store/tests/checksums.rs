//! Replicas whose states differ (invariant 6): one row of a stopped replica's state is changed on its disk, and the next
//! entry that rewrites this row gives it another checksum. Replicas in one process, on real disks and sockets.

#![allow(clippy::unwrap_used)]

use holdfast_core::codec::encode;
use holdfast_core::command::{
    Acquire, Command, HeartbeatItem, Proposal, RegisterDrone, Renew, RenewKey, Spawn,
};
use holdfast_core::kv::{Table, keys};
use holdfast_core::limits::CHECKSUM_EVERY;
use holdfast_core::outcome::{Outcome, Refusal, RenewOutcome};
use holdfast_core::records::ChecksumSplit;
use holdfast_wire::{KeyConfig, LeaseConfig};
use raft_store::{ChecksumState, ChecksumStatus, MemberError, ProposeError, Store, StoreConfig, inspect};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;
use tempfile::TempDir;

mod common;

const DEADLINE: Duration = Duration::from_secs(30);
const SNAPSHOT_EVERY: u64 = 64;

fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// A cluster with one key, "held", that a drone renews.
struct Cluster {
    dir: TempDir,
    addrs: BTreeMap<u64, SocketAddr>,
    stores: BTreeMap<u64, Store>,
    drone_id: i32,
}

impl Cluster {
    async fn start(members: u64) -> Self {
        let this = Self::start_without_keys(members).await;
        assert!(matches!(this.acquire(1, "held").await, Outcome::Acquired(_)));
        this
    }

    async fn start_without_keys(members: u64) -> Self {
        let addrs = (1..=members).map(|id| (id, free_addr())).collect();
        let dir = TempDir::new().unwrap();
        let mut this = Self { dir, addrs, stores: BTreeMap::new(), drone_id: 0 };
        let configs: Vec<StoreConfig> = (1..=members).map(|id| this.config(id)).collect();
        let dialled = this.addrs.values().map(SocketAddr::to_string).collect();
        for store in common::form(&configs, dialled, LeaseConfig::default()).await {
            this.stores.insert(store.id(), store);
        }
        let register = Command::RegisterDrone(RegisterDrone {
            cluster: "c".into(),
            name: "dr-a".into(),
            pool: String::new(),
            incarnation: "i1".into(),
            session: "s1".into(),
            controller: 1,
            take_over: false,
            version: "0".into(),
            git_hash: "0".into(),
        });
        let Outcome::Registered { drone_id } = this.propose(1, register).await else {
            panic!("not registered")
        };
        this.drone_id = drone_id;
        this
    }

    fn config(&self, id: u64) -> StoreConfig {
        StoreConfig {
            data_dir: self.dir.path().join(id.to_string()),
            peer_listen: self.addrs[&id],
            advertise_url: format!("http://controller-{id}"),
            terminated_keep_ms: 3_600_000,
            election_timeout_ms: 500,
            snapshot_every: SNAPSHOT_EVERY,
            disk_reserve_bytes: 0,
        }
    }

    async fn open(&mut self, id: u64) -> Result<(), String> {
        let store = Store::open_member(self.config(id)).await.map_err(|error| error.to_string())?;
        self.stores.insert(id, store);
        Ok(())
    }

    async fn stop(&mut self, id: u64) {
        self.stores.remove(&id).unwrap().stop().await;
    }

    async fn stop_all(mut self) {
        for id in self.stores.keys().copied().collect::<Vec<_>>() {
            self.stop(id).await;
        }
    }

    fn store(&self, id: u64) -> &Store {
        &self.stores[&id]
    }

    async fn leader(&self) -> u64 {
        let (_, any) = self.stores.iter().next().unwrap();
        let mut leader = any.leader();
        let stores = &self.stores;
        let found = leader.wait_for(|l| l.as_ref().is_some_and(|l| stores.contains_key(&l.id)));
        tokio::time::timeout(DEADLINE, found).await.unwrap().unwrap().as_ref().unwrap().id
    }

    /// Has the member lead, no matter which one leads now.
    async fn make_leader(&self, id: u64) {
        let asked = async {
            while !self.store(id).status().is_leader {
                for store in self.stores.values().filter(|store| store.status().is_leader) {
                    store.transfer_leadership_to(id, Duration::from_secs(2)).await;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, asked).await.unwrap();
    }

    async fn follower(&self) -> u64 {
        let leader = self.leader().await;
        *self.stores.keys().find(|id| **id != leader).unwrap()
    }

    async fn propose(&self, through: u64, command: Command) -> Outcome {
        let proposal = Proposal { command, idempotency: None };
        loop {
            match self.store(through).propose(proposal.clone(), DEADLINE).await {
                Ok(answer) => return answer.outcome,
                // The leader has just stopped; what is proposed here can be proposed twice.
                Err(ProposeError::OutcomeUnknown(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    async fn acquire(&self, through: u64, name: &str) -> Outcome {
        let beat = HeartbeatItem { drone_id: self.drone_id, session: "s1".into(), local_time_ms: 1_000 };
        self.propose(through, Command::Heartbeats(vec![beat])).await;
        let spawn = Spawn {
            backend_id: format!("ba-{name}"),
            id_supplied: false,
            cluster: "c".into(),
            pool: String::new(),
            candidates: vec![self.drone_id],
            executable_json: "{}".into(),
            lifetime_limit_seconds: None,
            max_idle_seconds: None,
            static_token: None,
            secret_token: "x".into(),
            subdomain: None,
        };
        let key = KeyConfig { name: name.into(), ..KeyConfig::default() };
        self.propose(through, Command::Acquire(Box::new(Acquire { key, spawn: Some(spawn) }))).await
    }

    /// Renews the key, which rewrites its record, and continues to the next index at which checksums are published.
    async fn renew(&self, through: u64) {
        let keys = vec![RenewKey { backend_id: "ba-held".into(), token: None }];
        let renewed = self.propose(through, Command::Renew(Renew { drone_id: self.drone_id, keys })).await;
        assert_eq!(renewed, Outcome::Renewed(vec![RenewOutcome::Renewed]));
        self.tick(through, CHECKSUM_EVERY).await;
    }

    async fn tick(&self, through: u64, times: u64) {
        for _ in 0..times {
            self.propose(through, Command::Tick).await;
        }
    }

    /// All members that run have applied what is committed.
    async fn settle(&self) {
        let index = self.store(self.leader().await).status().last_log;
        for store in self.stores.values() {
            store.wait_applied(index, DEADLINE).await.unwrap();
        }
    }

    /// Stops a member, changes the record of the key on its disk, and starts the member again.
    async fn corrupt(&mut self, id: u64, tag: &str) {
        self.settle().await;
        self.stop(id).await;
        {
            let disk = inspect::open(&self.config(id).data_dir).unwrap();
            let mut record = disk.view().key("", "held").unwrap().unwrap();
            record.tag = tag.to_owned();
            disk.overwrite(Table::Keys, &keys::pair("", "held"), encode(&record)).unwrap();
        }
        self.open(id).await.unwrap();
        self.settle().await;
        assert_eq!(self.tag(id), tag);
    }

    fn tag(&self, id: u64) -> String {
        self.store(id).local().view.key("", "held").unwrap().unwrap().tag
    }

    fn checksums(&self, id: u64) -> ChecksumStatus {
        self.store(id).status().checksums
    }

    async fn until(&self, id: u64, what: impl Fn(&ChecksumStatus) -> bool) -> ChecksumStatus {
        let poll = async {
            loop {
                let status = self.checksums(id);
                if what(&status) {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let found = tokio::time::timeout(DEADLINE, poll).await;
        found.unwrap_or_else(|_| panic!("member {id} stays at {:?}", self.checksums(id)))
    }

    async fn until_state(&self, id: u64, state: ChecksumState) -> ChecksumStatus {
        self.until(id, |status| status.state == state).await
    }

    /// Waits until the split is in the replicated state.
    async fn recorded(&self, id: u64) -> ChecksumSplit {
        let record = || self.store(id).local().view.checksums().unwrap().split;
        self.until(id, |_| record().is_some()).await;
        record().unwrap()
    }

    /// The member stops for good, also over a restart. Says why.
    async fn stops_for_good(&mut self, id: u64) -> String {
        let why = tokio::time::timeout(DEADLINE, self.store(id).failed()).await.unwrap();
        let tick = Proposal { command: Command::Tick, idempotency: None };
        assert!(self.store(id).propose(tick, DEADLINE).await.is_err(), "it still takes proposals");
        self.stop(id).await;
        let refused = self.open(id).await.unwrap_err();
        assert!(refused.contains(&why), "{refused}");
        why
    }

    /// A key is acquired. A change of the leader in between can make the drone's heartbeat too old.
    async fn assert_acquires(&self, through: u64) {
        let acquired = async {
            loop {
                match self.acquire(through, "free").await {
                    Outcome::Acquired(_) | Outcome::Found(_) => return,
                    Outcome::Refused(Refusal::NoDrone) => {}
                    other => panic!("not acquired: {other:?}"),
                }
            }
        };
        tokio::time::timeout(DEADLINE, acquired).await.unwrap();
    }

    async fn assert_refused(&self, through: u64) {
        let refused = self.acquire(through, "free").await;
        assert!(matches!(refused, Outcome::Refused(Refusal::ChecksumsDiffer { .. })), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_that_differs_stops_and_the_others_continue() {
    let mut cluster = Cluster::start(3).await;
    let bad = cluster.follower().await;
    cluster.corrupt(bad, "wrong").await;
    let leader = cluster.leader().await;
    cluster.renew(leader).await;
    let why = cluster.stops_for_good(bad).await;
    assert!(why.contains("a majority of the voters has") && why.contains(&format!("member {bad}")), "{why}");
    assert!(why.contains("cluster remove") && why.contains("cluster add"), "{why}");
    for id in cluster.stores.keys() {
        let status = cluster.until(*id, |status| status.differing == [bad]).await;
        assert_eq!(status.state, ChecksumState::Agrees);
    }
    cluster.assert_acquires(leader).await;
    cluster.stop_all().await;
}

/// Five members, of which one lags so far that it needs a snapshot. It must not get one of the leader whose state is
/// wrong.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_differs_hands_over_and_sends_no_snapshot() {
    let mut cluster = Cluster::start(5).await;
    let lagging = cluster.follower().await;
    cluster.settle().await;
    cluster.stop(lagging).await;
    let leader = cluster.leader().await;
    cluster.tick(leader, SNAPSHOT_EVERY * 6).await;
    let bad = *cluster.stores.keys().find(|id| **id != leader).unwrap();
    cluster.corrupt(bad, "wrong").await;
    cluster.make_leader(bad).await;
    assert!(cluster.store(bad).log_begins_at() > SNAPSHOT_EVERY, "the log still holds what the other lacks");
    let good = *cluster.stores.keys().find(|id| **id != bad).unwrap();
    cluster.renew(good).await;
    // From here on a snapshot of the leader's state would be a wrong one.
    cluster.open(lagging).await.unwrap();
    let why = cluster.stops_for_good(bad).await;
    assert!(why.contains("a majority of the voters has"), "{why}");
    assert_ne!(cluster.leader().await, bad);
    cluster.renew(good).await;
    cluster.settle().await;
    for id in cluster.stores.keys() {
        cluster.until_state(*id, ChecksumState::Agrees).await;
        assert_eq!(cluster.tag(*id), "", "member {id} got the wrong state");
    }
    cluster.assert_acquires(good).await;
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_voters_that_differ_acquire_nothing_until_an_operator_decides() {
    let mut cluster = Cluster::start(2).await;
    cluster.corrupt(2, "wrong").await;
    cluster.renew(1).await;
    for id in [1, 2] {
        let status = cluster.until_state(id, ChecksumState::Split).await;
        assert_eq!(status.values.len(), 2, "{status:?}");
        cluster.assert_refused(id).await;
    }
    // Keys that are held stay held.
    cluster.renew(1).await;
    let ChecksumSplit { index, values } = cluster.recorded(1).await;
    let right = values[0].1;
    for (index, value, named) in [(index + 1, right, "index"), (index, right ^ 1, "value")] {
        let refused = cluster.store(2).accept_checksum(index, value, DEADLINE).await.unwrap_err();
        let MemberError::Invalid { field, problem } = refused else { panic!("{refused:?}") };
        assert_eq!(field, named);
        assert!(problem.contains(&format!("member 1 has {right:016x}")), "{problem}");
    }
    assert_eq!(cluster.store(1).accept_checksum(index, right, DEADLINE).await, Ok(true));
    let why = cluster.stops_for_good(2).await;
    assert!(why.contains("was removed from the cluster"), "{why}");
    cluster.until_state(1, ChecksumState::Agrees).await;
    cluster.assert_acquires(1).await;
    assert_eq!(cluster.store(1).accept_checksum(index, right, DEADLINE).await, Ok(false), "the same again");
    let refused = cluster.store(1).accept_checksum(index, right ^ 1, DEADLINE).await;
    assert!(matches!(refused, Err(MemberError::Unsafe(_))), "{refused:?}");
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_different_states_stay_split_over_restarts_until_one_is_accepted() {
    let mut cluster = Cluster::start(3).await;
    cluster.corrupt(2, "wrong").await;
    cluster.corrupt(3, "wrong too").await;
    cluster.renew(1).await;
    for id in 1..=3 {
        cluster.until_state(id, ChecksumState::Split).await;
        cluster.assert_refused(id).await;
    }
    for id in 1..=3 {
        cluster.stop(id).await;
    }
    for id in 1..=3 {
        cluster.open(id).await.unwrap();
    }
    cluster.leader().await;
    for id in 1..=3 {
        cluster.assert_refused(id).await;
    }
    assert_eq!(cluster.recorded(1).await.values.len(), 3);
    // Many entries later the values are still known, and a member that does not lead can be the right one.
    cluster.tick(1, 20 * CHECKSUM_EVERY).await;
    let chosen = cluster.follower().await;
    let ChecksumSplit { index, values } = cluster.recorded(chosen).await;
    let (_, right) = values[usize::try_from(chosen).unwrap() - 1];
    assert_eq!(cluster.store(chosen).accept_checksum(index, right, DEADLINE).await, Ok(true));
    for id in (1..=3).filter(|id| *id != chosen) {
        cluster.stops_for_good(id).await;
    }
    cluster.assert_acquires(chosen).await;
    let voters: Vec<u64> = cluster.store(chosen).status().members.iter().map(|member| member.id).collect();
    assert_eq!(voters, [chosen]);
    cluster.stop_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_value_changes_nothing() {
    let mut cluster = Cluster::start(3).await;
    let away = cluster.follower().await;
    cluster.settle().await;
    cluster.stop(away).await;
    let leader = cluster.leader().await;
    cluster.renew(leader).await;
    let published = cluster.store(leader).status().last_log / CHECKSUM_EVERY * CHECKSUM_EVERY;
    for id in cluster.stores.keys() {
        let status = cluster.until(*id, |status| status.index >= published).await;
        assert_eq!((status.state, status.differing), (ChecksumState::Agrees, vec![]));
    }
    cluster.assert_acquires(leader).await;
    cluster.open(away).await.unwrap();
    cluster.settle().await;
    cluster.until(away, |status| status.state == ChecksumState::Agrees && status.index >= published).await;
    cluster.stop_all().await;
}

/// While the third value is missing nothing is acquired; when it comes, a majority decides and no operator is needed.
#[tokio::test(flavor = "multi_thread")]
async fn a_doubt_ends_when_the_missing_value_comes() {
    let mut cluster = Cluster::start(3).await;
    cluster.settle().await;
    let away = cluster.follower().await;
    cluster.stop(away).await;
    let leader = cluster.leader().await;
    let bad = *cluster.stores.keys().find(|id| **id != leader).unwrap();
    cluster.corrupt(bad, "wrong").await;
    let good = *cluster.stores.keys().find(|id| **id != bad).unwrap();
    cluster.renew(good).await;
    for id in [good, bad] {
        cluster.until_state(id, ChecksumState::Undecided).await;
        cluster.assert_refused(id).await;
    }
    let status = cluster.checksums(good);
    let early = cluster.store(good).accept_checksum(status.index, status.values[0].1, DEADLINE).await;
    assert!(matches!(early, Err(MemberError::Unsafe(_))), "{early:?}");
    cluster.open(away).await.unwrap();
    cluster.stops_for_good(bad).await;
    cluster.until_state(good, ChecksumState::Agrees).await;
    cluster.assert_acquires(good).await;
    assert_eq!(cluster.store(good).local().view.checksums().unwrap(), Default::default());
    cluster.stop_all().await;
}

/// A value that stays missing is not waited for: the split is recorded, and ends by the operator's decision alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_doubt_that_lasts_becomes_a_split_for_the_operator() {
    let mut cluster = Cluster::start(3).await;
    cluster.settle().await;
    let away = cluster.follower().await;
    cluster.stop(away).await;
    let leader = cluster.leader().await;
    let bad = *cluster.stores.keys().find(|id| **id != leader).unwrap();
    cluster.corrupt(bad, "wrong").await;
    let good = *cluster.stores.keys().find(|id| **id != bad).unwrap();
    cluster.renew(good).await;
    cluster.until_state(good, ChecksumState::Split).await;
    cluster.until_state(bad, ChecksumState::Split).await;
    cluster.recorded(good).await;
    cluster.open(away).await.unwrap();
    cluster.stops_for_good(bad).await;
    // A majority agrees now, but the record stands until the operator has looked.
    cluster.settle().await;
    for id in [good, away] {
        cluster.assert_refused(id).await;
    }
    let status = cluster.until_state(good, ChecksumState::Split).await;
    let right = status.values.iter().find(|(member, _)| *member == good).unwrap().1;
    assert_eq!(cluster.store(away).accept_checksum(status.index, right, DEADLINE).await, Ok(true));
    for id in [good, away] {
        cluster.until_state(id, ChecksumState::Agrees).await;
    }
    cluster.assert_acquires(away).await;
    cluster.stop_all().await;
}

/// What was written last is compared although nothing follows and no key is held.
#[tokio::test(flavor = "multi_thread")]
async fn an_idle_cluster_compares_what_it_wrote_last() {
    let cluster = Cluster::start_without_keys(3).await;
    let last = cluster.store(cluster.leader().await).status().last_log;
    assert!(!last.is_multiple_of(CHECKSUM_EVERY));
    for id in 1..=3 {
        let status = cluster.until(id, |status| status.index > last).await;
        assert_eq!(status.state, ChecksumState::Agrees);
    }
    // It is quiet again once that is compared.
    let quiet = cluster.store(1).status().last_log;
    assert!(quiet.is_multiple_of(CHECKSUM_EVERY) && quiet - last < CHECKSUM_EVERY, "{last} {quiet}");
    cluster.stop_all().await;
}
