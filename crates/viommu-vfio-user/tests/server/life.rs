//! Clients that come and go, and the socket.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::time::Duration;

use viommu_vfio_user::spec::{Command, HEADER, Header, IrqAction, MessageFlags, irq};
use viommu_vfio_user::virtio::ResetBy;
use viommu_vfio_user::{BindError, Server, WindowLimits};
use zerocopy::IntoBytes;

use crate::common::*;

const SET: IrqAction = IrqAction::DATA_EVENTFD.union(IrqAction::TRIGGER);

#[test]
fn message_whose_size_lies_ends_the_connection_alone() {
    let server = Running::new();
    for size in [0, 1, 15, (1 << 20) + 33, u32::MAX] {
        let mut client = server.client();
        let mut header = client.header(Command::DEVICE_RESET, 0, MessageFlags::empty());
        header.size = size.into();
        client.send(&[header.as_bytes(), &[0; 64]].concat(), &[]);
        client.assert_closed();
        drop(client);
        server.cleaned();
    }
    // Shorter than its payload: the rest is the next message, and that is none.
    let mut client = server.client();
    let mut header = client.header(Command::REGION_WRITE, 20, MessageFlags::NO_REPLY);
    header.size = 32.into();
    client.send(&[header.as_bytes(), &write(7, 0, &[0xff; 64])].concat(), &[]);
    client.assert_closed();
}

#[test]
fn client_that_goes_in_the_middle_of_a_message_costs_nothing_else() {
    let server = Running::new();
    let file = memory("middle", 1);
    for bytes in [1, 15, 16, 17, 47] {
        let mut client = server.client();
        assert_eq!(client.map(Some(&file), 0, 0, PAGE), 0);
        let header = client.header(Command::DMA_MAP, 32, MessageFlags::empty());
        let whole = [header.as_bytes(), map(0, PAGE, PAGE).as_bytes()].concat();
        client.send(&whole[..bytes], &[file.as_fd()]);
        drop(client);
        server.cleaned();
    }
    server.client().read(7, 0, 4);
}

#[test]
fn descriptors_when_more_than_allowed_end_the_connection() {
    let server = Running::new();
    let file = memory("many", 1);
    let mut client = server.client();
    client.post(Command::DMA_MAP, map(0, 0, PAGE).as_bytes(), MessageFlags::empty(), &[file.as_fd(); 17]);
    client.assert_closed();
    drop(client);
    server.cleaned();
    // As many as allowed, and too many for the command.
    let mut client = server.client();
    assert_eq!(client.errno(Command::DMA_MAP, map(0, 0, PAGE).as_bytes(), &[file.as_fd(); 16]), EINVAL);
    // With both parts of one message.
    let header = client.header(Command::DMA_MAP, 32, MessageFlags::empty());
    client.send(header.as_bytes(), &[file.as_fd(); 9]);
    client.send(map(0, 0, PAGE).as_bytes(), &[file.as_fd(); 9]);
    client.assert_closed();
}

#[test]
fn descriptors_of_clients_do_not_stay_behind() {
    let server = Running::new();
    // Others of this program open and close theirs meanwhile: only these have this name.
    let open = || {
        let links = fs::read_dir("/proc/self/fd").unwrap().flatten();
        links
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .filter(|to| to.to_string_lossy().contains("memfd:leak"))
            .count()
    };
    let file = memory("leak", 8);
    let before = open();
    for _ in 0..5 {
        let mut client = server.client();
        for page in 0..8 {
            assert_eq!(client.map(Some(&file), page * PAGE, page * PAGE, PAGE), 0);
        }
        // Windows of one file share its descriptor.
        assert!(open() <= before + 1);
        client.map(Some(&file), 0, 0, PAGE);
        client.errno(Command::DEVICE_RESET, &[], &[file.as_fd(); 3]);
        client.errno(Command::DEVICE_SET_IRQS, irqs(irq::MSIX, SET, 0, 3).as_bytes(), &[file.as_fd(); 3]);
        client.post(Command::DMA_MAP, &[], MessageFlags::REPLY, &[file.as_fd(); 3]);
        client.post(Command::DMA_MAP, &[], MessageFlags::NO_REPLY, &[file.as_fd(); 17]);
        client.assert_closed();
        drop(client);
        server.cleaned();
        server.eventually(|_| open() == before);
    }
    assert!(!fs::read_to_string("/proc/self/maps").unwrap().contains("memfd:leak"));
}

