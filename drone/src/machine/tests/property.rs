//! Any order of requests, faults, crashes and restarts: the invariants hold after every step, and once everything works
//! again what was acknowledged has happened.

use super::world::World;
use super::*;
use proptest::prelude::*;

/// One thing that happens.
#[derive(Debug, Clone)]
enum Op {
    Spawn { n: u8, key: u8, age_ms: u16, whose: u8 },
    Terminate { n: u8, hard: bool },
    Happen { at: u16, ok: bool },
    HappenAll,
    Deliver { n: u8 },
    Exit { n: u8 },
    GuardKilled { n: u8 },
    Stuck { n: u8, stuck: bool },
    Advance { ms: u16 },
    Renewals { grant: bool },
    AckEvents,
    AckPage,
    Connect,
    Disconnect,
    Stale { n: u8 },
    Restart { bits: u32, reboot: bool },
    Damage { n: u8 },
    Stop,
}

fn op() -> impl Strategy<Value = Op> {
    let n = 0..4u8;
    prop_oneof![
        8 => (n.clone(), 0..3u8, 0..2_000u16, 0..6u8)
            .prop_map(|(n, key, age_ms, whose)| Op::Spawn { n, key, age_ms, whose }),
        8 => (n.clone(), any::<bool>()).prop_map(|(n, hard)| Op::Terminate { n, hard }),
        20 => (any::<u16>(), prop::bool::weighted(0.85)).prop_map(|(at, ok)| Op::Happen { at, ok }),
        3 => Just(Op::HappenAll),
        5 => n.clone().prop_map(|n| Op::Deliver { n }),
        2 => n.clone().prop_map(|n| Op::Exit { n }),
        1 => n.clone().prop_map(|n| Op::GuardKilled { n }),
        2 => (n.clone(), any::<bool>()).prop_map(|(n, stuck)| Op::Stuck { n, stuck }),
        6 => prop_oneof![0..200u16, 0..20_000u16].prop_map(|ms| Op::Advance { ms }),
        6 => prop::bool::weighted(0.9).prop_map(|grant| Op::Renewals { grant }),
        4 => Just(Op::AckEvents),
        4 => Just(Op::AckPage),
        4 => Just(Op::Connect),
        1 => Just(Op::Disconnect),
        1 => n.clone().prop_map(|n| Op::Stale { n }),
        3 => (any::<u32>(), prop::bool::weighted(0.1)).prop_map(|(bits, reboot)| Op::Restart { bits, reboot }),
        1 => n.prop_map(|n| Op::Damage { n }),
        1 => prop::bool::weighted(0.1).prop_map(|stop| if stop { Op::Stop } else { Op::Connect }),
    ]
}

fn apply(world: &mut World, op: Op) {
    let name = |n: u8| format!("ba-{n}");
    match op {
        Op::Spawn { n, key, age_ms, whose } => {
            world.spawn(&name(n), &format!("key-{key}"), i64::from(age_ms), whose);
        }
        Op::Terminate { n, hard } => {
            let kind = if hard { TerminationKind::Hard } else { TerminationKind::Soft };
            world.terminate(&name(n), kind);
        }
        Op::Happen { at, ok } => world.happen(usize::from(at), ok),
        Op::HappenAll => {
            for _ in 0..world.io.len() {
                world.happen(0, true);
            }
        }
        Op::Deliver { n } => world.deliver(&name(n)),
        Op::Exit { n } => world.exits(&name(n)),
        Op::GuardKilled { n } => world.dies(&name(n), Vec::new(), false),
        Op::Stuck { n, stuck } => {
            if let Some(guard) = world.guards.get_mut(&name(n)) {
                guard.stuck = stuck;
            }
        }
        Op::Advance { ms } => world.advance(i64::from(ms)),
        Op::Renewals { grant } => world.answer_renewals(grant),
        Op::AckEvents => world.acknowledge_events(),
        Op::AckPage => world.acknowledge_page(),
        Op::Connect => world.connect("c-1"),
        Op::Disconnect => world.disconnect(),
        Op::Stale { n } => world.stale(&name(n)),
        Op::Restart { bits, reboot } => world.restart(|at| bits >> (at % 32) & 1 == 1, reboot),
        Op::Damage { n } => {
            if let Some(dir) = world.disk.get_mut(&name(n)) {
                dir.damaged = true;
            }
        }
        Op::Stop => world.step(Input::Stop),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, ..ProptestConfig::default() })]

    #[test]
    fn the_invariants_hold_over_crashes_and_acknowledged_ends_happen(ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new();
        world.connect("c-1");
        for op in ops {
            apply(&mut world, op);
        }
        world.settle();
        for backend in &world.ended {
            prop_assert!(!world.runs(backend), "{backend} runs although its end was acknowledged");
        }
        prop_assert!(world.io.is_empty(), "something waits forever: {:?}", world.io);
        // What still runs is held by a drone that renews its key, and ends when that is asked for.
        let running: Vec<String> = world.guards.keys().cloned().collect();
        for backend in &running {
            world.terminate(backend, TerminationKind::Soft);
            world.terminate(backend, TerminationKind::Hard);
        }
        world.settle();
        prop_assert!(world.guards.is_empty(), "{:?}", world.guards);
    }
}
