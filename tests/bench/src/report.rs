//! Rows, the table, and the ratios.

use crate::load::Measured;
use serde::{Deserialize, Serialize};

/// Systems, in the order of the table.
pub const SYSTEMS: [&str; 3] = ["holdfast", "etcd", "postgres"];

/// One row of `target/bench.json`: exactly these fields.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// `holdfast`, `etcd` or `postgres`.
    pub system: String,
    /// `acquire`, `renew` or `renew_batched`.
    pub operation: String,
    /// Requests under way.
    pub clients: usize,
    /// Operations per second; of `renew_batched`, keys.
    pub ops_per_s: f64,
    /// Median time of a request, in microseconds; of `renew_batched`, of a frame.
    pub p50_us: u64,
    /// 99th percentile of the same.
    pub p99_us: u64,
    /// CPU seconds of the servers for 1,000 operations.
    pub cpu_s_per_1000: f64,
    /// Bytes that reached the disk for an operation, on all nodes.
    pub bytes_per_op: f64,
}

fn rounded(value: f64, digits: i32) -> f64 {
    let scale = 10f64.powi(digits);
    (value * scale).round() / scale
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

impl Row {
    /// From a measurement.
    pub fn new(system: &str, operation: &str, clients: usize, measured: &Measured) -> Self {
        let ops = float(measured.ops.max(1));
        Self {
            system: system.to_owned(),
            operation: operation.to_owned(),
            clients,
            ops_per_s: rounded(ops / measured.seconds, 1),
            p50_us: measured.p50_us,
            p99_us: measured.p99_us,
            cpu_s_per_1000: rounded(measured.servers_cpu_s / ops * 1000.0, 5),
            bytes_per_op: rounded(measured.bytes_per_op, 1),
        }
    }
}

/// The repetition whose rate is the middle one.
pub fn middle(mut rows: Vec<Row>) -> Option<Row> {
    rows.sort_by(|a, b| a.ops_per_s.total_cmp(&b.ops_per_s));
    let at = rows.len() / 2;
    (at < rows.len()).then(|| rows.swap_remove(at))
}

fn find<'a>(rows: &'a [Row], system: &str, operation: &str, clients: usize) -> Option<&'a Row> {
    rows.iter().find(|row| row.system == system && row.operation == operation && row.clients == clients)
}

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Ratio {
    /// What is compared, for people.
    pub what: String,
    /// The quotient.
    pub value: f64,
    /// The bar it must reach, if there is one: at least it, or at most it.
    pub bar: Option<Bar>,
}

/// A bound on a ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bar {
    /// The ratio must be at least this.
    AtLeast(f64),
    /// The ratio must be at most this.
    AtMost(f64),
}

impl Bar {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bar) => value >= bar,
            Self::AtMost(bar) => value <= bar,
        }
    }
}

/// The bars of the project, by operation, number of clients and what is compared. etcd is the peer.
fn bar(operation: &str, clients: usize, what: &str) -> Option<Bar> {
    match (operation, clients, what) {
        ("acquire", 64, "ops/s") => Some(Bar::AtLeast(4.0)),
        ("acquire", 64, "p99") => Some(Bar::AtMost(1.0 / 3.0)),
        ("acquire", 1, "p50") => Some(Bar::AtMost(0.5)),
        ("renew_batched", 64, "ops/s") => Some(Bar::AtLeast(6.0)),
        ("renew", 64, "ops/s") => Some(Bar::AtLeast(1.0)),
        _ => None,
    }
}

/// All ratios of ours to a peer's. `renew_batched` is compared with the peers' `renew`: they have no batches.
pub fn ratios(rows: &[Row]) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for ours in rows.iter().filter(|row| row.system == "holdfast") {
        for peer in &SYSTEMS[1..] {
            let theirs = if ours.operation == "renew_batched" { "renew" } else { &ours.operation };
            let Some(their) = find(rows, peer, theirs, ours.clients) else { continue };
            let mut add = |what: &str, value: f64| {
                let bar = if *peer == "etcd" { bar(&ours.operation, ours.clients, what) } else { None };
                ratios.push(Ratio {
                    what: format!(
                        "{} of {} at {:>3} clients, to {peer}'s {theirs}",
                        what, ours.operation, ours.clients
                    ),
                    value,
                    bar,
                });
            };
            add("ops/s", ours.ops_per_s / their.ops_per_s);
            if ours.operation != "renew_batched" {
                add("p50", float(ours.p50_us) / float(their.p50_us.max(1)));
                add("p99", float(ours.p99_us) / float(their.p99_us.max(1)));
            }
        }
    }
    ratios
}

