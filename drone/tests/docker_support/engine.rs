//! A container engine of the test's own, which it may stop, kill and start again: the machine's is everybody's.

use super::docker_can_at;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

pub struct Engine {
    dir: tempfile::TempDir,
    bridge: String,
    process: Option<Child>,
}

fn ip(arguments: &[&str]) -> bool {
    Command::new("ip").args(arguments).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

impl Engine {
    /// None where one cannot be started: without the program, or without the right to.
    pub fn start() -> Option<Self> {
        if Command::new("dockerd").arg("--version").output().is_err() || !nix::unistd::geteuid().is_root() {
            let _ = writeln!(std::io::stderr(), "SKIP: no dockerd here, or not root");
            return None;
        }
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let bridge = format!("hf{pid}x{count}");
        let address = format!("10.89.{}.1/24", (pid + count) % 250);
        assert!(ip(&["link", "add", &bridge, "type", "bridge"]), "no bridge");
        let mut engine = Self { dir: tempfile::tempdir().unwrap(), bridge, process: None };
        assert!(ip(&["addr", "add", &address, "dev", &engine.bridge]), "no address");
        assert!(ip(&["link", "set", &engine.bridge, "up"]));
        std::fs::write(engine.at("config.json"), "{}").unwrap();
        engine.run();
        Some(engine)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.at("engine.sock")
    }

    /// Starts it, or starts it again.
    pub fn run(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.at("log")).unwrap();
        let mut command = Command::new("dockerd");
        command
            .arg("--config-file")
            .arg(self.at("config.json"))
            .arg("--data-root")
            .arg(self.at("data"))
            .arg("--exec-root")
            .arg(self.at("exec"))
            .arg("--pidfile")
            .arg(self.at("pid"))
            .arg("--host")
            .arg(format!("unix://{}", self.socket().display()))
            .args([
                "--bridge",
                &self.bridge,
                "--iptables=false",
                "--ip-masq=false",
                "--storage-driver",
                "vfs",
            ])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        // SAFETY: only async-signal-safe calls between fork and exec. It ends with a test that is killed.
        unsafe {
            command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?));
        }
        let _ = std::fs::remove_file(self.at("pid"));
        self.process = Some(command.spawn().unwrap());
        let end = Instant::now() + PATIENCE;
        while !docker_can_at(&self.socket(), &["version"]) {
            assert!(Instant::now() < end, "{}", std::fs::read_to_string(self.at("log")).unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub fn signal(&self, signal: Signal) {
        let pid = self.process.as_ref().unwrap().id();
        kill(Pid::from_raw(i32::try_from(pid).unwrap()), signal).unwrap();
    }

    /// Kills it; its containers run on.
    pub fn kill(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().unwrap();
        process.wait().unwrap();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let pid = Pid::from_raw(i32::try_from(process.id()).unwrap_or_default());
            let _ = kill(pid, Signal::SIGCONT);
            let _ = kill(pid, Signal::SIGTERM);
            let end = Instant::now() + PATIENCE;
            while matches!(process.try_wait(), Ok(None)) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(50));
            }
            let _ = process.kill();
            let _ = process.wait();
        }
        ip(&["link", "del", &self.bridge]);
        unmount_below(self.dir.path());
    }
}

/// What an engine that was killed has left mounted would keep its directory.
fn unmount_below(dir: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut below: Vec<&str> = mounts.lines().filter_map(|line| line.split(' ').nth(1)).collect();
    below.retain(|target| Path::new(target).starts_with(dir));
    for target in below.into_iter().rev() {
        let _ = nix::mount::umount2(target, nix::mount::MntFlags::MNT_DETACH);
    }
}
