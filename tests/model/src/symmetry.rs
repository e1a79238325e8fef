//! Founders that differ only in their number are exchangeable: of the states that a renumbering turns into
//! each other, one is kept.
//!
//! Every step and every property treats founders alike, so a renumbered state has the renumbered successors.
//! The founders are sorted by what can be seen of each without a number. Founders that look the same stay in
//! their order: two states that are renumberings of each other may then both be kept, which costs time and
//! nothing else.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use crate::Holdfast;
use crate::config::Start;
use crate::state::{Entry, IDS, Identity, Kind, MemberId, Membership, Node, Process, Slot, State, bit};

/// A renumbering.
struct Numbers {
    /// The new address of each founder's address.
    slots: Vec<Slot>,
    /// The new number of each identity.
    identities: Vec<Identity>,
}

impl Numbers {
    fn slot(&self, slot: Slot) -> Slot {
        self.slots.get(usize::from(slot)).copied().unwrap_or(slot)
    }

    fn id(&self, id: MemberId) -> MemberId {
        if id == 0 { 0 } else { self.slot(id - 1) + 1 }
    }

    fn set(&self, ids: u8) -> u8 {
        (0..8).filter(|id| ids & bit(*id) != 0).fold(0, |set, id| set | bit(self.id(id)))
    }

    fn identity(&self, identity: Identity) -> Identity {
        self.identities[usize::from(identity)]
    }

    fn membership(&self, membership: &Membership) -> Membership {
        let mut renumbered = Membership {
            nodes: [Node::default(); IDS],
            voters: self.set(membership.voters),
            outgoing: self.set(membership.outgoing),
            used: membership.used,
        };
        for (id, node) in membership.members() {
            let node = Node { slot: self.slot(node.slot), identity: self.identity(node.identity) };
            renumbered.set(self.id(id), node);
        }
        renumbered
    }

    fn entry(&self, entry: &mut Entry) {
        if let Kind::Membership(membership) = &mut entry.kind {
            *membership = self.membership(membership);
        }
    }

    fn process(&self, process: &mut Process) {
        process.identity = self.identity(process.identity);
        if let Some(naming) = &mut process.naming {
            naming.id = self.id(naming.id);
            naming.founding = naming.founding.map(|(init, slot)| (init, self.slot(slot)));
        }
        process.voted = self.id(process.voted);
        process.log.iter_mut().for_each(|entry| self.entry(entry));
    }
}

impl Holdfast {
    /// The state that stands for all its renumberings.
    pub(crate) fn representative(&self, state: State) -> State {
        let (Start::Formed(founders) | Start::Initialised(founders)) = self.limits.start else {
            return state;
        };
        let limits = &self.limits;
        if !limits.symmetry || limits.moves || limits.restores > 0 {
            return state;
        }
        let mut order: Vec<(u64, Slot)> =
            (0..founders).map(|slot| (appearance(&state, slot, founders), slot)).collect();
        order.sort();
        if order.iter().enumerate().all(|(new, (_, old))| new == usize::from(*old)) && state.lost < 2 {
            return state;
        }
        let mut slots = vec![0; order.len()];
        for (new, (_, old)) in order.iter().enumerate() {
            slots[usize::from(*old)] = new as Slot;
        }
        let identities = identities(&state, &slots, founders);
        renumber(state, &Numbers { slots, identities })
    }
}

/// The new identities: those of the first disks follow their founders, later ones are sorted by address, and
/// those of which no disk is left come last, in their order.
fn identities(state: &State, slots: &[Slot], founders: u8) -> Vec<Identity> {
    let first = state.slots.len() as Identity;
    let mut new: Vec<Identity> = (0..state.next_identity).collect();
    for old in 1..=founders {
        new[usize::from(old)] = slots[usize::from(old) - 1] + 1;
    }
    let place = |identity: Identity| {
        let found = state.processes().find(|(_, p)| p.identity == identity);
        found.map_or(u8::MAX, |(slot, _)| slots.get(usize::from(slot)).copied().unwrap_or(slot))
    };
    let mut later: Vec<(Slot, Identity)> = (first + 1..state.next_identity).map(|i| (place(i), i)).collect();
    later.sort();
    for (at, (_, old)) in later.iter().enumerate() {
        new[usize::from(*old)] = first + 1 + at as Identity;
    }
    new
}

/// What can be seen of a founder without any founder's number.
fn appearance(state: &State, slot: Slot, founders: u8) -> u64 {
    let id = slot + 1;
    let mut hasher = DefaultHasher::new();
    let Some(process) = state.at(slot) else { return 0 };
    (process.role, process.term, process.applied, process.stopped, process.banned).hash(&mut hasher);
    (process.identity == id, process.log.len()).hash(&mut hasher);
    let named = process.naming.map(|naming| {
        let coordinates = naming.founding.is_some_and(|(_, coordinator)| coordinator == slot);
        (coordinates, if naming.id <= founders { 0 } else { naming.id })
    });
    named.hash(&mut hasher);
    let voted = if process.voted == 0 || process.voted > founders { process.voted } else { 0x80 };
    (voted, process.voted == id).hash(&mut hasher);
    for entry in &process.log {
        entry.term.hash(&mut hasher);
        match &entry.kind {
            Kind::Blank => 0.hash(&mut hasher),
            Kind::Membership(m) => (1, m.votes(id), m.node(id).map(|n| n.identity == id)).hash(&mut hasher),
            Kind::Acquire(number) => (2, number).hash(&mut hasher),
            Kind::Release(number) => (3, number).hash(&mut hasher),
        }
    }
    for ack in state.appended.iter().filter(|ack| ack.id == id) {
        (ack.term, ack.len, ack.identity == id).hash(&mut hasher);
    }
    let late = state.late.as_ref().map(|late| (late.term, late.leader == id, late.id == id));
    late.hash(&mut hasher);
    for ack in state.votes.iter().filter(|ack| ack.id == id) {
        (ack.term, ack.identity == id).hash(&mut hasher);
    }
    for cluster in &state.clusters {
        cluster.leaders.iter().map(|leader| *leader == id).collect::<Vec<_>>().hash(&mut hasher);
    }
    hasher.finish()
}

fn renumber(mut state: State, numbers: &Numbers) -> State {
    let mut slots = state.slots.clone();
    for (old, process) in state.slots.drain(..).enumerate() {
        let process = process.map(|mut process| {
            numbers.process(Arc::make_mut(&mut process));
            process
        });
        slots[usize::from(numbers.slot(old as Slot))] = process;
    }
    state.slots = slots;
    for ack in &mut state.appended {
        (ack.id, ack.identity) = (numbers.id(ack.id), numbers.identity(ack.identity));
    }
    for ack in &mut state.votes {
        (ack.id, ack.identity) = (numbers.id(ack.id), numbers.identity(ack.identity));
        ack.candidate = numbers.identity(ack.candidate);
    }
    if let Some(late) = &mut state.late {
        let late = Arc::make_mut(late);
        (late.leader, late.id) = (numbers.id(late.leader), numbers.id(late.id));
        late.identity = numbers.identity(late.identity);
        late.entries.iter_mut().for_each(|entry| numbers.entry(entry));
    }
    state.appended.sort();
    state.votes.sort();
    for cluster in &mut state.clusters {
        let cluster = Arc::make_mut(cluster);
        cluster.leaders.iter_mut().for_each(|leader| *leader = numbers.identity(*leader));
        cluster.acknowledged.iter_mut().for_each(|(entry, _)| numbers.entry(entry));
    }
    state
}
