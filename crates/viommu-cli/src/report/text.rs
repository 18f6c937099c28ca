//! The table on the terminal: at most 100 columns.

use core::fmt::Write;

use anstyle::{AnsiColor, Style};

use crate::judge::Summary;

/// Columns that the page fits.
const WIDTH: usize = 100;
/// Rows of a table that are printed; the rest is counted.
const ROWS: usize = 24;

const HEAD: Style = Style::new().bold();
const GOOD: Style = AnsiColor::Green.on_default().bold();
const BAD: Style = AnsiColor::Red.on_default().bold();
const NOTE: Style = AnsiColor::Yellow.on_default();

/// The whole page, with colours; what prints it leaves them out where nobody sees them.
pub(crate) fn page(s: &Summary) -> String {
    let mut out = Page(String::new());
    let h = &s.history;
    out.title(&format!("{} ({})", shorten(&h.source, WIDTH - 20), h.format));
    out.row("lines", &format!("{}, of which {} say nothing of an IOMMU", h.lines, h.passed_over));
    out.row(
        "operations",
        &format!(
            "{}: {} attach, {} detach, {} map, {} unmap, {} reset",
            h.operations, h.attach, h.detach, h.map, h.unmap, h.resets
        ),
    );
    out.row("removed", &format!("{} mappings, by unmaps", h.removed));
    if h.refused_by_both != 0 {
        out.row("refused", &format!("{} maps by the recorded VMM and by our record", h.refused_by_both));
    }
    if h.refused_here != 0 || h.fences != 0 {
        out.row(
            "failures",
            &format!("{} operations refused by mirrors, {} fences", h.refused_here, h.fences),
        );
    }
    out.row("deviations", &h.deviations.to_string());
    for kind in &h.deviation_kinds {
        out.note(&format!("{}: {}", kind.what, kind.count));
    }
    if let Some(a) = &h.attribution {
        out.row(
            "attributed",
            &format!(
                "{} of {} maps, {} of {} unmaps, and {} unmaps without a line; the rest is left out",
                a.maps_attributed, a.maps, a.unmaps_attributed, a.unmaps, a.unmaps_inferred
            ),
        );
    }
    for before in h.from_before.iter().take(ROWS) {
        out.note(&format!(
            "begins in the middle: domain {} was there before line {} names it",
            before.domain, before.line
        ));
    }
    for found in h.found_endpoints.iter().take(ROWS) {
        out.note(&format!(
            "endpoint {} turns out to be in domain {} at line {}",
            found.endpoint, found.domain, found.line
        ));
    }
    out.title("checked");
    let t = &s.translations;
    out.answers("translations", t.recorded, t.agree, t.differ, t.unanswered);
    out.row(
        "silent",
        &format!(
            "{} interrupts, {} bypassed, {} faults, {}",
            t.silent.msi,
            t.silent.bypass,
            t.silent.fault,
            differ(t.silent.differ)
        ),
    );
    let n = &s.notifications;
    out.answers("notifications", n.recorded, n.agree, n.differ, n.unanswered);
    out.row("audits", &format!("{} run, {}", s.audits.run, failed(s.audits.failed)));
    model(&mut out, s);
    tables(&mut out, s);
    verdict(&mut out, s);
    out.0
}

