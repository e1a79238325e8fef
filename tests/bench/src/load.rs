//! The same load for every system: N clients, each with one request under way, for a warm-up and then a window that is
//! measured. What ends inside the window counts, whenever it began.

use crate::problem::{During, Problem, Result};
use crate::usage::{self, Servers};
use std::future::Future;
use std::time::{Duration, Instant};

/// One client.
pub trait Client: Send + 'static {
    /// One request, from asking to its answer. How many operations it was.
    fn once(&mut self) -> impl Future<Output = Result<u64>> + Send;
}

/// How long.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// The load runs and is not counted.
    pub warm_up: Duration,
    /// It is counted.
    pub measured: Duration,
}

/// What one run gave.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Operations in the window.
    pub ops: u64,
    /// Length of the window in seconds.
    pub seconds: f64,
    /// Median time of a request, in microseconds.
    pub p50_us: u64,
    /// 99th percentile, in microseconds.
    pub p99_us: u64,
    /// CPU time of the servers in the window, in seconds.
    pub servers_cpu_s: f64,
    /// Bytes that reached the disk for each operation, from the first to the last, with all that had to be written for
    /// them afterwards.
    pub bytes_per_op: f64,
    /// CPU time of this process in the window, in seconds.
    pub driver_cpu_s: f64,
}

/// The value below which `share` of the sorted values lie.
pub fn quantile(sorted: &[u32], share: f64) -> u64 {
    let last = sorted.len().saturating_sub(1);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "an index between 0 and last"
    )]
    let at = (last as f64 * share).round() as usize;
    sorted.get(at).copied().unwrap_or_default().into()
}

/// A duration in microseconds, for [`quantile`]: at most 71 minutes.
pub fn micros(duration: Duration) -> u32 {
    u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
}

#[derive(Default)]
struct Tally {
    times_us: Vec<u32>,
    /// In the window.
    ops: u64,
    /// With those of the warm-up and the last ones.
    all_ops: u64,
}

async fn one<C: Client>(mut client: C, begin: Instant, end: Instant) -> Result<(C, Tally)> {
    let mut tally = Tally::default();
    loop {
        let asked = Instant::now();
        if asked >= end {
            return Ok((client, tally));
        }
        let ops = client.once().await?;
        let answered = Instant::now();
        tally.all_ops += ops;
        if answered >= begin && answered < end {
            tally.times_us.push(micros(answered - asked));
            tally.ops += ops;
        }
    }
}

/// Runs `clients` and gives them back.
pub async fn run<C: Client>(clients: Vec<C>, span: Span, servers: &Servers) -> Result<(Measured, Vec<C>)> {
    // What was written before must not reach the disk now.
    servers.sync()?;
    let written_before = servers.written_bytes()?;
    let begin = Instant::now() + span.warm_up;
    let end = begin + span.measured;
    let tasks: Vec<_> = clients.into_iter().map(|client| tokio::spawn(one(client, begin, end))).collect();
    tokio::time::sleep_until(begin.into()).await;
    let (before, driver_before) = (servers.cpu_s()?, usage::own_cpu_s()?);
    tokio::time::sleep_until(end.into()).await;
    let (after, driver_after) = (servers.cpu_s()?, usage::own_cpu_s()?);
    let (mut all, mut clients) = (Tally::default(), Vec::with_capacity(tasks.len()));
    for task in tasks {
        let (client, tally) = task.await.during("a client")??;
        clients.push(client);
        all.times_us.extend(tally.times_us);
        all.ops += tally.ops;
        all.all_ops += tally.all_ops;
    }
    if all.ops == 0 {
        return Err(Problem("no request ended in the window".to_owned()));
    }
    servers.sync()?;
    let written = servers.written_bytes()?.saturating_sub(written_before);
    all.times_us.sort_unstable();
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    let bytes_per_op = written as f64 / all.all_ops as f64;
    let measured = Measured {
        ops: all.ops,
        seconds: span.measured.as_secs_f64(),
        p50_us: quantile(&all.times_us, 0.5),
        p99_us: quantile(&all.times_us, 0.99),
        servers_cpu_s: after - before,
        bytes_per_op,
        driver_cpu_s: driver_after - driver_before,
    };
    Ok((measured, clients))
}

/// Runs each client `count` times, all at once, and gives them back: what a measurement finds there.
pub async fn prepare<C: Client>(clients: Vec<C>, count: usize) -> Result<Vec<C>> {
    let tasks: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            tokio::spawn(async move {
                for _ in 0..count {
                    client.once().await?;
                }
                Ok::<_, Problem>(client)
            })
        })
        .collect();
    let mut done = Vec::with_capacity(tasks.len());
    for task in tasks {
        done.push(task.await.during("a client")??);
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Servers {
        Servers::new(vec![std::process::id()], &std::env::temp_dir())
    }

    struct Counter(u64);

    impl Client for Counter {
        async fn once(&mut self) -> Result<u64> {
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.0 += 1;
            Ok(10)
        }
    }

    #[test]
    fn quantiles_of_few_values() {
        assert_eq!(quantile(&[], 0.5), 0);
        assert_eq!(quantile(&[7], 0.99), 7);
        assert_eq!(quantile(&[1, 2, 3], 0.5), 2);
        assert_eq!(quantile(&(0..=100).collect::<Vec<_>>(), 0.99), 99);
    }

    #[tokio::test]
    async fn only_the_window_counts_and_the_clients_come_back() {
        let span = Span { warm_up: Duration::from_millis(50), measured: Duration::from_millis(50) };
        let clients = prepare(vec![Counter(0), Counter(100)], 3).await.unwrap();
        assert_eq!(clients[0].0, 3);
        let (measured, clients) = run(clients, span, &own()).await.unwrap();
        let all: u64 = clients.iter().map(|client| client.0).sum::<u64>() - 106;
        assert!(measured.ops > 0 && measured.ops < all * 10, "{measured:?} of {all}");
        assert!(measured.p99_us >= measured.p50_us && measured.p50_us >= 1000);
    }

    struct Failing;

    impl Client for Failing {
        async fn once(&mut self) -> Result<u64> {
            crate::problem::problem("it failed")
        }
    }

    #[tokio::test]
    async fn a_failed_request_ends_the_run() {
        let span = Span { warm_up: Duration::ZERO, measured: Duration::from_millis(10) };
        let error = run(vec![Failing], span, &own()).await.map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), "it failed");
    }
}
