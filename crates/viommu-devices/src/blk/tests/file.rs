//! Over real files.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::super::OpenError;
use super::*;

struct Image {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn image(bytes: &[u8]) -> Image {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    fs::write(&path, bytes).unwrap();
    Image { _folder: folder, path }
}

fn rig(image: &Image) -> Rig {
    let mut rig = Rig::new();
    rig.blk = Blk::open(&image.path, &BlkOptions::default()).unwrap();
    rig
}

#[test]
fn file_when_it_is_written_has_the_bytes() {
    let image = image(&[7; 8192]);
    let mut rig = rig(&image);
    assert_eq!(rig.blk.size(), 8192);
    assert_eq!(rig.status(kind::OUT, 2, &[1; 1024], 0), OK);
    assert_eq!(rig.status(kind::FLUSH, 0, &[], 0), OK);
    assert_eq!(rig.ask(kind::IN, 1, &[], 1024).0, [[7; 512], [1; 512]].concat());
    drop(rig);
    let bytes = fs::read(&image.path).unwrap();
    assert_eq!(bytes, [vec![7; 1024], vec![1; 1024], vec![7; 6144]].concat());
}

#[test]
fn zeroes_and_holes_read_as_zeroes_and_the_size_stays() {
    let image = image(&vec![7; 1 << 20]);
    let mut rig = rig(&image);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(3, 100, 0), 0), OK);
    assert_eq!(rig.status(kind::WRITE_ZEROES, 0, &segment(200, 100, 1), 0), OK);
    assert_eq!(rig.status(kind::DISCARD, 0, &segment(1024, 1024, 0), 0), OK);
    let bytes = fs::read(&image.path).unwrap();
    assert_eq!(bytes.len(), 1 << 20);
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        let zero = (3..103).contains(&sector) || (200..300).contains(&sector);
        // What was discarded may read as anything; as zeroes where the file system can make holes.
        if sector < 1024 {
            assert_eq!(bytes, [if zero { 0 } else { 7 }; 512], "sector {sector}");
        }
    }
    assert!(image.path.metadata().unwrap().blocks() <= 2048 + 16);
}

#[test]
fn file_when_it_is_served_already_is_refused() {
    let image = image(&[0; 512]);
    let (writable, read_only) =
        (BlkOptions::default(), BlkOptions { read_only: true, ..BlkOptions::default() });
    let first = Blk::open(&image.path, &writable).unwrap();
    for options in [&writable, &read_only] {
        let error = Blk::open(&image.path, options).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }));
        assert!(error.to_string().contains("disk.img: in use"));
    }
    drop(first);
    let _readers = [Blk::open(&image.path, &read_only).unwrap(), Blk::open(&image.path, &read_only).unwrap()];
    assert!(matches!(Blk::open(&image.path, &writable), Err(OpenError::InUse { .. })));
}

#[test]
fn file_when_it_is_no_disk_is_refused() {
    let options = BlkOptions::default();
    let refused = |path: &std::path::Path| Blk::open(path, &options).unwrap_err();
    assert!(matches!(refused(&image(&[0; 513]).path), OpenError::Size { bytes: 513, .. }));
    assert!(refused(&image(&[0; 1000]).path).to_string().contains("1000 bytes; a disk has"));
    assert!(matches!(refused(&image(&[]).path), OpenError::Size { bytes: 0, .. }));
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(refused(folder.path()), OpenError::Kind { .. }));
    assert!(matches!(refused("/dev/null".as_ref()), OpenError::Kind { .. }));
    assert!(matches!(refused(&folder.path().join("none")), OpenError::Io { .. }));
    // Nobody has it open for writing, so opening must not wait for that.
    let pipe = folder.path().join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    assert!(matches!(refused(&pipe), OpenError::Kind { .. }));
}

#[test]
fn file_when_it_was_cut_short_fails_and_gives_no_bytes() {
    let image = image(&[7; 4096]);
    let mut rig = rig(&image);
    File::options().write(true).open(&image.path).unwrap().set_len(1024).unwrap();
    assert_eq!(rig.ask(kind::IN, 1, &[], 1024), (vec![UNTOUCHED; 1024], IOERR, 0));
    assert_eq!(rig.status(kind::IN, 1, &[], 512), OK);
}

#[test]
fn queues_when_processed_by_several_threads_share_the_disk() {
    let image = image(&vec![0; 64 * 512]);
    let blk = Blk::open(&image.path, &BlkOptions { queues: 4, ..BlkOptions::default() }).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u8 {
            let blk = &blk;
            scope.spawn(move || {
                let mut driver = Driver::new(1 << 20, 16);
                for n in 0..16 {
                    let sector = u64::from(thread) * 16 + n;
                    driver.request(&request(kind::OUT, sector, &[thread + 1; 512]), 1, &[], false);
                    while blk.process(blk.features(), &mut driver.queue, &driver.space).unwrap().more {}
                }
                driver.request(&request(kind::FLUSH, 0, &[]), 1, &[], false);
                blk.process(blk.features(), &mut driver.queue, &driver.space).unwrap();
            });
        }
    });
    let metrics = blk.metrics();
    assert_eq!((metrics.writes.ok, metrics.flushes.ok, metrics.syncs), (64, 4, 4));
    let bytes = fs::read(&image.path).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / (16 * 512) + 1));
}
