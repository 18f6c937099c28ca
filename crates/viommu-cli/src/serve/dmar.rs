//! The ACPI table that tells the guest where the VT-d unit is, and which functions are behind it.

use std::fs;
use std::io;
use std::path::Path;

use viommu_virtio::viot::Bdf;
use viommu_vtd::dmar::{Dmar, Kind, Named, Scope};

use super::viot::write_whole;

/// Where the register page's address is in a table with one unit.
const BASE: core::ops::Range<usize> = 56..64;

/// What the table says besides the register page's address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Bits of a guest physical address.
    pub(crate) host_bits: u8,
    /// The functions behind the unit, all on bus 00.
    pub(crate) endpoints: Vec<Bdf>,
    /// Root ports: what is behind them is behind the unit.
    pub(crate) ports: Vec<Bdf>,
}

impl Plan {
    fn table(&self, base: u64) -> io::Result<Vec<u8>> {
        let named = |kind| {
            move |bdf: &Bdf| Named { kind, bus: bdf.bus(), device: bdf.device(), function: bdf.function() }
        };
        let endpoints = self.endpoints.iter().map(named(Kind::Endpoint));
        let dmar = Dmar {
            host_bits: self.host_bits,
            base,
            segment: 0,
            scope: Scope::Named(endpoints.chain(self.ports.iter().map(named(Kind::Bridge))).collect()),
            oem_id: *b"VIOMMU",
            oem_table_id: *b"VIOMDMAR",
        };
        dmar.to_bytes().map_err(io::Error::other)
    }

    /// Writes the table for a register page at `base`: whoever reads the file finds all of it, or what was there before.
    ///
    /// # Errors
    /// The file cannot be written, or no table says that.
    pub(crate) fn write(&self, path: &Path, base: u64) -> io::Result<()> {
        write_whole(path, &self.table(base)?)
    }

    /// The address in a table that was written for this plan before. Any other file there is removed: a machine that
    /// finds no table does not start, and one with a wrong table would start without its IOMMU.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub(crate) fn written(&self, path: &Path) -> io::Result<Option<u64>> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let base = bytes.get(BASE).and_then(|base| base.try_into().ok()).map(u64::from_le_bytes);
        if let Some(base) = base.filter(|base| self.table(*base).is_ok_and(|table| table == bytes)) {
            return Ok(Some(base));
        }
        fs::remove_file(path)?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan() -> Plan {
        Plan { host_bits: 48, endpoints: vec![Bdf(0x10)], ports: vec![Bdf(0xf1)] }
    }

    #[test]
    fn write_names_the_functions_behind_the_unit_only() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dmar.bin");
        plan().write(&path, 0xfebf_c000).unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!((bytes.len(), &bytes[..4]), (80, &b"DMAR"[..]));
        assert_eq!(bytes[BASE], 0xfebf_c000_u64.to_le_bytes());
        assert_eq!((bytes[64], &bytes[69..72]), (1, &[0, 2, 0][..]));
        assert_eq!((bytes[72], &bytes[77..80]), (2, &[0, 30, 1][..]));
        assert!(plan().write(&path, 1).is_err());
    }

    #[test]
    fn written_keeps_a_table_of_the_same_plan_and_removes_any_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dmar.bin");
        assert_eq!(plan().written(&path).unwrap(), None);
        plan().write(&path, 0xfebf_c000).unwrap();
        assert_eq!(plan().written(&path).unwrap(), Some(0xfebf_c000));
        let other = Plan { endpoints: vec![Bdf(0x18)], ..plan() };
        assert_eq!(other.written(&path).unwrap(), None);
        assert!(!path.exists());
        fs::write(&path, b"DMAR").unwrap();
        assert_eq!(plan().written(&path).unwrap(), None);
        assert!(!path.exists());
    }
}
