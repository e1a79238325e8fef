//! Golden scripts: each file in `scripts/` is a rule of the state machine, named as a sentence. After a deliberate
//! change run with `UPDATE_GOLDENFILES=1` and read the difference.
//!
//! Entries (each takes `idem=KEY digest=N` and `at=TIME`, an own stamp):
//! `form [renew= soft= hard= expiry= keep=]` · `set_lease …` · `drone NAME INCARNATION SESSION [take_over=true pool= data= from=]`
//! (one of ours if it gives a data id) · `list DRONE [BACKEND[:STATUS]…]` (the whole list of its session) ·
//! `listed DRONE SESSION BACKEND@TOKEN…` (one entry of a list) ·
//! `heartbeat DRONE SESSION LOCAL_TIME` · `acquire KEY [BACKEND DRONE…] [ns= tag= supplied= cluster= pool= lifetime= max_idle=]` ·
//! `renew DRONE BACKEND… [token=]` · `allow_renewal KEY` · `prevent_renewal KEY` · `revoke KEY` ·
//! `report DRONE BACKEND STATUS… [token= data=]` · `ack DRONE ACTION…` · `terminate BACKEND [kind=]` ·
//! `drain NAME [deadline=]` · `undrain NAME` · `leaving DRONE SESSION` · `end_due` ·
//! `activity DRONE INCARNATION NUMBER BACKEND busy|IDLE_FOR [token=]` · `revoke_tokens BACKEND USER` · `sweep [KEY INDEXED_AT TOKEN]` · `sweep_records` ·
//! `tick` · `blank` · `members ID…` (a membership entry). DRONE is an id.
//!
//! The rest: `advance TIME` (the leader's clock), `clock TIME`, `leader TERM [own_term_only=]`, `skip ENTRIES`,
//! `due DRONE [after=ACTION session=]`, `published`, `dump TABLE`. TIME is in seconds.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Replica, form, idempotent, plain, register, state_of};
use goldenscript::{ArgumentConsumer, Command as ScriptCommand};
use holdfast_core::codec::decode;
use holdfast_core::command::{
    ActivityReport, Command, FromDrone, Listed, Proposal, Renew, RenewKey, ReportStates, Stamp, StateReport,
    Sweep, SweepKey,
};
use holdfast_core::kv::{ReadState, Table, Writes, keys};
use holdfast_core::outcome::{Effect, Holder, Outcome};
use holdfast_core::records::{
    ActionRecord, BackendRecord, DroneRecord, IdempotencyRecord, KeyRecord, MemberIdsRecord, PendingAction,
    Presence, SpawnTarget,
};
use holdfast_wire::{
    BackendState, BackendStatus, KeyConfig, LeaseConfig, TerminationKind, TerminationReason,
};
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

struct World {
    replica: Replica,
    /// What the last list said that holds no key.
    not_held: String,
    term: u64,
    clock_ms: u64,
    own_term_only: bool,
}

fn seconds(ms: u64) -> String {
    if ms.is_multiple_of(1000) {
        format!("{}s", ms / 1000)
    } else {
        format!("{}.{:03}s", ms / 1000, ms % 1000)
    }
}

fn ms(text: &str) -> Result<u64> {
    let seconds: f64 = text.trim_end_matches('s').parse()?;
    Ok((seconds * 1000.0).round() as u64)
}

fn time_arg(args: &mut ArgumentConsumer<'_>, name: &str) -> Result<Option<u64>> {
    args.lookup(name).map(|arg| ms(&arg.value)).transpose()
}

fn next(args: &mut ArgumentConsumer<'_>, what: &str) -> Result<String> {
    Ok(args.next_pos().ok_or_else(|| format!("{what} is missing"))?.value.clone())
}

fn rest(args: &mut ArgumentConsumer<'_>) -> Vec<String> {
    args.rest_pos().into_iter().map(|arg| arg.value.clone()).collect()
}

