//! Which backends have open TCP connections, as the kernel's tables say, and what of that the controllers have to hear.
//!
//! ```text
//!   every second:  /proc/net/tcp{,6} ──look──▶ Seen of each port ──▶ Tracker ──BackendActivity──▶ controller
//!                  (one read for all backends)                           ▲                            │
//!                                                                        └──────── AckActivity ◀──────┘
//! ```
//!
//! A connection counts while either side may still speak: established, or closed by the client alone. One that was opened
//! and closed between two looks is seen by what it leaves behind if the backend's side (or a client on this machine)
//! closed it first; otherwise it is missed. A backend that never closes what its clients have closed is never idle.
//!
//! Containers: a published port of this machine is served by `docker-proxy` for clients on this machine alone; others come
//! by the kernel's address translation and are in no table of this machine. So for a container the tables of its own
//! network namespace are read (`/proc/{pid of its first process}/net`), by its inner port. With a network of the machine
//! itself (`host`) that is the same table. What another proxy inside the container's namespace keeps open counts.
//!
//! Invariants:
//!
//! 1. A backend is never said to be idle for longer than nothing was seen of a connection to it, nor for longer than it
//!    was watched. A look that failed has not found nothing: from then until a look succeeds the backend counts as busy.
//! 2. What is said is said again until it is acknowledged, and is always what holds then: older notices are replaced.
//!    After a reconnect everything is said again.
//! 3. `activity_id` grows with each message for as long as the process lives, over all sessions, so that a controller can
//!    tell a notice that another one has overtaken.
//! 4. Connections that come and go within [`IDLE_AFTER_MS`] of each other are one notice, not many.
//! 5. The work of a call grows with the backends that it is about, not with all of them.

use crate::tables::{Schedule, Table};
use holdfast_wire::drone::{ActivityItem, AskAgain, BackendActivity};
use holdfast_wire::limits::ACTIVITIES_MAX;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often connections are looked at.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A backend that had a connection is said to be idle after this long without one, in milliseconds.
pub const IDLE_AFTER_MS: i64 = 2_000;
/// After how long what was not acknowledged is said again, in milliseconds; it doubles. Controllers that are older than
/// this message never acknowledge it.
const SAY_AGAIN_MS_MIN: i64 = 2_000;
/// Longest such time.
const SAY_AGAIN_MS_MAX: i64 = 60_000;
/// Most rows of one table that are looked at. A machine with more has given nothing to be judged by.
const ROWS_MAX: usize = 4_000_000;
/// How long the kernel remembers a closed connection, in milliseconds (`TCP_TIMEWAIT_LEN`).
const TIME_WAIT_MS: u64 = 60_000;
/// Length of the ticks that the kernel's tables count in, in milliseconds (`USER_HZ` is 100 everywhere).
const TICK_MS: u64 = 10;

const ESTABLISHED: u8 = 0x01;
const TIME_WAIT: u8 = 0x06;
const CLOSE_WAIT: u8 = 0x08;

/// What was seen of a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Seen {
    /// Open connections.
    pub open: u64,
    /// How long ago the last one ended whose end is remembered, in milliseconds.
    pub closed_ago_ms: Option<u64>,
}

/// A row of the kernel's table that says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    Open { port: u16 },
    Closed { port: u16, ago_ms: u64 },
}

/// Reads a row of `/proc/net/tcp` or `tcp6`: `sl local_address rem_address st tx:rx tr:when …`. `None` for the heading, for
/// listening sockets and for connections that are being opened or closed.
fn row(line: &str) -> Option<Row> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (_, port) = fields.next()?.rsplit_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    match u8::from_str_radix(fields.nth(1)?, 16).ok()? {
        ESTABLISHED | CLOSE_WAIT => Some(Row::Open { port }),
        TIME_WAIT => {
            let (_, left) = fields.nth(1)?.split_once(':')?;
            let left_ms = u64::from_str_radix(left, 16).ok()?.saturating_mul(TICK_MS);
            Some(Row::Closed { port, ago_ms: TIME_WAIT_MS.saturating_sub(left_ms) })
        }
        _ => None,
    }
}

