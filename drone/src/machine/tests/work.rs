//! The work per input at 10,000 backends is that at 100: counted in table entries that are touched, not in time.

use super::*;
use crate::tables::touched;
use std::collections::BTreeMap;

/// A machine with ready backends, and what each kind of input cost at most.
struct Drone {
    machine: Machine,
    now: i64,
    events: Vec<i64>,
    activity_id: i64,
    cost: BTreeMap<&'static str, u64>,
}

impl Drone {
    fn new(backends: usize) -> Self {
        let start = Start {
            clock: DroneClock::with_offset(0),
            incarnation: "in-1".into(),
            boot_id: "boot-1".into(),
            cluster_id: Some("c-1".into()),
            found: Vec::new(),
            seed: 1,
        };
        let (machine, _) = Machine::new(start, START);
        let (events, cost) = (Vec::new(), BTreeMap::new());
        let mut drone = Self { machine, now: START, events, activity_id: 0, cost };
        drone.step("connect", Input::Connected { session: 1, handshake: handshake("c-1") });
        drone.step("page", message(1, MessageToDrone::AckBackends {}));
        for n in 0..backends {
            let id = format!("ba-{n}");
            drone.begin(&id);
            drone.seen(&id, 0);
        }
        drone.cost.clear();
        drone
    }

    fn step(&mut self, what: &'static str, input: Input) {
        let before = touched();
        let effects = self.machine.step(input, self.now);
        let _ = self.machine.next_wake();
        let cost = touched() - before;
        let most = self.cost.entry(what).or_default();
        *most = cost.max(*most);
        for effect in effects {
            let Effect::Send(message) = effect else { continue };
            match *message {
                MessageFromDrone::BackendEvent(event) => self.events.push(event.event_id),
                MessageFromDrone::BackendActivity(activity) => self.activity_id = activity.activity_id,
                _ => {}
            }
        }
    }

    fn begin(&mut self, id: &str) {
        let spawn = spawn_action(&format!("key-{id}"), 7, self.now, Some("in-1"));
        self.step("spawn", action(1, &format!("spawn-{id}"), id, spawn));
        self.step("created", Input::Created { backend: id.into(), result: Ok(address(1)) });
        for observation in [Observation::Starting, Observation::Started, Observation::Ready] {
            self.observe(id, observation);
        }
        self.acknowledge_events();
    }

    fn observe(&mut self, id: &str, observation: Observation) {
        self.step("observation", Input::Observed { backend: id.into(), observation });
    }

    fn seen(&mut self, id: &str, open: u64) {
        let seen = Some(Seen { open, closed_ago_ms: None });
        self.step("connections of one", Input::Connections(vec![(id.into(), 7, seen)]));
        let (activity_id, again) = (self.activity_id, Vec::new());
        self.step("activity acknowledged", message(1, MessageToDrone::AckActivity { activity_id, again }));
    }

    fn acknowledge_events(&mut self) {
        for event_id in std::mem::take(&mut self.events) {
            self.step("report acknowledged", message(1, MessageToDrone::AckEvent { event_id }));
        }
    }

    /// Every kind of input that concerns one backend, on a few of them.
    fn exercise(&mut self) {
        self.now += 1;
        self.step("nothing", Input::Tick);
        for n in 0..5 {
            let id = format!("ba-{n}");
            self.seen(&id, 1);
            let deadlines = Some(LEASE.deadlines(self.now));
            let key = holdfast_wire::drone::RenewedKey { backend: id.clone(), deadlines, refused: None };
            let renewed = holdfast_wire::drone::RenewKeysResponse { keys: vec![key] };
            self.step("renewed", message(1, MessageToDrone::RenewKeysResponse(renewed)));
            let end = |kind| terminate_action(kind);
            self.step("terminate", action(1, "end-1", &id, end(TerminationKind::Soft)));
            self.step("terminate", action(1, "end-2", &id, end(TerminationKind::Hard)));
            for kind in [TerminationKind::Soft, TerminationKind::Hard] {
                self.step("noted", Input::EndNoted { backend: id.clone(), kind: Some(kind) });
            }
            self.observe(&id, Observation::Exited(Some(0)));
            self.observe(&id, Observation::Gone);
            self.acknowledge_events();
            self.step("terminate of none", action(1, "end-3", &id, end(TerminationKind::Hard)));
            self.begin(&format!("new-{n}"));
        }
    }
}

#[test]
fn the_work_per_input_does_not_grow_with_the_number_of_backends() {
    let cost = |backends| {
        let mut drone = Drone::new(backends);
        drone.exercise();
        drone.cost
    };
    let (few, many) = (cost(100), cost(10_000));
    assert_eq!(few.len(), 11, "{few:?}");
    for (what, cost) in &many {
        assert!(*cost <= few[what] + 2, "{what}: {cost} entries at 10,000 backends, {} at 100", few[what]);
        assert!(*cost <= 60, "{what}: {cost} entries");
    }
}
