//! Each message, and what is wrong with it.

use std::os::fd::AsFd;

use viommu_vfio_user::WindowLimits;
use viommu_vfio_user::memory::Window;
use viommu_vfio_user::spec::{
    Command, DeviceInfo, HEADER, IoFd, IoFds, IrqAction, IrqInfo, MessageFlags, MultiWrite, RegionAccess,
    RegionInfo, UNMAP_ALL, Version, irq, region,
};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::common::*;

const ENOENT: u32 = 2;
const EEXIST: u32 = 17;
const ENOSPC: u32 = 28;
const ENOSYS: u32 = 38;
const ENOTSUP: u32 = 95;
const EPERM: u32 = 1;
const SET: IrqAction = IrqAction::DATA_EVENTFD.union(IrqAction::TRIGGER);

fn proposal(major: u16, minor: u16, text: &[u8]) -> Vec<u8> {
    [Version { major: major.into(), minor: minor.into() }.as_bytes(), text].concat()
}

#[test]
fn version_when_proposed_is_answered_with_what_the_server_can() {
    for (minor, text) in [
        (0, &b""[..]),
        (1, b"{}\0"),
        (2, b"{\"capabilities\":{}}\0"),
        (7, b"{\"capabilities\":{\"max_msg_fds\":3,\"unknown\":[{}],\"pgsizes\":4096},\"more\":null}\0"),
    ] {
        let server = Running::with(WindowLimits { windows: 77, ..WindowLimits::default() });
        let mut client = Client::connect(&server.path);
        let reply = client.done(Command::VERSION, &proposal(0, minor, text), &[]);
        let (version, text) = Version::read_from_prefix(&reply).unwrap();
        assert_eq!((version.major.get(), version.minor.get()), (0, 0));
        let text = text.strip_suffix(&[0]).expect("it ends in a zero byte");
        let said: serde_json::Value = serde_json::from_slice(text).unwrap();
        let wanted = serde_json::json!({"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1 << 20,
            "max_dma_maps": 77, "pgsizes": 4096, "write_multiple": true}});
        assert_eq!(said, wanted);
        // Once only.
        assert_eq!(client.errno(Command::VERSION, &proposal(0, 0, b""), &[]), EINVAL);
        client.read(7, 0, 4);
    }
}

#[test]
fn version_when_it_makes_no_sense_is_refused_and_may_be_said_again() {
    let server = Running::new();
    let mut client = Client::connect(&server.path);
    let deep = [&[b'['; 100_000][..], b"\0"].concat();
    let cases = [
        (proposal(1, 0, b"{}\0"), ENOTSUP),
        (proposal(0xffff, 0, b""), ENOTSUP),
        (proposal(0, 0, b"{}"), EINVAL),
        (proposal(0, 0, b"{\0"), EINVAL),
        (proposal(0, 0, b"\0"), EINVAL),
        (proposal(0, 0, b"{}\0\0"), EINVAL),
        (proposal(0, 0, b"\xff\xfe\0"), EINVAL),
        (proposal(0, 0, b"[]]\0"), EINVAL),
        (proposal(0, 0, b"{\"capabilities\":{\"max_msg_fds\":-1}}\0"), EINVAL),
        (proposal(0, 0, b"{\"capabilities\":{\"max_msg_fds\":\"8\"}}\0"), EINVAL),
        (proposal(0, 0, b"{\"capabilities\":7}\0"), EINVAL),
        (proposal(0, 0, &deep), EINVAL),
        (vec![], EINVAL),
        (vec![0; 3], EINVAL),
    ];
    for (payload, errno) in cases {
        assert_eq!(client.errno(Command::VERSION, &payload, &[]), errno, "{payload:?}");
    }
    client.done(Command::VERSION, &proposal(0, 1, b"{}\0"), &[]);
    client.read(7, 0, 4);
}

#[test]
fn first_message_when_it_is_not_version_ends_the_connection() {
    for command in [0, 2, 4, 9, 13, 0xffff] {
        let server = Running::new();
        let mut client = Client::connect(&server.path);
        client.post(Command(command), &[0; 16], MessageFlags::empty(), &[]);
        client.assert_closed();
        server.client().read(7, 0, 4);
    }
}

