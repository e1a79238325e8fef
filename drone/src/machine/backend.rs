//! What the machine knows of one backend.

use super::Spawn;
use crate::activity::Place;
use crate::backend_state::{Desired, Lifecycle};
use holdfast_wire::{BackendState, TerminationKind, TerminationReason};
use std::net::SocketAddr;

/// Where a backend stands.
#[derive(Debug)]
pub(super) enum Phase {
    /// Its directory was found at the start and is being read.
    Unread,
    /// Its record is being made durable.
    Preparing(Box<Spawn>),
    /// Its guard lives and has not greeted yet.
    Connecting,
    /// Its guard is connected.
    Watched,
    /// What is left of it is being ended without its guard.
    Ending,
    /// Nothing of it is left, or it was never started. Its end is reported until that is acknowledged.
    Over,
    /// It was started on another machine, or that cannot be excluded: it is named, and nothing is reported.
    Elsewhere,
}

/// An end that was asked for, before there is a [`Lifecycle`] to take it.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    pub(super) kind: TerminationKind,
    pub(super) reason: TerminationReason,
    /// When the grace of a soft end is over, in drone time.
    pub(super) kill_at: i64,
}

/// How much of an end is durable.
#[derive(Debug, Default)]
pub(super) struct Noted {
    pub(super) durable: Option<TerminationKind>,
    pub(super) writing: bool,
}

#[derive(Debug)]
pub(super) struct Backend {
    pub(super) phase: Phase,
    /// Missing as long as its record is not known.
    pub(super) lifecycle: Option<Lifecycle>,
    /// The latest state that was reported, for the list.
    pub(super) latest: Option<BackendState>,
    pub(super) token: Option<u64>,
    pub(super) address: Option<SocketAddr>,
    /// Its key, while spawns for the same key have to wait for it.
    pub(super) delays: Option<(String, String)>,
    /// What the runtime was told last.
    pub(super) desired: Option<Desired>,
    /// An end for which there is no lifecycle yet.
    pub(super) end: Option<End>,
    pub(super) noted: Noted,
    /// Spawns to acknowledge once its record is durable.
    pub(super) spawn_acks: Vec<String>,
    /// Terminates to acknowledge once they are durable or carried out.
    pub(super) end_acks: Vec<(String, TerminationKind)>,
    /// It has a directory.
    pub(super) on_disk: bool,
    /// Where its connections are seen, once that is known.
    pub(super) place: Option<Place>,
    pub(super) connections_watched: bool,
}

impl Backend {
    pub(super) fn new(phase: Phase, on_disk: bool) -> Self {
        Self {
            phase,
            lifecycle: None,
            latest: None,
            token: None,
            address: None,
            delays: None,
            desired: None,
            end: None,
            noted: Noted::default(),
            spawn_acks: Vec::new(),
            end_acks: Vec::new(),
            on_disk,
            place: None,
            connections_watched: false,
        }
    }

    /// Whether something of it may be left that this drone has to end or to wait for.
    pub(super) fn is_alive(&self) -> bool {
        !matches!(self.phase, Phase::Over | Phase::Elsewhere)
    }
}
