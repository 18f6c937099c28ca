//! Random mappings and accesses against pages in a table and bytes in a vector.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;
use viommu::{Access, Gpa, Iova, IovaRange, Mapping};
use vm_memory::bitmap::Bitmap;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryRegion, Permissions,
};

use crate::{PAGE, Rig};

/// Pages of each of the two windows of I/O virtual addresses: at zero, and at the end of all.
const WINDOW: u64 = 12;
/// Pages of guest physical addresses, holes included.
const GUEST: u64 = 26;

#[derive(Clone, Debug)]
enum Op {
    Map { page: u64, pages: u64, target: u64, access: Access },
    Unmap { page: u64, pages: u64 },
    Write { at: u64, bytes: usize, fill: u8, shared: bool },
    Read { at: u64, bytes: usize, shared: bool },
    Check { at: u64, bytes: usize, permissions: Permissions },
}

fn page() -> impl Strategy<Value = u64> {
    prop_oneof![0..WINDOW, (0..WINDOW).prop_map(|page| u64::MAX / PAGE - page)]
}

fn address() -> impl Strategy<Value = u64> {
    let near = prop_oneof![0..64u64, PAGE - 64..PAGE, 0..PAGE];
    (page(), near).prop_map(|(page, offset)| page * PAGE + offset)
}

fn bytes() -> impl Strategy<Value = usize> {
    prop_oneof![0..130usize, 0..20_000usize]
}

fn op() -> impl Strategy<Value = Op> {
    let access = prop_oneof![2 => Just(Access::RW), 1 => Just(Access::READ), 1 => Just(Access::WRITE)];
    let permissions = prop_oneof![
        Just(Permissions::Read),
        Just(Permissions::Write),
        Just(Permissions::ReadWrite),
        Just(Permissions::No)
    ];
    prop_oneof![
        4 => (page(), 1..6u64, 0..GUEST, access)
            .prop_map(|(page, pages, target, access)| Op::Map { page, pages, target, access }),
        1 => (page(), 1..4u64).prop_map(|(page, pages)| Op::Unmap { page, pages }),
        4 => (address(), bytes(), any::<u8>(), any::<bool>())
            .prop_map(|(at, bytes, fill, shared)| Op::Write { at, bytes, fill, shared }),
        3 => (address(), bytes(), any::<bool>())
            .prop_map(|(at, bytes, shared)| Op::Read { at, bytes, shared }),
        2 => (address(), bytes(), permissions)
            .prop_map(|(at, bytes, permissions)| Op::Check { at, bytes, permissions }),
    ]
}

/// What an access should come to.
#[derive(Debug, PartialEq)]
enum Outcome {
    Done,
    Invalid(u64),
    Overflow,
}

impl Outcome {
    fn of<T>(outcome: Result<T, GuestMemoryError>) -> Self {
        match outcome {
            Ok(_) => Self::Done,
            Err(GuestMemoryError::InvalidGuestAddress(at)) => Self::Invalid(at.0),
            Err(GuestMemoryError::GuestAddressOverflow) => Self::Overflow,
            Err(other) => panic!("{other}"),
        }
    }
}

struct Model {
    pages: BTreeMap<u64, (u64, Access)>,
    memory: Vec<u8>,
    dirty: BTreeSet<u64>,
}

impl Model {
    fn is_memory(gpa_page: u64) -> bool {
        Rig::REGIONS.iter().any(|(page, pages)| (*page..page + pages).contains(&gpa_page))
    }

    /// Where each byte lies, or what goes wrong.
    fn locate(&self, at: u64, bytes: usize, access: Access) -> Result<Vec<u64>, Outcome> {
        let count = bytes as u64;
        if count > 0 && at.checked_add(count - 1).is_none() {
            return Err(Outcome::Overflow);
        }
        (0..count)
            .map(|offset| {
                let iova = at + offset;
                let page = self.pages.get(&(iova / PAGE));
                let usable = page.filter(|(target, a)| a.contains(access) && Self::is_memory(*target));
                usable.map(|(target, _)| target * PAGE + iova % PAGE).ok_or(Outcome::Invalid(iova))
            })
            .collect()
    }
}

fn range(page: u64, pages: u64) -> Option<IovaRange> {
    let last = page.checked_add(pages - 1).filter(|last| *last <= u64::MAX / PAGE)?;
    IovaRange::new(Iova(page * PAGE), Iova(last * PAGE + (PAGE - 1)))
}

