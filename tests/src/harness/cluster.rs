//! A cluster of real processes.

use super::backend::{Journal, TestBackend};
use super::http::Http;
use super::plan::{Clock, ClusterBuilder, Who};
use super::ports::PortBlock;
use super::process::{Process, binary, kill_writers_below, libfaketime, target_tmp};
use super::proxy::ProxySet;
use super::wait::{LONG, SHORT, wait_until};
use futures::stream::{FuturesUnordered, StreamExt};
use holdfast_client::{Client, ClientError, RequestOptions};
use holdfast_wire::http::{
    BackendInfo, ClusterInfo, ConnectResponse, DronePage, InitCluster, KeyInfo, KeyPage, MemberInfo,
    SetMember,
};
use holdfast_wire::{ApiErrorKind, BackendStatus};
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
/// Longest wait for one controller's answer about the cluster, and for one attempt to form or change it.
const INFO_WITHIN: Duration = Duration::from_secs(2);

/// Controllers and drones, their data and their logs. Everything ends when this is dropped; logs are shown if the test
/// failed.
#[derive(Debug)]
pub struct Cluster {
    /// In the order in which `cluster init` named them, so that the first of them are members 1, 2, …; then those that
    /// were made later. See [`Cluster::id`].
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
    /// Member id of each controller, as far as it is known. One that has lost its disk has none.
    ids: Vec<Option<u64>>,
    ports: PortBlock,
    dir: Option<TempDir>,
}

/// Where its peers reach a controller.
fn peer_addr(controller: &Process) -> String {
    let addr = controller.flag("--advertise-peer").or_else(|| controller.flag("--peer-listen"));
    addr.expect("every controller has one").to_owned()
}

