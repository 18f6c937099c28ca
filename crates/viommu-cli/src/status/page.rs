//! What is shown, line by line, for a terminal of any height and for a pipe.

use super::format::{age, bars, bytes, count, end_of, rate, time};
use super::rates::{History, Rates};
use crate::serve::snapshot::{Histogram, Iommu, Snapshot, View};

/// Columns.
pub(super) const WIDTH: usize = 80;
/// Columns of the bars of a rate.
const BARS: usize = 14;

/// How something looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    Head,
    Good,
    Bad,
    /// Of less weight.
    Soft,
}

/// A line, in pieces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Line(pub(super) Vec<(Tone, String)>);

impl Line {
    fn of(tone: Tone, text: impl Into<String>) -> Self {
        Self(vec![(tone, text.into())])
    }

    fn add(&mut self, tone: Tone, text: impl Into<String>) {
        self.0.push((tone, text.into()));
    }

    /// Without how it looks.
    #[cfg(test)]
    pub(super) fn text(&self) -> String {
        self.0.iter().map(|(_, text)| text.as_str()).collect()
    }
}

/// The page. `height` is how many lines there may be: where not all fit, empty lines go first, then ends of lists.
pub(super) fn page(directory: &str, history: &History, height: usize) -> Vec<Line> {
    let Some(snapshot) = history.last() else { return Vec::new() };
    let rates = history.now();
    let mut parts = vec![vec![title(directory, snapshot)]];
    let mut lists = vec![(functions(snapshot, rates), "functions")];
    if let Some(iommu) = &snapshot.iommu {
        parts.push(beside(requests(iommu, history), facts(iommu, rates)));
        parts.push(times(iommu));
        lists.push((domains(snapshot, iommu), "domains"));
        lists.push((faults(snapshot, iommu), "faults"));
    }
    // A list of nothing but its head says nothing.
    lists.retain(|(list, _)| list.len() > 1);
    let fixed: usize = parts.iter().map(Vec::len).sum();
    let all: usize = fixed + lists.iter().map(|(list, _)| list.len()).sum::<usize>();
    let gaps = all + parts.len() + lists.len() <= height + 1;
    parts.extend(within(lists, if gaps { usize::MAX } else { height.saturating_sub(fixed) }));
    let mut lines: Vec<Line> = Vec::new();
    for part in parts.into_iter().filter(|part| !part.is_empty()) {
        if gaps && !lines.is_empty() {
            lines.push(Line::default());
        }
        lines.extend(part);
    }
    lines.truncate(height);
    lines
}

fn title(directory: &str, snapshot: &Snapshot) -> Line {
    let name = format!("viommu {}", snapshot.version);
    let rest = format!("pid {}, up {}", snapshot.pid, age(snapshot.uptime_ns));
    let room = WIDTH.saturating_sub(name.chars().count() + rest.chars().count() + 4);
    let mut line = Line::of(Tone::Head, name);
    line.add(Tone::Plain, format!("  {:<room$}  ", end_of(directory, room)));
    line.add(Tone::Soft, rest);
    line
}

/// Rates of requests and translations.
fn requests(iommu: &Iommu, history: &History) -> Vec<Line> {
    let (title, names, refused): (_, &[&str], _) = match iommu.vtd {
        None => ("requests", &["MAP", "UNMAP", "ATTACH", "DETACH"], "refused"),
        // A driver that says something wrong has its queue stopped, and no answer.
        Some(_) => ("told of", &["context", "domain", "pages", "wait"], ""),
    };
    let head = match history.now() {
        Some(_) => {
            format!("{title:<9}{:>9}  {:<BARS$}{:>11}{refused:>8}", "a second", "", "total")
        }
        None => format!("{title:<9}{:>11}{refused:>8}", "total"),
    };
    let mut lines = vec![Line::of(Tone::Head, head)];
    let row = |name: &str, rate_of: &dyn Fn(&Rates) -> f64, total: String, refused: Option<u64>| {
        let mut line = Line::of(Tone::Plain, format!("{name:<9}"));
        if let Some(now) = history.now() {
            line.add(Tone::Plain, format!("{:>9}  ", rate(rate_of(now))));
            line.add(Tone::Soft, bars(history.rates().map(rate_of), BARS));
        }
        line.add(Tone::Plain, format!("{total:>11}"));
        let tone = if refused.is_some_and(|refused| refused != 0) { Tone::Bad } else { Tone::Plain };
        line.add(tone, format!("{:>8}", refused.map(count).unwrap_or_default()));
        line
    };
    for name in names {
        let (total, refused) = (count(iommu.answers(name)), iommu.refusals(name));
        lines.push(row(name, &|rates| rates.request(name), total, iommu.vtd.is_none().then_some(refused)));
    }
    let all: u64 =
        history.last().map_or(0, |last| last.endpoints.iter().map(|endpoint| endpoint.batches).sum());
    lines.push(row("batches", &Rates::all_batches, count(all), None));
    lines
}

