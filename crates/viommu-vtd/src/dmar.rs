//! The ACPI table that tells a guest's firmware and driver where the unit is, and which devices are behind it ("DMA
//! Remapping Reporting Structure").

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout, Unaligned};

/// The table, for one unit. Interrupt remapping is not offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dmar {
    /// Bits of a host address: [`Config::host_bits`](crate::Config::host_bits).
    pub host_bits: u8,
    /// Where the register page is.
    pub base: u64,
    /// The PCI segment of the devices.
    pub segment: u16,
    /// Which of its devices are behind the unit.
    pub scope: Scope,
    /// Who made the table: six bytes.
    pub oem_id: [u8; 6],
    /// Which it is: eight bytes.
    pub oem_table_id: [u8; 8],
}

/// Devices behind a unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of the segment.
    All,
    /// These.
    Named(Vec<Named>),
}

/// A function that is behind a unit, and perhaps what is behind the function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// What it is.
    pub kind: Kind,
    /// Its bus, which must be one without a bridge before it: a driver finds others by the bridge.
    pub bus: u8,
    /// Its device, up to 31.
    pub device: u8,
    /// Its function, up to 7.
    pub function: u8,
}

/// What a function is to the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Itself alone.
    Endpoint,
    /// A bridge (a root port, say), with all that is, or comes, behind it.
    Bridge,
}

/// A table that cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DmarError {
    /// No host has so many bits.
    #[error("a host address has 1 to 64 bits, not {0}")]
    HostBits(u8),
    /// Registers lie on a page of their own.
    #[error("the register page at {0:#x} is not at a multiple of 4096")]
    Base(u64),
    /// A device has a number up to 31, a function up to 7.
    #[error("there is no device {0:02x}.{1:x}")]
    Device(u8, u8),
    /// More devices than a structure has room for.
    #[error("{0} devices are too many")]
    TooMany(usize),
}

#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    signature: [u8; 4],
    length: U32,
    revision: u8,
    checksum: u8,
    oem_id: [u8; 6],
    oem_table_id: [u8; 8],
    oem_revision: U32,
    creator_id: [u8; 4],
    creator_revision: U32,
    /// Bits of a host address, less one.
    host_width: u8,
    /// Bit 0: interrupt remapping.
    flags: u8,
    reserved: [u8; 10],
}

/// A DRHD structure, without its devices.
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Unit {
    kind: U16,
    length: U16,
    /// Bit 0: all devices of the segment.
    flags: u8,
    /// Pages of registers, as a power of two.
    size: u8,
    segment: U16,
    base: U64,
}

/// A device scope entry with a path of one step.
#[derive(IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Device {
    /// 1: an endpoint, 2: a bridge and what is behind it.
    kind: u8,
    length: u8,
    reserved: U16,
    enumeration: u8,
    bus: u8,
    device: u8,
    function: u8,
}

const HEADER: usize = size_of::<Header>();
const UNIT: usize = size_of::<Unit>();
const DEVICE: usize = size_of::<Device>();
const _: () = assert!(HEADER == 48 && UNIT == 16 && DEVICE == 8);

