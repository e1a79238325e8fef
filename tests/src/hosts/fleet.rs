//! A cluster on hosts of its own.

use super::host::{CLUSTER, Host, Said};
use super::net::Network;
use super::watch::Watch;
use crate::checker::Resource;
use crate::harness::{Answer, LONG, binary, target_tmp, wait_until};
use futures::future::join_all;
use holdfast_wire::http::{Checksum, ConnectResponse, DronePage, KeyInfo};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;
use tokio::time::timeout;

/// Lease of a test: a key expires within seconds, and a busy machine still renews and kills in time.
const LEASE: &str = "renew=1s,soft=2500ms,hard=3500ms,expiry=5s";
/// What a controller serves comes long before this, in which one that has no majority may still look for a leader.
const REFUSED_WITHIN: Duration = Duration::from_secs(2);
/// How many entries are proposed at once to come to the next index at which checksums are kept.
const ENTRIES_AT_ONCE: usize = 16;

/// A held key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The backend.
    pub backend: String,
    /// Its token.
    pub token: u64,
    /// Its drone.
    pub drone: String,
}

/// Controllers `0..n` and, after them in the network, drones, each on a host of its own.
#[derive(Debug)]
pub struct Hosts {
    /// The hosts of controllers. A founding member's id is its index here plus one.
    pub members: Vec<Host>,
    /// The hosts of drones: `dr-0`, `dr-1`, …
    pub drones: Vec<Host>,
    /// The lines between them.
    pub net: Network,
    /// The judge of exclusion.
    pub watch: Watch,
    /// What the backends write to.
    pub resource: Resource,
    dir: Option<TempDir>,
}

impl Hosts {
    /// Makes the hosts. Nothing runs on them yet.
    pub fn make(members: usize, drones: usize) -> Self {
        binary("test-backend");
        let net = Network::make(members + drones);
        let dir = tempfile::Builder::new().prefix("hosts-").tempdir_in(target_tmp()).expect("a directory");
        let controllers: Vec<Host> = (0..members).map(|at| Host::controller(&net, at, dir.path())).collect();
        let urls: Vec<String> = controllers.iter().map(Host::url).collect();
        let drones = (0..drones)
            .map(|n| Host::drone(&net, members + n, &format!("dr-{n}"), &urls, dir.path()))
            .collect();
        let asked = controllers.iter().map(|host| (host.url(), host.client())).collect();
        let watch = Watch::start(&dir.path().join("journal"), asked);
        let resource = Resource::on(net.listener());
        Self { members: controllers, drones, net, watch, resource, dir: Some(dir) }
    }

    /// Makes the hosts, starts everything, and forms a cluster of all controllers.
    pub async fn formed(members: usize, drones: usize) -> Self {
        Self::formed_with_spares(members, 0, drones).await
    }

    /// As [`Self::formed`], with hosts of controllers on which nothing runs yet.
    pub async fn formed_with_spares(members: usize, spares: usize, drones: usize) -> Self {
        let mut hosts = Self::make(members + spares, drones);
        let all: Vec<usize> = (0..members).collect();
        hosts.start(&all);
        hosts.init(0, &all).await.ok();
        hosts.wait_ready(&all).await;
        hosts.drones.iter_mut().for_each(|drone| drone.process.start());
        for drone in 0..drones {
            hosts.wait_drone(0, drone).await;
        }
        hosts
    }

    /// This test's directory.
    pub fn dir(&self) -> PathBuf {
        self.dir.as_ref().expect("there until it is dropped").path().to_owned()
    }

    /// Starts controllers.
    pub fn start(&mut self, at: &[usize]) {
        at.iter().for_each(|at| self.members[*at].process.start());
    }

    /// Peer addresses, separated by commas.
    pub fn peer_addrs(&self, members: &[usize]) -> String {
        let addrs: Vec<String> = members.iter().map(|at| self.members[*at].peer_addr()).collect();
        addrs.join(",")
    }

    /// `holdfast cluster init` at one controller, once it answers.
    pub async fn init(&self, at: usize, members: &[usize]) -> Said {
        for member in members.iter().chain([&at]) {
            self.wait_answers(*member).await;
        }
        self.init_now(at, members).await
    }

    /// `holdfast cluster init` at one controller.
    pub async fn init_now(&self, at: usize, members: &[usize]) -> Said {
        let addrs = self.peer_addrs(members);
        self.members[at].cli(&["cluster", "init", "--members", &addrs, "--lease", LEASE]).await
    }

