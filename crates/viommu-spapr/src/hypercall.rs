//! The four hypercalls: arguments checked, then one step of the record.

use core::ops::ControlFlow;
use std::sync::Arc;

use viommu::{Access, Completion, Domain, Gpa, Iova, IovaRange, Mapping, StepError, StepErrorKind};
use vm_memory::{Bytes, GuestAddress};

use crate::bus::{BusInner, Merge, Spapr};
use crate::metrics::add;
use crate::pending::{Answer, Pending};
use crate::spec::{self, Code};
use crate::window::Window;

/// What an entry says: `None` is not mapped.
type Entry = Option<(Gpa, Access)>;

/// A bus as hypercalls name it: by the number of one of its windows.
#[derive(Clone)]
pub struct Liobn {
    spapr: Spapr,
    bus: Arc<BusInner>,
    liobn: u32,
}

impl core::fmt::Debug for Liobn {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Liobn({:#x})", self.liobn)
    }
}

/// A step that has been made, or an argument that is wrong.
struct Outcome {
    code: Code,
    value: u64,
    done: Completion,
}

impl From<Code> for Outcome {
    fn from(code: Code) -> Self {
        Self { code, value: 0, done: Completion::ready() }
    }
}

impl Spapr {
    /// The bus that has, or can have, a window of that number.
    #[must_use]
    pub fn liobn(&self, liobn: u32) -> Option<Liobn> {
        let bus = self.known().by_liobn.get(&liobn)?.clone();
        Some(Liobn { spapr: self.clone(), bus, liobn })
    }

    /// A hypercall by its number, with r4 to r7; `None`: it is none of those here. Guest memory is read for
    /// H_PUT_TCE_INDIRECT alone.
    pub fn hypercall(
        &self,
        number: u64,
        args: [u64; 4],
        memory: &impl Bytes<GuestAddress>,
    ) -> Option<Pending<Answer>> {
        if !crate::metrics::CALLS.contains(&number) {
            return None;
        }
        let [liobn, ioba, third, fourth] = args;
        let Some(bus) = u32::try_from(liobn).ok().and_then(|liobn| self.liobn(liobn)) else {
            return Some(self.answer(number, Code::Parameter.into()));
        };
        Some(match number {
            spec::H_GET_TCE => bus.get_tce(ioba),
            spec::H_PUT_TCE => bus.put_tce(ioba, third),
            spec::H_STUFF_TCE => bus.stuff_tce(ioba, third, fourth),
            _ => bus.put_tce_indirect(ioba, third, fourth, memory),
        })
    }

    fn answer(&self, number: u64, outcome: Outcome) -> Pending<Answer> {
        let Outcome { code, value, done } = outcome;
        self.0.counters.answered(number, code);
        Pending::new(Answer { code, value }, done)
    }
}

impl Liobn {
    /// The number.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.liobn
    }

    /// The window, if it is there now.
    #[must_use]
    pub fn window(&self) -> Option<Window> {
        self.find(&self.bus.windows())
    }

    fn find(&self, windows: &[Window]) -> Option<Window> {
        windows.iter().copied().find(|window| window.liobn == self.liobn)
    }

    /// H_GET_TCE: the entry of the page that holds `ioba`, in [`Answer::value`]. What was written into an entry without
    /// access (poison) is not kept: such an entry reads 0.
    pub fn get_tce(&self, ioba: u64) -> Pending<Answer> {
        let windows = self.bus.windows();
        let page = self.find(&windows).and_then(|window| window.entries(ioba, 1));
        let outcome = page.map_or_else(
            || Code::Parameter.into(),
            |page| {
                let holds = |m: &Mapping| m.range.contains(page.start());
                let mapping = self.bus.domain.next_mapping(page.start()).filter(holds);
                let value = mapping.map_or(0, |m| spec::encode(m.translate(page.start()), m.access));
                Outcome { value, ..Code::Success.into() }
            },
        );
        self.spapr.answer(spec::H_GET_TCE, outcome)
    }

    /// H_PUT_TCE: the entry of the page that holds `ioba` becomes `tce`.
    pub fn put_tce(&self, ioba: u64, tce: u64) -> Pending<Answer> {
        let windows = self.bus.windows();
        let window = self.find(&windows);
        let place = window.and_then(|window| Some((window, window.entries(ioba, 1)?)));
        let outcome = match place {
            None => Code::Parameter.into(),
            Some((window, range)) => match self.entry(&window, tce) {
                Err(code) => code.into(),
                Ok(entry) => self.set(&window, range, &[entry]),
            },
        };
        self.spapr.answer(spec::H_PUT_TCE, outcome)
    }

