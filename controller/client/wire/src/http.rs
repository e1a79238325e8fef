//! Bodies of the HTTP API.

use crate::backend::{BackendStatus, TerminationKind, TerminationReason};
use crate::error::FieldError;
use crate::key::KeyConfig;
use crate::limits::{DRAIN_DEADLINE_MS_MAX, USER_BYTES_MAX, WAIT_MS_DEFAULT, WAIT_MS_MAX};
use crate::names::{check_cluster, check_name, check_name_or_empty, check_text};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::net::SocketAddr;

/// Response header that names the leader's URL.
pub const LEADER_HEADER: &str = "x-holdfast-leader";
/// Response header beside [`LEADER_HEADER`]: a number that grows when a member comes, goes or moves.
pub const MEMBERS_HEADER: &str = "x-holdfast-members";
/// Request header that makes any request safe to repeat.
pub const IDEMPOTENCY_HEADER: &str = "idempotency-key";
/// Response header, `true` when the answer is the recorded one of an earlier request with the same `Idempotency-Key`.
pub const REPLAYED_HEADER: &str = "x-holdfast-replayed";

/// POST `/ctrl/connect`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct ConnectRequest {
    /// The key; a random one if absent.
    #[serde(default)]
    pub key: Option<KeyConfig>,
    /// What to start if the key is free.
    #[serde(default)]
    pub spawn_config: Option<SpawnConfig>,
    /// Named in the connection token.
    #[serde(default)]
    pub user: Option<String>,
    /// Passed along with the connection.
    #[serde(default)]
    pub auth: Map<String, Value>,
    /// Ours: how long to wait for a key whose backend is going away, in milliseconds. More than [`WAIT_MS_MAX`] counts as
    /// that: see [`Self::capped_wait_ms`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u64>,
}

impl ConnectRequest {
    /// Checks every field.
    pub fn check(&self) -> Result<(), FieldError> {
        if let Some(key) = &self.key {
            key.check()?;
        }
        if let Some(user) = &self.user {
            check_text("user", user, USER_BYTES_MAX)?;
        }
        self.spawn_config.as_ref().map_or(Ok(()), SpawnConfig::check)
    }

    /// How long to wait, in milliseconds: the default if nothing was asked for, and never more than [`WAIT_MS_MAX`].
    pub fn capped_wait_ms(&self) -> u64 {
        self.wait_ms.unwrap_or(WAIT_MS_DEFAULT).min(WAIT_MS_MAX)
    }
}

/// How to start a backend.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SpawnConfig {
    /// A backend id of the caller's choice, never used before.
    #[serde(default)]
    pub id: Option<String>,
    /// The controller's default cluster if absent.
    #[serde(default)]
    pub cluster: Option<String>,
    /// The drone pool.
    #[serde(default)]
    pub pool: String,
    /// [`Executable`], kept as JSON so that newer drones may know more forms than this controller.
    pub executable: Value,
    /// Ended this long after it was scheduled, in seconds of cluster time.
    #[serde(default)]
    pub lifetime_limit_seconds: Option<i32>,
    /// Ended after this long without a connection, in seconds.
    #[serde(default)]
    pub max_idle_seconds: Option<i32>,
    /// One token for all connections, passed to the backend too.
    #[serde(default)]
    pub use_static_token: bool,
    /// Subdomain of the URL.
    #[serde(default)]
    pub subdomain: Option<String>,
}

impl SpawnConfig {
    /// Checks every field.
    pub fn check(&self) -> Result<(), FieldError> {
        if let Some(id) = &self.id {
            check_name("spawn_config.id", id)?;
        }
        if let Some(cluster) = &self.cluster {
            check_cluster("spawn_config.cluster", cluster)?;
        }
        check_name_or_empty("spawn_config.pool", &self.pool)?;
        if let Some(subdomain) = &self.subdomain {
            check_name("spawn_config.subdomain", subdomain)?;
        }
        if self.lifetime_limit_seconds.is_some_and(|s| s <= 0) {
            return Err(FieldError::new("spawn_config.lifetime_limit_seconds", "must be positive"));
        }
        if self.max_idle_seconds.is_some_and(|s| s <= 0) {
            return Err(FieldError::new("spawn_config.max_idle_seconds", "must be positive"));
        }
        Executable::parse(&self.executable).map(|_| ())
    }
}

