//! What becomes of the things that the machine asks for: see [`super::world`].

use super::world::{Dir, Guard, Io, World};
use super::*;
use crate::guard::Report;
use crate::journal::Fate;

impl World {
    /// One of the things that were asked for happens, or fails.
    pub(super) fn happen(&mut self, at: usize, ok: bool) {
        if self.io.is_empty() {
            return;
        }
        let io = self.io.remove(at % self.io.len());
        if let Some(input) = self.happens(io, ok) {
            self.step(input);
        }
    }

    pub(super) fn happens(&mut self, io: Io, ok: bool) -> Option<Input> {
        let effect = match io {
            Io::Observation(backend) => {
                let observation = self.observations.get_mut(&backend)?.pop_front()?;
                return Some(Input::Observed { backend, observation });
            }
            Io::Effect(effect) => effect,
        };
        match effect {
            Effect::Create(spawn) => {
                let backend = spawn.backend.clone();
                if self.disk.contains_key(&backend) {
                    return Some(Input::Created { backend, result: Err(CreateFailure::Exists) });
                }
                if !ok {
                    let result = Err(CreateFailure::Failed("disk full".into()));
                    return Some(Input::Created { backend, result });
                }
                let n = u16::try_from(self.disk.len()).unwrap();
                let record = Record {
                    boot_id: self.boot_id(),
                    backend: backend.clone(),
                    key: spawn.key.clone(),
                    token: spawn.token,
                    address: address(n),
                    soft_boot_ms: spawn.deadlines.soft_terminate_at,
                    hard_boot_ms: spawn.deadlines.hard_terminate_at,
                };
                self.disk.insert(backend.clone(), Dir { record: Some(record), ..Dir::default() });
                Some(Input::Created { backend, result: Ok(address(n)) })
            }
            Effect::Start { spawn, desired, .. } => {
                let guard = Guard {
                    soft_at: desired.deadlines.soft_terminate_at,
                    hard_at: desired.deadlines.hard_terminate_at,
                    end: None,
                    stuck: false,
                    connected: true,
                    reports: Vec::new(),
                    wanted: None,
                };
                let id = spawn.backend.clone();
                // The runtime looks at what is wanted by now, and at the clock.
                let unwanted = self.harder.contains_key(&id) || self.now >= guard.soft_at;
                self.guards.insert(id.clone(), guard);
                if unwanted {
                    self.dies(&id, vec![Report::NotStarted { late: true, problem: String::new() }], true);
                } else {
                    let report = Report::Started { pid: 1 };
                    let observation = Observation::of(&report).unwrap();
                    self.guards.get_mut(&id).unwrap().reports.push(report);
                    self.will_be_observed(&id, vec![observation]);
                }
                None
            }
            Effect::NoteEnd { backend, note } => {
                let kind = note.kind;
                let noted = ok
                    && self.disk.get_mut(&backend).is_some_and(|dir| {
                        dir.note = Some(note);
                        true
                    });
                Some(Input::EndNoted { backend, kind: noted.then_some(kind) })
            }
            Effect::Forget { backend } => {
                if let Some(dir) = self.disk.get_mut(&backend).filter(|_| ok) {
                    *dir = Dir::default();
                }
                None
            }
            Effect::Look { backend } if ok => {
                let judged = Some(Box::new(self.judge(&backend)));
                Some(Input::Looked { backend, judged })
            }
            Effect::Look { backend } => Some(Input::Looked { backend, judged: None }),
            Effect::Connect { ref backend, .. } => match self.guards.get(backend) {
                None => Some(Input::GuardEnded { backend: backend.clone() }),
                Some(guard) if guard.stuck => {
                    self.io.push(Io::Effect(effect));
                    None
                }
                Some(guard) => {
                    let told = Update {
                        soft_boot_ms: guard.soft_at,
                        hard_boot_ms: guard.hard_at,
                        end: guard.end,
                        ..Update::default()
                    };
                    Some(Input::Greeted { backend: backend.clone(), told })
                }
            },
            Effect::EndLeft { backend } => {
                // Without a process that it could not kill.
                self.guards.remove(&backend);
                if self.disk.get(&backend).is_none_or(|dir| dir.damaged || dir.record.is_none()) {
                    // Nothing is left of it, and whose key it held is not known: it need not be listed any more.
                    self.acknowledged.insert(backend.clone());
                }
                self.io.retain(
                    |io| !matches!(io, Io::Effect(Effect::Connect { backend: id, .. }) if *id == backend),
                );
                Some(Input::LeftEnded { backend })
            }
            Effect::KeepClusterId(_) => Some(Input::ClusterIdKept { durable: ok }),
            _ => None,
        }
    }

    pub(super) fn will_be_observed(&mut self, backend: &str, observations: Vec<Observation>) {
        for observation in observations {
            self.observations.entry(backend.to_owned()).or_default().push_back(observation);
            self.io.push(Io::Observation(backend.to_owned()));
        }
    }

    fn judge(&self, backend: &str) -> Judged {
        let dir = self.disk.get(backend).cloned().unwrap_or_default();
        let guarded = self.guards.contains_key(backend);
        let fate = match dir.record {
            None if guarded => Fate::Damaged(crate::journal::Damage::Missing),
            None => Fate::Finished,
            Some(_) if dir.damaged => Fate::Damaged(crate::journal::Damage::Content("damaged".into())),
            Some(record) if record.boot_id != self.boot_id() => Fate::OtherBoot(record),
            Some(record) if guarded => Fate::Guarded(record),
            Some(record) => match dir.outcome {
                Some(reports) => Fate::Ended(record, reports),
                None => Fate::Unguarded(record),
            },
        };
        Judged { fate, end: dir.note }
    }
}
