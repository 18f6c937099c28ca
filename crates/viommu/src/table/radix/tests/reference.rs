//! Random steps on the radix and on the ordered map.

use proptest::prelude::*;

use super::*;
use crate::table::plain;

#[derive(Clone, Debug)]
enum Step {
    Insert(Mapping),
    /// Single pages one after another, `stride` pages apart.
    InsertPages {
        start: u64,
        count: u64,
        stride: u64,
    },
    Remove(IovaRange),
    RemoveUncounted(IovaRange),
    RemovePages {
        start: u64,
        count: u64,
        stride: u64,
    },
    /// Remove the range, then put these there; reserved before, and the arena exhausted in between.
    Replace(IovaRange, Vec<Mapping>),
    /// Reserve, and do nothing with it.
    ReserveOnly(Vec<Mapping>),
    ForEach(IovaRange, usize),
    /// Next, lookup, and whether a range from there is cut.
    Look(u64, u64),
    /// A reader goes inside, or leaves.
    Guard(bool),
    Clear,
}

fn base() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => Just(0),
        3 => Just(4 * GIB),
        2 => Just((1 << 47) - 4 * GIB),
        1 => Just(1 << 57),
        1 => Just(0u64.wrapping_sub(4 * GIB)),
    ]
}

fn start() -> impl Strategy<Value = u64> {
    (
        base(),
        prop_oneof![
            6 => (0u64..700).prop_map(|p| p * PAGE),
            3 => (0u64..40).prop_map(|r| r * 2 * MIB),
            2 => ((0u64..6), (0u64..40)).prop_map(|(r, p)| r * 2 * MIB + p * PAGE),
            1 => (0u64..4).prop_map(|r| r * GIB),
            1 => ((0u64..4), (0u64..512)).prop_map(|(g, p)| g * GIB - g.min(1) * 512 * PAGE + p * PAGE),
        ],
    )
        .prop_map(|(base, offset)| base.saturating_add(offset) & !(PAGE - 1))
}

fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => Just(PAGE),
        4 => (2u64..17).prop_map(|p| p * PAGE),
        2 => Just(2 * MIB),
        2 => Just(3 * MIB),
        1 => (1u64..1200).prop_map(|p| p * PAGE),
        1 => Just(GIB),
        1 => Just(GIB + 2 * MIB + PAGE),
    ]
}

fn some_range() -> impl Strategy<Value = IovaRange> {
    prop_oneof![
        20 => (start(), bytes()).prop_map(|(start, bytes)| {
            let last = start.saturating_add(bytes - 1) | (PAGE - 1);
            IovaRange::new(Iova(start), Iova(last)).unwrap()
        }),
        1 => Just(IovaRange::ALL),
        1 => Just(IovaRange::new(Iova(0), Iova((1 << 57) - 1)).unwrap()),
        1 => Just(IovaRange::new(Iova(1 << 63), Iova(u64::MAX)).unwrap()),
    ]
}

fn some_mapping() -> impl Strategy<Value = Mapping> {
    (some_range(), 0u64..1 << 20, 0u8..4, any::<bool>()).prop_map(|(range, gpa, access, mmio)| {
        let gpa = Gpa(gpa * PAGE);
        let access = Access::from_bits_truncate(access);
        let m = Mapping::over(range, gpa, access)
            .unwrap_or_else(|| Mapping::over(range, Gpa(0), access).unwrap());
        if mmio { m.mmio() } else { m }
    })
}

/// Disjoint mappings inside a range.
fn pieces() -> impl Strategy<Value = (IovaRange, Vec<Mapping>)> {
    let aligned = prop_oneof![Just(2 * MIB), Just(16 * MIB), Just(GIB), Just(64 * PAGE)];
    (base(), 0u64..3, aligned, proptest::collection::vec((0u64..60, 1u64..600), 0..80)).prop_map(
        |(base, k, size, cuts)| {
            let whole = range(base + k * size, size);
            let mut at = whole.start().0;
            let mut pieces = Vec::new();
            for (gap, pages) in cuts {
                let Some(from) = at.checked_add(gap * PAGE) else { break };
                let pages = if gap % 3 == 0 { pages } else { 1 };
                if from > whole.last().0 {
                    break;
                }
                let last = from.saturating_add(pages * PAGE - 1).min(whole.last().0);
                pieces.push(mapping(from, last - from + 1));
                let Some(next) = last.checked_add(1) else { break };
                at = next;
            }
            if pieces.len() % 2 == 1 {
                pieces.reverse();
            }
            (whole, pieces)
        },
    )
}

