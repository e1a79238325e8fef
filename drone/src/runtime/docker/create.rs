//! Makes a container, without starting it: that is its guard's.

use super::fields::{ContainerFields, Limits, PullPolicy};
use super::labels::Owner;
use crate::runtime::BackendSpec;
use bollard::Docker;
use bollard::errors::Error as EngineError;
use bollard::models::{
    ContainerCreateBody, HostConfig, HostConfigLogConfig, Mount, MountType, PortBinding, ResourcesUlimits,
    RestartPolicy, RestartPolicyNameEnum,
};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, InspectNetworkOptions,
};
use futures::StreamExt;
use holdfast_wire::FieldError;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::path::Path;
use std::time::Duration;
use tokio::time::timeout;
use tracing::info;

/// Where a backend listens in its container.
pub(super) const CONTAINER_PORT: u16 = 8080;
/// Where its directory is mounted, as Plane has it.
const MOUNT_TARGET: &str = "/plane-data";
/// Where the permit is mounted: see the guard.
const PERMIT_TARGET: &str = "/.holdfast-permit";
/// Longest time for a pull. The key is renewed meanwhile.
const PULL_MAX: Duration = Duration::from_secs(600);
/// Longest time for anything else that the engine is asked for.
pub(super) const ENGINE_MAX: Duration = Duration::from_secs(60);
/// What the engine keeps of a container's output: two files of this size.
const LOG_SIZE_MAX: &str = "32m";
const LOG_FILES_MAX: &str = "2";

/// Why a container was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum CreateError {
    /// The backend asks for what is not possible.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The engine refused or failed.
    #[error("the engine cannot {what}: {source}")]
    Engine {
        /// What it was asked to.
        what: String,
        /// What it said.
        source: EngineError,
    },
    /// The engine took too long.
    #[error("the engine did not {what} within {within:?}")]
    TooLong {
        /// What it was asked to.
        what: String,
        /// The limit.
        within: Duration,
    },
    /// The drone's own files.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Waits for the engine, not for ever.
async fn ask<T>(
    what: &str,
    within: Duration,
    answer: impl Future<Output = Result<T, EngineError>>,
) -> Result<T, CreateError> {
    let what = what.to_owned();
    match timeout(within, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(CreateError::Engine { what, source }),
        Err(_) => Err(CreateError::TooLong { what, within }),
    }
}

pub(super) fn is_not_found(error: &EngineError) -> bool {
    matches!(error, EngineError::DockerResponseServerError { status_code: 404, .. })
}

/// Makes sure that the image is here, as the policy says.
pub(super) async fn image(docker: &Docker, fields: &ContainerFields) -> Result<(), CreateError> {
    let image = fields.image.as_str();
    if fields.pull_policy != PullPolicy::Always {
        let look = async {
            match docker.inspect_image(image).await {
                Ok(_) => Ok(true),
                Err(e) if is_not_found(&e) => Ok(false),
                Err(e) => Err(e),
            }
        };
        if ask(&format!("look for image {image}"), ENGINE_MAX, look).await? {
            return Ok(());
        }
        if fields.pull_policy == PullPolicy::Never {
            let problem = format!("names {image}, which is not here, and executable.pull_policy is Never");
            return Err(FieldError::new("executable.image", problem).into());
        }
    }
    info!(image, "pulling");
    let pull = async {
        let options = CreateImageOptionsBuilder::new().from_image(image).build();
        let mut progress = docker.create_image(Some(options), None, fields.credentials.clone());
        while let Some(step) = progress.next().await {
            step?;
        }
        Ok(())
    };
    ask(&format!("pull image {image}"), PULL_MAX, pull).await
}

