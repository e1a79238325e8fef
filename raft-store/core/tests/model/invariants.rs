//! What must hold after every step; the numbers are those of the design.

use crate::common::tables_agree;
use crate::sim::{ModelKey, Sim, key_name};
use holdfast_core::records::KeyRecord;
use std::collections::BTreeMap;

/// All of them.
pub fn all(sim: &mut Sim) -> Result<(), String> {
    invariant_3_no_early_expiry(sim)?;
    invariant_1_exclusion(sim)?;
    invariant_2_tokens_grow(sim)?;
    invariant_4_no_resurrection(sim)?;
    tables_agree(&sim.replica.state);
    Ok(())
}

fn held(sim: &Sim) -> BTreeMap<usize, KeyRecord> {
    let (keys, _) = sim.replica.view().keys(Some(""), "", None, 1000).unwrap();
    keys.into_iter().map(|key| (key.name[1..].parse().unwrap(), key.record)).collect()
}

/// At every instant at most one process of a key exists.
fn invariant_1_exclusion(sim: &Sim) -> Result<(), String> {
    let mut running: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for drone in sim.drones.iter().chain(&sim.others) {
        for (id, backend) in drone.backends.iter().filter(|(_, backend)| backend.running) {
            running.entry(backend.key).or_default().push(format!("{id} on {} ({backend:?})", drone.name));
        }
    }
    match running.iter().find(|(_, running)| running.len() > 1) {
        Some((key, running)) => {
            Err(format!("invariant 1: of {} there run {running:?} at {} ms", key_name(*key), sim.real_ms))
        }
        None => Ok(()),
    }
}

/// A token is greater than every earlier one of its key.
fn invariant_2_tokens_grow(sim: &Sim) -> Result<(), String> {
    for (key, record) in held(sim) {
        let last = sim.gone.get(&key).and_then(|gone| gone.last()).copied().unwrap_or(0);
        if record.token <= last || record.token > sim.replica.index {
            return Err(format!("invariant 2: {} has {} after {last}", key_name(key), record.token));
        }
    }
    Ok(())
}

/// What is no longer held was released or had expired.
fn invariant_3_no_early_expiry(sim: &mut Sim) -> Result<(), String> {
    let held = held(sim);
    let ended: Vec<(usize, ModelKey)> = sim
        .model
        .iter()
        .filter(|(key, model)| held.get(key).is_none_or(|record| record.token != model.token))
        .map(|(key, model)| (*key, model.clone()))
        .collect();
    for (key, model) in ended {
        sim.stats.swept += 1;
        sim.model.remove(&key);
        sim.forget(key, &model)?;
    }
    Ok(())
}

/// What is held is held by whom the model says, until when it says.
fn invariant_4_no_resurrection(sim: &mut Sim) -> Result<(), String> {
    let held = held(sim);
    if held.keys().ne(sim.model.keys()) {
        return Err(format!("invariant 4: {held:?} is held, but the model has {:?}", sim.model));
    }
    for (key, record) in held {
        let model = &sim.model[&key];
        let drone = &sim.drones[model.drone];
        let same = record.token == model.token
            && record.backend_id == model.backend_id
            && record.drone_id == drone.id
            && record.tag == model.tag
            && record.expires_at_ms == model.expires_at_ms
            && record.allow_renew == model.allow_renew;
        if !same {
            return Err(format!("invariant 4: {record:?} is held, but the model has {model:?}"));
        }
        // Adopted: a process of an earlier incarnation goes on under its key.
        let backend = sim.replica.view().backend(&record.backend_id).unwrap().unwrap();
        let registered = sim.replica.view().drone(drone.id).unwrap().unwrap();
        if !drone.planes
            && backend.token < registered.registered_index
            && registered.incarnation == drone.incarnation_name()
            && drone.incarnation > 1
            && drone.backends.get(&record.backend_id).is_some_and(|backend| backend.running)
        {
            sim.stats.adopted += 1;
        }
    }
    Ok(())
}