    /// H_PUT_TCE_INDIRECT: `count` entries from the page that holds `ioba` on become what a list at `list` in guest memory
    /// says. All are looked at before any is set, and each is read once.
    pub fn put_tce_indirect(
        &self,
        ioba: u64,
        list: u64,
        count: u64,
        memory: &impl Bytes<GuestAddress>,
    ) -> Pending<Answer> {
        let outcome = self.put_list(ioba, list, count, memory).unwrap_or_else(Outcome::from);
        self.spapr.answer(spec::H_PUT_TCE_INDIRECT, outcome)
    }

    fn put_list(
        &self,
        ioba: u64,
        list: u64,
        count: u64,
        memory: &impl Bytes<GuestAddress>,
    ) -> Result<Outcome, Code> {
        if count > spec::LIST_ENTRIES || list & spec::LIST_ALIGN.wrapping_sub(1) != 0 {
            return Err(Code::Parameter);
        }
        let length = usize::try_from(count.saturating_mul(8)).map_err(|_| Code::Parameter)?;
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(list)).map_err(|_| Code::Parameter)?;
        let windows = self.bus.windows();
        let window = self.find(&windows).ok_or(Code::Parameter)?;
        let range = window.entries(ioba, count).ok_or(Code::Parameter)?;
        let (tces, _) = bytes.as_chunks::<8>();
        let entries = tces.iter().map(|tce| self.entry(&window, u64::from_be_bytes(*tce)));
        let entries: Vec<Entry> = entries.collect::<Result<_, _>>()?;
        Ok(self.set(&window, range, &entries))
    }

    /// H_STUFF_TCE: `count` entries from the page that holds `ioba` on become `value`, which must allow nothing: they are
    /// cleared. The cost is that of the live ones among them.
    pub fn stuff_tce(&self, ioba: u64, value: u64, count: u64) -> Pending<Answer> {
        let windows = self.bus.windows();
        let range = self.find(&windows).and_then(|window| window.entries(ioba, count));
        let outcome = match range {
            Some(range) if value & (spec::TCE_READ | spec::TCE_WRITE) == 0 => self.clear(&[range]),
            _ => Code::Parameter.into(),
        };
        self.spapr.answer(spec::H_STUFF_TCE, outcome)
    }

    /// A TCE, looked at: its page must be aligned and be there.
    fn entry(&self, window: &Window, tce: u64) -> Result<Entry, Code> {
        let entry = spec::decode(tce, window.page_shift)?;
        if let Some((gpa, _)) = entry {
            let target = window.target(gpa).ok_or(Code::Parameter)?;
            if !self.bus.domain.is_backed(target) {
                return Err(Code::Parameter);
            }
        }
        Ok(entry)
    }

    /// Makes `entries` those of `range`, which has a page for each, as one step. Called under the bus's lock.
    fn set(&self, window: &Window, range: IovaRange, entries: &[Entry]) -> Outcome {
        let merge = self.spapr.0.merge == Merge::Hypercall;
        let change = Change::new(&self.bus.domain, window, range, entries, merge);
        let counters = &self.spapr.0.counters;
        add(&counters.unchanged, change.unchanged);
        if change.ranges.is_empty() {
            return Code::Success.into();
        }
        match change.make(&self.bus.domain) {
            Ok(done) => {
                add(&counters.mapped, change.mapped);
                add(&counters.replaced, change.replaced);
                add(&counters.cleared, change.cleared);
                Outcome { done, ..Code::Success.into() }
            }
            Err(StepError { kind, completion }) => {
                let code = code_of(&kind);
                let mut outcome = Outcome { done: completion, ..code.into() };
                if code == Code::Resource {
                    // Where it was refused before anything was tried, the old entries are still there. The guest has
                    // done with them.
                    let cleared = self.clear(&change.ranges);
                    outcome.done.merge(cleared.done);
                    add(&counters.lost, change.mapped.saturating_add(change.replaced));
                }
                outcome
            }
        }
    }

    /// Clears all of the ranges, whatever happens.
    fn clear(&self, ranges: &[IovaRange]) -> Outcome {
        let domain = &self.bus.domain;
        let mut burst = match domain.burst() {
            Ok(burst) => burst,
            Err(error) => return code_of(&error.kind).into(),
        };
        let (mut removed, mut kept) = (0_usize, Vec::new());
        for range in ranges {
            match burst.unmap(*range) {
                Ok(count) => removed = removed.saturating_add(count),
                Err(_) => kept.push(*range),
            }
        }
        add(&self.spapr.0.counters.cleared, removed);
        let mut outcome = Outcome { done: burst.finish(), ..Code::Success.into() };
        // The rests of merged entries have no room. What the guest has cleared must go: they go with it.
        for range in kept {
            outcome.code = Code::Resource;
            let whole = whole(domain, range);
            match domain.unmap(whole) {
                Ok(done) => outcome.done.merge(done),
                Err(error) => {
                    outcome.done.merge(error.completion);
                    outcome.code = Code::Hardware;
                }
            }
        }
        outcome
    }
}

