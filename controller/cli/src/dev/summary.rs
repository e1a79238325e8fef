//! What `dev` says once everything runs.

use super::children::Running;
use super::plan::Plan;
use crate::format::{count, duration, shell_word};
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::path::Path;

/// Everything there is to say.
pub(crate) struct Summary<'a> {
    pub(crate) plan: &'a Plan,
    /// Controllers, then drones, in the order of the plan.
    pub(crate) children: &'a [Running],
    pub(crate) dir: &'a Path,
    /// Whether `dir` is removed at the end.
    pub(crate) temporary: bool,
    /// How long it took, in milliseconds.
    pub(crate) took_ms: u64,
    /// This program, as it was called.
    pub(crate) program: String,
}

impl Summary<'_> {
    pub(crate) fn json(&self) -> Value {
        let (plan, dir) = (self.plan, self.dir);
        let pids = |from: usize| self.children.iter().skip(from).map(|running| running.pid);
        let controllers: Vec<Value> = plan
            .controllers
            .iter()
            .zip(pids(0))
            .map(|(c, pid)| json!({ "id": c.id, "url": c.url, "pid": pid, "log": c.process.log }))
            .collect();
        let drones: Vec<Value> = plan
            .drones
            .iter()
            .zip(pids(plan.controllers.len()))
            .map(|(d, pid)| json!({ "name": d.name, "pid": pid, "log": d.process.log }))
            .collect();
        json!({ "cluster": plan.cluster, "data_dir": dir, "controllers": controllers, "drones": drones })
    }

    pub(crate) fn text(&self) -> String {
        let plan = self.plan;
        let mut lines = vec![
            format!(
                "{} and {} are ready after {}",
                count(plan.controllers.len(), "controller"),
                count(plan.drones.len(), "drone"),
                duration(self.took_ms)
            ),
            String::new(),
        ];
        let wheres = plan.controllers.iter().map(|c| c.url.as_str()).chain(plan.drones.iter().map(|_| ""));
        for (running, url) in self.children.iter().zip(wheres) {
            lines.push(format!("  {:13} {url:22} pid {}", running.label, running.pid));
        }
        let end = if self.temporary { " (removed at the end)" } else { "" };
        lines.push(String::new());
        lines.push(format!("  data and logs in {}{end}", self.dir.display()));
        lines.push(String::new());
        lines.push("Try, in another terminal:".to_owned());
        lines.push(String::new());
        lines.push(format!("  {} connect --key hello --wait -- {}", self.called(), sample_backend()));
        lines.push(format!("  {} keys list", self.called()));
        lines.push(String::new());
        lines.push("Ctrl-C ends it all.".to_owned());
        lines.join("\n")
    }

    /// This program with the controllers, which go without saying where they are the default.
    fn called(&self) -> String {
        let urls = self.plan.urls();
        let default = ["http://127.0.0.1:7101", "http://127.0.0.1:7102", "http://127.0.0.1:7103"];
        let program = shell_word(&self.program);
        if urls == default {
            program.into_owned()
        } else {
            format!("{program} --controller {}", urls.join(","))
        }
    }
}

/// A command that answers HTTP on $PORT, of what this machine has.
fn sample_backend() -> &'static str {
    if on_path("python3") {
        r#"sh -c 'exec python3 -m http.server --bind 127.0.0.1 "$PORT"'"#
    } else if on_path("perl") {
        concat!(
            r#"perl -MIO::Socket -e '$s=IO::Socket::INET->new(LocalAddr=>"127.0.0.1",LocalPort=>$ENV{PORT},"#,
            r#"Listen=>9,ReuseAddr=>1) or die; while($c=$s->accept){while(<$c>){last if /^\s*$/} "#,
            r#"print $c "HTTP/1.0 200 OK\r\n\r\nhello\n"; close $c}'"#
        )
    } else {
        "YOUR-SERVER # it is to listen on $PORT"
    }
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(AsRef::<OsStr>::as_ref(&path)).any(|dir| dir.join(program).is_file())
}
