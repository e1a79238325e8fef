//! `POST /ctrl/connect`: gets a key and starts its backend, or finds the backend that holds it.
//!
//! ```text
//!             held here? ──yes──▶ linearizable read ──same tag──▶ answer (no log entry)
//!   request ──┤                        │  └─other tag──▶ KeyHeld        ▲
//!             └─free──▶ propose Acquire ◀─free─┘                        │
//!                          │   └──Acquired / Found──────────────────────┘
//!                          └──Leaving──▶ wait until the key is freed, then look again
//! ```
//!
//! The order "local look, then the log" is only the cheaper one for free keys: whatever this replica believes, `apply`
//! decides. Answers come from the outcome or from the read that decided, never from local state, which may lag.

use crate::app::App;
use crate::http::args::Consistency;
use crate::http::error::Failure;
use crate::hub::{Topic, Watch};
use crate::session::DRONE_FRAME_BYTES_MAX;
use crate::{ids, token};
use holdfast_core::command::{Acquire, Command, Idempotency, Spawn};
use holdfast_core::outcome::{Holder, Outcome, Refusal};
use holdfast_wire::http::{ConnectRequest, ConnectResponse, SpawnConfig};
use holdfast_wire::{ApiErrorKind, BackendState, BackendStatus, KeyConfig};
use serde_json::{Map, Value};
use std::time::Duration;
use tokio::time::Instant;

/// How often candidates are picked anew after `apply` found none of them fit.
const NO_DRONE_TRIES_MAX: u32 = 2;
/// Longest executable, in bytes of the JSON that is kept and sent. It can be longer than what came: `1e15` becomes
/// `1000000000000000.0`.
pub const EXECUTABLE_BYTES_MAX: usize = 256 * 1024;
/// Most bytes of a spawn message besides its executable. Key, tag and names are at most some KiB, escapes included.
const SPAWN_EXTRA_BYTES_MAX: usize = 16 * 1024;
/// Most levels of objects and lists in an executable. JSON readers stop at 127, and the spawn message that carries it to
/// the drone has some levels more than the request that brought it here.
const EXECUTABLE_DEPTH_MAX: usize = 100;
const _: () = assert!(EXECUTABLE_BYTES_MAX + SPAWN_EXTRA_BYTES_MAX < DRONE_FRAME_BYTES_MAX);
/// How often a generated backend id is made anew after it turned out to be used.
const ID_TRIES_MAX: u32 = 3;

/// A checked request with everything that it leaves open filled in.
#[derive(Debug)]
struct Plan {
    key: KeyConfig,
    /// The name was made here, so nobody can hold it yet.
    key_is_new: bool,
    spawn: Option<PlannedSpawn>,
    user: Option<String>,
    auth: Map<String, Value>,
    wait: Duration,
}

#[derive(Debug)]
struct PlannedSpawn {
    config: SpawnConfig,
    cluster: String,
    executable_json: String,
}

impl Plan {
    fn new(request: ConnectRequest, default_cluster: Option<&str>) -> Result<Self, Failure> {
        request.check()?;
        let wait = Duration::from_millis(request.capped_wait_ms());
        let auth_bytes = serde_json::to_string(&request.auth).map_or(usize::MAX, |text| text.len());
        if auth_bytes > token::AUTH_BYTES_MAX {
            return Err(Failure::invalid(
                "auth",
                format!("is {auth_bytes} bytes of JSON, at most {} are allowed", token::AUTH_BYTES_MAX),
            ));
        }
        let spawn = request.spawn_config.map(|config| {
            let cluster =
                config.cluster.clone().or_else(|| default_cluster.map(str::to_owned)).ok_or_else(|| {
                    Failure::new(
                        ApiErrorKind::NoClusterProvided,
                        "spawn_config.cluster is missing, and this controller has no default cluster",
                    )
                })?;
            let executable_json = executable_json(&config.executable)?;
            Ok::<_, Failure>(PlannedSpawn { config, cluster, executable_json })
        });
        let key_is_new = request.key.is_none();
        Ok(Self {
            key: request.key.unwrap_or_else(|| KeyConfig { name: ids::key_name(), ..KeyConfig::default() }),
            key_is_new,
            spawn: spawn.transpose()?,
            user: request.user,
            auth: request.auth,
            wait,
        })
    }

