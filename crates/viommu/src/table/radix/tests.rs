//! The radix against the ordered map, its caps, its memory, and readers beside it.

mod reference;

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::addr::{Gpa, IovaRange};
use crate::mapping::{Access, Mapping};
use crate::quiesce::slot::Entry;
use crate::table::{Cuts, InsertError, PAGE};

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
