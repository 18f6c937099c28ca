//! The report: one page that needs nothing else.

use core::fmt::Write;

use super::picture::{COLUMNS, Cell, Picture, ROWS};
use super::stats::{Bucket, Stats};
use crate::judge::Summary;

/// Rows of a table that are written; the rest is counted.
const LINES: usize = 1000;

/// Drawing area of a chart.
const WIDE: usize = 960;
const HIGH: usize = 150;

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1d2733;--soft:#647184;--line:#d5dbe3;--paper:#fff;--a:#2563b0;--b:#c2570c;
--good:#1b7f3b;--bad:#c0262d}
@media(prefers-color-scheme:dark){:root{--ink:#e3e8ee;--soft:#97a3b3;--line:#36404d;--paper:#14181d;--a:#6aa7f0;
--b:#f09a52;--good:#5cc27f;--bad:#f0787d}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1060px;margin:2em auto;
padding:0 1.2em}
h1{font-size:1.5em;margin-bottom:.2em;overflow-wrap:anywhere}h2{font-size:1.1em;margin-top:2em}
p{margin:.3em 0}table{border-collapse:collapse;margin:.6em 0;font-variant-numeric:tabular-nums}
th,td{padding:.15em .8em;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left;padding-left:0}th{font-weight:600}
svg{width:100%;height:auto;display:block;margin:.4em 0}svg text{fill:var(--soft);font-size:12px}
.frame{fill:none;stroke:var(--line)}.a{stroke:var(--a);fill:none;stroke-width:1.5}
.b{stroke:var(--b);fill:none;stroke-width:1.5}.fa{fill:var(--a)}.fb{fill:var(--b)}
.key{color:var(--soft)}.key b.x{color:var(--a)}.key b.y{color:var(--b)}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}";

/// The page.
pub(crate) fn page(s: &Summary, stats: &Stats) -> String {
    let mut out = String::new();
    let source = escape(&s.history.source);
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>viommu replay: {source}</title><style>{STYLE}</style></head><body>\n\
         <h1>{source}</h1>\n<p class=\"key\">replayed by viommu {}: {}, {} lines, {} operations in {:.3} s</p>\n",
        env!("CARGO_PKG_VERSION"),
        s.history.format,
        s.history.lines,
        s.history.operations,
        s.seconds,
    );
    verdict(&mut out, s);
    checked(&mut out, s);
    over_time(&mut out, stats);
    pictures(&mut out, stats);
    reuse(&mut out, stats);
    subscribers(&mut out, s);
    domains(&mut out, s);
    out.push_str("</body></html>\n");
    out
}

fn verdict(out: &mut String, s: &Summary) {
    if let Some(error) = &s.error {
        let _ = writeln!(out, "<p class=\"bad\">Could not be read on: {}</p>", escape(error));
    }
    if s.differences == 0 {
        let _ = writeln!(out, "<p class=\"good\">Nothing differs.</p>");
        return;
    }
    let _ = writeln!(out, "<p class=\"bad\">{} differences; the first:</p><ul>", s.differences);
    for d in &s.first_differences {
        let _ = writeln!(out, "<li>line {}: {}</li>", d.line, escape(&d.what));
    }
    out.push_str("</ul>\n");
}

fn checked(out: &mut String, s: &Summary) {
    let h = &s.history;
    let _ = writeln!(
        out,
        "<h2>What the guest did</h2><table><tr><th>attach</th><th>detach</th><th>map</th><th>unmap</th>\
         <th>mappings removed</th><th>resets</th><th>deviations</th><th>refused by mirrors</th><th>fences</th></tr>\
         <tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\
         </table>",
        h.attach, h.detach, h.map, h.unmap, h.removed, h.resets, h.deviations, h.refused_here, h.fences
    );
    for kind in &h.deviation_kinds {
        let _ = writeln!(out, "<p>{}: {}</p>", escape(kind.what), kind.count);
    }
    for before in &h.from_before {
        let _ = writeln!(
            out,
            "<p>Begins in the middle: domain {} was there before line {} names it.</p>",
            before.domain, before.line
        );
    }
    if let Some(a) = &h.attribution {
        let _ = writeln!(
            out,
            "<p>Attributed to a device: {} of {} maps, {} of {} unmaps; the rest is left out.</p>",
            a.maps_attributed, a.maps, a.unmaps_attributed, a.unmaps
        );
    }
    let (t, n) = (&s.translations, &s.notifications);
    let _ = writeln!(
        out,
        "<h2>What was checked</h2><table><tr><th></th><th>recorded</th><th>agree</th><th>differ</th>\
         <th>unanswered</th></tr>\
         <tr><td>translations</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>\
         <tr><td>notifications</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr></table>",
        t.recorded, t.agree, t.differ, t.unanswered, n.recorded, n.agree, n.differ, n.unanswered
    );
    let _ = writeln!(
        out,
        "<p>Accesses without an answer: {} interrupts, {} bypassed, {} faults, {} that our record answers.</p>\
         <p>Audits: {} run, {} failed.</p>",
        t.silent.msi, t.silent.bypass, t.silent.fault, t.silent.differ, s.audits.run, s.audits.failed
    );
}