    fn topic(&self) -> Topic {
        Topic::Key { namespace: self.key.namespace.clone(), name: self.key.name.clone() }
    }

    /// The command, with fresh random parts.
    fn acquire(&self, candidates: Vec<i32>) -> Command {
        let spawn = self.spawn.as_ref().map(|spawn| {
            let seconds = |s: Option<i32>| s.and_then(|s| u32::try_from(s).ok());
            Spawn {
                backend_id: spawn.config.id.clone().unwrap_or_else(ids::backend_id),
                id_supplied: spawn.config.id.is_some(),
                cluster: spawn.cluster.clone(),
                pool: spawn.config.pool.clone(),
                candidates,
                executable_json: spawn.executable_json.clone(),
                lifetime_limit_seconds: seconds(spawn.config.lifetime_limit_seconds),
                max_idle_seconds: seconds(spawn.config.max_idle_seconds),
                static_token: spawn.config.use_static_token.then(ids::secret),
                secret_token: ids::secret(),
                subdomain: spawn.config.subdomain.clone(),
            }
        });
        Command::Acquire(Box::new(Acquire { key: self.key.clone(), spawn }))
    }
}

/// An executable as it is kept and sent, if a drone can read it.
fn executable_json(executable: &Value) -> Result<String, Failure> {
    const FIELD: &str = "spawn_config.executable";
    if is_deeper(executable, EXECUTABLE_DEPTH_MAX) {
        return Err(Failure::invalid(FIELD, format!("has more than {EXECUTABLE_DEPTH_MAX} levels")));
    }
    let text = executable.to_string();
    if text.len() > EXECUTABLE_BYTES_MAX {
        return Err(Failure::invalid(
            FIELD,
            format!("is {} bytes of JSON, at most {EXECUTABLE_BYTES_MAX} are allowed", text.len()),
        ));
    }
    Ok(text)
}

/// Whether `value` has more than `levels` levels. Recursion ends with them.
fn is_deeper(value: &Value, levels: usize) -> bool {
    let inner = |value: &Value| is_deeper(value, levels - 1);
    match value {
        Value::Array(items) => levels == 0 || items.iter().any(inner),
        Value::Object(fields) => levels == 0 || fields.values().any(inner),
        _ => false,
    }
}

/// What a look at the key shows.
#[derive(Debug, PartialEq, Eq)]
enum Look {
    Free,
    Same(Box<Holder>),
    Leaving(Box<Holder>),
    OtherTag(String),
}

/// Reads a holder as a connect with `tag` has to.
fn look(holder: Option<Holder>, tag: &str) -> Look {
    match holder {
        None => Look::Free,
        Some(holder) if holder.key.tag != tag => Look::OtherTag(holder.key.tag),
        Some(holder) if holder.is_waited_for => Look::Leaving(Box::new(holder)),
        Some(holder) => Look::Same(Box::new(holder)),
    }
}

/// One round.
#[derive(Debug)]
enum Step {
    Done {
        holder: Box<Holder>,
        spawned: bool,
        /// Cluster time of the decision, in milliseconds.
        now_ms: u64,
        replayed: bool,
    },
    Leaving(Box<Holder>),
}

/// An answered connect.
#[derive(Debug)]
pub struct Connected {
    /// The answer.
    pub response: ConnectResponse,
    /// It is the recorded one of an earlier request.
    pub replayed: bool,
}