/// Adds up a table for the ports that are asked for.
fn add(table: impl BufRead, seen: &mut HashMap<u16, Seen>) -> io::Result<()> {
    let mut table = table;
    let mut line = String::new();
    for _ in 0..ROWS_MAX {
        line.clear();
        if table.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match row(&line) {
            Some(Row::Open { port }) => {
                if let Some(seen) = seen.get_mut(&port) {
                    seen.open += 1;
                }
            }
            Some(Row::Closed { port, ago_ms }) => {
                if let Some(seen) = seen.get_mut(&port) {
                    seen.closed_ago_ms = Some(seen.closed_ago_ms.map_or(ago_ms, |before| before.min(ago_ms)));
                }
            }
            None => {}
        }
    }
    Err(io::Error::other(format!("more than {ROWS_MAX} connections")))
}

/// Reads both tables of a network namespace (`/proc/net`, `/proc/{pid}/net`) once, for all of these ports. It blocks for
/// as long as the kernel takes to write the tables: milliseconds for thousands of connections.
fn look(net: &Path, ports: impl IntoIterator<Item = u16>) -> io::Result<HashMap<u16, Seen>> {
    let mut seen = ports.into_iter().map(|port| (port, Seen::default())).collect();
    add(BufReader::new(std::fs::File::open(net.join("tcp"))?), &mut seen)?;
    match std::fs::File::open(net.join("tcp6")) {
        Ok(table) => add(BufReader::new(table), &mut seen)?,
        // A kernel without IPv6.
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(seen)
}

/// Where a backend's connections are seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// A process in the network namespace that the backend listens in; `None`: the drone's own.
    pub pid: Option<i32>,
    /// The port it listens on there.
    pub port: u16,
}

/// Looks at all places, with one read of the tables for each network namespace. A place whose tables can't be read is
/// missing from the answer, and the reason is given. Blocks: see [`look`].
pub fn look_at(places: impl IntoIterator<Item = Place>) -> (BTreeMap<Place, Seen>, Vec<io::Error>) {
    let mut ports: BTreeMap<Option<i32>, Vec<u16>> = BTreeMap::new();
    for place in places {
        ports.entry(place.pid).or_default().push(place.port);
    }
    let (mut seen, mut errors) = (BTreeMap::new(), Vec::new());
    for (pid, ports) in ports {
        let net = pid.map_or_else(|| PathBuf::from("/proc/net"), |pid| format!("/proc/{pid}/net").into());
        match look(&net, ports) {
            Ok(found) => {
                seen.extend(found.into_iter().map(|(port, seen)| (Place { pid, port }, seen)));
            }
            Err(error) => errors.push(io::Error::new(error.kind(), format!("{}: {error}", net.display()))),
        }
    }
    (seen, errors)
}

/// What is said of a backend. Times are of the clock that the caller gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Notice {
    /// It has connections, had one just now, or may have some since the last look failed.
    Busy,
    IdleSince(i64),
}

/// Something that was said and not acknowledged yet.
#[derive(Debug, Clone, Copy)]
struct Sent {
    activity_id: i64,
    notice: Notice,
    again_at_ms: i64,
    pause_ms: i64,
}

#[derive(Debug)]
struct Watched {
    token: u64,
    first_seen_ms: i64,
    /// The last look that succeeded.
    looked_at_ms: i64,
    open: u64,
    /// The last look failed.
    unseen: bool,
    /// When a connection was last open, as far as it was seen.
    active_ms: Option<i64>,
    acknowledged: Option<Notice>,
    sent: Option<Sent>,
    /// When a controller wants to hear once more how long it has been idle, after a new look.
    ask_at_ms: Option<i64>,
}

impl Watched {
    fn notice(&self, now_ms: i64) -> Notice {
        let recent = self.active_ms.is_some_and(|at_ms| now_ms.saturating_sub(at_ms) < IDLE_AFTER_MS);
        if self.open > 0 || self.unseen || recent {
            return Notice::Busy;
        }
        Notice::IdleSince(self.active_ms.unwrap_or(self.first_seen_ms))
    }

