use std::fs::read_to_string;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;

const RW: u32 = 3;

fn memfd(name: &str, pages: u64, sealed: bool) -> File {
    let fd = memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, pages * PAGE).unwrap();
    if sealed {
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    }
    File::from(fd)
}

fn windows() -> Windows {
    Windows::new(WindowLimits::default())
}

fn is_mapped(name: &str) -> bool {
    read_to_string("/proc/self/maps").unwrap().contains(&format!("/memfd:{name} "))
}

#[test]
fn window_when_mapped_is_the_clients_memory_at_its_address() {
    let windows = windows();
    let file = memfd("at-its-address", 4, true);
    let own = file.try_clone().unwrap();
    let window = windows.map(RW, Some(file), PAGE, 0x10_0000, 2 * PAGE).unwrap();
    assert_eq!(window, Window { address: 0x10_0000, size: 2 * PAGE, memory: true, read_only: false });
    assert_eq!(windows.list(), [window]);

    let memory = windows.memory();
    memory.write_slice(b"device", GuestAddress(0x10_0010)).unwrap();
    let mut seen = [0; 6];
    rustix::io::pread(&own, &mut seen, PAGE + 0x10).unwrap();
    assert_eq!(&seen, b"device");
    rustix::io::pwrite(&own, b"client", 2 * PAGE).unwrap();
    memory.read_slice(&mut seen, GuestAddress(0x10_1000)).unwrap();
    assert_eq!(&seen, b"client");
    assert!(memory.read_slice(&mut seen, GuestAddress(0x10_2000)).is_err());
    assert!(memory.read_slice(&mut seen, GuestAddress(0xf_ffff)).is_err());
}

#[test]
fn windows_when_adjacent_are_one_memory_and_come_in_any_order() {
    let windows = windows();
    for address in [2 * PAGE, 0, PAGE] {
        windows.map(RW, Some(memfd("adjacent", 3, true)), address, address, PAGE).unwrap();
    }
    let starts: Vec<_> = windows.list().iter().map(|window| window.address).collect();
    assert_eq!(starts, [0, PAGE, 2 * PAGE]);
    let data = vec![7; 3 * 4096];
    windows.memory().write_slice(&data, GuestAddress(0)).unwrap();
    assert!(windows.memory().write_slice(&data, GuestAddress(1)).is_err());
}

#[test]
fn window_when_it_meets_another_is_refused_and_changes_nothing() {
    let windows = windows();
    windows.map(RW, Some(memfd("first", 2, true)), 0, 2 * PAGE, 2 * PAGE).unwrap();
    // One without memory counts as well.
    windows.map(RW, None, 0, 8 * PAGE, PAGE).unwrap();
    for (address, pages) in [(2, 2), (1, 2), (3, 1), (3, 4), (0, 16), (1, 4), (8, 1), (5, 4)] {
        for file in [Some(memfd("second", 16, true)), None] {
            let error = windows.map(RW, file, 0, address * PAGE, pages * PAGE).unwrap_err();
            assert!(matches!(error, WindowError::Overlap), "{address} {pages}: {error:?}");
        }
    }
    assert_eq!(windows.list().len(), 2);
    assert_eq!(windows.memory().num_regions(), 1);
    windows.map(RW, None, 0, 4 * PAGE, 4 * PAGE).unwrap();
    windows.map(RW, None, 0, 0, 2 * PAGE).unwrap();
}

#[test]
fn unmap_when_not_exact_is_refused_and_changes_nothing() {
    let windows = windows();
    windows.map(RW, Some(memfd("exact", 4, true)), 0, 4 * PAGE, 4 * PAGE).unwrap();
    let never = |window: Window| panic!("{window:?} goes");
    for (address, pages) in [(4, 3), (4, 5), (5, 3), (3, 5), (0, 16), (4, 0), (0, 0)] {
        let error = windows.unmap(address * PAGE, pages * PAGE, never).unwrap_err();
        assert!(matches!(error, WindowError::Unknown), "{address} {pages}");
    }
    assert_eq!(windows.memory().num_regions(), 1);
    windows.unmap(4 * PAGE, 4 * PAGE, |_| ()).unwrap();
    assert_eq!(windows.list(), []);
    assert!(windows.unmap(4 * PAGE, 4 * PAGE, never).is_err());
}

