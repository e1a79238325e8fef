//! Many drones that live on their own: for the long runs.
//!
//! Each drone is one task. It renews all its keys once in a round, in frames of a batch each; the rounds of the drones are
//! spread evenly over the time between two, and keys that were not granted within two seconds are asked for again, as a
//! real drone does. A lost session is opened again at the next controller.

use super::drone::{Counts, Drone, Identity, Kept};
use super::http::HttpClient;
use super::{Cluster, connect, connect_body};
use crate::load::micros;
use crate::place::Place;
use crate::problem::{During, Problem, Result};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

/// Renewals that were not granted are asked for again after this.
const RENEW_AGAIN: Duration = Duration::from_secs(2);
/// Pause before the next controller is tried.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);
/// A backend that is to be ended may have been acquired before its drone was told.
const END_PATIENCE: Duration = Duration::from_secs(20);

/// How drones renew.
#[derive(Debug, Clone, Copy)]
pub struct Rounds {
    /// Time between two rounds of a drone.
    pub every: Duration,
    /// Most keys in one frame.
    pub batch: usize,
}

/// Something a drone is asked to do.
enum Order {
    /// End a backend at a moment, by itself.
    End { backend: String, at: Instant },
    /// Say what it holds.
    Keys(oneshot::Sender<Vec<(String, u64)>>),
}

/// What a drone publishes after each turn.
#[derive(Debug, Clone, Copy, Default)]
pub struct Published {
    /// What it has counted.
    pub counts: Counts,
    /// Keys that it holds.
    pub held: usize,
    /// Sessions that were lost.
    pub lost_sessions: u64,
}

struct Shared {
    published: Vec<Mutex<Published>>,
    stop: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All drones of a run.
pub struct Fleet {
    shared: Arc<Shared>,
    orders: Vec<mpsc::UnboundedSender<Order>>,
    tasks: Vec<JoinHandle<()>>,
}

/// Orders to the drones of a fleet.
#[derive(Clone)]
pub struct Orders(Vec<mpsc::UnboundedSender<Order>>);

impl Orders {
    /// Has the drone of that name (`dr-7`) end a backend after `delay`.
    pub fn end(&self, drone: &str, backend: &str, delay: Duration) {
        let number = drone.strip_prefix("dr-").and_then(|number| number.parse::<usize>().ok());
        if let Some(orders) = number.and_then(|number| self.0.get(number)) {
            // A drone that has stopped ends nothing any more.
            let _ = orders.send(Order::End { backend: backend.to_owned(), at: Instant::now() + delay });
        }
    }
}

struct Life {
    number: usize,
    identity: Identity,
    addrs: Vec<SocketAddr>,
    at: usize,
    start: Instant,
    rounds: Rounds,
    next_round: Instant,
    /// Since when the present round asks, and when it asks again; none once all keys were granted.
    asking: Option<(Instant, Instant)>,
    ends: VecDeque<(String, Instant)>,
    orders: mpsc::UnboundedReceiver<Order>,
    shared: Arc<Shared>,
    lost_sessions: u64,
}

impl Life {
    async fn run(mut self) {
        let mut kept = Kept::default();
        while !self.shared.stop.load(Ordering::Relaxed) {
            let addr = self.addrs[self.at % self.addrs.len()];
            self.at += 1;
            match Drone::connect(addr, &self.identity, self.start, kept).await {
                Ok(mut drone) => {
                    let ended = self.session(&mut drone).await;
                    kept = drone.into_kept();
                    if let Err(problem) = ended {
                        self.lost_sessions += 1;
                        eprintln!("{}: {problem}", self.identity.name);
                    }
                }
                Err((back, problem)) => {
                    kept = back;
                    eprintln!("{}: {problem}", self.identity.name);
                }
            }
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    }

    fn wake_at(&self) -> Instant {
        let mut at = self.next_round;
        if let Some((_, again)) = self.asking {
            at = at.min(again);
        }
        // Delays are the same for all, so the first is the next.
        self.ends.front().map_or(at, |(_, end)| at.min(*end))
    }

    async fn session(&mut self, drone: &mut Drone) -> Result<()> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            drone.turn(Some(self.wake_at())).await?;
            while let Ok(order) = self.orders.try_recv() {
                match order {
                    Order::End { backend, at } => self.ends.push_back((backend, at)),
                    // Whoever asked may have given up.
                    Order::Keys(answer) => drop(answer.send(drone.keys())),
                }
            }
            self.end_due(drone).await?;
            self.renew_due(drone).await?;
            *lock(&self.shared.published[self.number]) =
                Published { counts: drone.counts, held: drone.held.len(), lost_sessions: self.lost_sessions };
        }
        Ok(())
    }

