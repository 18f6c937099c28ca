//! Recognition, prefixes, compression, and inputs that are cut off or damaged.

mod common;

use std::io::Cursor;

use common::{corpus, drain, good, kinds, read};
use viommu_trace::{Event, Format, History, Place, ReadError, Writer, convert};

fn bytes(name: &str) -> Vec<u8> {
    std::fs::read(corpus(name)).unwrap()
}

fn own(name: &str) -> Vec<u8> {
    let mut history = History::open(corpus(name)).unwrap();
    let mut writer = Writer::new(Vec::new()).unwrap();
    convert(&mut history, &mut writer).unwrap();
    writer.finish().unwrap()
}

#[test]
fn a_qemu_log_is_the_same_with_every_prefix() {
    let iso = good("qemu-iso.log");
    let pid = good("qemu-pid.log");
    let plain = good("qemu-plain.log");
    assert_eq!(iso, pid);
    assert_eq!(iso.len(), plain.len());
    for (a, b) in iso.iter().zip(&plain) {
        assert_eq!((a.line, a.event), (b.line, b.event));
        assert!(a.time.is_some() && b.time.is_none());
    }
    // What `grep -c` finds in the file.
    let text = String::from_utf8(bytes("qemu-iso.log")).unwrap();
    let found = kinds(&iso);
    for (kind, name) in [
        ("Attach", "attach"),
        ("Map", "map"),
        ("Unmap", "unmap"),
        ("Unmapped", "unmap_done"),
        ("Access", "translate"),
        ("Translated", "translate_out"),
        ("ReservedRegion", "fill_resv_property"),
        ("SwitchAddressSpace", "switch_address_space"),
    ] {
        let count = text.matches(&format!(" virtio_iommu_{name} ")).count();
        assert!(count > 0, "{name}");
        assert_eq!(found.get(kind), Some(&count), "{name}");
    }
}

#[test]
fn lines_formats_and_passed_over_lines_are_told() {
    let mut history = History::open(corpus("qemu-iso.log")).unwrap();
    assert_eq!(history.format(), Format::QemuLog);
    drain(&mut history);
    let size = std::fs::metadata(corpus("qemu-iso.log")).unwrap().len();
    assert_eq!(history.lines(), 161);
    assert_eq!((history.bytes_read(), history.total_bytes()), (size, Some(size)));
    assert_eq!(history.passed_over().chatter(), 1);
    assert!(history.passed_over().names().iter().any(|(name, _)| name == "virtio_iommu_freeze_granule"));
    assert_eq!(History::open(corpus("linux-bare.trace")).unwrap().format(), Format::LinuxTrace);
    let file = History::from_reader(Cursor::new(own("qemu-iso.log")), "own").unwrap();
    assert_eq!(file.format(), Format::Viommu);
}

#[cfg(feature = "compression")]
#[test]
fn compressed_files_of_several_streams_read_as_the_plain_one() {
    let plain = good("qemu-iso.log");
    for name in ["qemu-two-streams.log.xz", "qemu-two-frames.log.zst", "qemu-two-members.log.gz"] {
        assert_eq!(good(name), plain, "{name}");
    }
}

#[cfg(feature = "compression")]
#[test]
fn cut_compressed_files_give_what_comes_before_and_one_error() {
    let plain = good("qemu-iso.log");
    for name in ["qemu-two-streams.log.xz", "qemu-two-frames.log.zst", "qemu-two-members.log.gz"] {
        let whole = bytes(name);
        let first = plain.iter().filter(|entry| entry.line <= 75).count();
        let mut most = 0;
        for len in 7..whole.len() {
            let (entries, error) = read(whole[..len].to_vec());
            assert_eq!(entries, plain[..entries.len()], "{name} cut at {len}");
            most = most.max(entries.len());
            // At the border of two streams the file is whole, but the log's line there may be too.
            if error.is_none() {
                assert_eq!(entries.last().map(|e| e.line <= 75), Some(true), "{name} cut at {len}");
            }
        }
        assert!(most >= first, "{name}: {most}");
    }
}

#[cfg(feature = "compression")]
#[test]
fn damaged_compressed_files_never_pass() {
    let plain = good("qemu-iso.log");
    for name in ["qemu-two-streams.log.xz", "qemu-two-frames.log.zst", "qemu-two-members.log.gz"] {
        let whole = bytes(name);
        for at in (40..whole.len() - 40).step_by(7) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            let (entries, error) = read(damaged);
            assert!(error.is_some() || entries == plain, "{name} damaged at {at}");
        }
    }
}