fn at(gpa: u64) -> usize {
    usize::try_from(gpa).unwrap()
}

fn write(memory: &impl GuestMemory, data: &[u8], to: u64) -> Outcome {
    Outcome::of(memory.write_slice(data, GuestAddress(to)))
}

fn read(memory: &impl GuestMemory, data: &mut [u8], from: u64) -> Outcome {
    Outcome::of(memory.read_slice(data, GuestAddress(from)))
}

fn run(ops: Vec<Op>) -> Result<(), TestCaseError> {
    let rig = Rig::new();
    let (mut worker, space) = (rig.worker(), rig.space());
    let mut model =
        Model { pages: BTreeMap::new(), memory: vec![0; at(GUEST * PAGE)], dirty: BTreeSet::new() };
    for op in ops {
        match op {
            Op::Map { page, pages, target, access } => {
                let Some(range) = range(page, pages) else { continue };
                let all = || page..=page + (pages - 1);
                let free = all().all(|page| !model.pages.contains_key(&page));
                let mapping = Mapping::over(range, Gpa(target * PAGE), access).unwrap();
                prop_assert_eq!(rig.domain.map(mapping).is_ok(), free);
                if free {
                    model.pages.extend(all().zip(target..).map(|(page, target)| (page, (target, access))));
                }
            }
            Op::Unmap { page, pages } => {
                let Some(range) = range(page, pages) else { continue };
                rig.domain.unmap(range).unwrap().wait().unwrap();
                model.pages.retain(|at, _| *at < page || *at > page + (pages - 1));
            }
            Op::Write { at: to, bytes, fill, shared } => {
                let data: Vec<u8> = (0..=250).cycle().map(|i: u8| i.wrapping_add(fill)).take(bytes).collect();
                let outcome = if shared {
                    write(&*space.memory(), &data, to)
                } else {
                    write(&worker.enter(), &data, to)
                };
                match model.locate(to, bytes, Access::WRITE) {
                    Err(wrong) => prop_assert_eq!(outcome, wrong),
                    Ok(places) => {
                        prop_assert_eq!(outcome, Outcome::Done);
                        for (gpa, byte) in places.iter().zip(&data) {
                            model.memory[at(*gpa)] = *byte;
                            model.dirty.insert(gpa / PAGE);
                        }
                    }
                }
            }
            Op::Read { at: from, bytes, shared } => {
                let mut data = vec![0; bytes];
                let outcome = if shared {
                    read(&*space.memory(), &mut data, from)
                } else {
                    read(&worker.enter(), &mut data, from)
                };
                match model.locate(from, bytes, Access::READ) {
                    Err(wrong) => prop_assert_eq!(outcome, wrong),
                    Ok(places) => {
                        prop_assert_eq!(outcome, Outcome::Done);
                        let expected: Vec<u8> = places.iter().map(|gpa| model.memory[at(*gpa)]).collect();
                        prop_assert!(data == expected, "read other bytes");
                    }
                }
            }
            Op::Check { at: from, bytes, permissions } => {
                let access = match permissions {
                    Permissions::Read => Access::READ,
                    Permissions::Write => Access::WRITE,
                    Permissions::No | Permissions::ReadWrite => Access::RW,
                };
                let expected = model.locate(from, bytes, access).is_ok();
                let guard = worker.enter();
                prop_assert_eq!(guard.check_range(GuestAddress(from), bytes, permissions), expected);
                let slices = guard.get_slices(GuestAddress(from), bytes, permissions);
                let reached = slices.map(|s| s.map(|s| s.unwrap().len()).sum::<usize>()).ok();
                prop_assert_eq!(reached, expected.then_some(bytes));
            }
        }
    }
    for region in rig.memory.iter() {
        let (start, bytes) = (region.start_addr().0, at(region.len()));
        let mut now = vec![0; bytes];
        rig.memory.read_slice(&mut now, GuestAddress(start)).unwrap();
        prop_assert!(now == model.memory[at(start)..at(start) + bytes], "other bytes in memory");
        for page in start / PAGE..(start + region.len()) / PAGE {
            let dirty = region.bitmap().dirty_at(at(page * PAGE - start));
            prop_assert_eq!(dirty, model.dirty.contains(&page), "dirty bit of page {}", page);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn every_access_is_as_a_table_of_pages_says(ops in vec(op(), 1..40)) {
        run(ops)?;
    }
}
