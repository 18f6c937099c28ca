use super::*;
use std::fs::File;
use std::io::Write;

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

#[test]
fn messages_when_sent_come_whole_and_with_their_own_descriptors() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut sender, mut receiver) = (Sender::default(), Receiver::default());
    assert!(receiver.next(&ours).unwrap().is_none());
    for (request, fds) in [(1, 0), (2, 3), (3, 0), (4, MAX_FDS)] {
        let mut message = Message::new(request, flag::NEED_REPLY, &[7; 40]);
        message.fds = (0..fds).map(|_| null()).collect();
        sender.send(&theirs, message).unwrap();
    }
    for (request, fds) in [(1, 0), (2, 3), (3, 0), (4, MAX_FDS)] {
        let message = receiver.next(&ours).unwrap().unwrap();
        assert_eq!((message.request, message.fds.len(), &message.payload[..]), (request, fds, &[7; 40][..]));
        assert!(message.wants_answer());
    }
    drop(theirs);
    assert!(matches!(receiver.next(&ours), Err(WireError::Gone)));
}

#[test]
fn message_when_it_comes_byte_by_byte_is_one_message() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let mut receiver = Receiver::default();
    let header = Header { request: 9.into(), flags: 1.into(), size: 2.into() };
    let bytes = [header.as_bytes(), &[5, 6]].concat();
    for byte in &bytes {
        assert!(receiver.next(&ours).unwrap().is_none());
        theirs.write_all(&[*byte]).unwrap();
    }
    assert_eq!(receiver.next(&ours).unwrap().unwrap().payload, [5, 6]);
    assert!(receiver.next(&ours).unwrap().is_none());
}

#[test]
fn message_when_its_version_or_size_cannot_be_is_refused() {
    for (flags, size) in [(0, 0), (2, 0), (1, u32::try_from(MAX_PAYLOAD).unwrap() + 1), (1, u32::MAX)] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let header = Header { request: 9.into(), flags: flags.into(), size: size.into() };
        theirs.write_all(header.as_bytes()).unwrap();
        let error = Receiver::default().next(&ours).unwrap_err();
        assert!(matches!(error, WireError::Flags(_) | WireError::Size(_)), "{error}");
    }
}

#[test]
fn peer_that_does_not_read_is_told_of_and_nothing_is_lost_before() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (mut sender, mut sent) = (Sender::default(), 0_u32);
    let error = loop {
        match sender.send(&theirs, Message::new(sent, 0, &[1; 4000])) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, WireError::Stalled), "{error}");
    assert!(sent > 200 && !sender.is_empty());
    let mut receiver = Receiver::default();
    for expected in 0..=sent {
        let message = loop {
            match receiver.next(&ours).unwrap() {
                Some(message) => break message,
                None => sender.flush(&theirs).unwrap(),
            }
        };
        assert_eq!(message.request, expected);
    }
    assert!(sender.is_empty() && sender.bytes == 0);
}

#[test]
fn descriptors_for_a_peer_that_does_not_read_are_capped() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut sender = Sender::default();
    let outcome = (0..2000).try_for_each(|_| {
        let mut message = Message::new(1, 0, &[]);
        message.fds.push(null());
        sender.send(&ours, message)
    });
    assert!(matches!(outcome, Err(WireError::Stalled)), "{outcome:?}");
}
