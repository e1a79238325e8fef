//! openraft's view of the peers.

use super::client::{RpcClient, RpcError, connect};
use super::hold::{COMMIT_HOLD, Hold};
use super::learner_gate::{LearnerGate, PROMOTION_POLL};
use super::wire::{
    Append, AppendReply, Mode, Reply, Request, SnapshotBegin, SnapshotHeader, SnapshotReply, StreamReply,
    VoteAsk,
};
use super::{APPENDS_IN_FLIGHT_MAX, Directory, Frames, Problem, SNAPSHOT_CHUNK_BYTES, SNAPSHOT_STALL};
use crate::incoming::checksum_before;
use crate::snapshots::Snapshots;
use crate::state_machine::SnapshotData;
use crate::types::{Member, TypeConfig, Vote};
use bytes::{Bytes, BytesMut};
use futures::{Sink, SinkExt, Stream, StreamExt};
use holdfast_core::codec::{decode, encode};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{RPCOption, RaftNetworkFactory, RaftNetworkV2, stream_append_sequential};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::type_config::alias::SnapshotOf;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

type C = TypeConfig;
type StreamItem = Result<StreamAppendResult<C>, RPCError<C>>;

/// Makes clients for the peers.
pub struct PeerFactory {
    /// What we tell the peers.
    pub directory: Arc<Directory>,
    /// Told of snapshots on their way to peers.
    pub snapshots: Arc<Snapshots>,
    /// An append without an answer for this long means a broken connection.
    pub append_timeout: Duration,
}

impl PeerFactory {
    fn client(&self, target: u64, node: &Member, pipelined: bool) -> PeerNetwork {
        PeerNetwork {
            rpc: RpcClient::new(self.directory.clone(), target, node.clone()),
            directory: self.directory.clone(),
            snapshots: self.snapshots.clone(),
            target,
            node: node.clone(),
            pipelined,
            append_timeout: self.append_timeout,
        }
    }
}

impl RaftNetworkFactory<C> for PeerFactory {
    type Network = PeerNetwork;

    async fn new_client(&mut self, target: u64, node: &Member) -> PeerNetwork {
        self.client(target, node, true)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Member) -> PeerNetwork {
        // A heartbeat is given up by its caller at any moment, which requests with ids survive and a pipeline does not.
        self.client(target, node, false)
    }
}

/// One peer.
pub struct PeerNetwork {
    rpc: RpcClient,
    directory: Arc<Directory>,
    snapshots: Arc<Snapshots>,
    target: u64,
    node: Member,
    pipelined: bool,
    append_timeout: Duration,
}

fn network(error: impl ToString) -> RPCError<C> {
    RPCError::Network(NetworkError::from_string(error))
}

fn unreachable(error: impl ToString) -> RPCError<C> {
    RPCError::Unreachable(Unreachable::from_string(error))
}

impl PeerNetwork {
    async fn ask(&self, request: &Request, timeout: Duration) -> Result<Reply, RPCError<C>> {
        match self.rpc.request(request, timeout).await {
            Ok(Reply::Failed(why)) => Err(network(why)),
            Ok(reply) => Ok(reply),
            Err(RpcError::NotSent(why)) => Err(unreachable(why)),
            Err(RpcError::NoAnswer(why)) => Err(network(why)),
        }
    }

    async fn pipeline<'s, S>(&'s self, input: S) -> Result<BoxStream<'s, StreamItem>, RPCError<C>>
    where
        S: Stream<Item = AppendEntriesRequest<C>> + OptionalSend + Unpin + 'static,
    {
        let frames =
            connect(&self.directory, self.target, &self.node, Mode::Append).await.map_err(unreachable)?;
        let (sink, replies) = frames.split();
        let (under_way, sent) = mpsc::channel(APPENDS_IN_FLIGHT_MAX);
        let hurry = self.directory.hurry(self.target);
        let (directory, target) = (self.directory.clone(), self.target);
        let to_voter = move || directory.standing.is_voter(target);
        let writer = AbortOnDropHandle::new(tokio::spawn(write_appends(
            input,
            sink,
            under_way,
            hurry,
            COMMIT_HOLD,
            to_voter,
        )));
        let state = Pipeline {
            sent,
            replies,
            directory: self.directory.clone(),
            target: self.target,
            _writer: writer,
        };
        let timeout = self.append_timeout;
        Ok(Box::pin(futures::stream::unfold(Some(state), move |state| async move {
            let mut state = state?;
            // The end of the input with nothing under way is the end of the answers.
            let item = match state.sent.recv().await? {
                Ok(term) => state.next_reply(term, timeout).await,
                Err(error) => Err(network(error)),
            };
            let continues = matches!(item, Ok(Ok(_)));
            Some((item, continues.then_some(state)))
        })))
    }
}

