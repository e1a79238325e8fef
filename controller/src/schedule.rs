//! Which drones may take a new backend. Picking is pure; [`DroneCache`] keeps it from scanning all drones for every
//! request. A pick is only a proposal: `apply` checks the candidates again as of its own cluster time and takes the one
//! with the fewest backends.

use holdfast_core::kv::{ReadState, StateError};
use holdfast_core::limits::CANDIDATES_MAX;
use holdfast_core::records::DroneRecord;
use holdfast_core::view::{View, is_eligible};
use rand::Rng;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

/// How long a list of drones is used before the local state is looked at again. Far below any sensible half of `renew`.
const LIST_VALID: Duration = Duration::from_millis(100);
/// Drones per scan.
const SCAN_DRONES: usize = 1000;

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

    /// Reads all drones. Nothing is eligible before the cluster is formed.
    pub fn read<R: ReadState>(view: &View<R>, now_ms: u64) -> Result<Self, StateError> {
        let Some(cluster) = view.cluster()? else { return Ok(Self::default()) };
        let mut all = Vec::new();
        let mut after = 0;
        loop {
            let page = view.drones(after, SCAN_DRONES)?;
            let full = page.len() == SCAN_DRONES;
            let Some((last, _)) = page.last() else { break };
            after = *last;
            all.extend(page);
            if !full {
                break;
            }
        }
        Ok(Self::collect(all.into_iter(), now_ms, cluster.lease.renew_ms))
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

/// The last list that was read from the local state.
#[derive(Debug, Default)]
pub struct DroneCache {
    list: RwLock<Option<(Instant, Arc<DroneList>)>>,
    /// Held by the one that reads; others use the older list meanwhile.
    reading: Mutex<()>,
}

impl DroneCache {
    /// A list that is at most [`LIST_VALID`] old, or the older one while somebody else reads a new one.
    pub fn get<R: ReadState>(
        &self,
        read: impl FnOnce() -> (View<R>, u64),
    ) -> Result<Arc<DroneList>, StateError> {
        let known = self.list.read().unwrap_or_else(PoisonError::into_inner).clone();
        let _reading: MutexGuard<'_, ()> = match known {
            Some((at, list)) if at.elapsed() <= LIST_VALID => return Ok(list),
            Some((_, list)) => match self.reading.try_lock() {
                Ok(guard) => guard,
                Err(_) => return Ok(list),
            },
            None => self.reading.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let (view, now_ms) = read();
        self.refresh(&view, now_ms)
    }

    /// Reads a list from `view` and keeps it.
    pub fn refresh<R: ReadState>(&self, view: &View<R>, now_ms: u64) -> Result<Arc<DroneList>, StateError> {
        let list = Arc::new(DroneList::read(view, now_ms)?);
        *self.list.write().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), Arc::clone(&list)));
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_core::records::HeartbeatRecord;
    use std::collections::BTreeSet;

    fn drone(pool: &str, heartbeat_at_ms: Option<u64>, draining: bool) -> DroneRecord {
        DroneRecord {
            cluster: "c:1".into(),
            name: "dr-a".into(),
            pool: pool.into(),
            incarnation: "i".into(),
            session: "s".into(),
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
        }
    }

    #[test]
    fn only_fresh_undraining_drones_of_the_cluster_and_pool_are_picked() {
        let drones = [
            (1, drone("", Some(90), false)),
            (2, drone("", Some(90), true)),
            (3, drone("", None, false)),
            (4, drone("gpu", Some(90), false)),
            (5, drone("", Some(10), false)),
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
