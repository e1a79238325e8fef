//! A host: a network namespace with an address, one program of ours that runs there, and clients that speak from there.

use super::net::{Namespace, Network};
use super::process::{Process, command};
use crate::harness::{Answer, LONG, binary, wait_until};
use holdfast_wire::http::ClusterInfo;
use reqwest::Method;
use serde_json::Value;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};

/// Port of every controller's HTTP API.
const HTTP_PORT: u16 = 7100;
/// Port of every controller's peer protocol.
const PEER_PORT: u16 = 7200;
/// Longest wait for an answer: longer than a controller takes to say that it has no leader.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);
/// For how long the command line keeps trying.
const CLI_TIMEOUT: &str = "5s";
/// For how long it looks for a leader before it shows what one controller knows.
const STATUS_TIMEOUT: &str = "1s";

/// The cluster that the drones serve.
pub const CLUSTER: &str = "test.local:9090";

/// An HTTP client whose connections begin in a host's namespace. Cloning it is cheap.
#[derive(Debug, Clone)]
pub struct HostClient {
    handle: Handle,
    http: reqwest::Client,
}

impl HostClient {
    /// Sends a request; `Err` if no answer came.
    pub async fn send(&self, method: Method, url: &str, body: Option<Value>) -> Result<Answer, String> {
        let mut request = self.http.request(method, url);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let sending = self.handle.spawn(async move {
            let response = request.send().await?;
            let (status, headers) = (response.status(), response.headers().clone());
            Ok::<_, reqwest::Error>(Answer { status, headers, text: response.text().await? })
        });
        sending.await.map_err(|error| error.to_string())?.map_err(|error| format!("{error:?}"))
    }
}

/// What the command line answered.
#[derive(Debug, Clone)]
pub struct Said {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// Its output. Panics unless it succeeded.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, 0, "{self:?}");
        &self.out
    }

    /// Panics unless it was refused with a message that holds all of these.
    #[track_caller]
    pub fn refused(&self, parts: &[&str]) {
        assert_eq!(self.code, 1, "{self:?}");
        parts.iter().for_each(|part| assert!(self.err.contains(part), "{part:?} is not in {self:?}"));
    }

    /// Everything that it wrote.
    pub fn text(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

/// See the module.
pub struct Host {
    /// Its place in the network.
    pub at: usize,
    /// Its process: a controller or a drone.
    pub process: Process,
    /// That process's data directory.
    pub data_dir: PathBuf,
    namespace: Namespace,
    addr: String,
    runtime: Option<Runtime>,
    http: reqwest::Client,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("process", &self.process).finish_non_exhaustive()
    }
}

impl Host {
    fn new(net: &Network, at: usize, label: &str, program: &str, dir: &Path) -> Self {
        let (namespace, addr) = (net.namespace(at), net.addr(at).to_string());
        let entered = namespace.clone();
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .on_thread_start(move || entered.enter().expect("entering a namespace"))
            .build()
            .expect("a runtime in a namespace");
        // Pooled connections would be ones to a killed process.
        let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(0).timeout(ANSWER_WITHIN);
        let http = http.build().expect("an HTTP client");
        let log = dir.join(format!("{label}.log"));
        let process = Process::new(label, binary(program), Vec::new(), namespace.clone(), log);
        let data_dir = dir.join(label);
        let mut host = Self { at, process, data_dir, namespace, addr, runtime: Some(runtime), http };
        host.process.set_flag("--data-dir", &host.data_dir.display().to_string());
        host
    }

    pub(super) fn controller(net: &Network, at: usize, dir: &Path) -> Self {
        let mut host = Self::new(net, at, &format!("controller-{}", at + 1), "holdfast-controller", dir);
        let (listen, peer, url) = (format!("{}:{HTTP_PORT}", host.addr), host.peer_addr(), host.url());
        for (flag, value) in [
            ("--listen", listen.as_str()),
            ("--peer-listen", &peer),
            ("--advertise-url", &url),
            ("--default-cluster", CLUSTER),
            ("--election-timeout", "400ms"),
        ] {
            host.process.set_flag(flag, value);
        }
        host
    }

    pub(super) fn drone(net: &Network, at: usize, name: &str, controllers: &[String], dir: &Path) -> Self {
        let mut host = Self::new(net, at, name, "holdfast-drone", dir);
        let (addr, controllers) = (host.addr.clone(), controllers.join(","));
        for (flag, value) in
            [("--name", name), ("--controller", &controllers), ("--cluster", CLUSTER), ("--ip", &addr)]
        {
            host.process.set_flag(flag, value);
        }
        host
    }