fn step() -> impl Strategy<Value = Step> {
    let run =
        || (start(), 1u64..80, prop_oneof![4 => Just(1u64), 2 => Just(3), 1 => Just(512), 1 => Just(64)]);
    prop_oneof![
        10 => some_mapping().prop_map(Step::Insert),
        6 => run().prop_map(|(start, count, stride)| Step::InsertPages { start, count, stride }),
        8 => some_range().prop_map(Step::Remove),
        2 => some_range().prop_map(Step::RemoveUncounted),
        6 => run().prop_map(|(start, count, stride)| Step::RemovePages { start, count, stride }),
        4 => pieces().prop_map(|(range, with)| Step::Replace(range, with)),
        1 => pieces().prop_map(|(_, with)| Step::ReserveOnly(with)),
        4 => (some_range(), 1usize..200).prop_map(|(range, limit)| Step::ForEach(range, limit)),
        8 => (start(), bytes()).prop_map(|(at, bytes)| Step::Look(at, bytes)),
        1 => any::<bool>().prop_map(Step::Guard),
        1 => Just(Step::Clear),
    ]
}

struct Both {
    arena: Arc<Arena>,
    table: Arc<Table>,
    writer: Writer,
    plain_table: Arc<plain::Table>,
    plain: plain::Writer,
    reader: Entry,
    inside: bool,
}

impl Both {
    fn new(cap: u64) -> Self {
        let (arena, table, writer, space) = record(cap);
        let (plain_table, plain) = plain::Table::new();
        let reader = Entry::new("reader", 0);
        space.join(reader.slot());
        Self { arena, table, writer, plain_table, plain, reader, inside: false }
    }

    fn guard(&mut self, inside: bool) {
        if self.inside != inside {
            if inside {
                self.reader.enter()
            } else {
                self.reader.leave()
            }
            self.inside = inside;
        }
    }

    fn look(&self, iova: u64) {
        let iova = Iova(iova);
        let next = self.plain.next(iova);
        assert_eq!(self.writer.next(iova), next, "next {iova}");
        match (self.table.lookup(iova), self.plain_table.lookup(iova)) {
            (Some(radix), Some(plain)) => {
                assert_eq!((radix.gpa, radix.access, radix.target), (plain.gpa, plain.access, plain.target));
                assert!(radix.left <= plain.left, "{iova} {radix:?} {plain:?}");
            }
            (radix, plain) => assert_eq!(radix, plain, "lookup {iova}"),
        }
    }

    fn insert(&mut self, m: &Mapping) {
        let done = self.writer.insert(m);
        if done == Err(InsertError::NoMemory) {
            assert!(!self.plain.next(m.range.start()).is_some_and(|old| old.range.overlaps(m.range)));
        } else {
            assert_eq!(done, self.plain.insert(m), "{m:?}");
        }
        self.look(m.range.start().0);
        self.look(m.range.last().0);
    }

    fn remove(&mut self, range: IovaRange) {
        assert_eq!(self.writer.cuts(range), self.plain.cuts(range), "cuts {range}");
        let (mut gone, mut plain_gone) = (Vec::new(), Vec::new());
        let done = self.writer.remove(range, &mut |m| gone.push(m));
        assert_eq!(done, self.plain.remove(range, &mut |m| plain_gone.push(m)), "{range}");
        assert_eq!(gone, plain_gone);
        self.look(range.start().0);
    }

