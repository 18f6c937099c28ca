//! The ACPI table that tells the guest which functions are behind the IOMMU.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use viommu_virtio::viot::{Bdf, PciRange, Transport, Viot, ViotError, ViotIommu};

use super::options::{Model, ServePlan};
use super::{dmar, qemu};

/// The table, if there is an IOMMU. A function's endpoint id is its requester id.
pub(crate) fn table(plan: &ServePlan) -> Option<Viot> {
    let address = plan.iommu.as_ref().filter(|iommu| iommu.model == Model::Virtio)?.address;
    let mut iommu = ViotIommu::new(Transport::Pci { segment: 0, bdf: address });
    let mut ranges: Vec<(Bdf, Bdf)> =
        plan.devices.iter().map(|device| (device.address, device.address)).collect();
    ranges.extend(plan.hotplug.iter().map(|range| (*range.start(), *range.end())));
    ranges.sort();
    // Neighbours become one; what lies between others is not ours, and must not be said to be behind the IOMMU.
    let mut joined: Vec<(Bdf, Bdf)> = Vec::new();
    for (first, last) in ranges {
        match joined.last_mut() {
            Some(before) if before.1.0.checked_add(1) == Some(first.0) => before.1 = last,
            _ => joined.push((first, last)),
        }
    }
    iommu.ranges = joined.into_iter().map(|(first, last)| PciRange::identity(0..=0, first..=last)).collect();
    Some(Viot { iommus: vec![iommu], ..Viot::default() })
}

/// What the DMAR table of a VT-d unit says.
pub(crate) fn dmar_plan(plan: &ServePlan) -> Option<dmar::Plan> {
    let Model::Vtd(_) = &plan.iommu.as_ref()?.model else { return None };
    let fixed = plan.devices.iter().map(|device| device.address);
    let endpoints = fixed.clone().filter(|address| address.bus() == 0).collect();
    // A range may lie over several buses.
    let later = plan.hotplug.iter().flat_map(|range| range.start().bus()..=range.end().bus());
    let buses: BTreeSet<u8> = fixed.map(Bdf::bus).chain(later).filter(|bus| *bus != 0).collect();
    let ports = buses.into_iter().filter_map(|bus| qemu::port_of(plan, bus)).collect();
    Some(dmar::Plan { host_bits: HOST_BITS, endpoints, ports })
}

/// Bits of a guest physical address, for a VT-d unit.
pub(crate) const HOST_BITS: u8 = 48;

/// Why there is no file.
#[derive(Debug)]
pub(crate) enum WriteError {
    /// The table cannot be made.
    Table(ViotError),
    /// It cannot be written.
    Io(io::Error),
}

impl core::fmt::Display for WriteError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Table(why) => why.fmt(f),
            Self::Io(why) => why.fmt(f),
        }
    }
}

impl std::error::Error for WriteError {}

/// Writes the VIOT, if there is one: whoever reads the file finds all of it, or what was there before.
///
/// # Errors
/// See [`WriteError`]; the file is as it was.
pub(crate) fn write(plan: &ServePlan) -> Result<(), WriteError> {
    let Some(table) = table(plan) else { return Ok(()) };
    let bytes = table.to_bytes().map_err(WriteError::Table)?;
    write_whole(&plan.viot_file(), &bytes).map_err(WriteError::Io)
}

pub(super) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = Path::new(&name);
    // What another process of this number has left.
    let _ = fs::remove_file(new);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(new)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| fs::rename(new, path));
    if written.is_err() {
        let _ = fs::remove_file(new);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::options::tests::plan_in;

    fn ranges(more: &[&str]) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let table = table(&plan_in(directory.path(), more).unwrap()).unwrap();
        table.check().unwrap();
        assert_eq!(table.iommus[0].transport, Transport::Pci { segment: 0, bdf: Bdf(8) });
        let show = |range: &PciRange| {
            assert_eq!(range.endpoint_start, u32::from(range.bdfs.start().0));
            format!("{}-{}", range.bdfs.start(), range.bdfs.end())
        };
        table.iommus[0].ranges.iter().map(show).collect()
    }

    #[test]
    fn table_joins_neighbours_and_leaves_gaps() {
        assert!(ranges(&[]).is_empty());
        let more = [
            "--endpoint",
            "00:03.0=rng",
            "--endpoint",
            "00:02.0-00:02.7=hotplug",
            "--endpoint",
            "00:03.1=rng",
            "--endpoint",
            "00:05.0=rng",
            "--endpoint",
            "01:00.0-01:00.7=hotplug",
        ];
        assert_eq!(ranges(&more), ["00:02.0-00:03.1", "00:05.0-00:05.0", "01:00.0-01:00.7"]);
        let all = ["--endpoint", "01:00.0-e0:1f.7=hotplug"];
        assert_eq!(ranges(&all), ["01:00.0-e0:1f.7"]);
    }

    #[test]
    fn table_without_an_iommu_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let plan = plan_in(directory.path(), &["--no-iommu", "--endpoint", "00:02.0=rng"]).unwrap();
        assert!(table(&plan).is_none());
        write(&plan).unwrap();
        assert!(!plan.viot_file().exists());
    }

    #[test]
    fn write_replaces_the_file_and_leaves_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let plan = plan_in(directory.path(), &["--endpoint", "00:02.0=rng"]).unwrap();
        fs::write(plan.viot_file(), "old").unwrap();
        write(&plan).unwrap();
        let viot = Viot::parse(&fs::read(plan.viot_file()).unwrap()).unwrap();
        assert_eq!(viot.endpoint_id(0, Bdf(0x10)), Some((0, 0x10)));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        fs::remove_file(plan.viot_file()).unwrap();
        fs::create_dir_all(plan.viot_file().join("in the way")).unwrap();
        assert!(matches!(write(&plan), Err(WriteError::Io(_))));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn dmar_plan_names_functions_on_bus_0_and_ports_of_the_others() {
        let directory = tempfile::tempdir().unwrap();
        let more = [
            "--endpoint",
            "00:02.0=rng",
            "--endpoint",
            "02:00.0=rng",
            "--endpoint",
            "01:00.0-01:00.7=hotplug",
        ];
        let plan = plan_in(directory.path(), &[&["--iommu", "vtd@00:01.0"], &more[..]].concat()).unwrap();
        write(&plan).unwrap();
        assert!(table(&plan).is_none() && !plan.viot_file().exists());
        let dmar = dmar_plan(&plan).unwrap();
        assert_eq!(dmar.endpoints, [Bdf(0x10)]);
        // The ports for buses 01 and 02 are functions of the last device that is free.
        assert_eq!(dmar.ports, [Bdf::new(0, 0x1e, 0).unwrap(), Bdf::new(0, 0x1e, 1).unwrap()]);
        assert_eq!(dmar_plan(&plan_in(directory.path(), &more).unwrap()), None);
    }
}
