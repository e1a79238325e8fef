//! The life of a backend.

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// Where a backend stands in its life. The order of the variants is the order of the life: a later report never goes
/// back to an earlier one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode,
)]
#[serde(rename_all = "kebab-case")]
pub enum BackendStatus {
    /// Assigned to a drone, which has not said anything of it. The only status that a controller assigns.
    Scheduled,
    /// The drone has it and is fetching what it needs.
    Loading,
    /// The drone is starting the process or container.
    Starting,
    /// Started; the drone waits for an HTTP answer on its port.
    Waiting,
    /// Answers HTTP.
    Ready,
    /// Asked to end (SIGTERM); the key is still held.
    Terminating,
    /// Being killed (SIGKILL); the key is still held.
    HardTerminating,
    /// Nothing of it is left.
    Terminated,
}

impl BackendStatus {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Loading => "loading",
            Self::Starting => "starting",
            Self::Waiting => "waiting",
            Self::Ready => "ready",
            Self::Terminating => "terminating",
            Self::HardTerminating => "hard-terminating",
            Self::Terminated => "terminated",
        }
    }
}

impl std::fmt::Display for BackendStatus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// How a backend is ended.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Encode, Decode,
)]
#[serde(rename_all = "lowercase")]
pub enum TerminationKind {
    /// SIGTERM, then SIGKILL after the grace period or at the hard deadline.
    Soft,
    /// SIGKILL.
    Hard,
}

/// Why a backend is ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, Encode, Decode)]
#[serde(rename_all = "lowercase")]
pub enum TerminationReason {
    /// Its drone or controller tidied it away (idle, life time, drain).
    Swept,
    /// Somebody asked for it.
    External,
    /// Its key could not be renewed in time.
    KeyExpired,
    /// Its drone was not heard of until the key expired.
    Lost,
    /// It did not answer HTTP in time.
    StartupTimeout,
    /// The drone could not start or watch it.
    InternalError,
}

/// A status with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Encode, Decode)]
#[serde(tag = "status", rename_all = "kebab-case")]
pub enum BackendState {
    /// See [`BackendStatus::Scheduled`].
    Scheduled,
    /// See [`BackendStatus::Loading`].
    Loading,
    /// See [`BackendStatus::Starting`].
    Starting,
    /// See [`BackendStatus::Waiting`].
    Waiting {
        /// Where it will answer.
        address: SocketAddr,
    },
    /// See [`BackendStatus::Ready`].
    Ready {
        /// Where it answers.
        address: SocketAddr,
    },
    /// See [`BackendStatus::Terminating`].
    Terminating {
        /// The status before.
        last_status: BackendStatus,
        /// How it is ended.
        termination: TerminationKind,
        /// Why.
        reason: TerminationReason,
    },
    /// See [`BackendStatus::HardTerminating`].
    HardTerminating {
        /// The status before any termination.
        last_status: BackendStatus,
        /// Why.
        reason: TerminationReason,
    },
    /// See [`BackendStatus::Terminated`].
    Terminated {
        /// The status before any termination.
        last_status: BackendStatus,
        /// How it was ended, if it did not end by itself.
        #[serde(default)]
        termination: Option<TerminationKind>,
        /// Why it was ended, if it did not end by itself.
        #[serde(default)]
        reason: Option<TerminationReason>,
        /// The exit code, if it ended by exiting.
        #[serde(default)]
        exit_code: Option<i32>,
    },
}

impl BackendState {
    /// The status alone.
    pub fn status(&self) -> BackendStatus {
        match self {
            Self::Scheduled => BackendStatus::Scheduled,
            Self::Loading => BackendStatus::Loading,
            Self::Starting => BackendStatus::Starting,
            Self::Waiting { .. } => BackendStatus::Waiting,
            Self::Ready { .. } => BackendStatus::Ready,
            Self::Terminating { .. } => BackendStatus::Terminating,
            Self::HardTerminating { .. } => BackendStatus::HardTerminating,
            Self::Terminated { .. } => BackendStatus::Terminated,
        }
    }

    /// The address of a waiting or ready backend.
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Waiting { address } | Self::Ready { address } => Some(*address),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_planes_json_shape() {
        let cases = [
            (BackendState::Loading, r#"{"status":"loading"}"#),
            (
                BackendState::Ready { address: "127.0.0.1:80".parse().unwrap() },
                r#"{"status":"ready","address":"127.0.0.1:80"}"#,
            ),
            (
                BackendState::HardTerminating {
                    last_status: BackendStatus::Ready,
                    reason: TerminationReason::KeyExpired,
                },
                r#"{"status":"hard-terminating","last_status":"ready","reason":"keyexpired"}"#,
            ),
            (
                BackendState::Terminated {
                    last_status: BackendStatus::HardTerminating,
                    termination: Some(TerminationKind::Hard),
                    reason: None,
                    exit_code: Some(0),
                },
                r#"{"status":"terminated","last_status":"hard-terminating","termination":"hard","reason":null,"exit_code":0}"#,
            ),
        ];
        for (state, json) in cases {
            assert_eq!(serde_json::to_string(&state).unwrap(), json);
            assert_eq!(serde_json::from_str::<BackendState>(json).unwrap(), state);
        }
    }

    #[test]
    fn missing_optional_fields_and_unknown_ones_are_tolerated() {
        let state: BackendState =
            serde_json::from_str(r#"{"status":"terminated","last_status":"ready","new_field":1}"#).unwrap();
        assert_eq!(state.status(), BackendStatus::Terminated);
    }
}