    /// URL of the controller here.
    pub fn url(&self) -> String {
        format!("http://{}:{HTTP_PORT}", self.addr)
    }

    /// Peer address of the controller here.
    pub fn peer_addr(&self) -> String {
        format!("{}:{PEER_PORT}", self.addr)
    }

    /// A client on this host.
    pub fn client(&self) -> HostClient {
        HostClient { handle: self.handle(), http: self.http.clone() }
    }

    /// Runs tasks whose connections begin and end on this host.
    pub(super) fn handle(&self) -> Handle {
        self.runtime.as_ref().expect("there until it is dropped").handle().clone()
    }

    /// GET at the controller here, by a client on this host.
    pub async fn get(&self, path: &str) -> Result<Answer, String> {
        self.client().send(Method::GET, &format!("{}{path}", self.url()), None).await
    }

    /// POST at the controller here, by a client on this host.
    pub async fn post(&self, path: &str, body: Value) -> Result<Answer, String> {
        self.client().send(Method::POST, &format!("{}{path}", self.url()), Some(body)).await
    }

    /// Runs a program of ours here.
    pub async fn run(&self, program: &str, args: &[&str]) -> Said {
        let mut command = command(&binary(program), &self.namespace);
        command.args(args);
        let ran = tokio::task::spawn_blocking(move || command.output()).await.expect("no panic");
        let output = ran.unwrap_or_else(|error| panic!("{program} can't be started: {error}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Said {
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }

    /// `holdfast --controller URL ARGS` on this host.
    pub async fn cli_at(&self, url: &str, args: &[&str]) -> Said {
        let timeout = if args == ["cluster", "status"] { STATUS_TIMEOUT } else { CLI_TIMEOUT };
        let all: Vec<&str> =
            ["--controller", url, "--timeout", timeout].iter().chain(args).copied().collect();
        self.run("holdfast", &all).await
    }

    /// `holdfast ARGS` on this host, for the controller here.
    pub async fn cli(&self, args: &[&str]) -> Said {
        self.cli_at(&self.url(), args).await
    }

    /// Waits until the controller here serves linearizable reads.
    pub async fn wait_ready(&self) {
        wait_until(&format!("{} is ready", self.process.label), LONG, async || {
            match self.get("/ctrl/ready").await {
                Ok(answer) if answer.status.is_success() => Ok(()),
                other => Err(other),
            }
        })
        .await;
    }

    /// Waits until the controller here says that it is not ready, for a reason that holds these words.
    pub async fn wait_not_ready(&self, reason: &str) {
        let what = format!("{} is not ready: {reason:?}", self.process.label);
        wait_until(&what, LONG, async || {
            let answer = self.get("/ctrl/ready").await?;
            let said = answer.json()["reason"].as_str().is_some_and(|said| said.contains(reason));
            if answer.status.as_u16() == 503 && said { Ok(()) } else { Err(format!("{answer:?}")) }
        })
        .await;
    }

    /// Waits until `holdfast cluster status` here holds these words, and gives all of it.
    pub async fn wait_status(&self, words: &str) -> String {
        wait_until(&format!("cluster status at {} says {words:?}", self.process.label), LONG, async || {
            let said = self.cli(&["cluster", "status"]).await.text();
            if said.contains(words) { Ok(said) } else { Err(said) }
        })
        .await
    }

    /// What the controller here knows of its cluster, confirmed by a majority or not.
    pub async fn local_view(&self) -> Result<ClusterInfo, String> {
        let answer = self.get("/ctrl/cluster?consistency=local").await?;
        if answer.status.is_success() { Ok(answer.read()) } else { Err(format!("{answer:?}")) }
    }

    /// Removes everything on the disk of this host's process.
    pub fn wipe(&self) {
        assert!(!self.process.is_started(), "{} still runs", self.process.label);
        std::fs::remove_dir_all(&self.data_dir).expect("removing a data directory");
    }

    /// Copies the data directory, for [`Self::set_back`].
    pub fn copy_data(&self) -> PathBuf {
        let copy = self.data_dir.with_extension("copy");
        copy_dir(&self.data_dir, &copy).expect("copying a data directory");
        copy
    }

    /// Replaces the data directory by a copy of it.
    pub fn set_back(&self, copy: &Path) {
        self.wipe();
        copy_dir(copy, &self.data_dir).expect("copying a data directory");
    }
}

fn copy_dir(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_dir(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
