use dtoolkit::fdt::{Fdt, FdtNode};
use dtoolkit::standard::NodeStandard;
use dtoolkit::{Node, Property};
use proptest::prelude::*;

use super::*;
use crate::viot::{PciRange, ViotIommu};

/// The blob of a root node with what `fill` writes into it, in a tree whose root has one cell for either.
fn blob(fill: impl FnOnce(&mut FdtWriter) -> Result<(), FdtError>) -> Result<Vec<u8>, FdtError> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fill(&mut fdt)?;
    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

fn cells(node: &FdtNode<'_>, name: &str) -> Option<Vec<u32>> {
    let property = node.property(name)?;
    let (words, rest) = property.value().as_chunks();
    assert_eq!(rest, []);
    Some(words.iter().map(|word| u32::from_be_bytes(*word)).collect())
}

fn names(node: &FdtNode<'_>) -> Vec<String> {
    node.properties().map(|property| property.name().to_owned()).collect()
}

fn bdf(text: &str) -> Bdf {
    text.parse().unwrap()
}

fn pci_iommu(segment: u16, own: &str, ranges: impl IntoIterator<Item = PciRange>) -> ViotIommu {
    let mut iommu = ViotIommu::new(Transport::Pci { segment, bdf: bdf(own) });
    iommu.ranges.extend(ranges);
    iommu
}

fn written(map: &IommuMap) -> Option<Vec<u32>> {
    let blob = blob(|fdt| map.write(fdt)).unwrap();
    cells(&Fdt::new(&blob).unwrap().root(), "iommu-map")
}

const MMIO: MmioIommu<'static> = MmioIommu {
    base: 0x1_0a00_3e00,
    size: 0x200,
    address_cells: Cells::Two,
    size_cells: Cells::Two,
    interrupts: &[0, 42, 1],
    phandle: 7,
};

/// The example of Linux's binding virtio/pci-iommu.yaml: two segments and a platform device behind one IOMMU.
#[test]
fn tree_of_the_linux_binding_is_written() {
    let both = [PciRange::buses(0, 0..=255), PciRange::buses(1, 0..=255)];
    let topology = Viot { iommus: vec![pci_iommu(0, "00:01.0", both)], ..Viot::default() };
    let blob = blob(|fdt| {
        let bridge = fdt.begin_node("pcie@40000000")?;
        IommuMap::of_segment(&topology, 0, &[3])?.write(fdt)?;
        let iommu = begin_pci_iommu(fdt, bdf("00:01.0"), 3)?;
        fdt.end_node(iommu)?;
        fdt.end_node(bridge)?;
        let bridge = fdt.begin_node("pcie@50000000")?;
        IommuMap::of_segment(&topology, 1, &[3])?.write(fdt)?;
        fdt.end_node(bridge)?;
        let ethernet = fdt.begin_node("ethernet")?;
        write_iommus(fdt, 3, 0x20000)?;
        Ok(fdt.end_node(ethernet)?)
    })
    .unwrap();

    let tree = Fdt::new(&blob).unwrap();
    let bridge = tree.find_node("/pcie@40000000").unwrap();
    assert_eq!(cells(&bridge, "iommu-map").unwrap(), [0, 3, 0, 8, 9, 3, 9, 0xfff7]);
    let iommu = bridge.child("iommu@1,0").unwrap();
    assert_eq!(names(&iommu), ["compatible", "reg", "#iommu-cells", "phandle"]);
    let compatible: Vec<_> = iommu.compatible().unwrap().collect();
    assert_eq!(compatible, ["virtio,pci-iommu", "pci1af4,1057"]);
    assert_eq!(cells(&iommu, "reg").unwrap(), [0x800, 0, 0, 0, 0]);
    assert_eq!(cells(&iommu, "#iommu-cells").unwrap(), [1]);
    assert_eq!(iommu.phandle(), Ok(Some(3)));
    let other = tree.find_node("/pcie@50000000").unwrap();
    assert_eq!(cells(&other, "iommu-map").unwrap(), [0, 3, 0x10000, 0x10000]);
    assert_eq!(cells(&tree.find_node("/ethernet").unwrap(), "iommus").unwrap(), [3, 0x20000]);
}

#[test]
fn pci_iommu_on_another_bus_has_its_bus_in_reg_only() {
    let blob = blob(|fdt| {
        let iommu = begin_pci_iommu(fdt, bdf("20:1f.7"), 1)?;
        Ok(fdt.end_node(iommu)?)
    })
    .unwrap();
    let iommu = Fdt::new(&blob).unwrap().find_node("/iommu@1f,7").unwrap();
    assert_eq!(cells(&iommu, "reg").unwrap(), [0x20_ff00, 0, 0, 0, 0]);
}