#[test]
fn function_when_looked_at_is_a_pci_function() {
    let server = Running::new();
    let mut client = server.client();
    let asked = DeviceInfo { argsz: 16.into(), flags: 0.into(), regions: 0.into(), irqs: 0.into() };
    let info =
        DeviceInfo::read_from_bytes(&client.done(Command::DEVICE_GET_INFO, asked.as_bytes(), &[])).unwrap();
    assert_eq!((info.argsz.get(), info.flags.get(), info.regions.get(), info.irqs.get()), (16, 3, 9, 5));
    let mut sizes = Vec::new();
    for index in 0..9 {
        let mut asked = RegionInfo::new_zeroed();
        (asked.argsz, asked.index) = (32.into(), index.into());
        let reply = client.done(Command::DEVICE_GET_REGION_INFO, asked.as_bytes(), &[]);
        let info = RegionInfo::read_from_bytes(&reply).unwrap();
        assert_eq!((info.argsz.get(), info.index.get(), info.cap_offset.get()), (32, index, 0));
        assert_eq!(info.flags.get(), if info.size.get() > 0 { 3 } else { 0 });
        sizes.push(info.size.get());
    }
    assert_eq!(sizes, [0x4000, 0x1000, 0, 0, 0, 0, 0, 256, 0]);
    let kinds = (0..5).map(|index| {
        let asked = IrqInfo { argsz: 16.into(), flags: 0.into(), index: index.into(), count: 0.into() };
        let reply = client.done(Command::DEVICE_GET_IRQ_INFO, asked.as_bytes(), &[]);
        let info = IrqInfo::read_from_bytes(&reply).unwrap();
        assert_eq!((info.argsz.get(), info.index.get()), (16, index));
        (info.flags.get(), info.count.get())
    });
    assert_eq!(kinds.collect::<Vec<_>>(), [(7, 1), (0, 0), (1, 3), (0, 0), (0, 0)]);
}

#[test]
fn request_when_its_room_or_its_length_is_too_small_is_refused() {
    let server = Running::new();
    let mut client = server.client();
    let file = memory("short", 1);
    for (command, bytes) in [
        (Command::DMA_MAP, 32),
        (Command::DMA_UNMAP, 24),
        (Command::DEVICE_GET_INFO, 16),
        (Command::DEVICE_GET_REGION_INFO, 32),
        (Command::DEVICE_GET_REGION_IO_FDS, 16),
        (Command::DEVICE_GET_IRQ_INFO, 16),
        (Command::DEVICE_SET_IRQS, 20),
    ] {
        let mut payload = vec![0; bytes];
        for argsz in [0, 1, u8::try_from(bytes).unwrap() - 1] {
            payload[0] = argsz;
            assert_eq!(client.errno(command, &payload, &[]), EINVAL, "{command:?} {argsz}");
        }
        payload[..4].copy_from_slice(&[0xff; 4]);
        for cut in [0, 3, bytes - 1] {
            // The head of DEVICE_GET_INFO's request is all that it needs.
            if command != Command::DEVICE_GET_INFO || cut < 4 {
                assert_eq!(client.errno(command, &payload[..cut], &[]), EINVAL, "{command:?} {cut}");
            }
        }
    }
    for command in [Command::REGION_READ, Command::REGION_WRITE, Command::REGION_WRITE_MULTI] {
        assert_eq!(client.errno(command, &[0; 7], &[]), EINVAL);
    }
    assert_eq!(client.errno(Command::DMA_MAP, &[32; 31], &[file.as_fd()]), EINVAL);
    for (command, index) in [
        (Command::DEVICE_GET_REGION_INFO, region::COUNT),
        (Command::DEVICE_GET_REGION_INFO, u32::MAX),
        (Command::DEVICE_GET_IRQ_INFO, irq::COUNT),
        (Command::DEVICE_GET_REGION_IO_FDS, region::COUNT),
    ] {
        let payload = [&[64, 0, 0, 0, 0, 0, 0, 0][..], &index.to_ne_bytes(), &[0; 20]].concat();
        assert_eq!(client.errno(command, &payload, &[]), EINVAL, "{command:?} {index}");
    }
    assert!(server.windows.list().is_empty());
}