/// See the module.
pub async fn connect(
    app: &App,
    request: ConnectRequest,
    idempotency: Option<Idempotency>,
) -> Result<Connected, Failure> {
    let plan = Plan::new(request, app.settings.default_cluster.as_deref())?;
    let deadline = Instant::now() + plan.wait;
    let mut watch: Option<[Watch; 2]> = None;
    loop {
        match round(app, &plan, idempotency.as_ref()).await? {
            Step::Done { holder, spawned, now_ms, replayed } => {
                let secret = app.token_secret().await?;
                let response =
                    respond(&plan, &secret, &app.settings.advertise_url, *holder, spawned, now_ms)?;
                return Ok(Connected { response, replayed });
            }
            Step::Leaving(holder) => match &mut watch {
                // The watch must begin before the look that it waits on: look once more.
                None => {
                    // A backend that its drone may not have can also turn out to be there.
                    let backend = Topic::Backend(holder.backend_id.clone());
                    watch = Some([app.hub.watch(plan.topic()), app.hub.watch(backend)]);
                }
                Some(watch) => wait(app, watch, deadline, &holder).await?,
            },
        }
    }
}

/// Waits until the key may have been freed.
async fn wait(
    app: &App,
    [key, backend]: &mut [Watch; 2],
    deadline: Instant,
    holder: &Holder,
) -> Result<(), Failure> {
    let _place = app.wait_for_key()?;
    tokio::select! {
        () = key.changed() => Ok(()),
        () = backend.changed() => Ok(()),
        () = tokio::time::sleep_until(deadline) => Err(still_held(holder)),
        () = app.stopping.cancelled() => Err(Failure::stopping()),
    }
}

fn still_held(holder: &Holder) -> Failure {
    Failure::new(
        ApiErrorKind::KeyHeld,
        format!(
            "the key is still held by backend {}, which is going away ({}{})",
            holder.backend_id,
            holder.state.status(),
            match holder.termination_asked {
                Some(_) => ", its end was asked for",
                None if holder.state.status() < BackendStatus::Terminating => ", its drone does not have it",
                None => "",
            },
        ),
    )
}

fn other_tag(held: &str) -> Failure {
    Refusal::TagMismatch { held: held.to_owned() }.into()
}

async fn round(app: &App, plan: &Plan, idempotency: Option<&Idempotency>) -> Result<Step, Failure> {
    if idempotency.is_none() {
        let local = app.store.local();
        let held_here = !plan.key_is_new
            && local
                .view
                .key(&plan.key.namespace, &plan.key.name)?
                .is_some_and(|key| key.expires_at_ms > local.now_ms);
        if held_here || plan.spawn.is_none() {
            if let Some(step) = read(app, plan).await? {
                return Ok(step);
            }
            if plan.spawn.is_none() {
                return Err(Refusal::NoSpawnConfig.into());
            }
        }
    }
    propose(app, plan, idempotency).await
}

/// Looks at the key with a linearizable read. `None`: it is free.
async fn read(app: &App, plan: &Plan) -> Result<Option<Step>, Failure> {
    let point = app.read(Consistency::Linearizable).await?;
    let holder = point.view.holder(&plan.key, point.now_ms)?;
    seen(look(holder, &plan.key.tag), point.now_ms)
}

fn seen(look: Look, now_ms: u64) -> Result<Option<Step>, Failure> {
    match look {
        Look::Free => Ok(None),
        Look::Same(holder) => Ok(Some(Step::Done { holder, spawned: false, now_ms, replayed: false })),
        Look::Leaving(holder) => Ok(Some(Step::Leaving(holder))),
        Look::OtherTag(held) => Err(other_tag(&held)),
    }
}