#[test]
fn flags_when_they_make_no_sense_are_refused() {
    let windows = windows();
    for flags in [RW | 1 << 4, 1 << 31, RW | 4, RW | 8] {
        let error = windows.map(flags, None, 0, 0, PAGE).unwrap_err();
        assert!(matches!(error, WindowError::Flags(said) if said == flags));
    }
    let error = windows.map(RW | 1 << 4, Some(memfd("flags", 1, true)), 0, 0, PAGE).unwrap_err();
    assert!(matches!(error, WindowError::Flags(_)));
    for (nth, flags) in (0..).zip([RW, RW | 4, RW | 8, RW | 12]) {
        let window = windows.map(flags, Some(memfd("flags", 1, true)), 0, nth * PAGE, PAGE).unwrap();
        assert!(window.memory);
    }
}

#[test]
fn window_when_not_whole_pages_or_past_the_end_of_all_addresses_is_refused() {
    let windows = windows();
    let cases = [
        (0, 0, 0),
        (0, 1, PAGE),
        (0, PAGE, PAGE - 1),
        (0, PAGE, PAGE + 1),
        (8, 0, PAGE),
        (0, 0, u64::MAX),
        (0, u64::MAX - PAGE + 1, 2 * PAGE),
        (0, 1 << 63, (1 << 63) + PAGE),
    ];
    for (offset, address, size) in cases {
        for file in [Some(memfd("pages", 2, true)), None] {
            let error = windows.map(RW, file, offset, address, size).unwrap_err();
            assert!(matches!(error, WindowError::Unaligned), "{offset:#x} {address:#x} {size:#x}");
        }
    }
    let last = windows.map(RW, None, 0, u64::MAX - PAGE + 1, PAGE).unwrap();
    assert!(matches!(windows.map(RW, None, 0, last.address, PAGE), Err(WindowError::Overlap)));
    windows.unmap(last.address, last.size, |_| ()).unwrap();
}

#[test]
fn windows_when_there_are_as_many_as_may_be_are_refused_until_one_goes() {
    let windows = Windows::new(WindowLimits { windows: 2, ..WindowLimits::default() });
    windows.map(RW, None, 0, 0, PAGE).unwrap();
    windows.map(RW, Some(memfd("many", 1, true)), 0, PAGE, PAGE).unwrap();
    let third = || windows.map(RW, Some(memfd("many", 1, true)), 0, 2 * PAGE, PAGE);
    assert!(matches!(third(), Err(WindowError::TooMany(2))));
    windows.unmap(0, PAGE, |_| ()).unwrap();
    third().unwrap();
}

#[test]
fn files_when_there_are_as_many_as_may_be_are_refused_until_one_goes() {
    let windows = Windows::new(WindowLimits { files: 2, ..WindowLimits::default() });
    let [one, two, three] = ["one", "two", "three"].map(|name| memfd(name, 8, true));
    let map = |file: &File, page: u64| {
        windows.map(RW, Some(file.try_clone().unwrap()), page * PAGE, page * PAGE, PAGE)
    };
    // Windows of one file cost one descriptor.
    for page in 0..4 {
        map(&one, page).unwrap();
    }
    map(&two, 4).unwrap();
    assert!(matches!(map(&three, 5), Err(WindowError::TooManyFiles(2))));
    for page in 0..3 {
        windows.unmap(page * PAGE, PAGE, |_| ()).unwrap();
        assert!(matches!(map(&three, 5), Err(WindowError::TooManyFiles(2))));
    }
    windows.unmap(3 * PAGE, PAGE, |_| ()).unwrap();
    map(&three, 5).unwrap();
    // What is written lands in the right one.
    windows.memory().write_slice(&[3], GuestAddress(5 * PAGE)).unwrap();
    let mut seen = [0];
    rustix::io::pread(&three, &mut seen, 5 * PAGE).unwrap();
    assert_eq!(seen, [3]);
}

#[test]
fn bytes_when_there_are_as_many_as_may_be_are_refused_until_some_go() {
    let windows = Windows::new(WindowLimits { bytes: 4 * PAGE, ..WindowLimits::default() });
    let map =
        |page: u64, pages: u64| windows.map(RW, Some(memfd("much", 8, true)), 0, page * PAGE, pages * PAGE);
    map(0, 3).unwrap();
    assert!(matches!(map(8, 2), Err(WindowError::TooMuch(_))));
    map(8, 1).unwrap();
    assert!(matches!(map(9, 1), Err(WindowError::TooMuch(_))));
    // What has no memory costs none.
    windows.map(RW, None, 0, 1 << 40, 1 << 40).unwrap();
    windows.unmap(0, 3 * PAGE, |_| ()).unwrap();
    map(9, 3).unwrap();
    windows.unmap(1 << 40, 1 << 40, |_| ()).unwrap();
    assert!(matches!(map(0, 1), Err(WindowError::TooMuch(_))));
}

