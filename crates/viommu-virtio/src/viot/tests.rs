use proptest::prelude::*;
use proptest::sample::Index;

use super::*;

/// One virtio-pci IOMMU at 0000:00:01.0 with all of bus 0 behind it.
const EXAMPLE: [u8; 88] = [
    0x56, 0x49, 0x4f, 0x54, 0x58, 0x00, 0x00, 0x00, 0x00, 0x3a, 0x56, 0x49, 0x4f, 0x4d, 0x4d, 0x55, //
    0x56, 0x49, 0x4f, 0x4d, 0x56, 0x49, 0x4f, 0x54, 0x01, 0x00, 0x00, 0x00, 0x56, 0x49, 0x4f, 0x4d, //
    0x01, 0x00, 0x00, 0x00, 0x02, 0x00, 0x30, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, //
    0x03, 0x00, 0x10, 0x00, 0x00, 0x00, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, //
    0x01, 0x00, 0x18, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0xff, 0x00, //
    0x30, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
];

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn of(iommus: impl IntoIterator<Item = ViotIommu>) -> Viot {
    Viot { iommus: iommus.into_iter().collect(), ..Viot::default() }
}

fn pci(segment: u16, own: &str, ranges: impl IntoIterator<Item = PciRange>) -> ViotIommu {
    let transport = Transport::Pci { segment, bdf: bdf(own) };
    ViotIommu { ranges: ranges.into_iter().collect(), ..ViotIommu::new(transport) }
}

fn mmio(base: u64, mmio_endpoints: impl IntoIterator<Item = MmioEndpoint>) -> ViotIommu {
    ViotIommu {
        mmio_endpoints: mmio_endpoints.into_iter().collect(),
        ..ViotIommu::new(Transport::Mmio { base })
    }
}

fn example() -> Viot {
    of([pci(0, "00:01.0", [PciRange::buses(0, 0..=0)])])
}

/// Every kind of node, in five segments.
fn mixed() -> Viot {
    let far = PciRange { endpoint_start: 0x5000, segments: 2..=3, bdfs: Bdf(0x100)..=Bdf(0x1ff) };
    let mut two = mmio(0x1_0000_3000, [MmioEndpoint { id: 9, base: 0xa000 }]);
    two.ranges.push(PciRange::buses(4, 0..=255));
    of([
        pci(0, "00:01.0", [PciRange::buses(0, 0..=0), far]),
        two,
        mmio(0x5000, [MmioEndpoint { id: 9, base: 0xb000 }, MmioEndpoint { id: 10, base: 0xc000 }]),
    ])
}

fn u16_at(table: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(table[offset..offset + 2].try_into().unwrap())
}

