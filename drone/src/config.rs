//! Flags, environment and file: in this order of precedence.

use crate::data_dir::OUTPUT_BYTES_MAX;
use crate::discovery::{CONTROLLERS_MAX, base_url};
use clap::{Parser, ValueEnum};
use holdfast_wire::FieldError;
use holdfast_wire::names::{check_cluster, check_drone_name, check_name_or_empty};
use serde::Deserialize;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

/// Largest `--config` file, in bytes.
const CONFIG_BYTES_MAX: u64 = 1024 * 1024;
/// Where a container engine listens, unless it is told otherwise.
const DOCKER_SOCKET_DEFAULT: &str = "/var/run/docker.sock";

/// Runs backends on this machine and keeps the leases of their keys.
#[derive(Debug, Parser)]
#[command(name = "holdfast-drone", version)]
pub struct Flags {
    /// The drone's name: begins with "dr"; a-z, 0-9 and '-'
    #[arg(long, env = "HOLDFAST_NAME")]
    name: Option<String>,
    /// Controllers to find the leader by: http://HOST:PORT[,http://HOST:PORT...]
    #[arg(long, env = "HOLDFAST_CONTROLLER", value_delimiter = ',', value_name = "URL[,URL...]")]
    controller: Option<Vec<String>>,
    /// The cluster that this drone serves
    #[arg(long, env = "HOLDFAST_CLUSTER", value_name = "HOST:PORT")]
    cluster: Option<String>,
    /// Where the drone keeps what it needs; for one drone alone
    #[arg(long, env = "HOLDFAST_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// What runs the backends [default: process]
    #[arg(long, env = "HOLDFAST_RUNTIME")]
    runtime: Option<RuntimeKind>,
    /// With --runtime docker, the engine's Unix socket [default: /var/run/docker.sock]
    #[arg(long, env = "HOLDFAST_DOCKER_SOCKET", value_name = "PATH")]
    docker_socket: Option<PathBuf>,
    /// With --runtime docker, the directory below which backends may have directories mounted [default: none may]
    #[arg(long, env = "HOLDFAST_MOUNT_BASE", value_name = "DIR")]
    mount_base: Option<PathBuf>,
    /// Start even where backends cannot be kept from the drone's own files and guards: without root
    #[arg(long, env = "HOLDFAST_SHARED_USER", num_args = 0..=1, default_missing_value = "true", value_name = "BOOL")]
    shared_user: Option<bool>,
    /// Keep so much output of all backends together, in bytes [default: 4294967296]
    #[arg(long, env = "HOLDFAST_OUTPUT_BYTES_MAX", value_name = "BYTES")]
    output_bytes_max: Option<u64>,
    /// The address that the backends listen on and are reached by [default: 127.0.0.1]
    #[arg(long, env = "HOLDFAST_IP")]
    ip: Option<IpAddr>,
    /// The pool that this drone is in [default: none]
    #[arg(long, env = "HOLDFAST_POOL")]
    pool: Option<String>,
    /// What to log, in the form of RUST_LOG [default: RUST_LOG, or info]
    #[arg(long, env = "HOLDFAST_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// A TOML file with the same names
    #[arg(long, env = "HOLDFAST_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
}

/// What runs backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuntimeKind {
    /// Processes of this machine.
    Process,
    /// Containers of this machine's engine.
    Docker,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    name: Option<String>,
    controller: Option<OneOrMany>,
    cluster: Option<String>,
    data_dir: Option<PathBuf>,
    runtime: Option<RuntimeKind>,
    docker_socket: Option<PathBuf>,
    mount_base: Option<PathBuf>,
    shared_user: Option<bool>,
    output_bytes_max: Option<u64>,
    ip: Option<IpAddr>,
    pool: Option<String>,
    log: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Wrong use: a message that names the flag.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("--{flag} {problem}")]
pub struct ConfigError {
    /// Without the dashes.
    pub flag: &'static str,
    /// Continues "--flag …".
    pub problem: String,
}

