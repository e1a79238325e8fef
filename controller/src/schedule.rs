//! Which drones may take a new backend. Picking is pure; [`DroneCache`] keeps it from scanning all drones for every
//! request. A pick is only a proposal: `apply` checks the candidates again as of its own cluster time and takes the one
//! with the fewest backends.

use holdfast_core::kv::{ReadState, StateError};
use holdfast_core::limits::CANDIDATES_MAX;
use holdfast_core::records::DroneRecord;
use holdfast_core::view::{View, is_eligible};
use rand::Rng;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::{Mutex, MutexGuard};
use tokio::time::Instant;

/// How long a list of drones is used before the state is looked at again, and the shortest time between two looks. Far
/// below any sensible half of `renew`.
const LIST_VALID: Duration = Duration::from_millis(100);
/// Drones that one list looks at: some of those that were heard of lately, however many others there are.
const LIST_DRONES_MAX: usize = 20_000;

/// Drones that could take a backend as of some moment, by (cluster, pool).
#[derive(Debug, Default)]
pub struct DroneList {
    pools: HashMap<(String, String), Vec<Fit>>,
}

/// One drone that could take a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fit {
    drone_id: i32,
    /// Term in which its last heartbeat was recorded.
    heartbeat_term: u64,
}

impl DroneList {
    /// The eligible ones of `drones` at `now_ms` (cluster time).
    fn collect(drones: impl Iterator<Item = (i32, DroneRecord)>, now_ms: u64, renew_ms: u64) -> Self {
        let mut pools: HashMap<(String, String), Vec<Fit>> = HashMap::new();
        for (drone_id, drone) in drones {
            if let Some(heartbeat) = is_eligible(&drone, now_ms, renew_ms, None) {
                let fit = Fit { drone_id, heartbeat_term: heartbeat.term };
                pools.entry((drone.cluster, drone.pool)).or_default().push(fit);
            }
        }
        Self { pools }
    }

    /// Reads the drones that were heard of lately, up to `drones_max`. Nothing is eligible before the cluster is formed.
    fn read<R: ReadState>(view: &View<R>, now_ms: u64, drones_max: usize) -> Result<Self, StateError> {
        let Some(cluster) = view.cluster()? else { return Ok(Self::default()) };
        let renew_ms = cluster.lease.renew_ms;
        let drones = view.drones_heard(now_ms.saturating_sub(renew_ms / 2), drones_max)?;
        Ok(Self::collect(drones.into_iter(), now_ms, renew_ms))
    }

    /// Up to [`CANDIDATES_MAX`] different drones of that cluster and pool, at random. Those heard of in `term` are
    /// preferred if it is given and there are any: after a long time without a leader no others are accepted.
    pub fn pick(&self, cluster: &str, pool: &str, term: Option<u64>, rng: &mut impl Rng) -> Vec<i32> {
        let Some(fit) = self.pools.get(&(cluster.to_owned(), pool.to_owned())) else { return Vec::new() };
        let of_term: Vec<Fit>;
        let mut from = fit.as_slice();
        if let Some(term) = term {
            of_term = fit.iter().filter(|d| d.heartbeat_term == term).copied().collect();
            if !of_term.is_empty() {
                from = &of_term;
            }
        }
        let count = from.len().min(CANDIDATES_MAX);
        rand::seq::index::sample(rng, from.len(), count).iter().map(|at| from[at].drone_id).collect()
    }
}

/// A list that was read.
#[derive(Debug, Clone)]
struct Known {
    /// When the reading began: the list is not older.
    at: Instant,
    list: Arc<DroneList>,
}

/// The last list that was read. It is read when somebody asks, never more often than every [`LIST_VALID`], and not on the
/// threads that serve requests.
#[derive(Debug, Default)]
pub struct DroneCache {
    known: RwLock<Option<Known>>,
    /// Held by the one that reads; others use the older list meanwhile.
    reading: Mutex<()>,
}