/// What a drone runs.
#[derive(Debug, Clone, PartialEq)]
pub enum Executable {
    /// A command on the drone's machine (ours).
    Process(ProcessExecutable),
    /// A container, in Plane's form.
    Docker(DockerExecutable),
}

/// `{command, env, cwd}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProcessExecutable {
    /// Program and arguments; at least the program.
    pub command: Vec<String>,
    /// Added to the environment; what Holdfast sets wins.
    #[serde(default)]
    pub env: std::collections::BTreeMap<String, String>,
    /// Working directory; the backend's own directory if absent.
    #[serde(default)]
    pub cwd: Option<String>,
}

/// Plane's `DockerExecutorConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DockerExecutable {
    /// Image reference.
    pub image: String,
    /// `IfNotPresent` (default), `Always` or `Never`.
    #[serde(default)]
    pub pull_policy: Option<String>,
    /// `{username, password}`.
    #[serde(default)]
    pub credentials: Option<Value>,
    /// Added to the environment; what Holdfast sets wins.
    #[serde(default)]
    pub env: std::collections::BTreeMap<String, String>,
    /// CPU, memory and disk limits.
    #[serde(default)]
    pub resource_limits: Value,
    /// `true` or a path under the drone's mount base.
    #[serde(default)]
    pub mount: Option<Value>,
    /// Docker network.
    #[serde(default)]
    pub network_name: Option<String>,
}

impl Executable {
    /// Reads and checks either form.
    pub fn parse(value: &Value) -> Result<Self, FieldError> {
        const FIELD: &str = "spawn_config.executable";
        let Some(object) = value.as_object() else {
            return Err(FieldError::new(FIELD, "must be an object"));
        };
        if object.contains_key("command") {
            let process: ProcessExecutable = serde_json::from_value(value.clone())
                .map_err(|e| FieldError::new(FIELD, format!("is not a process: {e}")))?;
            match process.command.first() {
                None => return Err(FieldError::new("spawn_config.executable.command", "must not be empty")),
                Some(program) if program.is_empty() => {
                    return Err(FieldError::new(
                        "spawn_config.executable.command",
                        "must begin with a program",
                    ));
                }
                Some(_) => {}
            }
            let strings = process
                .command
                .iter()
                .chain(process.env.keys())
                .chain(process.env.values())
                .chain(&process.cwd);
            if strings.into_iter().any(|s| s.contains('\0')) {
                return Err(FieldError::new(FIELD, "must not hold NUL bytes"));
            }
            if process.env.keys().any(|k| k.is_empty() || k.contains('=')) {
                return Err(FieldError::new(
                    "spawn_config.executable.env",
                    "has a name that is empty or holds '='",
                ));
            }
            Ok(Self::Process(process))
        } else if object.contains_key("image") {
            let docker: DockerExecutable = serde_json::from_value(value.clone())
                .map_err(|e| FieldError::new(FIELD, format!("is not a container: {e}")))?;
            if docker.image.is_empty() {
                return Err(FieldError::new("spawn_config.executable.image", "must not be empty"));
            }
            Ok(Self::Docker(docker))
        } else {
            Err(FieldError::new(FIELD, "must have a command (process) or an image (container)"))
        }
    }
}

/// Answer to [`ConnectRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConnectResponse {
    /// The backend.
    pub backend_id: String,
    /// Whether this request started it.
    pub spawned: bool,
    /// Its status when the answer was made.
    pub status: BackendStatus,
    /// Connection token.
    pub token: String,
    /// Where a proxy serves it.
    pub url: String,
    /// Its subdomain.
    pub subdomain: Option<String>,
    /// Lets the backend check that a request came through a proxy.
    pub secret_token: Option<String>,
    /// `/pub/b/{backend}/status` on this controller.
    pub status_url: String,
    /// The drone it runs on.
    pub drone: Option<String>,
    /// Ours: the key, with a generated name if the request had none.
    #[serde(default)]
    pub key: KeyConfig,
    /// Ours: the fencing token of the acquisition.
    #[serde(default)]
    pub fencing_token: u64,
    /// Ours: the address of a ready backend.
    #[serde(default)]
    pub address: Option<SocketAddr>,
}

