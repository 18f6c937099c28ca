//! The ACPI table that tells the guest where the VT-d unit is, and which functions are behind it.

use std::io;
use std::path::Path;

use viommu_virtio::viot::Bdf;
use viommu_vtd::dmar::{Dmar, Scope};

use super::viot::write_whole;

/// What the table says besides the register page's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Bits of a guest physical address.
    pub(crate) host_bits: u8,
    /// The functions behind the unit.
    pub(crate) devices: Vec<Bdf>,
}

/// Writes the table for a register page at `base`: whoever reads the file finds all of it, or what was there before.
///
/// # Errors
/// The file cannot be written, or no table says that.
pub(crate) fn write(path: &Path, plan: &Plan, base: u64) -> io::Result<()> {
    let devices = plan.devices.iter().map(|bdf| (bdf.bus(), bdf.device(), bdf.function())).collect();
    let dmar = Dmar {
        host_bits: plan.host_bits,
        base,
        segment: 0,
        scope: Scope::Endpoints(devices),
        oem_id: *b"VIOMMU",
        oem_table_id: *b"VIOMDMAR",
    };
    write_whole(path, &dmar.to_bytes().map_err(io::Error::other)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn write_names_the_functions_behind_the_unit_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dmar.bin");
        let plan = Plan { host_bits: 48, devices: vec![Bdf(0x10), Bdf(0x107)] };
        write(&path, &plan, 0xfebf_c000).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!((bytes.len(), &bytes[..4]), (80, &b"DMAR"[..]));
        assert_eq!(bytes[56..64], 0xfebf_c000_u64.to_le_bytes());
        assert_eq!((&bytes[69..72], &bytes[77..80]), (&[0, 2, 0][..], &[1, 0, 7][..]));
        assert!(write(&path, &plan, 1).is_err());
    }
}