#[test]
fn commands_that_are_not_known_are_answered_with_enosys() {
    let server = Running::new();
    let mut client = server.client();
    for command in [0, 11, 12, 14, 16, 17, 18, 19, 0x8000, 0xffff] {
        assert_eq!(client.errno(Command(command), &[1; 40], &[]), ENOSYS, "{command}");
    }
}

#[test]
fn commands_that_want_no_reply_get_none_and_are_done() {
    let server = Running::new();
    let mut client = server.client();
    client.post(Command::REGION_WRITE, &write(7, 0x3c, &[9]), MessageFlags::NO_REPLY, &[]);
    // Also those that fail, and those that would have a payload.
    client.post(Command::REGION_WRITE, &write(3, 0, &[9]), MessageFlags::NO_REPLY, &[]);
    client.post(Command(99), &[], MessageFlags::NO_REPLY, &[]);
    client.post(Command::DEVICE_GET_INFO, &[16; 16], MessageFlags::NO_REPLY, &[]);
    let file = memory("no-reply", 1);
    client.post(Command::DMA_MAP, map(0, 0, PAGE).as_bytes(), MessageFlags::NO_REPLY, &[file.as_fd()]);
    assert_eq!(client.read(7, 0x3c, 1), [9]);
    assert_eq!(server.windows.list().len(), 1);
    client.assert_silent();
}

#[test]
fn messages_that_are_replies_are_ignored_and_others_end_the_connection() {
    let server = Running::new();
    let mut client = server.client();
    for command in [1, 2, 12, 0xffff] {
        client.post(Command(command), &[0; 20], MessageFlags::REPLY, &[]);
        client.post(Command(command), &[], MessageFlags::REPLY | MessageFlags::ERROR, &[event().as_fd()]);
    }
    client.read(7, 0, 4);
    drop(client);
    server.cleaned();
    for kind in [2, 3, 15] {
        let mut client = server.client();
        client.post(Command::DEVICE_RESET, &[], MessageFlags::from_bits_retain(kind), &[]);
        client.assert_closed();
        server.cleaned();
    }
}

#[test]
fn descriptors_with_commands_that_take_none_are_refused() {
    let server = Running::new();
    let mut client = server.client();
    let (file, event) = (memory("none", 1), event());
    for command in [4, 5, 6, 7, 9, 10, 13, 15, 99] {
        let payload = [&[64, 0, 0, 0][..], &[0; 60]].concat();
        assert_eq!(client.errno(Command(command), &payload, &[event.as_fd()]), EINVAL, "{command}");
    }
    assert_eq!(client.map(Some(&file), 0, 0, PAGE), 0);
    let errno = client.errno(Command::DMA_UNMAP, unmap(0, 0, PAGE).as_bytes(), &[file.as_fd()]);
    assert_eq!(errno, EINVAL);
    assert_eq!(server.windows.list().len(), 1);
    // One for each window.
    let two = [file.as_fd(), file.as_fd()];
    assert_eq!(client.errno(Command::DMA_MAP, map(0, PAGE, PAGE).as_bytes(), &two), EINVAL);
    let mut fresh = Client::connect(&server.path);
    fresh.assert_closed();
}

