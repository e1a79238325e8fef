//! What `dev` starts: names, ports, directories, flags. No IO in here.

use crate::args::DevArgs;
use crate::error::CliError;
use holdfast_client::wire::LeaseConfig;
use holdfast_client::wire::http::InitCluster;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

/// From a controller's port to the one on which it listens for its peers.
const PEER_PORT_OFFSET: u16 = 100;

/// One process to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// What it is called in messages.
    pub(crate) label: String,
    pub(crate) args: Vec<String>,
    pub(crate) log: PathBuf,
}

/// One controller to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Controller {
    pub(crate) id: u16,
    pub(crate) url: String,
    pub(crate) listen: SocketAddr,
    pub(crate) peer_listen: SocketAddr,
    pub(crate) process: Process,
}

/// One drone to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Drone {
    pub(crate) name: String,
    pub(crate) process: Process,
}

/// A whole cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The one cluster name that controllers and drones use.
    pub(crate) cluster: String,
    pub(crate) controllers: Vec<Controller>,
    pub(crate) drones: Vec<Drone>,
    lease: Option<LeaseConfig>,
}

impl Plan {
    /// The cluster that `args` describe, with everything it keeps under `dir`.
    pub(crate) fn new(args: &DevArgs, dir: &Path) -> Result<Self, CliError> {
        let address = |offset: u16| match args.base_port.checked_add(offset) {
            Some(port) if args.base_port > 0 => Ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            _ => Err(CliError::Usage(format!(
                "--base-port {} leaves no room: ports up to {PEER_PORT_OFFSET} + {} after it are needed",
                args.base_port, args.controllers
            ))),
        };
        let cluster = format!("localhost:{}", args.base_port);
        let path = |name: &str| dir.join(name).display().to_string();
        let mut addresses = Vec::new();
        for id in 1..=args.controllers {
            addresses.push((id, address(id)?, address(PEER_PORT_OFFSET + id)?));
        }
        let controllers: Vec<Controller> = addresses
            .into_iter()
            .map(|(id, listen, peer_listen)| {
                let (name, url) = (format!("controller-{id}"), format!("http://{listen}"));
                let flags = vec![
                    ("--data-dir", path(&name)),
                    ("--listen", listen.to_string()),
                    ("--peer-listen", peer_listen.to_string()),
                    ("--advertise-url", url.clone()),
                    ("--default-cluster", cluster.clone()),
                ];
                let log = dir.join(format!("{name}.log"));
                let process = Process { label: format!("controller {id}"), args: words(flags), log };
                Controller { id, url, listen, peer_listen, process }
            })
            .collect();
        let urls = controllers.iter().map(|c| c.url.as_str()).collect::<Vec<_>>().join(",");
        let drones = (1..=args.drones)
            .zip('a'..='z')
            .map(|(number, letter)| {
                let (name, directory) = (format!("dr-{letter}"), format!("drone-{number}"));
                let flags = vec![
                    ("--name", name.clone()),
                    ("--controller", urls.clone()),
                    ("--cluster", cluster.clone()),
                    ("--data-dir", path(&directory)),
                    ("--runtime", "process".to_owned()),
                    ("--ip", Ipv4Addr::LOCALHOST.to_string()),
                    // Most developers are not root.
                    ("--shared-user", "true".to_owned()),
                ];
                let log = dir.join(format!("{directory}.log"));
                let process = Process { label: format!("drone {name}"), args: words(flags), log };
                Drone { name, process }
            })
            .collect();
        Ok(Self { cluster, controllers, drones, lease: args.lease })
    }

    /// What forms the cluster.
    pub(crate) fn init(&self) -> InitCluster {
        let members = self.controllers.iter().map(|controller| controller.peer_listen.to_string()).collect();
        InitCluster { members, lease: self.lease }
    }

    /// Where the controllers answer.
    pub(crate) fn urls(&self) -> Vec<String> {
        self.controllers.iter().map(|controller| controller.url.clone()).collect()
    }
}

fn words(flags: Vec<(&str, String)>) -> Vec<String> {
    flags.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(base_port: u16) -> DevArgs {
        DevArgs { controllers: 3, drones: 2, base_port, data_dir: None, lease: None }
    }

    #[test]
    fn the_default_ports_are_the_contracts() {
        let plan = Plan::new(&args(7100), Path::new("/d")).unwrap();
        let first = &plan.controllers[0];
        assert_eq!(
            first.process.args.join(" "),
            "--data-dir /d/controller-1 --listen 127.0.0.1:7101 --peer-listen 127.0.0.1:7201 \
             --advertise-url http://127.0.0.1:7101 --default-cluster localhost:7100"
        );
        assert_eq!(plan.init().members, ["127.0.0.1:7201", "127.0.0.1:7202", "127.0.0.1:7203"]);
        assert_eq!(
            plan.drones[1].process.args.join(" "),
            "--name dr-b --controller http://127.0.0.1:7101,http://127.0.0.1:7102,http://127.0.0.1:7103 \
             --cluster localhost:7100 --data-dir /d/drone-2 --runtime process --ip 127.0.0.1 --shared-user true"
        );
        assert_eq!(plan.drones[1].process.log, Path::new("/d/drone-2.log"));
    }

    #[test]
    fn a_lease_is_passed_on() {
        let lease = "renew=1s,soft=2s,hard=3s,expiry=4s".parse().unwrap();
        let plan = Plan::new(&DevArgs { lease: Some(lease), ..args(7100) }, Path::new("/d")).unwrap();
        assert_eq!(plan.init().lease, Some(lease));
    }

    #[test]
    fn ports_past_the_last_are_refused() {
        assert!(Plan::new(&args(65_432), Path::new("/d")).is_ok());
        assert!(matches!(Plan::new(&args(65_433), Path::new("/d")), Err(CliError::Usage(_))));
        assert!(matches!(Plan::new(&args(0), Path::new("/d")), Err(CliError::Usage(_))));
    }
}