#[test]
fn every_cut_of_an_own_file_is_found_and_what_comes_before_is_told() {
    let whole = own("qemu-iso.log");
    let plain = good("qemu-iso.log");
    assert_eq!(read(whole.clone()).0, plain);
    for len in 1..whole.len() {
        let (entries, error) = read(whole[..len].to_vec());
        assert!(error.is_some(), "cut at {len}");
        assert_eq!(entries, plain[..entries.len()]);
    }
    // A file that was never finished has its whole blocks.
    let mut writer = Writer::new(Vec::new()).unwrap();
    for entry in &plain {
        writer.write(entry).unwrap();
    }
    writer.flush().unwrap();
    let end_block = 9 + 2;
    let (entries, error) = read(whole[..whole.len() - end_block].to_vec());
    assert_eq!(entries, plain);
    let place = (whole.len() - end_block) as u64;
    assert!(matches!(error, Some(ReadError::Corrupt { place: Place::Byte(at), .. }) if at == place));
}

#[test]
fn every_damaged_byte_of_an_own_file_is_found() {
    let whole = own("qemu-iso.log");
    let plain = good("qemu-iso.log");
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x04;
        let (entries, error) = read(damaged);
        // A newer minor version is read.
        assert!(error.is_some() || at == 8, "damaged at {at}");
        assert_eq!(entries, plain[..entries.len()], "damaged at {at}");
    }
}

#[test]
fn a_cut_log_is_an_error_at_its_last_line() {
    let text = bytes("qemu-plain.log");
    let plain = good("qemu-plain.log");
    for len in (1000..1200).filter(|len| text[len - 1] != b'\n') {
        let cut = text[..len].to_vec();
        let lines = cut.iter().filter(|b| **b == b'\n').count() as u64;
        let (entries, error) = read(cut);
        assert_eq!(entries, plain[..entries.len()]);
        assert!(
            matches!(error, Some(ReadError::Corrupt { place: Place::Line(at), .. }) if at == lines + 1),
            "cut at {len}: {error:?}"
        );
    }
}

#[test]
fn a_malformed_line_names_file_line_and_event_and_ends_the_history() {
    let text = "virtio_iommu_attach domain=1 endpoint=8\nvirtio_iommu_map domain=1\nvirtio_iommu_detach domain=1 endpoint=8\n";
    let mut history = History::from_reader(text.as_bytes(), "some.log").unwrap();
    assert!(matches!(history.next(), Ok(Some(_))));
    let error = history.next().unwrap_err().to_string();
    assert_eq!(error, "some.log: line 2: virtio_iommu_map: `virt_start=0x` is missing");
    assert!(matches!(history.next(), Ok(None)));
}

#[test]
fn what_is_no_history_is_refused() {
    for empty in ["", "\n", " \n\n"] {
        assert!(matches!(read(empty.into()).1, Some(ReadError::Empty { .. })), "{empty:?}");
    }
    for other in ["hello\n", "some text\nof several lines\n", "\u{0}\u{1}\u{2}", "viomm", "{\"a\": 1}\n"] {
        assert!(matches!(read(other.into()).1, Some(ReadError::Unrecognised { .. })), "{other:?}");
    }
    assert!(matches!(read(vec![b'x'; 4 << 20]).1, Some(ReadError::Unrecognised { .. })));
    assert!(matches!(read(b"viommu\0\x02\x00\x00".to_vec()).1, Some(ReadError::Version { major: 2, .. })));
    assert!(matches!(read(b"viommu\0\x01".to_vec()).1, Some(ReadError::Corrupt { .. })));
    let missing = History::open(corpus("no-such-file")).unwrap_err();
    assert!(missing.to_string().contains("no-such-file"), "{missing}");
    assert!(matches!(missing, ReadError::Io { .. }));
}

#[test]
fn an_endless_line_ends_the_history_without_filling_memory() {
    let mut history = History::from_reader(
        std::io::Read::chain(&b"virtio_iommu_x\n"[..], std::io::repeat(b'x')),
        "endless",
    )
    .unwrap();
    let error = history.next().unwrap_err();
    assert!(matches!(error, ReadError::Corrupt { place: Place::Line(2), .. }), "{error}");
}

#[test]
fn a_long_log_behind_much_chatter_is_recognised() {
    let mut text = "qemu-system-x86_64: warning\n".repeat(3000);
    text.push_str("virtio_iommu_system_reset system reset!\n");
    let (entries, error) = read(text.into_bytes());
    assert!(error.is_none());
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].line, 3001);
    assert!(matches!(entries[0].event, Event::Reset(_)));
}