impl Dmar {
    /// The table's bytes.
    ///
    /// # Errors
    /// See [`DmarError`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, DmarError> {
        if !(1..=64).contains(&self.host_bits) {
            return Err(DmarError::HostBits(self.host_bits));
        }
        if !self.base.is_multiple_of(4096) {
            return Err(DmarError::Base(self.base));
        }
        let devices: &[_] = match &self.scope {
            Scope::All => &[],
            Scope::Named(devices) => devices,
        };
        if let Some(none) = devices.iter().find(|named| named.device > 31 || named.function > 7) {
            return Err(DmarError::Device(none.device, none.function));
        }
        let too_many = || DmarError::TooMany(devices.len());
        let length = devices.len().checked_mul(DEVICE).and_then(|bytes| bytes.checked_add(UNIT));
        let length = length.and_then(|bytes| u16::try_from(bytes).ok()).ok_or_else(too_many)?;
        let unit = Unit {
            kind: 0.into(),
            length: length.into(),
            flags: u8::from(self.scope == Scope::All),
            size: 0,
            segment: self.segment.into(),
            base: self.base.into(),
        };
        let mut body = unit.as_bytes().to_vec();
        for named in devices {
            let device = Device {
                kind: match named.kind {
                    Kind::Endpoint => 1,
                    Kind::Bridge => 2,
                },
                length: 8,
                reserved: 0.into(),
                enumeration: 0,
                bus: named.bus,
                device: named.device,
                function: named.function,
            };
            body.extend_from_slice(device.as_bytes());
        }
        let all = u32::try_from(body.len().saturating_add(HEADER)).map_err(|_| too_many())?;
        let header = |checksum| Header {
            signature: *b"DMAR",
            length: all.into(),
            revision: 1,
            checksum,
            oem_id: self.oem_id,
            oem_table_id: self.oem_table_id,
            oem_revision: 1.into(),
            creator_id: *b"VIOM",
            creator_revision: 1.into(),
            host_width: self.host_bits.saturating_sub(1),
            flags: 0,
            reserved: [0; 10],
        };
        let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        let checksum = sum(header(0).as_bytes()).wrapping_add(sum(&body)).wrapping_neg();
        let mut table = header(checksum).as_bytes().to_vec();
        table.extend_from_slice(&body);
        Ok(table)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dmar(scope: Scope) -> Dmar {
        Dmar {
            host_bits: 39,
            base: 0xfed9_0000,
            segment: 0,
            scope,
            oem_id: *b"VIOMMU",
            oem_table_id: *b"VIOMDMAR",
        }
    }

    fn named(bus: u8, device: u8, function: u8) -> Named {
        Named { kind: Kind::Endpoint, bus, device, function }
    }

    #[test]
    fn to_bytes_when_all_devices_are_behind_it_is_byte_for_byte() {
        let expected = [
            0x44, 0x4d, 0x41, 0x52, 0x40, 0, 0, 0, 1, 0x14, 0x56, 0x49, 0x4f, 0x4d, 0x4d, 0x55, //
            0x56, 0x49, 0x4f, 0x4d, 0x44, 0x4d, 0x41, 0x52, 1, 0, 0, 0, 0x56, 0x49, 0x4f, 0x4d, //
            1, 0, 0, 0, 0x26, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, //
            0, 0, 0x10, 0, 1, 0, 0, 0, 0, 0, 0xd9, 0xfe, 0, 0, 0, 0,
        ];
        assert_eq!(dmar(Scope::All).to_bytes().unwrap(), expected);
    }

    #[test]
    fn to_bytes_when_devices_are_named_has_an_entry_for_each() {
        let port = Named { kind: Kind::Bridge, ..named(0, 30, 7) };
        let bytes = dmar(Scope::Named(vec![named(0, 2, 0), port])).to_bytes().unwrap();
        assert_eq!(bytes.len(), 80);
        assert_eq!(bytes[48..56], [0, 0, 32, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[64..], [1, 8, 0, 0, 0, 0, 2, 0, 2, 8, 0, 0, 0, 0, 30, 7]);
        assert_eq!(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
    }

    #[test]
    fn to_bytes_when_nothing_can_read_it_refuses() {
        let refused = |change: fn(&mut Dmar)| {
            let mut dmar = dmar(Scope::All);
            change(&mut dmar);
            dmar.to_bytes().unwrap_err()
        };
        assert_eq!(refused(|dmar| dmar.host_bits = 0), DmarError::HostBits(0));
        assert_eq!(refused(|dmar| dmar.base = 0x800), DmarError::Base(0x800));
        let far = |dmar: &mut Dmar| dmar.scope = Scope::Named(vec![named(0, 32, 0)]);
        assert_eq!(refused(far), DmarError::Device(32, 0));
        let many = |dmar: &mut Dmar| dmar.scope = Scope::Named(vec![named(0, 0, 0); 9000]);
        assert_eq!(refused(many), DmarError::TooMany(9000));
    }
}