#[test]
fn mmio_iommu_is_a_virtio_mmio_node() {
    let blob = blob(|fdt| {
        let iommu = begin_mmio_iommu(fdt, &MMIO)?;
        fdt.property_null("dma-coherent")?;
        Ok(fdt.end_node(iommu)?)
    })
    .unwrap();
    let iommu = Fdt::new(&blob).unwrap().find_node("/iommu@10a003e00").unwrap();
    assert_eq!(names(&iommu), ["compatible", "reg", "interrupts", "#iommu-cells", "phandle", "dma-coherent"]);
    assert_eq!(iommu.compatible().unwrap().collect::<Vec<_>>(), ["virtio,mmio"]);
    assert_eq!(cells(&iommu, "reg").unwrap(), [1, 0x0a00_3e00, 0, 0x200]);
    assert_eq!(cells(&iommu, "interrupts").unwrap(), [0, 42, 1]);
    assert_eq!(cells(&iommu, "#iommu-cells").unwrap(), [1]);
    assert_eq!(iommu.phandle(), Ok(Some(7)));
}

#[test]
fn mmio_iommu_with_one_cell_each_and_no_interrupts_writes_what_it_has() {
    let one = MmioIommu {
        base: 0x3100,
        address_cells: Cells::One,
        size_cells: Cells::One,
        interrupts: &[],
        ..MMIO
    };
    let blob = blob(|fdt| {
        let iommu = begin_mmio_iommu(fdt, &one)?;
        Ok(fdt.end_node(iommu)?)
    })
    .unwrap();
    let iommu = Fdt::new(&blob).unwrap().find_node("/iommu@3100").unwrap();
    assert_eq!(cells(&iommu, "reg").unwrap(), [0x3100, 0x200]);
    assert_eq!(cells(&iommu, "interrupts"), None);
}

#[test]
fn mmio_iommu_above_32_bits_with_one_cell_is_refused_and_nothing_written() {
    let narrow = MmioIommu { address_cells: Cells::One, ..MMIO };
    let mut fdt = FdtWriter::new().unwrap();
    assert_eq!(begin_mmio_iommu(&mut fdt, &narrow).unwrap_err(), FdtError::Cells(MMIO.base));
    assert_eq!(fdt.finish(), FdtWriter::new().unwrap().finish());
}

#[test]
fn phandle_that_is_none_is_refused() {
    for phandle in [0, u32::MAX] {
        let refused = FdtError::Phandle(phandle);
        let mut fdt = FdtWriter::new().unwrap();
        assert_eq!(begin_pci_iommu(&mut fdt, Bdf(8), phandle).unwrap_err(), refused);
        assert_eq!(begin_mmio_iommu(&mut fdt, &MmioIommu { phandle, ..MMIO }).unwrap_err(), refused);
        assert_eq!(write_iommus(&mut fdt, phandle, 1).unwrap_err(), refused);
        assert_eq!(IommuMap::new().map(Bdf::MIN..=Bdf::MAX, phandle, 0).unwrap_err(), refused);
    }
}

#[test]
fn phandle_of_another_node_is_refused_by_the_writer() {
    let twice = blob(|fdt| {
        let first = begin_pci_iommu(fdt, Bdf(8), MMIO.phandle)?;
        fdt.end_node(first)?;
        begin_mmio_iommu(fdt, &MMIO)?;
        Ok(())
    });
    assert_eq!(twice, Err(FdtError::Writer(vm_fdt::Error::DuplicatePhandle)));
}

#[test]
fn iommu_map_behind_a_child_node_is_refused_by_the_writer() {
    let mut map = IommuMap::new();
    map.map(Bdf::MIN..=Bdf::MAX, 3, 0).unwrap();
    let late = blob(|fdt| {
        let child = begin_pci_iommu(fdt, Bdf(8), 3)?;
        fdt.end_node(child)?;
        map.write(fdt)
    });
    assert_eq!(late, Err(FdtError::Writer(vm_fdt::Error::PropertyAfterEndNode)));
}

#[test]
fn iommu_map_of_no_function_is_no_property() {
    assert_eq!(written(&IommuMap::new()), None);
    let mut only_own = IommuMap::new();
    only_own.map(Bdf(8)..=Bdf(8), 3, 8).unwrap();
    only_own.omit(Bdf(8));
    assert_eq!(written(&only_own), None);
}

#[test]
fn omit_at_an_end_leaves_one_entry() {
    let mut map = IommuMap::new();
    map.map(Bdf::MIN..=Bdf::MAX, 3, 0x500).unwrap();
    map.omit(Bdf::MIN);
    map.omit(Bdf::MAX);
    assert_eq!(written(&map).unwrap(), [1, 3, 0x501, 0xfffe]);
}

#[test]
fn omit_of_a_function_without_entry_changes_nothing() {
    let mut map = IommuMap::new();
    map.map(Bdf(0x10)..=Bdf(0x20), 3, 0).unwrap();
    let before = map.clone();
    map.omit(Bdf(8));
    assert_eq!(map, before);
}

