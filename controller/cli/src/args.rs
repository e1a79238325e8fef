//! The command line.

use crate::error::CliError;
use crate::settings;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use holdfast_client::wire::LeaseConfig;
use holdfast_client::wire::lease::parse_duration_ms;
use std::ffi::OsString;
use std::path::PathBuf;

/// Rows that a listing shows unless `--limit` says otherwise.
const ROWS_DEFAULT: usize = 1_000;
/// Most controllers that `dev` starts.
pub(crate) const DEV_CONTROLLERS_MAX: u16 = 9;
/// Most drones that `dev` starts: their names end in one letter.
pub(crate) const DEV_DRONES_MAX: u16 = 26;

/// Over the flags that all commands have.
const GLOBAL: &str = "Options of all commands";

const AFTER_HELP: &str = "\
Every flag can also be given by environment, as HOLDFAST_FLAG or, for a command's own, HOLDFAST_COMMAND_FLAG
(HOLDFAST_CONTROLLER, HOLDFAST_KEYS_LIST_LIMIT), and in a TOML file named by --config, a command's own in a
table of its name ([keys.list] limit = 10). The command line comes first, then the environment, then the file.

Exit codes: 0 done, 1 refused by the service, 2 wrong use, 3 no controller reachable.";

/// Holdfast keeps at most one running backend per key.
#[derive(Debug, Parser)]
#[command(name = "holdfast", version, after_help = AFTER_HELP, max_term_width = 110)]
pub(crate) struct Cli {
    /// Controllers to ask; the leader is found from any of them
    #[arg(
        long,
        global = true,
        help_heading = GLOBAL,
        value_name = "URL[,URL...]",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:7101,http://127.0.0.1:7102,http://127.0.0.1:7103"
    )]
    pub(crate) controller: Vec<String>,

    /// TOML file with settings
    #[arg(long, global = true, help_heading = GLOBAL, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// Print JSON instead of text for people
    #[arg(long, global = true, help_heading = GLOBAL)]
    pub(crate) json: bool,

    /// How long to go on trying through a change of leader
    #[arg(
        long = "timeout",
        global = true,
        help_heading = GLOBAL,
        value_name = "DURATION",
        default_value = "30s",
        value_parser = duration_ms
    )]
    pub(crate) timeout_ms: u64,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a whole cluster on this machine, until Ctrl-C
    Dev(DevArgs),
    /// Get the backend that holds a key, and start one if the key is free
    Connect(ConnectArgs),
    /// The keys that are held
    #[command(subcommand)]
    Keys(KeysCommand),
    /// The backends
    #[command(subcommand)]
    Backends(BackendsCommand),
    /// The drones, which run the backends
    #[command(subcommand)]
    Drones(DronesCommand),
    /// The controllers
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Backups
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DevArgs {
    /// How many controllers
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=i64::from(DEV_CONTROLLERS_MAX)))]
    pub(crate) controllers: u16,
    /// How many drones
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=i64::from(DEV_DRONES_MAX)))]
    pub(crate) drones: u16,
    /// Controllers listen on the ports after this one, and for their peers on those a hundred further
    #[arg(long, default_value_t = 7100, value_name = "PORT")]
    pub(crate) base_port: u16,
    /// Keep data and logs here, instead of in a directory that is removed at the end
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Lease durations of a new cluster, such as renew=30s,soft=40s,hard=50s,expiry=60s
    #[arg(long)]
    pub(crate) lease: Option<LeaseConfig>,
}

#[derive(Debug, Args)]
pub(crate) struct ConnectArgs {
    /// The key's name; a random one if left out
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// The key's namespace
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) namespace: String,
    /// The key's tag, which must match the holder's
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) tag: String,
    /// Drone pool to start in
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) pool: String,
    /// Cluster to start in; the controllers' default if left out
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) cluster: Option<String>,
    /// User that the connection token names
    #[arg(long)]
    pub(crate) user: Option<String>,
    /// Environment of the backend
    #[arg(long, value_name = "NAME=VALUE", value_parser = name_and_value)]
    pub(crate) env: Vec<(String, String)>,
    /// Wait until the backend is ready, and print its address
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long --wait waits
    #[arg(long = "wait-timeout", value_name = "DURATION", default_value = "60s", value_parser = duration_ms)]
    pub(crate) wait_timeout_ms: u64,
    /// Wait, up to --timeout, for a drone that can take the backend
    #[arg(long)]
    pub(crate) wait_for_drone: bool,
    /// How long the service waits for a key whose backend is going away; its own default if left out
    #[arg(long = "wait-for-key", value_name = "DURATION", value_parser = duration_ms)]
    pub(crate) wait_for_key_ms: Option<u64>,
    /// Container image to start
    #[arg(long, conflicts_with = "command")]
    pub(crate) image: Option<String>,
    /// Command to start; it is to listen on $PORT
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// List the held keys
    List {
        /// Only of this namespace
        #[arg(long)]
        namespace: Option<String>,
        /// Only names that begin so
        #[arg(long)]
        prefix: Option<String>,
        #[command(flatten)]
        limit: Limit,
    },
    /// Show one held key
    Show(KeyArgs),
    /// Let a key run out: its backend ends on the lease timeline
    PreventRenewal(KeyArgs),
    /// Take prevent-renewal back
    AllowRenewal(KeyArgs),
    /// Free a key that has expired
    Revoke(KeyArgs),
}