/// `/pub/b/{backend}/status` and each event of the status stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendStatusMessage {
    /// Status.
    pub status: BackendStatus,
    /// Why it is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_reason: Option<TerminationReason>,
    /// How it is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_kind: Option<TerminationKind>,
    /// Whether it exited with another code than 0; only when terminated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_error: Option<bool>,
    /// When the controllers recorded it, cluster time in milliseconds.
    pub time: u64,
}

/// GET `/ctrl/status`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StatusResponse {
    /// `ok`.
    pub status: String,
    /// Crate version.
    pub version: String,
    /// Git hash.
    pub hash: String,
}

/// GET `/ctrl/c/{cluster}/state`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClusterState {
    /// Its drones.
    pub drones: Vec<DroneState>,
    /// Always empty: Holdfast has no proxies.
    pub proxies: Vec<Value>,
}

/// One drone of [`ClusterState`]; ages in whole seconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DroneState {
    /// Heard of recently enough to be scheduled to.
    pub ready: bool,
    /// Takes no new backends: it was told so, or it is shutting down.
    pub draining: bool,
    /// Seconds since its last heartbeat.
    pub last_heartbeat_age: i64,
    /// Live backends: of a draining drone, how many are still to go.
    pub backend_count: u64,
    /// Ours: when what is left on it is asked to end, cluster time in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_deadline: Option<u64>,
    /// Who it is.
    pub node: NodeState,
}

/// Plane's description of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeState {
    /// `{"Drone": "dr-a"}`.
    pub name: NodeName,
    /// Version it gave in its handshake.
    pub plane_version: String,
    /// Git hash it gave in its handshake.
    pub plane_hash: String,
    /// The controller it is connected to.
    pub controller: String,
    /// Seconds since that controller was heard of.
    pub controller_heartbeat_age: i64,
}

/// Plane's tagged node name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum NodeName {
    /// A drone.
    Drone(String),
}

/// POST `/ctrl/c/{cluster}/d/{drone}/drain`. All of it is ours: without a body the drone takes no new backends, and
/// those it has stay.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainRequest {
    /// How much later what is left on the drone is asked to end, in milliseconds of cluster time. Without it a deadline
    /// that was set before stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Let the drone take backends again, and forget its deadline.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub undo: bool,
}

impl DrainRequest {
    /// Checks every field.
    pub fn check(&self) -> Result<(), FieldError> {
        match self.deadline_ms {
            Some(_) if self.undo => Err(FieldError::new("deadline_ms", "has no meaning together with undo")),
            Some(ms) if ms > DRAIN_DEADLINE_MS_MAX => {
                Err(FieldError::new("deadline_ms", format!("must be at most {DRAIN_DEADLINE_MS_MAX}")))
            }
            _ => Ok(()),
        }
    }
}

/// Answer to POST `/ctrl/c/{cluster}/d/{drone}/drain`, and to others that say whether anything changed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DrainResult {
    /// Whether anything changed.
    pub updated: bool,
    /// Ours, of a drain: backends of the drone that have not terminated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remaining: Option<u64>,
}

/// POST `/ctrl/b/revoke`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RevokeRequest {
    /// The backend.
    pub backend_id: String,
    /// Whose tokens.
    pub user: String,
}

/// A key's name without its tag: body of `/ctrl/key/prevent-renewal` and the like.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyName {
    /// Name.
    pub name: String,
    /// Namespace.
    #[serde(default)]
    pub namespace: String,
}

