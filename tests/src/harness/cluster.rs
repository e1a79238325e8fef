//! A cluster of real processes.

use super::backend::{Journal, TestBackend};
use super::http::Http;
use super::plan::{Clock, ClusterBuilder, Who};
use super::ports::PortBlock;
use super::process::{Process, binary, kill_writers_below, libfaketime, target_tmp};
use super::proxy::ProxySet;
use super::wait::{LONG, SHORT, wait_until};
use futures::stream::{FuturesUnordered, StreamExt};
use holdfast_client::Client;
use holdfast_wire::BackendStatus;
use holdfast_wire::http::{BackendInfo, ClusterInfo, ConnectResponse, DronePage, KeyInfo, KeyPage};
use reqwest::Method;
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

/// How often a start is tried on other ports.
const STARTS_MAX: usize = 4;
/// What a process says whose port is taken.
const ADDRESS_IN_USE: &str = "Address already in use";
/// Longest wait for one controller's word about the cluster.
const INFO_WITHIN: Duration = Duration::from_secs(2);

/// Controllers and drones, their data and their logs. Everything ends when this is dropped; logs are shown if the test
/// failed.
#[derive(Debug)]
pub struct Cluster {
    /// In the order of their ids, which begin at 1.
    pub controllers: Vec<Process>,
    /// `dr-0`, `dr-1`, …
    pub drones: Vec<Process>,
    /// Each drone's proxies in front of the controllers; empty unless asked for.
    pub links: Vec<ProxySet>,
    /// The name of the cluster that the drones serve.
    pub name: String,
    /// Sends single requests.
    pub http: Http,
    /// What all backends of [`Cluster::backend`] write down.
    pub journal: Journal,
    addrs: Vec<SocketAddr>,
    ports: PortBlock,
    dir: Option<TempDir>,
}

fn flag(name: &str, value: impl ToString) -> (String, String) {
    (name.to_owned(), value.to_string())
}