fn sum(table: &[u8]) -> u8 {
    table.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn seal(table: &mut [u8]) {
    table[9] = table[9].wrapping_sub(sum(table));
}

/// The example with `bytes` written at `offset`, and a checksum that is right.
fn patched(offset: usize, bytes: &[u8]) -> Vec<u8> {
    let mut table = EXAMPLE.to_vec();
    table[offset..offset + bytes.len()].copy_from_slice(bytes);
    seal(&mut table);
    table
}

fn refused(table: &[u8]) -> (usize, Malformed) {
    match Viot::parse(table) {
        Err(ViotError::Malformed { offset, reason }) => (offset, reason),
        other => panic!("{other:?}"),
    }
}

/// Offset and type of each node, found by the lengths alone.
fn walk(table: &[u8]) -> Vec<(usize, u8)> {
    let mut nodes = Vec::new();
    let mut offset = usize::from(u16_at(table, 38));
    while offset < table.len() {
        nodes.push((offset, table[offset]));
        offset += usize::from(u16_at(table, offset + 2));
    }
    assert_eq!(offset, table.len(), "the last node ends elsewhere");
    nodes
}

/// What holds for each table that is written.
fn assert_well_formed(table: &[u8]) {
    assert_eq!(sum(table), 0);
    assert_eq!(u32::from_le_bytes(table[4..8].try_into().unwrap()), u32::try_from(table.len()).unwrap());
    let nodes = walk(table);
    assert_eq!(usize::from(u16_at(table, 36)), nodes.len());
    for (offset, kind) in &nodes {
        if matches!(kind, 1 | 2) {
            let output = usize::from(u16_at(table, offset + 16));
            assert!(nodes.iter().any(|(at, kind)| *at == output && matches!(kind, 3 | 4)), "{output:#x}");
        }
    }
}

#[test]
fn example_is_the_table_byte_for_byte() {
    assert_eq!(example().to_bytes().unwrap(), EXAMPLE);
    assert_eq!(Viot::parse(&EXAMPLE), Ok(example()));
}

#[test]
fn example_gives_the_ids_of_bus_0_but_not_the_iommus() {
    let viot = example();
    assert_eq!(viot.endpoint_id(0, bdf("00:03.0")), Some((0, 0x18)));
    assert_eq!(viot.endpoint_id(0, bdf("00:1f.7")), Some((0, 0xff)));
    assert_eq!(viot.endpoint_id(0, bdf("01:00.0")), None);
    assert_eq!(viot.endpoint_id(1, bdf("00:03.0")), None);
    assert_eq!(viot.endpoint_id(0, bdf("00:01.0")), None);
}

#[test]
fn id_in_a_range_with_starts_other_than_zero_counts_from_them() {
    let viot = mixed();
    assert_eq!(viot.endpoint_id(3, bdf("01:02.0")), Some((0, 0x15010)));
    assert_eq!(viot.endpoint_id(2, bdf("01:00.0")), Some((0, 0x5000)));
    assert_eq!(viot.endpoint_id(3, bdf("02:00.0")), None);
    assert_eq!(viot.endpoint_id(4, bdf("80:00.1")), Some((1, 0x4_8001)));
}

#[test]
fn id_of_a_platform_device_is_found_by_its_base() {
    let viot = mixed();
    assert_eq!(viot.mmio_endpoint_id(0xa000), Some((1, 9)));
    assert_eq!(viot.mmio_endpoint_id(0xc000), Some((2, 10)));
    assert_eq!(viot.mmio_endpoint_id(0xa001), None);
}

#[test]
fn sum_lengths_count_and_output_nodes_of_a_table_are_right() {
    let table = mixed().to_bytes().unwrap();
    assert_well_formed(&table);
    let kinds: Vec<u8> = walk(&table).into_iter().map(|(_, kind)| kind).collect();
    assert_eq!(kinds, [3, 4, 4, 1, 1, 1, 2, 2, 2]);
    assert_eq!(Viot::parse(&table), Ok(mixed()));
}

#[test]
fn table_of_nothing_is_a_header() {
    let table = Viot::default().to_bytes().unwrap();
    assert_eq!(table.len(), 48);
    assert_well_formed(&table);
    assert_eq!(Viot::parse(&table), Ok(Viot::default()));
}

#[test]
fn table_of_65535_bytes_at_most_is_written() {
    let endpoint = |n: u32| MmioEndpoint { id: n, base: u64::from(n) << 12 };
    // 48 + 16 + 2727 * 24 = 65512.
    let mut viot = of([mmio(0x3000, (0..2727).map(endpoint))]);
    let table = viot.to_bytes().unwrap();
    assert_eq!(table.len(), 65512);
    assert_well_formed(&table);
    assert_eq!(Viot::parse(&table).as_ref(), Ok(&viot));
    viot.iommus.push(mmio(0x4000, []));
    assert_eq!(viot.to_bytes().map(|table| table.len()), Ok(65528));
    viot.iommus.push(mmio(0x5000, []));
    assert_eq!(viot.to_bytes(), Err(ViotError::TooLong { bytes: 65544 }));
}

#[test]
fn table_in_more_memory_than_it_has_is_read_to_its_length() {
    let mut memory = EXAMPLE.to_vec();
    memory.extend([0xa5; 100]);
    assert_eq!(Viot::parse(&memory), Ok(example()));
}

#[test]
fn parse_of_an_unknown_node_passes_over_it() {
    let mut table = EXAMPLE[..64].to_vec();
    table.extend([0x7f, 0, 6, 0, 0xff, 0xff]);
    table.extend(&EXAMPLE[64..]);
    table[4] = 94;
    table[36] = 3;
    seal(&mut table);
    assert_eq!(Viot::parse(&table), Ok(example()));
}

#[test]
fn parse_of_a_node_longer_than_its_type_reads_what_it_knows() {
    let mut table = EXAMPLE.to_vec();
    table.extend([0xff; 8]);
    table[4] = 96;
    table[66] = 32;
    seal(&mut table);
    assert_eq!(Viot::parse(&table), Ok(example()));
}

#[test]
fn parse_of_an_iommu_behind_its_range_finds_it() {
    let mut table = EXAMPLE[..48].to_vec();
    table.extend(&EXAMPLE[64..]);
    table.extend(&EXAMPLE[48..64]);
    table[48 + 16] = 72;
    seal(&mut table);
    assert_eq!(Viot::parse(&table), Ok(example()));
}

#[test]
fn parse_of_cut_bytes_is_refused_at_each_length() {
    for length in 0..48 {
        assert_eq!(refused(&EXAMPLE[..length]), (length, Malformed::Cut));
    }
    for length in 48..88 {
        assert_eq!(refused(&EXAMPLE[..length]), (4, Malformed::Length(88)));
    }
}

#[test]
fn parse_of_a_header_that_is_wrong_is_refused() {
    assert_eq!(refused(&patched(0, b"VIOS")), (0, Malformed::Signature));
    assert_eq!(refused(&patched(4, &[47])), (4, Malformed::Length(47)));
    assert_eq!(refused(&patched(4, &[0, 0, 1])), (4, Malformed::Length(0x10000)));
    let mut checksum = EXAMPLE;
    checksum[9] ^= 1;
    assert_eq!(refused(&checksum), (9, Malformed::Checksum));
    assert_eq!(refused(&patched(38, &[47])), (38, Malformed::NodeOffset(47)));
}

#[test]
fn parse_of_a_node_shorter_than_a_head_is_refused() {
    for (kind, length) in [1, 0x7f].into_iter().flat_map(|kind| (0..4_u8).map(move |length| (kind, length))) {
        let reason = Malformed::NodeLength { kind, length: length.into() };
        assert_eq!(refused(&patched(64, &[kind, 0, length])), (64, reason));
    }
}

#[test]
fn parse_of_a_node_past_the_end_is_refused() {
    assert_eq!(refused(&patched(66, &[25])), (64, Malformed::NodeCut));
    assert_eq!(refused(&patched(36, &[3])), (88, Malformed::NodeCut));
    assert_eq!(refused(&patched(38, &[0xff, 0xff])), (0xffff, Malformed::NodeCut));
}

#[test]
fn parse_of_a_node_shorter_than_its_type_is_refused() {
    for (kind, least) in [(1, 24_u16), (2, 24), (3, 16), (4, 16)] {
        let mut table = EXAMPLE[..64].to_vec();
        table.extend([0; 24]);
        table[4] = 88;
        table[64] = kind;
        table[66] = 12;
        table[36] = 2;
        for length in [4, least - 1] {
            table[66..68].copy_from_slice(&length.to_le_bytes());
            seal(&mut table);
            assert_eq!(refused(&table), (64, Malformed::NodeLength { kind, length }));
        }
    }
}

#[test]
fn parse_of_an_output_node_that_is_no_iommu_is_refused() {
    // Inside the IOMMU's node, the range itself, the header, past the end.
    for output in [0x31_u16, 0x38, 0x40, 0, 0x58, 0xffff] {
        assert_eq!(refused(&patched(80, &output.to_le_bytes())), (64, Malformed::OutputNode(output)));
    }
}

#[test]
fn parse_of_a_range_that_ends_below_its_start_names_its_node() {
    let reason = Malformed::Topology(TopologyError::EmptyRange { at: Place::Range { iommu: 0, index: 0 } });
    assert_eq!(refused(&patched(76, &[0xff, 0, 0, 0])), (64, reason));
    let error = Viot::parse(&patched(76, &[0xff, 0, 0, 0])).unwrap_err();
    assert_eq!(error.to_string(), "VIOT, at offset 0x40: PCI range 0 of IOMMU 0 ends below its start");
}

fn check_refuses(viot: &Viot, error: TopologyError) {
    assert_eq!(viot.check(), Err(error));
    assert_eq!(viot.to_bytes(), Err(ViotError::Topology(error)));
}

#[test]
fn check_of_a_range_that_ends_below_its_start_is_refused() {
    let at = Place::Range { iommu: 0, index: 1 };
    for range in [
        PciRange::identity(RangeInclusive::new(2, 1), Bdf(0)..=Bdf(1)),
        PciRange::identity(1..=2, Bdf(1)..=Bdf(0)),
    ] {
        let viot = of([pci(0, "00:01.0", [PciRange::buses(0, 0..=0), range])]);
        check_refuses(&viot, TopologyError::EmptyRange { at });
    }
}

#[test]
fn check_of_ids_above_32_bits_is_refused() {
    let last = |endpoint_start| {
        let range = PciRange { endpoint_start, segments: 1..=2, bdfs: Bdf(0)..=Bdf(0xf) };
        of([pci(0, "00:01.0", [range])])
    };
    assert_eq!(last(u32::MAX - 0x1000f).check(), Ok(()));
    check_refuses(
        &last(u32::MAX - 0x1000e),
        TopologyError::IdOverflow { at: Place::Range { iommu: 0, index: 0 } },
    );
}

#[test]
fn check_of_one_iommu_twice_is_refused() {
    let error = TopologyError::SameIommu { at: Place::Iommu(2), other: Place::Iommu(0) };
    check_refuses(&of([mmio(0x3000, []), mmio(0x4000, []), mmio(0x3000, [])]), error);
    check_refuses(&of([pci(0, "00:01.0", []), pci(1, "00:01.0", []), pci(0, "00:01.0", [])]), error);
}

#[test]
fn check_of_a_function_in_two_ranges_is_refused() {
    let (at, other) = (Place::Range { iommu: 1, index: 0 }, Place::Range { iommu: 0, index: 0 });
    let range = PciRange { endpoint_start: 0x9_0000, segments: 0..=2, bdfs: Bdf(0xff)..=Bdf(0x1ff) };
    let two = |range| of([pci(9, "00:01.0", [PciRange::buses(1, 0..=0)]), pci(9, "00:02.0", [range])]);
    check_refuses(&two(range.clone()), TopologyError::SameDevice { at, other });
    assert_eq!(two(PciRange { bdfs: Bdf(0x100)..=Bdf(0x1ff), ..range.clone() }).check(), Ok(()));
    assert_eq!(two(PciRange { segments: 2..=2, ..range }).check(), Ok(()));
}

#[test]
fn check_of_two_functions_with_one_id_is_refused_inside_one_iommu() {
    let (at, other) = (Place::Range { iommu: 0, index: 1 }, Place::Range { iommu: 0, index: 0 });
    let one = PciRange::buses(0, 0..=0);
    let two = PciRange { endpoint_start: 0xff, ..PciRange::buses(1, 0..=0) };
    let viot = of([pci(9, "00:01.0", [one.clone(), two.clone()])]);
    check_refuses(&viot, TopologyError::SameId { at, other });
    assert_eq!(of([pci(9, "00:01.0", [one]), pci(9, "00:02.0", [two])]).check(), Ok(()));
}

#[test]
fn check_of_a_platform_device_with_anothers_id_or_base_is_refused() {
    let (at, other) =
        (Place::MmioEndpoint { iommu: 0, index: 1 }, Place::MmioEndpoint { iommu: 0, index: 0 });
    let endpoint = |id, base| MmioEndpoint { id, base };
    check_refuses(
        &of([mmio(0, [endpoint(1, 0xa000), endpoint(1, 0xb000)])]),
        TopologyError::SameId { at, other },
    );
    let at = Place::MmioEndpoint { iommu: 1, index: 0 };
    check_refuses(
        &of([mmio(0, [endpoint(1, 0xa000)]), mmio(1, [endpoint(2, 0xa000)])]),
        TopologyError::SameDevice { at, other },
    );
    let mut both = mmio(0, [endpoint(0x18, 0xa000)]);
    both.ranges.push(PciRange::buses(0, 0..=0));
    let at = Place::MmioEndpoint { iommu: 0, index: 0 };
    check_refuses(&of([both]), TopologyError::SameId { at, other: Place::Range { iommu: 0, index: 0 } });
}

#[test]
fn check_of_an_iommu_behind_another_is_refused() {
    let viot = of([pci(0, "00:01.0", [PciRange::buses(0, 0..=0)]), pci(0, "00:02.0", [])]);
    let (at, other) = (Place::Iommu(1), Place::Range { iommu: 0, index: 0 });
    check_refuses(&viot, TopologyError::IommuBehindIommu { at, other });
}

fn transport() -> impl Strategy<Value = Transport> {
    prop_oneof![
        (any::<u16>(), any::<u16>()).prop_map(|(segment, bdf)| Transport::Pci { segment, bdf: Bdf(bdf) }),
        any::<u64>().prop_map(|base| Transport::Mmio { base }),
    ]
}

fn span<T: Ord + Copy>((a, b): (T, T)) -> RangeInclusive<T> {
    a.min(b)..=a.max(b)
}

/// Any range, or a small one at any place, or one of the ranges that embedders make.
fn range() -> impl Strategy<Value = PciRange> {
    let any_range = (any::<u32>(), any::<(u16, u16)>(), any::<(u16, u16)>());
    let small = (any::<u32>(), any::<u16>(), 0_u16..3, any::<u16>(), 0_u16..0x200);
    prop_oneof![
        1 => any_range.prop_map(|(endpoint_start, segments, bdfs)| PciRange {
            endpoint_start,
            segments: span(segments),
            bdfs: span((Bdf(bdfs.0), Bdf(bdfs.1))),
        }),
        4 => small.prop_map(|(endpoint_start, segment, segments, bdf, bdfs)| PciRange {
            endpoint_start,
            segments: segment..=segment.saturating_add(segments),
            bdfs: Bdf(bdf)..=Bdf(bdf.saturating_add(bdfs)),
        }),
        4 => (any::<u16>(), any::<(u8, u8)>()).prop_map(|(segment, buses)| PciRange::buses(segment, span(buses))),
    ]
}

fn any_topology() -> impl Strategy<Value = Viot> {
    let endpoint = any::<(u32, u64)>().prop_map(|(id, base)| MmioEndpoint { id, base });
    let iommu = (transport(), prop::collection::vec(range(), 0..6), prop::collection::vec(endpoint, 0..6))
        .prop_map(|(transport, ranges, mmio_endpoints)| ViotIommu { transport, ranges, mmio_endpoints });
    let names = (any::<[u8; 6]>(), any::<[u8; 8]>(), any::<u32>(), any::<[u8; 4]>(), any::<u32>());
    (names, prop::collection::vec(iommu, 0..5)).prop_map(|(names, iommus)| {
        let (oem_id, oem_table_id, oem_revision, creator_id, creator_revision) = names;
        Viot { oem_id, oem_table_id, oem_revision, creator_id, creator_revision, iommus }
    })
}

/// Without what stands against it.
fn topology() -> impl Strategy<Value = Viot> {
    any_topology().prop_map(|mut viot| {
        while let Err(error) = viot.check() {
            match error.at() {
                Place::Iommu(iommu) => drop(viot.iommus.remove(iommu)),
                Place::Range { iommu, index } => drop(viot.iommus[iommu].ranges.remove(index)),
                Place::MmioEndpoint { iommu, index } => drop(viot.iommus[iommu].mmio_endpoints.remove(index)),
            }
        }
        viot
    })
}

/// Mostly zeros, and now and then the offset of the first node, so that some output nodes are one.
fn node_body() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![1 => 0_usize..30, 2 => Just(12), 2 => Just(20)];
    let byte = prop_oneof![8 => Just(0_u8), 1 => 0..4_u8, 1 => any::<u8>()];
    (length, 0_u8..3).prop_flat_map(move |(length, first)| {
        prop::collection::vec(byte.clone(), length).prop_map(move |mut body| {
            if let (Some(output), 1..) = (body.get_mut(12), first) {
                *output = 48;
            }
            body
        })
    })
}