#[test]
fn client_when_it_has_gone_leaves_a_clean_device_to_the_next() {
    let server = Running::new();
    let mut client = server.client();
    let (file, vector, pin) = (memory("clean", 4), event(), event());
    assert_eq!(client.map(Some(&file), 0, 0, 4 * PAGE), 0);
    assert_eq!(client.map(None, 0, 1 << 40, PAGE), 0);
    assert_eq!(client.set_irqs(irq::MSIX, SET, 0, 3, &[&vector, &vector, &vector]), 0);
    client.write(7, 4, &[6, 0]);
    client.write(7, 0x3c, &[11]);
    client.write(1, 0, &[0xaa; 16]);
    client.drive(0);
    assert_eq!(server.state.status(), 15);
    server.events.try_iter().for_each(drop);
    drop(client);
    let unmapped = |address, size, memory| {
        Event::Unmapped(viommu_vfio_user::memory::Window { address, size, memory, read_only: false })
    };
    // The device is reset while its memory is there, and hears of each window.
    let before = server.until(&unmapped(1 << 40, PAGE, false));
    assert_eq!(before, [Event::Reset(ResetBy::Machine), unmapped(0, 4 * PAGE, true)]);
    server.eventually(|server| server.windows.list().is_empty());
    assert!(!fs::read_to_string("/proc/self/maps").unwrap().contains("memfd:clean "));

    let mut client = server.client();
    assert_eq!(client.read(7, 4, 2), [0, 0]);
    assert_eq!(client.read(7, 0x3c, 1), [0]);
    assert_eq!(client.read(1, 0, 16), [0; 16]);
    assert_eq!(client.read(0, 0x14, 1), [0]);
    assert_eq!(client.read(0, 0x20, 24), [0; 24]);
    assert_eq!(server.state.status(), 0);
    // The old one's eventfds are not raised any more, its windows are free again.
    assert_eq!(client.map(Some(&file), 0, 0, 4 * PAGE), 0);
    assert_eq!(client.set_irqs(irq::INTX, SET, 0, 1, &[&pin]), 0);
    client.drive(0);
    // The old rings are still in that memory; new ones begin at their start.
    rustix::io::pwrite(&file, &[0; 4], 0x400).unwrap();
    rustix::io::pwrite(&file, &[0; 4], 0x800).unwrap();
    offer(&file, 0, 2 * PAGE, b"next");
    client.write(0, 0x3000, &[0, 0]);
    assert_eq!(raised(&pin), 1);
    assert!(!is_raised(&vector));
    assert_eq!(answered(&file, 2 * PAGE, 4), b"next");
    assert_eq!(server.link.clients(), 2);
}

#[test]
fn second_client_is_refused_while_the_first_goes_on() {
    let server = Running::new();
    let mut first = server.client();
    first.write(7, 0x3c, &[5]);
    for _ in 0..10 {
        let mut second = Client::connect(&server.path);
        second.assert_closed();
        assert_eq!(first.read(7, 0x3c, 1), [5]);
    }
    // One that talks at once is refused all the same.
    let mut second = UnixStream::connect(&server.path).unwrap();
    let _perhaps_too_late = second.write_all(&[1; 20]);
    assert_eq!(first.read(7, 0x3c, 1), [5]);
    drop(first);
    server.cleaned();
    let mut third = server.client();
    assert_eq!(third.read(7, 0x3c, 1), [0]);
}

#[test]
fn socket_when_made_is_for_this_user_alone() {
    let mut server = Running::new();
    let there = fs::symlink_metadata(&server.path).unwrap();
    assert!(there.file_type().is_socket());
    assert_eq!(there.permissions().mode() & 0o7777, 0o600);
    server.end();
    assert!(fs::symlink_metadata(&server.path).is_err(), "it is gone with its server");
}

#[test]
fn socket_when_left_behind_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stale");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let limits = WindowLimits::default();
    drop(Server::bind(&path, function(limits).0, limits).unwrap());
    assert!(!path.exists());
}

#[test]
fn socket_when_in_use_or_something_else_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let limits = WindowLimits::default();
    let bind = |name: &str| Server::bind(&folder.path().join(name), function(limits).0, limits).map(drop);

    let server = Server::bind(&folder.path().join("served"), function(limits).0, limits).unwrap();
    assert!(matches!(bind("served"), Err(BindError::InUse(_))));
    let _datagrams = UnixDatagram::bind(folder.path().join("datagrams")).unwrap();
    assert!(matches!(bind("datagrams"), Err(BindError::InUse(_))));
    fs::write(folder.path().join("file"), "mine").unwrap();
    assert!(matches!(bind("file"), Err(BindError::NoSocket(_))));
    assert_eq!(fs::read(folder.path().join("file")).unwrap(), b"mine");
    fs::create_dir(folder.path().join("folder")).unwrap();
    assert!(matches!(bind("folder"), Err(BindError::NoSocket(_))));
    symlink(folder.path().join("file"), folder.path().join("link")).unwrap();
    assert!(matches!(bind("link"), Err(BindError::NoSocket(_))));
    symlink(folder.path().join("nowhere"), folder.path().join("dangling")).unwrap();
    assert!(matches!(bind("dangling"), Err(BindError::NoSocket(_))));
    assert!(matches!(bind("no/such/folder"), Err(BindError::Io { .. })));
    assert!(matches!(bind(&"x".repeat(200)), Err(BindError::Io { .. })));
    drop(server);
    bind("served").unwrap();
}

