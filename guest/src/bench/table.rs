//! The figures, for readers and for programs.

use std::{fmt::Write as _, thread};

use serde_json::{Value, json};

use super::{
    A_LAZY, A_STRICT, B_LAZY, B_STRICT, Boot, C, D, DISK, Figures, LARGE, Qemu, SETUPS, SMALL, WORK,
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
                "- QEMU: {:.2} requests ({:.2} MAPs + {:.2} UNMAPs), {:.2} a kick; the middle of one \
                 kick by its stamps, from when its queue's handler begins to before the last used index is \
                 written, is {:.2} us with one line of trace a request, {:.2} us with two: a \
                 line costs {:.2} us, without any {:.2} us are left; all: {:.1} us without lines, \
                 {:.1} us with one each",
                qemu.requests,
                qemu.maps,
                qemu.unmaps,
                qemu.batch,
                qemu.traced,
                qemu.traced_more,
                qemu.line(),
                qemu.untraced(),
                qemu.sum(qemu.untraced()),
                qemu.sum(qemu.traced),
            );
            let _ = writeln!(text, "- at most QEMU's: {}", verdict(ours.sum, qemu));
        }
        Err(error) => {
            let _ = writeln!(text, "- QEMU's stamps do not give it: {error:#}");
        }
    }
}

/// Ours is sure to a factor of two and known better by an estimate, QEMU's to what its trace costs.
fn verdict(ours: Option<Median>, qemu: &Qemu) -> &'static str {
    let (least, most) = (qemu.sum(qemu.untraced()), qemu.sum(qemu.traced));
    match ours {
        Some(ours) if ours.most <= least => "met",
        Some(ours) if ours.least > most => "missed",
        Some(ours) if ours.about <= least => "met by our estimate; its class goes beyond QEMU's",
        Some(_) => "cannot be told: what ours may be and what QEMU's may be overlap",
        None => "cannot be told",
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
    let qemu = match &figures.inside.qemu {
        Ok(qemu) => json!({
            "requests": qemu.requests,
            "maps": qemu.maps,
            "unmaps": qemu.unmaps,
            "requests_of_a_kick": qemu.batch,
            "kick_micros_one_line_a_request": qemu.traced,
            "kick_micros_two_lines_a_request": qemu.traced_more,
            "kick_micros_without_lines": qemu.untraced(),
            "sum_micros_without_lines": qemu.sum(qemu.untraced()),
            "sum_micros_one_line_a_request": qemu.sum(qemu.traced),
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
    fn verdict_is_one_only_where_the_ranges_do_not_overlap() {
        // Eight requests, one a kick: 8 x 2 us without lines, 8 x 3 us with.
        let qemu = Qemu { requests: 8.0, maps: 4.0, unmaps: 4.0, batch: 1.0, traced: 3.0, traced_more: 4.0 };
        assert_eq!((qemu.line(), qemu.untraced(), qemu.sum(qemu.untraced())), (1.0, 2.0, 16.0));
        assert!(verdict(None, &qemu).starts_with("cannot be told"));
        let verdict = |least, about| verdict(Some(Median { least, most: 2.0 * least, about }), &qemu);
        assert_eq!(verdict(8.0, 12.0), "met");
        assert_eq!(verdict(25.0, 30.0), "missed");
        assert!(verdict(10.0, 11.0).starts_with("met by our estimate"));
        assert!(verdict(10.0, 17.0).starts_with("cannot be told"));
    }

    #[test]
    fn cell_has_the_median_and_the_ends() {
        assert_eq!(cell(&[1.0, 3.0, 2.0], 0), "2 [1..3]");
        assert_eq!(cell(&[], 2), "-");
    }
}
