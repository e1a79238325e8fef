//! Drones: Plane's cluster state, our listing, draining.

use super::args::{PathArgs, QueryArgs, Write, bad_cursor, encode_cursor, shortened};
use super::error::Failure;
use super::{Replayable, scan};
use crate::app::App;
use axum::Json;
use axum::extract::State;
use holdfast_core::command::Command;
use holdfast_core::kv::ReadState;
use holdfast_core::records::DroneRecord;
use holdfast_core::view::{View, is_eligible};
use holdfast_wire::http::{
    ClusterState, DrainRequest, DrainResult, DroneInfo, DronePage, DroneState, NodeName, NodeState,
};
use holdfast_wire::names::{check_cluster, check_drone_name};

/// Drones looked at in one scan.
const SCAN_DRONES: usize = 1000;
/// Most drones that one page looks at to find those of a cluster; the cursor goes on from there.
const PAGE_LOOKS_MAX: usize = 10_000;

type Rows = Vec<(i32, DroneRecord)>;

/// Heard of recently enough to be scheduled to, whether it is draining or not.
fn is_fresh(drone: &DroneRecord, now_ms: u64, renew_ms: u64) -> bool {
    // Only the flag matters to the copy.
    let undrained = DroneRecord { draining: false, leaving: false, ..drone.clone() };
    is_eligible(&undrained, now_ms, renew_ms, None).is_some()
}

fn renew_ms<R: ReadState>(view: &View<R>) -> Result<u64, Failure> {
    Ok(view.cluster()?.map_or(0, |cluster| cluster.lease.renew_ms))
}

fn state(drone: DroneRecord, now_ms: u64, renew_ms: u64) -> DroneState {
    let heard_at_ms = drone.heartbeat.map_or(drone.registered_at_ms, |heartbeat| heartbeat.at_ms);
    let age_s = i64::try_from(now_ms.saturating_sub(heard_at_ms) / 1000).unwrap_or(i64::MAX);
    DroneState {
        ready: is_fresh(&drone, now_ms, renew_ms),
        draining: drone.draining || drone.leaving,
        drain_deadline: drone.drain_deadline_ms,
        last_heartbeat_age: age_s,
        backend_count: drone.backend_count,
        node: NodeState {
            name: NodeName::Drone(drone.name),
            plane_version: drone.version,
            plane_hash: drone.git_hash,
            controller: App::controller_name(drone.controller),
            // A heartbeat is word of the controller that passed it on, and the only one that is recorded.
            controller_heartbeat_age: age_s,
        },
    }
}

fn info(id: i32, drone: DroneRecord, now_ms: u64, renew_ms: u64) -> DroneInfo {
    DroneInfo {
        id,
        ready: is_eligible(&drone, now_ms, renew_ms, None).is_some(),
        draining: drone.draining || drone.leaving,
        stopping: drone.leaving,
        drain_deadline: drone.drain_deadline_ms,
        backend_count: drone.backend_count,
        last_heartbeat_age_ms: drone.heartbeat.map(|heartbeat| now_ms.saturating_sub(heartbeat.at_ms)),
        name: drone.name,
        cluster: drone.cluster,
        pool: drone.pool,
        version: drone.version,
    }
}

/// Up to `limit` drones after `after` that are of `cluster`, if given, and where to go on.
fn page<R: ReadState>(
    view: &View<R>,
    cluster: Option<&str>,
    mut after: i32,
    limit: usize,
    looks_max: usize,
) -> Result<(Rows, Option<i32>), Failure> {
    let mut found = Vec::new();
    let mut looks = 0;
    loop {
        let rows = view.drones(after, SCAN_DRONES)?;
        let last_scan = rows.len() < SCAN_DRONES;
        for (id, drone) in rows {
            if cluster.is_none_or(|cluster| drone.cluster == cluster) {
                if found.len() == limit {
                    return Ok((found, Some(after)));
                }
                found.push((id, drone));
            }
            after = id;
            looks += 1;
        }
        if last_scan {
            return Ok((found, None));
        }
        if looks >= looks_max {
            return Ok((found, Some(after)));
        }
    }
}

/// GET `/ctrl/c/{cluster}/state`.
pub async fn cluster_state(
    State(app): State<App>,
    PathArgs(cluster): PathArgs<String>,
    query: QueryArgs,
) -> Result<Json<ClusterState>, Failure> {
    check_cluster("cluster", &cluster)?;
    let point = app.read(query.consistency()?).await?;
    let state = scan(move || {
        let renew_ms = renew_ms(&point.view)?;
        // Plane's shape has no pages.
        let (rows, _) = page(&point.view, Some(&cluster), 0, usize::MAX, usize::MAX)?;
        let drones = rows.into_iter().map(|(_, drone)| state(drone, point.now_ms, renew_ms)).collect();
        Ok(ClusterState { drones, proxies: Vec::new() })
    });
    Ok(Json(state.await?))
}

