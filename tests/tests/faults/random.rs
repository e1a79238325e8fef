//! Random faults, several at a time, from a seed that is shown.
//!
//! The seed fixes what is chosen; when exactly it meets what goes on in the cluster is the machine's affair.

use crate::arena::{Arena, signal_guard};
use holdfast_client::Client;
use holdfast_tests::checker::processes_of;
use holdfast_wire::http::ConnectRequest;
use nix::sys::signal::Signal;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// Chooses the run; without it a random one is made.
const SEED_ENV: &str = "HOLDFAST_TEST_SEED";
/// Faults of the run in `make test`.
const SHORT_RUN: Duration = Duration::from_secs(20);
/// Faults of the run in `make soak`.
const LONG_RUN: Duration = Duration::from_secs(600);
/// Keys.
const KEYS: usize = 5;
/// Time between two faults, in milliseconds.
const BETWEEN_MS: std::ops::Range<u64> = 50..700;
/// How long a fault lasts, in milliseconds: well within the lease, or beyond it.
const LASTS_MS: [std::ops::Range<u64>; 2] = [50..900, 3_400..6_000];

/// Something that is broken until it is healed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Broken {
    DroneKilled(usize),
    DroneStopped(usize),
    DroneCut(usize),
    DroneSilenced(usize),
    /// Of a process number.
    GuardStopped(u32),
    ControllerKilled(usize),
    ControllerStopped(usize),
}

struct Run {
    arena: Arena,
    rng: StdRng,
    broken: BTreeMap<Broken, Instant>,
    counts: BTreeMap<&'static str, u64>,
}

/// Connects all the time, so that whoever can take a key does.
fn contender(client: Client, request: ConnectRequest) -> JoinHandle<()> {
    tokio::spawn(async move {
        let request = ConnectRequest { wait_ms: Some(500), ..request };
        loop {
            // Refusals and lost leaders are what this is about.
            let _ = client.connect(&request).await;
            sleep(Duration::from_millis(40)).await;
        }
    })
}

impl Run {
    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn drone_is_whole(&self, drone: usize) -> bool {
        use Broken::{DroneCut, DroneKilled, DroneSilenced, DroneStopped};
        [DroneKilled(drone), DroneStopped(drone), DroneCut(drone), DroneSilenced(drone)]
            .iter()
            .all(|broken| !self.broken.contains_key(broken))
    }

    fn a_controller_is_broken(&self) -> bool {
        let of_controller =
            |b: &Broken| matches!(b, Broken::ControllerKilled(_) | Broken::ControllerStopped(_));
        self.broken.keys().any(of_controller)
    }

    /// Breaks something; nothing if what was chosen is broken already.
    fn strike(&mut self) {
        let lasts_ms = LASTS_MS.choose(&mut self.rng).cloned().unwrap();
        let until = Instant::now() + Duration::from_millis(self.rng.random_range(lasts_ms));
        let drone = self.rng.random_range(0..self.arena.cluster.drones.len());
        let what = self.rng.random_range(0..10);
        if what < 7 && !self.drone_is_whole(drone) {
            return;
        }
        match what {
            0 | 1 => {
                self.count("drone killed");
                self.arena.cluster.drones[drone].kill9();
                self.broken.insert(Broken::DroneKilled(drone), until);
            }
            2 => {
                self.count("drone stopped");
                self.arena.cluster.drones[drone].signal(Signal::SIGSTOP);
                self.broken.insert(Broken::DroneStopped(drone), until);
            }
            3 => {
                self.count("drone cut off");
                self.arena.cluster.links[drone].cut();
                self.broken.insert(Broken::DroneCut(drone), until);
            }
            4 => {
                self.count("drone in silence");
                self.arena.cluster.links[drone].silence();
                self.broken.insert(Broken::DroneSilenced(drone), until);
            }
            5 | 6 => self.strike_guard(until),
            _ if self.a_controller_is_broken() => {}
            _ => {
                let controller = self.rng.random_range(0..self.arena.cluster.controllers.len());
                if self.rng.random_bool(0.5) {
                    self.count("controller killed");
                    self.arena.cluster.controllers[controller].kill9();
                    self.broken.insert(Broken::ControllerKilled(controller), until);
                } else {
                    self.count("controller stopped");
                    self.arena.cluster.controllers[controller].signal(Signal::SIGSTOP);
                    self.broken.insert(Broken::ControllerStopped(controller), until);
                }
            }
        }
    }

    fn strike_guard(&mut self, until: Instant) {
        let lives = self.arena.checker.processes.lives();
        let alive = lives.keys().filter(|backend| !processes_of(backend).is_empty());
        let Some(backend) = alive.choose(&mut self.rng) else { return };
        let Some(guard) = holdfast_tests::checker::guard_of(backend) else { return };
        if self.rng.random_bool(0.5) {
            self.count("guard killed");
            signal_guard(guard, Signal::SIGKILL);
        } else {
            self.count("guard stopped");
            signal_guard(guard, Signal::SIGSTOP);
            self.broken.insert(Broken::GuardStopped(guard), until);
        }
    }

    fn heal(&mut self, all: bool) {
        let now = Instant::now();
        let due: Vec<Broken> =
            self.broken.iter().filter(|(_, until)| all || **until <= now).map(|(b, _)| *b).collect();
        let cluster = &mut self.arena.cluster;
        for broken in due {
            self.broken.remove(&broken);
            match broken {
                Broken::DroneKilled(at) => cluster.restart_drone(at),
                Broken::DroneStopped(at) => cluster.drones[at].signal(Signal::SIGCONT),
                Broken::DroneCut(at) | Broken::DroneSilenced(at) => cluster.links[at].heal(),
                Broken::GuardStopped(pid) => signal_guard(pid, Signal::SIGCONT),
                Broken::ControllerKilled(at) => cluster.restart_controller(at),
                Broken::ControllerStopped(at) => cluster.controllers[at].signal(Signal::SIGCONT),
            }
        }
    }
}

async fn run(lasts: Duration) {
    let seed = std::env::var(SEED_ENV).ok().and_then(|text| text.parse().ok()).unwrap_or_else(rand::random);
    println!("seed: {SEED_ENV}={seed}");
    let arena = Arena::start(KEYS).await;
    arena.settle().await;
    let contenders: Vec<_> =
        arena.keys().iter().map(|key| contender(arena.cluster.client(), arena.request(key))).collect();
    let rng = StdRng::seed_from_u64(seed);
    let mut run = Run { arena, rng, broken: BTreeMap::new(), counts: BTreeMap::new() };
    let end = Instant::now() + lasts;
    while Instant::now() < end {
        run.strike();
        let pause_ms = run.rng.random_range(BETWEEN_MS);
        sleep(Duration::from_millis(pause_ms)).await;
        run.heal(false);
        run.arena.checker.assert_clean();
    }
    run.heal(true);
    for index in 0..3 {
        run.arena.cluster.wait_controller(index).await;
        run.arena.cluster.wait_drone(index).await;
    }
    // Then everything works again.
    run.arena.settle().await;
    contenders.iter().for_each(JoinHandle::abort);
    println!("{:?}", run.counts);
    run.arena.finish();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_random_faults_no_key_ever_has_two_backends_and_afterwards_each_has_one() {
    run(SHORT_RUN).await;
}

#[ignore = "ten minutes: make soak"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_ten_minutes_of_random_faults_no_key_ever_has_two_backends() {
    run(LONG_RUN).await;
}