    /// When something has to be said of it next, if nothing else is seen of it.
    fn due_at(&self, now_ms: i64) -> Option<i64> {
        let notice = self.notice(now_ms);
        match self.sent {
            Some(sent) if sent.notice != notice => return Some(now_ms),
            // Another notice in flight has to be followed by this one, even if this one was known before it.
            None if self.acknowledged != Some(notice) => return Some(now_ms),
            _ => {}
        }
        let turns_idle_at = match (notice, self.active_ms) {
            (Notice::Busy, Some(active_ms)) if self.open == 0 && !self.unseen => {
                Some(active_ms + IDLE_AFTER_MS)
            }
            _ => None,
        };
        let again_at = self.sent.map(|sent| sent.again_at_ms);
        turns_idle_at.into_iter().chain(again_at).min()
    }
}

/// What the controllers know of the backends' connections, and what they have to hear. Pure; times are milliseconds of
/// one clock.
#[derive(Debug, Default)]
pub struct Tracker {
    backends: Table<String, Watched>,
    /// When something has to be said of each backend next.
    due: Schedule<String>,
    /// The backends of each message that is in flight.
    in_flight: Table<i64, BTreeSet<String>>,
    last_id: i64,
}

impl Tracker {
    /// A ready backend was looked at. The first look begins its watch: idle since then, if nothing is seen. `None` if the
    /// look failed.
    pub fn seen(&mut self, backend: &str, token: u64, seen: Option<Seen>, now_ms: i64) {
        if self.backends.get(backend).is_some_and(|known| known.token != token) {
            self.forget(backend);
        }
        let new = || Watched {
            token,
            first_seen_ms: now_ms,
            looked_at_ms: now_ms,
            open: 0,
            unseen: false,
            active_ms: None,
            acknowledged: None,
            sent: None,
            ask_at_ms: None,
        };
        let watched = self.backends.entry(backend.to_owned()).or_insert_with(new);
        let was_unseen = std::mem::replace(&mut watched.unseen, seen.is_none());
        if let Some(seen) = seen {
            watched.looked_at_ms = now_ms;
            let was_open = std::mem::replace(&mut watched.open, seen.open) > 0;
            let active_ms = match seen.closed_ago_ms {
                // It was closed at some time since the look before; rather a look's time too late than too early. The same
                // of connections that a failed look would have seen.
                _ if seen.open > 0 || was_open || was_unseen => Some(now_ms),
                // One that ended before the watch began was of the port's earlier user, or of the drone's own question
                // whether the backend is ready.
                Some(ago_ms) => {
                    let ago_ms = i64::try_from(ago_ms).unwrap_or(i64::MAX);
                    Some(now_ms.saturating_sub(ago_ms)).filter(|at_ms| *at_ms > watched.first_seen_ms)
                }
                None => None,
            };
            watched.active_ms = watched.active_ms.max(active_ms);
            if watched.ask_at_ms.is_some_and(|at_ms| at_ms <= now_ms) {
                watched.ask_at_ms = None;
                // To be said although it is known.
                watched.acknowledged = None;
            }
        }
        self.plan(backend, now_ms);
    }

    /// A backend has ended.
    pub fn forget(&mut self, backend: &str) {
        if let Some(Watched { sent: Some(sent), .. }) = self.backends.remove(backend) {
            self.no_longer_in_flight(sent.activity_id, backend);
        }
        self.due.set(&backend.to_owned(), None);
    }

    /// A new session: everything is said again at once.
    pub fn connected(&mut self, now_ms: i64) {
        self.in_flight = Table::default();
        for (backend, watched) in self.backends.iter_mut() {
            watched.sent = None;
            watched.acknowledged = None;
            watched.ask_at_ms = None;
            self.due.set(backend, Some(now_ms));
        }
    }