/// A held key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyInfo {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Tag.
    pub tag: String,
    /// The backend that holds it.
    pub backend: String,
    /// The drone that backend was scheduled to.
    pub drone: String,
    /// Fencing token.
    pub token: u64,
    /// Whether it may be renewed.
    pub allow_renew: bool,
    /// Cluster time in milliseconds.
    pub acquired_at: u64,
    /// Cluster time in milliseconds.
    pub expires_at: u64,
    /// Until then, negative once past.
    pub expires_in_ms: i64,
}

/// One page of a listing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeyPage {
    /// The rows.
    pub keys: Vec<KeyInfo>,
    /// Pass as `cursor` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// A backend, as `/ctrl/backends` lists it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackendInfo {
    /// Id.
    pub id: String,
    /// Its key.
    pub key: KeyConfig,
    /// Cluster it was scheduled in.
    pub cluster: String,
    /// Drone it was scheduled to.
    pub drone: String,
    /// Status.
    pub status: BackendStatus,
    /// Where it answers, while waiting or ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<SocketAddr>,
    /// Fencing token of its acquisition.
    pub fencing_token: u64,
    /// Cluster time in milliseconds.
    pub created_at: u64,
    /// Cluster time of the last change of status, in milliseconds.
    pub status_at: u64,
    /// Why it is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_reason: Option<TerminationReason>,
    /// How it is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_kind: Option<TerminationKind>,
    /// Exit code, if it exited.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
}

/// One page of a listing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BackendPage {
    /// The rows.
    pub backends: Vec<BackendInfo>,
    /// Pass as `cursor` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// A drone, as `/ctrl/drones` lists it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DroneInfo {
    /// Never reused.
    pub id: i32,
    /// Name, unique in its cluster.
    pub name: String,
    /// Cluster.
    pub cluster: String,
    /// Pool.
    pub pool: String,
    /// Heard of recently enough to be scheduled to, and not draining.
    pub ready: bool,
    /// Takes no new backends: it was told so, or it is shutting down.
    pub draining: bool,
    /// It said that it is shutting down.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stopping: bool,
    /// When what is left on it is asked to end, cluster time in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain_deadline: Option<u64>,
    /// Live backends: of a draining drone, how many are still to go.
    pub backend_count: u64,
    /// Milliseconds of cluster time since its last heartbeat; absent before the first of its incarnation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_heartbeat_age_ms: Option<u64>,
    /// Version it gave in its handshake.
    pub version: String,
}

/// One page of a listing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DronePage {
    /// The rows.
    pub drones: Vec<DroneInfo>,
    /// Pass as `cursor` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_cursor: Option<String>,
}

/// GET `/ctrl/cluster`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClusterInfo {
    /// Random, made when the cluster was formed; absent before.
    pub cluster_id: Option<String>,
    /// Member id of the leader.
    pub leader: Option<u64>,
    /// Raft term.
    pub term: u64,
    /// Cluster time in milliseconds.
    pub cluster_time: u64,
    /// Replicas.
    pub members: Vec<MemberInfo>,
    /// State checksum at a fixed log index.
    pub checksum: Checksum,
    /// How the replicas' checksums compare.
    #[serde(default)]
    pub checksum_agreement: ChecksumAgreement,
    /// Lease durations; absent before the cluster is formed.
    pub lease: Option<crate::lease::LeaseConfig>,
}

/// A replica.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MemberInfo {
    /// Member id.
    pub id: u64,
    /// Its advertised URL, if known here.
    pub url: Option<String>,
    /// Its peer address.
    pub peer_addr: String,
    /// Identity of the disk that the id belongs to, hexadecimal.
    #[serde(default)]
    pub identity: String,
    /// What keeps the answering controller from talking to it, and what to do; absent if nothing does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// `leader`, `follower`, `learner` or `unknown`.
    pub role: String,
    /// Last log index known here.
    pub last_log: Option<u64>,
    /// Applied index; only of the answering replica.
    pub applied: Option<u64>,
    /// Entries behind the leader, if known here.
    pub lag: Option<u64>,
}

