//! GET `/metrics`, in Prometheus' text format. Each area adds its own function that writes into [`Text`].

use crate::app::App;
use crate::session::drift::Drifts;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use raft_store::{BUCKETS_US, ChecksumState, DiskTimes, MemberStatus, StoreMetrics};
use std::fmt::{Display, Write};

/// The format's name and version.
const CONTENT_TYPE: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Metrics as text.
#[derive(Debug, Default)]
pub struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String can't fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let _ = write!(self.0, "{name}");
        for (i, (label, text)) in labels.iter().enumerate() {
            let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            let _ = write!(self.0, "{}{label}=\"{text}\"", if i == 0 { '{' } else { ',' });
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// A value that goes up and down.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.gauge_with(name, help, &[], value);
    }

    /// As [`Self::gauge`], with labels.
    pub fn gauge_with(&mut self, name: &str, help: &str, labels: &[(&str, &str)], value: impl Display) {
        self.head(name, "gauge", help);
        self.sample(name, labels, value);
    }

    /// A value that only goes up.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "counter", help);
        self.sample(name, &[], value);
    }

    /// Times, as a histogram in seconds.
    pub fn disk_times(&mut self, name: &str, help: &str, times: &DiskTimes) {
        self.head(name, "histogram", help);
        let mut at_most = 0;
        for (bound_us, count) in BUCKETS_US.iter().zip(&times.buckets) {
            at_most += count;
            self.sample(&format!("{name}_bucket"), &[("le", &seconds(*bound_us))], at_most);
        }
        // Read one after the other while work goes on: the last bucket must not be below the others.
        let count = times.count.max(at_most);
        self.sample(&format!("{name}_bucket"), &[("le", "+Inf")], count);
        self.sample(&format!("{name}_sum"), &[], seconds(times.sum_us));
        self.sample(&format!("{name}_count"), &[], count);
    }
}

impl IntoResponse for Text {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, CONTENT_TYPE)], self.0).into_response()
    }
}

fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Everything about the replica.
pub fn store(text: &mut Text, of: &StoreMetrics) {
    let flag = |is: bool| u8::from(is);
    let why = |reason: &Option<String>| reason.clone().unwrap_or_default();
    text.gauge("holdfast_is_leader", "Whether this replica leads.", flag(of.is_leader));
    text.gauge("holdfast_leader_id", "Member id of the leader, 0 if unknown.", of.leader.unwrap_or(0));
    text.gauge("holdfast_term", "Current term.", of.term);
    text.gauge("holdfast_log_last_index", "Last log index here.", of.last_log);
    text.gauge("holdfast_log_purged_index", "Log index up to which the log is purged.", of.purged);
    text.gauge("holdfast_applied_index", "Last applied log index here.", of.applied);
    text.gauge("holdfast_snapshot_index", "Log index of the last snapshot here.", of.snapshot);
    let failed = why(&of.failed);
    text.gauge_with(
        "holdfast_failed",
        "Whether this replica has failed for good, and why.",
        &[("reason", &failed)],
        flag(of.failed.is_some()),
    );
    let unfit = why(&of.unfit);
    text.gauge_with(
        "holdfast_unfit_to_lead",
        "Whether this replica must not lead because of its disk, and why.",
        &[("reason", &unfit)],
        flag(of.unfit.is_some()),
    );
    let name = "holdfast_checksum_agreement";
    text.head(name, "gauge", "How the replicas' checksums compare here: 1 for the state that holds.");
    for state in ChecksumState::ALL {
        text.sample(name, &[("state", state.name())], flag(of.checksums.state == state));
    }
    text.gauge("holdfast_checksum_compared_index", "Log index at which that was found.", of.checksums.index);
    text.gauge(
        "holdfast_checksum_differing_members",
        "Other members whose checksum differs from that of the majority.",
        of.checksums.differing.len(),
    );
    if let Some(free) = of.disk_free_bytes {
        text.gauge("holdfast_disk_free_bytes", "Free bytes of the data directory's file system.", free);
    }
    text.gauge("holdfast_disk_reserve_bytes", "Bytes to keep free.", of.disk_reserve_bytes);
    text.gauge("holdfast_disk_full", "Whether less than the reserve is free.", flag(of.disk_full));
    text.gauge(
        "holdfast_disk_stuck",
        "Whether a write has waited too long for the disk.",
        flag(of.disk_stuck),
    );
    text.gauge(
        "holdfast_log_sync_under_way_ms",
        "How long the present sync of the log has taken so far.",
        of.log_syncs.under_way_ms.unwrap_or(0),
    );
    text.disk_times("holdfast_log_sync_seconds", "Syncs of the log, one for each batch.", &of.log_syncs);
    text.disk_times(
        "holdfast_state_commit_seconds",
        "Commits of applied entries to the state, not synced.",
        &of.state_commits,
    );
}

/// What keeps this replica from talking to its peers. One sample for each member with a problem; members are few.
fn peers(text: &mut Text, members: &[MemberStatus]) {
    let name = "holdfast_member_problem";
    text.head(name, "gauge", "What keeps this replica from talking to a member, and what to do.");
    for member in members {
        if let Some(problem) = &member.problem {
            text.sample(name, &[("member", &member.id.to_string()), ("reason", problem)], 1);
        }
    }
}

/// The drones' clocks.
pub fn clocks(text: &mut Text, of: &Drifts) {
    let (worst, faults) = of.worst();
    let name = "holdfast_drone_clock_rate_error_ppm";
    text.head(
        name,
        "gauge",
        "Millionths by which a drone's clock runs faster than this controller's; the worst ones.",
    );
    for (drone, ppm) in worst {
        text.sample(name, &[("drone", &drone)], ppm);
    }
    text.counter(
        "holdfast_drone_clock_faults_total",
        "How often a drone's clock was found to run at a rate that leases don't allow for.",
        faults,
    );
}

/// GET `/metrics`.
pub async fn metrics(State(app): State<App>) -> Text {
    let mut text = Text::default();
    store(&mut text, &app.store.metrics());
    peers(&mut text, &app.store.status().members);
    clocks(&mut text, &app.drifts);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_cumulative_and_in_seconds() {
        let mut times = DiskTimes { count: 3, sum_us: 1_500_250, ..DiskTimes::default() };
        times.buckets[0] = 1;
        times.buckets[1] = 1;
        let mut text = Text::default();
        text.disk_times("t", "Times.", &times);
        for line in [
            "# TYPE t histogram",
            "t_bucket{le=\"0.0001\"} 1",
            "t_bucket{le=\"0.00025\"} 2",
            "t_bucket{le=\"10\"} 2",
            "t_bucket{le=\"+Inf\"} 3",
            "t_sum 1.50025",
            "t_count 3",
        ] {
            assert!(text.0.lines().any(|have| have == line), "{line} in\n{}", text.0);
        }
    }

    #[test]
    fn labels_are_quoted() {
        let mut text = Text::default();
        text.gauge_with("g", "Help.", &[("a", "say \"no\"\n"), ("b", "\\")], 1);
        assert!(text.0.ends_with("g{a=\"say \\\"no\\\"\\n\",b=\"\\\\\"} 1\n"), "{}", text.0);
    }
}
