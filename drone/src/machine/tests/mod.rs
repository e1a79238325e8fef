//! Tests of the machine: scripts that say what holds, a property over a model of the world around it that crashes and
//! restarts it, and a measurement of the work per input.

mod property;
mod scripts;
mod work;
mod world;
mod world_io;

use super::*;
use crate::guard::Update;
use crate::journal::{EndNote, Judged};
use holdfast_wire::drone::{
    AcquiredKey, Action, ActionMessage, ControllerHandshake, MessageToDrone, VersionInfo,
};
use holdfast_wire::{BackendStatus, KeyConfig};
use std::net::SocketAddr;

/// The lease of the tests.
pub(super) const LEASE: LeaseConfig =
    LeaseConfig { renew_ms: 30_000, soft_terminate_ms: 40_000, hard_terminate_ms: 50_000, expiry_ms: 60_000 };
/// Drone time at the start of the tests.
pub(super) const START: i64 = 1_000_000;

pub(super) fn handshake(cluster: &str) -> ControllerHandshake {
    ControllerHandshake {
        version: VersionInfo::current(),
        name: "co-1".into(),
        cluster_id: Some(cluster.into()),
        lease: Some(LEASE),
    }
}

pub(super) fn spawn_action(key: &str, token: u64, base: i64, incarnation: Option<&str>) -> Action {
    Action::Spawn {
        executable: serde_json::json!({"command": ["true"]}),
        key: AcquiredKey {
            key: KeyConfig { name: key.into(), ..KeyConfig::default() },
            deadlines: LEASE.deadlines(base),
            token,
        },
        static_token: None,
        incarnation: incarnation.map(Into::into),
    }
}

pub(super) fn terminate_action(kind: TerminationKind) -> Action {
    Action::Terminate { kind, reason: TerminationReason::External }
}

pub(super) fn message(session: u64, message: MessageToDrone) -> Input {
    Input::Message { session, message: Box::new(message) }
}

pub(super) fn action(session: u64, action_id: &str, backend: &str, action: Action) -> Input {
    message(
        session,
        MessageToDrone::Action(ActionMessage {
            action_id: action_id.into(),
            backend_id: backend.into(),
            drone_id: 1,
            action,
        }),
    )
}

pub(super) fn address(n: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 20_000 + n))
}

impl Machine {
    /// The machine's own consistency: its indexes say what its backends say, and everything is bounded.
    pub(super) fn check(&self) {
        let count = |pick: fn(&Backend) -> bool| self.backends.iter().filter(|(_, b)| pick(b)).count();
        assert_eq!(self.alive, count(Backend::is_alive), "the number of backends that are not over");
        assert_eq!(self.unread, count(|b| matches!(b.phase, Phase::Unread)), "unread directories");
        for (id, backend) in self.backends.iter() {
            let watched = matches!(backend.phase, Phase::Watched);
            assert_eq!(backend.desired.is_some(), watched, "{id}: a desire exactly while it is watched");
            let known = !matches!(backend.phase, Phase::Connecting | Phase::Watched);
            assert!(known || backend.lifecycle.is_some() && backend.token.is_some(), "{id}");
            if let Some(key) = &backend.delays {
                assert!(self.delaying.get(key).is_some_and(|ids| ids.contains(id)), "{id} delays its key");
                assert!(backend.is_alive(), "{id}: what is over delays nothing");
            }
            if matches!(backend.phase, Phase::Over) {
                assert!(
                    backend.end_acks.is_empty() && backend.spawn_acks.is_empty(),
                    "{id}: all acknowledged"
                );
                assert!(self.outbox.holds(id), "{id}: it is kept until its end is acknowledged");
            }
            assert!(backend.end_acks.len() <= ACTIONS_PER_BACKEND_MAX, "{id}");
            assert!(backend.spawn_acks.len() <= ACTIONS_PER_BACKEND_MAX, "{id}");
            // A desired end is at least as hard as what is known to be asked for.
            if let (Some(desired), Some(lifecycle)) = (&backend.desired, &backend.lifecycle) {
                assert_eq!(desired.end, lifecycle.end_kind(), "{id}: the guard is told every end");
                assert!(desired.kill_at <= desired.deadlines.hard_terminate_at, "{id}");
            }
        }
        for (key, ids) in self.delaying.iter() {
            assert!(!ids.is_empty(), "{key:?}");
            for id in ids {
                assert_eq!(self.backends.get(id).and_then(|b| b.delays.as_ref()), Some(key));
            }
        }
        let (accepted, ended) = self.admission.sizes();
        assert!(ended <= crate::admission::BACKENDS_MAX);
        assert!(accepted <= crate::admission::BACKENDS_MAX + self.backends.len());
    }
}