fn text_arg(args: &mut ArgumentConsumer<'_>, name: &str) -> String {
    args.lookup(name).map_or_else(String::new, |arg| arg.value.clone())
}

fn lease(args: &mut ArgumentConsumer<'_>) -> Result<LeaseConfig> {
    let mut lease = common::LEASE;
    for (name, part) in [
        ("renew", &mut lease.renew_ms),
        ("soft", &mut lease.soft_terminate_ms),
        ("hard", &mut lease.hard_terminate_ms),
        ("expiry", &mut lease.expiry_ms),
    ] {
        if let Some(ms) = time_arg(args, name)? {
            *part = ms;
        }
    }
    Ok(lease)
}

fn data_arg(args: &mut ArgumentConsumer<'_>) -> Option<String> {
    args.lookup("data").map(|arg| arg.value.clone())
}

fn status(text: &str) -> Result<BackendStatus> {
    common::STATUSES
        .into_iter()
        .find(|status| status.as_str() == text)
        .ok_or_else(|| format!("{text} is no status").into())
}

impl World {
    fn new() -> Self {
        Self {
            replica: Replica::default(),
            not_held: String::new(),
            term: 1,
            clock_ms: 0,
            own_term_only: false,
        }
    }

    fn command(&mut self, name: &str, args: &mut ArgumentConsumer<'_>) -> Result<Command> {
        Ok(match name {
            "form" => {
                let keep_ms = time_arg(args, "keep")?.unwrap_or(3_600_000);
                form(lease(args)?, keep_ms)
            }
            "set_lease" => Command::SetLease(lease(args)?),
            "drone" => {
                let take_over = args.lookup_parse("take_over")?.unwrap_or(false);
                let pool = text_arg(args, "pool");
                let (data, from) = (data_arg(args), text_arg(args, "from"));
                let name = next(args, "the name")?;
                let incarnation = next(args, "the incarnation")?;
                let mut command = register(&name, &incarnation, &next(args, "the session")?, take_over);
                if let Command::RegisterDrone(register) = &mut command {
                    register.pool = pool;
                    register.data_id = data;
                    register.address = from;
                }
                command
            }
            "heartbeat" => {
                let drone_id = next(args, "the drone")?.parse()?;
                let session = next(args, "the session")?;
                let local_time_ms = i64::try_from(ms(&next(args, "the local time")?)?)?;
                Command::Heartbeats(vec![common::heartbeat(drone_id, &session, local_time_ms)])
            }
            "acquire" => {
                let key = KeyConfig {
                    name: next(args, "the key")?,
                    namespace: text_arg(args, "ns"),
                    tag: text_arg(args, "tag"),
                };
                let id_supplied = args.lookup_parse("supplied")?.unwrap_or(false);
                let pool = text_arg(args, "pool");
                let cluster = args.lookup("cluster").map_or("c", |arg| &arg.value).to_owned();
                let lifetime_limit_seconds = args.lookup_parse("lifetime")?;
                let max_idle_seconds = args.lookup_parse("max_idle")?;
                let spawn = match args.next_pos() {
                    None => None,
                    Some(id) => {
                        let drones = rest(args)
                            .iter()
                            .map(|d| d.parse())
                            .collect::<std::result::Result<Vec<_>, _>>()?;
                        let mut spawn = common::spawn(&id.value, &drones);
                        spawn.id_supplied = id_supplied;
                        spawn.pool = pool;
                        spawn.cluster = cluster;
                        spawn.lifetime_limit_seconds = lifetime_limit_seconds;
                        spawn.max_idle_seconds = max_idle_seconds;
                        Some(spawn)
                    }
                };
                common::acquire(key, spawn)
            }
            "renew" => {
                let drone_id = next(args, "the drone")?.parse()?;
                let token = args.lookup_parse("token")?;
                let keys = rest(args).into_iter().map(|backend_id| RenewKey { backend_id, token }).collect();
                Command::Renew(Renew { drone_id, keys })
            }
            "allow_renewal" | "prevent_renewal" => Command::SetAllowRenew {
                namespace: text_arg(args, "ns"),
                name: next(args, "the key")?,
                allow: name == "allow_renewal",
            },
            "revoke" => Command::RevokeKey { namespace: text_arg(args, "ns"), name: next(args, "the key")? },
            "report" => {
                let drone_id = next(args, "the drone")?.parse()?;
                let backend_id = next(args, "the backend")?;
                let token = args.lookup_parse("token")?;
                let data_id = data_arg(args);
                let reports = rest(args)
                    .iter()
                    .map(|text| {
                        Ok(StateReport {
                            backend_id: backend_id.clone(),
                            state: state_of(status(text)?),
                            token,
                        })
                    })
                    .collect::<Result<_>>()?;
                Command::ReportStates(ReportStates { drone_id, data_id, reports })
            }
            "ack" => {
                let drone_id = next(args, "the drone")?.parse()?;
                Command::AckActions { drone_id, action_ids: rest(args) }
            }
            "terminate" => Command::Terminate {
                kind: match text_arg(args, "kind").as_str() {
                    "hard" => TerminationKind::Hard,
                    _ => TerminationKind::Soft,
                },
                reason: TerminationReason::External,
                backend_id: next(args, "the backend")?,
            },
            "drain" | "undrain" => Command::Drain {
                cluster: "c".to_owned(),
                draining: name == "drain",
                deadline_in_ms: time_arg(args, "deadline")?,
                drone: next(args, "the drone")?,
            },
            "leaving" => Command::Together(vec![FromDrone::Leaving {
                drone_id: next(args, "the drone")?.parse()?,
                session: next(args, "the session")?,
            }]),
            "activity" => {
                let token = args.lookup_parse("token")?;
                let drone_id = next(args, "the drone")?.parse()?;
                let incarnation = next(args, "the incarnation")?;
                let activity_id = next(args, "the number")?.parse()?;
                let backend_id = next(args, "the backend")?;
                let idle_ms = match next(args, "busy or the idle time")?.as_str() {
                    "busy" => None,
                    idle => Some(ms(idle)?),
                };
                let items = vec![ActivityReport { backend_id, token, idle_ms }];
                Command::Together(vec![FromDrone::Activity { drone_id, incarnation, activity_id, items }])
            }
            "list" => {
                let drone_id = next(args, "the drone")?.parse()?;
                let backends = rest(args)
                    .iter()
                    .map(|text| {
                        let (id, state) = text.split_once(':').unwrap_or((text, "ready"));
                        Ok(common::listed_backend(id, Some(status(state)?)))
                    })
                    .collect::<Result<Vec<_>>>()?;
                let differences = common::list(&self.replica.view(), drone_id, &backends);
                self.not_held = differences.not_held.join(" ");
                common::listed(&differences)
            }
            // One entry of a list, as it may arrive late.
            "listed" => {
                let drone_id = next(args, "the drone")?.parse()?;
                let session = next(args, "the session")?;
                let absent = rest(args)
                    .iter()
                    .map(|text| {
                        let (id, token) = text.split_once('@').ok_or("BACKEND@TOKEN")?;
                        Ok((id.to_owned(), token.parse()?))
                    })
                    .collect::<Result<Vec<_>>>()?;
                let listed = Listed {
                    drone_id,
                    session,
                    absent,
                    ending: Vec::new(),
                    received: Vec::new(),
                    last: false,
                };
                Command::Together(vec![FromDrone::Listed(listed)])
            }
            "end_due" => Command::EndDue,
            "revoke_tokens" => Command::RevokeTokens {
                backend_id: next(args, "the backend")?,
                user: next(args, "the user")?,
            },
            "sweep" => Command::Sweep(match args.next_pos() {
                None => Sweep {
                    keys: self.replica.view().expired_candidates(self.clock_ms, 100)?,
                    records: false,
                },
                Some(key) => Sweep {
                    keys: vec![SweepKey {
                        name: key.value.clone(),
                        namespace: text_arg(args, "ns"),
                        indexed_at_ms: ms(&next(args, "the time in the index")?)?,
                        token: next(args, "the token")?.parse()?,
                    }],
                    records: false,
                },
            }),
            "sweep_records" => Command::Sweep(Sweep { keys: Vec::new(), records: true }),
            "tick" => Command::Tick,
            other => return Err(format!("there is no command {other}").into()),
        })
    }