struct Pipeline {
    /// The term of each request that was sent, in order.
    sent: mpsc::Receiver<Result<u64, String>>,
    replies: futures::stream::SplitStream<Frames>,
    directory: Arc<Directory>,
    target: u64,
    _writer: AbortOnDropHandle<()>,
}

impl Pipeline {
    async fn next_reply(&mut self, term: u64, timeout: Duration) -> StreamItem {
        let reply: StreamReply = match tokio::time::timeout(timeout, self.replies.next()).await {
            Err(_) => {
                let waited_ms = timeout.as_millis();
                return Err(network(format!("an append was not answered within {waited_ms} ms")));
            }
            Ok(None) => return Err(network("the append connection was closed")),
            Ok(Some(Err(error))) => return Err(network(error)),
            Ok(Some(Ok(frame))) => decode(&frame).map_err(network)?,
        };
        match &reply {
            StreamReply::Matching(Some(upto)) => self.directory.acknowledged(self.target, term, upto.index),
            StreamReply::Conflict(at) if self.directory.has_lost(self.target, term, at.index) => {
                return Err(unreachable(Problem::LostAcknowledged));
            }
            _ => {}
        }
        Ok(reply.into())
    }
}

/// What the writer of a connection goes by.
enum Next {
    Request(AppendEntriesRequest<C>),
    /// There are no more requests.
    End,
    /// A commit index alone was held for long enough.
    HeldLong,
    /// The target may have become a voter.
    LookAgain,
}

/// Writes requests until they end. `hold_for` and `hurry`: see [`Hold`]; `to_voter`: see [`LearnerGate`].
async fn write_appends<S>(
    mut input: S,
    mut sink: impl Sink<Bytes, Error = io::Error> + Unpin,
    under_way: mpsc::Sender<Result<u64, String>>,
    hurry: Arc<Notify>,
    hold_for: Duration,
    to_voter: impl Fn() -> bool,
) where
    S: Stream<Item = AppendEntriesRequest<C>> + Unpin,
{
    let (mut gate, mut hold) = (LearnerGate::default(), Hold::default());
    let mut held_long = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
    loop {
        let held = hold.is_holding();
        let next = tokio::select! {
            // What brings the commit index along makes the wait superfluous.
            biased;
            request = input.next() => request.map_or(Next::End, Next::Request),
            () = hurry.notified(), if held => Next::HeldLong,
            () = &mut held_long, if held => Next::HeldLong,
            () = tokio::time::sleep(PROMOTION_POLL), if gate.is_holding() => Next::LookAgain,
        };
        let ended = matches!(next, Next::End);
        let mut requests = match next {
            Next::Request(request) => hold.offer_all(gate.offer(request, to_voter())),
            Next::LookAgain => hold.offer_all(gate.release(to_voter())),
            Next::End => hold.offer_all(gate.release(to_voter())),
            Next::HeldLong => hold.release().into_iter().collect(),
        };
        if ended {
            requests.extend(hold.release());
        }
        if hold.is_holding() && !held {
            held_long.as_mut().reset(Instant::now() + hold_for);
        }
        for request in &requests {
            if let Err(why) = write_append(request, &mut sink, &under_way).await {
                // The reader of the answers may have gone already.
                let _ = under_way.send(Err(why)).await;
                return;
            }
        }
        if ended {
            return;
        }
    }
}

