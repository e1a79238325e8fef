//! Messages on the drone socket: text frames of JSON, the handshake first, then externally tagged messages.

use crate::backend::{BackendState, TerminationKind, TerminationReason};
use crate::key::KeyConfig;
use crate::lease::{Deadlines, LeaseConfig};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Close code for a drone whose name another live drone holds.
pub const CLOSE_NAME_TAKEN: u16 = 4409;
/// Close code for a frame that is not a message.
pub const CLOSE_BAD_MESSAGE: u16 = 4400;
/// Close code of a controller that is shutting down or cannot reach a leader: connect elsewhere.
pub const CLOSE_GO_ELSEWHERE: u16 = 4503;

/// `{version, git_hash}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    /// Crate version.
    pub version: String,
    /// Git hash.
    pub git_hash: String,
}

impl VersionInfo {
    /// This build's.
    pub fn current() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            git_hash: option_env!("HOLDFAST_GIT_HASH").unwrap_or("unknown").to_owned(),
        }
    }
}

/// First frame from the drone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DroneHandshake {
    /// The drone's version.
    pub version: VersionInfo,
    /// The drone's name.
    pub name: String,
    /// Ours: random, one for each start of the drone's process. A Plane drone has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<String>,
    /// Ours: random, one for each data directory, valid on one machine only. A handshake that gives only one of
    /// `incarnation` and `data_id` is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_id: Option<String>,
}

/// First frame from the controller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ControllerHandshake {
    /// The controller's version.
    pub version: VersionInfo,
    /// The controller's name.
    pub name: String,
    /// Ours: a drone ends the backends of another cluster id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<String>,
    /// Ours: the replicated lease durations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseConfig>,
}

/// From the drone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MessageFromDrone {
    /// Gives the drone's clock; acquisitions start from it.
    Heartbeat(Heartbeat),
    /// Renews one key (Plane's form).
    RenewKey(RenewKeyRequest),
    /// Ours: renews many.
    RenewKeys(RenewKeysRequest),
    /// A backend's new state; repeated until [`MessageToDrone::AckEvent`].
    BackendEvent(BackendEvent),
    /// The action is durable at the drone or carried out. (A Plane drone acknowledges what it received.)
    AckAction {
        /// Which.
        action_id: String,
    },
    /// Resource use; accepted and not kept.
    BackendMetrics(Value),
    /// Ours: this drone is shutting down and takes no new backends; its successor under the same name does. Repeated
    /// until [`MessageToDrone::AckDraining`]. It has no fields, and later ones may be added.
    Draining {},
    /// Ours: which backends have open connections, and for how long the others have had none; repeated until
    /// [`MessageToDrone::AckActivity`]. Everything is said again in a new session.
    BackendActivity(BackendActivity),
    /// Ours: a page of the list of all backends of which anything is on the drone's disk.
    Backends(BackendsPage),
}

/// See [`MessageFromDrone::Heartbeat`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The drone's clock, in milliseconds.
    pub local_time: i64,
}

/// See [`MessageFromDrone::RenewKey`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewKeyRequest {
    /// The backend that holds the key.
    pub backend: String,
    /// The drone's clock, in milliseconds.
    pub local_time: i64,
    /// Ours: the fencing token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<u64>,
}

/// See [`MessageFromDrone::RenewKeys`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewKeysRequest {
    /// The drone's clock, in milliseconds.
    pub local_time: i64,
    /// At most [`crate::limits::RENEW_KEYS_MAX`].
    pub keys: Vec<RenewItem>,
}

/// One key of [`RenewKeysRequest`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewItem {
    /// The backend that holds the key.
    pub backend: String,
    /// The fencing token.
    pub token: u64,
}

/// See [`MessageFromDrone::BackendEvent`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendEvent {
    /// The drone's number for this event; only for the acknowledgement.
    pub event_id: i64,
    /// The backend.
    pub backend_id: String,
    /// Its state.
    pub state: BackendState,
    /// The drone's clock, in milliseconds.
    pub timestamp: i64,
    /// Ours: the fencing token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<u64>,
}

