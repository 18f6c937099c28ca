//! What each kind of request does, and what comes in which order.

use std::io;

use super::super::recording::Op;
use super::super::{DISCARD_SECTORS, DISCARD_SEGMENTS, ZEROES_SECTORS};
use super::*;

#[test]
fn write_then_read_when_well_formed_gives_the_same_bytes() {
    let mut rig = Rig::new();
    let data: Vec<u8> = (0..1024_u32).map(|n| n.to_le_bytes()[0] ^ 0x5a).collect();
    assert_eq!(rig.ask(kind::OUT, 3, &data, 0), (vec![], OK, 1));
    assert_eq!(&rig.disk.bytes()[3 * 512..5 * 512], data);
    assert_eq!(rig.ask(kind::IN, 3, &[], 1024), (data, OK, 1025));
    let metrics = rig.blk.metrics();
    assert_eq!((metrics.reads.ok, metrics.bytes_read), (1, 1024));
    assert_eq!((metrics.writes.ok, metrics.bytes_written), (1, 1024));
}

#[test]
fn request_when_at_the_end_of_the_disk_fits_and_behind_it_fails() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(kind::IN, 63, &[], 512), OK);
    assert_eq!(rig.status(kind::IN, 64, &[], 0), OK);
    assert_eq!(rig.status(kind::IN, 63, &[], 1024), IOERR);
    assert_eq!(rig.status(kind::OUT, 63, &[0; 1024], 0), IOERR);
    assert_eq!(rig.status(kind::IN, 65, &[], 0), IOERR);
    for sector in [u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
        assert_eq!(rig.ask(kind::IN, sector, &[], 512), (vec![UNTOUCHED; 512], IOERR, 0));
        assert_eq!(rig.ask(kind::OUT, sector, &[1; 512], 0), (vec![], IOERR, 1));
    }
    assert_eq!(rig.disk.bytes(), [0; 64 * 512]);
}

#[test]
fn request_when_its_data_are_no_whole_sectors_fails() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(kind::IN, 0, &[], 511), IOERR);
    assert_eq!(rig.status(kind::OUT, 0, &[1; 513], 0), IOERR);
    assert!(rig.disk.log().is_empty());
}

#[test]
fn request_when_data_go_the_wrong_way_fails() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(kind::IN, 0, &[1; 512], 512), IOERR);
    assert_eq!(rig.status(kind::IN, 0, &[1; 512], 0), IOERR);
    assert_eq!(rig.status(kind::OUT, 0, &[1; 512], 512), IOERR);
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(0, 1, 0), 16), IOERR);
    assert!(rig.disk.log().is_empty());
}

#[test]
fn request_when_unknown_is_unsupported() {
    let mut rig = Rig::new();
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 15, 0x8000_0000, u32::MAX] {
        assert_eq!(rig.ask(kind, 0, &[], 0), (vec![], UNSUPP, 1));
    }
    assert_eq!(rig.blk.metrics().others.unsupp, 11);
}

#[test]
fn get_id_gives_the_id_padded_with_zeroes() {
    let options = BlkOptions { id: "disk one".to_owned(), ..BlkOptions::default() };
    let mut rig = Rig::with(512, 1 << 16, &options);
    let (data, status, used) = rig.ask(kind::GET_ID, 0, &[], 20);
    assert_eq!((&data[..], status, used), (&b"disk one\0\0\0\0\0\0\0\0\0\0\0\0"[..], OK, 21));
    assert_eq!(rig.status(kind::GET_ID, 0, &[], 19), IOERR);
    let (data, status, used) = rig.ask(kind::GET_ID, 0, &[], 21);
    assert_eq!((data[20], status, used), (UNTOUCHED, OK, 20));
}

#[test]
fn write_when_the_disk_is_read_only_fails_and_read_works() {
    let options = BlkOptions { read_only: true, ..BlkOptions::default() };
    let mut rig = Rig::with(4096, 1 << 16, &options);
    // The driver may claim what was not offered.
    rig.features = u64::MAX;
    assert_eq!(rig.status(kind::OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(0, 1, 0), 0), IOERR);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(0, 1, 0), 0), IOERR);
    assert_eq!(rig.ask(kind::IN, 0, &[], 512), (vec![0; 512], OK, 513));
    assert_eq!(rig.status(kind::FLUSH, 0, &[], 0), OK);
    assert_eq!(rig.blk.features() & feature::RO, feature::RO);
    assert_eq!(rig.blk.features() & (feature::DISCARD | feature::WRITE_ZEROES), 0);
}

