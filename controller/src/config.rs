//! Settings: flags, then `HOLDFAST_…` environment variables, then the TOML file of `--config`, then defaults.
//!
//! Reading them is pure apart from the file: [`Flags::settle`] turns what was given into [`Settings`] or says which
//! flag is wrong.

use clap::Parser;
use holdfast_core::limits::TERMINATED_KEEP_MS_DEFAULT;
use holdfast_wire::FieldError;
use holdfast_wire::lease::parse_duration_ms;
use holdfast_wire::names::check_cluster;
use raft_store::StoreConfig;
use raft_store::disk::DISK_RESERVE_BYTES_DEFAULT;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Election time-out unless given, in milliseconds.
const ELECTION_TIMEOUT_MS_DEFAULT: u64 = 200;
/// Shortest election time-out: below it a slow disk looks like a dead leader.
const ELECTION_TIMEOUT_MS_MIN: u64 = 50;
/// Longest election time-out, in milliseconds.
const ELECTION_TIMEOUT_MS_MAX: u64 = 60_000;
/// Log entries between snapshots unless given.
const SNAPSHOT_EVERY_DEFAULT: u64 = 200_000;
/// Fewest log entries between snapshots.
const SNAPSHOT_EVERY_MIN: u64 = 100;
/// Most log entries between snapshots.
const SNAPSHOT_EVERY_MAX: u64 = 10_000_000;
/// Shortest time for which terminated backends can be kept, in milliseconds.
const TERMINATED_KEEP_MS_MIN: u64 = 1_000;
/// Longest time for which terminated backends can be kept, in milliseconds (a week).
const TERMINATED_KEEP_MS_MAX: u64 = 7 * 24 * 60 * 60 * 1000;
/// Largest disk reserve in bytes (1 TiB).
const DISK_RESERVE_BYTES_MAX: u64 = 1 << 40;
/// Most controllers that a joining member can be told of.
const JOIN_URLS_MAX: usize = 64;
/// Largest settings file, in bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// One replica of Holdfast: a Raft member, the key state machine and the HTTP API.
#[derive(Debug, Clone, Default, Parser, Deserialize)]
#[command(name = "holdfast-controller", version)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct Flags {
    /// Directory of this replica alone
    #[arg(long, env = "HOLDFAST_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where to serve HTTP
    #[arg(long, env = "HOLDFAST_LISTEN", value_name = "IP:PORT")]
    pub listen: Option<SocketAddr>,
    /// Where to listen for the other replicas
    #[arg(long, env = "HOLDFAST_PEER_LISTEN", value_name = "IP:PORT")]
    pub peer_listen: Option<SocketAddr>,
    /// Where clients and drones reach this replica [default: http:// and --listen]
    #[arg(long, env = "HOLDFAST_ADVERTISE_URL", value_name = "URL")]
    pub advertise_url: Option<String>,
    /// Ask these controllers of a running cluster to add this one while it waits to be named
    #[arg(long, env = "HOLDFAST_JOIN", value_name = "URL,...")]
    pub join: Option<String>,
    /// Where the other replicas reach this one, told to them with --join [default: --peer-listen]
    #[arg(long, env = "HOLDFAST_ADVERTISE_PEER", value_name = "HOST:PORT")]
    pub advertise_peer: Option<String>,
    /// Cluster of a spawn_config that names none
    #[arg(long, env = "HOLDFAST_DEFAULT_CLUSTER", value_name = "HOST:PORT")]
    pub default_cluster: Option<String>,
    /// Time without a message from the leader after which an election is held [default: 200ms]
    #[arg(long, env = "HOLDFAST_ELECTION_TIMEOUT", value_name = "DURATION")]
    pub election_timeout: Option<String>,
    /// How long terminated backends are kept, of a cluster that this controller is asked to form [default: 1h]
    #[arg(long, env = "HOLDFAST_TERMINATED_KEEP", value_name = "DURATION")]
    pub terminated_keep: Option<String>,
    /// Log entries between snapshots [default: 200000]
    #[arg(long, env = "HOLDFAST_SNAPSHOT_EVERY", value_name = "ENTRIES")]
    pub snapshot_every: Option<u64>,
    /// Disk space to keep free in the data directory; with less than that this replica does not lead: bytes, or with KiB,
    /// MiB or GiB [default: 64MiB]
    #[arg(long, env = "HOLDFAST_DISK_RESERVE", value_name = "SIZE")]
    pub disk_reserve: Option<String>,
    /// What to log: error, warn, info, debug, trace, or a filter like info,raft_store=debug (RUST_LOG is read too)
    /// [default: info,openraft=error]
    #[arg(long, env = "HOLDFAST_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// TOML file with the same names (without the dashes in front)
    #[arg(long, env = "HOLDFAST_CONFIG", value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
}