#[derive(Debug, Args)]
pub(crate) struct KeyArgs {
    /// The key's name
    pub(crate) name: String,
    /// The key's namespace
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) namespace: String,
}

#[derive(Debug, Args)]
pub(crate) struct Limit {
    /// Show at most this many
    #[arg(long = "limit", value_name = "ROWS", default_value_t = ROWS_DEFAULT)]
    pub(crate) rows: usize,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BackendsCommand {
    /// List the backends, those that ended not long ago included
    List {
        /// Only ids that begin so
        #[arg(long)]
        prefix: Option<String>,
        #[command(flatten)]
        limit: Limit,
    },
    /// Show one backend
    Show {
        /// The backend
        id: String,
    },
    /// Print a backend's output; only on its drone's machine
    Logs(LogsArgs),
    /// Ask for a backend's end
    Terminate {
        /// The backend
        id: String,
        /// Kill it, instead of asking it to end
        #[arg(long)]
        hard: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The backend
    pub(crate) id: String,
    /// Data directory of a drone, or of `holdfast dev`
    #[arg(long, value_name = "DIR", env = "HOLDFAST_DATA_DIR", value_delimiter = ',', required = true)]
    pub(crate) data_dir: Vec<PathBuf>,
    /// Go on as the backend writes, until it ends
    #[arg(long, short)]
    pub(crate) follow: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DronesCommand {
    /// List the drones
    List {
        /// Only of this cluster
        #[arg(long, value_name = "HOST:PORT")]
        cluster: Option<String>,
        #[command(flatten)]
        limit: Limit,
    },
    /// Make a drone take no new backends
    Drain(DrainArgs),
    /// Let a drone take backends again, and forget its drain's deadline
    Undrain {
        /// The drone
        name: String,
        /// Its cluster; needed only where several have a drone of that name
        #[arg(long, value_name = "HOST:PORT")]
        cluster: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// The drone
    pub(crate) name: String,
    /// Its cluster; needed only where several have a drone of that name
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) cluster: Option<String>,
    /// Ask what is left on it to end so much later; without it what it has stays
    #[arg(long = "deadline", value_name = "DURATION", value_parser = duration_ms)]
    pub(crate) deadline_ms: Option<u64>,
    /// Wait until it has no backends
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long --wait waits, after the deadline if there is one
    #[arg(long = "wait-timeout", value_name = "DURATION", default_value = "10m", value_parser = duration_ms)]
    pub(crate) wait_timeout_ms: u64,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Show who leads, and how far each controller is
    Status,
    /// List the controllers
    Members,
    /// Form a new cluster of controllers that wait for it. Asks the first controller of --controller that answers, which
    /// must be one of the members; an init that was interrupted is repeated there
    Init {
        /// Peer addresses of the members, as they reach each other; their ids will be 1, 2, 3 in this order
        #[arg(long, value_name = "HOST:PORT,...", required = true, value_delimiter = ',')]
        members: Vec<String>,
        /// Lease durations [default: renew=30s,soft=40s,hard=50s,expiry=60s]
        #[arg(long, value_name = "renew=30s,soft=40s,hard=50s,expiry=60s")]
        lease: Option<LeaseConfig>,
    },
    /// Add the controller that waits at this peer address, as a member with a new id
    Add {
        /// Where the other controllers reach it
        #[arg(value_name = "HOST:PORT")]
        peer_addr: String,
        /// Wait until it votes
        #[arg(long)]
        wait: bool,
        /// How long --wait waits
        #[arg(long = "wait-timeout", value_name = "DURATION", default_value = "60s", value_parser = duration_ms)]
        wait_timeout_ms: u64,
    },
    /// Change a controller's peer address; its id and its data stay
    Move {
        /// Member id
        id: u64,
        /// Where the other controllers reach it now
        #[arg(value_name = "HOST:PORT")]
        peer_addr: String,
    },
    /// Remove a controller forever; its id can't be used again
    Remove {
        /// Member id
        id: u64,
    },
    /// Decide which controllers are right, where their checksums differ and no majority agrees
    ///
    /// Controllers that have another checksum at that index are removed from the cluster and stop for good. See cluster
    /// status for the index and the checksums.
    AcceptChecksum {
        /// Log index at which they differ
        index: u64,
        /// The checksum that is right
        value: String,
    },
    /// Make the leader hand over
    TransferLeader {
        /// To this member; to whoever is best if left out
        #[arg(long, value_name = "ID")]
        to: Option<u64>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Save a backup of the running cluster: the state of one instant
    Save {
        /// Where; an older file of that name is replaced once the new one is whole and checked
        file: PathBuf,
    },
    /// Check a backup from end to end, and show what it holds
    Inspect {
        /// The backup
        file: PathBuf,
    },
    /// Make the data directory of the first member of a new cluster from a backup; the others are added to it
    Restore(RestoreArgs),
}

#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// The backup
    pub(crate) file: PathBuf,
    /// Data directory to make: missing or empty
    #[arg(long, value_name = "DIR")]
    pub(crate) data_dir: PathBuf,
    /// Where the members that are added later reach this one
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) advertise_peer: String,
    /// New tokens are to be larger than this one too: for a backup that was restored before
    #[arg(long, value_name = "TOKEN")]
    pub(crate) above_token: Option<u64>,
    /// For how long no key is acquired, if longer than the backup's expiry: for lease durations that were raised after
    /// the backup was made
    #[arg(long, value_name = "DURATION")]
    pub(crate) quarantine: Option<String>,
}

/// Reads the command line, the environment and the settings file.
pub(crate) fn parse(argv: impl Iterator<Item = OsString>) -> Result<Cli, CliError> {
    let argv: Vec<OsString> = argv.collect();
    let table = settings::file(&argv, std::env::var_os("HOLDFAST_CONFIG"))?;
    let command = settings::apply(Cli::command(), table)?;
    let mut matches = command.try_get_matches_from(argv)?;
    Ok(Cli::from_arg_matches_mut(&mut matches)?)
}

/// Parses a duration with a unit into milliseconds.
fn duration_ms(text: &str) -> Result<u64, String> {
    parse_duration_ms("duration", text).map_err(|error| error.to_string())
}

fn name_and_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(argv: &[&str]) -> Result<ConnectArgs, clap::Error> {
        let argv = ["holdfast", "connect"].iter().chain(argv);
        Cli::try_parse_from(argv).map(|cli| match cli.command {
            Command::Connect(args) => args,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_keeps_its_own_flags_and_an_environment_its_equals_signs() {
        let args = connect(&["--key", "k", "--env", "A=b=c", "--", "sh", "-c", "--wait"]).unwrap();
        assert_eq!(args.command, ["sh", "-c", "--wait"]);
        assert_eq!(args.env, [("A".to_owned(), "b=c".to_owned())]);
        assert!(!args.wait);
    }

    #[test]
    fn wrong_use_is_refused() {
        for bad in [
            &["--image", "i", "--", "sh"][..],
            &["--env", "=x"],
            &["--env", "x"],
            &["--wait-timeout", "60"],
            &["stray"],
        ] {
            assert_eq!(connect(bad).unwrap_err().exit_code(), 2, "{bad:?}");
        }
    }

    #[test]
    fn controllers_are_listed_with_commas_anywhere_on_the_line() {
        let cli = Cli::try_parse_from(["holdfast", "keys", "list", "--json", "--controller", "http://a,b"])
            .unwrap();
        assert_eq!(cli.controller, ["http://a", "b"]);
        assert!(cli.json);
        assert_eq!(Cli::try_parse_from(["holdfast", "keys", "list"]).unwrap().controller.len(), 3);
    }

    #[test]
    fn unsafe_leases_are_refused_before_anything_starts() {
        assert!(Cli::try_parse_from(["holdfast", "dev", "--lease", "hard=59s"]).is_err());
        assert!(
            Cli::try_parse_from(["holdfast", "dev", "--lease", "renew=1s,soft=2s,hard=3s,expiry=4s"]).is_ok()
        );
    }
}
