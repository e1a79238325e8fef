//! Serving the peers.

use super::contradiction::{contradicts, snapshot_contradicts};
use super::hello::judge;
use super::wire::{
    Append, Mode, Opening, OpeningReply, ProposeRefusal, ProposedReply, ReadIndexReply, Refusal, Reply,
    Request, SnapshotBegin, SnapshotHeader, SnapshotReply, StreamReply,
};
use super::{
    APPENDS_IN_FLIGHT_MAX, CONNECT_TIMEOUT, Directory, FRAME_BYTES_MAX, Frames, OPENING_BYTES_MAX,
    SNAPSHOT_STALL, frames,
};
use crate::api::{MemberChange, MemberChanged, MemberError};
use crate::incoming::{Incoming, Partial};
use crate::membership::naming::{Disk, Naming};
use crate::snapshots::{SnapshotDir, Snapshots};
use crate::state_machine::StateMachine;
use crate::types::{LogId, SnapshotMeta, Stamper, TypeConfig, Vote};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use holdfast_core::codec::{decode, encode};
use holdfast_core::command::Proposal;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest};
use openraft::storage::Snapshot;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

type Raft = openraft::Raft<TypeConfig, StateMachine>;

/// Connections of peers at once. Three members need about a dozen.
const CONNECTIONS_MAX: usize = 256;
/// Requests under way on one rpc connection.
const REQUESTS_IN_FLIGHT_MAX: usize = 4096;

/// Bytes of a snapshot after which what has arrived is synced.
const SNAPSHOT_SYNC_BYTES: usize = 8 << 20;
/// Files of one snapshot.
const SNAPSHOT_FILES_MAX: usize = 100_000;

/// What the server asks of the replica beyond Raft itself.
pub trait Forwarded: Send + Sync + 'static {
    /// Proposes here, if this replica leads.
    fn propose_here(
        &self,
        proposal: Bytes,
        deadline: Duration,
    ) -> impl Future<Output = Result<ProposedReply, ProposeRefusal>> + Send;

    /// Changes the membership, if this replica leads.
    fn change_members_here(
        &self,
        change: MemberChange,
    ) -> impl Future<Output = Result<MemberChanged, MemberError>> + Send;

    /// Carries out an operator's decision which checksum is right, if this replica leads.
    fn accept_checksum_here(
        &self,
        index: u64,
        value: u64,
    ) -> impl Future<Output = Result<bool, MemberError>> + Send;

    /// Confirms leadership and says up to where a reader must have applied, if this replica leads.
    fn read_index_here(&self) -> impl Future<Output = Option<ReadIndexReply>> + Send;

    /// Whether this replica would be a good leader.
    fn may_lead(&self) -> bool;

    /// The last entry that this replica knows to be committed.
    fn committed(&self) -> Option<LogId>;

    /// Stops this replica for good.
    fn fail(&self, why: String);
}

/// Serves the peers of one replica.
pub struct PeerServer<F> {
    /// What we tell the peers.
    pub directory: Arc<Directory>,
    /// The name of this member.
    pub naming: Naming,
    /// The replica.
    pub raft: Raft,
    /// The replica's own services.
    pub forwarded: Arc<F>,
    /// Where snapshots arrive.
    pub snapshots: Arc<Snapshots>,
    /// Whose turn it is to send one.
    pub incoming: Incoming,
    /// Told of every sign of a leader.
    pub stamper: Arc<Stamper>,
}