#[test]
fn windows_when_wrong_are_refused_by_their_errno() {
    let server = Running::with(WindowLimits { windows: 3, ..WindowLimits::default() });
    let mut client = server.client();
    let file = memory("windows", 4);
    assert_eq!(client.map(Some(&file), 0, 0, 2 * PAGE), 0);
    assert_eq!(client.map(Some(&file), 0, PAGE, 2 * PAGE), EEXIST);
    assert_eq!(client.map(Some(&file), 0, 0, 2 * PAGE), EEXIST);
    assert_eq!(client.map(Some(&file), 0, 8 * PAGE, 8), EINVAL);
    assert_eq!(client.map(Some(&file), 0, 8 * PAGE, 0), EINVAL);
    assert_eq!(client.map(Some(&file), 0, u64::MAX - PAGE + 1, 2 * PAGE), EINVAL);
    assert_eq!(client.map(Some(&file), 3 * PAGE, 8 * PAGE, 2 * PAGE), EINVAL);
    let unsealed = tempfile::tempfile().unwrap();
    unsealed.set_len(PAGE).unwrap();
    assert_eq!(client.map(Some(&unsealed), 0, 8 * PAGE, PAGE), EPERM);
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    assert_eq!(client.map(Some(&pipe.into()), 0, 8 * PAGE, PAGE), EINVAL);
    // Without a descriptor it is known, and reached by no device.
    assert_eq!(client.map(None, 0, 8 * PAGE, PAGE), 0);
    let wants_file = viommu_vfio_user::spec::DmaMap { flags: 7.into(), ..map(0, 9 * PAGE, PAGE) };
    assert_eq!(client.errno(Command::DMA_MAP, wants_file.as_bytes(), &[]), EINVAL);
    assert_eq!(client.map(Some(&file), 0, 16 * PAGE, PAGE), 0);
    assert_eq!(client.map(Some(&file), 0, 32 * PAGE, PAGE), ENOSPC);
    let window = |page: u64, pages: u64, memory| Window {
        address: page * PAGE,
        size: pages * PAGE,
        memory,
        read_only: false,
    };
    let all = [window(0, 2, true), window(8, 1, false), window(16, 1, true)];
    assert_eq!(server.windows.list(), all);

    assert_eq!(client.unmap(0, 0, PAGE), ENOENT);
    assert_eq!(client.unmap(0, 0, 3 * PAGE), ENOENT);
    assert_eq!(client.unmap(UNMAP_ALL, 0, 2 * PAGE), EINVAL);
    assert_eq!(client.unmap(UNMAP_ALL, PAGE, 0), EINVAL);
    assert_eq!(client.unmap(1, 0, 2 * PAGE), EINVAL);
    assert_eq!(client.unmap(4, 0, 2 * PAGE), EINVAL);
    assert_eq!(server.windows.list(), all);
    let reply = client.done(Command::DMA_UNMAP, unmap(0, 0, 2 * PAGE).as_bytes(), &[]);
    assert_eq!(reply, unmap(0, 0, 2 * PAGE).as_bytes());
    assert_eq!(client.unmap(UNMAP_ALL, 0, 0), 0);
    assert_eq!(server.windows.list(), []);
    assert_eq!(client.unmap(UNMAP_ALL, 0, 0), 0);
    let told: Vec<_> = server.events.try_iter().collect();
    let wanted: Vec<_> = all.map(Event::Mapped).into_iter().chain(all.map(Event::Unmapped)).collect();
    assert_eq!(told, [vec![Event::Connected], wanted].concat());
}

#[test]
fn regions_when_accessed_outside_are_refused() {
    let server = Running::new();
    let mut client = server.client();
    for (index, offset, count) in [
        (0, 0x4000, 1),
        (0, 0x3fff, 2),
        (0, 0, 0x4001),
        (0, u64::MAX, 1),
        (0, u64::MAX - 3, 4),
        (1, 0x1000, 4),
        (2, 0, 1),
        (6, 0, 1),
        (7, 256, 1),
        (7, 255, 2),
        (8, 0, 1),
        (9, 0, 1),
        (u32::MAX, 0, 1),
    ] {
        let access = RegionAccess { offset: offset.into(), region: index.into(), count: u32::into(count) };
        assert_eq!(client.errno(Command::REGION_READ, access.as_bytes(), &[]), EINVAL, "{index} {offset:#x}");
        let data = vec![1; usize::try_from(count).unwrap()];
        let errno = client.errno(Command::REGION_WRITE, &write(index, offset, &data), &[]);
        assert_eq!(errno, EINVAL, "{index} {offset:#x}");
    }
    // Whole regions, and nothing of one.
    assert_eq!(client.read(0, 0, 0x4000).len(), 0x4000);
    assert_eq!(client.read(7, 0, 256)[..2], [0xf4, 0x1a]);
    assert!(client.read(0, 0x4000, 0).is_empty());
    client.write(0, 0x4000, &[]);
    // As long as its data, not more and not less.
    for count in [0, 1, 3, 5, u32::MAX] {
        let mut payload = write(7, 0x3c, &[1; 4]);
        payload[12..16].copy_from_slice(&count.to_ne_bytes());
        assert_eq!(client.errno(Command::REGION_WRITE, &payload, &[]), EINVAL);
    }
    assert_eq!(client.errno(Command::REGION_READ, &write(7, 0, &[0; 4]), &[]), EINVAL);
    assert_eq!(client.read(7, 0x3c, 1), [0]);
}