/// The record's size, and what went wrong.
fn facts(iommu: &Iommu, rates: Option<&Rates>) -> Vec<Line> {
    let fact = |name: &str, tone: Tone, text: String| {
        let mut line = Line::of(Tone::Soft, format!("{name:<9}"));
        line.add(tone, text);
        line
    };
    let mut faults = count(iommu.faults.total());
    if let Some(rates) = rates.filter(|rates| rates.faults > 0.0) {
        faults.push_str(&format!(" ({}/s)", rate(rates.faults)));
    }
    let bad = |is: bool| if is { Tone::Bad } else { Tone::Plain };
    let mut lines = vec![
        Line::of(Tone::Head, "record"),
        fact("mappings", Tone::Plain, count(iommu.live())),
        fact("tables", Tone::Plain, bytes(iommu.table_bytes)),
    ];
    let switch = |on: bool| if on { "on" } else { "off" }.to_owned();
    match &iommu.vtd {
        None => lines.push(fact("bypass", Tone::Plain, switch(iommu.bypass))),
        Some(vtd) => {
            lines.push(fact("mode", Tone::Plain, vtd.mode.clone()));
            lines.push(fact("caching", Tone::Plain, switch(vtd.caching_mode)));
            let wrong = vtd.registers.is_some() && vtd.registers != vtd.in_table;
            let at = vtd.registers.map_or_else(|| "-".into(), |at| at.to_string());
            lines.push(fact("at", bad(wrong), at));
        }
    }
    lines.extend([
        fact("waiting", Tone::Plain, count(iommu.outstanding)),
        fact("faults", bad(iommu.faults.total() != 0), faults),
    ]);
    // Requests that could not be read, and reports that found no room.
    let troubles = [("unread", iommu.malformed), ("lost", iommu.faults.lost)];
    lines.extend(troubles.iter().filter(|(_, n)| *n != 0).map(|(name, n)| fact(name, Tone::Bad, count(*n))));
    lines
}

/// Two columns of lines.
fn beside(left: Vec<Line>, right: Vec<Line>) -> Vec<Line> {
    let width = |line: &Line| line.0.iter().map(|(_, text)| text.chars().count()).sum::<usize>();
    let middle = left.iter().map(width).max().unwrap_or(0) + 4;
    let count = left.len().max(right.len());
    let (mut left, mut right) = (left.into_iter(), right.into_iter());
    let line = |_| {
        let mut line = left.next().unwrap_or_default();
        if let Some(more) = right.next() {
            line.add(Tone::Plain, " ".repeat(middle.saturating_sub(width(&line))));
            line.0.extend(more.0);
        }
        line
    };
    (0..count).map(line).collect()
}

fn times(iommu: &Iommu) -> Vec<Line> {
    let head =
        format!("{:<26}{:>10}{:>12}{:>12}{:>12}", "times", "count", "half below", "99 % below", "longest");
    let row = |name: &str, times: &Histogram| {
        let at = |percent| times.percentile(percent).map_or_else(|| "-".into(), time);
        let longest = if times.count() == 0 { "-".into() } else { time(times.longest_ns) };
        let text = format!("{name:<26}{:>10}{:>12}{:>12}{longest:>12}", count(times.count()), at(50), at(99));
        Line::of(Tone::Plain, text)
    };
    let empty = Histogram::default();
    let any = iommu.function.request_times.as_ref().unwrap_or(&empty);
    let mut lines = vec![Line::of(Tone::Head, head)];
    match iommu.vtd {
        None => {
            lines.push(row("UNMAP until answered", &iommu.unmap_times));
            lines.push(row("any request until answered", any));
        }
        Some(_) => lines.push(row("queue until done", any)),
    }
    lines
}