/// The range with the mappings that lie across its ends.
fn whole(domain: &Domain, range: IovaRange) -> IovaRange {
    [range.start(), range.last()].into_iter().fold(range, |range, at| {
        let across = domain.next_mapping(at).filter(|m| m.range.contains(at));
        across.map_or(range, |m| range.hull(m.range))
    })
}

fn code_of(kind: &StepErrorKind) -> Code {
    match kind {
        StepErrorKind::Cap(_) | StepErrorKind::Unreachable { .. } | StepErrorKind::Refused { .. } => {
            Code::Resource
        }
        // An address that an endpoint of this bus cannot have.
        StepErrorKind::Reserved { .. } => Code::Parameter,
        // The bus has gone.
        StepErrorKind::Gone(_) => Code::Parameter,
        _ => Code::Hardware,
    }
}

/// What a list of entries makes different.
#[derive(Default)]
struct Change {
    /// Where entries differ, joined where they touch.
    ranges: Vec<IovaRange>,
    /// Those of them where something is live.
    live: Vec<IovaRange>,
    /// What comes there.
    new: Vec<Mapping>,
    mapped: usize,
    replaced: usize,
    cleared: usize,
    unchanged: usize,
}

impl Change {
    fn new(domain: &Domain, window: &Window, range: IovaRange, entries: &[Entry], merge: bool) -> Self {
        let mut old: Vec<Mapping> = Vec::new();
        domain.for_each(range, |m| {
            old.push(m);
            ControlFlow::Continue(())
        });
        let mut old = old.iter().peekable();
        let mut change = Self::default();
        let mut at = Some(range.start());
        for entry in entries {
            let Some(page) = at.and_then(|at| IovaRange::from_len(at, window.page())) else { break };
            while old.next_if(|m| m.range.last() < page.start()).is_some() {}
            let here = old.peek().filter(|m| m.range.contains(page.start()));
            let was = here.map(|m| (m.translate(page.start()), m.access));
            change.take(page, was, *entry, merge);
            at = page.next();
        }
        change
    }

    /// One entry more.
    fn take(&mut self, page: IovaRange, was: Entry, entry: Entry, merge: bool) {
        if was == entry {
            self.unchanged = self.unchanged.saturating_add(usize::from(was.is_some()));
            return;
        }
        let count = match (was, entry) {
            (None, _) => &mut self.mapped,
            (Some(_), Some(_)) => &mut self.replaced,
            (Some(_), None) => &mut self.cleared,
        };
        *count = count.saturating_add(1);
        join(&mut self.ranges, page);
        if was.is_some() {
            join(&mut self.live, page);
        }
        let Some(new) = entry.and_then(|(gpa, access)| Mapping::over(page, gpa, access)) else { return };
        match self.new.last_mut().filter(|last| merge && continues(last, &new)) {
            Some(last) => last.range = last.range.hull(new.range),
            None => self.new.push(new),
        }
    }

    /// One step. What is unmapped in it stays unmapped when the rest is refused.
    fn make(&self, domain: &Domain) -> Result<Completion, StepError> {
        match (self.live.as_slice(), self.new.as_slice()) {
            ([], [new]) => domain.map(*new),
            ([live], []) => domain.unmap(*live),
            (live, new) => {
                let batch = live.iter().fold(domain.batch(), |batch, range| batch.unmap(*range));
                new.iter().fold(batch, |batch, new| batch.map(*new)).commit()
            }
        }
    }
}

fn join(ranges: &mut Vec<IovaRange>, page: IovaRange) {
    match ranges.last_mut().filter(|last| last.next() == Some(page.start())) {
        Some(last) => *last = last.hull(page),
        None => ranges.push(page),
    }
}

/// Whether `new` goes on where `last` ends, at both sides.
fn continues(last: &Mapping, new: &Mapping) -> bool {
    let ends_at: Option<Iova> = last.range.next();
    ends_at == Some(new.range.start())
        && last.gpa_last().checked_add(1) == Some(new.gpa)
        && last.access == new.access
}