#[test]
fn socket_of_a_server_that_takes_nobody_in_is_in_use() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("full");
    let _listener = UnixListener::bind(&path).unwrap();
    // Until its queue is full: who connects then would wait.
    let mut waiting = Vec::new();
    loop {
        use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
        let socket =
            socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
        if connect(&socket, &SocketAddrUnix::new(&path).unwrap()).is_err() {
            break;
        }
        waiting.push(socket);
    }
    let limits = WindowLimits::default();
    let error = Server::bind(&path, function(limits).0, limits).map(drop).unwrap_err();
    assert!(matches!(error, BindError::InUse(_)), "{error}");
}

#[test]
fn socket_of_another_server_at_the_same_place_outlives_this_one() {
    let mut server = Running::new();
    fs::remove_file(&server.path).unwrap();
    let _other = UnixListener::bind(&server.path).unwrap();
    server.end();
    assert!(server.path.exists());
}

#[test]
fn server_when_stopped_ends_whatever_it_does() {
    // Nobody there.
    Running::new().end();
    // A client that is silent.
    let mut server = Running::new();
    let mut client = server.client();
    assert_eq!(client.map(Some(&memory("stopped", 1)), 0, 0, PAGE), 0);
    server.end();
    client.assert_closed();
    assert_eq!(server.windows.list(), []);
    // One that has not said its version.
    let mut server = Running::new();
    let mut client = Client::connect(&server.path);
    server.until(&Event::Connected);
    server.end();
    client.assert_closed();
    // One in the middle of a message: not only when its time is over.
    let mut server = Running::new();
    let mut client = server.client();
    let header = client.header(Command::REGION_WRITE, 100, MessageFlags::empty());
    client.send(&[header.as_bytes(), &[0; 10]].concat(), &[]);
    std::thread::sleep(Duration::from_millis(50));
    let begin = std::time::Instant::now();
    server.end();
    assert!(begin.elapsed() < Duration::from_secs(3));
    client.assert_closed();
}

#[test]
fn server_when_stopped_does_not_wait_for_a_client_that_does_not_read() {
    let mut server = Running::new();
    let mut client = server.client();
    // More answers than the socket holds.
    let read =
        viommu_vfio_user::spec::RegionAccess { offset: 0.into(), region: 0.into(), count: 0x4000.into() };
    for _ in 0..200 {
        client.post(Command::REGION_READ, read.as_bytes(), MessageFlags::empty(), &[]);
    }
    std::thread::sleep(Duration::from_millis(100));
    let begin = std::time::Instant::now();
    server.end();
    assert!(begin.elapsed() < Duration::from_secs(3));
}

#[test]
fn server_when_stopped_before_it_runs_returns_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let limits = WindowLimits::default();
    let mut server = Server::bind(&folder.path().join("early"), function(limits).0, limits).unwrap();
    server.stopper().stop();
    server.run().unwrap();
    server.run().unwrap();
}

#[test]
fn interrupts_and_windows_survive_a_reset_by_the_machine() {
    let server = Running::new();
    let mut client = server.client();
    let (file, vector) = (memory("survive", 4), event());
    assert_eq!(client.map(Some(&file), 0, 0, 4 * PAGE), 0);
    assert_eq!(client.set_irqs(irq::MSIX, SET, 1, 1, &[&vector]), 0);
    client.drive(0);
    client.done(Command::DEVICE_RESET, &[], &[]);
    assert_eq!(server.windows.list().len(), 1);
    client.drive(0);
    offer(&file, 0, 2 * PAGE, b"reset");
    client.write(0, 0x3000, &[0, 0]);
    assert_eq!(raised(&vector), 1);
    server.signal.lock().unwrap().as_ref().unwrap().config_changed();
    assert_eq!(client.read(0, 0x15, 1), [1]);
}

#[test]
fn stream_of_noise_costs_its_own_connection() {
    let server = Running::new();
    let mut state = 0x1234_5678_9abc_def1_u64;
    for _ in 0..50 {
        let mut client = server.client();
        let mut noise = [0; 512];
        for byte in &mut noise {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state.to_le_bytes()[2];
        }
        assert!(noise.len() > HEADER && size_of::<Header>() == HEADER);
        client.send(&noise, &[]);
        drop(client);
        server.cleaned();
    }
    server.client().read(7, 0, 4);
}