#[test]
fn memory_when_not_sealed_against_shrinking_is_taken_only_where_that_is_allowed() {
    let windows = windows();
    let error = windows.map(RW, Some(memfd("unsealed", 1, false)), 0, 0, PAGE).unwrap_err();
    assert!(matches!(error, WindowError::Unsealed));
    // Other seals do not help, and a file that has none cannot have this one.
    let grow = memfd("grow", 1, false);
    fcntl_add_seals(&grow, SealFlags::GROW).unwrap();
    assert!(matches!(windows.map(RW, Some(grow), 0, 0, PAGE), Err(WindowError::Unsealed)));
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(PAGE).unwrap();
    let again = disk.try_clone().unwrap();
    assert!(matches!(windows.map(RW, Some(again), 0, 0, PAGE), Err(WindowError::Unsealed)));
    assert_eq!(windows.list(), []);

    let windows = Windows::new(WindowLimits { allow_unsealed: true, ..WindowLimits::default() });
    windows.map(RW, Some(memfd("unsealed", 1, false)), 0, 0, PAGE).unwrap();
    assert!(windows.map(RW, Some(disk), 0, PAGE, PAGE).unwrap().memory);
}

#[test]
fn huge_pages_when_given_are_taken_only_where_that_is_allowed() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    // Not every kernel has them.
    let Ok(fd) = memfd_create("huge", flags) else { return };
    ftruncate(&fd, 2 << 20).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let file = File::from(fd);
    let error = windows().map(RW, Some(file.try_clone().unwrap()), 0, 0, 2 << 20).unwrap_err();
    assert!(matches!(error, WindowError::Huge), "{error:?}");
    let trusting = Windows::new(WindowLimits { allow_unsealed: true, ..WindowLimits::default() });
    // Not touched: there may be none.
    assert!(trusting.map(RW, Some(file), 0, 0, 2 << 20).unwrap().memory);
}

#[test]
fn descriptor_when_it_is_no_regular_file_is_refused() {
    for allow_unsealed in [false, true] {
        let windows = Windows::new(WindowLimits { allow_unsealed, ..WindowLimits::default() });
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        let zero = File::open("/dev/zero").unwrap();
        let folder = File::open("/").unwrap();
        for file in [File::from(pipe), File::from(event), zero, folder] {
            let error = windows.map(RW, Some(file), 0, 0, PAGE).unwrap_err();
            assert!(matches!(error, WindowError::NotMemory), "{error:?}");
        }
        assert_eq!(windows.list(), []);
    }
}

#[test]
fn window_when_it_ends_behind_the_files_end_is_refused() {
    let windows = windows();
    for (offset, pages) in [(0, 5), (1, 4), (4, 1), (1 << 40, 1), (u64::MAX / PAGE, 1), (0, u64::MAX / PAGE)]
    {
        let file = Some(memfd("end", 4, true));
        let error = windows.map(RW, file, offset * PAGE, 0, pages * PAGE).unwrap_err();
        assert!(
            matches!(error, WindowError::BehindEnd | WindowError::TooMuch(_)),
            "{offset} {pages}: {error:?}"
        );
    }
    windows.map(RW, Some(memfd("end", 4, true)), 3 * PAGE, 0, PAGE).unwrap();
}

#[test]
fn memory_when_it_cannot_be_written_is_refused() {
    let sealed = memfd("write-sealed", 1, true);
    fcntl_add_seals(sealed.as_fd(), SealFlags::WRITE).unwrap();
    assert!(matches!(windows().map(RW, Some(sealed), 0, 0, PAGE), Err(WindowError::Map(_))));
}

#[test]
fn window_without_memory_is_reached_by_no_one_and_can_be_unmapped() {
    let windows = windows();
    windows.map(RW, None, 0, 0, PAGE).unwrap();
    windows.map(0, Some(memfd("half", 1, true)), 0, PAGE, PAGE).unwrap();
    // What is only read may be of any kind, and is left out then.
    windows.map(1, Some(memfd("half", 1, false)), 0, 2 * PAGE, PAGE).unwrap();
    assert_eq!(windows.memory().num_regions(), 0);
    assert_eq!(windows.with_read_only().memory().num_regions(), 0);
    assert!(windows.memory().read_obj::<u8>(GuestAddress(PAGE)).is_err());
    assert!(!is_mapped("half"));
    for window in windows.list() {
        assert!(!window.memory);
        let mut gone = None;
        windows.unmap(window.address, window.size, |window| gone = Some(window)).unwrap();
        assert_eq!(gone, Some(window));
    }
    assert_eq!(windows.list(), []);
}

