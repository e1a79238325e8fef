//! A request to the container engine over its Unix socket, without ever waiting: who makes it polls a descriptor. One
//! connection carries one request. A guard has no room for more, and must not hang on an engine that does.

use crate::clock::boot_ms;
use serde::Deserialize;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

/// Largest answer, in bytes: an inspected container with the largest environment that a spawn may have, escaped.
pub const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// HTTP's status of what the engine does not know.
pub const NOT_FOUND: u16 = 404;
/// Most header fields of an answer.
const HEADERS_MAX: usize = 64;
/// Largest part of an answer's body that is quoted as the engine's message, in bytes.
const MESSAGE_BYTES_MAX: usize = 1_024;

/// An answer of the engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Of HTTP.
    pub status: u16,
    /// Complete.
    pub body: Vec<u8>,
}

impl Answer {
    /// Whether it was done.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// What the engine says of a failure.
    pub fn message(&self) -> String {
        #[derive(Deserialize)]
        struct Message {
            message: String,
        }
        let mut text = match serde_json::from_slice::<Message>(&self.body) {
            Ok(message) => message.message,
            Err(_) => String::from_utf8_lossy(&self.body).into_owned(),
        };
        let end = (0..=MESSAGE_BYTES_MAX.min(text.len())).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        format!("{} ({})", text.trim(), self.status)
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The engine does not take the connection: it has not got the request.
    #[error("the engine is not reached: {0}")]
    NotReached(io::Error),
    /// The connection broke: the engine may have got the request, and may still do it.
    #[error("the engine has not answered: {0}")]
    Broken(io::Error),
    /// Not HTTP, or too long: the same.
    #[error("the engine's answer is not understood: {0}")]
    NotUnderstood(String),
}

/// A request under way.
#[derive(Debug)]
pub struct Call {
    socket: Socket,
    unsent: Vec<u8>,
    received: Vec<u8>,
}

impl Call {
    /// Begins a request without a body. The path must be one of an HTTP request line.
    pub fn begin(engine: &Path, method: &str, path: &str) -> Result<Self, CallError> {
        let connect = || {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            // Done at once, or refused: with a full queue too.
            socket.connect(&SockAddr::unix(engine)?)?;
            Ok(socket)
        };
        let socket = connect().map_err(CallError::NotReached)?;
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: engine\r\nUser-Agent: holdfast-guard\r\nContent-Length: 0\r\n\
             Connection: close\r\n\r\n"
        );
        Ok(Self { socket, unsent: request.into_bytes(), received: Vec::new() })
    }

    /// The descriptor to poll, and for what.
    pub fn interest(&self) -> (RawFd, libc::c_short) {
        let events = if self.unsent.is_empty() { libc::POLLIN } else { libc::POLLIN | libc::POLLOUT };
        (self.socket.as_raw_fd(), events)
    }

    /// Goes on as far as that is possible without waiting; the answer, once it is there.
    pub fn advance(&mut self) -> Result<Option<Answer>, CallError> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(CallError::Broken(e)),
            }
        }
        let mut chunk = [0u8; 16 * 1024];
        loop {
            let ended = match self.socket.read(&mut chunk) {
                Ok(0) => true,
                Ok(read) => {
                    self.received.extend_from_slice(chunk.get(..read).unwrap_or_default());
                    false
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(CallError::Broken(e)),
            };
            if self.received.len() > ANSWER_BYTES_MAX {
                return Err(CallError::NotUnderstood(format!("more than {ANSWER_BYTES_MAX} bytes")));
            }
            match parse(&self.received, ended).map_err(CallError::NotUnderstood)? {
                Some(answer) => return Ok(Some(answer)),
                None if ended => return Err(CallError::Broken(io::ErrorKind::UnexpectedEof.into())),
                None => {}
            }
        }
    }
}

/// Makes a request and waits for its answer: for a process that has nothing else to do.
pub fn ask(engine: &Path, method: &str, path: &str, wait_ms_max: i64) -> Result<Answer, CallError> {
    let until = boot_ms().saturating_add(wait_ms_max);
    let mut call = Call::begin(engine, method, path)?;
    loop {
        if let Some(answer) = call.advance()? {
            return Ok(answer);
        }
        let left_ms = until - boot_ms();
        if left_ms <= 0 {
            return Err(CallError::Broken(io::ErrorKind::TimedOut.into()));
        }
        let (fd, events) = call.interest();
        let mut poll = libc::pollfd { fd, events, revents: 0 };
        // SAFETY: one valid pollfd.
        unsafe { libc::poll(&raw mut poll, 1, i32::try_from(left_ms).unwrap_or(i32::MAX)) };
    }
}

/// Whether an inspected container runs.
pub fn is_running(inspected: &Answer) -> bool {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct State {
        running: bool,
    }
    #[derive(Deserialize)]
    struct Inspected {
        #[serde(rename = "State")]
        state: State,
    }
    serde_json::from_slice::<Inspected>(&inspected.body).is_ok_and(|inspected| inspected.state.running)
}

