//! An HTTP/1.1 client of one connection that is kept: as little as it takes.

use crate::problem::{During, Result, problem};
use bytes::{Buf, BytesMut};
use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Headers of an answer; ours have fewer.
const HEADERS_MAX: usize = 32;

/// One connection.
pub struct HttpClient {
    stream: TcpStream,
    host: String,
    request: Vec<u8>,
    read: BytesMut,
    /// Bytes of the last answer, which go when the next one is asked for.
    answered: usize,
}

/// Status, and where the body lies.
struct Head {
    status: u16,
    body_at: usize,
    body_bytes: usize,
}

/// `None`: the head is not whole yet.
fn parse_head(data: &[u8]) -> Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let body_at = match response.parse(data).during("an answer is not HTTP")? {
        httparse::Status::Complete(body_at) => body_at,
        httparse::Status::Partial => return Ok(None),
    };
    let length = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let body_bytes = length
        .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse().ok())
        .during("an answer without a length")?;
    Ok(Some(Head { status: response.code.unwrap_or_default(), body_at, body_bytes }))
}

impl HttpClient {
    /// Connects.
    pub async fn open(addr: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(addr).await.during(addr)?;
        stream.set_nodelay(true).during("TCP_NODELAY")?;
        Ok(Self {
            stream,
            host: addr.to_string(),
            request: Vec::new(),
            read: BytesMut::with_capacity(4096),
            answered: 0,
        })
    }

    /// Posts JSON; status and body of the answer.
    pub async fn post(&mut self, path: &str, body: &str) -> Result<(u16, &[u8])> {
        self.read.advance(self.answered);
        self.answered = 0;
        self.request.clear();
        let (host, length) = (&self.host, body.len());
        std::io::Write::write_fmt(
            &mut self.request,
            format_args!(
                "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            ),
        )
        .during("a request")?;
        self.stream.write_all(&self.request).await.during("sending a request")?;
        let head = loop {
            if let Some(head) = parse_head(&self.read)?
                && self.read.len() >= head.body_at + head.body_bytes
            {
                break head;
            }
            if self.stream.read_buf(&mut self.read).await.during("reading an answer")? == 0 {
                return problem("the controller closed the connection");
            }
        };
        self.answered = head.body_at + head.body_bytes;
        Ok((head.status, &self.read[head.body_at..self.answered]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_when_it_is_whole() {
        let text = b"HTTP/1.1 409 Conflict\r\nContent-Length: 2\r\n\r\n{}";
        assert!(parse_head(&text[..30]).unwrap().is_none());
        let head = parse_head(text).unwrap().unwrap();
        assert_eq!((head.status, &text[head.body_at..], head.body_bytes), (409, &b"{}"[..], 2));
        assert!(parse_head(b"HTTP/1.1 200 OK\r\n\r\n").is_err(), "no length");
        assert!(parse_head(b"SSH-2.0\r\n\r\n").is_err());
    }

    #[tokio::test]
    async fn answers_in_pieces_and_one_after_the_other() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for answer in [
                "HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc",
                "HTTP/1.1 503 X\r\ncontent-length: 0\r\n\r\n",
            ] {
                let mut seen = Vec::new();
                while !seen.ends_with(b"{}") {
                    stream.read_buf(&mut seen).await.unwrap();
                }
                for piece in answer.as_bytes().chunks(7) {
                    stream.write_all(piece).await.unwrap();
                    stream.flush().await.unwrap();
                }
            }
        });
        let mut client = HttpClient::open(addr).await.unwrap();
        assert_eq!(client.post("/a", "{}").await.unwrap(), (200, &b"abc"[..]));
        assert_eq!(client.post("/b", "{}").await.unwrap(), (503, &b""[..]));
        assert!(client.post("/c", "{}").await.is_err(), "it has closed");
    }
}