impl<F: Forwarded> PeerServer<F> {
    /// Accepts connections until cancelled.
    pub async fn run(self: Arc<Self>, listener: TcpListener, cancel: CancellationToken) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = cancel.cancelled() => return,
            };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a peer's connection can't be accepted");
                    // Out of descriptors, say: wait for some to be freed rather than spin.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                tracing::warn!(%from, "too many peer connections; refused one");
                continue;
            };
            let (this, cancel) = (self.clone(), cancel.clone());
            tokio::spawn(async move {
                tokio::select! {
                    result = this.serve(stream) => {
                        if let Err(error) = result {
                            tracing::debug!(%from, %error, "a peer connection ended");
                        }
                    }
                    () = cancel.cancelled() => {}
                }
                drop(place);
            });
        }
    }

    async fn serve(self: &Arc<Self>, stream: TcpStream) -> io::Result<()> {
        let (mut frames, opening) = receive_opening(stream).await?;
        let directory = &self.directory;
        let hello = match opening {
            Opening::Hello(hello) => hello,
            // A name is given once. Who asks for another sees in the answer which one this is.
            Opening::Identify | Opening::Bind(_) => {
                let mut naming = self.naming.clone();
                if self
                    .raft
                    .metrics()
                    .borrow_watched()
                    .membership_config
                    .membership()
                    .nodes()
                    .next()
                    .is_some()
                {
                    // The init has done its work: what asks must not take this for one that may be begun again.
                    naming.founding = None;
                }
                let identity = directory.me.disk.identity;
                return reply(&mut frames, &OpeningReply::Identified { identity, naming: Some(naming) })
                    .await;
            }
        };
        let now = hello.starts.last();
        let judged = judge(&directory.me, &hello, &directory.sender(hello.from, hello.from_identity))
            .and_then(|()| {
                let newest = directory.saw(hello.from_identity, &hello.starts);
                newest.then_some(()).ok_or(Refusal::SetBack(now.number))
            });
        if let Err(refusal) = judged {
            directory.refused(hello.from, hello.from_identity, &refusal);
            reply(&mut frames, &OpeningReply::Refused(refusal.clone())).await?;
            return Err(io::Error::other(refusal));
        }
        directory.learn(hello.from, &hello.url);
        let Disk { identity, starts } = directory.me.disk.clone();
        reply(&mut frames, &OpeningReply::Welcome { identity, starts, url: directory.url.clone() }).await?;
        let served = async {
            match hello.mode {
                Mode::Rpc => self.serve_rpc(frames, hello.from).await,
                Mode::Append => self.serve_append(frames).await,
                Mode::Snapshot => self.serve_snapshot(frames, hello.from).await,
            }
        };
        tokio::select! {
            served = served => served,
            () = directory.standing.until_gone(hello.from) => Ok(()),
            () = directory.until_newer(hello.from_identity, now) => Ok(()),
        }
    }

    async fn serve_rpc(self: &Arc<Self>, frames: Frames, from: u64) -> io::Result<()> {
        let known = self.directory.standing.member(from).is_some();
        // An id that is made up must not make this grow.
        let hurry = if known { self.directory.hurry(from) } else { Default::default() };
        let (mut sink, mut stream) = frames.split();
        let (answers, mut answered) = mpsc::channel::<Bytes>(REQUESTS_IN_FLIGHT_MAX);
        let places = Arc::new(Semaphore::new(REQUESTS_IN_FLIGHT_MAX));
        let writer = async {
            while let Some(frame) = answered.recv().await {
                sink.feed(frame).await?;
                while let Ok(frame) = answered.try_recv() {
                    sink.feed(frame).await?;
                }
                sink.flush().await?;
            }
            Ok::<(), io::Error>(())
        };
        let reader = async {
            while let Some(frame) = stream.next().await {
                let frame = frame?;
                let Some((id, body)) = frame.split_first_chunk::<8>() else {
                    return Err(io::Error::other("a request without an id"));
                };
                let id = u64::from_le_bytes(*id);
                let request: Request = decode(body).map_err(io::Error::other)?;
                let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
                let (this, answers, hurry) = (self.clone(), answers.clone(), hurry.clone());
                tokio::spawn(async move {
                    let waits_to_apply = matches!(request, Request::Propose { .. } | Request::ReadIndex);
                    let body = encode(&this.handle(request).await);
                    if waits_to_apply {
                        hurry.notify_one();
                    }
                    let mut frame = BytesMut::with_capacity(8 + body.len());
                    frame.put_u64_le(id);
                    frame.put_slice(&body);
                    let _ = answers.send(frame.freeze()).await;
                    drop(place);
                });
            }
            Ok(())
        };
        tokio::select! {
            result = reader => result,
            result = writer => result,
        }
    }

    async fn handle(&self, request: Request) -> Reply {
        match request {
            Request::Append(append) => {
                self.directory.heard_leader(append.vote.term, append.vote.node);
                let request = match append.into_request().map_err(io::Error::other).and_then(|request| {
                    self.check_append(&request)?;
                    Ok(request)
                }) {
                    Ok(request) => request,
                    Err(error) => return Reply::Failed(error.to_string()),
                };
                match self.raft.append_entries(request).await {
                    Ok(response) => {
                        if response.is_success() {
                            self.stamper.heard_of_leader();
                        }
                        Reply::Append(response.into())
                    }
                    Err(error) => Reply::Failed(error.to_string()),
                }
            }
            Request::Vote(ask) => match self.raft.vote(ask.into()).await {
                Ok(response) => Reply::Vote(response.into()),
                Err(error) => Reply::Failed(error.to_string()),
            },
            Request::PreVote(ask) => match self.raft.pre_vote(ask.into()).await {
                Ok(response) => Reply::Vote(response.into()),
                Err(error) => Reply::Failed(error.to_string()),
            },
            // openraft would stand for election at once, fit or not.
            Request::Transfer { .. } if !self.forwarded.may_lead() => {
                Reply::Transferred(Err("this replica must not lead".to_owned()))
            }
            Request::Transfer { from, to, last_log_id } => {
                let request = TransferLeaderRequest::new(from.into(), to, last_log_id.map(Into::into));
                Reply::Transferred(match self.raft.handle_transfer_leader(request).await {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(error)) => Err(error.to_string()),
                    Err(error) => Err(error.to_string()),
                })
            }
            Request::Propose { proposal, deadline_ms } => {
                // What no replica can decode must not enter the log: it would stop them all.
                if let Err(error) = decode::<Proposal>(&proposal) {
                    return Reply::Failed(error.to_string());
                }
                let deadline = Duration::from_millis(deadline_ms);
                Reply::Proposed(self.forwarded.propose_here(Bytes::from(proposal), deadline).await)
            }
            Request::ReadIndex => Reply::ReadIndex(self.forwarded.read_index_here().await),
            Request::ChangeMembers(change) => {
                Reply::MembersChanged(self.forwarded.change_members_here(change).await)
            }
            Request::MayLead => Reply::MayLead(self.forwarded.may_lead()),
            Request::Checksums { from, published } => {
                Reply::Checksums(self.directory.checksums.exchange(from, published))
            }
            Request::AcceptChecksum { index, value } => {
                Reply::ChecksumAccepted(self.forwarded.accept_checksum_here(index, value).await)
            }
        }
    }

    /// Stops this replica if a leader of its term or a later one contradicts what is committed here.
    fn check_append(&self, request: &AppendEntriesRequest<TypeConfig>) -> io::Result<()> {
        let ids = request.prev_log_id.into_iter().chain(request.entries.iter().map(|entry| entry.log_id));
        let committed = self.forwarded.committed();
        self.check_leader(request.vote, contradicts(committed, ids), committed)
    }

    fn check_leader(&self, vote: Vote, contradicts: bool, committed: Option<LogId>) -> io::Result<()> {
        // One that is deposed may send what it likes.
        if !contradicts || vote < self.raft.metrics().borrow_watched().vote {
            return Ok(());
        }
        let why = format!(
            "the leader of term {} has another log than this replica up to {:?}, which is committed and applied here: \
             acknowledged entries were lost elsewhere. Stop all members and compare their logs",
            vote.leader_id.term, committed
        );
        self.forwarded.fail(why.clone());
        Err(io::Error::other(why))
    }

    async fn serve_append(&self, frames: Frames) -> io::Result<()> {
        let (mut sink, mut stream) = frames.split();
        let (requests, queue) = mpsc::channel(APPENDS_IN_FLIGHT_MAX);
        let mut results = std::pin::pin!(self.raft.stream_append(ReceiverStream::new(queue)));
        let reader = async {
            while let Some(frame) = stream.next().await {
                let append: Append = decode(&frame?).map_err(io::Error::other)?;
                self.directory.heard_leader(append.vote.term, append.vote.node);
                let request = append.into_request().map_err(io::Error::other)?;
                self.check_append(&request)?;
                if requests.send(request).await.is_err() {
                    break;
                }
            }
            drop(requests);
            Ok::<(), io::Error>(())
        };
        let writer = async {
            while let Some(result) = results.next().await {
                let result = result.map_err(io::Error::other)?;
                if result.is_ok() {
                    self.stamper.heard_of_leader();
                }
                sink.send(Bytes::from(encode(&StreamReply::from(result)))).await?;
            }
            Ok::<(), io::Error>(())
        };
        // When the peer has sent its last request, the answers to what is under way still go out; when there are no more
        // answers (the leader changed), nobody needs its requests.
        let (mut reader, mut writer) = (std::pin::pin!(reader), std::pin::pin!(writer));
        tokio::select! {
            read = &mut reader => read.and(writer.await),
            written = &mut writer => written,
        }
    }

    async fn serve_snapshot(&self, mut frames: Frames, from: u64) -> io::Result<()> {
        let received = self.receive_snapshot(&mut frames, from).await;
        let reply = match received {
            Ok(reply) => reply,
            Err(error) => {
                tracing::warn!(from, %error, "a snapshot did not arrive whole");
                SnapshotReply::Failed(error.to_string())
            }
        };
        frames.send(Bytes::from(encode(&reply))).await
    }

    async fn receive_snapshot(&self, frames: &mut Frames, from: u64) -> io::Result<SnapshotReply> {
        let header = next_frame(frames, &CancellationToken::new()).await?;
        let header: SnapshotHeader = decode(&header).map_err(io::Error::other)?;
        let meta = SnapshotMeta::try_from(header.meta.clone()).map_err(io::Error::other)?;
        if header.files.len() > SNAPSHOT_FILES_MAX {
            return Err(io::Error::other(format!("a snapshot of {} files", header.files.len())));
        }
        if let Some((name, _)) = header.files.iter().find(|(name, _)| !is_plain_file_name(name)) {
            return Err(io::Error::other(format!("a snapshot holds a file named {name:?}")));
        }
        let vote: Vote = header.vote.into();
        let known = self.raft.metrics().borrow_watched().vote;
        if known > vote {
            // Its sender is deposed; nothing has to be sent to learn that.
            return Ok(SnapshotReply::Installed(known.into()));
        }
        let committed = self.forwarded.committed();
        self.check_leader(vote, snapshot_contradicts(committed, meta.last_log_id), committed)?;
        let Some(turn) = self.incoming.enter(vote).await else {
            return Err(io::Error::other("a newer leader is sending a snapshot"));
        };
        let partial = self.receive_files(frames, from, &header, &turn.cancelled).await?;
        // What it holds must be what was announced, or the log would go on at the wrong place.
        let snapshots = self.snapshots.clone();
        let (dir, meta) = tokio::task::spawn_blocking(move || {
            let held = partial.sync().and_then(|()| crate::state_db::read_meta(&partial.dir));
            if held.as_ref().is_ok_and(|held| *held == meta) {
                // Under a name of its own: the next transfer must not find this one's directory, nor lose its own to it.
                let arrived = snapshots.aside("arrived")?;
                std::fs::rename(&partial.dir, &arrived)?;
                partial.forget()?;
                return Ok((arrived, meta));
            }
            // All bytes are there and it is no snapshot: nothing to go on with.
            partial.remove()?;
            held?;
            Err(io::Error::other("a snapshot's data and description differ"))
        })
        .await
        .map_err(io::Error::other)??;
        let snapshot = SnapshotDir::temporary(dir);
        self.stamper.heard_of_leader();
        let response = self
            .raft
            .install_full_snapshot(vote, Snapshot { meta, snapshot })
            .await
            .map_err(io::Error::other)?;
        Ok(SnapshotReply::Installed(response.vote.into()))
    }

    /// Receives what is not there yet. What has arrived stays, whatever happens on the way.
    async fn receive_files(
        &self,
        frames: &mut Frames,
        from: u64,
        header: &SnapshotHeader,
        cancelled: &CancellationToken,
    ) -> io::Result<Partial> {
        let (root, wanted) = (self.snapshots.root().to_owned(), header.clone());
        let opened = tokio::task::spawn_blocking(move || Partial::open(&root, from, &wanted));
        let (partial, place) = opened.await.map_err(io::Error::other)??;
        let go = SnapshotReply::Go { file: place.file as u64, offset: place.offset, crc: place.crc };
        frames.send(Bytes::from(encode(&go))).await?;
        let begin: SnapshotBegin = decode(&next_frame(frames, cancelled).await?).map_err(io::Error::other)?;
        let mut offset = begin.offset;
        if (begin.file, begin.offset) != (place.file as u64, place.offset) {
            if (begin.file, begin.offset) != (0, 0) {
                return Err(io::Error::other("a snapshot begins at a place that was not named"));
            }
            partial.restart()?;
        }
        for (name, size) in header.files.iter().skip(usize::try_from(begin.file).unwrap_or(usize::MAX)) {
            let have = std::mem::take(&mut offset);
            let mut file =
                tokio::fs::OpenOptions::new().create(true).append(true).open(partial.dir.join(name)).await?;
            let (mut left, mut unsynced) = (size.saturating_sub(have), 0);
            while left > 0 {
                let frame = next_frame(frames, cancelled).await?;
                let Some((crc, chunk)) = frame.split_first_chunk::<4>() else {
                    return Err(io::Error::other("a chunk without a checksum"));
                };
                if crc32fast::hash(chunk) != u32::from_le_bytes(*crc) {
                    return Err(io::Error::other(format!("a chunk of {name} has a wrong checksum")));
                }
                left = left
                    .checked_sub(chunk.len() as u64)
                    .ok_or_else(|| io::Error::other(format!("{name} is longer than announced")))?;
                file.write_all(chunk).await?;
                file.flush().await?;
                unsynced += chunk.len();
                if unsynced >= SNAPSHOT_SYNC_BYTES {
                    // In small pieces: the log's own syncs wait behind them.
                    file.sync_data().await?;
                    unsynced = 0;
                }
            }
            file.sync_all().await?;
        }
        Ok(partial)
    }
}

/// Frames a connection and receives what it opens with.
pub(crate) async fn receive_opening(stream: TcpStream) -> io::Result<(Frames, Opening)> {
    let mut frames = frames(stream);
    frames.codec_mut().set_max_frame_length(OPENING_BYTES_MAX);
    let first = tokio::time::timeout(CONNECT_TIMEOUT, frames.next())
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no hello"))?
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))??;
    frames.codec_mut().set_max_frame_length(FRAME_BYTES_MAX);
    Ok((frames, decode(&first).map_err(io::Error::other)?))
}

/// Answers an opening.
pub(crate) async fn reply(frames: &mut Frames, reply: &OpeningReply) -> io::Result<()> {
    frames.send(Bytes::from(encode(reply))).await
}

/// The next frame of a snapshot; an error if none comes, or another transfer takes over.
async fn next_frame(frames: &mut Frames, cancelled: &CancellationToken) -> io::Result<BytesMut> {
    let frame = tokio::select! {
        frame = tokio::time::timeout(SNAPSHOT_STALL, frames.next()) => frame,
        () = cancelled.cancelled() => return Err(io::Error::other("another transfer has begun")),
    };
    frame
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "a snapshot made no progress"))?
        .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?
}

fn is_plain_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0'])
}
