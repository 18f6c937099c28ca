use super::*;
use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
use zerocopy::IntoBytes;

fn memory(bytes: u64, sealed: bool) -> OwnedFd {
    let fd = memfd_create("guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, bytes).unwrap();
    if sealed {
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    }
    fd
}

fn region(guest: u64, size: u64, user: u64, offset: u64) -> MemoryRegion {
    MemoryRegion { guest: guest.into(), size: size.into(), user: user.into(), offset: offset.into() }
}

fn payload(regions: &[MemoryRegion]) -> Vec<u8> {
    let count = u32::try_from(regions.len()).unwrap();
    [MemoryTable { regions: count.into(), ..MemoryTable::default() }.as_bytes(), regions.as_bytes()].concat()
}

fn read(regions: &[MemoryRegion]) -> Result<Table, TableError> {
    Table::read(&payload(regions), regions.iter().map(|_| memory(0x10_000, true)).collect(), false)
}

#[test]
fn table_when_read_finds_addresses_of_the_front_end_inside_one_region() {
    let table =
        read(&[region(0x10_0000, 0x2000, 0x7000_0000, 0x1000), region(0, 0x1000, 0x5000_0000, 0)]).unwrap();
    assert_eq!(table.ranges().collect::<Vec<_>>(), [(0, 0x1000), (0x10_0000, 0x2000)]);
    assert_eq!(table.guest_of(0x7000_0000, 0x2000), Some(0x10_0000));
    assert_eq!(table.guest_of(0x7000_1000, 0x1000), Some(0x10_1000));
    assert_eq!(table.guest_of(0x5000_0fff, 1), Some(0xfff));
    let outside =
        [(0x7000_1000, 0x1001), (0x6fff_f000, 0x2000), (0x7000_0000, u64::MAX), (u64::MAX, 1), (0, 1)];
    for (user, bytes) in outside {
        assert_eq!(table.guest_of(user, bytes), None, "{user:#x} {bytes:#x}");
    }
    table.memory().unwrap();
}

#[test]
fn table_when_it_cannot_be_is_refused() {
    let good = region(0, 0x1000, 0x1000, 0);
    let cases = [
        (vec![region(0, 0, 0, 0)], "whole pages"),
        (vec![region(0x800, 0x1000, 0, 0)], "whole pages"),
        (vec![region(0, 0x1000, 1, 0)], "whole pages"),
        (vec![region(u64::MAX - 0xfff, 0x2000, 0, 0)], "whole pages"),
        (vec![region(0, 0x2000, u64::MAX - 0xfff, 0)], "whole pages"),
        (vec![region(0, 0x1_1000, 0, 0)], "behind"),
        (vec![region(0, 0x1000, 0, 0x1_0000)], "behind"),
        (vec![region(0, 0x1000, 0, u64::MAX - 0xfff)], "behind"),
        (vec![good, region(0, 0x1000, 0x9000, 0)], "overlap"),
        (vec![good, region(0x9000, 0x1000, 0x1000, 0)], "overlap"),
        (vec![good, region(0x1000, 0x2000, 0, 0)], "overlap"),
    ];
    for (regions, why) in cases {
        let error = read(&regions).unwrap_err();
        assert!(error.to_string().contains(why), "{regions:?}: {error}");
    }
    let many: Vec<_> = (0..33).map(|n| region(n << 12, 0x1000, n << 12, 0)).collect();
    assert!(matches!(read(&many), Err(TableError::TooMany)));
    assert!(matches!(Table::read(&payload(&[good]), vec![], false), Err(TableError::Descriptors { .. })));
    assert!(matches!(Table::read(&[1, 0, 0, 0], vec![], false), Err(TableError::Size)));
    let cut = &payload(&[good])[..39];
    assert!(matches!(Table::read(cut, vec![memory(0x1000, true)], false), Err(TableError::Size)));
}

#[test]
fn memory_when_it_is_none_or_can_shrink_is_refused_unless_told() {
    let good = payload(&[region(0, 0x1000, 0x1000, 0)]);
    let null = || vec![File::open("/dev/null").unwrap().into()];
    assert!(matches!(Table::read(&good, null(), true), Err(TableError::NotMemory)));
    assert!(matches!(Table::read(&good, vec![memory(0x1000, false)], false), Err(TableError::Unsealed)));
    Table::read(&good, vec![memory(0x1000, false)], true).unwrap();
}

#[test]
fn region_when_removed_must_be_exactly_there() {
    let mut table = read(&[region(0, 0x1000, 0x1000, 0)]).unwrap();
    assert!(matches!(table.remove(&region(0, 0x2000, 0x1000, 0)), Err(TableError::Unknown)));
    table.remove(&region(0, 0x1000, 0x1000, 0)).unwrap();
    assert_eq!(table.guest_of(0x1000, 1), None);
}