impl From<FieldError> for ConfigError {
    fn from(e: FieldError) -> Self {
        Self { flag: e.field, problem: e.problem }
    }
}

/// Checked configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The drone's name.
    pub name: String,
    /// Controllers' URLs, without a path.
    pub controllers: Vec<String>,
    /// The cluster.
    pub cluster: String,
    /// The data directory.
    pub data_dir: PathBuf,
    /// What runs backends.
    pub runtime: RuntimeKind,
    /// The container engine's Unix socket.
    pub docker_socket: PathBuf,
    /// Below this are the directories that containers may have mounted.
    pub mount_base: Option<PathBuf>,
    /// Start also where backends cannot be kept from the drone's files.
    pub shared_user: bool,
    /// Output of all backends together that is kept, in bytes.
    pub output_bytes_max: u64,
    /// The backends' address.
    pub ip: IpAddr,
    /// The pool; empty for none.
    pub pool: String,
    /// A tracing filter.
    pub log: Option<String>,
}

impl Config {
    /// Reads the file that the flags name, if any, and checks everything.
    pub fn load(flags: Flags) -> Result<Self, ConfigError> {
        let file = match &flags.config {
            None => File::default(),
            Some(path) => {
                let error = |problem: String| ConfigError {
                    flag: "config",
                    problem: format!("{}: {problem}", path.display()),
                };
                let meta = std::fs::metadata(path).map_err(|e| error(e.to_string()))?;
                if meta.len() > CONFIG_BYTES_MAX {
                    return Err(error("is too large".to_owned()));
                }
                let text = std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?;
                toml::from_str(&text).map_err(|e| error(e.to_string()))?
            }
        };
        Self::merge(flags, file)
    }

