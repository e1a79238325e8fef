//! Typed reads of the state, for the HTTP API, the scheduler and the drone sessions.

use crate::codec::{decode, decode_first};
use crate::kv::{ReadState, StateError, Table, keys};
use crate::limits::{DRONE_KEEP_MS, HEARD_REFILE_MS};
use crate::outcome::Holder;
use crate::records::{
    ActionRecord, BackendHead, BackendRecord, ClusterRecord, DroneRecord, HeartbeatRecord, IdempotencyRecord,
    KeyRecord, MemberIdsRecord, ProgressRecord, RestoredRecord,
};
use bincode::Decode;
use holdfast_wire::KeyConfig;

/// A held key with its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedKey {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// The record.
    pub record: KeyRecord,
}

/// An action that is due, with its id on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueAction {
    /// `ak-…`.
    pub action_id: String,
    /// Log index of the entry that made it.
    pub index: u64,
    /// Number within that entry.
    pub sub: u32,
    /// The record.
    pub record: ActionRecord,
    /// The backend it is about.
    pub backend: BackendRecord,
    /// Of a spawn: from when on the drone's clock the lease counts, in milliseconds.
    pub lease_from_ms: Option<i64>,
}

/// A version of the state with typed reads on it.
pub struct View<R: ReadState>(pub R);

fn read<T: Decode<()>>(state: &impl ReadState, table: Table, key: &[u8]) -> Result<Option<T>, StateError> {
    state.get(table, key)?.map(|bytes| decode(&bytes)).transpose()
}

impl<R: ReadState> View<R> {
    /// The cluster's identity and configuration, once formed.
    pub fn cluster(&self) -> Result<Option<ClusterRecord>, StateError> {
        read(&self.0, Table::Meta, keys::CLUSTER)
    }

    /// Cluster time, counters and checksums as of the last applied entry.
    pub fn progress(&self) -> Result<ProgressRecord, StateError> {
        Ok(read(&self.0, Table::Meta, keys::PROGRESS)?.unwrap_or_default())
    }

    /// What a restore from a backup left for this cluster, if it came from one.
    pub fn restored(&self) -> Result<Option<RestoredRecord>, StateError> {
        read(&self.0, Table::Meta, keys::RESTORED)
    }

    /// How long a cluster that was restored from a backup still acquires no key, in milliseconds; `None` once it does.
    pub fn quarantine_left_ms(&self, now_ms: u64) -> Result<Option<u64>, StateError> {
        let from_ms = self.restored()?.and_then(|restored| restored.acquisitions_from_ms).unwrap_or(0);
        Ok(from_ms.checked_sub(now_ms).filter(|left_ms| *left_ms > 0))
    }

    /// Every member id that was ever used.
    pub fn member_ids(&self) -> Result<MemberIdsRecord, StateError> {
        Ok(read(&self.0, Table::Meta, keys::MEMBER_IDS)?.unwrap_or_default())
    }

    /// A held key. It may have expired: compare `expires_at_ms` with the cluster time.
    pub fn key(&self, namespace: &str, name: &str) -> Result<Option<KeyRecord>, StateError> {
        read(&self.0, Table::Keys, &keys::pair(namespace, name))
    }

    /// A backend, living or recently terminated.
    pub fn backend(&self, id: &str) -> Result<Option<BackendRecord>, StateError> {
        read(&self.0, Table::Backends, id.as_bytes())
    }

    /// What a renewal has to know of a backend.
    pub(crate) fn backend_head(&self, id: &str) -> Result<Option<BackendHead>, StateError> {
        let bytes = self.0.get(Table::Backends, id.as_bytes())?;
        Ok(bytes.map(|bytes| decode_first(&bytes)).transpose()?.map(|(head, _)| head))
    }

    /// A drone by its id.
    pub fn drone(&self, id: i32) -> Result<Option<DroneRecord>, StateError> {
        read(&self.0, Table::Drones, &keys::drone(id))
    }

    /// A drone by its name.
    pub fn drone_by_name(&self, cluster: &str, name: &str) -> Result<Option<(i32, DroneRecord)>, StateError> {
        let Some(id) = self.0.get(Table::DroneNames, &keys::pair(cluster, name))? else {
            return Ok(None);
        };
        let id = keys::split_drone(&id)
            .ok_or_else(|| StateError::Damaged("a drone name leads to no id".into()))?;
        let record =
            self.drone(id)?.ok_or_else(|| StateError::Damaged(format!("drone {id} has a name only")))?;
        Ok(Some((id, record)))
    }

    /// The recorded answer of an idempotency key.
    pub fn idempotency(&self, key: &str) -> Result<Option<IdempotencyRecord>, StateError> {
        read(&self.0, Table::Idempotency, key.as_bytes())
    }

