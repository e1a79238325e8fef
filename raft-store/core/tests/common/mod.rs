//! What several test files need: a state under a log, builders of commands, and the invariants of the tables.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use holdfast_core::apply::{Applied, Position, apply, apply_blank, apply_membership};
use holdfast_core::codec::decode;
use holdfast_core::command::{
    Acquire, Command, FormCluster, FromDrone, HeartbeatItem, Idempotency, Proposal, RegisterDrone,
    ReportStates, Spawn, Stamp, StateReport,
};
use holdfast_core::kv::{MemState, Table, Txn, Writes, keys};
use holdfast_core::listing::{Differences, Listing};
use holdfast_core::records::{
    ActionRecord, BackendRecord, DroneRecord, IdempotencyRecord, KeyRecord, PendingAction, Presence,
    ProgressRecord,
};
use holdfast_core::view::View;
use holdfast_wire::drone::ListedBackend;
use holdfast_wire::{
    BackendState, BackendStatus, KeyConfig, LeaseConfig, TerminationKind, TerminationReason,
};
use std::collections::{BTreeMap, BTreeSet};

/// Default lease: 30 / 40 / 50 / 60 s.
pub const LEASE: LeaseConfig =
    LeaseConfig { renew_ms: 30_000, soft_terminate_ms: 40_000, hard_terminate_ms: 50_000, expiry_ms: 60_000 };

/// A state and where its log stands.
#[derive(Debug, Clone, Default)]
pub struct Replica {
    pub state: MemState,
    pub index: u64,
}

impl Replica {
    pub fn view(&self) -> View<&MemState> {
        View(&self.state)
    }

    pub fn progress(&self) -> ProgressRecord {
        self.view().progress().unwrap()
    }

    /// Applies the next entry and commits it; also says what it wrote.
    pub fn apply(&mut self, term: u64, stamp: Stamp, proposal: &Proposal) -> (Applied, Writes) {
        self.index += 1;
        let mut txn = Txn::new(&self.state);
        let applied = apply(&mut txn, Position { term, index: self.index }, stamp, proposal).unwrap();
        let writes = txn.into_writes();
        self.state.commit(writes.clone());
        (applied, writes)
    }

    pub fn members(&mut self, term: u64, ids: &[u64]) -> Writes {
        self.index += 1;
        let mut txn = Txn::new(&self.state);
        let at = Position { term, index: self.index };
        apply_membership(&mut txn, at, ids.iter().copied()).unwrap();
        let writes = txn.into_writes();
        self.state.commit(writes.clone());
        writes
    }

    pub fn blank(&mut self, term: u64) {
        self.index += 1;
        let mut txn = Txn::new(&self.state);
        apply_blank(&mut txn, Position { term, index: self.index }).unwrap();
        let writes = txn.into_writes();
        self.state.commit(writes);
    }
}

pub fn stamp(cluster_time_ms: u64) -> Stamp {
    Stamp { cluster_time_ms, own_term_only: false }
}

pub fn plain(command: Command) -> Proposal {
    Proposal { command, idempotency: None }
}

pub fn idempotent(command: Command, key: &str, digest: u8) -> Proposal {
    Proposal { command, idempotency: Some(Idempotency { key: key.to_owned(), body_digest: [digest; 16] }) }
}

pub fn form(lease: LeaseConfig, terminated_keep_ms: u64) -> Command {
    Command::FormCluster(FormCluster {
        cluster_id: "cluster-1".to_owned(),
        token_secret: [7; 32],
        lease,
        terminated_keep_ms,
    })
}

pub fn key(name: &str, tag: &str) -> KeyConfig {
    KeyConfig { name: name.to_owned(), namespace: String::new(), tag: tag.to_owned() }
}

pub fn spawn(backend_id: &str, candidates: &[i32]) -> Spawn {
    Spawn {
        backend_id: backend_id.to_owned(),
        id_supplied: false,
        cluster: "c".to_owned(),
        pool: String::new(),
        candidates: candidates.to_vec(),
        executable_json: "{}".to_owned(),
        lifetime_limit_seconds: None,
        max_idle_seconds: None,
        static_token: None,
        secret_token: "secret".to_owned(),
        subdomain: None,
    }
}

pub fn acquire(key: KeyConfig, spawn: Option<Spawn>) -> Command {
    Command::Acquire(Box::new(Acquire { key, spawn }))
}

/// A session of a drone of Plane's, from nowhere that is known.
pub fn register(name: &str, incarnation: &str, session: &str, take_over: bool) -> Command {
    register_from(name, incarnation, session, take_over, None, "")
}

/// A session, of one of our drones if it gives a data id.
pub fn register_from(
    name: &str,
    incarnation: &str,
    session: &str,
    take_over: bool,
    data_id: Option<&str>,
    address: &str,
) -> Command {
    Command::RegisterDrone(RegisterDrone {
        cluster: "c".to_owned(),
        name: name.to_owned(),
        pool: String::new(),
        incarnation: incarnation.to_owned(),
        data_id: data_id.map(str::to_owned),
        address: address.to_owned(),
        session: session.to_owned(),
        controller: 1,
        take_over,
        version: "1".to_owned(),
        git_hash: "abc".to_owned(),
    })
}

