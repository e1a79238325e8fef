//! Scripts: what must hold, step by step.

use super::*;
use crate::journal::{Damage, Fate};
use holdfast_wire::drone::{BackendsPage, RenewKeysResponse, RenewedKey};

/// A machine and what it did in the latest step.
struct Script {
    machine: Machine,
    now: i64,
    effects: Vec<Effect>,
}

impl Script {
    /// A drone that was started on these directories, and is connected in session 1.
    fn new(found: &[&str]) -> Self {
        let start = Start {
            clock: DroneClock::with_offset(0),
            incarnation: "in-2".into(),
            boot_id: "boot-1".into(),
            cluster_id: Some("c-1".into()),
            found: found.iter().map(|id| (*id).to_owned()).collect(),
            seed: 1,
        };
        let (machine, effects) = Machine::new(start, START);
        let mut script = Self { machine, now: START, effects };
        for id in found {
            assert!(script.effects.contains(&Effect::Look { backend: (*id).to_owned() }));
        }
        script.step(Input::Connected { session: 1, handshake: handshake("c-1") });
        if script.page().is_some() {
            script.step(message(1, MessageToDrone::AckBackends {}));
        }
        script
    }

    fn step(&mut self, input: Input) -> &mut Self {
        self.effects = self.machine.step(input, self.now);
        self.machine.check();
        self
    }

    fn after(&mut self, ms: i64) -> &mut Self {
        self.now += ms;
        self.step(Input::Tick)
    }

    fn spawn(&mut self, id: &str, key: &str) -> &mut Self {
        let spawn = spawn_action(key, 7, self.now, Some("in-2"));
        self.step(action(1, &format!("spawn-{id}"), id, spawn))
    }

    fn created(&mut self, id: &str) -> &mut Self {
        self.step(Input::Created { backend: id.into(), result: Ok(address(1)) })
    }

    fn terminate(&mut self, id: &str, kind: TerminationKind) -> &mut Self {
        self.step(action(1, &format!("end-{id}-{kind:?}"), id, terminate_action(kind)))
    }

    fn noted(&mut self, id: &str, kind: TerminationKind) -> &mut Self {
        self.step(Input::EndNoted { backend: id.into(), kind: Some(kind) })
    }

    fn looked(&mut self, id: &str, fate: Fate, end: Option<TerminationKind>) -> &mut Self {
        let end = end.map(|kind| EndNote {
            boot_id: "boot-1".into(),
            kind,
            reason: TerminationReason::External,
            kill_boot_ms: self.now + 5_000,
        });
        let judged = Some(Box::new(Judged { fate, end }));
        self.step(Input::Looked { backend: id.into(), judged })
    }

    fn greeted(&mut self, id: &str) -> &mut Self {
        let told =
            Update { soft_boot_ms: self.now + 20_000, hard_boot_ms: self.now + 30_000, ..Update::default() };
        self.step(Input::Greeted { backend: id.into(), told })
    }

    fn observe(&mut self, id: &str, observation: Observation) -> &mut Self {
        self.step(Input::Observed { backend: id.into(), observation })
    }

    fn messages(&self) -> impl Iterator<Item = &MessageFromDrone> {
        self.effects.iter().filter_map(|effect| match effect {
            Effect::Send(message) => Some(&**message),
            _ => None,
        })
    }

    /// What was acknowledged in the latest step.
    fn acknowledged(&self) -> Vec<&str> {
        let acks = self.messages().filter_map(|message| match message {
            MessageFromDrone::AckAction { action_id } => Some(action_id.as_str()),
            _ => None,
        });
        acks.collect()
    }

    /// What was reported in the latest step.
    fn reported(&self) -> Vec<BackendStatus> {
        let events = self.messages().filter_map(|message| match message {
            MessageFromDrone::BackendEvent(event) => Some(event.state.status()),
            _ => None,
        });
        events.collect()
    }

    fn page(&self) -> Option<&BackendsPage> {
        self.messages().find_map(|message| match message {
            MessageFromDrone::Backends(page) => Some(page),
            _ => None,
        })
    }

    fn wanted(&self, id: &str) -> Option<Desired> {
        self.effects.iter().rev().find_map(|effect| match effect {
            Effect::Want { backend, desired } if backend == id => Some(*desired),
            _ => None,
        })
    }

    fn starts(&self, id: &str) -> bool {
        self.effects.iter().any(|e| matches!(e, Effect::Start { spawn, .. } if spawn.backend == id))
    }

    fn does_nothing(&self) {
        assert!(self.effects.is_empty(), "{:?}", self.effects);
    }
}

fn record(id: &str, key: &str) -> Record {
    Record {
        boot_id: "boot-1".into(),
        backend: id.into(),
        key: KeyConfig { name: key.into(), ..KeyConfig::default() },
        token: 7,
        address: address(2),
        soft_boot_ms: START + 20_000,
        hard_boot_ms: START + 30_000,
    }
}

