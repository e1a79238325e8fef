//! What a test's cluster is to be like.

use super::cluster::Cluster;
use super::wait::LONG;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Default lease of a test: a key expires within seconds, and a busy machine still renews in time.
const LEASE_DEFAULT: &str = "renew=1s,soft=2500ms,hard=3500ms,expiry=5s";

/// What is wrong with a clock.
#[derive(Debug, Clone)]
pub(super) enum Clock {
    /// The wall clock is off by this.
    Offset(String),
    /// All clocks run at this rate.
    Rate(String),
    /// The wall clock is off by what this file says.
    File(PathBuf),
}

/// Whose clock is wrong.
#[derive(Debug, Clone, Copy)]
pub(super) enum Who {
    Controller(usize),
    Drone(usize),
}

/// Index of a controller, its data directory and what is added to its environment.
type ControllerDisk = (usize, PathBuf, Vec<(String, String)>);

/// Describes a cluster; [`ClusterBuilder::start`] starts it.
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    pub(super) controllers: usize,
    pub(super) drones: usize,
    pub(super) lease: String,
    pub(super) election_timeout: String,
    pub(super) proxied_drones: bool,
    pub(super) default_cluster: bool,
    pub(super) clocks: Vec<(Who, Clock)>,
    pub(super) controller_flags: Vec<(String, String)>,
    pub(super) disks: Vec<ControllerDisk>,
    pub(super) formed: bool,
    pub(super) patience: Duration,
}

impl Default for ClusterBuilder {
    fn default() -> Self {
        Self {
            controllers: 3,
            drones: 1,
            lease: LEASE_DEFAULT.to_owned(),
            election_timeout: "500ms".to_owned(),
            proxied_drones: false,
            default_cluster: true,
            clocks: Vec::new(),
            controller_flags: Vec::new(),
            disks: Vec::new(),
            formed: true,
            patience: LONG,
        }
    }
}

impl ClusterBuilder {
    /// How many controllers (3).
    #[must_use]
    pub fn controllers(mut self, count: usize) -> Self {
        self.controllers = count;
        self
    }

    /// How many drones (1): `dr-0`, `dr-1`, …
    #[must_use]
    pub fn drones(mut self, count: usize) -> Self {
        self.drones = count;
        self
    }

    /// Lease durations of the cluster, in the form of `cluster init --lease`.
    #[must_use]
    pub fn lease(mut self, lease: &str) -> Self {
        self.lease = lease.to_owned();
        self
    }

    /// Election time-out, in the form of `--election-timeout` (500ms); empty: the controllers' own default.
    #[must_use]
    pub fn election_timeout(mut self, duration: &str) -> Self {
        self.election_timeout = duration.to_owned();
        self
    }

    /// A flag for all controllers.
    #[must_use]
    pub fn controller_flag(mut self, flag: &str, value: &str) -> Self {
        self.controller_flags.push((flag.to_owned(), value.to_owned()));
        self
    }

    /// A controller keeps its data in `dir`, and runs with these environment variables.
    #[must_use]
    pub fn controller_disk(mut self, index: usize, dir: &Path, env: Vec<(String, String)>) -> Self {
        self.disks.push((index, dir.to_owned(), env));
        self
    }

    /// The controllers are left waiting: the test forms the cluster. Only without drones.
    #[must_use]
    pub fn waiting(mut self) -> Self {
        self.formed = false;
        self.drones(0)
    }

    /// Each drone reaches the controllers only through its own proxies: `Cluster::links`.
    #[must_use]
    pub fn proxied_drones(mut self) -> Self {
        self.proxied_drones = true;
        self
    }

    /// Controllers have no `--default-cluster`.
    #[must_use]
    pub fn no_default_cluster(mut self) -> Self {
        self.default_cluster = false;
        self
    }

    /// Moves a controller's wall clock (`+3650d`); needs libfaketime.
    #[must_use]
    pub fn controller_clock(mut self, index: usize, offset: &str) -> Self {
        self.clocks.push((Who::Controller(index), Clock::Offset(offset.to_owned())));
        self
    }

    /// Moves a drone's wall clock.
    #[must_use]
    pub fn drone_clock(mut self, index: usize, offset: &str) -> Self {
        self.clocks.push((Who::Drone(index), Clock::Offset(offset.to_owned())));
        self
    }

    /// Lets all clocks of a controller run at another rate (`1.05`).
    #[must_use]
    pub fn controller_rate(mut self, index: usize, rate: &str) -> Self {
        self.clocks.push((Who::Controller(index), Clock::Rate(rate.to_owned())));
        self
    }

    /// Lets all clocks of a drone, and of its guards, run at another rate.
    #[must_use]
    pub fn drone_rate(mut self, index: usize, rate: &str) -> Self {
        self.clocks.push((Who::Drone(index), Clock::Rate(rate.to_owned())));
        self
    }

    /// Lets a drone's wall clock follow a file that the test writes.
    #[must_use]
    pub fn drone_clock_file(mut self, index: usize, file: &Path) -> Self {
        self.clocks.push((Who::Drone(index), Clock::File(file.to_owned())));
        self
    }

    /// Starts everything, forms the cluster, and waits until each controller serves and each drone can be scheduled to.
    pub async fn start(self) -> Cluster {
        Cluster::start(self).await
    }
}
