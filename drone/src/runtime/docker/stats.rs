//! What a container uses, in Plane's `BackendMetrics`, from the engine's figures.

use bollard::Docker;
use bollard::models::ContainerStatsResponse;
use bollard::query_parameters::StatsOptionsBuilder;
use futures::StreamExt;
use serde::Serialize;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// How often a backend's use is asked for and told.
pub const METRICS_INTERVAL: Duration = Duration::from_secs(30);
/// When it is told for the first time, after it was started.
pub const METRICS_FIRST: Duration = Duration::from_secs(5);
/// Requests to the engine at a time, of all containers.
pub(super) const REQUESTS_MAX: usize = 4;
/// Longest time for one; the next is made at its time.
const REQUEST_MAX: Duration = Duration::from_secs(10);

/// Plane's message. Bytes, and nanoseconds since the last message.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Metrics {
    backend_id: String,
    /// Without what the page cache could give back.
    mem_used: u64,
    mem_total: u64,
    mem_active: u64,
    mem_inactive: u64,
    mem_unevictable: u64,
    mem_limit: u64,
    cpu_used: u64,
    sys_cpu: u64,
}

/// CPU counters of the last time, in nanoseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counters {
    used: u64,
    system: u64,
}

/// Asks for the use of one container, in its turn.
pub(super) async fn ask(docker: Docker, turn: Arc<Semaphore>, id: String) -> Option<ContainerStatsResponse> {
    let _turn = turn.acquire().await.ok()?;
    // One answer, without the second that the engine would wait for to have a difference.
    let options = StatsOptionsBuilder::new().stream(false).one_shot(true).build();
    let mut answers = docker.stats(&id, Some(options));
    timeout(REQUEST_MAX, answers.next()).await.ok()??.ok()
}

/// The message, and the counters to count on from. None if the engine has no figures: the container has ended.
pub(super) fn metrics(
    backend: &str,
    stats: &ContainerStatsResponse,
    last: Counters,
) -> Option<(Metrics, Counters)> {
    let memory = stats.memory_stats.as_ref()?;
    let usage = memory.usage?;
    let details = memory.stats.clone().unwrap_or_default();
    // Control groups of version 1 count a group's children only under these names.
    let figure = |name: &str| details.get(&format!("total_{name}")).or_else(|| details.get(name)).copied();
    let sum = |names: &[&str]| names.iter().filter_map(|name| figure(name)).fold(0, u64::saturating_add);
    let total = if figure("anon").is_some() {
        sum(&["anon", "file", "kernel_stack", "sock", "slab"])
    } else {
        sum(&["rss", "cache"])
    };
    let cpu = stats.cpu_stats.as_ref()?;
    let now = Counters {
        used: cpu.cpu_usage.as_ref()?.total_usage?,
        system: cpu.system_cpu_usage.unwrap_or_default(),
    };
    let metrics = Metrics {
        backend_id: backend.to_owned(),
        mem_used: usage.saturating_sub(figure("inactive_file").unwrap_or_default()),
        mem_total: total,
        mem_active: sum(&["active_anon", "active_file"]),
        mem_inactive: sum(&["inactive_anon", "inactive_file"]),
        mem_unevictable: sum(&["unevictable"]),
        mem_limit: memory.limit.unwrap_or_default(),
        cpu_used: now.used.saturating_sub(last.used),
        sys_cpu: now.system.saturating_sub(last.system),
    };
    Some((metrics, now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn stats(memory: serde_json::Value) -> ContainerStatsResponse {
        let cpu = json!({"cpu_usage": {"total_usage": 1_500}, "system_cpu_usage": 90_000});
        serde_json::from_value(json!({"memory_stats": memory, "cpu_stats": cpu})).unwrap()
    }

    #[test]
    fn both_versions_of_control_groups_are_read() {
        let v1 = stats(json!({"usage": 1_000, "limit": 9_000, "stats": {
            "inactive_file": 1, "total_inactive_file": 100, "total_active_file": 20, "total_active_anon": 300,
            "total_inactive_anon": 50, "total_unevictable": 7, "total_rss": 350, "total_cache": 120,
        }}));
        let last = Counters { used: 1_000, system: 80_000 };
        let (metrics_v1, now) = metrics("ba", &v1, last).unwrap();
        let expected = Metrics {
            backend_id: "ba".to_owned(),
            mem_used: 900,
            mem_total: 470,
            mem_active: 320,
            mem_inactive: 150,
            mem_unevictable: 7,
            mem_limit: 9_000,
            cpu_used: 500,
            sys_cpu: 10_000,
        };
        assert_eq!(metrics_v1, expected);
        assert_eq!((now.used, now.system), (1_500, 90_000));
        let v2 = stats(json!({"usage": 1_000, "limit": 9_000, "stats": {
            "inactive_file": 100, "active_file": 20, "active_anon": 300, "inactive_anon": 50, "unevictable": 7,
            "anon": 350, "file": 100, "kernel_stack": 10, "sock": 5, "slab": 5,
        }}));
        assert_eq!(metrics("ba", &v2, last).unwrap().0, expected);
    }

    #[test]
    fn a_container_that_has_ended_has_no_metrics() {
        assert!(metrics("ba", &stats(json!({})), Counters::default()).is_none());
    }
}