#[test]
fn flush_when_it_is_answered_has_made_safe_what_was_written_before() {
    let mut rig = Rig::new();
    rig.offer(kind::OUT, 0, &[1; 512], 0);
    rig.offer(kind::OUT, 1, &[2; 512], 0);
    rig.offer(kind::FLUSH, 0, &[], 0);
    rig.offer(kind::OUT, 0, &[3; 512], 0);
    // The writes do not wait for the flush.
    assert_eq!(rig.process().unwrap().requests, 2);
    assert_eq!(rig.driver.used().len(), 2);
    assert_eq!(rig.disk.safe(), [0; 64 * 512]);
    // The flush is alone; it is safe before it is answered.
    let processed = rig.process().unwrap();
    assert_eq!((processed.requests, processed.more), (1, true));
    assert_eq!(&rig.disk.safe()[..1024], [[1; 512], [2; 512]].concat());
    assert_eq!(rig.run().len(), 2);
    assert_eq!(rig.disk.log(), [Op::Write(0, 512), Op::Write(512, 512), Op::Sync, Op::Write(0, 512)]);
    assert_eq!(rig.disk.safe()[0], 1);
    assert_eq!(rig.disk.bytes()[0], 3);
}

#[test]
fn write_when_flush_is_not_negotiated_is_safe_before_it_is_answered() {
    let mut rig = Rig::new();
    rig.features &= !feature::FLUSH;
    rig.offer(kind::OUT, 0, &[1; 512], 0);
    rig.offer(kind::OUT, 1, &[2; 512], 0);
    rig.run();
    // Once for both.
    assert_eq!(rig.disk.log(), [Op::Write(0, 512), Op::Write(512, 512), Op::Sync]);
    assert_eq!(rig.disk.safe(), rig.disk.bytes());
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(0, 1, 0), 0), OK);
    assert_eq!(rig.disk.log(), [Op::Punch(0, 512), Op::Sync]);
    // What changes nothing needs no sync.
    assert_eq!(rig.status(kind::IN, 0, &[], 512), OK);
    assert_eq!(rig.disk.log(), [Op::Read(0, 512)]);
}

#[test]
fn write_when_flush_is_not_negotiated_and_the_sync_fails_is_an_error() {
    let mut rig = Rig::new();
    rig.features &= !feature::FLUSH;
    rig.disk.judge(|op| if op == Op::Sync { Err(io::Error::other("gone")) } else { Ok(()) });
    let write = rig.offer(kind::OUT, 0, &[1; 512], 0);
    let read = rig.offer(kind::IN, 0, &[], 512);
    rig.run();
    assert_eq!(rig.driver.answer(&write), [IOERR]);
    assert_eq!(rig.driver.answer(&read), [&[1; 512][..], &[OK]].concat());
}

#[test]
fn flush_when_one_has_failed_fails_for_ever() {
    let mut rig = Rig::new();
    assert_eq!(rig.status(kind::OUT, 0, &[1; 512], 0), OK);
    rig.disk.judge(|op| if op == Op::Sync { Err(io::Error::other("lost")) } else { Ok(()) });
    assert_eq!(rig.status(kind::FLUSH, 0, &[], 0), IOERR);
    rig.disk.judge(|_| Ok(()));
    assert_eq!(rig.status(kind::FLUSH, 0, &[], 0), IOERR);
    assert!(rig.blk.flush().is_err());
    assert_eq!(rig.status(kind::IN, 0, &[], 512), OK);
    assert_eq!(rig.blk.metrics().last_error.as_deref(), Some("lost"));
    assert_eq!(rig.blk.metrics().flushes.ioerr, 2);
}

