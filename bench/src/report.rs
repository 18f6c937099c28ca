//! The rows as a table, and as JSON.

use std::fmt::Write as _;

use crate::row::{Limit, Row};

/// Columns for peers, in order; those that no row has are left out.
const PEERS: [&str; 6] = ["vm-memory", "rangemap", "crosvm", "qemu", "radix", "list"];

/// A list of objects, one for each row.
///
/// # Errors
/// None that a row could cause.
pub(crate) fn json(rows: &[Row]) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(rows)?)
}

/// Three digits that tell something.
fn number(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn peer(row: &Row, name: &str) -> String {
    let Some(value) = row.peers.get(name) else { return String::new() };
    let Some(value) = value else { return "-".to_owned() };
    let mut text = number(*value);
    if let Some(ratio) = row.ratio.get(name) {
        let _ = write!(text, " {}x", number(*ratio));
    }
    if let Some(factor) = row.factors.get(name) {
        let _ = write!(text, "/{}", number(factor.wanted));
    }
    text
}

/// A table: `254 53x/25` under a peer is its value, by how many times ours is better, and by how many it should be.
pub(crate) fn table(rows: &[Row]) -> String {
    let peers: Vec<&str> =
        PEERS.into_iter().filter(|name| rows.iter().any(|row| row.peers.contains_key(name))).collect();
    let mut lines = vec![["goal", "what", "ours", "limit", "met", "noise"].map(str::to_owned).to_vec()];
    lines[0].extend(peers.iter().map(|name| (*name).to_owned()));
    for row in rows {
        let limit = match row.limit {
            Limit::AtMost(most) => format!("<= {}", number(most)),
            Limit::AtLeast(least) => format!(">= {}", number(least)),
            Limit::None => String::new(),
        };
        let met = match row.met {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        let mut line = vec![
            row.goal.to_owned(),
            row.what.clone(),
            format!("{} {}", number(row.ours), row.unit),
            limit,
            met.to_owned(),
            format!("{:.0} %", row.noise * 100.0),
        ];
        line.extend(peers.iter().map(|name| peer(row, name)));
        lines.push(line);
    }
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut out = String::new();
        for (cell, width) in line.iter().zip(&widths) {
            let _ = write!(out, "{cell:<width$}  ");
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::Value as Json;

    use super::*;
    use crate::row::{Rule, Value};
    use crate::work::Who;

    fn rows() -> Vec<Row> {
        let limit = Limit::AtMost(10.0);
        let row = Row::new("G1", "translate", "ns", limit, Value { value: 5.0, noise: 0.01 });
        let row = row.peer(Who::Crosvm, Some(100.0)).peer(Who::Qemu, None);
        let reported = Row::new("none", "busy", "M/s", Limit::None, Value { value: 1.0, noise: 0.5 });
        vec![row.wants(Rule::Factors, &[(Who::Crosvm, 12.0)]).done(), reported.done()]
    }

    #[test]
    fn json_is_a_list_of_objects_with_goal_ours_unit_peers_met() {
        let parsed: Json = serde_json::from_str(&json(&rows()).unwrap()).unwrap();
        let first = &parsed[0];
        assert_eq!(first["goal"], "G1");
        assert_eq!(first["ours"], 5.0);
        assert_eq!(first["unit"], "ns");
        assert_eq!(first["peers"]["crosvm"], 100.0);
        assert!(first["peers"]["qemu"].is_null());
        assert_eq!(first["met"], true);
        assert_eq!(first["ratio"]["crosvm"], 20.0);
        assert_eq!(first["factors"]["crosvm"]["wanted"], 12.0);
        assert_eq!(first["limit"]["at_most"], 10.0);
        assert_eq!(first["noise"], 0.01);
        assert!(parsed[1]["met"].is_null());
        assert_eq!(parsed.as_array().unwrap().len(), 2);
    }

    #[test]
    fn table_shows_values_ratios_and_what_is_wanted() {
        let text = table(&rows());
        assert!(text.contains("100 20.0x/12.0"), "{text}");
        assert!(text.lines().nth(1).unwrap().contains("yes"), "{text}");
        assert!(!text.contains("vm-memory"), "a column without values: {text}");
    }
}