    fn entry(&mut self, name: &str, args: &mut ArgumentConsumer<'_>) -> Result<String> {
        let idem = text_arg(args, "idem");
        let digest = args.lookup_parse("digest")?.unwrap_or(1);
        let cluster_time_ms = time_arg(args, "at")?.unwrap_or(self.clock_ms);
        let command = self.command(name, args)?;
        args.reject_rest()?;
        let proposal: Proposal =
            if idem.is_empty() { plain(command) } else { idempotent(command, &idem, digest) };
        let before = self.replica.state.clone();
        let stamp = Stamp { cluster_time_ms, own_term_only: self.own_term_only };
        let (applied, writes) = self.replica.apply(self.term, stamp, &proposal);
        common::tables_agree(&self.replica.state);

        let mut out = String::new();
        let now = seconds(self.replica.progress().cluster_time_ms);
        let replayed = if applied.replayed { " (replayed)" } else { "" };
        writeln!(out, "#{} {now}: {}{replayed}", self.replica.index, show_outcome(&applied.outcome))?;
        writeln!(out, "    wrote: {}", show_writes(&before, &writes)?)?;
        if !applied.effects.is_empty() {
            let effects: Vec<String> = applied.effects.iter().map(show_effect).collect();
            writeln!(out, "    wakes: {}", effects.join(", "))?;
        }
        if !self.not_held.is_empty() {
            writeln!(out, "    to end at once: {}", std::mem::take(&mut self.not_held))?;
        }
        Ok(out)
    }

