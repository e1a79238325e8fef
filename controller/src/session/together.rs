//! One entry for what many drones' sessions ask for at about the same time: renewals, reports, acknowledgements.
//!
//! An entry costs much the same whatever is in it: a place in the log of three machines, a sync, a round of messages.
//! So nothing is proposed while enough entries are under way, and what queues up meanwhile goes into the next one. When
//! there is little to do, nothing waits.

use crate::app::App;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use holdfast_core::command::{Command, FromDrone, Proposal};
use holdfast_core::limits::TOGETHER_ITEMS_MAX;
use holdfast_core::outcome::Outcome;
use raft_store::ProposeError;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Commands on their way to an entry; a session waits for room.
pub const QUEUE_MAX: usize = 8192;
/// How long one entry may look for a leader before it is given up, and its parts may be proposed anew.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// Entries under way: one is being made durable while the other is written, sent or answered.
const ENTRIES_MAX: usize = 2;
/// Items of one entry, where a single command has no more. A larger entry would hold up everything behind it on every
/// replica: a thousand renewals take milliseconds.
pub const ITEMS_PER_ENTRY: usize = 512;
const _: () = assert!(ITEMS_PER_ENTRY <= TOGETHER_ITEMS_MAX);

/// A command and who waits for it.
pub struct Item {
    /// The command.
    pub command: FromDrone,
    /// Its outcome.
    pub answer: oneshot::Sender<Result<Outcome, ProposeError>>,
}

/// Takes what goes into one entry: whole commands, in order, at least one.
fn take(queue: &mut VecDeque<Item>) -> (Vec<FromDrone>, Vec<oneshot::Sender<Result<Outcome, ProposeError>>>) {
    let (mut commands, mut answers) = (Vec::new(), Vec::new());
    let mut items = 0;
    while let Some(next) = queue.front() {
        items += next.command.items();
        if items > ITEMS_PER_ENTRY && !commands.is_empty() {
            break;
        }
        if let Some(Item { command, answer }) = queue.pop_front() {
            commands.push(command);
            answers.push(answer);
        }
    }
    (commands, answers)
}

/// Gives each command its outcome. Whoever has stopped waiting does not need it.
fn answer(
    answers: Vec<oneshot::Sender<Result<Outcome, ProposeError>>>,
    outcome: Result<Outcome, ProposeError>,
) {
    match outcome {
        Ok(Outcome::Together(outcomes)) if outcomes.len() == answers.len() => {
            for (answer, outcome) in answers.into_iter().zip(outcomes) {
                let _ = answer.send(Ok(outcome));
            }
        }
        other => {
            for answer in answers {
                let _ = answer.send(other.clone());
            }
        }
    }
}

/// Runs until this controller stops.
pub async fn run(app: App, mut items: mpsc::Receiver<Item>) {
    let mut queue = VecDeque::new();
    let mut under_way = FuturesUnordered::new();
    let mut received = Vec::new();
    loop {
        tokio::select! {
            () = app.stopping.cancelled() => return,
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            count = items.recv_many(&mut received, QUEUE_MAX), if queue.len() < QUEUE_MAX => {
                if count == 0 {
                    return;
                }
                queue.extend(received.drain(..));
            }
        }
        while under_way.len() < ENTRIES_MAX && !queue.is_empty() {
            let (commands, answers) = take(&mut queue);
            let app = app.clone();
            under_way.push(async move {
                let proposal = Proposal { command: Command::Together(commands), idempotency: None };
                let outcome = app.propose_within(proposal, DEADLINE).await.map(|answer| answer.outcome);
                answer(answers, outcome);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_core::command::{Renew, RenewKey};

    fn item(drone_id: i32, keys: usize) -> (Item, oneshot::Receiver<Result<Outcome, ProposeError>>) {
        let (answer, answered) = oneshot::channel();
        let key = RenewKey { backend_id: "b".into(), token: None };
        let command = FromDrone::Renew(Renew { drone_id, keys: vec![key; keys] });
        (Item { command, answer }, answered)
    }

    fn drones(commands: &[FromDrone]) -> Vec<i32> {
        commands.iter().map(|c| if let FromDrone::Renew(renew) = c { renew.drone_id } else { 0 }).collect()
    }

    #[test]
    fn an_entry_takes_what_waits_in_order_up_to_its_bound() {
        let sizes = [1, ITEMS_PER_ENTRY / 2, ITEMS_PER_ENTRY / 2, 1];
        let mut queue: VecDeque<Item> = (1..).zip(sizes).map(|(drone, keys)| item(drone, keys).0).collect();
        assert_eq!(drones(&take(&mut queue).0), [1, 2]);
        assert_eq!(drones(&take(&mut queue).0), [3, 4]);
        assert!(queue.is_empty());
        // One that is larger has an entry for itself; too large for any is refused by the state machine. The others go on.
        queue.extend([item(5, 2 * TOGETHER_ITEMS_MAX).0, item(6, 1).0]);
        assert_eq!(drones(&take(&mut queue).0), [5]);
        assert_eq!(drones(&take(&mut queue).0), [6]);
    }

    #[test]
    fn each_gets_its_own_outcome_and_all_of_them_the_failure() {
        let ((one, mut first), (two, mut second)) = (item(1, 1), item(2, 1));
        let outcomes = vec![Outcome::Renewed(Vec::new()), Outcome::Done];
        answer(vec![one.answer, two.answer], Ok(Outcome::Together(outcomes)));
        assert_eq!(first.try_recv().unwrap(), Ok(Outcome::Renewed(Vec::new())));
        assert_eq!(second.try_recv().unwrap(), Ok(Outcome::Done));
        let ((one, mut first), (two, mut second)) = (item(1, 1), item(2, 1));
        answer(vec![one.answer, two.answer], Err(ProposeError::NoLeader));
        assert_eq!(first.try_recv().unwrap(), Err(ProposeError::NoLeader));
        assert_eq!(second.try_recv().unwrap(), Err(ProposeError::NoLeader));
    }
}