    /// Waits until a controller answers anything at all, on its own host.
    pub async fn wait_answers(&self, at: usize) {
        let member = &self.members[at];
        let what = format!("{} answers", member.process.label);
        wait_until(&what, LONG, async || member.get("/pub/health").await).await;
    }

    /// Waits until all of these serve linearizable reads.
    pub async fn wait_ready(&self, members: &[usize]) {
        join_all(members.iter().map(|at| self.members[*at].wait_ready())).await;
    }

    /// Waits until a controller sees that a drone can be scheduled to.
    pub async fn wait_drone(&self, at: usize, drone: usize) {
        let name = format!("dr-{drone}");
        wait_until(&format!("{name} is ready"), LONG, async || {
            let answer = self.members[at].get("/ctrl/drones").await?;
            if !answer.status.is_success() {
                return Err(format!("{answer:?}"));
            }
            let page: DronePage = answer.read();
            let ready = page.drones.iter().any(|drone| drone.name == name && drone.ready);
            if ready { Ok(()) } else { Err(format!("{page:?}")) }
        })
        .await;
    }

    /// Waits until one of these leads by its own linearizable read, and gives it.
    pub async fn leader_of(&self, members: &[usize]) -> usize {
        wait_until(&format!("one of {members:?} leads"), LONG, async || {
            let asked = members.iter().map(|at| async move {
                let answer = self.members[*at].get("/ctrl/cluster").await?;
                let view: Value = if answer.status.is_success() { answer.json() } else { Value::Null };
                let own = format!("{}:", self.net.addr(*at));
                let leads = view["members"].as_array().is_some_and(|all| {
                    let is_own =
                        |member: &&Value| member["peer_addr"].as_str().is_some_and(|a| a.starts_with(&own));
                    all.iter().find(is_own).is_some_and(|member| member["role"] == "leader")
                });
                if leads { Ok(*at) } else { Err(format!("{answer:?}")) }
            });
            let answers: Vec<Result<usize, String>> = join_all(asked).await;
            let leader = answers.iter().find_map(|answer| answer.as_ref().ok().copied());
            leader.ok_or(answers)
        })
        .await
    }