/// Makes the container and returns its id. Nothing of it runs. The permit must exist.
pub(super) async fn container(
    docker: &Docker,
    owner: &Owner,
    spec: &BackendSpec,
    fields: &ContainerFields,
    mount: Option<&Path>,
    dir: &Path,
    permit: &Path,
) -> Result<String, CreateError> {
    if let Some(network) = &fields.network {
        let look = docker.inspect_network(network, None::<InspectNetworkOptions>);
        match ask(&format!("look for network {network}"), ENGINE_MAX, look).await {
            Err(CreateError::Engine { source, .. }) if is_not_found(&source) => {
                let problem = format!("names {network}, which is no network of this drone's engine");
                return Err(FieldError::new("executable.network_name", problem).into());
            }
            looked => drop(looked?),
        }
    }
    let mut mounts = vec![bind(permit, PERMIT_TARGET, true)?];
    if let Some(mount) = mount {
        mounts.push(bind(mount, MOUNT_TARGET, false)?);
    }
    let port = format!("{CONTAINER_PORT}/tcp");
    let binding = PortBinding {
        host_ip: Some(host_ip(spec.address.ip())),
        host_port: Some(spec.address.port().to_string()),
    };
    let body = ContainerCreateBody {
        image: Some(fields.image.clone()),
        env: Some(environment(spec, fields)),
        labels: Some(owner.labels(spec, dir)),
        exposed_ports: Some(vec![port.clone()]),
        host_config: Some(HostConfig {
            port_bindings: Some(HashMap::from([(port, Some(vec![binding]))])),
            mounts: Some(mounts),
            network_mode: fields.network.clone(),
            // Nobody but its guard starts it, and once.
            restart_policy: Some(RestartPolicy {
                name: Some(RestartPolicyNameEnum::NO),
                maximum_retry_count: None,
            }),
            log_config: Some(HostConfigLogConfig {
                typ: Some("json-file".to_owned()),
                config: Some(HashMap::from([
                    ("max-size".to_owned(), LOG_SIZE_MAX.to_owned()),
                    ("max-file".to_owned(), LOG_FILES_MAX.to_owned()),
                ])),
            }),
            ..limited(&fields.limits)
        }),
        ..ContainerCreateBody::default()
    };
    let options = CreateContainerOptionsBuilder::new().name(&owner.container_name(&spec.id)).build();
    let created = ask("create the container", ENGINE_MAX, docker.create_container(Some(options), body)).await;
    match created {
        Ok(created) => Ok(created.id),
        Err(e) if fields.limits.disk_bytes.is_some() && e.to_string().contains("storage-opt") => {
            let problem = format!("is not possible with this drone's engine: {e}");
            Err(FieldError::new("executable.resource_limits.disk_limit_bytes", problem).into())
        }
        Err(e) => Err(e),
    }
}

fn bind(source: &Path, target: &str, read_only: bool) -> Result<Mount, CreateError> {
    let source =
        source.to_str().ok_or_else(|| io::Error::other("a path that is not UTF-8 cannot be mounted"))?;
    Ok(Mount {
        source: Some(source.to_owned()),
        target: Some(target.to_owned()),
        typ: Some(MountType::BIND),
        read_only: Some(read_only),
        ..Mount::default()
    })
}

/// The image's variables are below the user's, and those below ours.
fn environment(spec: &BackendSpec, fields: &ContainerFields) -> Vec<String> {
    let mut env = fields.env.clone();
    env.extend(spec.session_env());
    env.insert("PORT".to_owned(), CONTAINER_PORT.to_string());
    env.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

fn limited(limits: &Limits) -> HostConfig {
    HostConfig {
        cpu_period: limits.cpu_period_us,
        cpu_quota: limits.cpu_quota_us,
        memory: limits.memory_bytes,
        ulimits: limits.cpu_time_s.map(|seconds| {
            vec![ResourcesUlimits { name: Some("cpu".to_owned()), soft: Some(seconds), hard: Some(seconds) }]
        }),
        storage_opt: limits.disk_bytes.map(|bytes| HashMap::from([("size".to_owned(), bytes.to_string())])),
        ..HostConfig::default()
    }
}

/// The address that the engine binds: any, where the backends are reached by one that the machine does not have (NAT).
fn host_ip(ip: IpAddr) -> String {
    match TcpListener::bind((ip, 0)) {
        Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => String::new(),
        _ => ip.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::KeyConfig;
    use holdfast_wire::http::Executable;
    use serde_json::json;

    #[test]
    fn ours_override_the_users_variables_and_limits_have_the_engines_units() {
        let executable = json!({
            "image": "app",
            "env": {"PORT": "1", "SESSION_BACKEND_ID": "mine", "A": "b=c"},
            "resource_limits": {"cpu_period_percent": 50, "cpu_time_limit": 7, "memory_limit_bytes": 10_000_000,
                "disk_limit_bytes": 5},
        });
        let Executable::Docker(docker) = Executable::parse(&executable).unwrap() else {
            panic!("a container")
        };
        let fields = ContainerFields::check(&docker).unwrap();
        let spec = BackendSpec {
            id: "ba-1".to_owned(),
            executable: Executable::Docker(docker),
            key: KeyConfig { name: "room".into(), namespace: "ns".into(), tag: "t".into() },
            token: 42,
            static_token: None,
            address: "127.0.0.1:23456".parse().unwrap(),
        };
        let expected = [
            "A=b=c",
            "PORT=8080",
            "SESSION_BACKEND_FENCING_TOKEN=42",
            "SESSION_BACKEND_ID=ba-1",
            "SESSION_BACKEND_KEY=room",
        ];
        assert_eq!(environment(&spec, &fields), expected);
        let host = limited(&fields.limits);
        assert_eq!((host.cpu_quota, host.cpu_period, host.memory), (Some(50_000), None, Some(10_000_000)));
        assert_eq!(host.ulimits.unwrap()[0].soft, Some(7));
        assert_eq!(host.storage_opt.unwrap()["size"], "5");
    }

    #[test]
    fn an_address_that_the_machine_does_not_have_is_reached_by_any() {
        assert_eq!(host_ip("127.0.0.1".parse().unwrap()), "127.0.0.1");
        assert_eq!(host_ip("192.0.2.1".parse().unwrap()), "");
    }
}
