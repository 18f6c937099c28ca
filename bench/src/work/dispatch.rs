//! What a step costs more for each consumer that hears of it.

use std::hint::black_box;

use viommu::{Interest, Kinds, Space};

use crate::clock::per_call;
use crate::load::{Effort, PAGE, Random, gpa};
use crate::ours::{self, Idle, Ours, range};
use crate::peers::List;
use crate::work::{Figures, dense};

/// Pages mapped: few, so that the table stays in the cache and only the consumers make a difference; and so many that
/// it has no small nodes.
const LIVE: u64 = 1 << 14;

/// A unit with consumers: those that hear of everything, those with another window, those with another kind.
struct Case {
    name: &'static str,
    hearing: usize,
    elsewhere: usize,
    otherwise: usize,
}

const CASES: [Case; 8] = [
    Case { name: "0", hearing: 0, elsewhere: 0, otherwise: 0 },
    Case { name: "1", hearing: 1, elsewhere: 0, otherwise: 0 },
    Case { name: "4", hearing: 4, elsewhere: 0, otherwise: 0 },
    Case { name: "16", hearing: 16, elsewhere: 0, otherwise: 0 },
    Case { name: "0 and 1 elsewhere", hearing: 0, elsewhere: 1, otherwise: 0 },
    Case { name: "0 and 16 elsewhere", hearing: 0, elsewhere: 16, otherwise: 0 },
    Case { name: "1 and 16 elsewhere", hearing: 1, elsewhere: 16, otherwise: 0 },
    Case { name: "1 and 16 otherwise", hearing: 1, elsewhere: 0, otherwise: 16 },
];

/// Nanoseconds of a pair in each case, turn by turn so that all see the same machine.
pub(crate) fn ours(effort: Effort) -> anyhow::Result<Figures> {
    let mut cases = Vec::new();
    for case in CASES {
        let mut unit = Ours::new()?;
        dense::fill(&mut unit, LIVE)?;
        let mut subscriptions = Vec::new();
        for _ in 0..case.hearing {
            subscriptions.push(unit.mirror(Interest::MIRROR)?);
        }
        for _ in 0..case.elsewhere {
            subscriptions.push(unit.mirror(Interest::MIRROR.within(range(0, 1 << 20)))?);
        }
        for _ in 0..case.otherwise {
            let interest = Interest::all_of(Kinds::DEVICE_TLB);
            subscriptions.push(unit.iommu.subscribe_cache(Space::Domain(1), Box::new(Idle), interest)?);
        }
        cases.push((case.name, unit, subscriptions));
    }
    let mut figures = Figures::new();
    let mut random = Random(77);
    for _ in 0..effort.rounds() * 2 {
        for (name, unit, _) in &cases {
            let pair = per_call(effort.budget() / 2, || {
                let page = random.page(LIVE);
                ours::unmap(&unit.domain, page, PAGE);
                ours::map(&unit.domain, page, PAGE, gpa(page / PAGE, LIVE));
            });
            figures.entry((*name).to_owned()).or_default().push(pair);
        }
    }
    Ok(figures)
}

/// Nanoseconds of an event to each number of notifiers.
pub(crate) fn list(effort: Effort) -> Figures {
    let mut figures = Figures::new();
    for count in [1, 4, 16] {
        let list = black_box(List::new(count));
        let mut at = 0u64;
        for _ in 0..effort.rounds() * 2 {
            let event = per_call(effort.budget() / 2, || {
                at = at.wrapping_add(PAGE) & 0xffff_ffff_f000;
                list.fire(at, at << 1);
            });
            figures.entry(count.to_string()).or_default().push(event);
        }
    }
    figures
}