/// See [`MessageFromDrone::Backends`]. A drone that gives a `data_id` sends its list once in each session, right after
/// the controller's handshake, one page at a time: it sends the next page when [`MessageToDrone::AckBackends`]
/// acknowledges the one before. A drone that has nothing sends one empty page with `last`. The list takes effect with the
/// last page, and only for the session that sent it; the acknowledgement of the last page says that it took effect.
/// Until then the drone gets no action and no new backend; its renewals and reports are handled meanwhile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendsPage {
    /// At most [`crate::limits::BACKENDS_PER_PAGE_MAX`]; at most [`crate::limits::BACKENDS_LISTED_MAX`] in all pages.
    pub backends: Vec<ListedBackend>,
    /// Whether this page ends the list.
    pub last: bool,
}

/// One backend of [`BackendsPage`]: it runs, or has ended and the report of that is not acknowledged yet, or is not
/// adopted yet, or its directory is unreadable.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListedBackend {
    /// The backend.
    pub backend: String,
    /// The fencing token, if the drone knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<u64>,
    /// The state, if the drone knows it. A `terminated` that is listed is reported as well: only the report frees the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<BackendState>,
}

/// See [`MessageFromDrone::BackendActivity`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackendActivity {
    /// The drone's number for this message: for the acknowledgement, and for the order. It grows for as long as the
    /// drone's process lives, over all its sessions; the controllers ignore what is older than what they know.
    pub activity_id: i64,
    /// At most [`crate::limits::ACTIVITIES_MAX`].
    pub backends: Vec<ActivityItem>,
}

/// One backend of [`BackendActivity`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActivityItem {
    /// The backend.
    pub backend: String,
    /// The fencing token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<u64>,
    /// Open TCP connections to it.
    pub connections: u64,
    /// For how long there has been none, in milliseconds when this was sent; means nothing while there are some.
    #[serde(default)]
    pub idle_ms: u64,
}

/// To the drone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum MessageToDrone {
    /// Something to do; repeated until acknowledged.
    Action(ActionMessage),
    /// The event is recorded durably.
    AckEvent {
        /// Which.
        event_id: i64,
    },
    /// Answer to [`MessageFromDrone::RenewKey`].
    RenewKeyResponse(RenewKeyResponse),
    /// Answer to [`MessageFromDrone::RenewKeys`].
    RenewKeysResponse(RenewKeysResponse),
    /// Ours: it is recorded durably that the drone is shutting down.
    AckDraining {},
    /// Ours: the activity is recorded durably, or it concerns no limit.
    AckActivity {
        /// Which.
        activity_id: i64,
        /// Idle backends that have a limit. The drone says of each after `in_ms` once more how long it has been idle,
        /// in a new message and after a new look, if it is idle still. Only such a message ends a backend as idle.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        again: Vec<AskAgain>,
    },
    /// Ours: the page of the list of backends is taken; with the last page, the list took effect.
    AckBackends {},
}

/// One backend of [`MessageToDrone::AckActivity`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskAgain {
    /// The backend.
    pub backend: String,
    /// After how long, in milliseconds.
    pub in_ms: u64,
}

/// See [`MessageToDrone::Action`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionMessage {
    /// Names it for the acknowledgement.
    pub action_id: String,
    /// The backend.
    pub backend_id: String,
    /// The drone's number.
    pub drone_id: i32,
    /// What to do.
    pub action: Action,
}

/// What a drone is asked to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Action {
    /// Start a backend, unless its `soft_terminate_at` has passed.
    Spawn {
        /// [`crate::http::Executable`].
        executable: Value,
        /// The key it holds.
        key: AcquiredKey,
        /// One token for all connections.
        static_token: Option<String>,
        /// Ours: the incarnation whose clock the deadlines are of. A drone refuses a spawn for another one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        incarnation: Option<String>,
    },
    /// End a backend.
    Terminate {
        /// How.
        kind: TerminationKind,
        /// Why.
        reason: TerminationReason,
    },
}

