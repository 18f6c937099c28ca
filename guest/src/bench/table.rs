//! The figures, for readers and for programs.

use std::{fmt::Write as _, thread};

use serde_json::{Value, json};

use super::{
    A_LAZY, A_STRICT, B_LAZY, B_STRICT, Boot, C, D, DISK, Figures, LARGE, Qemu, SETUPS, SMALL, WORK,
    stamps::Times,
    stats::{Median, Spread},
};

/// The most that lazy mode may cost, as a ratio to no IOMMU.
const LAZY_GOAL: f64 = 1.2;

/// Figures that are made of two set-ups' in the same round.
struct Compared {
    name: &'static str,
    set_ups: (usize, usize),
    by: fn(f64, f64) -> f64,
    goal: Option<f64>,
}

const COMPARED: [Compared; 6] = [
    Compared { name: "a lazy / c", set_ups: (A_LAZY, C), by: ratio, goal: Some(LAZY_GOAL) },
    Compared { name: "b lazy / d", set_ups: (B_LAZY, D), by: ratio, goal: None },
    Compared { name: "a strict / c", set_ups: (A_STRICT, C), by: ratio, goal: None },
    Compared { name: "b strict / d", set_ups: (B_STRICT, D), by: ratio, goal: None },
    Compared { name: "a strict - c", set_ups: (A_STRICT, C), by: difference, goal: None },
    Compared { name: "b strict - d", set_ups: (B_STRICT, D), by: difference, goal: None },
];

fn ratio(one: f64, other: f64) -> f64 {
    one / other
}

fn difference(one: f64, other: f64) -> f64 {
    one - other
}

fn of_set_up(figures: &Figures, set_up: usize, work: usize) -> Vec<f64> {
    figures.boots[set_up].iter().map(|boot: &Boot| boot.micros[work]).collect()
}

fn of_two(figures: &Figures, compared: &Compared, work: usize) -> Vec<f64> {
    let one = of_set_up(figures, compared.set_ups.0, work);
    let other = of_set_up(figures, compared.set_ups.1, work);
    one.iter().zip(&other).map(|(one, other)| (compared.by)(*one, *other)).collect()
}

fn cell(values: &[f64], digits: usize) -> String {
    match Spread::of(values) {
        Some(Spread { median, least, most }) => {
            format!("{median:.digits$} [{least:.digits$}..{most:.digits$}]")
        }
        None => "-".to_owned(),
    }
}

fn row(text: &mut String, name: &str, cells: impl Iterator<Item = String>) {
    let _ = write!(text, "| {name:<13}");
    cells.for_each(|cell| {
        let _ = write!(text, "| {cell:<24}");
    });
    text.push_str("|\n");
}

/// Tables of Markdown, and what is to be said of them.
pub(super) fn text(figures: &Figures) -> String {
    let mut text = format!(
        "\n{}; kernel {}; {} rounds; {} processors; load {} before, {} after; clock {}\n\n",
        figures.qemu,
        figures.kernel,
        figures.boots[0].len(),
        processors(),
        figures.load[0],
        figures.load[1],
        figures.boots[0].first().map_or("", |boot| &boot.clock),
    );
    let _ = writeln!(
        text,
        "Microseconds of a request, median [least..most]; {SMALL} requests of 4 KiB, {LARGE} of 64 KiB.\n"
    );
    let heads = |text: &mut String| {
        row(text, "", WORK.iter().map(|work| work.replace("4096", "4 KiB").replace("65536", "64 KiB")));
        row(text, "---", WORK.iter().map(|_| "---".to_owned()));
    };
    heads(&mut text);
    for (index, set_up) in SETUPS.iter().enumerate() {
        row(&mut text, set_up.name, (0..WORK.len()).map(|work| cell(&of_set_up(figures, index, work), 0)));
    }
    text.push_str("\nOf the same round, median [least..most]; differences in microseconds.\n\n");
    heads(&mut text);
    for compared in &COMPARED {
        let digits = if compared.name.contains('-') { 0 } else { 2 };
        row(
            &mut text,
            compared.name,
            (0..WORK.len()).map(|work| cell(&of_two(figures, compared, work), digits)),
        );
    }
    for compared in &COMPARED {
        let Some(goal) = compared.goal else { continue };
        let medians = (0..WORK.len()).filter_map(|work| Spread::of(&of_two(figures, compared, work)));
        let most = medians.map(|spread| spread.median).fold(0.0, f64::max);
        let met = if most <= goal { "met" } else { "missed" };
        let _ =
            writeln!(text, "\n{}: at most {goal}: {met} (the highest median is {most:.2})", compared.name);
    }
    inside(&mut text, figures);
    text
}

fn inside(text: &mut String, figures: &Figures) {
    let ours = &figures.inside.ours;
    text.push_str("\nInside the process, strict, for one request of 4 KiB (all its MAPs and UNMAPs):\n");
    let _ = write!(text, "- ours: {:.2} MAPs + {:.2} UNMAPs; ", ours.maps, ours.unmaps);
    match (ours.median, ours.sum) {
        (Some(one), Some(all)) => {
            let _ = writeln!(
                text,
                "the median of one, from when its queue's handler begins to the used ring, is about \
                 {:.2} us (its class: {:.2} to {:.2}); all: about {:.1} us ({:.1} to {:.1})",
                one.about, one.least, one.most, all.about, all.least, all.most
            );
        }
        _ => text.push_str("the times do not say\n"),
    }
    match &figures.inside.qemu {
        Ok(qemu) => {
            let _ = writeln!(
                text,
                "- QEMU: {:.2} MAPs + {:.2} UNMAPs ({:.2} requests in all; {:.0} % of kicks have several and are not \
                 timed); one kick, by its stamps, from when its queue's handler begins to before its answer is given \
                 back:",
                qemu.maps,
                qemu.unmaps,
                qemu.requests,
                qemu.several * 100.0
            );
            for (lines, times) in [("one line", qemu.one_line), ("two lines", qemu.two_lines)] {
                let _ = writeln!(
                    text,
                    "  - with {lines} of trace in it {:.2} us; a line takes {:.2} us; {:.2} us are left",
                    times.traced, times.line, times.left
                );
            }
            let (low, high) = qemu.estimates();
            let _ = writeln!(
                text,
                "  - all: at most {:.1} us, by estimate without lines {low:.1} to {high:.1} us",
                qemu.most()
            );
            let _ = writeln!(text, "- at most QEMU's: {}", verdict(ours.sum, qemu));
        }
        Err(error) => {
            let _ = writeln!(text, "- QEMU's stamps do not give it: {error:#}");
        }
    }
}