impl DroneCache {
    fn known(&self) -> Option<Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A list that is at most [`LIST_VALID`] old, or the older one while somebody else reads a new one. `state` gives a
    /// state and its cluster time in milliseconds.
    pub async fn get<R: ReadState + Send + 'static>(
        &self,
        state: impl FnOnce() -> (View<R>, u64),
    ) -> Result<Arc<DroneList>, StateError> {
        let valid = |known: &Known| known.at.elapsed() <= LIST_VALID;
        let reading = match self.known() {
            Some(known) if valid(&known) => return Ok(known.list),
            Some(known) => match self.reading.try_lock() {
                Ok(reading) => reading,
                Err(_) => return Ok(known.list),
            },
            None => self.reading.lock().await,
        };
        match self.known() {
            // Somebody has just read it.
            Some(known) if valid(&known) => Ok(known.list),
            _ => self.read(&reading, state()).await,
        }
    }

    /// A list that was read after `asked`, from `state` (with its cluster time in milliseconds) if nobody else has done so.
    /// It waits until a list may be read again, so that requests that no drone fits don't make one each.
    pub async fn newer_than<R: ReadState + Send + 'static>(
        &self,
        asked: Instant,
        state: (View<R>, u64),
    ) -> Result<Arc<DroneList>, StateError> {
        let reading = self.reading.lock().await;
        let known = self.known();
        if let Some(known) = &known {
            if known.at >= asked {
                return Ok(Arc::clone(&known.list));
            }
            tokio::time::sleep_until(known.at + LIST_VALID).await;
        }
        self.read(&reading, state).await
    }

    async fn read<R: ReadState + Send + 'static>(
        &self,
        _reading: &MutexGuard<'_, ()>,
        (view, now_ms): (View<R>, u64),
    ) -> Result<Arc<DroneList>, StateError> {
        let at = Instant::now();
        let read = tokio::task::spawn_blocking(move || DroneList::read(&view, now_ms, LIST_DRONES_MAX));
        let list =
            read.await.unwrap_or_else(|error| Err(StateError::Read(format!("the drones: {error}"))))?;
        let list = Arc::new(list);
        *self.known.write().unwrap_or_else(PoisonError::into_inner) =
            Some(Known { at, list: Arc::clone(&list) });
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_core::codec::encode;
    use holdfast_core::kv::{MemState, Row, Table, Writes, keys};
    use holdfast_core::records::{ClusterRecord, HeartbeatRecord};
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn drone(pool: &str, heartbeat_at_ms: Option<u64>, draining: bool) -> DroneRecord {
        DroneRecord {
            cluster: "c:1".into(),
            name: "dr-a".into(),
            pool: pool.into(),
            incarnation: "i".into(),
            data_id: Some("m".into()),
            session: "s".into(),
            address: String::new(),
            registered_index: 1,
            is_listed: true,
            controller: 1,
            version: String::new(),
            git_hash: String::new(),
            draining,
            backend_count: 0,
            registered_at_ms: 0,
            heartbeat: heartbeat_at_ms.map(|at_ms| HeartbeatRecord {
                at_ms,
                term: at_ms / 10,
                local_time_ms: 0,
            }),
            drain_deadline_ms: None,
            leaving: false,
            heard_filed_at_ms: None,
        }
    }

    /// A formed cluster with the drones 1 to `count`, all fit at 100 ms.
    fn state(count: i32) -> MemState {
        let cluster = ClusterRecord {
            cluster_id: "x".into(),
            token_secret: [0; 32],
            lease: holdfast_wire::LeaseConfig::default(),
            terminated_keep_ms: 0,
        };
        let mut writes = Writes::new();
        writes.insert((Table::Meta, keys::CLUSTER.to_vec()), Some(encode(&cluster)));
        for id in 1..=count {
            writes.insert((Table::Drones, keys::drone(id)), Some(encode(&drone("", Some(90), false))));
            writes.insert((Table::DronesHeard, keys::timed(90, &keys::drone(id))), Some(Vec::new()));
        }
        let mut state = MemState::default();
        state.commit(writes);
        state
    }

    /// Counts the lists that are read from it.
    #[derive(Clone)]
    struct Counted(Arc<(MemState, AtomicU32)>);

    impl ReadState for Counted {
        fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StateError> {
            if table == Table::Meta {
                self.0.1.fetch_add(1, Ordering::SeqCst);
            }
            self.0.0.get(table, key)
        }

        fn scan(
            &self,
            table: Table,
            start: &[u8],
            end: Option<&[u8]>,
            limit: usize,
        ) -> Result<Vec<Row>, StateError> {
            self.0.0.scan(table, start, end, limit)
        }
    }

    /// Drones 1 to 25,000 have been silent for an hour, the last one has not.
    #[test]
    fn drones_that_are_silent_cost_nothing_and_hide_no_other() {
        const SILENT: i32 = 25_000;
        let now_ms = 3_600_000;
        let mut state = state(SILENT);
        let mut writes = Writes::new();
        let live = encode(&drone("", Some(now_ms - 1000), false));
        writes.insert((Table::Drones, keys::drone(SILENT + 1)), Some(live));
        let heard = keys::timed(now_ms - 1000, &keys::drone(SILENT + 1));
        writes.insert((Table::DronesHeard, heard), Some(Vec::new()));
        state.commit(writes);
        let view = View(state);
        let list = DroneList::read(&view, now_ms, 1).unwrap();
        for _ in 0..100 {
            assert_eq!(list.pick("c:1", "", None, &mut rand::rng()), [SILENT + 1]);
        }
        let early = DroneList::read(&View(MemState::default()), 100, 9).unwrap();
        assert!(early.pools.is_empty(), "the cluster is not formed");
    }

    #[tokio::test]
    async fn however_many_ask_the_drones_are_read_no_more_often_than_a_list_is_valid() {
        let counted = Counted(Arc::new((state(3), AtomicU32::new(0))));
        let cache = DroneCache::default();
        let start = Instant::now();
        let most = || 1 + u32::try_from(start.elapsed().as_millis() / LIST_VALID.as_millis()).unwrap();
        let reads = || counted.0.1.load(Ordering::SeqCst);
        futures::future::join_all((0..50).map(|_| cache.get(|| (View(counted.clone()), 100)))).await;
        assert!((1..=most()).contains(&reads()), "{}", reads());
        for _ in 0..2 {
            let before = reads();
            let ask = || cache.newer_than(Instant::now(), (View(counted.clone()), 100));
            let lists = futures::future::join_all((0..50).map(|_| ask())).await;
            assert!(
                lists.iter().all(|list| !list
                    .as_ref()
                    .unwrap()
                    .pick("c:1", "", None, &mut rand::rng())
                    .is_empty())
            );
            assert!(reads() > before, "a list that is older than the question does not do");
            assert!(reads() <= most(), "{}", reads());
        }
    }

    #[test]
    fn only_fresh_drones_that_neither_drain_nor_shut_down_of_the_cluster_and_pool_are_picked() {
        let drones = [
            (1, drone("", Some(90), false)),
            (2, drone("", Some(90), true)),
            (3, drone("", None, false)),
            (4, drone("gpu", Some(90), false)),
            (5, drone("", Some(10), false)),
            (6, DroneRecord { leaving: true, ..drone("", Some(90), false) }),
            (7, DroneRecord { is_listed: false, ..drone("", Some(90), false) }),
        ];
        let list = DroneList::collect(drones.into_iter(), 100, 100);
        let mut rng = rand::rng();
        assert_eq!(list.pick("c:1", "", None, &mut rng), vec![1]);
        assert_eq!(list.pick("c:1", "gpu", None, &mut rng), vec![4]);
        assert!(list.pick("c:1", "other", None, &mut rng).is_empty());
        assert!(list.pick("c:2", "", None, &mut rng).is_empty());
    }

    #[test]
    fn two_different_drones_are_picked_and_each_in_time() {
        let list = DroneList::collect((1..=5).map(|id| (id, drone("", Some(90), false))), 100, 100);
        let mut seen = BTreeSet::new();
        for _ in 0..200 {
            let picked = list.pick("c:1", "", None, &mut rand::rng());
            assert_eq!(picked.len(), 2);
            assert_ne!(picked[0], picked[1]);
            seen.extend(picked);
        }
        assert_eq!(seen, BTreeSet::from([1, 2, 3, 4, 5]));
    }

    #[test]
    fn drones_heard_of_in_the_term_come_first_but_others_are_better_than_none() {
        let drones = [(1, drone("", Some(80), false)), (2, drone("", Some(90), false))];
        let list = DroneList::collect(drones.into_iter(), 100, 100);
        assert_eq!(list.pick("c:1", "", Some(9), &mut rand::rng()), vec![2]);
        assert_eq!(list.pick("c:1", "", Some(77), &mut rand::rng()).len(), 2);
    }
}