    fn due(&self, args: &mut ArgumentConsumer<'_>) -> Result<String> {
        let drone_id = next(args, "the drone")?.parse()?;
        let after = args.lookup("after").map(|arg| keys::split_action_id(&arg.value).ok_or("an action id"));
        let limit = args.lookup_parse("limit")?.unwrap_or(100);
        let session = args.lookup("session").map(|arg| arg.value.clone());
        args.reject_rest()?;
        let drone = self.replica.view().drone(drone_id)?.ok_or("no such drone")?;
        let session = session.unwrap_or(drone.session);
        let view = self.replica.view();
        let due = view.due_actions(drone_id, &session, after.transpose()?, self.clock_ms, limit)?;
        let mut out = String::new();
        for action in due {
            writeln!(out, "{} {}", action.action_id, show_action(&action.record, action.lease_from_ms))?;
        }
        if out.is_empty() {
            out.push_str("nothing is due\n");
        }
        Ok(out)
    }

    fn dump(&self, table: &str) -> Result<String> {
        let mut out = String::new();
        let table = Table::ALL.into_iter().find(|t| t.name() == table).ok_or("no such table")?;
        for (key, value) in self.replica.state.scan(table, &[], None, usize::MAX)? {
            let line = match table {
                Table::Meta if key == keys::PROGRESS => {
                    let p = self.replica.progress();
                    format!(
                        "time={} keys={} idempotency={} supplied={} last_drone={}",
                        seconds(p.cluster_time_ms),
                        p.keys_held,
                        p.idempotency_records,
                        p.supplied_ids,
                        p.last_drone_id
                    )
                }
                Table::Meta if key == keys::MEMBER_IDS => {
                    let used: MemberIdsRecord = decode(&value)?;
                    format!("used member ids={:?}", used.ranges())
                }
                Table::Meta => {
                    let c = self.replica.view().cluster()?.ok_or("no cluster")?;
                    format!(
                        "cluster={} lease={} keep={}",
                        c.cluster_id,
                        c.lease,
                        seconds(c.terminated_keep_ms)
                    )
                }
                Table::Keys => show_key(&key, &decode(&value)?),
                Table::KeyExpiry => {
                    let (at, pair) = keys::split_timed(&key).ok_or("an entry")?;
                    let token = u64::from_be_bytes(value.as_slice().try_into()?);
                    format!("{} {} token={token}", seconds(at), show_pair(pair))
                }
                Table::Backends => show_backend(&key, &decode(&value)?),
                Table::Terminated | Table::IdempotencyExpiry | Table::BackendEnds | Table::SuppliedEnds => {
                    let (at, name) = keys::split_timed(&key).ok_or("an entry")?;
                    format!("{} {}", seconds(at), String::from_utf8_lossy(name))
                }
                Table::DroneBackends => {
                    let drone = keys::split_drone(&key[..4]).ok_or("a drone")?;
                    let token = u64::from_be_bytes(value.as_slice().try_into()?);
                    let id = keys::split_drone_backend(&key).ok_or("a backend")?;
                    format!("drone={drone} {id} token={token}")
                }
                Table::DronesHeard => {
                    let (at, drone) = keys::split_timed(&key).ok_or("an entry")?;
                    format!("{} drone={}", seconds(at), keys::split_drone(drone).ok_or("a drone")?)
                }
                Table::DrainEnds => {
                    let (at, drone) = keys::split_timed(&key).ok_or("an entry")?;
                    let drone = keys::split_drone(drone).ok_or("a drone")?;
                    format!(
                        "{} drone={drone} looked up to {:?}",
                        seconds(at),
                        String::from_utf8_lossy(&value)
                    )
                }
                Table::SuppliedIds => String::from_utf8_lossy(&key).into_owned(),
                Table::Drones => show_drone(&key, &decode(&value)?),
                Table::DroneNames => {
                    format!("{} id={}", show_pair(&key), keys::split_drone(&value).ok_or("an id")?)
                }
                Table::Actions => {
                    let (index, sub) = keys::split_action(&key).ok_or("an action")?;
                    let drone = keys::split_drone(&key[..4]).ok_or("a drone")?;
                    format!("drone={drone} ak-{index}-{sub} {}", show_action(&decode(&value)?, None))
                }
                Table::Idempotency => {
                    let record: IdempotencyRecord = decode(&value)?;
                    format!(
                        "{} until={} index={} {}",
                        String::from_utf8_lossy(&key),
                        seconds(record.expires_at_ms),
                        record.index,
                        show_outcome(&record.outcome)
                    )
                }
            };
            writeln!(out, "{line}")?;
        }
        if out.is_empty() {
            out.push_str("empty\n");
        }
        Ok(out)
    }
}