fn over_time(out: &mut String, stats: &Stats) {
    let buckets = stats.buckets.get(..stats.columns()).unwrap_or(&stats.buckets);
    let per = stats.seconds();
    out.push_str("<h2>Live mappings</h2>\n");
    chart(out, stats, &[("a", buckets.iter().map(|b| scaled(b.live, None)).collect())]);
    let unit = if per.is_some() { "a second" } else { "a step of lines" };
    let _ = writeln!(
        out,
        "<h2>Rate</h2><p class=\"key\"><b class=\"x\">maps</b> and <b class=\"y\">mappings removed</b> {unit}</p>"
    );
    let rate = |what: fn(&Bucket) -> u64| buckets.iter().map(|b| scaled(what(b), per)).collect();
    chart(out, stats, &[("a", rate(|b| b.maps)), ("b", rate(|b| b.unmaps))]);
    let _ = writeln!(out, "<h2>Translated accesses</h2><p class=\"key\">{unit}</p>");
    chart(out, stats, &[("b", rate(|b| b.accesses))]);
}

#[expect(clippy::cast_precision_loss, reason = "for a picture")]
fn scaled(count: u64, seconds: Option<f64>) -> f64 {
    count as f64 / seconds.unwrap_or(1.0)
}

/// Lines over time.
fn chart(out: &mut String, stats: &Stats, lines: &[(&str, Vec<f64>)]) {
    let top = lines.iter().flat_map(|(_, values)| values).fold(0.0_f64, |a, b| a.max(*b));
    let columns = stats.columns().max(2);
    let _ = write!(
        out,
        "<svg viewBox=\"0 0 {} {}\" role=\"img\"><rect class=\"frame\" x=\"60\" y=\"8\" width=\"{WIDE}\" \
         height=\"{HIGH}\"/>",
        WIDE + 70,
        HIGH + 32
    );
    let _ = write!(out, "<text x=\"54\" y=\"18\" text-anchor=\"end\">{}</text>", round(top));
    let _ = write!(out, "<text x=\"54\" y=\"{}\" text-anchor=\"end\">0</text>", HIGH + 8);
    for (class, values) in lines {
        let _ = write!(out, "<polyline class=\"{class}\" points=\"");
        for (at, value) in values.iter().enumerate() {
            #[expect(clippy::cast_precision_loss, reason = "columns are few")]
            let x = 60.0 + (at * WIDE) as f64 / (columns - 1) as f64;
            #[expect(clippy::cast_precision_loss, reason = "a small constant")]
            let y = 8.0 + HIGH as f64 * (1.0 - if top > 0.0 { value / top } else { 0.0 });
            let _ = write!(out, "{x:.1},{y:.1} ");
        }
        out.push_str("\"/>");
    }
    time_axis(out, stats, HIGH + 24);
    out.push_str("</svg>\n");
}

fn time_axis(out: &mut String, stats: &Stats, y: usize) {
    let columns = stats.columns();
    let end = match stats.seconds() {
        #[expect(clippy::cast_precision_loss, reason = "columns are few")]
        Some(seconds) => format!("{} s", round(seconds * columns as f64)),
        None => format!("{} lines", stats.width().saturating_mul(columns as u64)),
    };
    let _ = write!(out, "<text x=\"60\" y=\"{y}\">0</text>");
    let _ = write!(out, "<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{end}</text>", WIDE + 60);
}