    /// The holder of a live (held, unexpired at `now_ms`) key, as [`crate::outcome::Outcome::Found`] would give it.
    pub fn holder(&self, key: &KeyConfig, now_ms: u64) -> Result<Option<Holder>, StateError> {
        let Some(record) = self.key(&key.namespace, &key.name)? else { return Ok(None) };
        if record.expires_at_ms <= now_ms {
            return Ok(None);
        }
        let backend = self.backend(&record.backend_id)?.ok_or_else(|| {
            StateError::Damaged(format!("a key is held by the unknown backend {}", record.backend_id))
        })?;
        Ok(Some(holder_of(&record.backend_id, backend)))
    }

    /// Keys after `cursor` (namespace, name), of one namespace if given, whose names begin with `prefix`.
    /// With no namespace all are listed and `prefix` applies to the names. Bounded scan: looks at up to ten times
    /// `limit` rows and returns where to go on.
    #[allow(clippy::type_complexity)]
    pub fn keys(
        &self,
        namespace: Option<&str>,
        prefix: &str,
        cursor: Option<(&str, &str)>,
        limit: usize,
    ) -> Result<(Vec<NamedKey>, Option<(String, String)>), StateError> {
        let mut start = match namespace {
            Some(ns) => keys::pair(ns, prefix),
            None => Vec::new(),
        };
        if let Some((ns, name)) = cursor {
            let mut after = keys::pair(ns, name);
            after.push(0);
            start = start.max(after);
        }
        let end = namespace.map(|ns| {
            let mut end = ns.as_bytes().to_vec();
            end.push(1);
            end
        });
        // Over several namespaces the names with that prefix are apart; else they follow each other.
        let scattered = namespace.is_none() && !prefix.is_empty();
        let look_max = if scattered { limit.saturating_mul(10) } else { limit.saturating_add(1) };
        let rows = self.0.scan(Table::Keys, &start, end.as_deref(), look_max)?;
        let more_below = rows.len() == look_max;
        let mut found = Vec::new();
        let mut last_seen = None;
        for (key, value) in rows {
            let (ns, name) = keys::split_pair(&key)
                .ok_or_else(|| StateError::Damaged("a key's name is not UTF-8".into()))?;
            if name.starts_with(prefix) {
                if found.len() == limit {
                    return Ok((found, last_seen));
                }
                found.push(NamedKey {
                    namespace: ns.to_owned(),
                    name: name.to_owned(),
                    record: decode(&value)?,
                });
            } else if namespace.is_some() {
                // In the order of names: nothing with that prefix follows.
                return Ok((found, None));
            }
            last_seen = Some((ns.to_owned(), name.to_owned()));
        }
        Ok((found, if more_below { last_seen } else { None }))
    }

    /// Backends whose ids begin with `prefix`, after `cursor`.
    #[allow(clippy::type_complexity)]
    pub fn backends(
        &self,
        prefix: &str,
        cursor: Option<&str>,
        limit: usize,
    ) -> Result<(Vec<(String, BackendRecord)>, Option<String>), StateError> {
        let mut start = prefix.as_bytes().to_vec();
        if let Some(cursor) = cursor {
            let mut after = cursor.as_bytes().to_vec();
            after.push(0);
            start = start.max(after);
        }
        let mut rows = self.0.scan(Table::Backends, &start, None, limit.saturating_add(1))?;
        rows.retain(|(key, _)| key.starts_with(prefix.as_bytes()));
        let more = rows.len() > limit;
        rows.truncate(limit);
        let found = rows
            .into_iter()
            .map(|(key, value)| Ok((text(key)?, decode(&value)?)))
            .collect::<Result<Vec<(String, BackendRecord)>, StateError>>()?;
        let next = found.last().filter(|_| more).map(|(id, _)| id.clone());
        Ok((found, next))
    }

    /// Drones with ids above `after`.
    pub fn drones(&self, after: i32, limit: usize) -> Result<Vec<(i32, DroneRecord)>, StateError> {
        let rows = self.0.scan(Table::Drones, &keys::drone(after.saturating_add(1)), None, limit)?;
        rows.into_iter()
            .map(|(key, value)| {
                let id =
                    keys::split_drone(&key).ok_or_else(|| StateError::Damaged("a drone's key".into()))?;
                Ok((id, decode(&value)?))
            })
            .collect()
    }

    /// Actions that are due on this session of a drone, oldest first, after `after` (log index, sub) if given. None is due
    /// before the session's list of backends was applied. A spawn is due only while its backend is `scheduled`, its key
    /// current, its target the session or its incarnation, and its soft deadline ahead.
    pub fn due_actions(
        &self,
        drone_id: i32,
        session: &str,
        after: Option<(u64, u32)>,
        now_ms: u64,
        limit: usize,
    ) -> Result<Vec<DueAction>, StateError> {
        crate::apply::due_actions(&self.0, (drone_id, session), after, now_ms, limit)
    }

