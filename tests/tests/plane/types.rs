//! Plane 0.5.6's messages on the drone socket, as its `protocol` and `types` modules have them: externally tagged, a
//! state tagged by `status`, times as integer milliseconds. Nothing optional has a default but where Plane's has.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::SocketAddr;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlaneVersionInfo {
    pub version: String,
    pub git_hash: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Handshake {
    pub version: PlaneVersionInfo,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyConfig {
    pub name: String,
    #[serde(default)]
    pub namespace: String,
    #[serde(default)]
    pub tag: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyDeadlines {
    pub renew_at: i64,
    pub soft_terminate_at: i64,
    pub hard_terminate_at: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AcquiredKey {
    pub key: KeyConfig,
    pub deadlines: KeyDeadlines,
    pub token: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TerminationKind {
    Soft,
    Hard,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TerminationReason {
    Swept,
    External,
    KeyExpired,
    Lost,
    StartupTimeout,
    InternalError,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendStatus {
    Scheduled,
    Loading,
    Starting,
    Waiting,
    Ready,
    Terminating,
    #[serde(rename = "hard-terminating")]
    HardTerminating,
    Terminated,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum BackendState {
    Scheduled,
    Loading,
    Starting,
    Waiting {
        address: SocketAddr,
    },
    Ready {
        address: SocketAddr,
    },
    Terminating {
        last_status: BackendStatus,
        termination: TerminationKind,
        reason: TerminationReason,
    },
    #[serde(rename = "hard-terminating")]
    HardTerminating {
        last_status: BackendStatus,
        reason: TerminationReason,
    },
    Terminated {
        last_status: BackendStatus,
        termination: Option<TerminationKind>,
        reason: Option<TerminationReason>,
        exit_code: Option<i32>,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum BackendAction {
    Spawn { executable: Value, key: AcquiredKey, static_token: Option<String> },
    Terminate { kind: TerminationKind, reason: TerminationReason },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendActionMessage {
    pub action_id: String,
    pub backend_id: String,
    pub drone_id: i32,
    pub action: BackendAction,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewKeyResponse {
    pub backend: String,
    pub deadlines: Option<KeyDeadlines>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MessageToDrone {
    Action(BackendActionMessage),
    AckEvent { event_id: i64 },
    RenewKeyResponse(RenewKeyResponse),
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    pub local_time: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewKeyRequest {
    pub backend: String,
    pub local_time: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendStateMessage {
    pub event_id: i64,
    pub backend_id: String,
    pub state: BackendState,
    pub timestamp: i64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendMetricsMessage {
    pub backend_id: String,
    pub mem_used: u64,
    pub mem_total: u64,
    pub mem_active: u64,
    pub mem_inactive: u64,
    pub mem_unevictable: u64,
    pub mem_limit: u64,
    pub cpu_used: u64,
    pub sys_cpu: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MessageFromDrone {
    Heartbeat(Heartbeat),
    BackendEvent(BackendStateMessage),
    BackendMetrics(BackendMetricsMessage),
    AckAction { action_id: String },
    RenewKey(RenewKeyRequest),
}