    async fn end_due(&mut self, drone: &mut Drone) -> Result<()> {
        let now = Instant::now();
        while let Some((backend, at)) = self.ends.front() {
            if *at > now {
                break;
            }
            if drone.held.contains_key(backend) {
                drone.end(backend).await?;
            } else if *at + END_PATIENCE > now {
                // Its spawn is still on the way: after the others.
                let later = now + RENEW_AGAIN;
                if let Some((backend, _)) = self.ends.pop_front() {
                    self.ends.push_back((backend, later));
                }
                continue;
            }
            self.ends.pop_front();
        }
        Ok(())
    }

    async fn renew_due(&mut self, drone: &mut Drone) -> Result<()> {
        let now = Instant::now();
        if now >= self.next_round {
            while self.next_round <= now {
                self.next_round += self.rounds.every;
            }
            self.asking = Some((now, now));
        }
        let Some((since, again)) = self.asking else { return Ok(()) };
        if now < again {
            return Ok(());
        }
        let due = drone.due(since);
        self.asking = if due.is_empty() { None } else { Some((since, now + RENEW_AGAIN)) };
        for batch in due.chunks(self.rounds.batch) {
            drone.ask_many(batch).await?;
        }
        Ok(())
    }
}

impl Fleet {
    /// Starts `count` drones.
    pub fn start(cluster: &Cluster, count: usize, rounds: Rounds, place: Place) -> Self {
        let shared = Arc::new(Shared {
            published: (0..count).map(|_| Mutex::default()).collect(),
            stop: AtomicBool::new(false),
        });
        let start = Instant::now();
        let (mut orders, mut tasks) = (Vec::new(), Vec::new());
        for number in 0..count {
            let (order, ordered) = mpsc::unbounded_channel();
            orders.push(order);
            let share = u32::try_from(number).unwrap_or(0);
            let of = u32::try_from(count.max(1)).unwrap_or(1);
            let life = Life {
                number,
                identity: Identity {
                    cluster: cluster.inner.name.clone(),
                    name: format!("dr-{number}"),
                    pool: String::new(),
                    incarnation: "bench".to_owned(),
                },
                addrs: cluster.addrs.clone(),
                at: place.node(number, cluster.leader, cluster.addrs.len()),
                start,
                rounds,
                next_round: start + rounds.every * share / of,
                asking: None,
                ends: VecDeque::new(),
                orders: ordered,
                shared: Arc::clone(&shared),
                lost_sessions: 0,
            };
            tasks.push(tokio::spawn(life.run()));
        }
        Self { shared, orders, tasks }
    }

    /// Orders to these drones.
    pub fn orders(&self) -> Orders {
        Orders(self.orders.clone())
    }

    /// Sums, and the longest gap of any.
    pub fn published(&self) -> Published {
        let mut all = Published::default();
        for one in &self.shared.published {
            let one = *lock(one);
            all.held += one.held;
            all.lost_sessions += one.lost_sessions;
            all.counts.spawned += one.counts.spawned;
            all.counts.renewed += one.counts.renewed;
            all.counts.refused += one.counts.refused;
            all.counts.ended += one.counts.ended;
            all.counts.longest_gap = all.counts.longest_gap.max(one.counts.longest_gap);
        }
        all
    }

    /// Backends and tokens that the drones hold.
    pub async fn keys(&self) -> Result<Vec<(String, u64)>> {
        let mut all = Vec::new();
        for orders in &self.orders {
            let (answer, keys) = oneshot::channel();
            orders.send(Order::Keys(answer)).map_err(|_| Problem("a drone has stopped".to_owned()))?;
            all.extend(keys.await.during("a drone has stopped")?);
        }
        Ok(all)
    }

    /// Stops them; they say nothing to the controllers.
    pub async fn stop(self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.during("a drone")?;
        }
        Ok(())
    }
}

/// One acquisition as a client saw it.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// When it was answered.
    pub answered: Instant,
    /// How long it took, in microseconds.
    pub took_us: u32,
}

/// What clients note, together.
#[derive(Debug, Default)]
pub struct Notes {
    samples: Mutex<Vec<Sample>>,
    errors: AtomicU64,
    first_error: Mutex<Option<String>>,
}

impl Notes {
    /// Notes an answer.
    pub fn answered(&self, sample: Sample) {
        lock(&self.samples).push(sample);
    }

