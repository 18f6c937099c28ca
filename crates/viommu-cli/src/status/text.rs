//! The page as text, and lists of mappings.

use core::fmt::Write;

use anstyle::{AnsiColor, Style};

use super::page::{Line, Tone, page};
use super::rates::History;
use crate::serve::snapshot::Snapshot;

/// Lines of a page that nobody's terminal limits.
const HEIGHT: usize = 60;

fn style(tone: Tone) -> Style {
    match tone {
        Tone::Plain => Style::new(),
        Tone::Head => Style::new().bold(),
        Tone::Good => AnsiColor::Green.on_default(),
        Tone::Bad => AnsiColor::Red.on_default().bold(),
        Tone::Soft => Style::new().dimmed(),
    }
}

/// One state, with colours; what prints it leaves them out where nobody sees them.
pub(super) fn show(directory: &str, snapshot: Snapshot) -> String {
    let mappings = mappings(&snapshot);
    let mut history = History::default();
    history.push(snapshot);
    let mut text = String::new();
    for Line(pieces) in page(directory, &history, HEIGHT) {
        let mut line = String::new();
        for (tone, piece) in pieces {
            let style = style(tone);
            let _ = write!(line, "{style}{piece}{style:#}");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text + &mappings
}

/// The mappings, where they are there.
fn mappings(snapshot: &Snapshot) -> String {
    let mut text = String::new();
    for domain in snapshot.iommu.iter().flat_map(|iommu| &iommu.domains) {
        // Where the record does not follow the guest's tables, these are what there is.
        let (list, place) = match (&domain.mappings, &domain.tables) {
            (Some(record), _) => (record, ""),
            (None, Some(tables)) => (tables, " in the guest's tables"),
            (None, None) => continue,
        };
        let head = style(Tone::Head);
        let _ = writeln!(text, "\n{head}domain {}: {} mappings{place}{head:#}", domain.id, list.len());
        for m in list {
            let kind = if m.mmio { " mmio" } else { "" };
            let (start, last, gpa) = (m.start.to_string(), m.last.to_string(), m.gpa.to_string());
            let _ = writeln!(text, "{start:>18} - {last:<18} at {gpa:<18} {}{kind}", m.access);
        }
    }
    text
}