/// Whether a refused change of the membership is to be asked for again: another one is in progress, or `kind`.
fn is_passing(error: &ClientError, kind: ApiErrorKind) -> bool {
    error.kind().is_some_and(|found| found == kind || found == ApiErrorKind::ChangeInProgress)
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
            let started = match plan.formed {
                true => cluster.form(&plan).await,
                false => cluster.wait_waiting(&plan).await,
            };
            let ready = match started {
                Ok(()) if plan.formed => cluster.wait_ready(&plan).await,
                started => started,
            };
            match ready {
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
        let mut controllers = Vec::new();
        for (index, (listen, peer)) in addrs.iter().enumerate() {
            let label = format!("controller-{}", index + 1);
            let mut flags = vec![
                flag("--data-dir", path(label.clone()).display()),
                flag("--listen", listen),
                flag("--peer-listen", peer),
                flag("--advertise-url", format!("http://{listen}")),
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
        let (http, ids) = (Http::new(), vec![None; controllers.len()]);
        Self { controllers, drones, links, name, http, journal, addrs, ids, ports, dir: Some(dir) }
    }

    /// Asks the first controller to form the cluster, until it is formed. An error is a process that has ended.
    async fn form(&mut self, plan: &ClusterBuilder) -> Result<(), String> {
        let members = self.controllers.iter().map(peer_addr).collect();
        let lease = plan.lease.parse().unwrap_or_else(|e| panic!("the lease {}: {e}", plan.lease));
        let init = InitCluster { members, lease: Some(lease) };
        let (client, first) = (self.hasty_client(), self.url(0));
        wait_until("the cluster is formed", plan.patience, async || {
            if let Some(problem) = self.problem() {
                return Ok(Err(problem));
            }
            match client.init_at(&first, &init).await {
                Ok(_) => Ok(Ok(())),
                // An earlier attempt was carried out, and its answer lost.
                Err(error) if error.kind() == Some(ApiErrorKind::AlreadyInitialised) => Ok(Ok(())),
                Err(error) => Err(error),
            }
        })
        .await?;
        self.ids = (1..=self.controllers.len() as u64).map(Some).collect();
        Ok(())
    }

    /// Asks the first controller to form the cluster of all, as an operator does whose first init may have been interrupted.
    pub async fn form_again(&mut self, lease: &str) {
        let plan = ClusterBuilder::default().lease(lease);
        self.form(&plan).await.unwrap_or_else(|problem| panic!("the cluster can't be formed: {problem}"));
    }

    /// Waits until all controllers answer.
    async fn wait_waiting(&mut self, plan: &ClusterBuilder) -> Result<(), String> {
        let (http, urls) = (self.http.clone(), self.urls());
        wait_until("the controllers answer", plan.patience, async || {
            if let Some(problem) = self.problem() {
                return Ok(Err(problem));
            }
            for url in &urls {
                http.send(Method::GET, &format!("{url}/pub/health"), &[], None).await?;
            }
            Ok::<_, reqwest::Error>(Ok(()))
        })
        .await
    }

    /// What a process that has ended has said.
    fn problem(&mut self) -> Option<String> {
        self.controllers.iter_mut().chain(&mut self.drones).find_map(|process| {
            let status = process.ended()?;
            Some(format!("{} ended ({status}): {}", process.label, process.log()))
        })
    }

    async fn wait_ready(&mut self, plan: &ClusterBuilder) -> Result<(), String> {
        let http = self.http.clone();
        let urls = self.urls();
        wait_until("the cluster is ready", plan.patience, async || {
            if let Some(problem) = self.problem() {
                // Said inside, since it ends the wait.
                return Ok(Err(problem));
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

    /// A client that makes one short attempt, to be repeated by the test.
    fn hasty_client(&self) -> Client {
        let ms = u64::try_from(INFO_WITHIN.as_millis()).expect("a short time");
        self.client().with_options(RequestOptions {
            deadline_ms: ms,
            attempt_ms: ms,
            all_unreachable_ms: 0,
            ..RequestOptions::default()
        })
    }

    /// Member id of the controller at `index`. Panics if it has none, or none that the test has asked about.
    pub fn id(&self, index: usize) -> u64 {
        self.ids[index].unwrap_or_else(|| panic!("controller {} has no id", self.controllers[index].label))
    }

    /// Where its peers reach the controller at `index`.
    pub fn peer_addr(&self, index: usize) -> String {
        peer_addr(&self.controllers[index])
    }

    /// The member that the controller at `index` is, if it is one.
    fn member<'a>(&self, info: &'a ClusterInfo, index: usize) -> Option<&'a MemberInfo> {
        let addr = peer_addr(&self.controllers[index]);
        info.members.iter().find(|member| match self.ids[index] {
            Some(id) => member.id == id,
            None => member.peer_addr == addr,
        })
    }

    /// The controller that is the member of that id.
    fn index_of(&self, info: &ClusterInfo, id: u64) -> Option<usize> {
        (0..self.controllers.len())
            .find(|index| self.member(info, *index).is_some_and(|found| found.id == id))
    }

    /// Controllers' URLs.
    pub fn urls(&self) -> Vec<String> {
        (0..self.addrs.len()).map(|index| self.url(index)).collect()
    }

    /// The URL of the controller at `index`.
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
        let info = self.info().await;
        let id = info.leader.expect("checked");
        self.index_of(&info, id)
            .unwrap_or_else(|| panic!("the leader {id} is no controller of the test: {info:?}"))
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
                {
                    let info: ClusterInfo = answer.read();
                    if info.leader.is_some()
                        && info.leader == self.member(&info, index).map(|member| member.id)
                    {
                        return Ok(index);
                    }
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

    /// Makes ready a controller with an empty data directory, and gives its index. It asks `join` to be added, or waits for
    /// [`Cluster::add`] if that is empty. Start it by [`Cluster::restart_controller`].
    pub fn new_controller(&mut self, join: &[String]) -> usize {
        let index = self.controllers.len();
        let label = format!("controller-{}", index + 1);
        let (listen, peer) = (self.ports.give(), self.ports.give());
        let mut process = self.controllers[0].sibling(label.clone(), self.dir().join(format!("{label}.log")));
        for (name, value) in [
            ("--data-dir", self.dir().join(label).display().to_string()),
            ("--listen", listen.to_string()),
            ("--peer-listen", peer.to_string()),
            ("--advertise-url", format!("http://{listen}")),
        ] {
            process.set_flag(name, &value);
        }
        if !join.is_empty() {
            process.set_flag("--join", &join.join(","));
        }
        self.controllers.push(process);
        self.addrs.push(listen);
        self.ids.push(None);
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

    /// Adds the waiting process at `index` to the cluster, and gives its new id. It is a learner at first.
    pub async fn add(&mut self, index: usize) -> u64 {
        let (client, peer_addr) = (self.client(), peer_addr(&self.controllers[index]));
        let request = SetMember { id: None, peer_addr };
        let done = wait_until(&format!("{} is added", request.peer_addr), LONG, async || {
            match client.set_member(&request).await {
                Ok(done) => Ok(done),
                // Its peer port may not listen yet.
                Err(error) if is_passing(&error, ApiErrorKind::InvalidRequest) => Err(error),
                Err(error) => panic!("adding {}: {error}", request.peer_addr),
            }
        })
        .await;
        self.ids[index] = Some(done.id);
        done.id
    }

    /// Removes a member for good, whether its process runs or not.
    pub async fn remove(&self, id: u64) {
        let client = self.client();
        wait_until(&format!("member {id} is removed"), LONG, async || match client.remove_member(id).await {
            Ok(done) => Ok(done),
            // Whether enough of the others answer is known only after some heartbeats.
            Err(error) if is_passing(&error, ApiErrorKind::ChangeUnsafe) => Err(error),
            Err(error) => panic!("removing member {id}: {error}"),
        })
        .await;
    }

    /// Kills the controller at `index` and empties its disk. What is started on it is a new process, which waits; the
    /// member that it was will never answer again. Gives that member's id.
    pub fn wipe(&mut self, index: usize) -> u64 {
        self.controllers[index].kill9();
        let dir = self.controllers[index].flag("--data-dir").expect("every controller has one").to_owned();
        std::fs::remove_dir_all(&dir).unwrap_or_else(|e| panic!("emptying {dir}: {e}"));
        self.ids[index].take().unwrap_or_else(|| panic!("controller {index} was no member"))
    }

    /// As an operator does after a disk was lost: removes the member that was [wiped](Self::wipe), adds the emptied process
    /// at the same address, and waits until it votes. Gives its new id.
    pub async fn replace(&mut self, index: usize, lost_id: u64) -> u64 {
        if self.controllers[index].pid().is_none() {
            self.restart_controller(index);
        }
        self.remove(lost_id).await;
        let id = self.add(index).await;
        assert!(id > lost_id, "id {id} after {lost_id}");
        self.wait_role(index, &["follower", "leader"]).await;
        self.wait_controller(index).await;
        id
    }

    /// Waits until the controller at `index` has one of these roles, and gives its id.
    pub async fn wait_role(&mut self, index: usize, roles: &[&str]) -> u64 {
        let label = &self.controllers[index].label;
        let id = wait_until(&format!("{label} is {roles:?}"), LONG, async || {
            let info = self.info().await;
            match self.member(&info, index) {
                Some(member) if roles.contains(&member.role.as_str()) => Ok(member.id),
                _ => Err((info, self.controllers[index].log_tail())),
            }
        })
        .await;
        self.ids[index] = Some(id);
        id
    }

    /// Waits until the leader says this of the controller at `index`.
    pub async fn wait_problem(&self, index: usize, said: &str) {
        wait_until(&format!("{said:?} is said of {}", self.controllers[index].label), LONG, async || {
            let info = self.info().await;
            let problem = self.member(&info, index).and_then(|member| member.problem.as_deref());
            problem.is_some_and(|problem| problem.contains(said)).then_some(()).ok_or(info)
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
