//! The guard of a container: it starts the container, holds the deadline, and knows when nothing of it is left. It never
//! waits for the engine: requests are under way while it does other things, and what has to be done at a deadline is done
//! to the container's processes themselves.
//!
//! ```text
//!   drone ──creates──▶ container (with the permit mounted)      guard ◀──pidfd────────── the container's init
//!     └───arms────────▶ guard ──start──▶ engine ──▶ init            ├──SIGTERM, SIGKILL──▶ ▲
//!                                                                   └──fork──▶ deputy ─────┘ at the deadline, or if the
//!                                                                                            guard dies
//! ```
//!
//! The *permit* is an empty file of the drone that is mounted into the container. A container whose permit is gone cannot
//! be started, by anybody: the runtime mounts before it runs anything. The guard removes it as soon as it knows that the
//! container runs, and when it gives up a start. So a start that an engine delayed, for however long, does nothing; and
//! since the container's control group is joined before anything is mounted, a look at the processes *after* the removal
//! shows whatever has slipped through. Whether anything is left is thus known without the engine.
//!
//! Invariants, beside those of the module above:
//!
//! 1. The container is started at most once, and only before its soft deadline.
//! 2. What turns out to run after the guard has given up its start is killed at once.
//! 3. [`Report::Gone`] says that the container's init has ended, or that none is seen and the permit is gone; and if the
//!    engine has said that it runs and nothing of it was ever seen here, that the engine has removed it.

use super::contain::log_line;
use super::deputy::{Deputy, Looks, remove_permit};
use super::engine::{Answer, Call, NOT_FOUND};
use super::process::{Input, report};
use super::timeline::{Step, Timeline};
use super::{Arm, ContainerTarget, EndNow, Report, Update};
use crate::cgroup::Init;
use crate::clock::{BootTimer, boot_ms};
use nix::errno::Errno;
use serde::Deserialize;
use std::io;
use std::os::fd::AsRawFd;

/// A start that the engine has not answered for so long is given up, in milliseconds.
const START_MS_MAX: i64 = 60_000;
/// Any other request that the engine has not answered for so long is dropped, and made again, in milliseconds.
const CALL_MS_MAX: i64 = 2_000;
/// Time between two requests to the engine, in milliseconds.
const CALL_INTERVAL_MS: i64 = 100;
/// How long the engine may say that a container runs whose init is not seen here, in milliseconds.
const UNSEEN_MS_MAX: i64 = 5_000;
/// How long the engine is given to tell the exit code of a container that has ended, in milliseconds: by itself, and when
/// it was killed.
const EXIT_CODE_MS_MAX: i64 = 2_000;
const EXIT_CODE_KILLED_MS_MAX: i64 = 300;

/// Guards the container of `arm` to its end.
pub(super) fn guard(arm: Arm, target: ContainerTarget, input: &mut Input) -> io::Result<()> {
    let timer = BootTimer::new()?;
    let timeline = Timeline::new(arm.update);
    let deputy = match Deputy::start(&target, timeline.hard_at()) {
        Ok(deputy) => Some(deputy),
        Err(e) => {
            log_line(&format!("no deputy, so that the deadline is this process' alone: {e}"));
            None
        }
    };
    let mut guard = ContainerGuard {
        target,
        timeline,
        deputy,
        latest: arm.update,
        phase: Phase::Over,
        asked: None,
        ask_at: i64::MIN,
        permit_gone: false,
        killing: false,
        term_by_engine: false,
        engine_says_running: false,
        seen: false,
    };
    // What the drone has said in the meantime counts before the start.
    guard.take_updates(input);
    guard.start();
    loop {
        guard.go_on(boot_ms());
        if matches!(guard.phase, Phase::Over) {
            if let Some(deputy) = guard.deputy.take() {
                deputy.dismiss();
            }
            report(&Report::Gone);
            return Ok(());
        }
        timer.arm(Some(guard.next_wake(boot_ms())))?;
        guard.wait(input, &timer)?;
        guard.take_updates(input);
    }
}