pub fn heartbeat(drone_id: i32, session: &str, local_time_ms: i64) -> HeartbeatItem {
    HeartbeatItem { drone_id, session: session.to_owned(), local_time_ms }
}

pub fn report(drone_id: i32, backend_id: &str, state: BackendState, token: Option<u64>) -> Command {
    report_from(drone_id, None, backend_id, state, token)
}

pub fn report_from(
    drone_id: i32,
    data_id: Option<&str>,
    backend_id: &str,
    state: BackendState,
    token: Option<u64>,
) -> Command {
    Command::ReportStates(ReportStates {
        drone_id,
        data_id: data_id.map(str::to_owned),
        reports: vec![StateReport { backend_id: backend_id.to_owned(), state, token }],
    })
}

/// A complete list of a drone's session, as the controller that has it compares it with the state.
pub fn list(view: &View<&MemState>, drone_id: i32, backends: &[ListedBackend]) -> Differences {
    let drone = view.drone(drone_id).unwrap().unwrap();
    let mut listing = Listing::begin(view, drone_id, &drone).unwrap();
    listing.page(view, backends).unwrap();
    listing.finish()
}

/// The entries of a list.
pub fn listed(differences: &Differences) -> Command {
    Command::Together(differences.entries.iter().cloned().map(FromDrone::Listed).collect())
}

pub fn listed_backend(backend: &str, status: Option<BackendStatus>) -> ListedBackend {
    ListedBackend { backend: backend.to_owned(), token: None, state: status.map(state_of) }
}

/// Some state with that status.
pub fn state_of(status: BackendStatus) -> BackendState {
    let address = "10.0.0.1:8080".parse().unwrap();
    let last_status = BackendStatus::Ready;
    match status {
        BackendStatus::Scheduled => BackendState::Scheduled,
        BackendStatus::Loading => BackendState::Loading,
        BackendStatus::Starting => BackendState::Starting,
        BackendStatus::Waiting => BackendState::Waiting { address },
        BackendStatus::Ready => BackendState::Ready { address },
        BackendStatus::Terminating => BackendState::Terminating {
            last_status,
            termination: TerminationKind::Soft,
            reason: TerminationReason::External,
        },
        BackendStatus::HardTerminating => {
            BackendState::HardTerminating { last_status, reason: TerminationReason::External }
        }
        BackendStatus::Terminated => {
            BackendState::Terminated { last_status, termination: None, reason: None, exit_code: Some(0) }
        }
    }
}

pub const STATUSES: [BackendStatus; 8] = [
    BackendStatus::Scheduled,
    BackendStatus::Loading,
    BackendStatus::Starting,
    BackendStatus::Waiting,
    BackendStatus::Ready,
    BackendStatus::Terminating,
    BackendStatus::HardTerminating,
    BackendStatus::Terminated,
];

