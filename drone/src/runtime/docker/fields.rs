//! What a container is asked to be: Plane's fields, checked. Each refusal names its field.

use bollard::auth::DockerCredentials;
use holdfast_wire::FieldError;
use holdfast_wire::http::DockerExecutable;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use tracing::warn;

/// Period of the CPU quota where none is given, in microseconds: the kernel's.
const CPU_PERIOD_US_DEFAULT: i64 = 100_000;
/// Periods that the kernel takes, in microseconds.
const CPU_PERIOD_US: std::ops::RangeInclusive<i64> = 1_000..=1_000_000;
/// Smallest quota that the kernel takes, in microseconds.
const CPU_QUOTA_US_MIN: i64 = 1_000;
/// Longest image reference, in bytes.
const IMAGE_BYTES_MAX: usize = 1_024;
/// Longest name of a network, in bytes.
const NETWORK_BYTES_MAX: usize = 256;

/// When to ask the image's registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PullPolicy {
    /// If the image is not here.
    IfNotPresent,
    /// Each time.
    Always,
    /// Not at all.
    Never,
}

/// What to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum MountField {
    /// Nothing.
    None,
    /// The key's own directory.
    OfKey,
    /// A directory of this name.
    Path(String),
}

/// Limits; none where nothing was said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) cpu_period_us: Option<i64>,
    pub(super) cpu_quota_us: Option<i64>,
    /// CPU time in all, in seconds.
    pub(super) cpu_time_s: Option<i64>,
    pub(super) memory_bytes: Option<i64>,
    pub(super) disk_bytes: Option<i64>,
}

/// A checked [`DockerExecutable`].
pub(super) struct ContainerFields {
    /// With a tag or digest: without, an engine would pull all tags.
    pub(super) image: String,
    pub(super) pull_policy: PullPolicy,
    pub(super) credentials: Option<DockerCredentials>,
    pub(super) env: BTreeMap<String, String>,
    pub(super) limits: Limits,
    pub(super) mount: MountField,
    pub(super) network: Option<String>,
}

impl ContainerFields {
    pub(super) fn check(executable: &DockerExecutable) -> Result<Self, FieldError> {
        Ok(Self {
            image: image(&executable.image)?,
            pull_policy: pull_policy(executable.pull_policy.as_deref())?,
            credentials: credentials(executable.credentials.as_ref())?,
            env: env(&executable.env)?,
            limits: limits(&executable.resource_limits)?,
            mount: mount(executable.mount.as_ref())?,
            network: network(executable.network_name.as_deref())?,
        })
    }
}

fn image(image: &str) -> Result<String, FieldError> {
    const FIELD: &str = "executable.image";
    if image.len() > IMAGE_BYTES_MAX {
        return Err(FieldError::new(FIELD, format!("must have at most {IMAGE_BYTES_MAX} bytes")));
    }
    if image.is_empty() || !image.bytes().all(|b| b.is_ascii_alphanumeric() || b"./:@_-[]".contains(&b)) {
        return Err(FieldError::new(FIELD, "is no image reference"));
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    Ok(if last.contains([':', '@']) { image.to_owned() } else { format!("{image}:latest") })
}

fn pull_policy(policy: Option<&str>) -> Result<PullPolicy, FieldError> {
    match policy {
        None | Some("IfNotPresent") => Ok(PullPolicy::IfNotPresent),
        Some("Always") => Ok(PullPolicy::Always),
        Some("Never") => Ok(PullPolicy::Never),
        Some(_) => Err(FieldError::new("executable.pull_policy", "must be IfNotPresent, Always or Never")),
    }
}

fn credentials(value: Option<&Value>) -> Result<Option<DockerCredentials>, FieldError> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
    match (text("username"), text("password")) {
        (Some(username), Some(password)) => Ok(Some(DockerCredentials {
            username: Some(username),
            password: Some(password),
            ..DockerCredentials::default()
        })),
        _ => Err(FieldError::new("executable.credentials", "must be {username, password}")),
    }
}