    /// What has to be said now; at most [`ACTIVITIES_MAX`] backends, so more may have to be said after it.
    pub fn message(&mut self, now_ms: i64) -> Option<BackendActivity> {
        let activity_id = self.last_id + 1;
        let mut backends = Vec::new();
        while backends.len() < ACTIVITIES_MAX
            && let Some(id) = self.due.pop_due(now_ms)
        {
            let Some(watched) = self.backends.get_mut(&id) else { continue };
            let due = watched.due_at(now_ms).is_some_and(|at_ms| at_ms <= now_ms);
            if due {
                let notice = watched.notice(now_ms);
                let pause_ms = match watched.sent {
                    Some(sent) if sent.notice == notice => (2 * sent.pause_ms).min(SAY_AGAIN_MS_MAX),
                    _ => SAY_AGAIN_MS_MIN,
                };
                let (connections, idle_ms) = match notice {
                    Notice::Busy => (watched.open.max(1), 0),
                    // Only as far as was looked: someone may have connected since.
                    Notice::IdleSince(at_ms) => {
                        (0, watched.looked_at_ms.saturating_sub(at_ms).max(0).unsigned_abs())
                    }
                };
                backends.push(ActivityItem {
                    backend: id.clone(),
                    token: Some(watched.token),
                    connections,
                    idle_ms,
                });
                let sent = Sent { activity_id, notice, again_at_ms: now_ms + pause_ms, pause_ms };
                if let Some(before) = watched.sent.replace(sent) {
                    self.no_longer_in_flight(before.activity_id, &id);
                }
                self.in_flight.entry(activity_id).or_default().insert(id.clone());
            }
            self.plan(&id, now_ms);
        }
        if backends.is_empty() {
            return None;
        }
        self.last_id = activity_id;
        Some(BackendActivity { activity_id, backends })
    }

    /// A controller has recorded a message. It wants to hear of `again` once more later.
    pub fn acknowledged(&mut self, activity_id: i64, again: &[AskAgain], now_ms: i64) {
        for backend in self.in_flight.remove(&activity_id).unwrap_or_default() {
            if let Some(watched) = self.backends.get_mut(&backend)
                && let Some(sent) = watched.sent.take_if(|sent| sent.activity_id == activity_id)
            {
                watched.acknowledged = Some(sent.notice);
            }
            self.plan(&backend, now_ms);
        }
        for AskAgain { backend, in_ms } in again {
            if let Some(watched) = self.backends.get_mut(backend) {
                watched.ask_at_ms = Some(now_ms.saturating_add_unsigned(*in_ms));
            }
        }
    }

    /// When [`Tracker::message`] next has something to say: a moment that may have passed, or none.
    pub fn next_wake(&self) -> Option<i64> {
        self.due.next()
    }

    fn plan(&mut self, backend: &str, now_ms: i64) {
        let at_ms = self.backends.get(backend).and_then(|watched| watched.due_at(now_ms));
        self.due.set(&backend.to_owned(), at_ms);
    }

    fn no_longer_in_flight(&mut self, activity_id: i64, backend: &str) {
        if let Some(backends) = self.in_flight.get_mut(&activity_id) {
            backends.remove(backend);
            if backends.is_empty() {
                self.in_flight.remove(&activity_id);
            }
        }
    }
}

#[cfg(test)]
#[path = "activity_tests.rs"]
mod tracker_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:4E20 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 634 1 00000000b7e72b32 100 0 0 10 0
   1: 0100007F:4E20 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 1549287 1 000000000bab5158 20 4 30 10 -1
   2: 0100007F:D431 0100007F:4E20 01 00000000:00000000 02:000A7214 00000000     0        0 1549288 2 0000000094e27226 20 4 0 10 -1
   3: 0100007F:4E20 0100007F:D432 08 00000000:00000001 00:00000000 00000000     0        0 1549806 1 00000000d1e553cc 20 4 30 10 -1
   4: 0100007F:4E21 0100007F:D433 06 00000000:00000000 03:00001388 00000000     0        0 0 3 0000000000000000
   5: 0100007F:4E21 0100007F:D434 06 00000000:00000000 03:00000BB8 00000000     0        0 0 3 0000000000000000
   6: 0100007F:4E22 0100007F:D435 04 00000000:00000001 01:00000014 00000000     0        0 0 3 0000000000000000
   7: 0100007F:4E22 0100007F:D436 03 00000000:00000000 01:00000014 00000000     0        0 0 3 0000000000000000