async fn propose(app: &App, plan: &Plan, idempotency: Option<&Idempotency>) -> Result<Step, Failure> {
    let local = || {
        let local = app.store.local();
        (local.view, local.now_ms)
    };
    let mut drones = app.drones.get(local).await?;
    let mut term = None;
    let mut no_drone_tries = 0;
    let mut id_tries = 0;
    let mut look_again = false;
    loop {
        let pick = |drones: &crate::schedule::DroneList, term| match &plan.spawn {
            Some(spawn) => drones.pick(&spawn.cluster, &spawn.config.pool, term, &mut rand::rng()),
            None => Vec::new(),
        };
        let mut candidates = if look_again { Vec::new() } else { pick(&drones, term) };
        if candidates.is_empty() && plan.spawn.is_some() {
            // This replica may lag behind: before giving up, look at the state as of now.
            let point = app.read(Consistency::Linearizable).await?;
            if idempotency.is_none()
                && let Some(step) =
                    seen(look(point.view.holder(&plan.key, point.now_ms)?, &plan.key.tag), point.now_ms)?
            {
                return Ok(step);
            }
            drones = app.drones.newer_than(Instant::now(), (point.view, point.now_ms)).await?;
            term = Some(point.term);
            candidates = pick(&drones, term);
            // Without a drone an entry would say no more than this; but an Idempotency-Key may have an answer already.
            if candidates.is_empty() && idempotency.is_none() {
                return Err(Refusal::NoDrone.into());
            }
        }
        look_again = false;
        let answer = app.propose(plan.acquire(candidates), idempotency.cloned()).await?;
        let (now_ms, replayed) = (answer.cluster_time_ms, answer.replayed);
        let done = |holder, spawned| Step::Done { holder: Box::new(holder), spawned, now_ms, replayed };
        match answer.outcome {
            Outcome::Acquired(holder) => return Ok(done(holder, true)),
            Outcome::Found(holder) => return Ok(done(holder, false)),
            Outcome::Leaving(holder) => return Ok(Step::Leaving(Box::new(holder))),
            Outcome::Refused(Refusal::NoDrone) if no_drone_tries < NO_DRONE_TRIES_MAX => {
                no_drone_tries += 1;
                look_again = true;
            }
            Outcome::Refused(Refusal::BackendIdUsed(_))
                if id_tries < ID_TRIES_MAX
                    && plan.spawn.as_ref().is_some_and(|spawn| spawn.config.id.is_none()) =>
            {
                id_tries += 1;
            }
            other => return Err(Failure::unexpected(&other)),
        }
    }
}

fn respond(
    plan: &Plan,
    secret: &[u8; 32],
    advertise_url: &str,
    holder: Holder,
    spawned: bool,
    now_ms: u64,
) -> Result<ConnectResponse, Failure> {
    let token = match &holder.static_token {
        Some(token) => token.clone(),
        None => {
            let payload = token::Payload {
                backend_id: holder.backend_id.clone(),
                user: plan.user.clone(),
                auth: plan.auth.clone(),
                expires_at_ms: now_ms.saturating_add(token::TOKEN_VALID_MS),
            };
            token::sign(secret, &payload).map_err(|error| {
                Failure::new(ApiErrorKind::Other, format!("the token can't be made: {error}"))
            })?
        }
    };
    Ok(ConnectResponse {
        spawned,
        status: holder.state.status(),
        url: url(&holder.cluster, holder.subdomain.as_deref(), &token),
        token,
        subdomain: holder.subdomain,
        secret_token: Some(holder.secret_token),
        status_url: format!("{advertise_url}/pub/b/{}/status", holder.backend_id),
        drone: Some(holder.drone),
        key: holder.key,
        fencing_token: holder.token,
        address: match holder.state {
            BackendState::Ready { address } => Some(address),
            _ => None,
        },
        backend_id: holder.backend_id,
    })
}

