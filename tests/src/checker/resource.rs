//! What fencing tokens are for: a resource that takes a write only with the highest token it has seen of that key.
//!
//! Lines over TCP: `KEY <tab> TOKEN <tab> BACKEND` each, answered by `ok` or `no HIGHEST`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::spawn;

/// Refused writes that are kept as they were.
const REFUSED_KEPT_MAX: usize = 20;

/// Accepted writes of one key with one token in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The token.
    pub token: u64,
    /// How many.
    pub writes: u64,
}

#[derive(Debug, Default)]
struct Books {
    highest: BTreeMap<String, u64>,
    turns: BTreeMap<String, Vec<Turn>>,
    accepted: BTreeMap<String, u64>,
    refused: u64,
    refused_kept: Vec<String>,
}

impl Books {
    /// Accepts, or gives the higher token.
    fn write(&mut self, key: &str, token: u64, backend: &str) -> Result<(), u64> {
        let highest = self.highest.entry(key.to_owned()).or_default();
        if token < *highest {
            let highest = *highest;
            self.refused += 1;
            if self.refused_kept.len() < REFUSED_KEPT_MAX {
                self.refused_kept.push(format!("{key} by {backend} with {token} after {highest}"));
            }
            return Err(highest);
        }
        *highest = token;
        *self.accepted.entry(backend.to_owned()).or_default() += 1;
        let turns = self.turns.entry(key.to_owned()).or_default();
        match turns.last_mut() {
            Some(turn) if turn.token == token => turn.writes += 1,
            _ => turns.push(Turn { token, writes: 1 }),
        }
        Ok(())
    }
}

/// The server. Ends when dropped.
#[derive(Debug)]
pub struct Resource {
    addr: SocketAddr,
    listener: Arc<TcpListener>,
    books: Arc<Mutex<Books>>,
    stop: Arc<AtomicBool>,
}

impl Drop for Resource {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts, whatever network namespace the listener is in.
        // SAFETY: the descriptor is open while `self` lives.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
    }
}

fn serve(stream: &TcpStream, books: &Mutex<Books>) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let mut words = line.split('\t');
        let (key, token, backend) = (words.next(), words.next(), words.next());
        let (Some(key), Some(Ok(token)), Some(backend)) = (key, token.map(str::parse), backend) else {
            return Err(std::io::Error::other(format!("not a write: {line:?}")));
        };
        let answer = books.lock().unwrap_or_else(PoisonError::into_inner).write(key, token, backend);
        let answer = answer.map_or_else(|highest| format!("no {highest}\n"), |()| "ok\n".to_owned());
        (&*stream).write_all(answer.as_bytes())?;
    }
    Ok(())
}

impl Resource {
    /// On a port of its own.
    pub fn start() -> Self {
        Self::on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port for the resource"))
    }

    /// On a listener, which may be in another network namespace.
    pub fn on(listener: TcpListener) -> Self {
        let addr = listener.local_addr().expect("its address");
        let listener = Arc::new(listener);
        let books: Arc<Mutex<Books>> = Arc::default();
        let stop: Arc<AtomicBool> = Arc::default();
        let (shared, stopped, accepting) = (Arc::clone(&books), Arc::clone(&stop), Arc::clone(&listener));
        spawn(move || {
            for stream in accepting.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let books = Arc::clone(&shared);
                // A backend that is killed breaks its connection: no error of anybody's.
                spawn(move || serve(&stream, &books).ok());
            }
        });
        Self { addr, listener, books, stop }
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepted writes of a backend.
    pub fn accepted(&self, backend: &str) -> u64 {
        self.books().accepted.get(backend).copied().unwrap_or(0)
    }

    /// Refused writes.
    pub fn refused(&self) -> u64 {
        self.books().refused
    }

    /// The accepted writes of a key, in their order.
    pub fn turns(&self, key: &str) -> Vec<Turn> {
        self.books().turns.get(key).cloned().unwrap_or_default()
    }

    /// Writes that had to be refused, and lower tokens that were accepted after higher ones.
    pub fn problems(&self) -> Vec<String> {
        let books = self.books();
        let mut problems: Vec<String> =
            books.refused_kept.iter().map(|what| format!("the resource refused {what}")).collect();
        for (key, turns) in &books.turns {
            if turns.windows(2).any(|pair| pair[1].token <= pair[0].token) {
                problems.push(format!("the resource accepted a lower token of {key} later: {turns:?}"));
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(stream: &TcpStream, line: &str) -> String {
        (&*stream).write_all(format!("{line}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    #[test]
    fn a_lower_token_is_refused_after_a_higher_one_of_its_key() {
        let resource = Resource::start();
        let old = TcpStream::connect(resource.addr()).unwrap();
        let new = TcpStream::connect(resource.addr()).unwrap();
        assert_eq!(say(&old, "k\t5\told"), "ok");
        assert_eq!(say(&old, "k\t5\told"), "ok");
        assert_eq!(say(&new, "k\t7\tnew"), "ok");
        assert_eq!(say(&new, "other\t1\tthird"), "ok");
        assert_eq!(resource.problems(), Vec::<String>::new());
        assert_eq!(say(&old, "k\t5\told"), "no 7");
        assert_eq!(say(&new, "k\t7\tnew"), "ok");
        assert_eq!((resource.accepted("old"), resource.accepted("new"), resource.refused()), (2, 2, 1));
        assert_eq!(resource.turns("k"), [Turn { token: 5, writes: 2 }, Turn { token: 7, writes: 2 }]);
        let problems = resource.problems();
        assert!(problems.len() == 1 && problems[0].contains("with 5 after 7"), "{problems:?}");
    }
}