fn guarded(id: &str) -> Fate {
    Fate::Guarded(record(id, &format!("key-{id}")))
}

use TerminationKind::{Hard, Soft};

#[test]
fn a_spawn_is_acknowledged_and_reported_only_once_it_is_durable() {
    let mut script = Script::new(&[]);
    script.spawn("ba", "k");
    assert!(matches!(&script.effects[..], [Effect::Create(_)]), "{:?}", script.effects);
    script.spawn("ba", "k").does_nothing();
    script.created("ba");
    assert_eq!(script.acknowledged(), ["spawn-ba"]);
    assert_eq!(script.reported(), [BackendStatus::Loading]);
    assert!(script.starts("ba"));
    script.spawn("ba", "k");
    assert_eq!(script.acknowledged(), ["spawn-ba"], "a repeat changes nothing");
    assert!(!script.starts("ba"));
}

#[test]
fn a_spawn_without_room_is_neither_reported_nor_acknowledged() {
    let mut script = Script::new(&[]);
    for n in 0..crate::admission::BACKENDS_MAX {
        let id = format!("ba-{n}");
        let deadlines = LEASE.deadlines(START);
        let verdict = script.machine.admission.judge(
            &id,
            deadlines,
            crate::admission::TimeBase::Ours,
            Some(LEASE),
            START,
        );
        assert_eq!(verdict, crate::admission::Verdict::Start);
        script.machine.admission.finished(&id);
    }
    script.spawn("one-more", "k").does_nothing();
    // With room, and in time, the same spawn is started: nothing was said of it.
    script.now = START + 39_999;
    script.machine.admission.adopted("ba-0", script.now);
    script.machine.admission.finished("ba-0");
    let spawn = spawn_action("k", 7, START, Some("in-2"));
    script.step(action(1, "spawn-one-more", "one-more", spawn));
    assert!(matches!(&script.effects[..], [Effect::Create(_)]), "{:?}", script.effects);
}

#[test]
fn a_spawn_whose_directory_exists_is_refused_and_not_reported() {
    let mut script = Script::new(&[]);
    script.spawn("ba", "k");
    script.step(Input::Created { backend: "ba".into(), result: Err(CreateFailure::Exists) });
    assert_eq!((script.acknowledged(), script.reported()), (vec!["spawn-ba"], vec![]));
    assert!(!script.starts("ba"));
    script.spawn("ba", "k");
    assert_eq!(script.acknowledged(), ["spawn-ba"]);
    assert_eq!(script.effects.len(), 1, "it is known by now");
}

#[test]
fn a_spawn_for_another_incarnation_is_void() {
    let mut script = Script::new(&[]);
    let spawn = spawn_action("k", 7, START, Some("in-1"));
    script.step(action(1, "spawn-ba", "ba", spawn)).does_nothing();
}

#[test]
fn a_spawn_after_its_hard_deadline_is_reported_and_never_started() {
    let mut script = Script::new(&[]);
    script.now += 60_000;
    let spawn = spawn_action("k", 7, START, Some("in-2"));
    for _ in 0..2 {
        script.step(action(1, "spawn-ba", "ba", spawn.clone()));
        assert_eq!(script.acknowledged(), ["spawn-ba"]);
        assert!(!script.starts("ba"));
    }
    assert_eq!(script.machine.outbox.flush(i64::MAX).len(), 1, "reported once");
}

#[test]
fn a_terminate_is_delivered_at_once_and_acknowledged_once_durable() {
    let mut script = Script::new(&[]);
    script.spawn("ba", "k").created("ba");
    script.terminate("ba", Soft);
    let first = script.wanted("ba").expect("the guard is told");
    assert_eq!((first.end, script.acknowledged()), (Some(Soft), vec![]));
    assert!(script.effects.iter().any(|e| matches!(e, Effect::NoteEnd { note, .. } if note.kind == Soft)));
    // A harder one meanwhile has to wait for its own note.
    script.terminate("ba", Hard);
    assert_eq!(script.wanted("ba").map(|desired| desired.end), Some(Some(Hard)));
    script.noted("ba", Soft);
    assert_eq!(script.acknowledged(), ["end-ba-Soft"]);
    assert!(script.effects.iter().any(|e| matches!(e, Effect::NoteEnd { note, .. } if note.kind == Hard)));
    script.noted("ba", Hard);
    assert_eq!(script.acknowledged(), ["end-ba-Hard"]);
    // Repeats, softer ones too, are delivered again and acknowledged at once.
    for kind in [Hard, Soft] {
        let before = script.machine.backends.get("ba").and_then(|b| b.desired).unwrap();
        script.terminate("ba", kind);
        let again = script.wanted("ba").expect("the guard is told again");
        assert_eq!((again.end, again.deliveries), (Some(Hard), before.deliveries + 1));
        assert_eq!(script.acknowledged().len(), 1);
    }
}

