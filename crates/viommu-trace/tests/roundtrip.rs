//! What is written is read, whatever it is.

#[expect(dead_code, reason = "not every test uses all of it")]
mod common;

use std::io::Cursor;

use common::{drain, good, read};
use proptest::prelude::*;
use viommu::addr::{Gpa, Iova, IovaRange};
use viommu::mapping::{Access, Target};
use viommu_trace::{Entry, Event, History, Label, Recorder, Region, Reserved, Reset, Writer};

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..0x10_0000u64,
        Just(u64::MAX),
        Just(0),
        (0..0x1_0000u64).prop_map(|page| 0xffff_0000 - page * 4096),
    ]
}

fn small() -> impl Strategy<Value = u32> {
    prop_oneof![any::<u32>(), 0..300u32]
}

fn range() -> impl Strategy<Value = IovaRange> {
    prop_oneof![
        (number(), number()).prop_map(|(a, b)| IovaRange::new(Iova(a.min(b)), Iova(a.max(b))).unwrap()),
        (0..u64::MAX - 0xfff).prop_map(|a| IovaRange::new(Iova(a), Iova(a + 0xfff)).unwrap()),
    ]
}

fn access() -> impl Strategy<Value = Access> {
    (0..4u8).prop_map(|bits| Access::from_bits(bits).unwrap())
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![Just(Target::Ram), Just(Target::Mmio)]
}

fn region() -> impl Strategy<Value = Region> {
    (small(), any::<u8>(), any::<Option<u16>>()).prop_map(|(index, devfn, rid)| Region { index, devfn, rid })
}