#[test]
fn map_that_is_refused_changes_nothing() {
    let mut map = IommuMap::new();
    map.map(Bdf(0x10)..=Bdf(0x20), 3, u32::MAX - 0x10).unwrap();
    let before = map.clone();
    let (start, end) = (Bdf(0x20), Bdf(0x30));
    assert_eq!(map.map(start..=end, 4, 0), Err(FdtError::Overlap { start, end }));
    assert_eq!(map.map(end..=start, 4, 0), Err(FdtError::EmptyRange { start: end, end: start }));
    let (start, end) = (Bdf(0x21), Bdf(0x31));
    assert_eq!(map.map(start..=end, 4, u32::MAX - 0xf), Err(FdtError::IdOverflow { start, end }));
    assert_eq!(map, before);
}

#[test]
fn map_of_a_segment_leaves_out_every_iommu_of_it() {
    let one = pci_iommu(0, "00:01.0", [PciRange::buses(0, 0..=0x7f)]);
    let mut two = pci_iommu(0, "80:02.0", []);
    two.ranges.push(PciRange {
        endpoint_start: 0x5000,
        segments: 0..=1,
        bdfs: bdf("80:00.0")..=bdf("ff:1f.7"),
    });
    let elsewhere = pci_iommu(2, "00:03.0", [PciRange::buses(2, 0..=0)]);
    let topology = Viot { iommus: vec![one, two, elsewhere], ..Viot::default() };
    assert_eq!(topology.check(), Ok(()));

    let map = |segment| written(&IommuMap::of_segment(&topology, segment, &[5, 6, 7]).unwrap());
    assert_eq!(
        map(0).unwrap(),
        [[0, 5, 0, 8], [9, 5, 9, 0x7ff7], [0x8000, 6, 0x5000, 0x10], [0x8011, 6, 0x5011, 0x7fef]].concat()
    );
    assert_eq!(map(1).unwrap(), [0x8000, 6, 0x15000, 0x8000]);
    assert_eq!(map(2).unwrap(), [0, 7, 0x20000, 0x18, 0x19, 7, 0x20019, 0xe7]);
    assert_eq!(map(3), None);
    assert_eq!(IommuMap::of_segment(&topology, 2, &[5, 6]), Err(FdtError::NoPhandle { iommu: 2 }));
}

#[test]
fn map_of_a_segment_whose_ranges_are_no_good_is_refused() {
    let of = |range| {
        let topology = Viot { iommus: vec![pci_iommu(0, "00:01.0", [range])], ..Viot::default() };
        IommuMap::of_segment(&topology, 1, &[5])
    };
    let (start, end) = (Bdf(8), Bdf(7));
    assert_eq!(of(PciRange::identity(0..=1, start..=end)), Err(FdtError::EmptyRange { start, end }));
    let (start, end) = (Bdf(0), Bdf(7));
    for endpoint_start in [u32::MAX, u32::MAX - 0x10000 - 6] {
        let range = PciRange { endpoint_start, segments: 0..=1, bdfs: start..=end };
        assert_eq!(of(range), Err(FdtError::IdOverflow { start, end }), "{endpoint_start:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A guest that reads the blob as pci/pci-iommu.txt states it finds the ids that the topology gives.
    #[test]
    fn ids_in_the_tree_are_those_of_the_topology(
        own in any::<u16>(),
        cuts in prop::collection::btree_set(any::<u16>(), 2..8),
        endpoint_start in 0..0x8000_0000_u32,
        probes in prop::collection::vec(any::<u16>(), 16),
    ) {
        let mut iommu = ViotIommu::new(Transport::Pci { segment: 1, bdf: Bdf(own) });
        let cuts: Vec<u16> = cuts.into_iter().collect();
        for (start, end) in cuts.iter().zip(cuts.iter().skip(1)).step_by(2) {
            let endpoint_start = endpoint_start + u32::from(*start);
            iommu.ranges.push(PciRange { endpoint_start, segments: 0..=2, bdfs: Bdf(*start)..=Bdf(*end) });
        }
        let topology = Viot { iommus: vec![iommu], ..Viot::default() };
        prop_assert_eq!(topology.check(), Ok(()));
        let map = written(&IommuMap::of_segment(&topology, 1, &[9]).unwrap()).unwrap_or_default();
        let near_own = [own.saturating_sub(1), own, own.saturating_add(1)];
        for rid in probes.into_iter().chain(cuts).chain(near_own) {
            let wide = u32::from(rid);
            let found = map.as_chunks().0.iter().find_map(|[base, phandle, id, length]| {
                let offset = wide.checked_sub(*base).filter(|offset| offset < length)?;
                Some((*phandle, id + offset))
            });
            let told = topology.endpoint_id(1, Bdf(rid)).map(|(_, id)| (9, id));
            prop_assert_eq!(found, told, "{}", Bdf(rid));
        }
    }
}