impl goldenscript::Runner for World {
    fn run(&mut self, command: &ScriptCommand) -> Result<String> {
        let mut args = command.consume_args();
        match command.name.as_str() {
            "advance" => self.clock_ms += ms(&next(&mut args, "how long")?)?,
            "clock" => self.clock_ms = ms(&next(&mut args, "the time")?)?,
            "leader" => {
                self.own_term_only = args.lookup_parse("own_term_only")?.unwrap_or(false);
                self.term = next(&mut args, "the term")?.parse()?;
            }
            "skip" => {
                for _ in 0..next(&mut args, "how many")?.parse()? {
                    self.replica.blank(self.term);
                }
            }
            "blank" => {
                self.replica.blank(self.term);
                let p = self.replica.progress();
                return Ok(format!("#{} {}: blank", self.replica.index, seconds(p.cluster_time_ms)));
            }
            "members" => {
                let ids = rest(&mut args)
                    .iter()
                    .map(|id| id.parse())
                    .collect::<std::result::Result<Vec<_>, _>>()?;
                let before = self.replica.state.clone();
                let writes = self.replica.members(self.term, &ids);
                let now = seconds(self.replica.progress().cluster_time_ms);
                let wrote = show_writes(&before, &writes)?;
                return Ok(format!("#{} {now}: membership\n    wrote: {wrote}", self.replica.index));
            }
            "published" => {
                let published: Vec<u64> = self.replica.progress().published.iter().map(|p| p.0).collect();
                return Ok(format!(
                    "{} from {:?} to {:?}",
                    published.len(),
                    published.first(),
                    published.last()
                ));
            }
            "due" => return self.due(&mut args),
            "dump" => return self.dump(&next(&mut args, "the table")?),
            name => return self.entry(name, &mut args),
        }
        args.reject_rest()?;
        Ok(String::new())
    }
}