/// A wrong setting: wrong use, exit code 2.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A flag, environment variable or line of the file.
    #[error("--{flag} {problem}")]
    Flag {
        /// The flag without the dashes.
        flag: &'static str,
        /// Reads on from the flag.
        problem: String,
    },
    /// The file can't be read.
    #[error("--config {path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

fn wrong(flag: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Flag { flag, problem: problem.into() }
}

fn field(error: FieldError) -> ConfigError {
    wrong(error.field, error.problem)
}

/// What a controller runs with. Everything in it was checked.
#[derive(Debug, Clone)]
pub struct Settings {
    /// For the replica.
    pub store: StoreConfig,
    /// Where to serve HTTP.
    pub listen: SocketAddr,
    /// Where clients and drones reach this replica; without a slash at the end.
    pub advertise_url: String,
    /// Controllers to ask for admission while this one has no name; empty if it is to be named by an operator.
    pub join: Vec<String>,
    /// Where the other replicas reach this one, `HOST:PORT`.
    pub advertise_peer: String,
    /// Cluster of a `spawn_config` that names none.
    pub default_cluster: Option<String>,
    /// Log filter.
    pub log: Option<String>,
}

impl Flags {
    /// Fills what was not given from the file of `--config`, if there is one.
    pub fn with_file(self) -> Result<Self, ConfigError> {
        let Some(path) = self.config.clone() else { return Ok(self) };
        let text = read_bounded(&path)?;
        self.with_text(&path, &text)
    }

    fn with_text(self, path: &Path, text: &str) -> Result<Self, ConfigError> {
        let file: Self = toml::from_str(text).map_err(|error| ConfigError::File {
            path: path.to_owned(),
            problem: error.to_string().trim_end().to_owned(),
        })?;
        Ok(Self {
            data_dir: self.data_dir.or(file.data_dir),
            listen: self.listen.or(file.listen),
            peer_listen: self.peer_listen.or(file.peer_listen),
            advertise_url: self.advertise_url.or(file.advertise_url),
            join: self.join.or(file.join),
            advertise_peer: self.advertise_peer.or(file.advertise_peer),
            default_cluster: self.default_cluster.or(file.default_cluster),
            election_timeout: self.election_timeout.or(file.election_timeout),
            terminated_keep: self.terminated_keep.or(file.terminated_keep),
            snapshot_every: self.snapshot_every.or(file.snapshot_every),
            disk_reserve: self.disk_reserve.or(file.disk_reserve),
            log: self.log.or(file.log),
            config: self.config,
        })
    }