#[test]
fn a_terminate_that_cannot_be_noted_is_acknowledged_once_carried_out() {
    let mut script = Script::new(&[]);
    script.spawn("ba", "k").created("ba").terminate("ba", Hard);
    script.step(Input::EndNoted { backend: "ba".into(), kind: None });
    assert_eq!(script.acknowledged(), [""; 0]);
    script.terminate("ba", Hard);
    assert!(script.effects.iter().any(|e| matches!(e, Effect::NoteEnd { .. })), "tried again");
    script.observe("ba", Observation::Gone);
    assert_eq!(script.acknowledged(), ["end-ba-Hard"]);
}

#[test]
fn a_terminate_of_what_is_being_made_durable_prevents_its_start() {
    let mut script = Script::new(&[]);
    script.spawn("ba", "k").terminate("ba", Soft);
    script.does_nothing();
    script.created("ba");
    assert!(!script.starts("ba"));
    assert_eq!(script.acknowledged(), ["spawn-ba", "end-ba-Soft"]);
    assert_eq!(script.reported().last(), Some(&BackendStatus::Terminated));
}

#[test]
fn a_successor_carries_out_a_noted_end() {
    let mut script = Script::new(&["ba"]);
    script.looked("ba", guarded("ba"), Some(Soft));
    assert_eq!(script.reported(), [BackendStatus::Terminating]);
    script.greeted("ba");
    let wanted = script.wanted("ba").expect("the guard is told");
    assert_eq!((wanted.end, wanted.kill_at), (Some(Soft), START + 5_000));
    script.after(10_000);
    assert!(script.messages().all(|m| !matches!(m, MessageFromDrone::RenewKeys(_))), "not renewed");
    // The controllers repeat it: acknowledged at once, since it is durable.
    script.terminate("ba", Soft);
    assert_eq!(script.acknowledged(), ["end-ba-Soft"]);
}

