//! The plot of a million-key run, as SVG: three panels over the number of keys held, on a logarithmic axis.

use crate::million::Report;
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const PANEL_HEIGHT: f64 = 220.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 50.0;
const GAP: f64 = 60.0;
/// Told apart without colour too, by their marks.
const COLOURS: [&str; 4] = ["#1b6ca8", "#c8553d", "#3a7d44", "#7d4e9f"];

/// One line of a panel.
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

struct Panel {
    title: &'static str,
    log: bool,
    series: Vec<Series>,
}

/// 1 k, 10 k, 1 M.
fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{} M", v / 1e6),
        v if v >= 1e3 => format!("{} k", v / 1e3),
        v => format!("{v}"),
    }
}

/// Powers of ten that hold `low` and `high` between them.
fn decades(low: f64, high: f64) -> (f64, f64) {
    let low = low.max(1e-3).log10().floor();
    (low, high.max(1e-3).log10().ceil().max(low + 1.0))
}

/// A round number of at least `value`: 1, 2 or 5 times a power of ten.
fn round_up(value: f64) -> f64 {
    let ten = 10f64.powf(value.max(1e-9).log10().floor());
    [1.0, 2.0, 5.0, 10.0].iter().map(|step| step * ten).find(|round| *round >= value).unwrap_or(10.0 * ten)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, size: u32, text: &str) {
    // Writing into a string can't fail.
    let _ = writeln!(
        out,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}">{}</text>"#,
        escape(text)
    );
}

fn line(out: &mut String, from: (f64, f64), to: (f64, f64), stroke: &str) {
    let _ = writeln!(
        out,
        r#"<line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" stroke="{stroke}"/>"#,
        from.0, from.1, to.0, to.1
    );
}