";
    const TABLE6: &str = "\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0000000000000000FFFF00000100007F:4E23 0000000000000000FFFF00000100007F:D440 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0000000000000000 20 4 30 10 -1
   1: 00000000000000000000000001000000:4E23 00000000000000000000000001000000:D441 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0000000000000000 20 4 30 10 -1
";

    fn seen(open: u64, closed_ago_ms: Option<u64>) -> Seen {
        Seen { open, closed_ago_ms }
    }

    #[test]
    fn connections_are_counted_by_the_backends_port_on_its_own_side() {
        let mut ports = (0x4E20..=0x4E24).map(|port| (port, Seen::default())).collect();
        for table in
            [TABLE, TABLE6, "", "garbage\n\u{0}\n 1: x:y 2 01\n 1: 0:4E20", " 1: 0:4E20 0:0 06 0 03:zz"]
        {
            add(table.as_bytes(), &mut ports).unwrap();
        }
        assert_eq!(ports[&0x4E20], seen(2, None), "one of them closed by the client alone");
        // 60 s less the 50 and 30 s that are left.
        assert_eq!(ports[&0x4E21], seen(0, Some(10_000)));
        assert_eq!(ports[&0x4E22], seen(0, None), "being closed by the backend, and being opened");
        assert_eq!(ports[&0x4E23], seen(2, None), "an IPv4 one on an IPv6 socket, and an IPv6 one");
        assert_eq!(ports[&0x4E24], seen(0, None));
        assert_eq!(ports.len(), 5, "no port that nobody asked for");
    }

    #[test]
    fn what_is_no_text_is_an_error_and_no_panic() {
        let mut ports = HashMap::from([(1, Seen::default())]);
        assert!(add(&b"\xff\xfe\n"[..], &mut ports).is_err());
    }

    /// On the machine's own tables.
    #[test]
    fn a_real_connection_is_seen_while_it_is_open_and_its_end_is_remembered() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = i32::try_from(std::process::id()).unwrap();
        let look = || {
            let places = [Place { pid: None, port }, Place { pid: Some(own), port }];
            let (seen, errors) = look_at(places);
            assert!(errors.is_empty(), "{errors:?}");
            // The same namespace; a tick may pass between the two.
            assert_eq!(seen[&places[0]].open, seen[&places[1]].open);
            seen[&places[0]]
        };
        // The kernel may still be busy with the last packets.
        let until = |what: &str, holds: &dyn Fn(Seen) -> bool| {
            let end = std::time::Instant::now() + Duration::from_secs(10);
            while !holds(look()) {
                assert!(std::time::Instant::now() < end, "{what}: {:?}", look());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        assert_eq!(look(), Seen::default());
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        until("opened", &|seen| seen.open == 1);
        // Half closed: the backend may still answer.
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0]).unwrap(), 0);
        assert_eq!(look().open, 1);
        server.write_all(b"x").unwrap();
        drop(server);
        client.read_to_end(&mut Vec::new()).unwrap();
        drop(client);
        until("closed", &|seen| seen.open == 0);
        // Now the backend's side closes first.
        let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        drop(listener.accept().unwrap());
        client.read_to_end(&mut Vec::new()).unwrap();
        drop(client);
        until("remembered", &|seen| seen.open == 0 && seen.closed_ago_ms.is_some_and(|ms| ms < 15_000));
    }

    #[test]
    fn a_namespace_that_is_gone_is_said_and_leaves_the_others() {
        let (here, gone) = (Place { pid: None, port: 1 }, Place { pid: Some(i32::MAX), port: 1 });
        let (seen, errors) = look_at([here, gone]);
        assert_eq!((seen.len(), errors.len()), (1, 1));
        assert!(seen.contains_key(&here));
    }
}
