//! gRPC over one HTTP/2 connection: as little as it takes.

use crate::problem::{During, Result, problem};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use std::net::SocketAddr;
use tokio::net::TcpStream;

/// Bytes in front of a message: whether it is compressed, and its length.
const PREFIX_BYTES: usize = 5;

/// One connection.
#[derive(Clone)]
pub struct Connection {
    requests: SendRequest<Bytes>,
    authority: String,
}

fn framed(message: &[u8]) -> Result<Bytes> {
    let mut frame = BytesMut::with_capacity(PREFIX_BYTES + message.len());
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).during("a message is too long")?);
    frame.put_slice(message);
    Ok(frame.freeze())
}

/// Takes the first whole message off `data`.
fn unframe(data: &mut BytesMut) -> Result<Option<BytesMut>> {
    let Some(prefix) = data.get(..PREFIX_BYTES) else { return Ok(None) };
    if prefix[0] != 0 {
        return problem("a compressed answer");
    }
    let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
    if data.len() < PREFIX_BYTES + length {
        return Ok(None);
    }
    data.advance(PREFIX_BYTES);
    Ok(Some(data.split_to(length)))
}

fn check_status(headers: &http::HeaderMap) -> Result<()> {
    match headers.get("grpc-status") {
        Some(status) if status != "0" => {
            let message = headers.get("grpc-message").and_then(|m| m.to_str().ok()).unwrap_or_default();
            problem(format!("gRPC status {status:?}: {message}"))
        }
        _ => Ok(()),
    }
}

/// What comes of one call.
struct Answers {
    response: Option<ResponseFuture>,
    body: Option<RecvStream>,
    data: BytesMut,
}

impl Answers {
    fn new(response: ResponseFuture) -> Self {
        Self { response: Some(response), body: None, data: BytesMut::new() }
    }

    /// The next message; `None` at the end.
    async fn next(&mut self) -> Result<Option<BytesMut>> {
        if let Some(response) = self.response.take() {
            let response = response.await.during("an answer of etcd")?;
            if !response.status().is_success() {
                return problem(format!("etcd answered {}", response.status()));
            }
            check_status(response.headers())?;
            self.body = Some(response.into_body());
        }
        let body = self.body.as_mut().during("no answer is to come")?;
        loop {
            if let Some(message) = unframe(&mut self.data)? {
                return Ok(Some(message));
            }
            let Some(chunk) = body.data().await else {
                if let Some(trailers) = body.trailers().await.during("an answer of etcd")? {
                    check_status(&trailers)?;
                }
                return Ok(None);
            };
            let chunk = chunk.during("an answer of etcd")?;
            body.flow_control().release_capacity(chunk.len()).during("flow control")?;
            self.data.extend_from_slice(&chunk);
        }
    }
}

impl Connection {
    /// Connects. A task of its own moves the frames until the connection is dropped.
    pub async fn open(addr: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect(addr).await.during(addr)?;
        stream.set_nodelay(true).during("TCP_NODELAY")?;
        let (requests, connection) = h2::client::handshake(stream).await.during(addr)?;
        // Its error reaches whoever waits for an answer.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { requests, authority: addr.to_string() })
    }

    async fn call(&self, path: &str) -> Result<(SendStream<Bytes>, Answers)> {
        let request = http::Request::post(format!("http://{}{path}", self.authority))
            .version(http::Version::HTTP_2)
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .during("a request")?;
        let mut requests = self.requests.clone().ready().await.during("a connection to etcd")?;
        let (response, send) = requests.send_request(request, false).during("a request to etcd")?;
        Ok((send, Answers::new(response)))
    }

    /// One message there, one back.
    pub async fn unary(&self, path: &str, message: &[u8]) -> Result<BytesMut> {
        let (mut send, mut answers) = self.call(path).await?;
        send.send_data(framed(message)?, true).during("a request to etcd")?;
        let Some(answer) = answers.next().await? else { return problem(format!("{path}: no answer")) };
        // The call ends with its status.
        match answers.next().await? {
            None => Ok(answer),
            Some(_) => problem(format!("{path}: two answers")),
        }
    }

    /// A call of messages in both directions.
    pub async fn stream(&self, path: &str) -> Result<Stream> {
        let (send, answers) = self.call(path).await?;
        Ok(Stream { send, answers })
    }
}

/// See [`Connection::stream`].
pub struct Stream {
    send: SendStream<Bytes>,
    answers: Answers,
}

impl Stream {
    /// One message there, the next one back.
    pub async fn ask(&mut self, message: &[u8]) -> Result<BytesMut> {
        self.send.send_data(framed(message)?, false).during("a stream to etcd")?;
        self.answers.next().await?.during("etcd ended a stream")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_however_they_are_cut() {
        let mut data = BytesMut::new();
        for byte in framed(b"ab").unwrap().iter().chain(&framed(b"").unwrap()) {
            assert!(unframe(&mut data.clone()).unwrap().is_none() || data.len() >= 7);
            data.extend_from_slice(&[*byte]);
        }
        assert_eq!(unframe(&mut data).unwrap().unwrap(), &b"ab"[..]);
        assert_eq!(unframe(&mut data).unwrap().unwrap(), &b""[..]);
        assert!(unframe(&mut data).unwrap().is_none());
        assert!(unframe(&mut BytesMut::from(&[1, 0, 0, 0, 0][..])).is_err());
    }
}
