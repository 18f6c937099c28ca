//! Several changes planned as one step: what the record would be after them, against what it is.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use crate::addr::IovaRange;
use crate::domain::apply::Plan;
use crate::domain::inner::DomainState;
use crate::error::StepErrorKind;
use crate::mapping::Mapping;
use crate::table::Writer;

/// One change of a batch.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Add where nothing is.
    Map(Mapping),
    /// Remove all inside.
    Unmap(IovaRange),
    /// Whatever is inside becomes this.
    Assign(IovaRange, Vec<Mapping>),
}

/// The touched part of the record: as it is, and as it would be.
#[derive(Default)]
pub(crate) struct Draft {
    old: BTreeMap<u64, Mapping>,
    new: BTreeMap<u64, Mapping>,
    /// As `new`, of unmaps alone: what stays if the additions are refused.
    kept: BTreeMap<u64, Mapping>,
}

/// A [`Plan`] that owns its lists.
#[derive(Default)]
pub(crate) struct Planned {
    removed: Vec<Mapping>,
    spans: Vec<IovaRange>,
    added: Vec<Mapping>,
    fallback: Vec<Mapping>,
}

impl Planned {
    pub(crate) fn plan(&self) -> Plan<'_> {
        Plan { removed: &self.removed, spans: &self.spans, added: &self.added, fallback: &self.fallback }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.added.is_empty()
    }
}

/// What of `map` touches `range`, ascending.
fn touching(map: &BTreeMap<u64, Mapping>, range: IovaRange) -> Vec<Mapping> {
    let before = map.range(..range.start().0).next_back().map(|(_, m)| *m);
    let inside = map.range(range.start().0..=range.last().0).map(|(_, m)| *m);
    before.into_iter().filter(|m| m.range.overlaps(range)).chain(inside).collect()
}

/// Takes `range` out of `map`; mappings that stick out are cut. Gives one that was cut, if any was.
fn clear(map: &mut BTreeMap<u64, Mapping>, range: IovaRange) -> Option<Mapping> {
    let mut cut = None;
    for m in touching(map, range) {
        map.remove(&m.range.start().0);
        let before =
            range.start().0.checked_sub(1).and_then(|last| IovaRange::new(m.range.start(), last.into()));
        let after = range.next().and_then(|start| IovaRange::new(start, m.range.last()));
        for rest in before.into_iter().chain(after).filter_map(|part| m.clip(part)) {
            map.insert(rest.range.start().0, rest);
            cut = Some(m);
        }
    }
    cut
}

impl Draft {
    /// Brings what the record has in `range` into the draft, whole mappings.
    fn load(&mut self, writer: &Writer, range: IovaRange) {
        writer.for_each(range, &mut |m| {
            if self.old.insert(m.range.start().0, m).is_none() {
                self.new.insert(m.range.start().0, m);
                self.kept.insert(m.range.start().0, m);
            }
            ControlFlow::Continue(())
        });
    }

    /// Adds one change behind the others.
    ///
    /// # Errors
    /// The change is refused; the draft must be thrown away.
    pub(crate) fn change(&mut self, state: &DomainState, op: &Op) -> Result<(), StepErrorKind> {
        match op {
            Op::Map(new) => {
                self.load(&state.writer, new.range);
                if let Some(existing) = touching(&self.new, new.range).first() {
                    return Err(StepErrorKind::Overlap { range: new.range, existing: existing.range });
                }
                self.new.insert(new.range.start().0, *new);
            }
            Op::Unmap(range) => {
                self.load(&state.writer, *range);
                let cut = clear(&mut self.new, *range);
                clear(&mut self.kept, *range);
                if let Some(cut) = cut.filter(|_| !state.may_cut) {
                    return Err(StepErrorKind::Cut { range: *range, existing: cut.range });
                }
            }
            Op::Assign(range, list) => {
                self.load(&state.writer, *range);
                clear(&mut self.new, *range);
                self.new.extend(list.iter().map(|m| (m.range.start().0, *m)));
            }
        }
        Ok(())
    }

    /// The step that makes the draft true.
    pub(crate) fn finish(self, writer: &Writer) -> Planned {
        let Self { old, new, kept } = self;
        let missing_in = |of: &BTreeMap<u64, Mapping>, other: &BTreeMap<u64, Mapping>| {
            of.iter().filter(|(k, m)| other.get(k) != Some(m)).map(|(_, m)| *m).collect::<Vec<_>>()
        };
        let removed = missing_in(&old, &new);
        let added = missing_in(&new, &old);
        // What is removed for the sake of an addition comes back if that is refused; so do the rests of what was cut.
        let is_removed = |m: &Mapping| removed.binary_search(m).is_ok();
        let is_old = |m: &Mapping| old.get(&m.range.start().0) == Some(m);
        let fallback = kept.values().filter(|m| is_removed(m) || !is_old(m)).copied().collect();
        let spans = spans(&removed, |gap| any_in(writer, gap));
        Planned { removed, spans, added, fallback }
    }
}

fn any_in(writer: &Writer, range: IovaRange) -> bool {
    writer.next(range.start()).is_some_and(|m| m.range.overlaps(range))
}

/// Joins removed mappings, those with a gap too where nothing lives in it.
fn spans(removed: &[Mapping], mut lives_in: impl FnMut(IovaRange) -> bool) -> Vec<IovaRange> {
    let mut spans: Vec<IovaRange> = Vec::new();
    for m in removed {
        let joined = spans.last_mut().is_some_and(|span| {
            let gap = span.next().zip(m.range.start().0.checked_sub(1));
            let touches = span.next() == Some(m.range.start());
            let gap = gap.and_then(|(start, last)| IovaRange::new(start, last.into()));
            let join = touches || gap.is_some_and(|gap| !lives_in(gap));
            if join {
                *span = span.hull(m.range);
            }
            join
        });
        if !joined {
            spans.push(m.range);
        }
    }
    spans
}
