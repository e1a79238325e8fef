//! What can happen in a run, what is on its way, and what is counted.

use holdfast_core::command::{HeartbeatItem, RenewKey, Sweep};
use holdfast_core::listing::Differences;
use holdfast_core::view::DueAction;
use holdfast_wire::BackendStatus;
use holdfast_wire::drone::ListedBackend;

/// One thing that happens.
#[derive(Debug, Clone)]
pub enum Op {
    Connect {
        key: usize,
        tag: u8,
        first: usize,
        second: usize,
    },
    Heartbeat(usize),
    Renew(usize),
    ReadActions(usize),
    Deliver(proptest::sample::Index),
    Repeat(proptest::sample::Index),
    Lose(proptest::sample::Index),
    /// Everybody says what they have to say, and everything arrives, in order.
    Settle,
    Advance(u64),
    AdvanceToExpiry {
        key: usize,
        offset_ms: i64,
    },
    Restart {
        drone: usize,
        wall_ms: i64,
    },
    /// A drone of that name starts on another machine, where it ran before or with a fresh data directory. The machine
    /// where it ran so far does not notice.
    OtherMachine {
        drone: usize,
        wall_ms: i64,
    },
    /// The data directory is moved to a new machine, and the drone is started there. The processes stay where they are.
    MoveDisk {
        drone: usize,
        wall_ms: i64,
    },
    /// What runs on the machines that a drone has left says on its old session what it has to say.
    OldMachineSpeaks(usize),
    /// The last drone, one of Plane's, gets a spawn whose acknowledgement is lost; the backend ends; the drone comes back
    /// and gets the spawn again before anything of the first process was heard.
    SecondSending {
        key: usize,
    },
    Crash(usize),
    Reconnect {
        drone: usize,
        /// From another address.
        moved: bool,
    },
    ReportAgain(usize),
    BackendExits(usize),
    Terminate {
        key: usize,
        hard: bool,
    },
    AllowRenew {
        key: usize,
        allow: bool,
    },
    ProposeSweep,
    EndDue,
    Drain {
        drone: usize,
        deadline_ms: Option<u64>,
        undo: bool,
    },
    Revoke(usize),
    LeaderChange {
        outage_ms: u64,
        rate_permille: u64,
        boot_ms: u64,
    },
}

/// On its way, perhaps for ever.
#[derive(Debug, Clone)]
pub enum Message {
    Heartbeat(HeartbeatItem),
    Renew {
        drone: usize,
        session: u64,
        local_time_ms: i64,
        keys: Vec<RenewKey>,
    },
    Report {
        drone: usize,
        session: u64,
        data_id: Option<String>,
        backend_id: String,
        status: BackendStatus,
        token: u64,
    },
    Ack {
        drone: usize,
        action_id: String,
    },
    Register {
        drone: usize,
        session: u64,
        incarnation: String,
        data_id: Option<String>,
        address: u64,
    },
    /// All pages of a list.
    List {
        drone: usize,
        session: u64,
        backends: Vec<ListedBackend>,
    },
    /// What the controller of the session has made of them.
    Listed {
        drone: usize,
        session: u64,
        differences: Differences,
    },
    /// An order to end what holds no key, which is in no table.
    End {
        drone: usize,
        session: u64,
        backend_id: String,
    },
    Sweep(Sweep),
    Action {
        drone: usize,
        session: u64,
        action: Box<DueAction>,
    },
    Renewed {
        drone: usize,
        session: u64,
        local_time_ms: i64,
        backend_ids: Vec<String>,
    },
}

/// What is wrong with this world on purpose.
#[derive(Debug, Clone, Copy)]
pub struct Faults {
    pub ignore_deadlines: bool,
    pub drone_rate_permille: Option<u64>,
    pub leader_rate_permille: Option<u64>,
}

impl Faults {
    pub fn none() -> Self {
        Self { ignore_deadlines: false, drone_rate_permille: None, leader_rate_permille: None }
    }
}

macro_rules! stats {
    ($($name:ident),* $(,)?) => {
        /// What happened, to see that something did.
        #[derive(Debug, Clone, Copy, Default)]
        pub struct Stats { $(pub $name: u64),* }
        impl Stats {
            pub fn add(&mut self, other: Stats) { $(self.$name += other.$name;)* }
        }
    };
}
stats!(
    acquired,
    found,
    leaving,
    tag_mismatch,
    no_drone,
    taken_over,
    released,
    swept,
    renewed,
    renewals_refused,
    started,
    late_spawns,
    killed_at_deadline,
    successors,
    adopted,
    ended_by_time,
    listed,
    sent_again,
    leaving_by_list,
    ended_as_listed,
    asked_again,
    ended_as_reported,
    foreign_ends,
    kept_for_second,
    started_again,
);
