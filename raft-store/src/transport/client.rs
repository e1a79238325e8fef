//! Connecting to a peer, and requests on an rpc connection.

use super::wire::{Hello, HelloReply, Mode, PROTOCOL, Reply, Request};
use super::{CONNECT_TIMEOUT, Directory, Frames, frames, since_ms};
use crate::boot_clock::boot_ms;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use holdfast_core::codec::{decode, encode};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Requests waiting to be written to one connection.
const WRITE_QUEUE_MAX: usize = 1024;

/// Silence after which a connection with a request that was given up is closed, in milliseconds.
const SILENCE_MS_MAX: u64 = 1_500;

/// A request without an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RpcError {
    /// It never left this node.
    #[error("not sent: {0}")]
    NotSent(String),
    /// It may have reached the peer.
    #[error("no answer: {0}")]
    NoAnswer(String),
}

/// Connects to a member, where the membership says it is or else at `addr`, and says hello.
pub async fn connect(directory: &Directory, target: u64, addr: &str, mode: Mode) -> Result<Frames, String> {
    let now_at = directory.standing.addr_of(target);
    dial(directory, target, now_at.as_deref().unwrap_or(addr), mode).await
}

/// Connects to exactly that address and says hello.
pub async fn dial(directory: &Directory, target: u64, addr: &str, mode: Mode) -> Result<Frames, String> {
    let dial = async {
        let stream = TcpStream::connect(addr).await.map_err(|e| format!("connecting to {addr}: {e}"))?;
        let mut frames = frames(stream);
        let hello = Hello {
            protocol: PROTOCOL,
            from: directory.id,
            to: target,
            url: directory.url.clone(),
            cluster_id: directory.cluster_id(),
            mode,
        };
        frames.send(Bytes::from(encode(&hello))).await.map_err(|e| format!("greeting {addr}: {e}"))?;
        let reply = frames
            .next()
            .await
            .ok_or_else(|| format!("{addr} closed the connection"))?
            .map_err(|e| format!("greeting {addr}: {e}"))?;
        match decode::<HelloReply>(&reply).map_err(|e| format!("{addr}: {e}"))? {
            HelloReply::Welcome { url, cluster_id } => {
                let compared = directory.compare_cluster(cluster_id.as_deref());
                directory.answered(target, compared.as_ref().err().map(String::as_str));
                compared?;
                directory.learn(target, &url);
                Ok(frames)
            }
            HelloReply::Removed => {
                directory.standing.dismiss();
                Err(format!("{addr} says that this member was removed from the cluster"))
            }
            HelloReply::Refused(why) => {
                directory.answered(target, Some(&why));
                Err(format!("{addr} refused us: {why}"))
            }
        }
    };
    tokio::time::timeout(CONNECT_TIMEOUT, dial)
        .await
        .map_err(|_| format!("{addr} did not answer within {} ms", CONNECT_TIMEOUT.as_millis()))?
}

struct Live {
    writes: mpsc::Sender<Bytes>,
    pending: Arc<Mutex<HashMap<u64, oneshot::Sender<Reply>>>>,
    next_id: AtomicU64,
    heard_boot_ms: Arc<AtomicU64>,
    closed: Arc<AtomicBool>,
    cancel: CancellationToken,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// Requests to one peer over one connection, made when needed and made again when it breaks.
pub struct RpcClient {
    directory: Arc<Directory>,
    target: u64,
    addr: String,
    live: tokio::sync::Mutex<Option<Arc<Live>>>,
}

impl RpcClient {
    /// A client that connects when it is first used.
    pub fn new(directory: Arc<Directory>, target: u64, addr: String) -> Self {
        Self { directory, target, addr, live: tokio::sync::Mutex::new(None) }
    }

    /// Sends a request and waits for its answer, together at most `timeout`.
    pub async fn request(&self, request: &Request, timeout: Duration) -> Result<Reply, RpcError> {
        let began = tokio::time::Instant::now();
        let live = tokio::time::timeout(timeout, self.live())
            .await
            .map_err(|_| RpcError::NotSent("connecting took too long".into()))?
            .map_err(RpcError::NotSent)?;
        let id = live.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        live.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, answer);
        let _forget = Forget { live: &live, id };
        let body = encode(request);
        let mut frame = BytesMut::with_capacity(8 + body.len());
        frame.put_u64_le(id);
        frame.put_slice(&body);
        let exchange = async {
            live.writes
                .send(frame.freeze())
                .await
                .map_err(|_| RpcError::NotSent("the connection has just broken".into()))?;
            answered.await.map_err(|_| RpcError::NoAnswer("the connection broke".into()))
        };
        match tokio::time::timeout_at(began + timeout, exchange).await {
            Ok(result) => result,
            Err(_) => {
                live.close_if_silent();
                Err(RpcError::NoAnswer(format!("nothing came within {} ms", timeout.as_millis())))
            }
        }
    }

    async fn live(&self) -> Result<Arc<Live>, String> {
        let mut slot = self.live.lock().await;
        if let Some(live) = slot.as_ref()
            && !live.closed.load(Ordering::Acquire)
        {
            return Ok(live.clone());
        }
        *slot = None;
        let frames = connect(&self.directory, self.target, &self.addr, Mode::Rpc).await?;
        let live = Arc::new(start(frames));
        *slot = Some(live.clone());
        Ok(live)
    }
}

impl Live {
    /// A connection on which nothing at all has arrived for long while something was asked may be dead without saying
    /// so: the next request makes a new one.
    fn close_if_silent(&self) {
        if since_ms(self.heard_boot_ms.load(Ordering::Relaxed)) >= SILENCE_MS_MAX {
            self.closed.store(true, Ordering::Release);
            self.cancel.cancel();
        }
    }
}

/// Takes a request off the books when its caller is gone, be it answered or given up.
struct Forget<'a> {
    live: &'a Live,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        let given_up =
            self.live.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id).is_some();
        if given_up {
            self.live.close_if_silent();
        }
    }
}

fn start(frames: Frames) -> Live {
    let (mut sink, mut stream) = frames.split();
    let (writes, mut queue) = mpsc::channel::<Bytes>(WRITE_QUEUE_MAX);
    let live = Live {
        writes,
        pending: Arc::default(),
        next_id: AtomicU64::new(1),
        heard_boot_ms: Arc::new(AtomicU64::new(boot_ms())),
        closed: Arc::default(),
        cancel: CancellationToken::new(),
    };
    let (pending, heard, closed, cancel) =
        (live.pending.clone(), live.heard_boot_ms.clone(), live.closed.clone(), live.cancel.clone());
    let reader = async move {
        while let Some(Ok(frame)) = stream.next().await {
            heard.store(boot_ms(), Ordering::Relaxed);
            let Some((id, body)) = frame.split_first_chunk::<8>() else { break };
            let Ok(reply) = decode::<Reply>(body) else { break };
            let waiting =
                pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&u64::from_le_bytes(*id));
            if let Some(waiting) = waiting {
                let _ = waiting.send(reply);
            }
        }
        pending
    };
    let writer = async move {
        while let Some(frame) = queue.recv().await {
            if sink.feed(frame).await.is_err() {
                return;
            }
            while let Ok(frame) = queue.try_recv() {
                if sink.feed(frame).await.is_err() {
                    return;
                }
            }
            if sink.flush().await.is_err() {
                return;
            }
        }
    };
    let pending = live.pending.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = reader => {}
            () = writer => {}
            () = cancel.cancelled() => {}
        }
        closed.store(true, Ordering::Release);
        // Dropping the senders tells everybody who waits.
        pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
    });
    live
}