fn mark(out: &mut String, at: usize, x: f64, y: f64) {
    let colour = COLOURS[at % COLOURS.len()];
    let _ = match at % COLOURS.len() {
        0 => writeln!(out, r#"<circle cx="{x:.1}" cy="{y:.1}" r="4" fill="{colour}"/>"#),
        1 => {
            writeln!(
                out,
                r#"<rect x="{:.1}" y="{:.1}" width="8" height="8" fill="{colour}"/>"#,
                x - 4.0,
                y - 4.0
            )
        }
        2 => writeln!(out, r#"<path d="M{x:.1} {:.1} l5 9 l-10 0 z" fill="{colour}"/>"#, y - 5.0),
        _ => writeln!(out, r#"<path d="M{x:.1} {:.1} l5 5 l-5 5 l-5 -5 z" fill="{colour}"/>"#, y - 5.0),
    };
}

fn panel(out: &mut String, top: f64, (x_low, x_high): (f64, f64), panel: &Panel) {
    let (right, bottom) = (WIDTH - RIGHT, top + PANEL_HEIGHT);
    let values = || panel.series.iter().flat_map(|series| series.points.iter().map(|point| point.1));
    let highest = values().fold(0.0, f64::max);
    let lowest = values().fold(f64::INFINITY, f64::min);
    let (y_low, y_high) = if panel.log { decades(lowest, highest) } else { (0.0, round_up(highest)) };
    let x_of = |keys: f64| LEFT + (keys.log10() - x_low) / (x_high - x_low) * (right - LEFT);
    let y_of = |value: f64| {
        let value = if panel.log { value.max(1e-3).log10() } else { value };
        bottom - (value - y_low) / (y_high - y_low) * PANEL_HEIGHT
    };
    text(out, LEFT, top - 10.0, "start", 14, panel.title);
    let mut x = x_low;
    while x <= x_high {
        let keys = 10f64.powf(x);
        line(out, (x_of(keys), top), (x_of(keys), bottom), "#ddd");
        text(out, x_of(keys), bottom + 16.0, "middle", 11, &short(keys.round()));
        x += 1.0;
    }
    let ticks: Vec<f64> = if panel.log {
        (0..)
            .map(|step| 10f64.powf(y_low + f64::from(step)))
            .take_while(|tick| tick.log10() <= y_high + 0.01)
            .collect()
    } else {
        (0..=4).map(|step| y_high * f64::from(step) / 4.0).collect()
    };
    for tick in ticks {
        line(out, (LEFT, y_of(tick)), (right, y_of(tick)), "#ddd");
        text(out, LEFT - 8.0, y_of(tick) + 4.0, "end", 11, &short((tick * 1000.0).round() / 1000.0));
    }
    line(out, (LEFT, bottom), (right, bottom), "#333");
    line(out, (LEFT, top), (LEFT, bottom), "#333");
    for (at, series) in panel.series.iter().enumerate() {
        let points: Vec<String> =
            series.points.iter().map(|(x, y)| format!("{:.1},{:.1}", x_of(*x), y_of(*y))).collect();
        let _ = writeln!(
            out,
            r#"<polyline points="{}" fill="none" stroke="{}" stroke-width="2"/>"#,
            points.join(" "),
            COLOURS[at % COLOURS.len()]
        );
        for (x, y) in &series.points {
            mark(out, at, x_of(*x), y_of(*y));
        }
        #[allow(clippy::cast_precision_loss, reason = "a handful of lines")]
        let legend = top + 14.0 + 20.0 * at as f64;
        mark(out, at, right + 16.0, legend);
        text(out, right + 28.0, legend + 4.0, "start", 12, &series.name);
    }
}

#[allow(clippy::cast_precision_loss, reason = "counts far below 2^52")]
fn float(count: u64) -> f64 {
    count as f64
}

fn panels(report: &Report) -> Vec<Panel> {
    let fill = |name: &str, value: fn(&crate::million::Filled) -> f64| Series {
        name: name.to_owned(),
        points: report.fill.iter().map(|row| (float(row.keys), value(row))).collect(),
    };
    let hold = |name: &str, value: fn(&crate::million::Holding) -> f64| Series {
        name: name.to_owned(),
        points: report.hold.iter().map(|row| (float(row.keys), value(row))).collect(),
    };
    vec![
        Panel {
            title: "operations per second",
            log: true,
            series: vec![
                fill("connects, 64 clients", |row| row.connects_per_s),
                hold("renewals while held", |row| row.renewals_per_s),
            ],
        },
        Panel {
            title: "time of a connect, ms",
            log: true,
            series: vec![
                fill("p50, 64 clients", |row| row.p50_ms),
                fill("p99, 64 clients", |row| row.p99_ms),
                hold("p50 while held", |row| row.p50_ms),
                hold("p99 while held", |row| row.p99_ms),
            ],
        },
        Panel {
            title: "largest resident memory of a controller, MiB; CPU of all three, % of a core",
            log: true,
            series: vec![
                hold("MiB", |row| float(row.resident_bytes >> 20)),
                hold("CPU %", |row| row.controllers_cpu * 100.0),
            ],
        },
    ]
}

/// Draws a report.
pub fn svg(report: &Report) -> String {
    let panels: Vec<Panel> = panels(report)
        .into_iter()
        .filter(|panel| panel.series.iter().any(|series| !series.points.is_empty()))
        .collect();
    let keys = || panels.iter().flat_map(|p| &p.series).flat_map(|s| &s.points).map(|point| point.0);
    let x = decades(keys().fold(f64::INFINITY, f64::min).min(1e3), keys().fold(0.0, f64::max));
    let mut out = String::new();
    let height = panels.iter().fold(TOP + 20.0, |height, _| height + PANEL_HEIGHT + GAP);
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" fill="#222"><rect width="100%" height="100%" fill="#fff"/>"##
    );
    text(
        &mut out,
        LEFT,
        20.0,
        "start",
        13,
        &format!(
            "Three controllers, {} drones, {} cores for all of it and for the load; over keys held",
            report.drones, report.cores
        ),
    );
    let mut top = TOP;
    for one in &panels {
        panel(&mut out, top, x, one);
        top += PANEL_HEIGHT + GAP;
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_are_round() {
        assert_eq!(decades(3.0, 900.0), (0.0, 3.0));
        assert_eq!(decades(1_000.0, 1_000.0), (3.0, 4.0));
        assert_eq!((round_up(3.0), round_up(700.0), round_up(0.02)), (5.0, 1000.0, 0.02));
        assert_eq!((short(1e6), short(5e4), short(0.5)), ("1 M".into(), "50 k".into(), "0.5".into()));
    }
}
