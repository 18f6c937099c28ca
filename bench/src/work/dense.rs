//! Many adjacent 4 KiB pages, none of which merge; and a few mappings of 1 GiB.

use anyhow::ensure;

use crate::clock::{Cpu, nanos, per_call, resident};
use crate::load::{Effort, HIGH_RAM, PAGE, Random, gpa, iova, shuffled};
use crate::table::Table;
use crate::work::Figures;

/// Maps `count` adjacent pages in no order.
pub(crate) fn fill(table: &mut impl Table, count: u64) -> anyhow::Result<()> {
    for index in shuffled(count) {
        ensure!(table.map(iova(index), PAGE, gpa(index, count)), "page {index} cannot be mapped");
    }
    for index in [0, count / 2, count - 1] {
        let found = table.translate(iova(index) + 0x40);
        ensure!(found == Some(gpa(index, count) + 0x40), "page {index} translates to {found:x?}");
    }
    Ok(())
}

/// One table through all that is done with many pages; figures by name, those that `wants` wants.
pub(crate) fn run<T: Table>(
    new: impl Fn() -> anyhow::Result<T>,
    effort: Effort,
    count: u64,
    wants: &dyn Fn(&str) -> bool,
) -> anyhow::Result<Figures> {
    let mut figures = Figures::new();
    let mut table = new()?;
    let before = resident();
    fill(&mut table, count)?;
    figures.insert("memory".to_owned(), vec![(resident() - before) / count as f64]);

    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for _ in 0..effort.rounds() {
        if wants("translate") {
            let lookups = effort.lookups();
            let start = Cpu::start();
            let misses = table.lookups(lookups, || random.address(count));
            figures.entry("translate".to_owned()).or_default().push(start.each(lookups));
            ensure!(misses == 0, "{misses} lookups missed");
        }
        if wants("replay")
            && let Some((time, told)) = table.replay()
        {
            ensure!(told == count, "{told} of {count} mappings replayed");
            figures.entry("replay".to_owned()).or_default().push(nanos(time) / count as f64);
        }
    }
    for _ in 0..effort.rounds() {
        if wants("pair") {
            let pair = per_call(effort.budget(), || {
                let page = random.page(count);
                table.unmap(page, PAGE);
                table.map(page, PAGE, gpa(page / PAGE, count));
            });
            figures.entry("pair".to_owned()).or_default().push(pair);
        }
    }
    if wants("bulk") {
        for _ in 0..effort.rebuilds() {
            drop(table);
            table = new()?;
            fill(&mut table, count)?;
            let start = Cpu::start();
            table.unmap(iova(0), count * PAGE);
            figures.entry("bulk".to_owned()).or_default().push(start.each(count));
            ensure!(table.translate(iova(5)).is_none(), "page 5 is still there");
        }
    }
    Ok(figures)
}

/// Lookups among 64 mappings of 1 GiB.
pub(crate) fn huge<T: Table>(new: impl Fn() -> anyhow::Result<T>, effort: Effort) -> anyhow::Result<Figures> {
    const GIB: u64 = 1 << 30;
    const COUNT: u64 = 64;
    let mut table = new()?;
    for k in 0..COUNT {
        let (at, target) = ((k * 37 + 5) % COUNT, (k * 29 + 3) % COUNT);
        ensure!(table.map(iova(0) + at * GIB, GIB, HIGH_RAM.0 + target * GIB), "1 GiB cannot be mapped");
    }
    let mut random = Random(3);
    let mut rounds = Vec::new();
    for _ in 0..effort.rounds() {
        let lookups = effort.lookups();
        let start = Cpu::start();
        let misses = table.lookups(lookups, || iova(0) + (random.next() & (COUNT * GIB - 64)));
        rounds.push(start.each(lookups));
        ensure!(misses == 0, "{misses} lookups missed");
    }
    Ok([("translate".to_owned(), rounds)].into())
}