#[test]
fn request_when_the_disk_fails_is_an_error_and_gives_no_bytes() {
    let mut rig = Rig::new();
    rig.disk.judge(|_| Err(io::ErrorKind::StorageFull.into()));
    assert_eq!(rig.ask(kind::IN, 0, &[], 512), (vec![UNTOUCHED; 512], IOERR, 0));
    assert_eq!(rig.ask(kind::OUT, 0, &[1; 512], 0), (vec![], IOERR, 1));
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(0, 1, 0), 0), IOERR);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(0, 1, 1), 0), IOERR);
    assert_eq!(rig.blk.metrics().errors, 4);
    assert!(rig.blk.metrics().last_error.is_some());
}

#[test]
fn discard_when_the_file_system_cannot_is_no_error() {
    let mut rig = Rig::new();
    rig.disk.judge(|_| Err(io::ErrorKind::Unsupported.into()));
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(0, 1, 0), 0), OK);
    assert_eq!(rig.blk.metrics().errors, 0);
}

#[test]
fn write_zeroes_makes_a_hole_only_where_it_may() {
    let mut rig = Rig::new();
    rig.disk.fill(|_| 9);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(1, 2, 0), 0), OK);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(4, 2, 1), 0), OK);
    assert_eq!(rig.disk.log(), [Op::Zero(512, 1024), Op::Punch(2048, 1024)]);
    let zeroes: Vec<usize> = (0..64).filter(|sector| rig.disk.bytes()[sector * 512] == 0).collect();
    assert_eq!(zeroes, [1, 2, 4, 5]);
}

#[test]
fn write_zeroes_when_the_file_system_cannot_writes_them_in_pieces() {
    let mut rig = Rig::with(300 << 10, 1 << 16, &BlkOptions::default());
    rig.disk.fill(|_| 9);
    rig.disk.judge(|op| match op {
        Op::Punch(..) | Op::Zero(..) => Err(io::ErrorKind::Unsupported.into()),
        _ => Ok(()),
    });
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(1, 300, 1), 0), OK);
    let (begin, piece, end) = (512, 64 << 10, 301 * 512);
    assert_eq!(
        rig.disk.log(),
        [
            Op::Punch(begin, 300 * 512),
            Op::Zero(begin, 300 * 512),
            Op::Write(begin, piece),
            Op::Write(begin + piece, piece),
            Op::Write(begin + 2 * piece, end - begin - 2 * piece),
        ]
    );
    let bytes = rig.disk.bytes();
    assert!(bytes.iter().enumerate().all(|(at, byte)| (*byte == 0) == (512..301 * 512).contains(&at)));
}

#[test]
fn segments_when_one_is_wrong_do_nothing_at_all() {
    let mut rig = Rig::with(8 << 20, 1 << 16, &BlkOptions::default());
    let good = segment(0, 1, 0);
    let mut tell = |kind, second: [u8; 16]| rig.status(kind, 0, &[good, second].concat(), 0);
    assert_eq!(tell(kind::DISCARD, segment(0, 1, 1)), UNSUPP);
    assert_eq!(tell(kind::DISCARD, segment(0, 1, 2)), UNSUPP);
    assert_eq!(tell(kind::DISCARD, segment(16384, 1, 0)), IOERR);
    assert_eq!(tell(kind::DISCARD, segment(u64::MAX, 1, 0)), IOERR);
    assert_eq!(tell(kind::DISCARD, segment(0, DISCARD_SECTORS + 1, 0)), IOERR);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(0, 1, 0x8000_0000), 0), UNSUPP);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(0, ZEROES_SECTORS + 1, 0), 0), IOERR);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &[good, good].concat(), 0), IOERR);
    assert_eq!(rig.status(kind::DISCARD, 0, &[], 0), IOERR);
    assert_eq!(rig.status(kind::DISCARD, 0, &good[..15], 0), IOERR);
    let most = DISCARD_SEGMENTS as usize;
    assert_eq!(rig.status(kind::DISCARD, 0, &good.repeat(most + 1), 0), IOERR);
    assert!(rig.disk.log().is_empty());
    assert_eq!(rig.status(kind::DISCARD, 0, &good.repeat(most), 0), OK);
    assert_eq!(rig.disk.log().len(), most);
    // Nothing to do is done.
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(16384, 0, 0), 0), OK);
    assert!(rig.disk.log().is_empty());
}

#[test]
fn discard_when_it_is_not_negotiated_is_unsupported() {
    let mut rig = Rig::new();
    rig.features = feature::FLUSH;
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(0, 1, 0), 0), UNSUPP);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(0, 1, 0), 0), UNSUPP);
}