#[test]
fn reads_of_more_than_the_client_takes_are_refused() {
    let server = Running::new();
    let mut client = Client::connect(&server.path);
    client.version(r#"{"capabilities":{"max_data_xfer_size":64}}"#);
    assert_eq!(client.read(7, 0, 64).len(), 64);
    let access = RegionAccess { offset: 0.into(), region: 7.into(), count: 65.into() };
    assert_eq!(client.errno(Command::REGION_READ, access.as_bytes(), &[]), EINVAL);
    // A write may have all that we take.
    let errno = client.errno(Command::REGION_WRITE, &write(7, 0, &vec![0; 1 << 20]), &[]);
    assert_eq!(errno, EINVAL);
}

#[test]
fn many_writes_when_one_is_wrong_end_there() {
    let server = Running::new();
    let mut client = server.client();
    let one = |offset: u64, count: u32, data: [u8; 8]| MultiWrite {
        offset: offset.into(),
        region: 7.into(),
        count: count.into(),
        data,
    };
    let message = |count: u64, writes: &[MultiWrite]| {
        [
            &count.to_ne_bytes()[..],
            &writes.iter().flat_map(|write| write.as_bytes().to_vec()).collect::<Vec<_>>(),
        ]
        .concat()
    };
    let writes = [
        one(0x3c, 1, [5; 8]),
        one(4, 2, [6, 0, 0, 0, 0, 0, 0, 0]),
        one(0x10, 8, [0xff; 8]),
        one(0, 0, [1; 8]),
    ];
    let reply = client.done(Command::REGION_WRITE_MULTI, &message(4, &writes), &[]);
    assert_eq!(reply, 4_u64.to_ne_bytes());
    assert_eq!((client.read(7, 0x3c, 1), client.read(7, 4, 1)), (vec![5], vec![6]));
    assert_eq!(client.read(7, 0x10, 8), [0, 0xc0, 0xff, 0xff, 0, 0xf0, 0xff, 0xff]);
    for (count, wrong) in [
        (1, &writes[..0]),
        (3, &writes),
        (u64::MAX, &writes),
        (1, &[one(0x3c, 9, [7; 8])]),
        (1, &[one(0x3c, u32::MAX, [7; 8])]),
        (1, &[one(255, 2, [7; 8])]),
    ] {
        assert_eq!(client.errno(Command::REGION_WRITE_MULTI, &message(count, wrong), &[]), EINVAL);
        assert_eq!(client.read(7, 0x3c, 1), [5]);
    }
    let errno = client.errno(Command::REGION_WRITE_MULTI, &message(1, &writes[..1])[..31], &[]);
    assert_eq!(errno, EINVAL);
    let half = [one(0x3c, 1, [8; 8]), one(256, 1, [0; 8]), one(0x3c, 1, [9; 8])];
    assert_eq!(client.errno(Command::REGION_WRITE_MULTI, &message(3, &half), &[]), EINVAL);
    assert_eq!(client.read(7, 0x3c, 1), [8]);
    assert_eq!(client.done(Command::REGION_WRITE_MULTI, &message(0, &[]), &[]), [0; 8]);
}

#[test]
fn queues_when_served_use_the_clients_memory_and_interrupt_it() {
    let server = Running::new();
    let mut client = server.client();
    let file = memory("queues", 4);
    assert_eq!(client.map(Some(&file), 0, 0, 4 * PAGE), 0);
    let events = [event(), event(), event()];
    let [a, b, c] = &events;
    // In two messages, of which the second leaves one out.
    assert_eq!(client.set_irqs(irq::MSIX, SET, 0, 2, &[a, b]), 0);
    assert_eq!(client.set_irqs(irq::MSIX, SET, 2, 1, &[c]), 0);
    client.drive(0);
    offer(&file, 0, 2 * PAGE, b"hello");
    client.write(0, 0x3000, &0_u16.to_le_bytes());
    assert_eq!(raised(b), 1);
    assert_eq!(answered(&file, 2 * PAGE, 5), b"hello");
    // Fewer descriptors than vectors: the others are gone.
    assert_eq!(client.set_irqs(irq::MSIX, SET, 0, 3, &[a]), 0);
    offer(&file, 0, 2 * PAGE, b"again");
    client.write(0, 0x3000, &0_u16.to_le_bytes());
    assert_eq!(answered(&file, 2 * PAGE, 5), b"again");
    assert!(!is_raised(b));
    assert_eq!(client.set_irqs(irq::MSIX, SET, 1, 1, &[a]), 0);
    offer(&file, 0, 2 * PAGE, b"third");
    client.write(0, 0x3000, &0_u16.to_le_bytes());
    assert_eq!(raised(a), 1);
    assert_eq!(client.set_irqs(irq::MSIX, SET, 0, 3, &[a, b, c, a]), EINVAL);
    assert_eq!(client.set_irqs(irq::MSIX, SET, 2, 2, &[a, b]), EINVAL);
    let errno =
        client.errno(Command::DEVICE_SET_IRQS, irqs(irq::MSIX, SET, 0, 1).as_bytes(), &[file.as_fd()]);
    assert_eq!(errno, EINVAL);
    // Memory that has gone is not touched: the device needs a reset.
    assert_eq!(client.unmap(0, 0, 4 * PAGE), 0);
    client.write(0, 0x3000, &0_u16.to_le_bytes());
    assert_eq!(client.read(0, 0x14, 1)[0] & 4, 4);
    client.done(Command::DEVICE_RESET, &[], &[]);
    assert_eq!(client.read(0, 0x14, 1), [0]);
}

#[test]
fn pin_when_set_is_raised_and_masks_itself() {
    let server = Running::new();
    let mut client = server.client();
    let file = memory("pin", 4);
    assert_eq!(client.map(Some(&file), 0, 0, 4 * PAGE), 0);
    let pin = event();
    assert_eq!(client.set_irqs(irq::INTX, SET, 0, 1, &[&pin]), 0);
    client.drive(0);
    for _ in 0..2 {
        offer(&file, 0, 2 * PAGE, b"x");
        client.write(0, 0x3000, &0_u16.to_le_bytes());
    }
    assert_eq!(raised(&pin), 1);
    let unmask = IrqAction::DATA_NONE | IrqAction::UNMASK;
    assert_eq!(client.set_irqs(irq::INTX, unmask, 0, 1, &[]), 0);
    assert_eq!(raised(&pin), 1);
    assert_eq!(client.read(0, 0x1000, 1), [1]);
    assert_eq!(client.set_irqs(irq::INTX, unmask, 0, 1, &[]), 0);
    assert!(!is_raised(&pin));
    // A byte each.
    let mut payload = irqs(irq::INTX, IrqAction::DATA_BOOL | IrqAction::TRIGGER, 0, 1).as_bytes().to_vec();
    assert_eq!(client.errno(Command::DEVICE_SET_IRQS, &payload, &[]), EINVAL);
    payload.push(1);
    assert_eq!(client.errno(Command::DEVICE_SET_IRQS, &payload, &[]), 0);
    assert_eq!(raised(&pin), 1);
}

#[test]
fn doorbells_when_asked_for_wake_the_device() {
    let server = Running::new();
    let mut client = server.client();
    let ask = |argsz: u32, index: u32| IoFds {
        argsz: argsz.into(),
        flags: 0.into(),
        index: index.into(),
        count: 0.into(),
    };
    // Too little room: how much it takes, and nothing else.
    let (header, reply, fds) = client.ask(Command::DEVICE_GET_REGION_IO_FDS, ask(16, 0).as_bytes(), &[]);
    assert_eq!((header.error.get(), reply.len(), fds.len()), (0, 16, 0));
    let head = IoFds::read_from_bytes(&reply).unwrap();
    assert_eq!((head.argsz.get(), head.index.get(), head.count.get()), (56, 0, 1));

    let (header, reply, fds) = client.ask(Command::DEVICE_GET_REGION_IO_FDS, ask(56, 0).as_bytes(), &[]);
    assert_eq!((header.error.get(), header.size.get(), fds.len()), (0, 16 + 56, 1));
    let entry = IoFd::read_from_bytes(&reply[16..]).unwrap();
    let said =
        (entry.offset.get(), entry.size.get(), entry.fd_index.get(), entry.kind.get(), entry.flags.get());
    assert_eq!(said, (0x3004, 2, 0, 0, 0));

    let file = memory("doorbell", 4);
    assert_eq!(client.map(Some(&file), 0, 0, 4 * PAGE), 0);
    client.drive(0);
    offer(&file, PAGE, 2 * PAGE, b"ding");
    rustix::io::write(&fds[0], &1_u64.to_ne_bytes()).unwrap();
    server.until(&Event::Rung);
    server.eventually(|_| answered(&file, 2 * PAGE, 4) == b"ding");

    // Regions without any, and questions that make no sense.
    for index in [1, 7, 8] {
        let reply = client.done(Command::DEVICE_GET_REGION_IO_FDS, ask(56, index).as_bytes(), &[]);
        assert_eq!(IoFds::read_from_bytes(&reply).unwrap().count.get(), 0);
    }
    let flags = IoFds { flags: 1.into(), ..ask(56, 0) };
    assert_eq!(client.errno(Command::DEVICE_GET_REGION_IO_FDS, flags.as_bytes(), &[]), EINVAL);
    // A client that takes no descriptors gets none.
    drop(client);
    server.cleaned();
    let mut client = Client::connect(&server.path);
    client.version(r#"{"capabilities":{"max_msg_fds":0}}"#);
    let (_, reply, fds) = client.ask(Command::DEVICE_GET_REGION_IO_FDS, ask(56, 0).as_bytes(), &[]);
    assert_eq!((reply.len(), fds.len()), (16, 0));
}

#[test]
fn writes_of_the_device_to_the_client_arrive_as_messages() {
    let server = Running::new();
    let mut client = server.client();
    server.link.dma_write(0xfee0_1000, &0x4041_u32.to_le_bytes()).unwrap();
    server.link.dma_write(0xfee0_1004, &[]).unwrap();
    for (address, data) in [(0xfee0_1000_u64, &[0x41, 0x40, 0, 0][..]), (0xfee0_1004, &[])] {
        let (header, payload, fds) = client.receive();
        assert_eq!(header.command.get(), Command::DMA_WRITE.0);
        assert_eq!(header.flags.get(), MessageFlags::NO_REPLY.bits());
        assert_eq!(usize::try_from(header.size.get()).unwrap(), HEADER + 16 + data.len());
        let length = u64::try_from(data.len()).unwrap();
        assert_eq!(payload, [&address.to_ne_bytes()[..], &length.to_ne_bytes(), data].concat());
        assert!(fds.is_empty());
    }
    // Between messages, never inside one.
    let link = server.link.clone();
    let writer = std::thread::spawn(move || (0..500_u64).for_each(|n| link.dma_write(n, &[7; 4]).unwrap()));
    let read = RegionAccess { offset: 0.into(), region: 0.into(), count: 0x4000.into() };
    let (mut replies, mut writes) = (0, 0);
    while replies < 50 || writes < 500 {
        if replies < 50 {
            client.post(Command::REGION_READ, read.as_bytes(), MessageFlags::empty(), &[]);
        }
        loop {
            let (header, payload, _) = client.receive();
            if header.command.get() == Command::DMA_WRITE.0 {
                assert_eq!(payload[..8], u64::to_ne_bytes(writes));
                writes += 1;
                if replies == 50 {
                    break;
                }
            } else {
                assert_eq!(payload.len(), 16 + 0x4000);
                replies += 1;
                break;
            }
        }
    }
    writer.join().unwrap();
    drop(client);
    server.cleaned();
    assert!(server.link.dma_write(0, &[1]).is_err());
}