fn env(env: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, FieldError> {
    const FIELD: &str = "executable.env";
    if env.keys().any(|name| name.is_empty() || name.contains('=')) {
        return Err(FieldError::new(FIELD, "has a name that is empty or holds '='"));
    }
    if env.iter().any(|(name, value)| name.contains('\0') || value.contains('\0')) {
        return Err(FieldError::new(FIELD, "must not hold NUL bytes"));
    }
    Ok(env.clone())
}

fn limits(value: &Value) -> Result<Limits, FieldError> {
    let limits = match value {
        Value::Null => return Ok(Limits::default()),
        Value::Object(limits) => limits,
        _ => return Err(FieldError::new("executable.resource_limits", "must be an object")),
    };
    for name in limits.keys() {
        let known =
            ["cpu_period", "cpu_period_percent", "cpu_time_limit", "memory_limit_bytes", "disk_limit_bytes"];
        if !known.contains(&name.as_str()) {
            warn!("executable.resource_limits.{name} is unknown: there is no such limit");
        }
    }
    let cpu_period_us = positive(limits, "cpu_period", "executable.resource_limits.cpu_period")?;
    if cpu_period_us.is_some_and(|period| !CPU_PERIOD_US.contains(&period)) {
        let problem = format!("must be {} to {} microseconds", CPU_PERIOD_US.start(), CPU_PERIOD_US.end());
        return Err(FieldError::new("executable.resource_limits.cpu_period", problem));
    }
    const PERCENT: &str = "executable.resource_limits.cpu_period_percent";
    let cpu_quota_us = match positive(limits, "cpu_period_percent", PERCENT)? {
        None => None,
        // Plane's type. More than one CPU is more than 100.
        Some(percent) if percent > i64::from(u8::MAX) => {
            return Err(FieldError::new(PERCENT, "must be at most 255"));
        }
        Some(percent) => {
            let quota = cpu_period_us.unwrap_or(CPU_PERIOD_US_DEFAULT) * percent / 100;
            if quota < CPU_QUOTA_US_MIN {
                let problem =
                    format!("is less than {CPU_QUOTA_US_MIN} microseconds of the period, the least there is");
                return Err(FieldError::new(PERCENT, problem));
            }
            Some(quota)
        }
    };
    Ok(Limits {
        cpu_period_us,
        cpu_quota_us,
        cpu_time_s: positive(limits, "cpu_time_limit", "executable.resource_limits.cpu_time_limit")?,
        memory_bytes: positive(
            limits,
            "memory_limit_bytes",
            "executable.resource_limits.memory_limit_bytes",
        )?,
        disk_bytes: positive(limits, "disk_limit_bytes", "executable.resource_limits.disk_limit_bytes")?,
    })
}

/// A whole number above 0. To the engine 0 means no limit, which nobody means who says it.
fn positive(limits: &Map<String, Value>, name: &str, field: &'static str) -> Result<Option<i64>, FieldError> {
    match limits.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_i64() {
            Some(number) if number > 0 => Ok(Some(number)),
            _ => Err(FieldError::new(field, "must be a whole number above 0")),
        },
    }
}

fn mount(value: Option<&Value>) -> Result<MountField, FieldError> {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => Ok(MountField::None),
        Some(Value::Bool(true)) => Ok(MountField::OfKey),
        Some(Value::String(path)) => Ok(MountField::Path(path.clone())),
        Some(_) => Err(FieldError::new("executable.mount", "must be true, false or a path")),
    }
}