/// What must hold between the tables after every entry.
pub fn tables_agree(state: &MemState) {
    let mut tables: BTreeMap<Table, BTreeMap<&[u8], &[u8]>> = BTreeMap::new();
    for ((table, key), value) in state.rows() {
        tables.entry(*table).or_default().insert(key, value);
    }
    let table = |t: Table| tables.get(&t).cloned().unwrap_or_default();
    let progress = View(state).progress().unwrap();
    let backends: BTreeMap<String, BackendRecord> = table(Table::Backends)
        .into_iter()
        .map(|(id, bytes)| (String::from_utf8(id.to_vec()).unwrap(), decode(bytes).unwrap()))
        .collect();

    // Each key has one entry in the expiry index, and there are no others.
    let mut filed = BTreeSet::new();
    for (name, bytes) in table(Table::Keys) {
        let key: KeyRecord = decode(bytes).unwrap();
        let entry = keys::timed(key.indexed_at_ms, name);
        assert_eq!(table(Table::KeyExpiry).get(entry.as_slice()), Some(&&key.token.to_be_bytes()[..]));
        assert!(key.indexed_at_ms <= key.expires_at_ms, "the index is never late");
        filed.insert(entry);
        let backend = &backends[&key.backend_id];
        assert_eq!((backend.token, backend.drone_id), (key.token, key.drone_id));
        assert_eq!(keys::pair(&backend.key.namespace, &backend.key.name), name);
        assert!(
            backend.state().status() < BackendStatus::Terminated
                || backend.spawn_repeated && backend.presence == Presence::Leaving,
            "a terminated backend holds no key unless its spawn was sent twice"
        );
    }
    assert_eq!(table(Table::KeyExpiry).len(), filed.len());
    assert_eq!(progress.keys_held, filed.len() as u64);

    // Live backends hold their keys and are counted by their drones; the others are filed to be swept.
    let mut live: BTreeMap<i32, u64> = BTreeMap::new();
    let mut of_drones = BTreeMap::new();
    let (mut terminated, mut supplied) = (BTreeSet::new(), BTreeSet::new());
    for (id, backend) in &backends {
        if backend.id_supplied {
            assert!(table(Table::SuppliedIds).contains_key(id.as_bytes()), "{id}");
        }
        if backend.id_supplied && backend.state().status() < BackendStatus::Terminated {
            supplied.insert(id.as_bytes());
        }
        assert!(backend.history.windows(2).all(|w| w[0].1.status() < w[1].1.status() && w[0].0 <= w[1].0));
        let held_by_it = View(state)
            .key(&backend.key.namespace, &backend.key.name)
            .unwrap()
            .is_some_and(|key| key.backend_id == *id);
        if backend.state().status() == BackendStatus::Terminated {
            if held_by_it {
                continue;
            }
            terminated.insert(keys::timed(backend.history.last().unwrap().0, id.as_bytes()));
        } else {
            assert!(held_by_it, "the live backend {id} has no key");
            *live.entry(backend.drone_id).or_default() += 1;
            of_drones.insert(keys::drone_backend(backend.drone_id, id), backend.token.to_be_bytes().to_vec());
        }
    }
    let filed: BTreeMap<Vec<u8>, Vec<u8>> =
        table(Table::DroneBackends).iter().map(|(key, token)| (key.to_vec(), token.to_vec())).collect();
    assert_eq!(filed, of_drones);
    // A supplied id is forgotten after its backend ended, and only then.
    let forgotten: BTreeSet<&[u8]> =
        table(Table::SuppliedEnds).into_keys().map(|entry| keys::split_timed(entry).unwrap().1).collect();
    assert!(forgotten.is_disjoint(&supplied));
    assert_eq!(table(Table::SuppliedIds).len(), forgotten.len() + supplied.len());
    let filed: BTreeSet<Vec<u8>> = table(Table::Terminated).keys().map(|k| k.to_vec()).collect();
    assert_eq!(filed, terminated);
    let mut heard = BTreeSet::new();
    for (id, bytes) in table(Table::Drones) {
        let id = keys::split_drone(id).unwrap();
        let drone: DroneRecord = decode(bytes).unwrap();
        assert_eq!(drone.backend_count, live.get(&id).copied().unwrap_or(0), "drone {id}");
        assert_eq!(View(state).drone_by_name(&drone.cluster, &drone.name).unwrap().unwrap().0, id);
        assert!(id <= progress.last_drone_id);
        if let Some(at_ms) = drone.heard_filed_at_ms {
            assert!(at_ms <= drone.heard_at_ms());
            heard.insert(keys::timed(at_ms, &keys::drone(id)));
        } else {
            assert!(drone.draining || drone.backend_count > 0, "drone {id} would never be swept");
        }
    }
    let filed: BTreeSet<Vec<u8>> = table(Table::DronesHeard).keys().map(|k| k.to_vec()).collect();
    assert_eq!(filed, heard);
    assert_eq!(table(Table::DroneNames).len(), table(Table::Drones).len());

    // What a limit will end is filed under that time, and nothing else is.
    let index = |t: Table| -> BTreeSet<Vec<u8>> { table(t).keys().map(|k| k.to_vec()).collect() };
    let filed = backends.iter().filter_map(|(id, backend)| {
        assert_eq!(backend.end_filed_at_ms, backend.ends_at_ms(), "{id}");
        backend.end_filed_at_ms.map(|at_ms| keys::timed(at_ms, id.as_bytes()))
    });
    assert_eq!(index(Table::BackendEnds), filed.collect());
    // An entry of a drain stands for its drone's deadline; it goes when the pass is over, the deadline does not.
    for entry in index(Table::DrainEnds) {
        let (at_ms, drone_id) = keys::split_timed(&entry).unwrap();
        let drone = View(state).drone(keys::split_drone(drone_id).unwrap()).unwrap().unwrap();
        assert!(drone.draining && drone.drain_deadline_ms == Some(at_ms), "{drone:?}");
    }

    // Every action is that of its backend's records, and stands where they say.
    for (place, bytes) in table(Table::Actions) {
        let action: ActionRecord = decode(bytes).unwrap();
        let backend = &backends[&action.backend_id];
        assert_eq!(keys::drone(backend.drone_id), place[..4]);
        let (index, sub) = keys::split_action(place).unwrap();
        match action.action {
            PendingAction::Spawn { token, .. } => {
                assert_eq!((token, index, sub), (backend.token, backend.token, 0));
                assert_eq!(backend.state().status(), BackendStatus::Scheduled, "{}", action.backend_id);
            }
            PendingAction::Terminate { .. } => assert_eq!(backend.terminate_action, Some((index, sub))),
        }
    }

    let mut filed = BTreeSet::new();
    for (key, bytes) in table(Table::Idempotency) {
        let record: IdempotencyRecord = decode(bytes).unwrap();
        filed.insert(keys::timed(record.expires_at_ms, key));
    }
    assert_eq!(index(Table::IdempotencyExpiry), filed);
    assert_eq!(progress.idempotency_records, filed.len() as u64);
    assert_eq!(progress.supplied_ids, table(Table::SuppliedIds).len() as u64);
}