/// POST `/ctrl/cluster/init`, to a waiting controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitCluster {
    /// Peer addresses of the members, `HOST:PORT`; their ids will be 1..n in this order.
    pub members: Vec<String>,
    /// Lease durations; the defaults if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<crate::lease::LeaseConfig>,
}

/// The cluster that an init formed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitResult {
    /// The cluster's id.
    pub cluster_id: String,
    /// Its members.
    pub members: Vec<NewMember>,
}

/// A member of a new cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewMember {
    /// Member id.
    pub id: u64,
    /// Where its peers reach it.
    pub peer_addr: String,
}

/// POST `/ctrl/cluster/members`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetMember {
    /// The member whose address changes; absent to add the process that waits at the address, which gets the next id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// Where its peers reach it, `HOST:PORT`.
    pub peer_addr: String,
}

/// What became of a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberChangeResult {
    /// Member id.
    pub id: u64,
    /// `learner`, `voter` or `removed`.
    pub role: String,
    /// Whether anything had to be done.
    pub updated: bool,
}

/// POST `/ctrl/cluster/transfer-leader`. The body may be absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferLeader {
    /// Who is to lead; whoever is best if absent.
    #[serde(default)]
    pub to: Option<u64>,
}

/// State checksum, comparable between replicas at the same index. Also the body of POST `/ctrl/cluster/checksum`: the
/// operator's choice of the one that is right.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksum {
    /// Log index at which it was taken.
    pub index: u64,
    /// Its value, sixteen hexadecimal digits: JSON numbers are exact only up to 2^53.
    pub value: String,
}

impl Checksum {
    /// The checksum `value` at `index`.
    pub fn new(index: u64, value: u64) -> Self {
        Self { index, value: format!("{value:016x}") }
    }

    /// The value as a number.
    pub fn number(&self) -> Result<u64, FieldError> {
        let digits = !self.value.is_empty() && self.value.bytes().all(|byte| byte.is_ascii_hexdigit());
        u64::from_str_radix(&self.value, 16).ok().filter(|_| digits).ok_or_else(|| {
            FieldError::new(
                "value",
                "must be a checksum, at most 16 hexadecimal digits, as cluster status shows it",
            )
        })
    }
}

/// How the replicas' checksums compare, as the answering replica sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChecksumAgreement {
    /// `waiting` (too few are known), `agrees` (a majority has this replica's), `undecided` (they differ, and too few are
    /// known), `split` (they differ and no majority agrees: no key is acquired until an operator decides) or `minority`
    /// (this replica's state is wrong).
    pub state: String,
    /// Log index at which that was found.
    pub index: u64,
    /// Members' checksums there, where they differ without a majority.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub values: Vec<MemberChecksum>,
    /// Other members whose checksum differs from that of the majority.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub differing: Vec<u64>,
}

/// The checksum of one member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberChecksum {
    /// Member id.
    pub member: u64,
    /// Its checksum, sixteen hexadecimal digits.
    pub value: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checksum_is_hexadecimal_text() {
        assert_eq!(Checksum::new(8, 255), Checksum { index: 8, value: "00000000000000ff".to_owned() });
        let number = |text: &str| Checksum { index: 8, value: text.to_owned() }.number().ok();
        assert_eq!(number("00000000000000ff"), Some(255));
        assert_eq!((number("FF"), number("ffffffffffffffff")), (Some(255), Some(u64::MAX)));
        for bad in ["", "+1", "0xff", "g", "10000000000000000", " 1"] {
            assert_eq!(number(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_longer_wait_is_capped_and_not_refused() {
        for (wait_ms, capped_ms) in [
            (None, WAIT_MS_DEFAULT),
            (Some(0), 0),
            (Some(WAIT_MS_MAX), WAIT_MS_MAX),
            (Some(WAIT_MS_MAX + 1), WAIT_MS_MAX),
            (Some(u64::MAX), WAIT_MS_MAX),
        ] {
            let request = ConnectRequest { wait_ms, ..ConnectRequest::default() };
            request.check().unwrap();
            assert_eq!(request.capped_wait_ms(), capped_ms);
        }
    }
}