/// The head of the table.
pub fn head() -> String {
    format!(
        "{:<9} {:<14} {:>7} {:>10} {:>9} {:>9} {:>11} {:>9} {:>11}",
        "system", "operation", "clients", "ops/s", "p50 ms", "p99 ms", "cpu s/1000", "bytes/op", "driver cpu"
    )
}

/// One line of the table. `driver_cpu_s` is of this process, in its window.
pub fn line(row: &Row, measured: &Measured) -> String {
    let ms = |us: u64| float(us) / 1000.0;
    format!(
        "{:<9} {:<14} {:>7} {:>10.0} {:>9.2} {:>9.2} {:>11.4} {:>9.0} {:>10.0}%",
        row.system,
        row.operation,
        row.clients,
        row.ops_per_s,
        ms(row.p50_us),
        ms(row.p99_us),
        row.cpu_s_per_1000,
        row.bytes_per_op,
        measured.driver_cpu_s / measured.seconds * 100.0,
    )
}

/// The ratios as text, with the bars of the project.
pub fn ratio_lines(ratios: &[Ratio]) -> Vec<String> {
    ratios
        .iter()
        .map(|ratio| {
            let bar = match ratio.bar {
                None => String::new(),
                Some(bar) => {
                    let (sign, value) = match bar {
                        Bar::AtLeast(value) => ("≥", value),
                        Bar::AtMost(value) => ("≤", value),
                    };
                    format!(
                        "   bar {sign} {value:.2}: {}",
                        if bar.met(ratio.value) { "met" } else { "MISSED" }
                    )
                }
            };
            format!("{:>8.2} × {}{bar}", ratio.value, ratio.what)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(system: &str, operation: &str, ops_per_s: f64, p99_us: u64) -> Row {
        Row {
            system: system.into(),
            operation: operation.into(),
            clients: 64,
            ops_per_s,
            p50_us: 10,
            p99_us,
            cpu_s_per_1000: 0.1,
            bytes_per_op: 1.0,
        }
    }

    #[test]
    fn a_row_has_exactly_the_agreed_fields() {
        let measured = Measured {
            ops: 2_000,
            seconds: 4.0,
            p50_us: 5,
            p99_us: 9,
            servers_cpu_s: 3.0,
            bytes_per_op: 2.5,
            driver_cpu_s: 1.0,
        };
        let row = Row::new("etcd", "acquire", 64, &measured);
        let value = serde_json::to_value(&row).unwrap();
        let mut names: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "bytes_per_op",
                "clients",
                "cpu_s_per_1000",
                "operation",
                "ops_per_s",
                "p50_us",
                "p99_us",
                "system"
            ]
        );
        assert_eq!((row.ops_per_s, row.cpu_s_per_1000, row.bytes_per_op), (500.0, 1.5, 2.5));
    }

    #[test]
    fn batches_are_compared_with_single_renewals_and_bars_are_checked() {
        let rows = [
            row("holdfast", "acquire", 900.0, 30),
            row("holdfast", "renew_batched", 700.0, 99),
            row("etcd", "acquire", 100.0, 100),
            row("etcd", "renew", 100.0, 100),
        ];
        let ratios = ratios(&rows);
        let lines = ratio_lines(&ratios);
        assert_eq!(ratios.len(), 4, "{lines:?}");
        assert!(lines[0].contains("9.00 ×") && lines[0].ends_with("met"), "{lines:?}");
        assert!(lines[2].contains("0.30 ×") && lines[2].ends_with("met"), "{lines:?}");
        assert!(lines[3].contains("renew_batched") && lines[3].contains("7.00 ×"), "{lines:?}");
    }

    #[test]
    fn the_middle_of_repetitions_is_taken() {
        let rows = [3.0, 1.0, 2.0].map(|rate| row("etcd", "renew", rate, 1)).to_vec();
        assert_eq!(middle(rows).unwrap().ops_per_s, 2.0);
        assert!(middle(Vec::new()).is_none());
    }
}
