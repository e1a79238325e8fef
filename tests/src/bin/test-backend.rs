//! The backend that tests run: serves HTTP, writes down its life, and notices another live instance of its key.
//!
//! Environment: `PORT` and `SESSION_BACKEND_…` from the drone; `JOURNAL` (a file), `LOCKDIR` (a directory) and
//! `LOCK_NAME` (a file in it) from the test; `IGNORE_TERM=1`, `START_DELAY_MS`, `TERM_DELAY_MS`, `EXIT_AFTER_MS`;
//! `RESOURCE` (`HOST:PORT`): it writes there with its token all the time; `ALIVE_EVERY_MS`: it writes down that it lives;
//! `SITTERS`: so many children of a child in a session of their own, deaf to everything but SIGKILL.
//!
//! Every answer is its environment as JSON, with `instance` (random) and `pid` in it.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has found something")]

use nix::sys::signal::{SigSet, Signal};
use nix::time::{ClockId, clock_gettime};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio, exit};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::Duration;

/// Exit code of one that found another instance alive.
const EXIT_OVERLAP: i32 = 99;
/// Time between two writes to the resource.
const WRITE_EVERY: Duration = Duration::from_millis(25);
/// Argument of a child that sits until it is killed.
const SITTER: &str = "sit";
/// Argument of the child between.
const SITTER_PARENT: &str = "leave-sitter";

struct Life {
    /// Locked against this process's threads by the mutex, against other processes by the file's own lock.
    journal: Mutex<File>,
    instance: String,
}

fn env(name: &str) -> String {
    std::env::var(name).unwrap_or_default()
}

fn env_ms(name: &str) -> Option<Duration> {
    std::env::var(name).ok()?.parse().ok().map(Duration::from_millis)
}

impl Life {
    /// One line, whole: other instances write to the same file.
    fn write(&self, what: &str) {
        let journal = self.journal.lock().expect("no thread panics with it");
        journal.lock().expect("the journal's lock");
        // Read under the lock, so that the lines' times are in the lines' order.
        let boot = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("CLOCK_BOOTTIME");
        let boot_ms = boot.tv_sec() * 1000 + boot.tv_nsec() / 1_000_000;
        let words = [
            what,
            &env("SESSION_BACKEND_KEY"),
            &env("SESSION_BACKEND_FENCING_TOKEN"),
            &env("SESSION_BACKEND_ID"),
            &self.instance,
            &boot_ms.to_string(),
            &env("LOCK_NAME"),
        ];
        let line = words.join("\t") + "\n";
        (&*journal).write_all(line.as_bytes()).expect("writing the journal");
        journal.unlock().expect("the journal's lock");
    }

    fn end(&self, code: i32) -> ! {
        self.write("stop");
        exit(code);
    }
}

fn answer(stream: &TcpStream, instance: &str) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let head = lines.next().transpose()?.unwrap_or_default();
    while lines.next().transpose()?.is_some_and(|line| !line.is_empty()) {}
    let mut all: serde_json::Map<String, serde_json::Value> =
        std::env::vars().map(|(name, value)| (name, value.into())).collect();
    all.insert("instance".to_owned(), instance.into());
    all.insert("pid".to_owned(), std::process::id().into());
    let body = serde_json::Value::from(all).to_string();
    let sent = if head.starts_with("HEAD") { "" } else { body.as_str() };
    let length = body.len();
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close";
    write!(&*stream, "{head}\r\ncontent-length: {length}\r\n\r\n{sent}")
}

