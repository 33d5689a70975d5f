//! Results as text, in columns.

use super::outcome::Outcome;
use super::packing::{LOADS, Packing, shares_text};
use super::study::{Point, TwoNode};

/// Columns as wide as their widest cell; the first is flush left.
fn columns(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
        cells.chain([head[at].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(&widths).enumerate().map(|(at, (cell, width))| match at {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    rows.iter().for_each(|row| text += &line(&mut row.iter().map(String::as_str)));
    text
}

fn percent(share: f64) -> String {
    format!("{:.1}", share * 100.0)
}

fn seconds(value: f64) -> String {
    if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// One line for each strategy.
pub fn comparison(outcomes: &[Outcome]) -> String {
    let head = [
        "STRATEGY",
        "STARTED",
        "OF",
        "USEFUL%",
        "HELD%",
        "WASTED%",
        "FREE%",
        "WAIT-MEAN",
        "P50",
        "P95",
        "CONFLICTS/JOB",
        "BUSY%",
        "STUCK-SINCE",
    ];
    let row = |one: &Outcome| {
        vec![
            one.strategy.clone(),
            one.started.to_string(),
            one.jobs.to_string(),
            percent(one.shares.useful),
            percent(one.shares.held),
            percent(one.shares.wasted),
            percent(one.shares.free),
            seconds(one.wait.mean_s),
            seconds(one.wait.p50_s),
            seconds(one.wait.p95_s),
            format!("{:.3}", one.conflict_fraction),
            percent(one.busyness),
            one.stuck_since_s.map_or("-".into(), |since| format!("{since:.0} s")),
        ]
    };
    columns(&head, &outcomes.iter().map(row).collect::<Vec<_>>())
}

/// One line for each strategy and number of pairs.
pub fn two_node(all: &[TwoNode]) -> String {
    let row = |one: &TwoNode| {
        vec![
            one.strategy.clone(),
            one.pairs.to_string(),
            percent(one.stuck as f64 / one.runs.max(1) as f64),
            format!("{:.2}", one.ran),
            one.done_s.map_or("-".into(), seconds),
            percent(one.idle_or_wasted),
        ]
    };
    let head = ["STRATEGY", "PAIRS", "STUCK%", "PAIRS-RUN", "DONE-AFTER", "MEMORY-HELD-IDLE%"];
    columns(&head, &all.iter().map(row).collect::<Vec<_>>())
}

/// One line for each strategy and value of what was varied.
pub fn points(what: &str, points: &[Point]) -> String {
    let row = |point: &Point| {
        let one = &point.outcome;
        vec![
            one.strategy.clone(),
            format!("{}", point.at),
            format!("{:.3}", one.conflict_fraction),
            format!("{:.3}", one.conflict_fraction_service),
            percent(one.busyness_by_scheduler.first().copied().unwrap_or(0.0)),
            percent(one.busyness),
            percent(one.decisions_lost),
            percent(one.shares.useful),
            seconds(one.wait.mean_s),
            seconds(one.wait.p95_s),
        ]
    };
    let head = [
        "STRATEGY",
        what,
        "CONFLICTS/JOB",
        "PER-SERVICE",
        "BUSY-FIRST%",
        "BUSY-MEAN%",
        "DECISIONS-LOST%",
        "USEFUL%",
        "WAIT-MEAN",
        "P95",
    ];
    columns(&head, &points.iter().map(row).collect::<Vec<_>>())
}

/// One line for each filler.
pub fn packing(all: &[Packing]) -> String {
    let row = |one: &Packing| {
        let mut cells = vec![
            one.filler.to_owned(),
            one.nodes_over_bound.map_or("-".into(), |over| format!("{over:.3}")),
            percent(one.load_at_first_refusal),
            percent(one.load_full),
        ];
        cells.extend(one.largest.iter().map(|share| share.map_or("-".into(), percent)));
        cells.push(shares_text(&one.stranded));
        cells
    };
    let largest = LOADS.map(|load| format!("LARGEST%@{:.0}", load * 100.0));
    let mut head = vec!["FILLER", "NODES/BOUND", "FIRST-REFUSAL%", "FULL%"];
    head.extend(largest.iter().map(String::as_str));
    head.push("STRANDED");
    columns(&head, &all.iter().map(row).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "234567".to_owned()]];
        assert_eq!(columns(&["NAME", "N"], &rows), "NAME       N\na          1\nlong  234567\n");
    }
}