async fn write_append(
    request: &AppendEntriesRequest<C>,
    sink: &mut (impl Sink<Bytes, Error = io::Error> + Unpin),
    under_way: &mpsc::Sender<Result<u64, String>>,
) -> Result<(), String> {
    let encoded = encode(&Append::of(request).map_err(|e| e.to_string())?);
    under_way
        .send(Ok(request.vote.leader_id.term))
        .await
        .map_err(|_| "nobody reads the answers".to_owned())?;
    sink.send(Bytes::from(encoded)).await.map_err(|e| e.to_string())
}

impl RaftNetworkV2<C> for PeerNetwork {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<C>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<C>, RPCError<C>> {
        let request = Request::Append(Append::of(&rpc).map_err(network)?);
        match self.ask(&request, option.hard_ttl()).await? {
            // A heartbeat: its previous entry is the last one that this follower acknowledged.
            Reply::Append(AppendReply::Conflict) => {
                let (term, prev) = (rpc.vote.leader_id.term, rpc.prev_log_id.map_or(0, |prev| prev.index));
                if self.directory.has_lost(self.target, term, prev) {
                    return Err(unreachable(Problem::LostAcknowledged));
                }
                Ok(AppendReply::Conflict.into())
            }
            Reply::Append(reply) => Ok(reply.into()),
            other => Err(network(format!("an append was answered with {other:?}"))),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, StreamItem>, RPCError<C>>>
    where
        S: Stream<Item = AppendEntriesRequest<C>> + OptionalSend + Unpin + 'static,
    {
        if self.pipelined {
            let this = &*self;
            Box::pin(this.pipeline(input))
        } else {
            stream_append_sequential(self, input, option)
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<C>, option: RPCOption) -> Result<VoteResponse<C>, RPCError<C>> {
        match self.ask(&Request::Vote(VoteAsk::from(&rpc)), option.hard_ttl()).await? {
            Reply::Vote(reply) => Ok(reply.into()),
            other => Err(network(format!("a vote was answered with {other:?}"))),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<C>,
        option: RPCOption,
    ) -> Result<VoteResponse<C>, RPCError<C>> {
        match self.ask(&Request::PreVote(VoteAsk::from(&rpc)), option.hard_ttl()).await? {
            Reply::Vote(reply) => Ok(reply.into()),
            other => Err(network(format!("a pre-vote was answered with {other:?}"))),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<C, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<C>, StreamingError<C>> {
        let send = async {
            let index = snapshot.meta.last_log_id.map_or(0, |id| id.index);
            self.directory
                .checksums
                .confirm(index)
                .await
                .map_err(|e| StreamingError::Network(NetworkError::from_string(e)))?;
            let frames = connect(&self.directory, self.target, &self.node, Mode::Snapshot)
                .await
                .map_err(|e| StreamingError::Unreachable(Unreachable::from_string(e)))?;
            self.send_snapshot(frames, vote, &snapshot)
                .await
                .map_err(|e| StreamingError::Network(NetworkError::from_string(e)))
        };
        tokio::select! {
            sent = send => sent,
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<C>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<C>, RPCError<C>> {
        let request = Request::Transfer {
            from: (*req.from_leader()).into(),
            to: *req.to_node_id(),
            last_log_id: req.last_log_id().map(|id| (*id).into()),
        };
        match self.ask(&request, option.hard_ttl()).await? {
            Reply::Transferred(Ok(())) => Ok(Ok(())),
            Reply::Transferred(Err(why)) => Err(network(why)),
            other => Err(network(format!("a transfer was answered with {other:?}"))),
        }
    }
}

async fn stalls<T>(what: &str, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(SNAPSHOT_STALL, work).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, format!("{what} made no progress"))),
    }
}

/// The files of a snapshot, in the order in which they are sent.
async fn files_of(dir: &Path) -> io::Result<Vec<(String, u64)>> {
    let mut files = Vec::new();
    let mut entries = tokio::fs::read_dir(dir).await?;
    while let Some(entry) = entries.next_entry().await? {
        let (meta, name) = (entry.metadata().await?, entry.file_name().to_string_lossy().into_owned());
        // Not RocksDB's notes: they are no part of the state, and change whenever the directory is looked at.
        if meta.is_file() && !name.starts_with("LOG") && name != "LOCK" {
            files.push((name, meta.len()));
        }
    }
    files.sort();
    Ok(files)
}

async fn next_reply(frames: &mut Frames, patience: Duration, what: &str) -> io::Result<SnapshotReply> {
    let frame = tokio::time::timeout(patience, frames.next())
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("{what} was not answered")))?
        .ok_or_else(|| io::Error::other(format!("the connection was closed before {what} was answered")))??;
    decode::<SnapshotReply>(&frame).map_err(io::Error::other)
}

impl PeerNetwork {
    async fn send_snapshot(
        &self,
        mut frames: Frames,
        vote: Vote,
        snapshot: &SnapshotOf<C, SnapshotData>,
    ) -> io::Result<SnapshotResponse<C>> {
        let index = snapshot.meta.last_log_id.map_or(0, |id| id.index);
        let dir = snapshot.snapshot.path.clone();
        let files = files_of(&dir).await?;
        let header =
            SnapshotHeader { vote: vote.into(), meta: (&snapshot.meta).into(), files: files.clone() };
        stalls("sending a snapshot", frames.send(Bytes::from(encode(&header)))).await?;
        let begin = match next_reply(&mut frames, SNAPSHOT_STALL, "a snapshot's header").await? {
            SnapshotReply::Go { file, offset, crc } => {
                let (dir, files) = (dir.clone(), files.clone());
                tokio::task::spawn_blocking(move || begin_at(&dir, &files, file, offset, crc))
                    .await
                    .map_err(io::Error::other)?
            }
            SnapshotReply::Installed(vote) => return Ok(SnapshotResponse::new(vote.into())),
            SnapshotReply::Failed(why) => return Err(io::Error::other(why)),
        };
        self.snapshots.progressed(self.target, index);
        stalls("sending a snapshot", frames.send(Bytes::from(encode(&begin)))).await?;
        let mut offset = begin.offset;
        for (name, size) in files.iter().skip(usize::try_from(begin.file).unwrap_or(usize::MAX)) {
            let mut file = tokio::fs::File::open(dir.join(name)).await?;
            if offset > 0 {
                file.seek(io::SeekFrom::Start(offset)).await?;
            }
            let mut left = size.saturating_sub(std::mem::take(&mut offset));
            while left > 0 {
                self.directory.checksums.check_sending(index).map_err(io::Error::other)?;
                let want = usize::try_from(left).unwrap_or(usize::MAX).min(SNAPSHOT_CHUNK_BYTES);
                let mut frame = BytesMut::zeroed(4 + want);
                file.read_exact(&mut frame[4..]).await?;
                let crc = crc32fast::hash(&frame[4..]);
                frame[..4].copy_from_slice(&crc.to_le_bytes());
                stalls("sending a snapshot", frames.send(frame.freeze())).await?;
                self.snapshots.progressed(self.target, index);
                left -= want as u64;
            }
        }
        // Installing takes as long as the disk needs.
        match next_reply(&mut frames, SNAPSHOT_STALL * 6, "a snapshot").await? {
            SnapshotReply::Installed(installed_as) => {
                self.snapshots.arrived(self.target);
                if Vote::from(installed_as) == vote {
                    self.directory.acknowledged(self.target, vote.leader_id.term, index);
                }
                Ok(SnapshotResponse::new(installed_as.into()))
            }
            SnapshotReply::Failed(why) => Err(io::Error::other(why)),
            SnapshotReply::Go { .. } => Err(io::Error::other("a snapshot was answered out of order")),
        }
    }
}

/// Where to begin, given what the receiver has: there, if it is the same.
fn begin_at(dir: &Path, files: &[(String, u64)], file: u64, offset: u64, crc: u32) -> SnapshotBegin {
    let number = usize::try_from(file).unwrap_or(usize::MAX);
    match checksum_before(dir, files, number, offset) {
        Ok(own) if own == crc && number <= files.len() => {
            if file > 0 || offset > 0 {
                tracing::info!(file, offset, "a snapshot's transfer goes on where it stopped");
            }
            SnapshotBegin { file, offset }
        }
        _ => {
            tracing::warn!("what a peer has of a snapshot is something else; beginning at the start");
            SnapshotBegin { file: 0, offset: 0 }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hold::tests::append;
    use super::*;
    use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};

    /// Longer than any test.
    const NEVER: Duration = Duration::from_secs(3600);

    struct Connection {
        requests: UnboundedSender<AppendEntriesRequest<C>>,
        frames: UnboundedReceiver<Bytes>,
        hurry: Arc<Notify>,
        _under_way: mpsc::Receiver<Result<u64, String>>,
    }

    fn connection(hold_for: Duration) -> Connection {
        connection_to(hold_for, true)
    }

    fn connection_to(hold_for: Duration, voter: bool) -> Connection {
        let (requests, input) = unbounded();
        let (sink, frames) = unbounded();
        let (under_way, sent) = mpsc::channel(APPENDS_IN_FLIGHT_MAX);
        let hurry = Arc::new(Notify::new());
        let sink = sink.sink_map_err(io::Error::other);
        tokio::spawn(write_appends(input, sink, under_way, hurry.clone(), hold_for, move || voter));
        Connection { requests, frames, hurry, _under_way: sent }
    }

    impl Connection {
        fn ask(&self, request: AppendEntriesRequest<C>) {
            self.requests.unbounded_send(request).unwrap();
        }

        /// Number of entries and commit index of the next frame.
        async fn next(&mut self) -> Option<(usize, u64)> {
            let append: Append = decode(&self.frames.next().await?).unwrap();
            let request = append.into_request().unwrap();
            Some((request.entries.len(), request.leader_commit.map_or(0, |id| id.index)))
        }
    }

    #[tokio::test]
    async fn a_held_commit_index_goes_with_the_next_entry_and_else_when_its_time_is_over() {
        let mut lone = connection(COMMIT_HOLD);
        lone.ask(append(4, 5, 4));
        assert_eq!(lone.next().await, Some((1, 4)));
        lone.ask(append(5, 5, 5));
        assert_eq!(lone.next().await, Some((0, 5)));
        let mut busy = connection(NEVER);
        busy.ask(append(4, 5, 4));
        busy.ask(append(5, 5, 5));
        busy.ask(append(5, 6, 5));
        assert_eq!((busy.next().await, busy.next().await), (Some((1, 4)), Some((1, 5))));
    }

    #[tokio::test]
    async fn whoever_waits_for_a_held_commit_index_has_it_sent_at_once() {
        let mut connection = connection(NEVER);
        connection.ask(append(4, 5, 4));
        assert_eq!(connection.next().await, Some((1, 4)));
        connection.ask(append(5, 5, 5));
        connection.hurry.notify_one();
        assert_eq!(connection.next().await, Some((0, 5)));
        // It need not be held yet: one who asked before is not forgotten.
        connection.hurry.notify_one();
        connection.ask(append(5, 6, 5));
        assert_eq!(connection.next().await, Some((1, 5)));
        connection.ask(append(6, 6, 6));
        assert_eq!(connection.next().await, Some((0, 6)));
    }

    /// A new leader's first request to a learner is a probe with its own uncommitted blank entry, and ends at once.
    #[tokio::test]
    async fn a_probe_brings_a_learner_nothing_uncommitted() {
        let mut connection = connection_to(COMMIT_HOLD, false);
        connection.ask(append(4, 6, 5));
        connection.requests.close_channel();
        assert_eq!(connection.next().await, Some((1, 5)));
        assert_eq!(connection.next().await, None);
    }

    #[tokio::test]
    async fn nothing_held_is_lost_when_the_requests_end() {
        let mut connection = connection(NEVER);
        connection.ask(append(4, 5, 4));
        connection.ask(append(5, 5, 5));
        connection.requests.close_channel();
        assert_eq!(connection.next().await, Some((1, 4)));
        assert_eq!(connection.next().await, Some((0, 5)));
        assert_eq!(connection.next().await, None);
    }
}