fn show_pair(key: &[u8]) -> String {
    match keys::split_pair(key) {
        Some(("", name)) => name.to_owned(),
        Some((namespace, name)) => format!("{namespace}/{name}"),
        None => format!("{key:?}"),
    }
}

fn show_key(name: &[u8], key: &KeyRecord) -> String {
    let tag = if key.tag.is_empty() { String::new() } else { format!(" tag={}", key.tag) };
    let renew = if key.allow_renew { "" } else { " renewal=prevented" };
    format!(
        "{}{tag} backend={} drone={} token={} expires={} indexed={}{renew}",
        show_pair(name),
        key.backend_id,
        key.drone_id,
        key.token,
        seconds(key.expires_at_ms),
        seconds(key.indexed_at_ms),
    )
}

fn show_state(state: &BackendState) -> String {
    match state {
        BackendState::Terminated { reason: Some(reason), .. } => format!("terminated({reason:?})"),
        other => other.status().to_string(),
    }
}

fn show_backend(id: &[u8], backend: &BackendRecord) -> String {
    let history: Vec<String> =
        backend.history.iter().map(|(at, state)| format!("{}@{}", show_state(state), seconds(*at))).collect();
    let mut out = format!(
        "{} key={} drone={} token={} {}",
        String::from_utf8_lossy(id),
        show_pair(&keys::pair(&backend.key.namespace, &backend.key.name)),
        backend.drone,
        backend.token,
        history.join(" ")
    );
    match backend.presence {
        Presence::Expected => {}
        Presence::Doubtful => out.push_str(" doubtful"),
        Presence::Leaving => out.push_str(" leaving"),
    }
    if backend.spawn_repeated {
        out.push_str(" sent twice");
    }
    if let Some((kind, reason)) = backend.termination_asked {
        write!(out, " asked={kind:?}/{reason:?}").unwrap();
    }
    if let Some(at) = backend.lifetime_ends_at_ms {
        write!(out, " ends={}", seconds(at)).unwrap();
    }
    if let Some(activity) = &backend.activity {
        match activity.idle_since_ms {
            Some(at) => write!(out, " idle since {}", seconds(at)).unwrap(),
            None => out.push_str(" busy"),
        }
    }
    if !backend.revoked_users.is_empty() {
        write!(out, " revoked={:?}", backend.revoked_users).unwrap();
    }
    out
}

fn show_drone(id: &[u8], drone: &DroneRecord) -> String {
    let heartbeat = drone.heartbeat.map_or("none".to_owned(), |h| {
        format!("{} term={} local={}s", seconds(h.at_ms), h.term, h.local_time_ms / 1000)
    });
    let mut draining = drone.draining.to_string();
    if let Some(at) = drone.drain_deadline_ms {
        write!(draining, " until {}", seconds(at)).unwrap();
    }
    if drone.leaving {
        draining.push_str(" leaving");
    }
    if !drone.is_listed {
        draining.push_str(" unlisted");
    }
    format!(
        "{} {} pool={:?} incarnation={} session={} backends={} draining={draining} heartbeat={heartbeat}",
        keys::split_drone(id).unwrap_or(-1),
        drone.name,
        drone.pool,
        drone.incarnation,
        drone.session,
        drone.backend_count,
    )
}