#[test]
fn request_when_longer_than_a_batch_goes_piece_by_piece() {
    let mut rig = Rig::with(4 << 20, 16 << 20, &BlkOptions::default());
    let data: Vec<u8> = (0..5_u32 << 19).map(|n| (n / 511).to_le_bytes()[0]).collect();
    rig.offer(kind::OUT, 8, &[7; 512], 0);
    let write = rig.offer(kind::OUT, 8, &data, 0);
    let read = rig.offer(kind::IN, 8, &[], data.len());
    assert_eq!(rig.process().unwrap().requests, 1);
    assert_eq!(rig.process().unwrap().requests, 1);
    assert_eq!(rig.driver.answer(&write), [OK]);
    let used = rig.run();
    assert_eq!(used.last().unwrap().1 as usize, data.len() + 1);
    assert_eq!(rig.driver.answer(&read), [&data[..], &[OK]].concat());
    let mib = 1 << 20;
    assert_eq!(
        rig.disk.log()[1..],
        [
            Op::Write(4096, mib),
            Op::Write(4096 + mib, mib),
            Op::Write(4096 + 2 * mib, mib / 2),
            Op::Read(4096, mib),
            Op::Read(4096 + mib, mib),
            Op::Read(4096 + 2 * mib, mib / 2),
        ]
    );
    assert_eq!(rig.blk.metrics().bytes_read, data.len() as u64);
}

#[test]
fn requests_when_many_are_kicked_at_once_share_two_guards() {
    let mut rig = Rig::new();
    let requests: Vec<_> = (0..32).map(|sector| rig.offer(kind::OUT, sector, &[1; 512], 0)).collect();
    let processed = rig.process().unwrap();
    assert_eq!((processed.requests, processed.interrupt, processed.more), (32, true, false));
    assert_eq!(rig.driver.space.entered(), 2);
    let heads: Vec<u32> = requests.iter().map(|request| u32::from(request.head)).collect();
    assert_eq!(rig.driver.used().iter().map(|used| used.0).collect::<Vec<_>>(), heads);
    // A kick for nothing costs one.
    assert_eq!(rig.process().unwrap().requests, 0);
    assert_eq!(rig.driver.space.entered(), 3);
}

#[test]
fn config_space_says_what_is_offered() {
    let options = BlkOptions { queues: 3, ..BlkOptions::default() };
    let rig = Rig::with(1 << 20, 1 << 16, &options);
    let config = rig.blk.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config.len(), 60);
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 2048);
    assert_eq!((word(8), word(12), word(20)), (65536, 126, 512));
    // A block of 4096 bytes.
    assert_eq!((config[24], config[25], &config[26..28], word(28)), (3, 0, &[8, 0][..], 0));
    assert_eq!(&config[34..36], [3, 0]);
    assert_eq!((word(36), word(40), word(44)), (4 << 20, 32, 8));
    assert_eq!((word(48), word(52), config[56]), (128 << 10, 1, 1));
    assert_eq!(rig.blk.features() & feature::MQ, feature::MQ);
    assert_eq!(Rig::new().blk.features() & feature::MQ, 0);
}

#[test]
fn config_space_when_the_file_system_likes_odd_blocks_says_something_usable() {
    let exponent = |block| super::super::config_of(512, block, &BlkOptions::default()).physical_block_exp;
    assert_eq!([0, 512, 1024, 4096, 1 << 20, 3000].map(exponent), [0, 0, 1, 3, 3, 0]);
}

#[test]
fn id_and_queues_when_they_make_no_sense_are_refused() {
    let refused = |options: BlkOptions| super::super::id_of(&options).unwrap_err().to_string();
    let id = |id: &str| BlkOptions { id: id.to_owned(), ..BlkOptions::default() };
    assert!(refused(id("twenty-one characters")).contains("20 bytes"));
    assert!(refused(id("a\nb")).contains("printable"));
    assert!(refused(BlkOptions { queues: 0, ..BlkOptions::default() }).contains("at least one queue"));
    assert_eq!(super::super::id_of(&id("exactly twenty chars")).unwrap(), *b"exactly twenty chars");
}