    /// Notes a request that failed.
    pub fn failed(&self, problem: &Problem) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        lock(&self.first_error).get_or_insert_with(|| problem.to_string());
    }

    /// Takes what was noted since the last time.
    pub fn take(&self) -> Vec<Sample> {
        std::mem::take(&mut lock(&self.samples))
    }

    /// Failed requests, and the first one's reason.
    pub fn errors(&self) -> (u64, Option<String>) {
        (self.errors.load(Ordering::Relaxed), lock(&self.first_error).clone())
    }
}

/// A client that goes to the next controller when one fails it.
pub struct Following {
    addrs: Vec<SocketAddr>,
    at: usize,
    http: Option<HttpClient>,
    cluster: String,
}

impl Following {
    /// Client number `client` of a cluster.
    pub fn new(cluster: &Cluster, client: usize, place: Place) -> Self {
        Self {
            addrs: cluster.addrs.clone(),
            at: place.node(client, cluster.leader, cluster.addrs.len()),
            http: None,
            cluster: cluster.inner.name.clone(),
        }
    }

    /// Connects to a free key once; drone and backend.
    pub async fn connect(&mut self, key: &str) -> Result<(String, String)> {
        let body = connect_body(&self.cluster, "", key);
        let done = async {
            if self.http.is_none() {
                self.http = Some(HttpClient::open(self.addrs[self.at % self.addrs.len()]).await?);
            }
            let http = self.http.as_mut().during("a connection")?;
            connect(http, &body, |answer| {
                (answer.drone.unwrap_or_default().to_owned(), answer.backend_id.to_owned())
            })
            .await
        }
        .await;
        if done.is_err() {
            self.http = None;
            self.at += 1;
        }
        done
    }
}

/// Acquires `count` keys named `PREFIX-N` from `first` on with `clients` clients, each with one request under way. A failed
/// one is noted and its key is left out; the number of failures is the notes'.
pub async fn fill(
    cluster: &Cluster,
    clients: usize,
    place: Place,
    prefix: &'static str,
    numbers: std::ops::Range<u64>,
    notes: &Arc<Notes>,
) -> Result<()> {
    let next = Arc::new(AtomicU64::new(numbers.start));
    let mut tasks = Vec::new();
    for client in 0..clients {
        let mut http = Following::new(cluster, client, place);
        let (next, notes) = (Arc::clone(&next), Arc::clone(notes));
        tasks.push(tokio::spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= numbers.end {
                    return;
                }
                let asked = Instant::now();
                match http.connect(&format!("{prefix}-{number}")).await {
                    Ok(_) => {
                        let answered = Instant::now();
                        notes.answered(Sample { answered, took_us: micros(answered - asked) });
                    }
                    Err(problem) => notes.failed(&problem),
                }
            }
        }));
    }
    for task in tasks {
        task.await.during("a filler")?;
    }
    Ok(())
}

/// Acquisitions at a fixed rate, whatever the answers: a request that waits for a connection waits on its own time.
pub struct Probes {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
    /// What they saw; times count from the moment when a request was due.
    pub notes: Arc<Notes>,
}

impl Probes {
    /// `per_second` connects to free keys over `clients` connections; each backend is ended by its drone after `keep`.
    pub fn start(
        cluster: &Cluster,
        orders: &Orders,
        clients: usize,
        place: Place,
        per_second: u32,
        keep: Duration,
        prefix: &str,
    ) -> Self {
        let (stop, notes) = (Arc::new(AtomicBool::new(false)), Arc::new(Notes::default()));
        let next = Arc::new(AtomicU64::new(0));
        let begin = Instant::now();
        let tasks = (0..clients)
            .map(|client| {
                let mut http = Following::new(cluster, client, place);
                let (stop, notes, next) = (Arc::clone(&stop), Arc::clone(&notes), Arc::clone(&next));
                let (orders, prefix) = (orders.clone(), prefix.to_owned());
                tokio::spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let due_us = number.saturating_mul(1_000_000) / u64::from(per_second.max(1));
                        let due = begin + Duration::from_micros(due_us);
                        tokio::time::sleep_until(due.into()).await;
                        match http.connect(&format!("{prefix}-{number}")).await {
                            Ok((drone, backend)) => {
                                let answered = Instant::now();
                                notes.answered(Sample { answered, took_us: micros(answered - due) });
                                orders.end(&drone, &backend, keep);
                            }
                            Err(problem) => notes.failed(&problem),
                        }
                    }
                })
            })
            .collect();
        Self { stop, tasks, notes }
    }

    /// Stops them.
    pub async fn stop(self) -> Result<Arc<Notes>> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.during("a probe")?;
        }
        Ok(self.notes)
    }
}