/// Writes to the resource until the end, and connects anew when that breaks.
fn use_resource(addr: &str) {
    let line = format!(
        "{}\t{}\t{}\n",
        env("SESSION_BACKEND_KEY"),
        env("SESSION_BACKEND_FENCING_TOKEN"),
        env("SESSION_BACKEND_ID")
    );
    let session = || -> std::io::Result<()> {
        let stream = TcpStream::connect(addr)?;
        stream.set_nodelay(true)?;
        let mut answers = BufReader::new(&stream);
        loop {
            (&stream).write_all(line.as_bytes())?;
            if answers.read_line(&mut String::new())? == 0 {
                return Ok(());
            }
            sleep(WRITE_EVERY);
        }
    };
    loop {
        // The resource ends with its test.
        let _ = session();
        sleep(WRITE_EVERY);
    }
}

/// A child of a child of its own session: what a backend that knows nothing of its guard may leave behind.
fn leave_sitter() {
    let this = std::env::current_exe().expect("this program");
    let mut command = Command::new(this);
    command.arg(SITTER_PARENT).stdin(Stdio::null());
    command.spawn().expect("a child").wait().expect("the child, which ends at once");
}

/// What the children do.
#[expect(clippy::zombie_processes, reason = "whoever adopts the child waits for it, if anybody does")]
fn child(what: &str) {
    if what == SITTER_PARENT {
        let this = std::env::current_exe().expect("this program");
        let mut command = Command::new(this);
        command.arg(SITTER).stdin(Stdio::null());
        // SAFETY: setsid is async-signal-safe, and nothing is allocated.
        unsafe {
            command.pre_exec(|| Ok(nix::unistd::setsid().map(drop)?));
        }
        let _ = command.spawn().expect("a child");
        return;
    }
    SigSet::all().thread_block().expect("blocking all signals");
    loop {
        sleep(Duration::from_secs(3_600));
    }
}

fn main() {
    if let Some(what) =
        std::env::args().nth(1).filter(|what| [SITTER, SITTER_PARENT].contains(&what.as_str()))
    {
        child(&what);
        return;
    }
    // Before any thread, so that all of them have it blocked.
    let mut term = SigSet::empty();
    term.add(Signal::SIGTERM);
    term.thread_block().expect("blocking SIGTERM");

    let journal = OpenOptions::new().create(true).append(true).open(env("JOURNAL")).expect("the journal");
    let instance =
        std::fs::read_to_string("/proc/sys/kernel/random/uuid").expect("a random name").trim().to_owned();
    let life = Arc::new(Life { journal: Mutex::new(journal), instance });

    let dir = env("LOCKDIR");
    std::fs::create_dir_all(&dir).expect("the directory of locks");
    let lock = File::create(Path::new(&dir).join(env("LOCK_NAME"))).expect("the lock file");
    if lock.try_lock().is_err() {
        life.write("OVERLAP");
        exit(EXIT_OVERLAP);
    }
    life.write("start");
    for _ in 0..env("SITTERS").parse().unwrap_or(0) {
        leave_sitter();
    }
    if let Ok(addr) = std::env::var("RESOURCE") {
        spawn(move || use_resource(&addr));
    }
    if let Some(every) = env_ms("ALIVE_EVERY_MS") {
        let life = Arc::clone(&life);
        spawn(move || {
            loop {
                sleep(every);
                life.write("alive");
            }
        });
    }

    if let Some(after) = env_ms("EXIT_AFTER_MS") {
        let life = Arc::clone(&life);
        spawn(move || {
            sleep(after);
            life.end(0);
        });
    }
    {
        let life = Arc::clone(&life);
        let ignores = env("IGNORE_TERM") == "1";
        spawn(move || {
            loop {
                term.wait().expect("waiting for SIGTERM");
                life.write("term");
                if !ignores {
                    sleep(env_ms("TERM_DELAY_MS").unwrap_or_default());
                    life.end(0);
                }
            }
        });
    }
    sleep(env_ms("START_DELAY_MS").unwrap_or_default());
    let port: u16 = env("PORT").parse().expect("PORT");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).expect("listening on PORT");
    for stream in listener.incoming().flatten() {
        let life = Arc::clone(&life);
        // A caller that goes away is its own business.
        spawn(move || answer(&stream, &life.instance).ok());
    }
}