    /// Checks everything.
    pub fn settle(self) -> Result<Settings, ConfigError> {
        let data_dir = self.data_dir.ok_or_else(|| wrong("data-dir", "is missing"))?;
        let listen = self.listen.ok_or_else(|| wrong("listen", "is missing"))?;
        let peer_listen = self.peer_listen.ok_or_else(|| wrong("peer-listen", "is missing"))?;
        if listen == peer_listen && listen.port() != 0 {
            return Err(wrong("peer-listen", format!("must differ from --listen ({listen})")));
        }
        let advertise_url = match self.advertise_url {
            Some(url) => check_url("advertise-url", &url)?,
            None if listen.ip().is_unspecified() || listen.port() == 0 => {
                return Err(wrong(
                    "advertise-url",
                    format!("is missing, and --listen {listen} does not say where others reach this replica"),
                ));
            }
            None => format!("http://{listen}"),
        };
        let join = self.join.as_deref().map(parse_join).transpose()?.unwrap_or_default();
        let advertise_peer = match self.advertise_peer {
            Some(addr) if is_host_port(&addr) => addr,
            Some(addr) => {
                return Err(wrong("advertise-peer", format!("is {addr:?}, which is not HOST:PORT")));
            }
            None if !join.is_empty() && (peer_listen.ip().is_unspecified() || peer_listen.port() == 0) => {
                return Err(wrong(
                    "advertise-peer",
                    format!(
                        "is missing, and --peer-listen {peer_listen} does not say where peers reach this replica"
                    ),
                ));
            }
            None => peer_listen.to_string(),
        };
        if let Some(cluster) = &self.default_cluster {
            check_cluster("default-cluster", cluster).map_err(field)?;
        }
        let duration = |flag, text: Option<String>, default_ms, min_ms, max_ms| {
            let Some(text) = text else { return Ok(default_ms) };
            let ms = parse_duration_ms(flag, &text).map_err(field)?;
            if ms < min_ms || ms > max_ms {
                return Err(wrong(flag, format!("is {text}, but must be from {min_ms}ms to {max_ms}ms")));
            }
            Ok(ms)
        };
        let election_timeout_ms = duration(
            "election-timeout",
            self.election_timeout,
            ELECTION_TIMEOUT_MS_DEFAULT,
            ELECTION_TIMEOUT_MS_MIN,
            ELECTION_TIMEOUT_MS_MAX,
        )?;
        let terminated_keep_ms = duration(
            "terminated-keep",
            self.terminated_keep,
            TERMINATED_KEEP_MS_DEFAULT,
            TERMINATED_KEEP_MS_MIN,
            TERMINATED_KEEP_MS_MAX,
        )?;
        let snapshot_every = self.snapshot_every.unwrap_or(SNAPSHOT_EVERY_DEFAULT);
        if !(SNAPSHOT_EVERY_MIN..=SNAPSHOT_EVERY_MAX).contains(&snapshot_every) {
            return Err(wrong(
                "snapshot-every",
                format!("is {snapshot_every}, but must be from {SNAPSHOT_EVERY_MIN} to {SNAPSHOT_EVERY_MAX}"),
            ));
        }
        let disk_reserve_bytes = match self.disk_reserve {
            Some(text) => parse_size("disk-reserve", &text)?,
            None => DISK_RESERVE_BYTES_DEFAULT,
        };
        Ok(Settings {
            store: StoreConfig {
                data_dir,
                peer_listen,
                advertise_url: advertise_url.clone(),
                terminated_keep_ms,
                election_timeout_ms,
                snapshot_every,
                disk_reserve_bytes,
            },
            listen,
            advertise_url,
            join,
            advertise_peer,
            default_cluster: self.default_cluster,
            log: self.log,
        })
    }
}

/// `1048576`, `1024KiB`, `1MiB` or `1GiB`, in bytes.
fn parse_size(flag: &'static str, text: &str) -> Result<u64, ConfigError> {
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("", 0)];
    let size = units.iter().find_map(|(unit, shift)| {
        let number = text.trim().strip_suffix(unit)?.trim_end();
        number.parse::<u64>().ok()?.checked_mul(1 << shift)
    });
    match size {
        Some(size) if size <= DISK_RESERVE_BYTES_MAX => Ok(size),
        Some(_) => Err(wrong(flag, format!("is {text}, but must be at most 1024GiB"))),
        None => Err(wrong(flag, format!("is {text:?}, not a size like 64MiB"))),
    }
}