/// What the engine is asked, after the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// How is it?
    Inspect,
    /// SIGTERM, where this process may not send it itself.
    Term,
    /// SIGKILL; the engine also thaws a paused container for it.
    Kill,
    /// The exit code of one that has ended.
    ExitCode,
    /// Away with it, started or not.
    Remove,
}

struct Asked {
    ask: Ask,
    call: Call,
    until: i64,
}

enum Phase {
    /// The start is under way.
    Starting { call: Call, until: i64 },
    /// It runs, or has ended already; its init is being looked for.
    Started { since: i64, looks: Looks },
    /// It runs.
    Running(Init),
    /// Nothing of it is left; the exit code is being asked for.
    Ended { until: i64 },
    /// It must not run: the start has failed, or is given up.
    Discarding(Looks),
    /// Nothing is left, and all is said.
    Over,
}

#[derive(Deserialize)]
struct Inspected {
    #[serde(rename = "State")]
    state: State,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct State {
    running: bool,
    pid: i32,
    exit_code: i32,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Waited {
    status_code: i32,
}

struct ContainerGuard {
    target: ContainerTarget,
    timeline: Timeline,
    deputy: Option<Deputy>,
    latest: Update,
    phase: Phase,
    asked: Option<Asked>,
    /// When the engine may be asked next.
    ask_at: i64,
    permit_gone: bool,
    killing: bool,
    /// SIGTERM is due, and this process may not send it.
    term_by_engine: bool,
    /// The engine has said that the container runs, and not yet that it is removed.
    engine_says_running: bool,
    /// Processes of the container were seen here, so that a look that sees none means something.
    seen: bool,
}

impl ContainerGuard {
    fn start(&mut self) {
        let now = boot_ms();
        if !self.timeline.may_start(now) {
            return self.discard(true, "its deadline has passed or its end was asked for");
        }
        // This was the last look at the clock. What the engine makes of the request is seen to by `go_on`.
        match Call::begin(&self.target.engine, "POST", &self.path("/start")) {
            Ok(call) => self.phase = Phase::Starting { call, until: now + START_MS_MAX },
            Err(e) => self.discard(false, &e.to_string()),
        }
    }

    fn path(&self, what: &str) -> String {
        format!("/containers/{}{what}", self.target.id)
    }

    /// It is not to run, whatever the engine still does.
    fn discard(&mut self, late: bool, problem: &str) {
        log_line(&format!("not started: {problem}"));
        report(&Report::NotStarted { late, problem: problem.to_owned() });
        self.phase = Phase::Discarding(Looks::new());
        self.asked = None;
        self.ask_at = i64::MIN;
    }

    fn go_on(&mut self, now: i64) {
        match self.timeline.due(now) {
            Step::Wait => {}
            Step::Term { by_deadline } => self.term(by_deadline),
            Step::Kill => self.kill(),
        }
        if !self.permit_gone && !matches!(self.phase, Phase::Starting { .. }) {
            // From now on nobody can start it.
            self.permit_gone = remove_permit(&self.target.permit);
        }
        let (id, permit_gone) = (&self.target.id, self.permit_gone);
        match &mut self.phase {
            Phase::Starting { until, .. } if now >= *until => {
                self.discard(true, "the engine has not answered in time");
                return self.go_on(now);
            }
            Phase::Starting { .. } | Phase::Over => {}
            Phase::Started { looks, .. } => {
                // Without the engine's word it must not go on past the deadline.
                if self.killing && looks.look(id, now) && permit_gone {
                    self.seen |= looks.seen;
                    self.phase = if self.seen || !self.engine_says_running {
                        Phase::Ended { until: now + EXIT_CODE_KILLED_MS_MAX }
                    } else {
                        // It runs where it is not seen: the engine alone can end it.
                        Phase::Discarding(Looks::new())
                    };
                }
            }
            Phase::Running(init) => {
                if init.has_ended() {
                    let wait_ms = if self.killing { EXIT_CODE_KILLED_MS_MAX } else { EXIT_CODE_MS_MAX };
                    self.phase = Phase::Ended { until: now + wait_ms };
                    self.asked = None;
                    self.ask_at = now;
                } else if self.killing {
                    let _ = init.signal(libc::SIGKILL);
                }
            }
            Phase::Ended { until } => {
                if now >= *until {
                    self.exited(None);
                }
            }
            Phase::Discarding(looks) => {
                let is_empty = looks.look(id, now);
                self.seen |= looks.seen;
                if is_empty && permit_gone && (self.seen || !self.engine_says_running) {
                    self.phase = Phase::Over;
                }
            }
        }
        if self.asked.as_ref().is_some_and(|asked| now >= asked.until) {
            self.unanswered("the engine does not answer");
        }
        if self.asked.is_none()
            && now >= self.ask_at
            && let Some(ask) = self.next_ask()
        {
            self.ask(ask, now);
        }
    }

    fn term(&mut self, by_deadline: bool) {
        match &self.phase {
            Phase::Starting { .. } => {
                return self.discard(true, "its deadline or its end came before the engine had started it");
            }
            // Not known yet whom to send it to: it has only just begun.
            Phase::Started { .. } => return self.kill_now(),
            Phase::Running(init) => {
                if let Err(e) = init.signal(libc::SIGTERM) {
                    log_line(&format!("SIGTERM is left to the engine: {e}"));
                    self.term_by_engine = true;
                    self.ask_at = i64::MIN;
                }
            }
            Phase::Ended { .. } | Phase::Discarding(_) | Phase::Over => return,
        }
        if by_deadline {
            report(&Report::SoftDeadline);
        }
    }

    fn kill(&mut self) {
        match self.phase {
            Phase::Starting { .. } => {
                self.discard(true, "its deadline or its end came before the engine had started it");
            }
            Phase::Started { .. } | Phase::Running(_) => self.kill_now(),
            Phase::Ended { .. } | Phase::Discarding(_) | Phase::Over => {}
        }
    }

    fn kill_now(&mut self) {
        if !self.killing {
            report(&Report::Killing);
            self.killing = true;
            self.asked = None;
            self.ask_at = i64::MIN;
        }
        if let Phase::Running(init) = &self.phase {
            // At once; for a container that is paused, or whose processes are not ours to kill, there is the engine.
            let _ = init.signal(libc::SIGKILL);
        }
    }

    fn next_ask(&self) -> Option<Ask> {
        match &self.phase {
            Phase::Starting { .. } | Phase::Over => None,
            Phase::Started { .. } | Phase::Running(_) if self.killing => Some(Ask::Kill),
            Phase::Started { .. } => Some(Ask::Inspect),
            Phase::Running(_) => self.term_by_engine.then_some(Ask::Term),
            Phase::Ended { .. } => Some(Ask::ExitCode),
            Phase::Discarding(_) => Some(Ask::Remove),
        }
    }

    fn ask(&mut self, ask: Ask, now: i64) {
        let (method, what) = match ask {
            Ask::Inspect => ("GET", "/json"),
            Ask::Term => ("POST", "/kill?signal=SIGTERM"),
            Ask::Kill => ("POST", "/kill"),
            Ask::ExitCode => ("POST", "/wait?condition=not-running"),
            Ask::Remove => ("DELETE", "?force=true&v=true"),
        };
        match Call::begin(&self.target.engine, method, &self.path(what)) {
            Ok(call) => self.asked = Some(Asked { ask, call, until: now + CALL_MS_MAX }),
            Err(e) => self.unanswered(&e.to_string()),
        }
    }

    /// Reads what the engine has answered, without waiting.
    fn hear(&mut self) {
        if let Phase::Starting { call, .. } = &mut self.phase {
            match call.advance() {
                Ok(None) => {}
                Ok(Some(answer)) => self.start_answered(&answer),
                // It may still be started, or have been.
                Err(e) => self.discard(false, &e.to_string()),
            }
        }
        let Some(asked) = &mut self.asked else { return };
        let ask = asked.ask;
        match asked.call.advance() {
            Ok(None) => {}
            Ok(Some(answer)) => {
                self.asked = None;
                self.ask_at = boot_ms() + CALL_INTERVAL_MS;
                self.answered(ask, &answer);
            }
            Err(e) => self.unanswered(&e.to_string()),
        }
    }

    /// It is asked again later. What it would have said of the init can be seen, too.
    fn unanswered(&mut self, problem: &str) {
        log_line(problem);
        self.asked = None;
        self.ask_at = boot_ms() + CALL_INTERVAL_MS;
        if matches!(self.phase, Phase::Started { .. }) && !self.killing {
            match Init::find(&self.target.id) {
                Ok(Some(init)) => self.runs(init),
                Ok(None) => {}
                Err(e) => log_line(&format!("cannot look for the container's init: {e}")),
            }
        }
    }

    fn runs(&mut self, init: Init) {
        report(&Report::Started { pid: init.pid });
        self.seen = true;
        self.phase = Phase::Running(init);
    }

    fn start_answered(&mut self, answer: &Answer) {
        if !answer.is_success() {
            return self.discard(false, &answer.message());
        }
        let now = boot_ms();
        self.engine_says_running = true;
        self.phase = Phase::Started { since: now, looks: Looks::new() };
        self.ask_at = i64::MIN;
        // The machine may have slept, or this process been stopped, since the request.
        if !self.timeline.may_start(now) {
            self.timeline.update(Update { end: Some(EndNow::Hard), ..self.latest });
            self.timeline.due(now);
            self.kill_now();
        }
    }

    fn answered(&mut self, ask: Ask, answer: &Answer) {
        match ask {
            Ask::Inspect => self.inspected(answer),
            Ask::Term => self.term_by_engine = false,
            // Its effect shows in the processes.
            Ask::Kill => {}
            Ask::Remove => {
                if answer.is_success() || answer.status == NOT_FOUND {
                    self.engine_says_running = false;
                }
            }
            Ask::ExitCode => match serde_json::from_slice::<Waited>(&answer.body) {
                Ok(waited) if answer.is_success() => self.exited(Some(waited.status_code)),
                // It may have been removed.
                _ => self.exited(None),
            },
        }
    }

    fn inspected(&mut self, answer: &Answer) {
        let Phase::Started { since, .. } = self.phase else { return };
        let inspected = match serde_json::from_slice::<Inspected>(&answer.body) {
            Ok(inspected) if answer.is_success() => inspected.state,
            _ => return self.unseen(since, &format!("the engine says: {}", answer.message())),
        };
        self.engine_says_running = inspected.running;
        if !inspected.running {
            // It was short.
            report(&Report::Started { pid: 0 });
            return self.exited(Some(inspected.exit_code));
        }
        match Init::open(&self.target.id, inspected.pid) {
            Ok(Some(init)) => self.runs(init),
            Ok(None) => self.unseen(since, &format!("its init, {}, is not seen", inspected.pid)),
            Err(e) => self.unseen(since, &format!("its init, {}, is not seen: {e}", inspected.pid)),
        }
    }

    /// A container that cannot be watched must not run.
    fn unseen(&mut self, since: i64, problem: &str) {
        if boot_ms() - since >= UNSEEN_MS_MAX {
            self.discard(
                false,
                &format!("{problem}; a drone needs to be in the PID namespace of its container engine"),
            );
        }
    }

    fn exited(&mut self, code: Option<i32>) {
        report(&Report::Exited { code, signal: None });
        self.asked = None;
        self.phase = Phase::Over;
    }

    fn next_wake(&self, now: i64) -> i64 {
        let phase = match &self.phase {
            Phase::Starting { until, .. } | Phase::Ended { until } => Some(*until),
            Phase::Started { looks, .. } if self.killing => Some(looks.at),
            // The kill is repeated until it has worked.
            Phase::Running(_) if self.killing => Some(now + CALL_INTERVAL_MS),
            Phase::Started { .. } | Phase::Running(_) | Phase::Over => None,
            Phase::Discarding(looks) => Some(looks.at),
        };
        let asking = match &self.asked {
            Some(asked) => Some(asked.until),
            None => self.next_ask().map(|_| self.ask_at),
        };
        let permit = (!self.permit_gone && !matches!(self.phase, Phase::Starting { .. }))
            .then_some(now + CALL_INTERVAL_MS);
        let wakes = [self.timeline.next_wake(), phase, asking, permit];
        wakes.into_iter().flatten().min().unwrap_or(i64::MAX)
    }

    /// Waits for the drone, the engine, the end of the container or the timer.
    fn wait(&mut self, input: &Input, timer: &BootTimer) -> io::Result<()> {
        let poll = |fd, events| libc::pollfd { fd, events, revents: 0 };
        // A negative descriptor is left out by poll(2).
        let nothing = (-1, 0);
        let starting = if let Phase::Starting { call, .. } = &self.phase { call.interest() } else { nothing };
        let asked = self.asked.as_ref().map_or(nothing, |asked| asked.call.interest());
        let init = if let Phase::Running(init) = &self.phase { init.handle.as_raw_fd() } else { -1 };
        let mut fds = [
            poll(timer.as_raw_fd(), libc::POLLIN),
            poll(input.poll_fd(), libc::POLLIN),
            poll(init, libc::POLLIN),
            poll(starting.0, starting.1),
            poll(asked.0, asked.1),
        ];
        // SAFETY: `fds` is a valid array of its length.
        let rc = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
        if rc < 0 && Errno::last() != Errno::EINTR {
            return Err(Errno::last().into());
        }
        timer.clear()?;
        // The clock first: an answer that came too late does not count.
        self.hold_deadline();
        self.hear();
        Ok(())
    }

    /// A start that is still under way when it may not be is given up before its answer is read.
    fn hold_deadline(&mut self) {
        if matches!(self.phase, Phase::Starting { .. }) && boot_ms() >= self.timeline.start_before() {
            self.go_on(boot_ms());
        }
    }

    fn take_updates(&mut self, input: &mut Input) {
        for update in input.updates() {
            self.latest = update;
            self.timeline.update(update);
        }
        if let Some(deputy) = &self.deputy {
            deputy.set(self.timeline.hard_at());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guard_is_armed_by_drones_that_know_of_no_containers() {
        let update = r#""update":{"soft_boot_ms":1,"hard_boot_ms":2,"end":null}"#;
        let older = format!(r#"{{"command":["true"],"env":{{}},"cwd":"/","log":"/l",{update}}}"#);
        let arm: Arm = serde_json::from_str(&older).unwrap();
        assert_eq!(arm.container, None);
        assert!(!serde_json::to_string(&arm).unwrap().contains("container"), "nor is an older guard told");
    }

    #[test]
    fn an_inspected_container_and_an_exit_code_are_read() {
        let answer =
            r#"{"Id":"9e","State":{"Status":"running","Running":true,"Pid":7,"ExitCode":0},"Name":"/x"}"#;
        let state = serde_json::from_str::<Inspected>(answer).unwrap().state;
        assert!(state.running && state.pid == 7 && state.exit_code == 0);
        let waited: Waited = serde_json::from_str(r#"{"Error":null,"StatusCode":137}"#).unwrap();
        assert_eq!(waited.status_code, 137);
    }
}
