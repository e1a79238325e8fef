//! The backend in the tests' image: one static program, told by its environment what to do.
//!
//! - answers every HTTP request on `PORT` with its environment;
//! - `ON_TERM`: `ignore` SIGTERM, or end with this exit code (0);
//! - `EXIT_CODE`: ends with it at once;
//! - leaves a mark in `/plane-data`, if that is mounted, when it starts.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "what a test prints is read by people")]

use std::io::{Read, Write};
use std::sync::atomic::{AtomicI32, Ordering};

unsafe extern "C" {
    fn signal(number: i32, handler: usize) -> usize;
    fn _exit(code: i32) -> !;
}

const SIGTERM: i32 = 15;
const SIG_IGN: usize = 1;
static TERM_CODE: AtomicI32 = AtomicI32::new(0);

extern "C" fn on_term(_: i32) {
    // SAFETY: async-signal-safe.
    unsafe { _exit(TERM_CODE.load(Ordering::SeqCst)) }
}

fn main() {
    let var = |name: &str| std::env::var(name).ok();
    let handler = match var("ON_TERM").as_deref() {
        Some("ignore") => SIG_IGN,
        code => {
            TERM_CODE.store(code.map_or(0, |code| code.parse().unwrap()), Ordering::SeqCst);
            on_term as *const () as usize
        }
    };
    // SAFETY: a handler that only ends the process.
    unsafe { signal(SIGTERM, handler) };
    let id = var("SESSION_BACKEND_ID").unwrap();
    if std::path::Path::new("/plane-data").is_dir() {
        std::fs::write(format!("/plane-data/started-{id}"), "").unwrap();
    }
    if let Some(code) = var("EXIT_CODE") {
        println!("ends");
        std::process::exit(code.parse().unwrap());
    }
    let port: u16 = var("PORT").unwrap().parse().unwrap();
    let listener = std::net::TcpListener::bind(("0.0.0.0", port)).unwrap();
    println!("listens");
    let body: String = std::env::vars().map(|(name, value)| format!("{name}={value}\n")).collect();
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut request = [0u8; 4096];
        let head = stream.read(&mut request).is_ok_and(|n| request[..n].starts_with(b"HEAD"));
        let length = body.len();
        let head_only = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        let _ = stream.write_all(head_only.as_bytes());
        if !head {
            let _ = stream.write_all(body.as_bytes());
        }
    }
}