/// A table that was parsed is read again as itself, and gives no id twice.
fn assert_parsed_is_sound(viot: &Viot) {
    let table = viot.to_bytes().unwrap();
    assert_well_formed(&table);
    assert_eq!(Viot::parse(&table).as_ref(), Ok(viot));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn topology_is_read_back_as_it_was_written(viot in topology()) {
        let table = viot.to_bytes().unwrap();
        assert_well_formed(&table);
        prop_assert_eq!(Viot::parse(&table), Ok(viot));
    }

    #[test]
    fn topology_is_written_if_check_says_so(viot in any_topology()) {
        prop_assert_eq!(viot.to_bytes().err(), viot.check().err().map(ViotError::Topology));
    }

    #[test]
    fn functions_of_a_good_topology_share_no_id(viot in topology(), functions in any::<[(Index, u16, u16); 8]>()) {
        let ranges: Vec<&PciRange> = viot.iommus.iter().flat_map(|iommu| &iommu.ranges).collect();
        let mut known = std::collections::HashMap::new();
        for (range, segment, bdf) in functions.into_iter().filter(|_| !ranges.is_empty()) {
            let range = *range.get(&ranges);
            let segment = segment.clamp(*range.segments.start(), *range.segments.end());
            let bdf = Bdf(bdf).clamp(*range.bdfs.start(), *range.bdfs.end());
            if let Some(known_as) = viot.endpoint_id(segment, bdf) {
                prop_assert_eq!(*known.entry(known_as).or_insert((segment, bdf)), (segment, bdf));
            }
        }
    }

    #[test]
    fn parse_of_any_bytes_does_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Viot::parse(&bytes).is_err());
    }

    /// Random nodes behind a header and an IOMMU that let them through.
    #[test]
    fn parse_of_any_nodes_does_not_panic(
        nodes in prop::collection::vec(
            (prop_oneof![9 => 0_u8..6, 1 => any::<u8>()], any::<u8>(), node_body()),
            0..12,
        ),
        count in prop::option::weighted(0.2, any::<u16>()),
        first in prop::option::weighted(0.1, 0_u16..200),
        wrong_length in prop::option::weighted(0.1, (any::<Index>(), 0_u16..80)),
    ) {
        let mut table = EXAMPLE[..64].to_vec();
        let wrong = wrong_length.filter(|_| !nodes.is_empty()).map(|(at, length)| (at.index(nodes.len()), length));
        for (n, (kind, reserved, body)) in nodes.iter().enumerate() {
            let length = u16::try_from(body.len() + 4).unwrap();
            let length = wrong.filter(|(at, _)| *at == n).map_or(length, |(_, length)| length);
            table.extend([*kind, *reserved]);
            table.extend(length.to_le_bytes());
            table.extend(body);
        }
        let length = u32::try_from(table.len()).unwrap();
        table[4..8].copy_from_slice(&length.to_le_bytes());
        let count = count.unwrap_or_else(|| u16::try_from(nodes.len() + 1).unwrap());
        table[36..38].copy_from_slice(&count.to_le_bytes());
        table[38..40].copy_from_slice(&first.unwrap_or(48).to_le_bytes());
        seal(&mut table);
        if let Ok(viot) = Viot::parse(&table) {
            assert_parsed_is_sound(&viot);
        }
    }

    #[test]
    fn parse_of_a_damaged_table_does_not_panic(
        viot in topology(),
        damage in prop::collection::vec((any::<Index>(), any::<u8>()), 1..4),
        cut in prop::option::weighted(0.2, any::<Index>()),
        sealed in prop::bool::weighted(0.9),
    ) {
        let mut table = viot.to_bytes().unwrap();
        for (at, byte) in damage {
            let at = at.index(table.len());
            table[at] = byte;
        }
        if sealed {
            seal(&mut table);
        }
        if let Some(cut) = cut {
            table.truncate(cut.index(table.len()));
        }
        match Viot::parse(&table) {
            Ok(viot) => assert_parsed_is_sound(&viot),
            Err(ViotError::Malformed { offset, .. }) => prop_assert!(offset <= 0xffff),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}