    fn merge(flags: Flags, file: File) -> Result<Self, ConfigError> {
        let missing = |flag| move || ConfigError { flag, problem: "is missing".to_owned() };
        let name = flags.name.or(file.name).ok_or_else(missing("name"))?;
        check_drone_name("name", &name)?;
        let from_file = file.controller.map(|controller| match controller {
            OneOrMany::One(text) => text.split(',').map(str::to_owned).collect(),
            OneOrMany::Many(list) => list,
        });
        let listed = flags.controller.or(from_file).ok_or_else(missing("controller"))?;
        let controllers = listed
            .iter()
            .map(|url| base_url(url))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|problem| ConfigError { flag: "controller", problem: format!("has {problem}") })?;
        if controllers.is_empty() || controllers.len() > CONTROLLERS_MAX {
            let problem = format!("must name 1 to {CONTROLLERS_MAX} controllers");
            return Err(ConfigError { flag: "controller", problem });
        }
        let cluster = flags.cluster.or(file.cluster).ok_or_else(missing("cluster"))?;
        check_cluster("cluster", &cluster)?;
        let data_dir = flags.data_dir.or(file.data_dir).ok_or_else(missing("data-dir"))?;
        let pool = flags.pool.or(file.pool).unwrap_or_default();
        check_name_or_empty("pool", &pool)?;
        let runtime = flags.runtime.or(file.runtime).unwrap_or(RuntimeKind::Process);
        let docker_socket = flags
            .docker_socket
            .or(file.docker_socket)
            .unwrap_or_else(|| PathBuf::from(DOCKER_SOCKET_DEFAULT));
        let mount_base = flags.mount_base.or(file.mount_base);
        for (flag, path) in [("docker-socket", Some(&docker_socket)), ("mount-base", mount_base.as_ref())] {
            if path.is_some_and(|path| !path.is_absolute()) {
                let problem = "must be an absolute path, which the engine knows too".to_owned();
                return Err(ConfigError { flag, problem });
            }
        }
        let ip = flags.ip.or(file.ip).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        if ip.is_unspecified() || ip.is_multicast() {
            return Err(ConfigError {
                flag: "ip",
                problem: "must be an address that backends are reached by".into(),
            });
        }
        Ok(Self {
            name,
            controllers,
            cluster,
            data_dir,
            runtime,
            docker_socket,
            mount_base,
            shared_user: flags.shared_user.or(file.shared_user).unwrap_or(false),
            output_bytes_max: flags.output_bytes_max.or(file.output_bytes_max).unwrap_or(OUTPUT_BYTES_MAX),
            ip,
            pool,
            log: flags.log.or(file.log),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(arguments: &[&str]) -> Result<Config, ConfigError> {
        Config::load(Flags::try_parse_from(std::iter::once(&"holdfast-drone").chain(arguments)).unwrap())
    }

    const GOOD: [&str; 8] = [
        "--name",
        "dr-a",
        "--controller",
        "http://h:1,http://h:2/",
        "--cluster",
        "c:1",
        "--data-dir",
        "/tmp/d",
    ];

    #[test]
    fn flags_are_enough() {
        let config = load(&GOOD).unwrap();
        assert_eq!(config.controllers, ["http://h:1", "http://h:2"]);
        assert_eq!((config.ip.to_string().as_str(), config.pool.as_str()), ("127.0.0.1", ""));
    }

    #[test]
    fn containers_are_run_by_the_usual_engine_unless_another_is_named() {
        let with = |extra: &[&str]| load(&[&GOOD, extra].concat()).unwrap();
        let config = with(&["--runtime", "docker"]);
        assert_eq!((config.runtime, config.mount_base), (RuntimeKind::Docker, None));
        assert_eq!(config.docker_socket, PathBuf::from(DOCKER_SOCKET_DEFAULT));
        assert!(!config.shared_user && with(&["--shared-user"]).shared_user);
        let config = with(&["--docker-socket", "/run/x.sock", "--mount-base", "/srv"]);
        assert_eq!((config.runtime, config.mount_base), (RuntimeKind::Process, Some(PathBuf::from("/srv"))));
        assert_eq!(config.docker_socket, PathBuf::from("/run/x.sock"));
    }

    #[test]
    fn a_bad_or_missing_value_names_its_flag() {
        for (at, value, flag) in [(1, "a", "name"), (3, "h:1", "controller"), (5, "c d", "cluster")] {
            let mut arguments = GOOD;
            arguments[at] = value;
            assert_eq!(load(&arguments).unwrap_err().flag, flag);
        }
        assert_eq!(load(&GOOD[2..]).unwrap_err().flag, "name");
        assert_eq!(load(&GOOD[..6]).unwrap_err().flag, "data-dir");
        for (extra, flag) in [
            (["--docker-socket", "docker.sock"], "docker-socket"),
            (["--mount-base", "../data"], "mount-base"),
            (["--pool", "A"], "pool"),
            (["--ip", "0.0.0.0"], "ip"),
            (["--config", "/nonexistent"], "config"),
        ] {
            let arguments: Vec<&str> = GOOD.iter().copied().chain(extra).collect();
            assert_eq!(load(&arguments).unwrap_err().flag, flag);
        }
    }

    #[test]
    fn the_file_fills_what_the_flags_leave_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drone.toml");
        let text = "name = \"dr-file\"\ncontroller = [\"http://f:1\"]\ndata-dir = \"/f\"\npool = \"gpu\"\n";
        std::fs::write(&path, text).unwrap();
        let path = path.to_str().unwrap();
        let config = load(&["--name", "dr-flag", "--cluster", "c", "--config", path]).unwrap();
        assert_eq!(config.name, "dr-flag");
        assert_eq!(config.controllers, ["http://f:1"]);
        assert_eq!(config.pool, "gpu");
        std::fs::write(path, "nam = \"dr-file\"\n").unwrap();
        let error = load(&["--config", path]).unwrap_err();
        assert!(error.flag == "config" && error.problem.contains("nam"), "{error}");
    }
}