/// Where a proxy serves a backend: `https` if the cluster has no port or port 443.
fn url(cluster: &str, subdomain: Option<&str>, token: &str) -> String {
    let port = cluster.rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
    let scheme = if port.is_none_or(|port| port == "443") { "https" } else { "http" };
    match subdomain {
        Some(subdomain) => format!("{scheme}://{subdomain}.{cluster}/{token}/"),
        None => format!("{scheme}://{cluster}/{token}/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_wire::drone::{AcquiredKey, Action, ActionMessage, MessageToDrone};
    use holdfast_wire::limits::{
        KEY_NAME_BYTES_MAX, KEY_NAMESPACE_BYTES_MAX, KEY_TAG_BYTES_MAX, NAME_BYTES_MAX, WAIT_MS_DEFAULT,
        WAIT_MS_MAX,
    };
    use holdfast_wire::{Deadlines, TerminationKind, TerminationReason};
    use serde_json::json;

    fn holder(tag: &str, state: BackendState) -> Holder {
        Holder {
            is_waited_for: state.status() >= BackendStatus::Terminating,
            key: KeyConfig { name: "k".into(), namespace: String::new(), tag: tag.into() },
            backend_id: "ba-1".into(),
            cluster: "c.example".into(),
            drone: "dr-a".into(),
            token: 17,
            state,
            termination_asked: None,
            static_token: None,
            secret_token: "secret".into(),
            subdomain: None,
        }
    }

    fn request(value: Value) -> ConnectRequest {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_look_tells_free_same_leaving_and_other_tag_apart() {
        assert_eq!(look(None, "t"), Look::Free);
        let ready = holder("t", BackendState::Ready { address: "127.0.0.1:1".parse().unwrap() });
        assert_eq!(look(Some(ready.clone()), "t"), Look::Same(Box::new(ready.clone())));
        assert_eq!(look(Some(ready.clone()), "u"), Look::OtherTag("t".into()));
        let asked = Holder { termination_asked: Some(TerminationKind::Soft), is_waited_for: true, ..ready };
        assert_eq!(look(Some(asked.clone()), "t"), Look::Leaving(Box::new(asked)));
        let killed = holder(
            "t",
            BackendState::HardTerminating {
                last_status: BackendStatus::Ready,
                reason: TerminationReason::KeyExpired,
            },
        );
        // The other tag is said first: waiting would not help.
        assert_eq!(look(Some(killed.clone()), "u"), Look::OtherTag("t".into()));
        assert!(matches!(look(Some(killed), "t"), Look::Leaving(_)));
    }

    #[test]
    fn a_request_without_a_key_gets_a_random_one_and_without_a_cluster_the_default() {
        let spawn = json!({"spawn_config": {"executable": {"command": ["x"]}}});
        let plan = Plan::new(request(spawn.clone()), Some("c:1")).unwrap();
        assert!(plan.key.name.starts_with("lk-") && plan.key_is_new);
        assert_eq!(plan.spawn.as_ref().unwrap().cluster, "c:1");
        let failure = Plan::new(request(spawn), None).unwrap_err();
        assert_eq!(failure.kind, ApiErrorKind::NoClusterProvided);
        assert!(Plan::new(request(json!({"key": {"name": "k"}})), None).unwrap().spawn.is_none());
    }

    fn spawning(executable: Value) -> Value {
        json!({"spawn_config": {"executable": executable}})
    }

    /// An executable of `levels` levels and one more.
    fn nested(levels: usize) -> Value {
        let deep = (0..levels).fold(json!(1), |inner, _| json!([inner]));
        json!({"command": ["x"], "more": deep})
    }

    #[test]
    fn the_largest_spawn_reaches_the_drone() {
        let fill = EXECUTABLE_BYTES_MAX - r#"{"command":[""]}"#.len();
        let largest = json!({"command": ["x".repeat(fill)]});
        for executable in [largest, nested(EXECUTABLE_DEPTH_MAX - 1)] {
            let mut value = spawning(executable);
            let quotes = |count| "\"".repeat(count);
            value["key"] = json!({"name": quotes(KEY_NAME_BYTES_MAX), "namespace": quotes(KEY_NAMESPACE_BYTES_MAX),
                                  "tag": quotes(KEY_TAG_BYTES_MAX)});
            let plan = Plan::new(request(value), Some("c:1")).unwrap();
            let spawn = plan.spawn.unwrap();
            let deadlines =
                Deadlines { renew_at: i64::MIN, soft_terminate_at: i64::MIN, hard_terminate_at: i64::MIN };
            let message = MessageToDrone::Action(ActionMessage {
                action_id: format!("ak-{}-{}", u64::MAX, u32::MAX),
                backend_id: "b".repeat(NAME_BYTES_MAX),
                drone_id: i32::MIN,
                action: Action::Spawn {
                    executable: serde_json::from_str(&spawn.executable_json).unwrap(),
                    key: AcquiredKey { key: plan.key, deadlines, token: u64::MAX },
                    static_token: Some(ids::secret()),
                    incarnation: Some("i".repeat(128)),
                },
            });
            let text = serde_json::to_string(&message).unwrap();
            assert!(text.len() <= EXECUTABLE_BYTES_MAX + SPAWN_EXTRA_BYTES_MAX, "{}", text.len());
            assert_eq!(serde_json::from_str::<MessageToDrone>(&text).unwrap(), message);
        }
    }

    #[test]
    fn a_longer_wait_is_capped() {
        let wait = |value| Plan::new(request(value), None).unwrap().wait;
        assert_eq!(wait(json!({"wait_ms": u64::MAX})), Duration::from_millis(WAIT_MS_MAX));
        assert_eq!(wait(json!({"wait_ms": 7})), Duration::from_millis(7));
        assert_eq!(wait(json!({})), Duration::from_millis(WAIT_MS_DEFAULT));
    }

    #[test]
    fn bad_fields_are_named() {
        let numbers = format!(r#"{{"command":["x"],"more":[1{}]}}"#, ",1e15".repeat(20_000));
        assert!(numbers.len() < EXECUTABLE_BYTES_MAX / 2);
        for (value, named) in [
            (json!({"key": {"name": ""}}), "key.name"),
            (json!({"key": {"name": "a\nb"}}), "key.name"),
            (json!({"key": {"name": "k", "tag": "x".repeat(257)}}), "key.tag"),
            (json!({"auth": {"a": "x".repeat(5000)}}), "auth"),
            (spawning(json!({"command": ["x".repeat(EXECUTABLE_BYTES_MAX)]})), "spawn_config.executable"),
            // Short as it came, long as it is kept.
            (spawning(serde_json::from_str(&numbers).unwrap()), "spawn_config.executable"),
            (spawning(nested(EXECUTABLE_DEPTH_MAX)), "spawn_config.executable"),
            (json!({"spawn_config": {"executable": {}}}), "spawn_config.executable"),
        ] {
            let failure = Plan::new(request(value), Some("c:1")).unwrap_err();
            assert_eq!(failure.kind, ApiErrorKind::InvalidRequest);
            assert!(failure.message.starts_with(named), "{}", failure.message);
        }
    }

    #[test]
    fn urls_are_https_unless_the_cluster_has_another_port() {
        assert_eq!(url("c.example", None, "t"), "https://c.example/t/");
        assert_eq!(url("c.example:443", Some("s"), "t"), "https://s.c.example:443/t/");
        assert_eq!(url("127.0.0.1:9090", None, "t"), "http://127.0.0.1:9090/t/");
        assert_eq!(url("[::1]", None, "t"), "https://[::1]/t/");
    }

    #[test]
    fn only_a_ready_backend_has_an_address_and_a_static_token_is_the_token() {
        let plan = Plan::new(request(json!({"key": {"name": "k"}, "user": "ann"})), None).unwrap();
        let address = "127.0.0.1:80".parse().unwrap();
        let answer = |holder| respond(&plan, &[1; 32], "http://c1", holder, false, 5).unwrap();
        let waiting = answer(holder("", BackendState::Waiting { address }));
        assert_eq!((waiting.address, waiting.status), (None, BackendStatus::Waiting));
        let payload = token::verify(&[1; 32], &waiting.token, 5, |_, _| false).unwrap();
        assert_eq!((payload.backend_id.as_str(), payload.user.as_deref()), ("ba-1", Some("ann")));
        let fixed =
            Holder { static_token: Some("fixed".into()), ..holder("", BackendState::Ready { address }) };
        let ready = answer(fixed);
        assert_eq!((ready.address, ready.token.as_str(), ready.fencing_token), (Some(address), "fixed", 17));
        assert_eq!(ready.status_url, "http://c1/pub/b/ba-1/status");
        assert_eq!(ready.url, "https://c.example/fixed/");
    }
}