/// Reads an answer; none while it is incomplete. `ended` says that no more comes.
fn parse(bytes: &[u8], ended: bool) -> Result<Option<Answer>, String> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let head_bytes = match head.parse(bytes).map_err(|e| e.to_string())? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Ok(None),
    };
    let status = head.code.ok_or("no status")?;
    let rest = bytes.get(head_bytes..).unwrap_or_default();
    if (100..200).contains(&status) {
        // Something before the answer itself.
        return parse(rest, ended);
    }
    let header = |name: &str| {
        head.headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case(name))
            .map(|header| String::from_utf8_lossy(header.value).trim().to_owned())
    };
    let answer = |body: &[u8]| Some(Answer { status, body: body.to_vec() });
    if status == 204 || status == 304 {
        return Ok(answer(&[]));
    }
    if header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        return Ok(chunked(rest)?.and_then(|body| answer(&body)));
    }
    match header("content-length") {
        Some(length) => {
            let length: usize = length.parse().map_err(|_| format!("content-length: {length}"))?;
            Ok(rest.get(..length).and_then(answer))
        }
        None => Ok(if ended { answer(rest) } else { None }),
    }
}

/// The body of a chunked answer; none while it is incomplete. Trailers are left unread: the connection is used once.
fn chunked(mut rest: &[u8]) -> Result<Option<Vec<u8>>, String> {
    let mut body = Vec::new();
    loop {
        let (begin, length) = match httparse::parse_chunk_size(rest).map_err(|e| e.to_string())? {
            httparse::Status::Complete(chunk) => chunk,
            httparse::Status::Partial => return Ok(None),
        };
        if length == 0 {
            return Ok(Some(body));
        }
        let length = usize::try_from(length).ok().filter(|length| *length <= ANSWER_BYTES_MAX);
        let end = begin + length.ok_or("a chunk is too long")?;
        let Some(chunk) = rest.get(begin..end) else { return Ok(None) };
        body.extend_from_slice(chunk);
        match rest.get(end..end + 2) {
            Some(b"\r\n") => rest = rest.get(end + 2..).unwrap_or_default(),
            Some(_) => return Err("a chunk is longer than it says".to_owned()),
            None => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixListener;

    const LENGTH: &[u8] =
        b"HTTP/1.1 409 Conflict\r\nContent-Length: 29\r\nServer: Docker\r\n\r\n{\"message\":\"is not running\"}\n";
    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: CHUNKED\r\n\r\n9\r\n{\"Error\":\r\n15;x=y\r\nnull,\"StatusCode\":137\r\n1\r\n}\r\n0\r\n\r\n";
    const EMPTY: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nApi-Version: 1.41\r\n\r\n";
    const TO_THE_END: &[u8] = b"HTTP/1.0 500 Oops\r\n\r\nbroken";

    #[test]
    fn answers_of_each_length_are_read() {
        let answer = parse(LENGTH, false).unwrap().unwrap();
        assert_eq!((answer.status, answer.is_success()), (409, false));
        assert_eq!(answer.message(), "is not running (409)");
        let answer = parse(CHUNKED, false).unwrap().unwrap();
        assert_eq!(answer.body, br#"{"Error":null,"StatusCode":137}"#);
        assert!(answer.is_success());
        assert_eq!(parse(EMPTY, false).unwrap(), Some(Answer { status: 204, body: Vec::new() }));
        assert_eq!(parse(TO_THE_END, false).unwrap(), None);
        assert_eq!(parse(TO_THE_END, true).unwrap().unwrap().message(), "broken (500)");
    }

    #[test]
    fn what_is_no_answer_is_refused() {
        for bytes in [
            &b"SSH-2.0-OpenSSH\r\n\r\n"[..],
            b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\nabc",
        ] {
            assert!(parse(bytes, true).is_err(), "{}", String::from_utf8_lossy(bytes));
        }
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let answer = Answer { status: 500, body: "é".repeat(MESSAGE_BYTES_MAX).into_bytes() };
        assert!(answer.message().len() <= MESSAGE_BYTES_MAX + 6 && answer.message().starts_with('é'));
    }

    proptest! {
        #[test]
        fn a_part_of_an_answer_is_no_answer(which in 0usize..3, part in 0.0f64..1.0) {
            let whole = [LENGTH, CHUNKED, EMPTY][which];
            // The last chunk's own empty line is not waited for.
            let enough = whole.len() - if which == 1 { 2 } else { 0 };
            let cut = ((enough as f64) * part) as usize;
            prop_assert_eq!(parse(&whole[..cut], false), Ok(None));
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), ended: bool) {
            let _ = parse(&bytes, ended);
            let _ = chunked(&bytes);
        }
    }

    #[test]
    fn a_call_goes_on_step_by_step_and_an_engine_that_hangs_up_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("engine.sock");
        assert!(matches!(Call::begin(&path, "GET", "/x"), Err(CallError::NotReached(_))));
        let engine = UnixListener::bind(&path).unwrap();
        let mut call = Call::begin(&path, "GET", "/x").unwrap();
        assert_eq!(call.interest().1, libc::POLLIN | libc::POLLOUT);
        assert_eq!(call.advance().unwrap(), None);
        assert_eq!(call.interest().1, libc::POLLIN);
        let (mut peer, _) = engine.accept().unwrap();
        let mut request = [0u8; 1024];
        let read = peer.read(&mut request).unwrap();
        assert!(
            request[..read].starts_with(b"GET /x HTTP/1.1\r\n") && request[..read].ends_with(b"\r\n\r\n")
        );
        peer.write_all(&CHUNKED[..70]).unwrap();
        assert_eq!(call.advance().unwrap(), None);
        peer.write_all(&CHUNKED[70..]).unwrap();
        assert_eq!(call.advance().unwrap().unwrap().status, 200);
        let mut call = Call::begin(&path, "GET", "/x").unwrap();
        drop(engine);
        assert!(matches!(call.advance(), Err(CallError::Broken(_))));
    }
}