fn round(value: f64) -> String {
    if value >= 100.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn pictures(out: &mut String, stats: &Stats) {
    out.push_str(
        "<h2>Addresses over time</h2><p class=\"key\"><b class=\"x\">mapped</b>, and over it <b class=\"y\">accessed\
         </b>; darker is more often</p>\n",
    );
    for (domain, picture) in &stats.pictures {
        let _ = writeln!(out, "<p>domain {domain}</p>");
        draw(out, stats, picture);
    }
    if stats.not_drawn {
        let _ = writeln!(out, "<p class=\"key\">Other domains are not drawn.</p>");
    }
}

/// Class of the marks, and what is marked.
type Layer = (&'static str, fn(Cell) -> u32);

/// Steps of shade.
const SHADES: [(u32, &str); 4] = [(1, ".3"), (4, ".5"), (16, ".75"), (64, "1")];

fn draw(out: &mut String, stats: &Stats, picture: &Picture) {
    const ROW: usize = 3;
    let columns = stats.columns();
    let high = ROWS * ROW;
    let _ = write!(
        out,
        "<svg viewBox=\"0 0 {} {}\" role=\"img\"><text x=\"60\" y=\"12\">{:#x}</text>\
         <text x=\"60\" y=\"{}\">{:#x}</text>\
         <svg x=\"60\" y=\"18\" width=\"{WIDE}\" height=\"{high}\" viewBox=\"0 0 {columns} {ROWS}\" \
         preserveAspectRatio=\"none\" shape-rendering=\"crispEdges\">",
        WIDE + 70,
        high + 52,
        picture.last(),
        high + 32,
        picture.base(),
    );
    let layers: [Layer; 2] = [("fa", |c| c.maps), ("fb", |c| c.accesses)];
    for (class, what) in layers {
        for (at, (least, opacity)) in SHADES.iter().enumerate() {
            let below = SHADES.get(at + 1).map_or(u32::MAX, |(next, _)| *next);
            let mut path = String::new();
            for row in 0..ROWS {
                let mut column = 0;
                while column < columns.min(COLUMNS) {
                    let inside = |c: usize| (*least..below).contains(&what(picture.cell(c, row)));
                    let run = (column..columns).take_while(|c| inside(*c)).count();
                    if run != 0 {
                        let _ = write!(path, "M{column} {}h{run}v1h-{run}z", ROWS - 1 - row);
                    }
                    column += run.max(1);
                }
            }
            if !path.is_empty() {
                let _ = write!(out, "<path class=\"{class}\" opacity=\"{opacity}\" d=\"{path}\"/>");
            }
        }
    }
    let _ = write!(out, "</svg><rect class=\"frame\" x=\"60\" y=\"18\" width=\"{WIDE}\" height=\"{high}\"/>");
    time_axis(out, stats, high + 48);
    out.push_str("</svg>\n");
}

fn reuse(out: &mut String, stats: &Stats) {
    let _ = writeln!(
        out,
        "<h2>Reuse of addresses</h2><p class=\"key\">maps by the number of maps since the last one of the same first \
         address in the same domain; {} at an address that was not seen before, or is forgotten</p>",
        stats.first_uses
    );
    let most = stats.distances.iter().copied().max().unwrap_or(0).max(1);
    let used = stats.distances.iter().rposition(|count| *count != 0).map_or(0, |last| last + 1);
    if used == 0 {
        return;
    }
    let step = WIDE / used.max(12);
    let _ = write!(out, "<svg viewBox=\"0 0 {} {}\" role=\"img\">", WIDE + 70, HIGH + 50);
    for (at, count) in stats.distances.iter().take(used).enumerate() {
        let height = usize::try_from(count * HIGH as u64 / most).unwrap_or(HIGH);
        let (x, y) = (60 + at * step, HIGH + 20 - height);
        let label = if at < 10 { (1_u64 << at).to_string() } else { format!("2^{at}") };
        let _ = write!(
            out,
            "<rect class=\"fa\" x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{height}\"/>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{label}</text>\
             <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{count}</text>",
            step - 4,
            x + step / 2,
            HIGH + 36,
            x + step / 2,
            y - 4,
        );
    }
    out.push_str("</svg>\n");
}

fn subscribers(out: &mut String, s: &Summary) {
    out.push_str(
        "<h2>Endpoints</h2><table><tr><th>endpoint</th><th>view</th><th>domain</th><th>maps</th><th>unmaps</th>\
         <th>held</th><th>refused</th><th>fences</th><th>cache fills</th><th>hits</th><th>invalidations</th>\
         <th>held</th></tr>\n",
    );
    for (m, c) in s.mirrors.iter().zip(&s.caches).take(LINES) {
        let view = s.record.endpoints.iter().find(|e| Some(e.id) == m.endpoint).map_or("domain", |e| e.view);
        let id = m.endpoint.map_or_else(|| "not known".into(), |id| id.to_string());
        let domain = m.domain.map_or_else(|| "-".into(), |id| id.to_string());
        let _ = writeln!(
            out,
            "<tr><td>{id}</td><td>{}</td><td>{domain}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>\
             <td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            if m.fenced { "fenced" } else { view },
            m.map,
            m.unmap,
            m.held,
            m.refused,
            m.fences,
            c.fills,
            c.hits,
            c.invalidations,
            c.held
        );
    }
    out.push_str("</table>\n");
    more(out, s.mirrors.len());
}

fn domains(out: &mut String, s: &Summary) {
    out.push_str(
        "<h2>Domains at the end</h2><table><tr><th>domain</th><th>mappings</th><th>pages of 4 KiB</th></tr>\n",
    );
    for d in s.record.domains.iter().take(LINES) {
        let _ = writeln!(out, "<tr><td>{}</td><td>{}</td><td>{}</td></tr>", d.id, d.mappings, d.pages);
    }
    out.push_str("</table>\n");
    more(out, s.record.domains.len());
}

fn more(out: &mut String, count: usize) {
    if count > LINES {
        let _ = writeln!(out, "<p class=\"key\">and {} more</p>", count - LINES);
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_history_cannot_become_markup() {
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
