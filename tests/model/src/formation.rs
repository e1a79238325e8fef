//! How a cluster comes to be: `cluster init`, step by step.

use std::sync::Arc;

use crate::config::{Start, Variant};
use crate::state::{
    Asked, Cluster, ClusterId, Entry, IDS, Identity, Kind, MemberId, Membership, Naming, Node, Process, Slot,
    State, bit,
};
use crate::{Holdfast, Violation};

impl Holdfast {
    /// The commands that operators may give.
    pub(crate) fn inits(&self) -> &[(Slot, Vec<Slot>)] {
        match &self.limits.start {
            Start::Waiting(inits) => inits,
            _ => &[],
        }
    }

    /// The coordinator and the list of the command with this number.
    fn command(&self, init: u8) -> Option<(Slot, &[Slot])> {
        let (coordinator, list) = self.inits().get(usize::from(init).checked_sub(1)?)?;
        Some((*coordinator, list))
    }

    /// The coordinator, if it may begin or continue this init.
    fn coordinator<'a>(&self, state: &'a State, init: u8) -> Option<(Slot, &'a Process)> {
        let (slot, _) = self.command(init)?;
        let process = state.at(slot)?;
        let mine = process.naming.is_none_or(|n| n.founding == Some((init, slot)));
        let other = process.asked.as_ref().is_some_and(|asked| asked.init != init);
        (mine && !other && process.log.is_empty() && process.term == 0).then_some((slot, process))
    }

    /// The id that a list gives to an address.
    fn id_in(list: &[Slot], slot: Slot) -> Option<MemberId> {
        Some(list.iter().position(|s| *s == slot)? as MemberId + 1)
    }

    /// The coordinator asks an address on its list for its identity.
    pub(crate) fn ask(&self, state: &State, init: u8, slot: Slot) -> Option<State> {
        let (coordinator, process) = self.coordinator(state, init)?;
        let id = Self::id_in(self.command(init)?.1, slot)?;
        let target = state.at(slot)?;
        let same = |own: Naming| process.naming.is_some_and(|n| (n.cluster, id) == (own.cluster, own.id));
        if slot != coordinator && !self.is(Variant::AnswersBindNoOne) && !target.naming.is_none_or(same) {
            return None;
        }
        let answer = target.identity;
        let mut next = state.clone();
        let process = next.at_mut(coordinator)?;
        let asked = process.asked.get_or_insert(Asked { init, answers: [0; IDS], bound: 0 });
        // All are asked before the first is bound. An init that is repeated begins again, which is a crash
        // here.
        if asked.bound != 0 {
            return None;
        }
        asked.answers[usize::from(slot)] = answer;
        Some(next)
    }

    /// When all have answered, the coordinator durably names itself with a new cluster id.
    pub(crate) fn name(&self, state: &State, init: u8) -> Option<State> {
        let (coordinator, process) = self.coordinator(state, init)?;
        let list = self.command(init)?.1;
        let answers = process.asked.as_ref()?.answers;
        if process.naming.is_some() || list.iter().any(|slot| answers[usize::from(*slot)] == 0) {
            return None;
        }
        let id = Self::id_in(list, coordinator)?;
        let mut next = state.clone();
        let cluster = next.clusters.len() as ClusterId;
        next.clusters.push(Arc::new(Cluster::default()));
        next.at_mut(coordinator)?.naming = Some(Naming { cluster, id, founding: Some((init, coordinator)) });
        Some(next)
    }

    /// The coordinator binds a founder to its cluster id. A founder that waits notes it durably; one that is
    /// bound to anything else refuses.
    pub(crate) fn bind_founder(&self, state: &State, init: u8, slot: Slot) -> Option<State> {
        let (coordinator, process) = self.coordinator(state, init)?;
        let list = self.command(init)?.1;
        let id = Self::id_in(list, slot)?;
        let naming = Naming { id, ..process.naming? };
        let asked = process.asked.as_ref()?;
        let answer = asked.answers[usize::from(slot)];
        let all = list.iter().all(|slot| asked.answers[usize::from(*slot)] != 0);
        if slot == coordinator || !all || asked.bound & bit(slot) != 0 {
            return None;
        }
        let mut next = state.clone();
        if !self.is(Variant::AnswersBindNoOne) {
            let founder = next.at_mut(slot)?;
            if founder.identity != answer || founder.naming.is_some_and(|own| own != naming) {
                return None;
            }
            founder.naming = Some(naming);
            founder.asked = None;
        }
        next.at_mut(coordinator)?.asked.as_mut()?.bound |= bit(slot);
        Some(next)
    }

    /// When all are bound, the coordinator writes the initial membership. Raft runs from then on.
    pub(crate) fn initialise(&self, state: &State, init: u8) -> Option<State> {
        let (coordinator, process) = self.coordinator(state, init)?;
        let list = self.command(init)?.1;
        let asked = process.asked.as_ref()?;
        let all = list.iter().all(|slot| *slot == coordinator || asked.bound & bit(*slot) != 0);
        if process.naming.is_none() || !all {
            return None;
        }
        let answers = asked.answers;
        let mut next = state.clone();
        let process = next.at_mut(coordinator)?;
        process.log = vec![initial(list, |slot| answers[usize::from(slot)])];
        process.asked = None;
        Some(next)
    }

    /// Only if everyone initialises: a founder does once it has seen the others.
    pub(crate) fn initialise_self(&self, state: &State, slot: Slot) -> Option<State> {
        let list = self.command(1)?.1;
        let process = state.at(slot)?;
        if !self.is(Variant::EveryoneInitialises) || process.naming.is_some() {
            return None;
        }
        let id = Self::id_in(list, slot)?;
        let entry = initial(list, |slot| state.at(slot).map_or(0, |p| p.identity));
        let mut next = state.clone();
        if next.clusters.is_empty() {
            next.clusters.push(Arc::new(Cluster::default()));
        }
        let process = next.at_mut(slot)?;
        process.naming = Some(Naming { cluster: 0, id, founding: None });
        process.log = vec![entry];
        Some(next)
    }

    /// Two clusters of overlapping founders must not both have committed anything.
    pub(crate) fn check_formed(&self, next: &mut State, cluster: ClusterId) {
        let founders = |cluster: &Cluster| match cluster.acknowledged.first().map(|(entry, _)| entry.kind) {
            Some(Kind::Membership(membership)) if cluster.base == 0 => {
                membership.members().fold(0, |set, (_, node)| set | bit(node.slot))
            }
            _ => 0,
        };
        let own = founders(&next.clusters[usize::from(cluster)]);
        let second = next
            .clusters
            .iter()
            .enumerate()
            .any(|(other, c)| other != usize::from(cluster) && founders(c) & own != 0);
        let restored = self.limits.restores > 0;
        self.check(next, restored || !second, Violation::TwoClusters);
    }

    /// The states in which a run begins.
    pub(crate) fn start(&self) -> State {
        let slots = self.limits.slots;
        let mut state = State {
            slots: (0..slots).map(|slot| Some(Arc::new(Process::waiting(slot + 1)))).collect(),
            appended: Vec::new(),
            votes: Vec::new(),
            late: None,
            clusters: Vec::new(),
            granted: 0,
            ended: 0,
            last_token: 0,
            acquires: 0,
            lost: 0,
            changes: 0,
            next_identity: slots + 1,
            violations: Vec::new(),
        };
        let (members, formed) = match self.limits.start {
            Start::Formed(members) => (members, true),
            Start::Initialised(members) => (members, false),
            Start::Waiting(_) => return state,
        };
        let list: Vec<Slot> = (0..members).collect();
        let entry = initial(&list, |slot| slot + 1);
        let acknowledged = if formed { vec![(entry, 0)] } else { Vec::new() };
        state.clusters.push(Arc::new(Cluster { acknowledged, ..Cluster::default() }));
        for slot in list {
            if let Some(process) = state.at_mut(slot) {
                process.naming = Some(Naming { cluster: 0, id: slot + 1, founding: Some((1, 0)) });
                if formed || slot == 0 {
                    process.log = vec![entry];
                    process.applied = u8::from(formed);
                }
            }
        }
        state
    }
}

/// The entry that holds the initial membership: ids in the order of the list.
fn initial(list: &[Slot], identity: impl Fn(Slot) -> Identity) -> Entry {
    let mut membership = Membership { used: list.len() as MemberId, ..Membership::default() };
    for (at, slot) in list.iter().enumerate() {
        let id = at as MemberId + 1;
        membership.set(id, Node { slot: *slot, identity: identity(*slot) });
        membership.voters |= bit(id);
    }
    Entry { term: 0, kind: Kind::Membership(membership) }
}
