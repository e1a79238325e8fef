//! One entry for the heartbeats of all drones of this controller that come within some milliseconds.

use crate::app::App;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use holdfast_core::command::{Command, HeartbeatItem, Proposal};
use holdfast_core::limits::HEARTBEATS_PER_ENTRY_MAX;
use std::collections::HashMap;
use std::time::Duration;
use tokio::sync::mpsc;

/// Heartbeats on the way to the batcher. One that finds it full is dropped: a newer one follows.
pub const QUEUE_MAX: usize = 8192;
/// How long the first heartbeat of a batch waits for others.
const COLLECT: Duration = Duration::from_millis(20);
/// How long a batch may look for a leader: after that the drones' next heartbeats are on their way.
const DEADLINE: Duration = Duration::from_secs(2);
/// Batches under way.
const BATCHES_MAX: usize = 4;

/// Of each session the latest.
fn latest(items: Vec<HeartbeatItem>) -> Vec<HeartbeatItem> {
    let mut at: HashMap<(i32, String), usize> = HashMap::new();
    let mut kept: Vec<HeartbeatItem> = Vec::with_capacity(items.len());
    for item in items {
        match at.get(&(item.drone_id, item.session.clone())) {
            Some(&at) => kept[at].local_time_ms = kept[at].local_time_ms.max(item.local_time_ms),
            None => {
                at.insert((item.drone_id, item.session.clone()), kept.len());
                kept.push(item);
            }
        }
    }
    kept
}

/// Runs until this controller stops.
pub async fn run(app: App, mut items: mpsc::Receiver<HeartbeatItem>) {
    let mut under_way = FuturesUnordered::new();
    loop {
        let mut batch = Vec::new();
        tokio::select! {
            () = app.stopping.cancelled() => return,
            Some(()) = under_way.next(), if !under_way.is_empty() => continue,
            received = items.recv_many(&mut batch, HEARTBEATS_PER_ENTRY_MAX),
                if under_way.len() < BATCHES_MAX =>
            {
                if received == 0 {
                    return;
                }
            }
        }
        let end = tokio::time::Instant::now() + COLLECT;
        while batch.len() < HEARTBEATS_PER_ENTRY_MAX {
            let room = HEARTBEATS_PER_ENTRY_MAX - batch.len();
            match tokio::time::timeout_at(end, items.recv_many(&mut batch, room)).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let app = app.clone();
        under_way.push(async move {
            let proposal = Proposal { command: Command::Heartbeats(latest(batch)), idempotency: None };
            if let Err(error) = app.propose_within(proposal, DEADLINE).await {
                tracing::debug!(%error, "heartbeats were not recorded");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_each_session_the_latest_heartbeat_is_kept() {
        let item = |drone_id, session: &str, local_time_ms| HeartbeatItem {
            drone_id,
            session: session.into(),
            local_time_ms,
        };
        let kept =
            latest(vec![item(1, "a", 5), item(2, "b", 1), item(1, "a", 7), item(1, "c", 2), item(1, "a", 6)]);
        assert_eq!(kept, vec![item(1, "a", 7), item(2, "b", 1), item(1, "c", 2)]);
    }
}
