//! What these tests share.

use holdfast_client::{Client, RequestOptions};
use holdfast_tests::harness::{Cluster, LONG, wait_until};
use holdfast_tests::sim_drone::{Identity, LocalClock, SimDrone, SpawnSeen};
use holdfast_wire::BackendState;
use holdfast_wire::KeyConfig;
use holdfast_wire::drone::AcquiredKey;
use holdfast_wire::http::{ConnectRequest, ConnectResponse, SpawnConfig};
use serde_json::json;
use std::net::SocketAddr;
use std::time::Duration;

/// An action that is due comes within this.
pub const SOON: Duration = Duration::from_secs(5);
/// Longer than the time after which unacknowledged actions are sent again: what has not come by then does not come.
pub const NOT_COMING: Duration = Duration::from_millis(3_500);
/// Where simulated backends say they answer.
pub const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 9);

/// A request that lets any drone of the cluster be chosen. Nothing is run by simulated drones.
pub fn request(cluster: &Cluster, key: &str) -> ConnectRequest {
    ConnectRequest {
        key: Some(KeyConfig { name: key.to_owned(), ..KeyConfig::default() }),
        spawn_config: Some(SpawnConfig {
            id: None,
            cluster: Some(cluster.name.clone()),
            pool: String::new(),
            executable: json!({"command": ["true"]}),
            lifetime_limit_seconds: None,
            max_idle_seconds: None,
            use_static_token: false,
            subdomain: None,
        }),
        ..ConnectRequest::default()
    }
}

/// A client that also waits for a drone to become eligible.
pub fn patient(cluster: &Cluster) -> Client {
    cluster.client().with_options(RequestOptions { retry_no_drone: true, ..RequestOptions::default() })
}

/// A connect that must succeed.
pub async fn connect(cluster: &Cluster, key: &str) -> ConnectResponse {
    let answer = patient(cluster).connect(&request(cluster, key)).await;
    answer.unwrap_or_else(|e| panic!("connect {key}: {e}"))
}

/// A drone at any controller, with heartbeats going.
pub async fn drone(cluster: &Cluster, identity: &Identity, clock: &LocalClock) -> SimDrone {
    let mut drone = SimDrone::connect_any(&cluster.urls(), identity, LONG).await.expect("a session");
    drone.start_heartbeats(clock.clone(), Duration::from_millis(100));
    drone
}

/// Acknowledges a spawn and reports the backend ready.
pub async fn start_backend(drone: &mut SimDrone, spawn: &SpawnSeen) {
    let token = Some(spawn.key.token);
    drone.ack(&spawn.action_id).await.unwrap();
    drone.report_and_wait(&spawn.backend_id, token, BackendState::Loading, SOON).await.unwrap();
    let ready = BackendState::Ready { address: ADDRESS };
    drone.report_and_wait(&spawn.backend_id, token, ready, SOON).await.unwrap();
}

/// Connects and lets the drone start the backend.
pub async fn hold(cluster: &Cluster, drone: &mut SimDrone, key: &str) -> (ConnectResponse, AcquiredKey) {
    let answer = connect(cluster, key).await;
    assert!(answer.spawned, "{key} was held already: {answer:?}");
    let spawn = drone.next_spawn(SOON).await.expect("the spawn");
    assert_eq!((&spawn.backend_id, spawn.key.token), (&answer.backend_id, answer.fencing_token));
    start_backend(drone, &spawn).await;
    (answer, spawn.key)
}

/// A backend that ended by itself.
pub fn exited() -> BackendState {
    BackendState::Terminated {
        last_status: holdfast_wire::BackendStatus::Ready,
        termination: None,
        reason: None,
        exit_code: Some(0),
    }
}

/// Waits until a key has another holder than `token` or none, and gives the cluster time at which that was seen: no
/// earlier than it happened.
pub async fn gone_at(cluster: &Cluster, key: &str, token: u64, patience: Duration) -> u64 {
    wait_until(&format!("{key} is lost to token {token}"), patience, async || match cluster.key(key).await {
        Some(held) if held.token == token => Err(held),
        _ => Ok(cluster.info().await.cluster_time),
    })
    .await
}
