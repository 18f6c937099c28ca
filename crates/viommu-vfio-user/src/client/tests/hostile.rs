//! Servers that do not keep to the protocol.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use zerocopy::IntoBytes;

use super::*;
use crate::message;
use crate::spec::{Command, Header, MessageFlags};

fn header(id: u16, command: Command, flags: MessageFlags, bytes: usize) -> Header {
    Header {
        id: id.into(),
        command: command.0.into(),
        size: u32::try_from(16 + bytes).unwrap().into(),
        flags: flags.bits().into(),
        error: 0.into(),
    }
}

/// A server that answers VERSION, and then does as it is told with the stream.
fn against<T: Send + 'static>(
    limit: Duration,
    then: impl FnOnce(UnixStream) -> T + Send + 'static,
) -> (Client, thread::JoinHandle<T>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut payload = Vec::new();
        let asked = message::receive(&theirs, 4096, SOON, &mut payload).unwrap().unwrap().header;
        assert_eq!(payload.last(), Some(&0));
        let reply = header(asked.id.get(), Command::VERSION, MessageFlags::REPLY, 4);
        message::send(&theirs, &reply, &[0; 4], &[]).unwrap();
        then(theirs)
    });
    (Client::connect(ours, limit, NoMemory).unwrap(), server)
}

/// Answers each command with this payload and so many descriptors.
fn answering(payload: Vec<u8>, fds: usize) -> Client {
    let (client, _server) = against(SOON, move |stream| {
        let file = File::open("/dev/null").unwrap();
        let fds = vec![file.as_fd(); fds];
        while let Ok(Some(got)) = message::receive(&stream, 4096, SOON, &mut Vec::new()) {
            let command = Command(got.header.command.get());
            let reply = header(got.header.id.get(), command, MessageFlags::REPLY, payload.len());
            if message::send(&stream, &reply, &payload, &fds).is_err() {
                return;
            }
        }
    });
    client
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

#[test]
fn version_when_the_answer_is_wrong_is_no_connection() {
    for (command, bytes) in [(Command::VERSION, 3), (Command::DMA_MAP, 4), (Command::VERSION, 5)] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let id = message::receive(&theirs, 4096, SOON, &mut Vec::new()).unwrap().unwrap().header.id.get();
            let reply = header(id, command, MessageFlags::REPLY, bytes);
            message::send(&theirs, &reply, &[0, 0, 0, 0, 7][..bytes], &[]).unwrap();
        });
        let error = Client::connect(ours, SOON, NoMemory).unwrap_err();
        assert!(matches!(error, ClientError::Broken(_)), "{error}");
        server.join().unwrap();
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    drop(theirs);
    assert!(matches!(Client::connect(ours, SOON, NoMemory), Err(ClientError::Ended)));
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert!(matches!(Client::connect(ours, AT_ONCE, NoMemory), Err(ClientError::Late(Command::VERSION))));
}

#[test]
fn replies_of_the_wrong_size_or_content_are_refused() {
    let broken = |result: Result<(), ClientError>| {
        assert!(matches!(result, Err(ClientError::Broken(_))), "{result:?}");
    };
    for payload in [vec![], vec![0; 15], vec![0; 17], words(&[16, 3, 65, 5]), words(&[16, 3, 9, u32::MAX])] {
        broken(answering(payload, 0).info().map(drop));
    }
    for payload in [vec![0; 12], words(&[16, 0, 1, 1])] {
        broken(answering(payload, 0).irq_info(2).map(drop));
    }
    for payload in [vec![0; 15], vec![0; 16], words(&[0, 0, 0, 4, 0]), words(&[4, 0, 0, 4, 0])] {
        broken(answering(payload, 0).region_read(1, 4, &mut [0; 4]));
    }
    for payload in [vec![], words(&[4, 0, 1, 3]), words(&[4, 0, 1, 4, 0])] {
        broken(answering(payload, 0).region_write(1, 4, &[0; 4]));
    }
    broken(answering(vec![0], 0).reset());
}

fn region_info(argsz: u32, flags: u32, cap_offset: u32, rest: &[u32]) -> Vec<u8> {
    words(&[&[argsz, flags, 2, cap_offset, 0x2000, 0, 0, 0], rest].concat())
}

#[test]
fn region_when_its_description_makes_no_sense_is_refused() {
    for payload in [
        region_info(32, 0xf, 32, &[]),
        region_info(40, 0xf, 32, &[1, 0]),
        // Areas that are not there, or are behind the region's end.
        region_info(48, 0xf, 32, &[1, 0, 1, 0]),
        region_info(48, 0xf, 32, &[1, 0, u32::MAX, 0]),
        region_info(64, 0xf, 32, &[1, 0, 1, 0, 0x1000, 0, 0x1001, 0]),
        region_info(64, 0xf, 32, &[1, 0, 1, 0, u32::MAX, u32::MAX, 0x1000, 0]),
        // A chain that goes round.
        region_info(40, 0xf, 32, &[9, 32]),
        // Another region.
        words(&[32, 3, 1, 0, 0, 0, 0, 0]),
    ] {
        let said = answering(payload.clone(), 1).region_info(2);
        assert!(matches!(said, Err(ClientError::Broken(_))), "{payload:?}: {said:?}");
    }
}

