//! Connecting to a peer, and requests on an rpc connection.

use super::wire::{
    Bind, Hello, Mode, Opening, OpeningReply, PROTOCOL, PROTOCOL_MIN, Refusal, Reply, Request,
};
use super::{CONNECT_TIMEOUT, Directory, Frames, Problem, frames, since_ms};
use crate::boot_clock::boot_ms;
use crate::membership::naming::{DiskIdentity, Naming};
use crate::types::Member;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use holdfast_core::codec::{decode, encode};
use std::collections::HashMap;
use std::future::Future;
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

/// Connects to a member, where the membership says it is or else as `node` says, and says hello.
pub async fn connect(
    directory: &Directory,
    target: u64,
    node: &Member,
    mode: Mode,
) -> Result<Frames, String> {
    let recorded = directory.standing.member(target);
    dial(directory, target, recorded.as_ref().unwrap_or(node), mode).await
}

/// Connects to exactly that address and says hello to that disk.
pub async fn dial(directory: &Directory, target: u64, node: &Member, mode: Mode) -> Result<Frames, String> {
    let addr = &node.peer_addr;
    within_time(addr, async {
        let me = &directory.me;
        let hello = Opening::Hello(Hello {
            protocol_min: PROTOCOL_MIN,
            protocol_max: PROTOCOL,
            cluster_id: me.cluster_id.clone(),
            from: me.id,
            from_identity: me.disk.identity,
            starts: me.disk.starts.clone(),
            to: target,
            to_identity: node.identity,
            url: directory.url.clone(),
            mode,
        });
        let (frames, reply) = open(addr, &hello).await?;
        match reply {
            OpeningReply::Welcome { identity, starts, url } if identity == node.identity => {
                if !directory.saw(identity, &starts) {
                    directory.set_problem(target, Some(Problem::SetBack));
                    return Err(format!("{addr}: {}", Problem::SetBack));
                }
                directory.reached(target);
                directory.learn(target, &url);
                Ok(frames)
            }
            OpeningReply::Refused(Refusal::Waiting(identity)) => {
                Err(meets_waiting(directory, target, node, identity).await)
            }
            OpeningReply::Refused(refusal) => {
                if refusal == Refusal::Removed {
                    directory.standing.dismiss();
                }
                let why = format!("{addr} refused us: {refusal}");
                directory.set_problem(target, Some(Problem::Refuses(why.clone())));
                Err(why)
            }
            OpeningReply::Welcome { .. } | OpeningReply::Identified { .. } => {
                Err(format!("{addr} gave an answer that does not belong to a hello"))
            }
        }
    })
    .await
}

/// What answers at a member's address has no name. If it is the very disk that the *committed* membership records, it is a
/// new member that has not been named yet, and is named here: an uncommitted entry may still go, and its id to another.
async fn meets_waiting(directory: &Directory, target: u64, node: &Member, identity: DiskIdentity) -> String {
    let addr = &node.peer_addr;
    if identity != node.identity {
        directory.set_problem(target, Some(Problem::LostDisk));
        return format!("{addr}: member {target} was on disk {}; {}", node.identity, Problem::LostDisk);
    }
    if !directory.standing.leads() {
        // One that lags may still know the process by an id that was removed since.
        return format!("{addr} has no name yet: its leader will name it");
    }
    if directory.standing.committed_identity(target) != Some(identity) {
        return format!("{addr} has no name yet: the entry that adds member {target} is not committed");
    }
    let naming = Naming { cluster_id: directory.me.cluster_id.clone(), member_id: target, founding: None };
    match ask(addr, &Opening::Bind(Bind { identity, naming })).await {
        Ok(_) => format!("{addr} has just been named member {target}"),
        Err(why) => why,
    }
}

/// Asks a process who it is, or names it. The answer is who it is now.
pub async fn ask(addr: &str, question: &Opening) -> Result<(DiskIdentity, Option<Naming>), String> {
    within_time(addr, async {
        match open(addr, question).await? {
            (_, OpeningReply::Identified { identity, naming }) => Ok((identity, naming)),
            (_, OpeningReply::Refused(refusal)) => Err(format!("{addr}: {refusal}")),
            (_, OpeningReply::Welcome { .. }) => {
                Err(format!("{addr} gave an answer that belongs to a hello"))
            }
        }
    })
    .await
}

async fn within_time<T>(addr: &str, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    tokio::time::timeout(CONNECT_TIMEOUT, work)
        .await
        .map_err(|_| format!("{addr} did not answer within {} ms", CONNECT_TIMEOUT.as_millis()))?
}

async fn open(addr: &str, opening: &Opening) -> Result<(Frames, OpeningReply), String> {
    let stream = TcpStream::connect(addr).await.map_err(|e| format!("connecting to {addr}: {e}"))?;
    let mut frames = frames(stream);
    frames.send(Bytes::from(encode(opening))).await.map_err(|e| format!("greeting {addr}: {e}"))?;
    let reply = frames
        .next()
        .await
        .ok_or_else(|| format!("{addr} closed the connection"))?
        .map_err(|e| format!("greeting {addr}: {e}"))?;
    let reply = decode::<OpeningReply>(&reply).map_err(|e| format!("{addr}: {e}"))?;
    Ok((frames, reply))
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
    node: Member,
    live: tokio::sync::Mutex<Option<Arc<Live>>>,
}

impl RpcClient {
    /// A client that connects when it is first used.
    pub fn new(directory: Arc<Directory>, target: u64, node: Member) -> Self {
        Self { directory, target, node, live: tokio::sync::Mutex::new(None) }
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
        let frames = connect(&self.directory, self.target, &self.node, Mode::Rpc).await?;
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