fn functions(snapshot: &Snapshot, rates: Option<&Rates>) -> Vec<Line> {
    let batches = if rates.is_some() { "batches/s" } else { "batches" };
    let head = format!(
        "{:<8}{:<27}{:<8}{:<8}{:<10}{batches:>9}{:>10}",
        "function", " device", " VMM", "driver", "sees", "memory"
    );
    let mut lines = vec![Line::of(Tone::Head, head)];
    let iommu = snapshot.iommu.iter().map(|iommu| (&iommu.function, None));
    let endpoints = snapshot.endpoints.iter().map(|endpoint| (&endpoint.function, Some(endpoint)));
    for (function, endpoint) in iommu.chain(endpoints) {
        let mut line =
            Line::of(Tone::Plain, format!("{:<8} {:<26}", function.address, name(&function.device, 25)));
        let (tone, vmm) = if function.connected { (Tone::Good, " there") } else { (Tone::Soft, " away") };
        line.add(tone, format!("{vmm:<8}"));
        let (tone, driver) = if function.driver_ready { (Tone::Good, "ready") } else { (Tone::Soft, "-") };
        line.add(tone, format!("{driver:<8}"));
        let (tone, sees) = match endpoint {
            Some(endpoint) if endpoint.fenced => (Tone::Bad, "cut off".into()),
            Some(endpoint) if endpoint.view == View::Blocked => (Tone::Soft, endpoint.view.to_string()),
            Some(endpoint) => (Tone::Plain, endpoint.view.to_string()),
            None => (Tone::Plain, String::new()),
        };
        line.add(tone, format!("{sees:<10}"));
        let batches = endpoint.map(|endpoint| match rates {
            Some(rates) => rate(rates.batches(endpoint.id)),
            None => count(endpoint.batches),
        });
        let memory = if function.memory.windows == 0 { "-".into() } else { bytes(function.memory.bytes) };
        line.add(Tone::Plain, format!("{:>9}{memory:>10}", batches.unwrap_or_default()));
        lines.push(line);
    }
    lines
}

/// What a device is: the end of a long path tells more than its beginning.
fn name(device: &str, width: usize) -> String {
    match device.split_once(':') {
        Some((kind, rest)) => {
            format!("{kind}:{}", end_of(rest, width.saturating_sub(kind.chars().count() + 1)))
        }
        None => end_of(device, width),
    }
}

fn domains(snapshot: &Snapshot, iommu: &Iommu) -> Vec<Line> {
    let mut lines = vec![Line::of(
        Tone::Head,
        format!("{:<10}{:>10}{:>11}   {}", "domain", "mappings", "tables", "endpoints"),
    )];
    for domain in &iommu.domains {
        let names: Vec<String> = domain.endpoints.iter().map(|id| snapshot.name_of(*id)).collect();
        let names = names.join(" ");
        let room = WIDTH - 34;
        let names = if names.chars().count() > room {
            format!("{} of them", count(u64::try_from(domain.endpoints.len()).unwrap_or(u64::MAX)))
        } else {
            names
        };
        let text =
            format!("{:<10}{:>10}{:>11}   {names}", domain.id, count(domain.live), bytes(domain.table_bytes));
        lines.push(Line::of(Tone::Plain, text));
    }
    lines
}

/// The newest first.
fn faults(snapshot: &Snapshot, iommu: &Iommu) -> Vec<Line> {
    let head = format!("{:<12}{:<10}{:<20}{:<4}{}", "last faults", "endpoint", "address", "", "reason");
    let mut lines = vec![Line::of(Tone::Head, head)];
    for fault in iommu.faults.recent.iter().rev() {
        let ago = format!("{} ago", age(snapshot.uptime_ns.saturating_sub(fault.at_ns)));
        let (name, iova) = (snapshot.name_of(fault.endpoint), fault.iova.to_string());
        let text = format!("{ago:<12}{name:<10}{iova:<20}{:<4}{}", fault.access, fault.reason);
        lines.push(Line::of(Tone::Plain, text));
    }
    lines
}

/// As much of each list as there is room for, line by line to each in turn: a short one leaves its room to the others.
/// What is left out is counted.
fn within(lists: Vec<(Vec<Line>, &'static str)>, room: usize) -> Vec<Vec<Line>> {
    let mut shares: Vec<usize> = vec![0; lists.len()];
    let mut left = room.min(lists.iter().map(|(list, _)| list.len()).sum());
    while left > 0 {
        for (share, (list, _)) in shares.iter_mut().zip(&lists) {
            if left > 0 && *share < list.len() {
                *share += 1;
                left -= 1;
            }
        }
    }
    let cut = |((mut list, name), share): ((Vec<Line>, &str), usize)| {
        let out = list.len().saturating_sub(share);
        if out > 0 {
            list.truncate(share.saturating_sub(1));
            if share > 1 {
                list.push(Line::of(Tone::Soft, format!("... and {} more {name}", out + 1)));
            }
        }
        list
    };
    lists.into_iter().zip(shares).map(cut).collect()
}

#[cfg(test)]
pub(in crate::status) mod tests;