/// `from` is from when the lease counts, if it is not the heartbeat of the acquisition.
fn show_action(record: &ActionRecord, from: Option<i64>) -> String {
    match &record.action {
        PendingAction::Spawn { target, local_time_ms, heartbeat_at_ms, lease, token, .. } => {
            let deadlines = lease.deadlines(from.unwrap_or(*local_time_ms));
            let target = match target {
                SpawnTarget::Incarnation(incarnation) => format!("incarnation={incarnation}"),
                SpawnTarget::Session { session, address } if address.is_empty() => {
                    format!("session={session}")
                }
                SpawnTarget::Session { session, address } => format!("session={session}@{address}"),
            };
            format!(
                "spawn {} token={token} {target} heartbeat_at={} local soft={}s hard={}s",
                record.backend_id,
                seconds(*heartbeat_at_ms),
                deadlines.soft_terminate_at / 1000,
                deadlines.hard_terminate_at / 1000,
            )
        }
        PendingAction::Terminate { kind, reason } => {
            format!("terminate {} {kind:?} {reason:?}", record.backend_id)
        }
    }
}

fn show_holder(holder: &Holder) -> String {
    let asked = holder.termination_asked.map_or(String::new(), |kind| format!(" asked={kind:?}"));
    format!(
        "{} on {} token={} {}{asked}",
        holder.backend_id,
        holder.drone,
        holder.token,
        show_state(&holder.state)
    )
}

fn show_outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Acquired(holder) => format!("acquired {}", show_holder(holder)),
        Outcome::Found(holder) => format!("found {}", show_holder(holder)),
        Outcome::Leaving(holder) => format!("leaving {}", show_holder(holder)),
        Outcome::Refused(refusal) => format!("refused: {refusal}"),
        other => format!("{other:?}"),
    }
}

fn show_effect(effect: &Effect) -> String {
    match effect {
        Effect::Actions { drone_id } => format!("actions of {drone_id}"),
        Effect::Backend { backend_id } => backend_id.clone(),
        Effect::KeyFreed { namespace, name } => {
            format!("{} freed", show_pair(&keys::pair(namespace, name)))
        }
        Effect::Session { drone_id, session } => format!("session {session} of {drone_id}"),
        Effect::Formed => "formed".to_owned(),
        Effect::Everything => "everything".to_owned(),
    }
}

/// How many records of each table are new, changed or gone. Progress changes always and is left out.
fn show_writes(before: &impl ReadState, writes: &Writes) -> Result<String> {
    let mut counts: BTreeMap<(Table, char), usize> = BTreeMap::new();
    for ((table, key), value) in writes {
        if *table == Table::Meta && key == keys::PROGRESS {
            continue;
        }
        let sign = match (before.get(*table, key)?, value) {
            (None, Some(_)) => '+',
            (Some(old), Some(new)) if old == *new => '=',
            (Some(_), Some(_)) => '~',
            (Some(_), None) => '-',
            (None, None) => continue,
        };
        *counts.entry((*table, sign)).or_default() += 1;
    }
    if counts.is_empty() {
        return Ok("nothing".to_owned());
    }
    let parts: Vec<String> =
        counts.iter().map(|((table, sign), n)| format!("{}{sign}{n}", table.name())).collect();
    Ok(parts.join(" "))
}

#[test]
fn every_script_gives_what_it_says() {
    let mut scripts: Vec<_> = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    scripts.sort();
    assert!(scripts.len() >= 30, "only {} scripts were found", scripts.len());
    let mut failed = Vec::new();
    for path in scripts {
        let run = || goldenscript::run(&mut World::new(), &path);
        match std::panic::catch_unwind(run) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed.push(format!("{}: {error}", path.display())),
            Err(_) => failed.push(format!("{}: differs, see above", path.display())),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