/// GET `/ctrl/drones?cluster=&limit=&cursor=`.
pub async fn list(State(app): State<App>, query: QueryArgs) -> Result<Json<DronePage>, Failure> {
    let cluster = query.text("cluster")?.map(str::to_owned);
    if let Some(cluster) = &cluster {
        check_cluster("cluster", cluster)?;
    }
    let limit = query.limit()?;
    let after = match query.cursor()? {
        Some(text) => text.parse::<i32>().map_err(|_| bad_cursor())?,
        None => 0,
    };
    let point = app.read(query.consistency()?).await?;
    let page = scan(move || {
        let renew_ms = renew_ms(&point.view)?;
        let (rows, next) = page(&point.view, cluster.as_deref(), after, limit, PAGE_LOOKS_MAX)?;
        let drones = rows.into_iter().map(|(id, drone)| info(id, drone, point.now_ms, renew_ms)).collect();
        Ok(DronePage { drones, next_cursor: next.map(|id| encode_cursor(&id.to_string())) })
    });
    Ok(Json(page.await?))
}

/// POST `/ctrl/c/{cluster}/d/{drone}/drain`.
pub async fn drain(
    State(app): State<App>,
    PathArgs((cluster, drone)): PathArgs<(String, String)>,
    write: Write,
) -> Result<Replayable<Json<DrainResult>>, Failure> {
    let request = drain_request(&write)?;
    if check_cluster("cluster", &cluster).is_err() || check_drone_name("drone", &drone).is_err() {
        return Err(Failure::not_found(format!(
            "there is no drone {:?} in cluster {:?}",
            shortened(&drone),
            shortened(&cluster)
        )));
    }
    let (draining, deadline_in_ms) = (!request.undo, request.deadline_ms);
    super::keys::update(&app, Command::Drain { cluster, drone, draining, deadline_in_ms }, write).await
}

/// Plane reads no body here, so one that is no object is none of ours and says nothing.
fn drain_request(write: &Write) -> Result<DrainRequest, Failure> {
    if write.body.trim_ascii().starts_with(b"{") {
        let request: DrainRequest = write.json()?;
        request.check()?;
        return Ok(request);
    }
    write.ignored_body()?;
    Ok(DrainRequest::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_core::records::HeartbeatRecord;
    use serde_json::json;

    #[test]
    fn a_drones_state_has_planes_json_shape_and_ages_in_whole_seconds() {
        let drone = DroneRecord {
            cluster: "c:1".into(),
            name: "dr-a".into(),
            pool: String::new(),
            incarnation: "i".into(),
            data_id: Some("m".into()),
            session: "s".into(),
            address: String::new(),
            registered_index: 1,
            is_listed: true,
            controller: 2,
            version: "1.0".into(),
            git_hash: "abc".into(),
            draining: true,
            backend_count: 3,
            registered_at_ms: 0,
            heartbeat: Some(HeartbeatRecord { at_ms: 10_000, term: 1, local_time_ms: 0 }),
            drain_deadline_ms: None,
            leaving: false,
            heard_filed_at_ms: None,
        };
        assert_eq!(
            serde_json::to_value(state(drone.clone(), 12_999, 30_000)).unwrap(),
            json!({"ready": true, "draining": true, "last_heartbeat_age": 2, "backend_count": 3,
                   "node": {"name": {"Drone": "dr-a"}, "plane_version": "1.0", "plane_hash": "abc",
                            "controller": "controller-2", "controller_heartbeat_age": 2}})
        );
        assert!(!info(1, drone.clone(), 12_999, 30_000).ready, "draining");
        assert!(!state(drone.clone(), 40_000, 30_000).ready, "not heard of for half of renew");
        let leaving = DroneRecord { draining: false, leaving: true, drain_deadline_ms: Some(7), ..drone };
        let shown = info(1, leaving.clone(), 12_999, 30_000);
        assert!(shown.draining && shown.stopping && !shown.ready && shown.drain_deadline == Some(7));
        let shown = state(leaving, 12_999, 30_000);
        assert!(shown.draining && shown.ready && shown.drain_deadline == Some(7));
    }
}