#[test]
fn region_that_brings_no_file_is_not_mapped() {
    let whole = region_info(64, 0xf, 32, &[1, 0, 1, 0, 0x1000, 0, 0x1000, 0]);
    let said = answering(whole.clone(), 1).region_info(2).unwrap();
    assert_eq!((said.size, said.file.is_some(), said.flags.bits()), (0x2000, true, 0xf));
    assert_eq!(said.areas, [Area { offset: 0x1000, size: 0x1000 }]);
    let said = answering(whole, 0).region_info(2).unwrap();
    assert_eq!((said.file.is_some(), said.flags.bits()), (false, 0xb));
    // A file where none can be mapped is closed.
    let said = answering(region_info(32, 3, 0, &[]), 3).region_info(2).unwrap();
    assert!(said.file.is_none());
}

#[test]
fn server_that_asks_instead_of_answering_is_late() {
    // Reads without end: each is answered, and the limit holds.
    let (client, server) = against(Duration::from_millis(200), |stream| {
        let _asked = message::receive(&stream, 4096, SOON, &mut Vec::new()).unwrap();
        let mut asked = 0_u32;
        let read = header(1, Command::DMA_READ, MessageFlags::empty(), 16);
        while message::send(&stream, &read, &[0; 16], &[]).is_ok() {
            if !matches!(message::receive(&stream, 4096, SOON, &mut Vec::new()), Ok(Some(_))) {
                break;
            }
            asked += 1;
        }
        asked
    });
    let begin = Instant::now();
    assert!(matches!(client.reset(), Err(ClientError::Late(Command::DEVICE_RESET))));
    assert!(begin.elapsed() < Duration::from_secs(3));
    assert!(matches!(client.reset(), Err(ClientError::Over(_))));
    assert!(client.close("enough"));
    assert!(server.join().unwrap() > 0);
}

#[test]
fn server_that_sends_byte_by_byte_is_late() {
    let (client, server) = against(AT_ONCE, |mut stream| {
        let asked = message::receive(&stream, 4096, SOON, &mut Vec::new()).unwrap().unwrap().header;
        let reply = header(asked.id.get(), Command::REGION_READ, MessageFlags::REPLY, 4096);
        let bytes = [reply.as_bytes(), &[0; 4096]].concat();
        for byte in bytes {
            if stream.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    });
    let begin = Instant::now();
    let read = client.region_read(0, 0, &mut [0; 4080]);
    assert!(matches!(read, Err(ClientError::Late(_))), "{read:?}");
    assert!(begin.elapsed() < Duration::from_secs(3));
    drop(client);
    server.join().unwrap();
}

#[test]
fn reply_that_comes_late_is_never_taken_for_another() {
    let (client, server) = against(AT_ONCE, |mut stream| {
        let asked = message::receive(&stream, 4096, SOON, &mut Vec::new()).unwrap().unwrap().header;
        thread::sleep(AT_ONCE * 3);
        let reply = header(asked.id.get(), Command::DEVICE_RESET, MessageFlags::REPLY, 0);
        let _late = message::send(&stream, &reply, &[], &[]);
        // Nothing comes behind it but the end.
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest.len()
    });
    assert!(matches!(client.reset(), Err(ClientError::Late(_))));
    assert!(matches!(client.reset(), Err(ClientError::Over(_))));
    thread::sleep(AT_ONCE * 4);
    client.serve().unwrap();
    assert!(!client.is_open());
    assert_eq!(server.join().unwrap(), 0);
}

#[test]
fn server_that_does_not_close_its_end_is_not_fenced() {
    let (client, server) = against(AT_ONCE, |stream| {
        thread::sleep(AT_ONCE * 6);
        drop(stream);
    });
    assert!(!client.close("enough"));
    server.join().unwrap();
    // It has now.
    assert!(client.close("enough"));
}

#[test]
fn reply_to_nothing_and_descriptors_with_a_command_are_refused() {
    let (client, server) = against(SOON, |stream| {
        let file = File::open("/dev/null").unwrap();
        let read = header(9, Command::DMA_READ, MessageFlags::empty(), 16);
        message::send(&stream, &read, &[0; 16], &[file.as_fd()]).unwrap();
        let answer = message::receive(&stream, 4096, SOON, &mut Vec::new()).unwrap().unwrap().header;
        assert_eq!((answer.id.get(), answer.error.get()), (9, 22));
        let reply = header(1, Command::DEVICE_RESET, MessageFlags::REPLY, 0);
        message::send(&stream, &reply, &[], &[]).unwrap();
        stream
    });
    let begin = Instant::now();
    let error = loop {
        if let Err(error) = client.serve() {
            break error;
        }
        assert!(begin.elapsed() < SOON);
        thread::sleep(Duration::from_millis(1));
    };
    assert!(matches!(error, ClientError::Broken(_)), "{error}");
    drop(server.join().unwrap());
    client.serve().unwrap();
}