/// What went through a device.
fn model(out: &mut Page, s: &Summary) {
    if let Some(tables) = &s.model.tables {
        out.title(s.model.name);
        for line in &tables.codes {
            out.row(line.hypercall, &format!("{} {}", line.count, line.code));
        }
    }
    if let Some(unit) = &s.model.unit {
        out.title(s.model.name);
        let sent = &unit.descriptors;
        out.row(
            "descriptors",
            &format!(
                "{} contexts, {} pages, {} domains, {} of everything, {} waits",
                sent.contexts, sent.pages, sent.domains, sent.global, sent.waits
            ),
        );
        out.row("tables", &format!("{} pages at most", unit.tables));
    }
    let Some(d) = &s.model.device else { return };
    out.title(s.model.name);
    for line in &d.statuses {
        out.row(line.request, &format!("{} {}", line.count, line.status));
    }
    if d.withheld != 0 {
        out.row(
            "withheld",
            &format!("{} operations that QEMU refused for what our record lacks", d.withheld),
        );
    }
    out.row("bypass", &format!("{} writes", d.bypass_writes));
    out.row("resets", &d.resets.to_string());
    out.row("events", &format!("{} faults reported", d.events));
    let a = &d.accesses;
    out.row(
        "accesses",
        &format!(
            "{} moved bytes, {} compared by address, {} translated alone",
            a.moved, a.compared, a.translated
        ),
    );
    if d.stand_ins != 0 {
        out.row("stand-ins", &format!("{} endpoints, for such as the history does not name", d.stand_ins));
    }
}

fn tables(out: &mut Page, s: &Summary) {
    out.title("record");
    let domains =
        s.record.domains.iter().map(|d| [d.id.to_string(), d.mappings.to_string(), d.pages.to_string()]);
    out.table(["domain", "mappings", "pages"], domains);
    out.title("subscribers");
    let view =
        |id: Option<u32>| s.record.endpoints.iter().find(|e| Some(e.id) == id).map_or("domain", |e| e.view);
    let rows = s.mirrors.iter().zip(&s.caches).map(|(m, c)| {
        [
            m.endpoint.map_or_else(|| "not known".into(), endpoint),
            if m.fenced { "fenced".into() } else { view(m.endpoint).to_owned() },
            m.domain.map_or_else(|| "-".into(), |d| d.to_string()),
            m.map.to_string(),
            m.unmap.to_string(),
            m.refused.to_string(),
            m.held.to_string(),
            c.fills.to_string(),
            c.hits.to_string(),
            c.held.to_string(),
        ]
    });
    out.table(
        ["endpoint", "view", "domain", "maps", "unmaps", "refused", "held", "fills", "hits", "held"],
        rows,
    );
    reals(out, s);
}

/// The real interfaces.
fn reals(out: &mut Page, s: &Summary) {
    if s.real_mirrors.is_empty() {
        return;
    }
    out.title("real interfaces");
    let rows = s.real_mirrors.iter().map(|r| {
        let calls = r.map + r.unmap + r.refused;
        #[expect(clippy::cast_precision_loss, reason = "for the reader's eye")]
        let microseconds = r.seconds * 1e6 / calls.max(1) as f64;
        [
            shorten(&r.interface, 32),
            r.endpoint.map_or_else(|| "not known".into(), endpoint),
            r.domains.to_string(),
            r.map.to_string(),
            r.unmap.to_string(),
            r.refused.to_string(),
            r.held.to_string(),
            format!("{microseconds:.1}"),
        ]
    });
    out.table(["interface", "endpoint", "domains", "maps", "unmaps", "refused", "held", "us a call"], rows);
    for r in &s.real_mirrors {
        for refusal in &r.refusals {
            out.note(&format!("{} refused {} times: {}", r.interface, refusal.count, refusal.why));
        }
        if r.domains == 0 {
            out.note(&format!("{}: its endpoint was in no domain", r.interface));
        }
    }
}

fn verdict(out: &mut Page, s: &Summary) {
    let _ = writeln!(out.0);
    if s.differences != 0 {
        let _ = writeln!(out.0, "{BAD}{} differences{BAD:#}", s.differences);
        for d in &s.first_differences {
            out.wrapped(&format!("{}:{}: {}", s.history.source, d.line, d.what), 4);
        }
    } else if s.translations.recorded + s.notifications.recorded == 0 && s.audits.run == 0 {
        out.wrapped("Nothing in it that could be checked.", 0);
    } else if s.error.is_none() {
        let _ = writeln!(out.0, "{GOOD}all agree{GOOD:#}");
    }
    if s.error.is_some() {
        out.wrapped("The history ends early: it could not be read on.", 0);
    }
    let _ = writeln!(out.0, "{} operations in {:.3} s", s.history.operations, s.seconds);
}

