//! One entry for what many drones' sessions ask for at about the same time: renewals, reports, acknowledgements.
//!
//! An entry costs much the same whatever is in it: a place in the log of three machines, a sync, a round of messages.
//! So nothing is proposed while enough entries are under way, and what queues up meanwhile goes into the next one.
//!
//! What nobody waits for (acknowledgements, most reports) lingers for a moment besides, so that it shares an entry with what
//! comes then. A lone connect brings about three more entries otherwise, whose syncs the next connect has to wait for.

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
use tokio::time::Instant;

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

/// How long a command lingers that nobody waits for. A drone does not notice; a reader of another controller may.
const LINGER: Duration = Duration::from_millis(2);

/// A command and who waits for it.
pub struct Item {
    /// The command.
    pub command: FromDrone,
    /// Whether somebody waits for what it brings about, so that it must not linger.
    pub urgent: bool,
    /// Its outcome.
    pub answer: oneshot::Sender<Result<Outcome, ProposeError>>,
}

type Answers = Vec<oneshot::Sender<Result<Outcome, ProposeError>>>;

/// What waits for an entry, with when it came.
#[derive(Default)]
struct Waiting {
    queue: VecDeque<(Instant, Item)>,
    urgent: usize,
    /// Of all commands.
    items: usize,
}

impl Waiting {
    fn push(&mut self, item: Item, now: Instant) {
        self.urgent += usize::from(item.urgent);
        self.items += item.command.items();
        self.queue.push_back((now, item));
    }

    /// When the next entry is to begin, which may be over; none if nothing waits.
    fn due(&self) -> Option<Instant> {
        let (came, _) = self.queue.front()?;
        let lingers = self.urgent == 0 && self.items < ITEMS_PER_ENTRY;
        Some(if lingers { *came + LINGER } else { *came })
    }

    /// Takes what goes into one entry: whole commands, in order, at least one.
    fn take(&mut self) -> (Vec<FromDrone>, Answers) {
        let (mut commands, mut answers) = (Vec::new(), Vec::new());
        let mut items = 0;
        while let Some((_, next)) = self.queue.front() {
            items += next.command.items();
            if items > ITEMS_PER_ENTRY && !commands.is_empty() {
                break;
            }
            if let Some((_, Item { command, urgent, answer })) = self.queue.pop_front() {
                self.urgent -= usize::from(urgent);
                self.items -= command.items();
                commands.push(command);
                answers.push(answer);
            }
        }
        (commands, answers)
    }
}

/// Gives each command its outcome. Whoever has stopped waiting does not need it.
fn answer(answers: Answers, outcome: Result<Outcome, ProposeError>) {
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
    let mut waiting = Waiting::default();
    let mut under_way = FuturesUnordered::new();
    let mut received = Vec::new();
    loop {
        // While enough is under way, the end of one of them is what is waited for.
        let due = waiting.due().filter(|_| under_way.len() < ENTRIES_MAX);
        tokio::select! {
            () = app.stopping.cancelled() => return,
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            Some(()) = under_way.next(), if !under_way.is_empty() => {}
            count = items.recv_many(&mut received, QUEUE_MAX), if waiting.queue.len() < QUEUE_MAX => {
                if count == 0 {
                    return;
                }
                let now = Instant::now();
                received.drain(..).for_each(|item| waiting.push(item, now));
            }
        }
        while under_way.len() < ENTRIES_MAX && waiting.due().is_some_and(|due| due <= Instant::now()) {
            let (commands, answers) = waiting.take();
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
        (Item { command, urgent: true, answer }, answered)
    }

    fn waiting(items: impl IntoIterator<Item = Item>) -> Waiting {
        let mut waiting = Waiting::default();
        let now = Instant::now();
        items.into_iter().for_each(|item| waiting.push(item, now));
        waiting
    }

    fn drones(commands: &[FromDrone]) -> Vec<i32> {
        commands.iter().map(|c| if let FromDrone::Renew(renew) = c { renew.drone_id } else { 0 }).collect()
    }

    #[test]
    fn an_entry_takes_what_waits_in_order_up_to_its_bound() {
        let sizes = [1, ITEMS_PER_ENTRY / 2, ITEMS_PER_ENTRY / 2, 1];
        let mut queue = waiting((1..).zip(sizes).map(|(drone, keys)| item(drone, keys).0));
        assert_eq!(drones(&queue.take().0), [1, 2]);
        assert_eq!(drones(&queue.take().0), [3, 4]);
        assert_eq!((queue.due(), queue.items, queue.urgent), (None, 0, 0));
        // One that is larger has an entry for itself; too large for any is refused by the state machine. The others go on.
        let mut queue = waiting([item(5, 2 * TOGETHER_ITEMS_MAX).0, item(6, 1).0]);
        assert_eq!(drones(&queue.take().0), [5]);
        assert_eq!(drones(&queue.take().0), [6]);
    }

    #[test]
    fn what_nobody_waits_for_lingers_until_something_urgent_or_enough_comes() {
        let now = Instant::now();
        let lazy = |drone, keys| Item { urgent: false, ..item(drone, keys).0 };
        let mut queue = Waiting::default();
        queue.push(lazy(1, 1), now);
        queue.push(lazy(2, 1), now + LINGER / 2);
        assert_eq!(queue.due(), Some(now + LINGER));
        queue.push(item(3, 1).0, now + LINGER / 2);
        assert_eq!(queue.due(), Some(now));
        assert_eq!(drones(&queue.take().0), [1, 2, 3]);
        // The urgent one is gone, and with it the hurry.
        queue.push(lazy(4, ITEMS_PER_ENTRY - 3), now);
        assert_eq!(queue.due(), Some(now + LINGER));
        // A command counts for one itself.
        queue.push(lazy(5, 1), now);
        assert_eq!(queue.due(), Some(now));
        assert_eq!(drones(&queue.take().0), [4, 5]);
        assert_eq!(queue.due(), None);
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