fn read_bounded(path: &Path) -> Result<String, ConfigError> {
    use std::io::Read;
    let failed = |problem: String| ConfigError::File { path: path.to_owned(), problem };
    let file = std::fs::File::open(path).map_err(|e| failed(e.to_string()))?;
    let mut text = String::new();
    let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|e| failed(e.to_string()))?;
    if read as u64 > FILE_BYTES_MAX {
        return Err(failed(format!("is larger than {FILE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// `http(s)://host[:port][/path]`, without the slashes at the end.
fn check_url(flag: &'static str, url: &str) -> Result<String, ConfigError> {
    let trimmed = url.trim_end_matches('/');
    match trimmed.parse::<axum::http::Uri>() {
        Ok(uri)
            if matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.host().is_some_and(|host| !host.is_empty())
                && uri.query().is_none() =>
        {
            Ok(trimmed.to_owned())
        }
        _ => Err(wrong(flag, format!("is {url:?}, which is not http://HOST:PORT"))),
    }
}

fn parse_join(text: &str) -> Result<Vec<String>, ConfigError> {
    let urls: Vec<String> = text
        .split(',')
        .map(str::trim)
        .filter(|url| !url.is_empty())
        .map(|url| check_url("join", url))
        .collect::<Result<_, _>>()?;
    if urls.is_empty() || urls.len() > JOIN_URLS_MAX {
        return Err(wrong("join", format!("has {} URLs, but must have 1 to {JOIN_URLS_MAX}", urls.len())));
    }
    Ok(urls)
}

fn is_host_port(addr: &str) -> bool {
    addr.len() <= raft_store::PEER_ADDR_BYTES_MAX
        && addr
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(args: &[&str]) -> Flags {
        let all = ["holdfast-controller"].iter().chain(args);
        Flags::try_parse_from(all).unwrap()
    }

    fn complete(more: &[&str]) -> Result<Settings, ConfigError> {
        let base = ["--data-dir=/tmp/x", "--listen=127.0.0.1:7101", "--peer-listen=127.0.0.1:7201"];
        let kept: Vec<&str> = base
            .iter()
            .filter(|arg| {
                let name = arg.split_once('=').unwrap().0;
                !more.iter().any(|m| m.starts_with(&format!("{name}=")) || *m == format!("no{name}"))
            })
            .copied()
            .chain(more.iter().filter(|m| !m.starts_with("no")).copied())
            .collect();
        given(&kept).settle()
    }

    #[test]
    fn a_full_command_line_is_settled() {
        let settings = complete(&["--election-timeout=200ms"]).unwrap();
        assert_eq!(settings.advertise_url, "http://127.0.0.1:7101");
        assert_eq!(settings.store.election_timeout_ms, 200);
        assert!(settings.join.is_empty());
        let joining = complete(&["--join=http://a:1/, http://b:2"]).unwrap();
        assert_eq!(joining.join, ["http://a:1", "http://b:2"]);
        assert_eq!(joining.advertise_peer, "127.0.0.1:7201");
    }

    #[test]
    fn sizes_have_binary_units() {
        let reserve =
            |text: &str| complete(&[&format!("--disk-reserve={text}")]).unwrap().store.disk_reserve_bytes;
        assert_eq!(complete(&[]).unwrap().store.disk_reserve_bytes, 64 << 20);
        assert_eq!((reserve("0"), reserve("5"), reserve("3KiB"), reserve("2 GiB")), (0, 5, 3 << 10, 2 << 30));
    }

    #[test]
    fn each_wrong_setting_is_named() {
        for (args, flag) in [
            (&["no--data-dir"][..], "data-dir"),
            (&["no--listen"], "listen"),
            (&["no--peer-listen"], "peer-listen"),
            (&["--peer-listen=127.0.0.1:7101"], "peer-listen"),
            (&["--join=nonsense"], "join"),
            (&["--join=,"], "join"),
            (&["--join=http://a:1", "--peer-listen=0.0.0.0:7201"], "advertise-peer"),
            (&["--advertise-peer=a"], "advertise-peer"),
            (&["--listen=0.0.0.0:1"], "advertise-url"),
            (&["--advertise-url=ftp://a"], "advertise-url"),
            (&["--default-cluster=a b"], "default-cluster"),
            (&["--election-timeout=1"], "election-timeout"),
            (&["--election-timeout=1ms"], "election-timeout"),
            (&["--snapshot-every=1"], "snapshot-every"),
            (&["--terminated-keep=1ms"], "terminated-keep"),
            (&["--disk-reserve=64MB"], "disk-reserve"),
            (&["--disk-reserve=-1"], "disk-reserve"),
            (&["--disk-reserve=1025GiB"], "disk-reserve"),
        ] {
            match complete(args) {
                Err(ConfigError::Flag { flag: named, .. }) => assert_eq!(named, flag, "{args:?}"),
                other => panic!("{args:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn the_file_fills_what_flags_leave_out() {
        let text = "listen = \"127.0.0.1:1\"\njoin = \"http://a\"\ndata-dir = \"/file\"";
        let flags = given(&["--data-dir=/flag"]).with_text(Path::new("f"), text).unwrap();
        assert_eq!(flags.data_dir.as_deref(), Some(Path::new("/flag")));
        assert_eq!(flags.listen, Some("127.0.0.1:1".parse().unwrap()));
        assert_eq!(flags.join.as_deref(), Some("http://a"));
        let error = given(&[]).with_text(Path::new("f"), "colour = 1").unwrap_err();
        assert!(error.to_string().contains("colour"), "{error}");
    }
}