/// A key as its holder gets it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AcquiredKey {
    /// The key.
    pub key: KeyConfig,
    /// In the drone's time.
    pub deadlines: Deadlines,
    /// Fencing token.
    pub token: u64,
}

/// See [`MessageToDrone::RenewKeyResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewKeyResponse {
    /// The backend.
    pub backend: String,
    /// The new deadlines; `null` if it was not renewed.
    pub deadlines: Option<Deadlines>,
}

/// See [`MessageToDrone::RenewKeysResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewKeysResponse {
    /// One for each key of the request.
    pub keys: Vec<RenewedKey>,
}

/// One key of [`RenewKeysResponse`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RenewedKey {
    /// The backend.
    pub backend: String,
    /// The new deadlines, if renewed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadlines: Option<Deadlines>,
    /// Why not, otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<RenewRefusal>,
}

/// Why a key was not renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RenewRefusal {
    /// The deadlines stand, and the backend ends on the timeline.
    RenewalPrevented,
    /// The key is not this backend's any more: end it now.
    NotHolder,
    /// The controllers don't know this backend: end it now.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn messages_are_externally_tagged_as_planes() {
        let message: MessageFromDrone =
            serde_json::from_value(json!({"Heartbeat": {"local_time": 5}})).unwrap();
        assert_eq!(message, MessageFromDrone::Heartbeat(Heartbeat { local_time: 5 }));
        let message: MessageFromDrone =
            serde_json::from_value(json!({"RenewKey": {"backend": "ba-1", "local_time": 5}})).unwrap();
        assert_eq!(
            message,
            MessageFromDrone::RenewKey(RenewKeyRequest {
                backend: "ba-1".into(),
                local_time: 5,
                token: None
            })
        );
        let message: MessageFromDrone = serde_json::from_value(json!({"Draining": {"new": 1}})).unwrap();
        assert_eq!(message, MessageFromDrone::Draining {});
        let activity = MessageFromDrone::BackendActivity(BackendActivity {
            activity_id: 7,
            backends: vec![ActivityItem { backend: "ba-1".into(), token: None, connections: 0, idle_ms: 5 }],
        });
        assert_eq!(
            serde_json::to_value(&activity).unwrap(),
            json!({"BackendActivity": {"activity_id": 7,
                   "backends": [{"backend": "ba-1", "connections": 0, "idle_ms": 5}]}})
        );
        let message = MessageToDrone::Action(ActionMessage {
            action_id: "ak-1".into(),
            backend_id: "ba-1".into(),
            drone_id: 1,
            action: Action::Terminate { kind: TerminationKind::Hard, reason: TerminationReason::External },
        });
        assert_eq!(
            serde_json::to_value(&message).unwrap(),
            json!({"Action": {"action_id": "ak-1", "backend_id": "ba-1", "drone_id": 1,
                   "action": {"Terminate": {"kind": "hard", "reason": "external"}}}})
        );
        let ack = MessageToDrone::AckActivity { activity_id: 7, again: Vec::new() };
        assert_eq!(serde_json::to_value(&ack).unwrap(), json!({"AckActivity": {"activity_id": 7}}));
        let page: MessageFromDrone = serde_json::from_value(
            json!({"Backends": {"backends": [{"backend": "ba-1", "state": {"status": "loading"}}], "last": true}}),
        )
        .unwrap();
        let listed =
            ListedBackend { backend: "ba-1".into(), token: None, state: Some(BackendState::Loading) };
        assert_eq!(page, MessageFromDrone::Backends(BackendsPage { backends: vec![listed], last: true }));
        assert_eq!(serde_json::to_value(MessageToDrone::AckBackends {}).unwrap(), json!({"AckBackends": {}}));
    }
}