impl Cluster {
    /// Three controllers and a drone, unless told otherwise.
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder::default()
    }

    pub(super) async fn start(plan: ClusterBuilder) -> Self {
        for attempt in 1.. {
            let mut cluster = Self::prepare(&plan).await;
            cluster.controllers.iter_mut().for_each(Process::start);
            cluster.drones.iter_mut().for_each(Process::start);
            match cluster.wait_ready(&plan).await {
                Ok(()) => return cluster,
                Err(problem) if attempt < STARTS_MAX && problem.contains(ADDRESS_IN_USE) => {}
                Err(problem) => panic!("the cluster can't be started: {problem}"),
            }
        }
        unreachable!("the last attempt returns or panics");
    }

    async fn prepare(plan: &ClusterBuilder) -> Self {
        let (controller, drone) = (binary("holdfast-controller"), binary("holdfast-drone"));
        binary("test-backend");
        let dir = tempfile::Builder::new().prefix("cluster-").tempdir_in(target_tmp()).expect("a directory");
        let path = |name: String| dir.path().join(name);
        let mut ports = PortBlock::take();
        let addrs: Vec<_> = (0..plan.controllers).map(|_| (ports.give(), ports.give())).collect();
        let name = "test.local:9090".to_owned();
        let initial: Vec<_> = addrs.iter().zip(1..).map(|((_, peer), id)| format!("{id}={peer}")).collect();
        let mut controllers = Vec::new();
        for (index, (listen, peer)) in addrs.iter().enumerate() {
            let label = format!("controller-{}", index + 1);
            let mut flags = vec![
                flag("--id", index + 1),
                flag("--data-dir", path(label.clone()).display()),
                flag("--listen", listen),
                flag("--peer-listen", peer),
                flag("--advertise-url", format!("http://{listen}")),
                flag("--initial-cluster", initial.join(",")),
                flag("--lease", &plan.lease),
            ];
            if !plan.election_timeout.is_empty() {
                flags.push(flag("--election-timeout", &plan.election_timeout));
            }
            if plan.default_cluster {
                flags.push(flag("--default-cluster", &name));
            }
            flags.extend(plan.controller_flags.iter().cloned());
            let log = path(format!("{label}.log"));
            controllers.push(Process::new(label, controller.clone(), flags, log));
        }
        let addrs: Vec<SocketAddr> = addrs.into_iter().map(|(listen, _)| listen).collect();
        let (mut drones, mut links) = (Vec::new(), Vec::new());
        for index in 0..plan.drones {
            let label = format!("dr-{index}");
            let urls = if plan.proxied_drones {
                links.push(ProxySet::start(&mut ports, &addrs).await);
                links[index].urls()
            } else {
                addrs.iter().map(|addr| format!("http://{addr}")).collect()
            };
            let flags = vec![
                flag("--name", &label),
                flag("--controller", urls.join(",")),
                flag("--cluster", &name),
                flag("--data-dir", path(label.clone()).display()),
                flag("--ip", "127.0.0.1"),
                // For those who run the tests without root.
                flag("--shared-user", "true"),
            ];
            let log = path(format!("{label}.log"));
            drones.push(Process::new(label, drone.clone(), flags, log));
        }
        for (who, clock) in &plan.clocks {
            let library = libfaketime().expect("libfaketime, which the test must look for first");
            let process = match who {
                Who::Controller(index) => &mut controllers[*index],
                Who::Drone(index) => &mut drones[*index],
            };
            match clock {
                Clock::Offset(offset) => process.set_wall_clock(&library, offset),
                Clock::Rate(rate) => process.set_clock_rate(&library, rate),
                Clock::File(file) => process.set_wall_clock_file(&library, file),
            }
        }
        for (index, data_dir, env) in &plan.disks {
            controllers[*index].set_flag("--data-dir", &data_dir.display().to_string());
            env.iter().for_each(|(name, value)| controllers[*index].set_env(name, value));
        }
        let journal = Journal::new(dir.path().join("journal"));
        Self { controllers, drones, links, name, http: Http::new(), journal, addrs, ports, dir: Some(dir) }
    }

    async fn wait_ready(&mut self, plan: &ClusterBuilder) -> Result<(), String> {
        let http = self.http.clone();
        let urls = self.urls();
        wait_until("the cluster is ready", plan.patience, async || {
            let all = self.controllers.iter_mut().chain(&mut self.drones);
            for process in all {
                if let Some(status) = process.ended() {
                    // Said inside, since it ends the wait.
                    return Ok(Err(format!("{} ended ({status}): {}", process.label, process.log())));
                }
            }
            for url in &urls {
                let ready = http.send(Method::GET, &format!("{url}/ctrl/ready"), &[], None).await;
                match ready {
                    Ok(answer) if answer.status.is_success() => {}
                    other => return Err(format!("{url}: {other:?}")),
                }
            }
            let drones: DronePage = http.get(&format!("{}/ctrl/drones", urls[0])).await.ok();
            let count = drones.drones.iter().filter(|drone| drone.ready).count();
            if count == plan.drones { Ok(Ok(())) } else { Err(format!("drones: {drones:?}")) }
        })
        .await
    }

    /// A client of all controllers.
    pub fn client(&self) -> Client {
        Client::new(self.urls()).expect("URLs of controllers")
    }

    /// Controllers' URLs.
    pub fn urls(&self) -> Vec<String> {
        (0..self.addrs.len()).map(|index| self.url(index)).collect()
    }

    /// The URL of the controller at `index` (its id less one).
    pub fn url(&self, index: usize) -> String {
        format!("http://{}", self.addrs[index])
    }

    /// Proxies in front of the controllers, for a client that is to be cut off.
    pub async fn proxies(&mut self) -> ProxySet {
        ProxySet::start(&mut self.ports, &self.addrs).await
    }

    /// This cluster's directory: data, logs, journal.
    pub fn dir(&self) -> PathBuf {
        self.dir.as_ref().expect("there until it is dropped").path().to_owned()
    }

    /// The test's backend, to be adapted.
    pub fn backend(&self) -> TestBackend {
        TestBackend::new(&self.dir())
    }

    /// What the cluster says of itself, with a linearizable read at the first controller that answers one. All are asked at
    /// once: one that is stopped answers nothing, and waiting for it would take longer than some leases last.
    pub async fn info(&self) -> ClusterInfo {
        wait_until("some controller answers for the cluster", LONG, async || {
            let mut seen = Vec::new();
            let running = self.controllers.iter().enumerate().filter(|(_, process)| process.pid().is_some());
            let mut asked: FuturesUnordered<_> = running.map(|(index, _)| self.ask_for_info(index)).collect();
            while let Some(answer) = asked.next().await {
                match answer {
                    Ok(info) => return Ok(info),
                    Err(problem) => seen.push(problem),
                }
            }
            Err(seen)
        })
        .await
    }

    async fn ask_for_info(&self, index: usize) -> Result<ClusterInfo, String> {
        let url = format!("{}/ctrl/cluster", self.url(index));
        match tokio::time::timeout(INFO_WITHIN, self.http.send(Method::GET, &url, &[], None)).await {
            Ok(Ok(answer)) if answer.status.is_success() => {
                let info: ClusterInfo = answer.read();
                if info.leader.is_some() { Ok(info) } else { Err(format!("{url}: no leader")) }
            }
            other => Err(format!("{url}: {other:?}")),
        }
    }

    /// The index of the leader.
    pub async fn leader(&self) -> usize {
        let id = self.info().await.leader.expect("checked");
        usize::try_from(id).expect("a small id") - 1
    }

    /// Waits until another controller than `old` leads, and gives its index.
    pub async fn leader_other_than(&self, old: usize) -> usize {
        wait_until("another controller leads", LONG, async || {
            // Its own word: a linearizable read at itself, which a deposed leader can't give.
            let mut seen = Vec::new();
            for index in (0..self.controllers.len()).filter(|index| *index != old) {
                if self.controllers[index].pid().is_none() {
                    continue;
                }
                let url = format!("{}/ctrl/cluster", self.url(index));
                let answer = self.http.send(Method::GET, &url, &[], None).await;
                if let Ok(answer) = &answer
                    && answer.status.is_success()
                    && answer.read::<ClusterInfo>().leader == Some(index as u64 + 1)
                {
                    return Ok(index);
                }
                seen.push(answer.map(|answer| answer.text).map_err(|e| e.to_string()));
            }
            Err(seen)
        })
        .await
    }

    /// Waits until the controller at `index` serves linearizable reads.
    pub async fn wait_controller(&self, index: usize) {
        let url = format!("{}/ctrl/ready", self.url(index));
        wait_until(&format!("{url} is 200"), LONG, async || {
            match self.http.send(Method::GET, &url, &[], None).await {
                Ok(answer) if answer.status.is_success() => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })
        .await;
    }

    /// Waits until a drone can be scheduled to.
    pub async fn wait_drone(&self, index: usize) {
        let label = &self.drones[index].label;
        let client = self.client();
        wait_until(&format!("{label} is ready"), LONG, async || {
            let page = client.drones_page(&Default::default(), None).await;
            let ready =
                page.as_ref().is_ok_and(|page| page.drones.iter().any(|d| d.name == *label && d.ready));
            if ready { Ok(()) } else { Err(page) }
        })
        .await;
    }

    /// Waits until a backend has a status, or a later one.
    pub async fn wait_status(&self, backend: &str, status: BackendStatus) -> BackendInfo {
        let client = self.client();
        wait_until(&format!("{backend} is {status}"), LONG, async || match client.backend(backend).await {
            Ok(Some(info)) if info.status >= status => Ok(info),
            other => Err(other),
        })
        .await
    }

    /// Waits until a backend is ready, and no more than that.
    pub async fn assert_ready(&self, backend: &str) {
        let info = self.wait_status(backend, BackendStatus::Ready).await;
        assert_eq!(info.status, BackendStatus::Ready, "{info:?}, which wrote: {}", self.output(backend));
    }

    /// What a backend has written to its standard output and error, whichever drone runs it.
    fn output(&self, backend: &str) -> String {
        let of = |drone: &Process| {
            let log = self.dir().join(&drone.label).join("backends").join(backend).join("output.log");
            std::fs::read_to_string(log).ok()
        };
        self.drones.iter().find_map(of).unwrap_or_else(|| "nothing that is left".to_owned())
    }

    /// Waits until a backend is ready, and asks it: its environment, `instance` and `pid`.
    pub async fn ask(&self, backend: &str) -> Value {
        let info = self.wait_status(backend, BackendStatus::Ready).await;
        let address = info.address.unwrap_or_else(|| panic!("{backend} has no address: {info:?}"));
        self.http.get(&format!("http://{address}/")).await.ok()
    }

    /// Connects by the client, which must succeed, and waits until the backend is ready.
    pub async fn connect_ready(&self, key: &str) -> ConnectResponse {
        let request = self.backend().request(key);
        let answer = self.client().connect(&request).await.unwrap_or_else(|e| panic!("connect {key}: {e}"));
        self.assert_ready(&answer.backend_id).await;
        answer
    }

    /// All held keys (of the first page of a thousand).
    pub async fn keys(&self) -> Vec<KeyInfo> {
        let url = format!("{}/ctrl/keys?limit=1000", self.url(self.leader().await));
        self.http.get(&url).await.ok::<KeyPage>().keys
    }

    /// One key; none if it is free.
    pub async fn key(&self, name: &str) -> Option<KeyInfo> {
        match self.client().key(name, "").await {
            Ok(key) => Some(key),
            Err(e) if e.kind() == Some(holdfast_wire::ApiErrorKind::NotFound) => None,
            Err(e) => panic!("key {name}: {e}"),
        }
    }

    /// Waits until a key is free.
    pub async fn wait_free(&self, name: &str) {
        wait_until(&format!("key {name} is free"), SHORT, async || self.key(name).await.map_or(Ok(()), Err))
            .await;
    }

    /// Makes ready a controller that joins through `join`, under the next id and with an empty data directory, and gives
    /// its index. Start it by [`Cluster::restart_controller`].
    pub fn new_controller(&mut self, join: &[String]) -> usize {
        let index = self.controllers.len();
        let label = format!("controller-{}", index + 1);
        let (listen, peer) = (self.ports.give(), self.ports.give());
        let mut process = self.controllers[0].sibling(label.clone(), self.dir().join(format!("{label}.log")));
        process.unset_flag("--initial-cluster");
        for (name, value) in [
            ("--id", (index + 1).to_string()),
            ("--data-dir", self.dir().join(label).display().to_string()),
            ("--listen", listen.to_string()),
            ("--peer-listen", peer.to_string()),
            ("--advertise-url", format!("http://{listen}")),
            ("--join", join.join(",")),
        ] {
            process.set_flag(name, &value);
        }
        self.controllers.push(process);
        self.addrs.push(listen);
        index
    }

    /// Starts a new controller that joins through all that run, and waits until it votes. Gives its index.
    pub async fn join_controller(&mut self) -> usize {
        let running = (0..self.controllers.len()).filter(|index| self.controllers[*index].pid().is_some());
        let urls: Vec<_> = running.map(|index| self.url(index)).collect();
        let index = self.new_controller(&urls);
        self.restart_controller(index);
        self.wait_role(index, &["follower", "leader"]).await;
        index
    }

    /// Waits until the controller at `index` has one of these roles.
    pub async fn wait_role(&self, index: usize, roles: &[&str]) {
        let id = index as u64 + 1;
        wait_until(&format!("member {id} is {roles:?}"), LONG, async || {
            let info = self.info().await;
            match info.members.iter().find(|member| member.id == id) {
                Some(member) if roles.contains(&member.role.as_str()) => Ok(()),
                _ => Err((info, self.controllers[index].log_tail())),
            }
        })
        .await;
    }

    /// A port that nobody uses.
    pub fn free_addr(&mut self) -> SocketAddr {
        self.ports.give()
    }

    /// Starts a controller that does not run, on its old data and ports.
    pub fn restart_controller(&mut self, index: usize) {
        self.controllers[index].start();
    }

    /// Starts a drone that does not run, on its old data.
    pub fn restart_drone(&mut self, index: usize) {
        self.drones[index].start();
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        // Drones first: they would report the end of the controllers.
        for process in self.drones.iter_mut().chain(&mut self.controllers) {
            process.kill9();
        }
        let Some(dir) = self.dir.take() else { return };
        // Guards would end the backends of a killed drone only at their deadlines.
        kill_writers_below(dir.path());
        if failed {
            for process in self.controllers.iter().chain(&self.drones) {
                eprintln!("── log of {}:\n{}", process.label, process.log_tail());
            }
            eprintln!(
                "── journal:\n{}",
                std::fs::read_to_string(dir.path().join("journal")).unwrap_or_default()
            );
            if std::env::var_os("HOLDFAST_KEEP").is_some() {
                eprintln!("── kept: {}", dir.keep().display());
            }
        }
    }
}