/// QEMU's is sure only to be at most what it takes with the trace. Without, it is an estimate, good for an answer only
/// if both boots give one above zero and they agree within a factor of two.
fn verdict(ours: Option<Median>, qemu: &Qemu) -> &'static str {
    let (low, high) = qemu.estimates();
    let Some(ours) = ours else {
        return "cannot be told: the times of ours do not say";
    };
    if ours.least > qemu.most() {
        "missed"
    } else if low <= 0.0 || high > 2.0 * low {
        "cannot be told: the lines of QEMU's trace take too much of what its stamps show"
    } else if ours.most <= low {
        "met by estimate"
    } else if ours.least > high {
        "missed by estimate"
    } else {
        "cannot be told: what ours may be and the estimate of QEMU's overlap"
    }
}

/// All of it, each boot's figures too.
pub(super) fn json(figures: &Figures) -> Value {
    let spread = |values: Vec<f64>| {
        let spread = Spread::of(&values);
        json!({
            "median": spread.map(|spread| spread.median),
            "least": spread.map(|spread| spread.least),
            "most": spread.map(|spread| spread.most),
            "values": values,
        })
    };
    let by_work = |values: &dyn Fn(usize) -> Vec<f64>| -> Value {
        WORK.iter().enumerate().map(|(work, name)| ((*name).to_owned(), spread(values(work)))).collect()
    };
    let set_ups: Vec<Value> = SETUPS
        .iter()
        .enumerate()
        .map(|(index, set_up)| {
            let micros = by_work(&|work| of_set_up(figures, index, work));
            json!({ "name": set_up.name, "about": set_up.about, "micros": micros })
        })
        .collect();
    let compared: Vec<Value> = COMPARED
        .iter()
        .map(|compared| {
            let values = by_work(&|work| of_two(figures, compared, work));
            json!({ "name": compared.name, "at_most": compared.goal, "values": values })
        })
        .collect();
    let ours = &figures.inside.ours;
    let median = |median: Option<Median>| {
        median.map(|median| json!({ "about": median.about, "from": median.least, "to": median.most }))
    };
    let times = |times: Times| json!({ "traced": times.traced, "line": times.line, "left": times.left });
    let qemu = match &figures.inside.qemu {
        Ok(qemu) => json!({
            "maps": qemu.maps,
            "unmaps": qemu.unmaps,
            "requests": qemu.requests,
            "share_of_kicks_not_timed": qemu.several,
            "one_line_micros": times(qemu.one_line),
            "two_lines_micros": times(qemu.two_lines),
            "sum_micros_at_most": qemu.most(),
            "sum_micros_by_estimate": qemu.estimates(),
            "goal": verdict(ours.sum, qemu),
        }),
        Err(error) => json!({ "error": format!("{error:#}") }),
    };
    json!({
        "qemu": figures.qemu,
        "kernel": figures.kernel,
        "rounds": figures.boots[0].len(),
        "processors": processors(),
        "load": figures.load,
        "requests": { "4096": SMALL, "65536": LARGE },
        "disk_mebibytes": DISK,
        "set_ups": set_ups,
        "compared": compared,
        "inside": {
            "ours": {
                "maps": ours.maps,
                "unmaps": ours.unmaps,
                "median_micros": median(ours.median),
                "sum_micros": median(ours.sum),
                "classes": ours.classes,
            },
            "qemu": qemu,
        },
    })
}

fn processors() -> usize {
    thread::available_parallelism().map_or(0, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdict_is_one_only_where_the_stamps_allow_it() {
        let times = |left| Times { traced: 5.0, line: 2.0, left };
        let told = |least: f64, (one, two): (f64, f64)| {
            let (one_line, two_lines) = (times(one), times(two));
            let qemu = Qemu { maps: 4.0, unmaps: 4.0, requests: 8.0, several: 0.0, one_line, two_lines };
            verdict(Some(Median { least, most: 2.0 * least, about: 1.5 * least }), &qemu)
        };
        // All of QEMU's: by estimate 8 to 16 us, at most 40 us.
        assert_eq!(told(4.0, (2.0, 1.0)), "met by estimate");
        assert!(told(5.0, (2.0, 1.0)).contains("overlap"));
        assert_eq!(told(17.0, (2.0, 1.0)), "missed by estimate");
        assert_eq!(told(41.0, (2.0, 1.0)), "missed");
        assert_eq!(told(41.0, (2.0, -1.0)), "missed", "sure without the estimate");
        assert!(told(0.1, (2.0, -1.0)).contains("lines"), "below zero is no estimate");
        assert!(told(0.1, (2.1, 1.0)).contains("lines"), "two that do not agree are none");
    }

    #[test]
    fn cell_has_the_median_and_the_ends() {
        assert_eq!(cell(&[1.0, 3.0, 2.0], 0), "2 [1..3]");
        assert_eq!(cell(&[], 2), "-");
    }
}