    /// Cuts the lines between two groups of hosts, by their place in the network; lines within a group stay.
    pub fn cut(&mut self, one: &[usize], other: &[usize]) {
        for (a, b) in one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b))) {
            self.net.set_line(a, b, false);
        }
    }

    /// Joins the lines between two groups of hosts.
    pub fn join(&mut self, one: &[usize], other: &[usize]) {
        for (a, b) in one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b))) {
            self.net.set_line(a, b, true);
        }
    }

    /// `kill -9`, and everything on its disk is lost.
    pub fn lose_disk(&mut self, at: usize) {
        self.members[at].process.kill9();
        self.members[at].wipe();
    }

    fn connect_body(&self, key: &str, wait_ms: u64) -> Value {
        let path = |name: &str| self.dir().join(name).display().to_string();
        let env = json!({
            "JOURNAL": path("journal"), "LOCKDIR": path("locks"), "LOCK_NAME": key,
            "RESOURCE": self.resource.addr().to_string(), "ALIVE_EVERY_MS": "50", "SITTERS": "1",
        });
        json!({
            "key": {"name": key},
            "spawn_config": {"cluster": CLUSTER, "executable": {"command": [binary("test-backend")], "env": env}},
            "wait_ms": wait_ms,
        })
    }

    /// One connect at a controller, from its own host; `Err` if no answer came.
    pub async fn connect_once(&self, at: usize, key: &str) -> Result<Answer, String> {
        self.members[at].post("/ctrl/connect", self.connect_body(key, 500)).await
    }

    /// Connects at a controller until the key has a backend of a token above `above` that was seen to run.
    pub async fn connect(&self, at: usize, key: &str, above: u64) -> Held {
        let held = wait_until(&format!("{key} is held through {at}"), LONG, async || {
            let answer = self.members[at].post("/ctrl/connect", self.connect_body(key, 2_000)).await?;
            if !answer.status.is_success() {
                return Err(format!("{answer:?}"));
            }
            let answer: ConnectResponse = answer.read();
            let (backend, token) = (answer.backend_id, answer.fencing_token);
            match self.watch.processes.life(&backend) {
                Some(_) if token > above => {
                    Ok(Held { backend, token, drone: answer.drone.unwrap_or_default() })
                }
                seen => Err(format!("{backend} with {token}: {seen:?}")),
            }
        })
        .await;
        self.watch.assert_clean();
        held
    }

    /// A key, by a controller's linearizable read.
    pub async fn key(&self, at: usize, key: &str) -> Option<KeyInfo> {
        let answer = self.members[at].get(&format!("/ctrl/key?name={key}")).await.expect("an answer");
        if answer.status.as_u16() == 404 { None } else { Some(answer.ok()) }
    }

    /// Panics if a controller serves anything that needs a majority: reads, acquisitions, readiness. It is asked by clients
    /// on its own host, and may answer nothing. A connect's outcome may be unknown, but it must not have started anything.
    pub async fn assert_serves_nothing(&self, at: usize, key: &str) {
        let host = &self.members[at];
        let (ready, read, connect) = tokio::join!(
            timeout(REFUSED_WITHIN, host.get("/ctrl/ready")),
            timeout(REFUSED_WITHIN, host.get("/ctrl/keys")),
            timeout(REFUSED_WITHIN, self.connect_once(at, key)),
        );
        for answer in [ready, read, connect].into_iter().flatten().flatten() {
            assert!(
                matches!(answer.status.as_u16(), 503 | 504),
                "{} answered {answer:?}",
                host.process.label
            );
        }
        self.watch.assert_clean();
    }

    /// Removes the member whose disk was lost and adds what runs at its address now, by the command line at `at`. Gives the
    /// new id.
    pub async fn replace(&self, at: usize, id: u64, host: usize) -> u64 {
        self.remove(at, id).await;
        self.add(at, host).await
    }

    /// `holdfast cluster remove` at `at`, once the last change of the membership has ended.
    pub async fn remove(&self, at: usize, id: u64) {
        let id = id.to_string();
        wait_until(&format!("member {id} is removed"), LONG, async || {
            let said = self.members[at].cli(&["cluster", "remove", &id]).await;
            assert!(said.code == 0 || said.err.contains("ChangeInProgress"), "{said:?}");
            if said.code == 0 { Ok(()) } else { Err(said) }
        })
        .await;
    }

    /// `holdfast cluster add --wait` at `at` of the process that waits at a host; gives the id.
    pub async fn add(&self, at: usize, host: usize) -> u64 {
        let addr = self.members[host].peer_addr();
        let said = wait_until(&format!("{addr} is added"), LONG, async || {
            // The last change may not have ended yet.
            let said = self.members[at].cli(&["--json", "cluster", "add", &addr, "--wait"]).await;
            if said.code == 0 { Ok(said) } else { Err(said) }
        })
        .await;
        let added: Value = serde_json::from_str(&said.out).expect("JSON");
        assert_eq!(added["role"], "voter", "{said:?}");
        added["id"].as_u64().expect("an id")
    }

    /// Waits until all of these have applied the same entries, with the same checksum at one index after the call.
    pub async fn assert_agree(&self, members: &[usize]) {
        let leader = &self.members[self.leader_of(members).await];
        let from = leader.local_view().await.expect("a view").checksum.index;
        wait_until(&format!("checksums of {members:?} agree"), LONG, async || {
            let body = json!({"name": "no such key", "namespace": ""});
            join_all((0..ENTRIES_AT_ONCE).map(|_| leader.post("/ctrl/key/allow-renewal", body.clone())))
                .await;
            let views = join_all(members.iter().map(|at| self.members[*at].local_view())).await;
            let sums: Vec<Checksum> = views
                .into_iter()
                .map(|view| view.map(|view| view.checksum))
                .collect::<Result<_, String>>()?;
            let Some(first) = sums.first() else { return Err("no members".to_owned()) };
            if first.index <= from || sums.iter().any(|sum| sum.index != first.index) {
                return Err(format!("{sums:?}"));
            }
            assert!(sums.iter().all(|sum| sum == first), "replicas differ: {sums:?}");
            Ok(())
        })
        .await;
    }

    /// The end of every schedule: all of these agree, and nothing was ever wrong.
    pub async fn finish(&self, members: &[usize]) {
        self.assert_agree(members).await;
        self.watch.finish(&self.resource);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for host in self.members.iter().chain(&self.drones) {
                eprint!("{}", host.process.log_tail());
            }
            eprintln!("seen of backends: {:?}", self.watch.processes.lives());
        }
        // The network goes first: it ends backends and their guards, which write below the directory.
        self.members.iter_mut().chain(&mut self.drones).for_each(|host| host.process.kill9());
    }
}
