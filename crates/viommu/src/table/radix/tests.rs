//! The radix against the ordered map, its caps, its memory, and readers beside it.

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;
use crate::addr::{Gpa, IovaRange};
use crate::mapping::{Access, Mapping};
use crate::quiesce::slot::Entry;
use crate::table::{Cuts, InsertError, PAGE, plain};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn record(bytes: u64) -> (Arc<Arena>, Arc<Table>, Writer, Arc<Space>) {
    let arena = Arena::new(bytes).unwrap();
    let space = Arc::new(Space::default());
    let (table, writer) = Table::new(&arena, space.clone()).unwrap();
    (arena, table, writer, space)
}

fn range(start: u64, bytes: u64) -> IovaRange {
    IovaRange::from_len(Iova(start), bytes).unwrap()
}

/// A mapping whose target tells its address.
fn mapping(start: u64, bytes: u64) -> Mapping {
    Mapping::over(range(start, bytes), target(start), Access::RW).unwrap()
}

fn target(iova: u64) -> Gpa {
    Gpa((iova ^ 0x5a5a_5a5a_5000) & ((1 << 60) - 1))
}

fn page(start: u64) -> Mapping {
    mapping(start, PAGE)
}

fn everything(visit: impl Fn(&mut dyn FnMut(Mapping) -> ControlFlow<()>)) -> Vec<Mapping> {
    let mut all = Vec::new();
    visit(&mut |m| {
        all.push(m);
        ControlFlow::Continue(())
    });
    all
}

fn contents(writer: &Writer) -> Vec<Mapping> {
    everything(|f| writer.for_each(IovaRange::ALL, f))
}