#[test]
fn window_that_may_only_be_read_is_found_by_those_who_ask_for_such() {
    let windows = windows();
    let file = memfd("read-only", 2, true);
    file.write_all_at(b"text", 0).unwrap();
    let window = windows.map(1, Some(file.try_clone().unwrap()), 0, 0, PAGE).unwrap();
    assert!(window.memory && window.read_only);
    // One that may only be written is as any other.
    let other = windows.map(2, Some(file), PAGE, PAGE, PAGE).unwrap();
    assert!(other.memory && !other.read_only);
    assert!(windows.memory().read_obj::<u8>(GuestAddress(0)).is_err());
    let all = windows.with_read_only();
    assert_eq!(&all.memory().read_obj::<[u8; 4]>(GuestAddress(0)).unwrap(), b"text");
    assert_eq!((windows.memory().num_regions(), all.memory().num_regions()), (1, 2));
    windows.clear(|_| ());
    assert_eq!((windows.memory().num_regions(), all.memory().num_regions()), (0, 0));
    assert!(!is_mapped("read-only"));
}

#[test]
fn window_when_unmapped_is_mapped_in_this_process_no_more() {
    let windows = windows();
    let file = memfd("truly-gone", 2, true);
    windows.map(RW, Some(file.try_clone().unwrap()), 0, 0, PAGE).unwrap();
    windows.map(RW, Some(file), PAGE, 0x10_0000, PAGE).unwrap();
    windows.memory().write_obj(1_u8, GuestAddress(0)).unwrap();
    assert!(is_mapped("truly-gone"));
    windows.unmap(0, PAGE, |_| ()).unwrap();
    assert!(is_mapped("truly-gone"));
    windows.unmap(0x10_0000, PAGE, |_| ()).unwrap();
    assert!(!is_mapped("truly-gone"));
}

#[test]
fn unmap_when_another_thread_holds_the_memory_waits_for_it_after_between() {
    let windows = windows();
    windows.map(RW, Some(memfd("held", 1, true)), 0, 0, PAGE).unwrap();
    windows.map(RW, Some(memfd("other", 1, true)), 0, PAGE, PAGE).unwrap();
    let (held, wait) = mpsc::channel();
    let (said, between) = mpsc::channel();
    let released = AtomicBool::new(false);
    thread::scope(|scope| {
        let (windows, released) = (&windows, &released);
        scope.spawn(move || {
            let memory = windows.memory();
            held.send(()).unwrap();
            // The unmap tells of itself while the memory is held: else this would never end.
            between.recv().unwrap();
            assert!(windows.memory().find_region(GuestAddress(0)).is_none());
            // Who has it already may go on.
            memory.write_obj(9_u8, GuestAddress(0)).unwrap();
            thread::sleep(Duration::from_millis(100));
            assert!(is_mapped("held"));
            released.store(true, Ordering::SeqCst);
        });
        wait.recv().unwrap();
        windows.unmap(0, PAGE, |_| said.send(()).unwrap()).unwrap();
        assert!(released.load(Ordering::SeqCst));
    });
    assert!(!is_mapped("held"));
    assert!(is_mapped("other"));
}

#[test]
fn windows_when_mapped_while_another_is_waited_for_do_not_wait() {
    let windows = windows();
    windows.map(RW, Some(memfd("waited", 1, true)), 0, 0, PAGE).unwrap();
    let memory = windows.memory();
    let (said, between) = mpsc::channel();
    thread::scope(|scope| {
        let windows = &windows;
        scope.spawn(move || windows.unmap(0, PAGE, |_| said.send(()).unwrap()).unwrap());
        between.recv().unwrap();
        // Its place is free for devices that look it up from now on.
        windows.map(RW, Some(memfd("new", 1, true)), 0, 0, PAGE).unwrap();
        windows.memory().write_obj(5_u8, GuestAddress(0)).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
        drop(memory);
    });
    assert!(!is_mapped("waited"));
    assert!(is_mapped("new"));
}

#[test]
fn clear_when_called_takes_each_away_once() {
    let windows = windows();
    for page in [5, 1, 3] {
        let file = (page != 3).then(|| memfd("cleared", 1, true));
        windows.map(RW, file, 0, page * PAGE, PAGE).unwrap();
    }
    let mut gone = Vec::new();
    windows.clear(|window| gone.push(window.address / PAGE));
    assert_eq!(gone, [1, 3, 5]);
    assert_eq!(windows.list(), []);
    assert_eq!(windows.memory().num_regions(), 0);
    assert!(!is_mapped("cleared"));
}