/// A PCI address with the number that the history uses.
fn endpoint(id: u32) -> String {
    if id > 0xffff {
        return id.to_string();
    }
    format!("{id} ({:02x}:{:02x}.{})", id >> 8, id >> 3 & 0x1f, id & 7)
}

fn differ(count: u64) -> String {
    let style = if count == 0 { Style::new() } else { BAD };
    format!("{style}{count} differ{style:#}")
}

fn failed(count: u64) -> String {
    let style = if count == 0 { Style::new() } else { BAD };
    format!("{style}{count} failed{style:#}")
}

/// The end of a long name, which tells more than its beginning.
fn shorten(name: &str, width: usize) -> String {
    let count = name.chars().count();
    if count <= width {
        return name.to_owned();
    }
    core::iter::once('…').chain(name.chars().skip(count + 1 - width)).collect()
}

struct Page(String);

impl Page {
    fn title(&mut self, text: &str) {
        let gap = if self.0.is_empty() { "" } else { "\n" };
        let _ = writeln!(self.0, "{gap}{HEAD}{text}{HEAD:#}");
    }

    fn row(&mut self, name: &str, text: &str) {
        let _ = writeln!(self.0, "  {name:<14} {text}");
    }

    fn note(&mut self, text: &str) {
        let _ = writeln!(self.0, "    {NOTE}{text}{NOTE:#}");
    }

    fn answers(&mut self, name: &str, recorded: u64, agree: u64, different: u64, unanswered: u64) {
        let different = differ(different);
        self.row(name, &format!("{agree} of {recorded} agree, {different}, {unanswered} unanswered"));
    }

    /// Words of `text` in lines of the page's width; the second and later ones are moved in.
    fn wrapped(&mut self, text: &str, inner: usize) {
        let mut column = 0;
        for word in text.split(' ') {
            let len = word.chars().count();
            if column != 0 && column + 1 + len > WIDTH {
                let _ = write!(self.0, "\n{:inner$}", "");
                column = inner;
            } else if column != 0 {
                self.0.push(' ');
                column += 1;
            }
            self.0.push_str(word);
            column += len;
        }
        self.0.push('\n');
    }

    /// Columns as wide as what they hold, numbers to the right; the first rows of them.
    fn table<const N: usize>(&mut self, head: [&str; N], rows: impl Iterator<Item = [String; N]>) {
        let mut rows = rows.peekable();
        let shown: Vec<[String; N]> = rows.by_ref().take(ROWS).collect();
        let left_out = rows.count();
        let mut widths = head.map(str::len);
        for row in &shown {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let line = |cells: &[&str]| {
            let mut line = String::from("  ");
            for (at, (cell, width)) in cells.iter().zip(widths).enumerate() {
                let _ =
                    if at == 0 { write!(line, "{cell:<width$}") } else { write!(line, "  {cell:>width$}") };
            }
            line.truncate(line.trim_end().len());
            line
        };
        let head = line(&head);
        let _ = writeln!(self.0, "{HEAD}{head}{HEAD:#}");
        for row in &shown {
            let cells: Vec<&str> = row.iter().map(String::as_str).collect();
            let _ = writeln!(self.0, "{}", line(&cells));
        }
        if left_out != 0 {
            let _ = writeln!(self.0, "  ... and {left_out} more");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_their_end_and_long_texts_their_words() {
        assert_eq!(shorten("abcdef", 4), "…def");
        assert_eq!(shorten("abc", 4), "abc");
        let mut page = Page(String::new());
        page.wrapped(&"word ".repeat(50), 4);
        assert!(page.0.lines().all(|line| line.chars().count() <= WIDTH));
        assert_eq!(page.0.matches("word").count(), 50);
    }
}
