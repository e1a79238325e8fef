//! A drone as it should be. One of ours starts what it is told to, once for each data directory, and ends it at the hard
//! deadline of its own clock, even when its process is dead. One of Plane's starts a backend again that has ended.

use holdfast_core::command::HeartbeatItem;
use holdfast_wire::drone::ListedBackend;
use holdfast_wire::{BackendStatus, LeaseConfig, TerminationKind};
use std::collections::BTreeMap;

/// Something that a drone once received.
#[derive(Debug, Clone)]
pub struct SimBackend {
    pub key: usize,
    pub token: u64,
    /// On the drone's `CLOCK_BOOTTIME`, ms.
    pub hard_boot_ms: i64,
    /// The process exists.
    pub running: bool,
    /// Last status, as the drone's journal has it.
    pub status: BackendStatus,
}

/// A machine on which a drone runs, or has run. What is in here and outlives a restart is its journal and its guards.
#[derive(Debug, Clone)]
pub struct SimDrone {
    pub id: i32,
    pub name: String,
    /// A drone of Plane's.
    pub planes: bool,
    /// Of the data directory; `None` if the machine has it no more, and only guards are left.
    pub disk: Option<u64>,
    /// Where its sessions come from.
    pub address: u64,
    pub alive: bool,
    /// Speed of its clock, in thousandths of real time.
    pub rate_permille: u64,
    /// Wall clock minus boot time, of this incarnation.
    pub wall_ms: i64,
    pub incarnation: u64,
    pub session: u64,
    pub backends: BTreeMap<String, SimBackend>,
}

impl SimDrone {
    pub fn new(id: i32, rate_permille: u64, planes: bool) -> Self {
        Self {
            id,
            name: format!("d{id}"),
            planes,
            disk: Some(1),
            address: 1,
            alive: true,
            rate_permille,
            wall_ms: 1_700_000_000_000,
            incarnation: 1,
            session: 1,
            backends: BTreeMap::new(),
        }
    }

    pub fn incarnation_name(&self) -> String {
        // Controllers make one for each session of a drone of Plane's.
        let number = if self.planes { self.session } else { self.incarnation };
        format!("{}-i{number}", self.name)
    }

    pub fn data_id(&self) -> Option<String> {
        self.disk.filter(|_| !self.planes).map(|disk| format!("{}-m{disk}", self.name))
    }

    /// What a drone of ours lists at registration.
    pub fn list(&self) -> Vec<ListedBackend> {
        let listed = |(id, backend): (&String, &SimBackend)| ListedBackend {
            backend: id.clone(),
            token: Some(backend.token),
            state: Some(crate::common::state_of(backend.status)),
        };
        self.backends.iter().map(listed).collect()
    }

    pub fn session_name(&self) -> String {
        format!("{}-s{}", self.name, self.session)
    }

    fn boot_ms(&self, real_ms: u64) -> i64 {
        i64::try_from(real_ms * self.rate_permille / 1000).unwrap()
    }

    /// The clock that it tells the controllers.
    pub fn local_ms(&self, real_ms: u64) -> i64 {
        self.boot_ms(real_ms) + self.wall_ms
    }

    pub fn heartbeat(&self, real_ms: u64) -> HeartbeatItem {
        HeartbeatItem {
            drone_id: self.id,
            session: self.session_name(),
            local_time_ms: self.local_ms(real_ms),
        }
    }

    /// Its process is started anew, as the `run`th of that name.
    pub fn restart(&mut self, run: u64, wall_ms: i64) {
        self.alive = true;
        self.incarnation = run;
        self.session = run;
        self.wall_ms = 1_700_000_000_000 + wall_ms;
    }

    /// A spawn arrives. Says whether a process was started; otherwise it was known, or is refused as late.
    pub fn spawn(
        &mut self,
        real_ms: u64,
        id: &str,
        key: usize,
        token: u64,
        lease: LeaseConfig,
        local_time_ms: i64,
    ) -> Spawned {
        if self.backends.get(id).is_some_and(|backend| backend.running || !self.planes) {
            return Spawned::Known;
        }
        let deadlines = lease.deadlines(local_time_ms);
        // A drone of Plane's does not look; what comes so late is outside the fault model.
        let latest = if self.planes { deadlines.hard_terminate_at } else { deadlines.soft_terminate_at };
        let late = self.local_ms(real_ms) >= latest;
        let again = self.backends.contains_key(id);
        self.backends.insert(
            id.to_owned(),
            SimBackend {
                key,
                token,
                hard_boot_ms: deadlines.hard_terminate_at - self.wall_ms,
                running: !late,
                status: if late { BackendStatus::Terminated } else { BackendStatus::Loading },
            },
        );
        match (late, again) {
            (true, _) => Spawned::Late,
            (false, true) => Spawned::StartedAgain,
            (false, false) => Spawned::Started,
        }
    }

    /// An order to end arrives. One for a backend that never came is remembered, so that it won't be started either.
    pub fn terminate(&mut self, real_ms: u64, id: &str, key: usize, token: u64, kind: TerminationKind) {
        let boot_ms = self.boot_ms(real_ms);
        if self.planes && !self.backends.contains_key(id) {
            return;
        }
        let backend = self.backends.entry(id.to_owned()).or_insert(SimBackend {
            key,
            token,
            hard_boot_ms: boot_ms,
            running: false,
            status: BackendStatus::Terminated,
        });
        if !backend.running {
            return;
        }
        // The worst backend there can be ignores SIGTERM.
        backend.status = backend.status.max(BackendStatus::Terminating);
        if kind == TerminationKind::Hard {
            backend.hard_boot_ms = backend.hard_boot_ms.min(boot_ms);
        }
    }

    /// A renewal that was asked for at `local_time_ms` of this incarnation was granted.
    pub fn renewed(&mut self, id: &str, lease: LeaseConfig, local_time_ms: i64) {
        let hard_boot_ms = lease.deadlines(local_time_ms).hard_terminate_at - self.wall_ms;
        if let Some(backend) =
            self.backends.get_mut(id).filter(|b| b.running && b.status < BackendStatus::Terminating)
        {
            backend.hard_boot_ms = backend.hard_boot_ms.max(hard_boot_ms);
        }
    }

    /// Backends whose time is over by now, with all the time that a kill may take, end; their number.
    pub fn end_overdue(&mut self, real_ms: u64, kill_ms: u64) -> usize {
        let killed_by = self.boot_ms(real_ms.saturating_sub(kill_ms));
        let mut ended = 0;
        for backend in self.backends.values_mut().filter(|b| b.running && b.hard_boot_ms <= killed_by) {
            backend.running = false;
            backend.status = BackendStatus::Terminated;
            ended += 1;
        }
        ended
    }
}

/// What became of a spawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spawned {
    Started,
    /// A second process of a backend that had ended.
    StartedAgain,
    Known,
    Late,
}