fn event() -> impl Strategy<Value = Event> {
    let gpa = || number().prop_map(Gpa);
    let iova = || number().prop_map(Iova);
    prop_oneof![
        prop_oneof![Just(Event::Reset(Reset::Device)), Just(Event::Reset(Reset::System))],
        (small(), small(), any::<bool>()).prop_map(|(domain, endpoint, bypass)| Event::Attach {
            domain,
            endpoint,
            bypass
        }),
        (small(), small()).prop_map(|(domain, endpoint)| Event::Detach { domain, endpoint }),
        (small(), small()).prop_map(|(domain, endpoint)| Event::Detached { domain, endpoint }),
        (small(), range(), gpa(), access(), target()).prop_map(|(domain, range, gpa, access, target)| {
            Event::Map { domain, range, gpa, access, target }
        }),
        (small(), range()).prop_map(|(domain, range)| Event::Unmap { domain, range }),
        (small(), range()).prop_map(|(domain, range)| Event::Unmapped { domain, range }),
        (small(), iova(), access()).prop_map(|(endpoint, iova, access)| Event::Access {
            endpoint,
            iova,
            access
        }),
        (small(), iova(), gpa()).prop_map(|(endpoint, iova, gpa)| Event::Translated { endpoint, iova, gpa }),
        (region(), range(), gpa(), access(), target()).prop_map(|(region, range, gpa, access, target)| {
            Event::NotifyMap { region, range, gpa, access, target }
        }),
        (region(), range()).prop_map(|(region, range)| Event::NotifyUnmap { region, range }),
        (region(), range(), gpa()).prop_map(|(region, range, gpa)| Event::Remap { region, range, gpa }),
        (any::<u8>(), any::<u8>(), any::<bool>())
            .prop_map(|(bus, devfn, enabled)| Event::SwitchAddressSpace { bus, devfn, enabled }),
        (small(), small(), small(), iova()).prop_map(|(reason, flags, endpoint, address)| Event::Fault {
            reason,
            flags,
            endpoint,
            address
        }),
        any::<bool>().prop_map(|on| Event::Bypass { on }),
        (number(), range(), any::<bool>()).prop_map(|(page_sizes, input, bypass)| Event::Config {
            page_sizes,
            input,
            bypass
        }),
        (small(), any::<bool>(), range()).prop_map(|(endpoint, msi, range)| Event::ReservedRegion {
            endpoint,
            kind: if msi { Reserved::Msi } else { Reserved::Reserved },
            range
        }),
        region().prop_map(|region| Event::RegionAdded { region }),
        small().prop_map(|domain| Event::DomainAdded { domain }),
        small().prop_map(|domain| Event::DomainRemoved { domain }),
        small().prop_map(|endpoint| Event::EndpointAdded { endpoint }),
        small().prop_map(|endpoint| Event::EndpointRemoved { endpoint }),
        ".{0,40}".prop_map(|text| Event::Mark(Label::new(&text))),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    let time = prop_oneof![
        Just(None),
        number().prop_map(Some),
        (0..1000u64).prop_map(|us| Some(1_795_329_439_882_540_000 + us * 1000)),
    ];
    (prop_oneof![1..100u64, number()], time, event()).prop_map(|(line, time, event)| Entry {
        line,
        time,
        event,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn entries_survive_writing_and_reading(entries in prop::collection::vec(entry(), 0..200)) {
        let mut with = Writer::new(Vec::new()).unwrap();
        let mut without = Writer::without_lines(Vec::new()).unwrap();
        for entry in &entries {
            with.write(entry).unwrap();
            without.write(entry).unwrap();
        }
        let (read_with, error) = read(with.finish().unwrap());
        prop_assert!(error.is_none(), "{:?}", error);
        prop_assert_eq!(&read_with, &entries);
        let (read_without, error) = read(without.finish().unwrap());
        prop_assert!(error.is_none(), "{:?}", error);
        for (n, (got, put)) in read_without.iter().zip(&entries).enumerate() {
            prop_assert_eq!(got.line, n as u64 + 1);
            prop_assert_eq!((got.time, got.event), (put.time, put.event));
        }
        prop_assert_eq!(read_without.len(), entries.len());
    }
}

#[test]
fn many_blocks_survive_writing_and_reading() {
    let log = good("qemu-iso.log");
    let many: Vec<Entry> = log.iter().copied().cycle().take(50_000).collect();
    let mut writer = Writer::new(Vec::new()).unwrap();
    for entry in &many {
        writer.write(entry).unwrap();
    }
    assert_eq!(writer.records(), 50_000);
    let file = writer.finish().unwrap();
    assert!(file.len() > 4 * 16 * 1024 && file.len() < 16 * 50_000, "{}", file.len());
    let (entries, error) = read(file);
    assert!(error.is_none() && entries == many, "{error:?}");
}

/// A block as the format's page has it.
fn block(kind: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
    let crc = crc32fast::hash(&[&[kind], &length[..], payload].concat());
    [&[kind], &length[..], &crc.to_le_bytes(), payload].concat()
}

#[test]
fn blocks_and_records_of_a_newer_minor_version_are_passed_over_and_counted() {
    // Detach of domain 1 and endpoint 8, something new of three bytes, the same detach again on the next line.
    let records = [2, 1, 8, 24, 3, 0xaa, 0xbb, 0xcc, 2, 0, 0];
    let file =
        [b"viommu\0\x01\x09\x01".to_vec(), block(7, b"new"), block(1, &records), block(0xff, &[3])].concat();
    let mut history = History::from_reader(Cursor::new(file), "newer").unwrap();
    let (entries, error) = drain(&mut history);
    assert!(error.is_none(), "{error:?}");
    let event = Event::Detach { domain: 1, endpoint: 8 };
    assert_eq!(entries, [Entry { line: 1, time: None, event }, Entry { line: 2, time: None, event }]);
    assert_eq!(
        history.passed_over().names(),
        [("block kind 7".to_owned(), 1), ("record kind 24".to_owned(), 1)]
    );
}

#[test]
fn a_recorder_takes_events_from_many_threads() {
    let recorder = Recorder::new(Vec::new()).unwrap();
    std::thread::scope(|scope| {
        for endpoint in 0..4 {
            let recorder = &recorder;
            scope.spawn(move || {
                for domain in 0..1000 {
                    recorder.record(Event::Detach { domain, endpoint });
                }
            });
        }
    });
    let (entries, error) = read(recorder.finish().unwrap());
    assert!(error.is_none());
    assert_eq!(entries.len(), 4000);
    assert!(entries.is_sorted_by_key(|entry| entry.time.unwrap()));
    let mut seen = [0; 4];
    for entry in entries {
        let Event::Detach { domain, endpoint } = entry.event else { panic!("{entry:?}") };
        let next = &mut seen[endpoint as usize];
        assert_eq!(domain, *next);
        *next += 1;
    }
}