#[test]
fn the_list_names_everything_page_by_page() {
    let ids: Vec<String> = (0..2_500).map(|n| format!("ba-{n:04}")).collect();
    let mut script = Script::new(&ids.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(script.page().is_none(), "the directories were not read yet");
    for id in &ids[1..] {
        script.looked(id, guarded(id), None);
        assert!(script.page().is_none());
    }
    // One that cannot be read is named without anything known of it, after a while.
    script.step(Input::Looked { backend: ids[0].clone(), judged: None });
    script.after(2_000);
    let mut named = Vec::new();
    for (count, is_last) in [(1_024, false), (1_024, false), (452, true)] {
        let page = script.page().expect("a page").clone();
        assert_eq!((page.backends.len(), page.last), (count, is_last));
        named.extend(page.backends);
        script.step(message(1, MessageToDrone::AckBackends {}));
    }
    assert!(script.page().is_none(), "only once in a session");
    assert!(named.iter().map(|listed| &listed.backend).eq(&ids));
    assert_eq!((named[0].token, named[1].token), (None, Some(7)));
    // A page whose acknowledgement does not come is sent again.
    script.step(Input::Connected { session: 2, handshake: handshake("c-1") });
    assert_eq!(script.page().map(|page| page.backends.len()), Some(1_024));
    script.after(5_000);
    assert_eq!(script.page().map(|page| page.backends.len()), Some(1_024));
}

#[test]
fn only_the_newest_session_counts() {
    let mut script = Script::new(&[]);
    script.spawn("ba", "k").created("ba");
    script.step(Input::Connected { session: 2, handshake: handshake("c-1") });
    script.terminate("ba", Hard).does_nothing();
    script.step(Input::Lost { session: 1 }).does_nothing();
    script.step(action(2, "end", "ba", terminate_action(Hard)));
    assert_eq!(script.wanted("ba").map(|desired| desired.end), Some(Some(Hard)));
}

#[test]
fn one_bad_directory_delays_nothing_else() {
    let mut script = Script::new(&["damaged", "stuck", "ending", "well"]);
    script.looked("damaged", Fate::Damaged(Damage::Missing), None);
    assert!(script.effects.contains(&Effect::EndLeft { backend: "damaged".into() }));
    script.looked("ending", Fate::Unguarded(record("ending", "key-ending")), None);
    script.looked("well", guarded("well"), None);
    script.greeted("well");
    assert!(script.effects.iter().any(|e| matches!(e, Effect::Adopt { backend, .. } if backend == "well")));
    script.after(0);
    // Nothing is known of one directory, and two remnants do not end: a spawn waits for its own key alone.
    script.spawn("of-that-key", "key-ending").does_nothing();
    script.spawn("new", "k").created("new");
    assert!(script.starts("new"));
    script.after(2_000);
    let named: Vec<_> = script.page().expect("a list").backends.iter().map(|b| b.backend.clone()).collect();
    assert_eq!(named, ["damaged", "ending", "new", "stuck", "well"]);
    script.step(Input::LeftEnded { backend: "ending".into() });
    assert_eq!(script.reported(), [BackendStatus::Terminated]);
    script.spawn("of-that-key", "key-ending");
    assert!(script.effects.iter().any(|e| matches!(e, Effect::Create(_))));
    // Of what is unreadable nothing can be reported: its key expires.
    script.step(Input::LeftEnded { backend: "damaged".into() });
    assert_eq!(script.effects, [Effect::Forget { backend: "damaged".into() }]);
}

#[test]
fn a_spawn_waits_until_an_earlier_backend_of_its_key_is_confirmed() {
    let mut script = Script::new(&["ba"]);
    script.looked("ba", guarded("ba"), None).greeted("ba").after(0);
    script.spawn("bb", "key-ba").does_nothing();
    let deadlines = Some(LEASE.deadlines(START));
    let keys = vec![RenewedKey { backend: "ba".into(), deadlines, refused: None }];
    script.step(message(1, MessageToDrone::RenewKeysResponse(RenewKeysResponse { keys })));
    script.spawn("bb", "key-ba");
    assert!(script.effects.iter().any(|e| matches!(e, Effect::Create(_))));
}

#[test]
fn a_guard_that_greets_late_is_waited_for() {
    let mut script = Script::new(&["ba", "bb"]);
    for id in ["ba", "bb"] {
        script.looked(id, guarded(id), None);
    }
    // As long as an earlier drone could have been granted, and then a kill.
    script.after(50_000);
    assert!(!script.effects.contains(&Effect::EndLeft { backend: "ba".into() }));
    script.greeted("ba");
    assert!(script.effects.iter().any(|e| matches!(e, Effect::Adopt { .. })));
    script.after(4_000);
    assert!(script.effects.contains(&Effect::EndLeft { backend: "bb".into() }), "{:?}", script.effects);
}

#[test]
fn a_guard_that_is_to_kill_and_does_not_greet_is_killed() {
    let mut script = Script::new(&["ba"]);
    script.looked("ba", guarded("ba"), None).terminate("ba", Hard);
    assert_eq!(script.acknowledged(), [""; 0]);
    script.noted("ba", Hard);
    assert_eq!(script.acknowledged(), ["end-ba-Hard"]);
    script.after(1_000);
    assert!(script.effects.contains(&Effect::EndLeft { backend: "ba".into() }));
    script.step(Input::LeftEnded { backend: "ba".into() });
    assert_eq!(script.reported(), [BackendStatus::Terminated]);
}

#[test]
fn what_may_run_on_another_machine_is_named_and_never_reported() {
    let mut script = Script::new(&["ba"]);
    script.looked("ba", Fate::Elsewhere(record("ba", "k")), None);
    assert!(script.reported().is_empty());
    assert_eq!(script.page().map(|page| page.backends.len()), Some(1));
    script.terminate("ba", Hard);
    assert!(script.effects.iter().any(|e| matches!(e, Effect::NoteEnd { .. })));
    script.noted("ba", Hard);
    assert_eq!(script.acknowledged(), ["end-ba-Hard"]);
    // The moved key is acquired again once it has expired: nothing here holds it up.
    script.spawn("bb", "k");
    assert!(script.effects.iter().any(|e| matches!(e, Effect::Create(_))));
    script.after(86_400_000);
    assert!(script.effects.contains(&Effect::Forget { backend: "ba".into() }));
}

#[test]
fn another_cluster_waits_for_the_end_of_the_old_ones_backends() {
    let mut script = Script::new(&[]);
    script.spawn("ba", "k").created("ba");
    script.step(Input::Connected { session: 2, handshake: handshake("c-2") });
    assert_eq!(script.wanted("ba").map(|desired| desired.end), Some(Some(Hard)));
    assert!(script.page().is_none(), "nothing is registered before");
    let spawn = spawn_action("k", 8, START, Some("in-2"));
    script.step(action(2, "spawn-bb", "bb", spawn.clone())).does_nothing();
    script.observe("ba", Observation::Gone);
    assert!(script.effects.contains(&Effect::KeepClusterId("c-2".into())));
    script.step(Input::ClusterIdKept { durable: false }).does_nothing();
    script.after(1_000);
    assert_eq!(script.effects, [Effect::KeepClusterId("c-2".into())], "tried again");
    script.step(Input::ClusterIdKept { durable: true });
    assert_eq!(script.page().map(|page| (page.backends.len(), page.last)), Some((0, true)));
    script.step(action(2, "spawn-bb", "bb", spawn)).created("bb");
    assert!(script.starts("bb"));
}