    /// Drones heard of at or after `since_ms` (and some that were heard of up to [`HEARD_REFILE_MS`] before), in no order
    /// that means anything.
    pub fn drones_heard(&self, since_ms: u64, limit: usize) -> Result<Vec<(i32, DroneRecord)>, StateError> {
        let start = keys::timed(since_ms.saturating_sub(HEARD_REFILE_MS), &[]);
        let damaged = || StateError::Damaged("an entry of drones_heard".into());
        let mut drones = Vec::new();
        for (entry, _) in self.0.scan(Table::DronesHeard, &start, None, limit)? {
            let (_, drone) = keys::split_timed(&entry).ok_or_else(damaged)?;
            let id = keys::split_drone(drone).ok_or_else(damaged)?;
            drones.push((id, self.drone(id)?.ok_or_else(damaged)?));
        }
        Ok(drones)
    }

    /// Backends of a drone that have not terminated, with their tokens, after `after`.
    pub fn drone_backends(
        &self,
        drone_id: i32,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<(String, u64)>, StateError> {
        let mut start = keys::drone_backend(drone_id, after.unwrap_or_default());
        if after.is_some() {
            start.push(0);
        }
        let damaged = || StateError::Damaged("an entry of drone_backends".into());
        let rows = self.0.scan(Table::DroneBackends, &start, Some(&keys::after_drone(drone_id)), limit)?;
        rows.into_iter()
            .map(|(key, token)| {
                let id = keys::split_drone_backend(&key).ok_or_else(damaged)?;
                let token = token.as_slice().try_into().map_err(|_| damaged())?;
                Ok((id.to_owned(), u64::from_be_bytes(token)))
            })
            .collect()
    }

    /// Entries of the expiry index at or before `now_ms`, oldest first: candidates for a sweep.
    pub fn expired_candidates(
        &self,
        now_ms: u64,
        limit: usize,
    ) -> Result<Vec<crate::command::SweepKey>, StateError> {
        let end = keys::timed(now_ms.saturating_add(1), &[]);
        let rows = self.0.scan(Table::KeyExpiry, &[], Some(&end), limit)?;
        rows.into_iter()
            .map(|(key, value)| {
                let damaged = || StateError::Damaged("an entry of the expiry index".into());
                let (indexed_at_ms, pair) = keys::split_timed(&key).ok_or_else(damaged)?;
                let (namespace, name) = keys::split_pair(pair).ok_or_else(damaged)?;
                let token = u64::from_be_bytes(value.as_slice().try_into().map_err(|_| damaged())?);
                Ok(crate::command::SweepKey {
                    indexed_at_ms,
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                    token,
                })
            })
            .collect()
    }

    /// Whether [`crate::command::Command::EndDue`] would find something at `now_ms`.
    pub fn has_ends_due(&self, now_ms: u64) -> Result<bool, StateError> {
        let end = keys::timed(now_ms.saturating_add(1), &[]);
        for table in [Table::BackendEnds, Table::DrainEnds] {
            if !self.0.scan(table, &[], Some(&end), 1)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a sweep at `now_ms` would find records to delete.
    pub fn has_old_records(&self, now_ms: u64) -> Result<bool, StateError> {
        let Some(cluster) = self.cluster()? else { return Ok(false) };
        let end = keys::timed(now_ms.saturating_sub(cluster.terminated_keep_ms), &[]);
        if !self.0.scan(Table::Terminated, &[], Some(&end), 1)?.is_empty() {
            return Ok(true);
        }
        let silent_ms = now_ms.saturating_sub(DRONE_KEEP_MS);
        let tables = [
            (Table::IdempotencyExpiry, now_ms),
            (Table::SuppliedEnds, now_ms),
            (Table::DronesHeard, silent_ms),
        ];
        for (table, end_ms) in tables {
            if !self.0.scan(table, &[], Some(&keys::timed(end_ms, &[])), 1)?.is_empty() {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Describes a backend as the holder of its key.
pub fn holder_of(backend_id: &str, backend: BackendRecord) -> Holder {
    Holder {
        state: backend.state().clone(),
        is_waited_for: backend.is_waited_for(),
        backend_id: backend_id.to_owned(),
        key: backend.key,
        cluster: backend.cluster,
        drone: backend.drone,
        token: backend.token,
        termination_asked: backend.termination_asked.map(|(kind, _)| kind),
        static_token: backend.static_token,
        secret_token: backend.secret_token,
        subdomain: backend.subdomain,
    }
}

/// Whether a drone can be chosen for a new backend: its list of backends was applied, it is not draining or shutting down,
/// and was heard of within half of `renew` and, if the leader does not trust heartbeats of earlier terms, in `own_term`.
pub fn is_eligible(
    drone: &DroneRecord,
    now_ms: u64,
    renew_ms: u64,
    own_term: Option<u64>,
) -> Option<HeartbeatRecord> {
    let heartbeat = drone.heartbeat?;
    let fresh = now_ms.saturating_sub(heartbeat.at_ms) <= renew_ms / 2;
    let trusted = own_term.is_none_or(|term| heartbeat.term == term);
    (fresh && trusted && drone.is_listed && !drone.draining && !drone.leaving).then_some(heartbeat)
}

fn text(bytes: Vec<u8>) -> Result<String, StateError> {
    String::from_utf8(bytes).map_err(|_| StateError::Damaged("a backend id is not UTF-8".into()))
}