fn shuffle(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

// ---- against the reference

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

// ---- caps

/// Fills with one page per 2 MiB until there is no memory; the number of pages.
fn fill(table: &Table, writer: &mut Writer, arena: &Arena, cap: u64) -> u64 {
    let mut count = 0;
    loop {
        let m = page(4 * GIB + count * 2 * MIB);
        let bytes = arena.used();
        match writer.insert(&m) {
            Ok(()) => count += 1,
            Err(e) => {
                assert_eq!(e, InsertError::NoMemory);
                assert_eq!(arena.used(), cap);
                assert_eq!(table.lookup(m.range.start()), None);
                assert_eq!(writer.len() as u64, count);
                return count;
            }
        }
        assert!(bytes <= cap);
    }
}

#[test]
fn memory_ends_exactly_at_the_cap_and_comes_back() {
    for cap in [64 << 10, 100 << 10, MIB] {
        let (arena, table, mut writer, _) = record(cap);
        let cap = cap / PAGE * PAGE;
        let first = fill(&table, &mut writer, &arena, cap);
        // a line each, a table for 512 lines, and what these were before they were tables
        assert!(first >= (cap / PAGE - 6) * PAGE / 72 - 64, "{first} at {cap}");
        assert_eq!(contents(&writer), (0..first).map(|k| page(4 * GIB + k * 2 * MIB)).collect::<Vec<_>>());
        // removing makes room for as many, elsewhere too
        assert_eq!(writer.remove_all_in(IovaRange::ALL).unwrap() as u64, first);
        let dense = (0..first).map(|k| page(64 * GIB + k * PAGE)).collect::<Vec<_>>();
        dense.iter().for_each(|m| writer.insert(m).unwrap());
        assert_eq!(contents(&writer), dense);
        writer.remove_all_in(IovaRange::ALL).unwrap();
        assert!(fill(&table, &mut writer, &arena, cap) + 128 >= first);
    }
}

#[test]
fn two_records_share_one_cap() {
    let arena = Arena::new(64 << 10).unwrap();
    let space = Arc::new(Space::default());
    let (table, mut one) = Table::new(&arena, space.clone()).unwrap();
    let (_other, mut two) = Table::new(&arena, space.clone()).unwrap();
    let count = fill(&table, &mut one, &arena, 64 << 10);
    assert_eq!(two.insert(&page(GIB)), Err(InsertError::NoMemory));
    assert_eq!(two.reserve(&[page(GIB)]), Err(NoMemory));
    assert_eq!(Table::new(&arena, space).err(), Some(NoMemory));
    drop((table, one));
    assert_eq!(arena.used(), two.bytes());
    for k in 0..count - 64 {
        two.insert(&page(4 * GIB + k * 2 * MIB)).unwrap();
    }
}

#[test]
fn a_record_is_refused_without_memory_and_an_empty_one_is_one_page() {
    assert_eq!(Table::new(&Arena::new(0).unwrap(), Arc::default()).err(), Some(NoMemory));
    let (arena, ..) = record(MIB);
    assert_eq!(arena.used(), 0, "dropped already");
    let (arena, _table, writer, _) = record(MIB);
    assert_eq!((arena.used(), writer.bytes()), (PAGE, PAGE));
}

#[test]
fn a_large_insertion_without_memory_changes_nothing() {
    let (_arena, _, mut writer, _) = record(64 << 10);
    writer.insert(&page(0)).unwrap();
    // 40 GiB less a page at either end: two tables a level
    let large = mapping(GIB + PAGE, 40 * GIB - 2 * PAGE);
    (0..11).for_each(|k| {
        writer.insert(&mapping((1 << 40) + k * 2 * MIB, 1200 * PAGE - 800 * PAGE)).unwrap_or(())
    });
    let before = contents(&writer);
    assert_eq!(writer.insert(&large), Err(InsertError::NoMemory));
    assert_eq!(writer.reserve(&[large]), Err(NoMemory));
    assert_eq!(contents(&writer), before);
}

#[test]
fn reserved_additions_fit_when_nothing_else_does() {
    let (arena, table, mut writer, _) = record(MIB);
    let old = mapping(2 * GIB, GIB);
    writer.insert(&old).unwrap();
    // finer pieces below the leaf that is still there, and some beside it
    let mut new: Vec<_> = (0..700).map(|k| page(2 * GIB + k * 3 * PAGE)).collect();
    new.extend((0..40).map(|k| mapping(2 * GIB + 512 * MIB + k * 4 * MIB, 3 * MIB)));
    new.extend((0..40).map(|k| page(9 * GIB + k * 2 * MIB)));
    assert_eq!(writer.reserve(&new), Ok(()));
    assert_eq!(contents(&writer), [old]);
    arena.refuse(true);
    assert_eq!(writer.remove(old.range, |_| {}), Ok(1));
    new.iter().for_each(|m| assert_eq!(writer.insert(m), Ok(())));
    assert_eq!(writer.len(), new.len());
    for m in &new {
        assert_eq!(table.lookup(m.range.last()).unwrap().gpa, m.gpa_last());
    }
}

#[test]
fn a_reservation_given_up_costs_nothing_for_ever() {
    let (_arena, _table, mut writer, _) = record(MIB);
    let mut bytes = 0;
    for k in 0..5000u64 {
        writer.reserve(&[page((k * 7919 % 4096) * 2 * MIB), page((k % 511) * 513 * PAGE)]).unwrap();
        if k == 1000 {
            bytes = writer.bytes();
        }
    }
    assert!(writer.bytes() <= bytes + 2 * PAGE && bytes <= 64 << 10, "{bytes} {}", writer.bytes());
}

// ---- extremes

#[test]
fn levels_grow_with_the_highest_address() {
    let (_arena, table, mut writer, _) = record(4 * MIB);
    let starts = [0, PAGE, GIB - PAGE, GIB, 1 << 39, 1 << 47, 1 << 48, 1 << 57, 1 << 63, u64::MAX - 0xfff];
    for (k, start) in starts.into_iter().enumerate() {
        assert_eq!(table.lookup(Iova(start)), None);
        writer.insert(&page(start)).unwrap();
        for (j, at) in starts.into_iter().enumerate() {
            assert_eq!(table.lookup(Iova(at | 5)).map(|hit| hit.gpa.0), (j <= k).then_some(target(at).0 | 5));
        }
    }
    assert_eq!(contents(&writer), starts.map(page));
    assert_eq!(writer.next(Iova(1 << 58)), Some(page(1 << 63)));
    assert_eq!(writer.next(Iova(u64::MAX)), Some(page(u64::MAX - 0xfff)));
}

#[test]
fn the_whole_address_space_is_an_ordinary_mapping() {
    let (_arena, table, mut writer, _) = record(MIB);
    let all = Mapping::over(IovaRange::ALL, Gpa(0), Access::READ).unwrap().mmio();
    // nodes that had been in use are in the way
    for k in 0..20 {
        writer.insert(&page((1 << 57) + k * GIB)).unwrap();
    }
    writer.remove_all_in(IovaRange::ALL).unwrap();
    writer.reserve(&[all]).unwrap();
    writer.insert(&all).unwrap();
    assert_eq!(writer.insert(&page(u64::MAX - 0xfff)), Err(InsertError::Overlap));
    for at in [0, PAGE + 1, 1 << 57 | 5, 1 << 63, u64::MAX] {
        let hit = table.lookup(Iova(at)).unwrap();
        assert_eq!((hit.gpa, hit.access, hit.target), (Gpa(at), Access::READ, all.target));
        assert!(at.checked_add(hit.left).is_some());
        assert_eq!(writer.next(Iova(at)), Some(all));
    }
    assert!(writer.cuts(range(0, PAGE)) && !writer.cuts(IovaRange::ALL));
    assert_eq!(writer.remove(range(1 << 40, PAGE), |_| {}), Err(Cuts));
    let mut gone = Vec::new();
    assert_eq!(writer.remove(IovaRange::ALL, &mut |m| gone.push(m)), Ok(1));
    assert_eq!((gone, writer.len(), table.lookup(Iova(7))), (vec![all], 0, None));
}

#[test]
fn a_large_aligned_mapping_is_one_leaf_again_after_pages_were_there() {
    let (_arena, table, mut writer, _) = record(MIB);
    for k in 0..512 {
        writer.insert(&page(2 * GIB + k * PAGE)).unwrap();
    }
    writer.remove_all_in(range(2 * GIB, 2 * MIB)).unwrap();
    writer.insert(&mapping(2 * GIB, 2 * MIB)).unwrap();
    assert_eq!(table.lookup(Iova(2 * GIB)).unwrap().left, 2 * MIB - 1);
}

#[test]
fn malformed_words_are_nothing() {
    let (arena, table, mut writer, _) = record(MIB);
    writer.insert(&page(0)).unwrap();
    let (node, _) = writer.root();
    let mut seed = 99;
    for kind in [Kind::Line, Kind::Middle, Kind::Table] {
        for index in [0, 1, arena.words().len() - 1, arena.words().len(), 1 << 40] {
            let child = Node::new(kind, index);
            arena.publish(node.index(), child.word());
            for _ in 0..64 {
                let _ = table.lookup(Iova(shuffle(&mut seed) % (2 * MIB)));
            }
        }
    }
    // a node below itself
    arena.publish(node.index(), node.word());
    assert_eq!(table.lookup(Iova(5)), None);
    for _ in 0..10_000 {
        arena.publish(node.index(), word::Word(shuffle(&mut seed) & !1));
        assert_eq!(table.lookup(Iova(5)).filter(|_| false), None);
    }
}

// ---- memory

#[test]
fn sparse_layouts_stay_below_their_bytes_a_mapping() {
    // stride, pages there in a row, bytes a mapping
    for (stride, most) in [(2 * MIB, 80), (GIB, 160), (256 << 10, 200), (128 * MIB, 200)] {
        let (_arena, _table, mut writer, _) = record(64 * MIB);
        for k in 0..16384 {
            writer.insert(&page(4 * GIB + k * stride)).unwrap();
        }
        assert!(writer.bytes() <= 16384 * most, "{stride:#x}: {}", writer.bytes() / 16384);
    }
}

#[test]
fn sparse_layouts_after_churn_stay_below_200_bytes_a_mapping() {
    for (mapped, left) in [(8, 1), (40, 1), (512, 1), (512, 6), (512, 21)] {
        let (_arena, _table, mut writer, _) = record(256 * MIB);
        let regions = 4096;
        for k in 0..regions {
            for j in 0..mapped {
                writer.insert(&page(4 * GIB + k * 2 * MIB + j * PAGE)).unwrap();
            }
            for j in 0..mapped - left {
                let gone = range(4 * GIB + k * 2 * MIB + (j * 7 % mapped) * PAGE, PAGE);
                assert_eq!(writer.remove(gone, |_| {}), Ok(1));
            }
        }
        let each = writer.bytes() / (regions * left);
        assert!(each <= 220 && (left > 20 || each <= 200), "{mapped} mapped, {left} left: {each}");
    }
}

#[test]
fn dense_pages_take_twelve_bytes_a_mapping_at_most() {
    let (_arena, _table, mut writer, _) = record(4 * MIB);
    for k in 0..1 << 17 {
        writer.insert(&page(4 * GIB + ((k * 0x9e37) & 0x1_ffff) * PAGE)).unwrap();
    }
    assert!(writer.bytes() <= 12 << 17, "{}", writer.bytes() >> 17);
}

#[test]
fn random_pairs_reuse_the_same_memory_for_ever() {
    let (arena, table, mut writer, _) = record(64 * MIB);
    let mut live = VecDeque::new();
    let mut seed = 5;
    let mut most = [0, 0];
    for k in 0..200_000 {
        let m = page(shuffle(&mut seed) >> 17 & !(PAGE - 1));
        if writer.insert(&m).is_ok() {
            live.push_back(m);
        }
        if live.len() > 1000 {
            let m = live.pop_front().unwrap();
            assert_eq!(writer.remove(m.range, |_| {}), Ok(1));
        }
        let half = usize::from(k >= 100_000);
        most[half] = arena.used().max(most[half]);
    }
    // two lines a mapping and shares of the rest; what waits for reclaim is bounded
    assert!(most[1] <= most[0] + 4 * PAGE && most[0] <= 1 << 20, "{most:?}");
    live.iter().for_each(|m| assert_eq!(table.lookup(m.range.start()).unwrap().gpa, m.gpa));
    writer.remove_all_in(IovaRange::ALL).unwrap();
    (0..4000u64).for_each(|k| {
        writer.insert(&page(k * GIB)).unwrap();
        writer.remove(range(k * GIB, PAGE), |_| {}).unwrap();
    });
    assert!(writer.bytes() <= 128 << 10, "{}", writer.bytes());
}

#[test]
fn a_guard_makes_emptied_nodes_wait_and_nothing_else() {
    let (arena, _table, mut writer, space) = record(64 * MIB);
    let mut reader = Entry::new("reader", 0);
    space.join(reader.slot());
    let mut churn = |from: u64| {
        for k in from..from + 5000 {
            writer.insert(&page(k * GIB % (1 << 50))).unwrap();
            assert_eq!(writer.remove(range(k * GIB % (1 << 50), PAGE), |_| {}), Ok(1));
        }
        arena.used()
    };
    let before = churn(0);
    reader.enter();
    let during = churn(5000);
    assert!(during >= before + 5000 * 64, "{before} {during}");
    reader.leave();
    let after = churn(10_000);
    assert!(after <= before + 16 * PAGE, "{before} {after}");
}

// ---- readers beside the writer

const PLACES: usize = 4096;

/// Addresses come and go, whole paths of nodes are recycled and nodes change their kind; no reader ever gets the
/// answer of another address.
#[test]
fn recycled_nodes_never_answer_for_another_address() {
    let (_arena, table, mut writer, space) = record(64 * MIB);
    let ring: Vec<AtomicU64> = (0..PLACES).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2u64)
            .map(|id| {
                let (table, ring, stop) = (&table, &ring, &stop);
                let mut entry = Entry::new("reader", id);
                space.join(entry.slot());
                scope.spawn(move || {
                    let mut seed = 77 + id;
                    let mut hits = 0u64;
                    while !stop.load(Relaxed) || hits == 0 {
                        entry.enter();
                        for _ in 0..16 {
                            let x = shuffle(&mut seed);
                            let place = usize::try_from(x >> 40).unwrap() % PLACES;
                            let at = ring[place].load(Relaxed) ^ (x & 3) << 12;
                            if let Some(hit) = table.lookup(Iova(at)) {
                                assert_eq!(hit.gpa, target(at), "{at:#x}");
                                hits += 1;
                            }
                        }
                        entry.leave();
                    }
                })
            })
            .collect();
        let mut seed = 5;
        for k in 0..1_000_000usize {
            let place = &ring[k % PLACES];
            let old = place.load(Relaxed);
            if old != 0 {
                assert_eq!(writer.remove(range(old, PAGE), |_| {}), Ok(1));
            }
            // few 2 MiB regions for some (nodes change their kind), anywhere for others (paths are recycled)
            let x = shuffle(&mut seed);
            let at = match x & 1 {
                0 => (x >> 16) << 12 & ((1 << 47) - 1),
                _ => (1 << 40) + ((x >> 20 & 255) << 21) + ((x >> 30 & 511) << 12),
            };
            place.store(if writer.insert(&page(at)).is_ok() { at } else { 0 }, Relaxed);
        }
        stop.store(true, Relaxed);
        readers.into_iter().for_each(|r| r.join().unwrap());
    });
}