    fn run(&mut self, step: &Step) {
        match step {
            Step::Insert(m) => self.insert(m),
            Step::InsertPages { start, count, stride } => {
                for k in 0..*count {
                    if let Some(m) = Mapping::new(
                        Iova(start.wrapping_add(k * stride * PAGE)),
                        PAGE,
                        Gpa(k * PAGE),
                        Access::READ,
                    ) {
                        self.insert(&m);
                    }
                }
            }
            Step::Remove(range) => self.remove(*range),
            Step::RemoveUncounted(range) => {
                assert_eq!(self.writer.remove_all_in(*range), self.plain.remove(*range, &mut |_| {}));
            }
            Step::RemovePages { start, count, stride } => {
                for k in 0..*count {
                    if let Some(range) =
                        IovaRange::from_len(Iova(start.wrapping_add(k * stride * PAGE)), PAGE)
                    {
                        self.remove(range);
                    }
                }
            }
            Step::Replace(range, with) => self.replace(*range, with),
            Step::ReserveOnly(with) => {
                let before = contents(&self.writer);
                let _ = self.writer.reserve(with);
                assert_eq!(contents(&self.writer), before);
            }
            Step::ForEach(range, limit) => {
                let some = |all: &mut Vec<Mapping>, m| {
                    all.push(m);
                    if all.len() == *limit { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                };
                let (mut radix, mut plain) = (Vec::new(), Vec::new());
                self.writer.for_each(*range, &mut |m| some(&mut radix, m));
                self.plain.for_each(*range, &mut |m| some(&mut plain, m));
                assert_eq!(radix, plain, "{range}");
            }
            Step::Look(at, bytes) => {
                self.look(*at);
                let last = at.saturating_add(bytes - 1) | (PAGE - 1);
                let range = IovaRange::new(Iova(*at), Iova(last)).unwrap();
                assert_eq!(self.writer.cuts(range), self.plain.cuts(range));
            }
            Step::Guard(inside) => self.guard(*inside),
            Step::Clear => self.remove(IovaRange::ALL),
        }
        assert_eq!(self.writer.len(), self.plain.len());
        assert_eq!(self.arena.used(), self.writer.bytes());
    }

    fn replace(&mut self, range: IovaRange, with: &[Mapping]) {
        if self.plain.cuts(range) || self.writer.reserve(with).is_err() {
            return;
        }
        self.arena.refuse(true);
        self.remove(range);
        for m in with {
            assert_eq!(self.writer.insert(m), Ok(()), "reserved {m:?}");
            self.plain.insert(m).unwrap();
        }
        self.arena.refuse(false);
    }

    /// Everything, in order, and that all memory comes back.
    fn finish(mut self) {
        self.guard(false);
        let all = contents(&self.writer);
        assert_eq!(all, everything(|f| self.plain.for_each(IovaRange::ALL, f)));
        for m in &all {
            self.look(m.range.start().0);
            self.look(m.range.last().0 - 1);
        }
        assert_eq!(self.writer.remove_all_in(IovaRange::ALL), Ok(all.len()));
        drop(self.writer);
        assert!(all.iter().all(|m| self.table.lookup(m.range.start()).is_none()));
        drop(self.table);
        assert_eq!(self.arena.used(), 0);
        let fresh = (1..).take_while(|page| (*page as usize) < self.arena.words().len() / 512 - 1);
        let zero =
            |page| (0..512).all(|j| self.arena.load(self.arena.index_of(page) + j) == word::Word::NONE);
        assert!(fresh.take(64).all(zero));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    // 300 cases of 350 to 450 steps.
    #[test]
    fn radix_agrees_with_the_ordered_map(steps in proptest::collection::vec(step(), 350..450)) {
        let mut both = Both::new(32 * MIB);
        for step in &steps {
            both.run(step);
        }
        both.finish();
    }

    #[test]
    fn radix_agrees_with_the_ordered_map_at_its_cap(
        steps in proptest::collection::vec(step(), 30..60),
        pages in 1u64..40,
    ) {
        let mut both = Both::new(pages * PAGE);
        for step in &steps {
            both.run(step);
        }
        both.finish();
    }
}