fn network(name: Option<&str>) -> Result<Option<String>, FieldError> {
    const FIELD: &str = "executable.network_name";
    let Some(name) = name else { return Ok(None) };
    // In these a backend's port is not its own, or cannot be reached; or they are the name of another container.
    if ["host", "none"].contains(&name) || name.contains(':') {
        return Err(FieldError::new(FIELD, "must be a network in which a container has its own ports"));
    }
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if name.is_empty() || name.len() > NETWORK_BYTES_MAX || !name.bytes().all(fits) {
        return Err(FieldError::new(FIELD, "is no name of a network"));
    }
    Ok(Some(name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(value: Value) -> Result<ContainerFields, FieldError> {
        let mut object = json!({"image": "registry.example:5000/team/app:1"});
        object.as_object_mut().unwrap().extend(value.as_object().unwrap().clone());
        ContainerFields::check(&serde_json::from_value(object).unwrap())
    }

    #[test]
    fn planes_form_is_understood() {
        let fields = check(json!({
            "pull_policy": "Always",
            "credentials": {"username": "u", "password": "p"},
            "env": {"A": "1"},
            "resource_limits": {
                "cpu_period": 50_000, "cpu_period_percent": 150, "cpu_time_limit": 60,
                "memory_limit_bytes": 100_000_000, "disk_limit_bytes": null,
            },
            "mount": "data",
            "network_name": "team",
            "later": "ignored",
        }))
        .unwrap();
        assert_eq!(fields.pull_policy, PullPolicy::Always);
        assert_eq!(fields.credentials.unwrap().username.as_deref(), Some("u"));
        let expected = Limits {
            cpu_period_us: Some(50_000),
            cpu_quota_us: Some(75_000),
            cpu_time_s: Some(60),
            memory_bytes: Some(100_000_000),
            disk_bytes: None,
        };
        assert_eq!(fields.limits, expected);
        assert_eq!(fields.mount, MountField::Path("data".to_owned()));
        let fields = check(json!({"resource_limits": {"cpu_period_percent": 20}, "mount": true})).unwrap();
        assert_eq!(
            (fields.limits.cpu_quota_us, fields.pull_policy),
            (Some(20_000), PullPolicy::IfNotPresent)
        );
        assert_eq!(fields.mount, MountField::OfKey);
        let fields = check(json!({"mount": false, "credentials": null})).unwrap();
        assert_eq!((fields.mount, fields.limits), (MountField::None, Limits::default()));
    }

    #[test]
    fn a_reference_without_a_tag_means_the_latest() {
        for (given, meant) in [
            ("app", "app:latest"),
            ("registry:5000/app", "registry:5000/app:latest"),
            ("app:1", "app:1"),
            ("app@sha256:00", "app@sha256:00"),
        ] {
            assert_eq!(image(given).unwrap(), meant);
        }
        assert!(image("a b").is_err() && image("").is_err() && image(&"a".repeat(2_000)).is_err());
    }

    #[test]
    fn a_refusal_names_its_field() {
        for (value, field) in [
            (json!({"pull_policy": "Sometimes"}), "executable.pull_policy"),
            (json!({"credentials": {"username": "u"}}), "executable.credentials"),
            (json!({"credentials": "u:p"}), "executable.credentials"),
            (json!({"env": {"A=B": "1"}}), "executable.env"),
            (json!({"env": {"A": "1\u{0}"}}), "executable.env"),
            (json!({"resource_limits": [1]}), "executable.resource_limits"),
            (json!({"resource_limits": {"cpu_period": 10}}), "executable.resource_limits.cpu_period"),
            (json!({"resource_limits": {"cpu_period": "1s"}}), "executable.resource_limits.cpu_period"),
            (
                json!({"resource_limits": {"cpu_period_percent": 0}}),
                "executable.resource_limits.cpu_period_percent",
            ),
            (
                json!({"resource_limits": {"cpu_period_percent": 256}}),
                "executable.resource_limits.cpu_period_percent",
            ),
            (
                json!({"resource_limits": {"cpu_period": 1_000, "cpu_period_percent": 50}}),
                "executable.resource_limits.cpu_period_percent",
            ),
            (json!({"resource_limits": {"cpu_time_limit": -1}}), "executable.resource_limits.cpu_time_limit"),
            (
                json!({"resource_limits": {"memory_limit_bytes": 1.5}}),
                "executable.resource_limits.memory_limit_bytes",
            ),
            (
                json!({"resource_limits": {"disk_limit_bytes": 0}}),
                "executable.resource_limits.disk_limit_bytes",
            ),
            (json!({"mount": 1}), "executable.mount"),
            (json!({"network_name": "host"}), "executable.network_name"),
            (json!({"network_name": "container:abc"}), "executable.network_name"),
            (json!({"network_name": "a/b"}), "executable.network_name"),
        ] {
            assert_eq!(check(value.clone()).err().map(|e| e.field), Some(field), "{value}");
        }
    }
}
