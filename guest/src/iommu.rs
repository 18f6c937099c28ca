//! The IOMMU of a case: what the server and the guest's kernel are told, and how the guest tells of it.

/// What the guest's driver finds, and how it uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Iommu {
    model: Model,
    /// Linux tells of each unmap at once; else of many together, later. A VT-d unit has caching mode then.
    strict: bool,
}

/// Tables of a VT-d unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tables {
    /// Of legacy mode.
    Legacy,
    /// Of scalable mode, of the second stage.
    Second,
    /// Of scalable mode, of the first stage: new entries are not announced.
    First,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Model {
    Virtio,
    /// Intel VT-d.
    Vtd(Tables),
}

impl Iommu {
    pub(crate) const VIRTIO: Self = Self { model: Model::Virtio, strict: true };
    pub(crate) const VIRTIO_LAZY: Self = Self { strict: false, ..Self::VIRTIO };
    pub(crate) const VTD: Self = Self { model: Model::Vtd(Tables::Legacy), ..Self::VIRTIO };
    pub(crate) const VTD_LAZY: Self = Self { strict: false, ..Self::VTD };
    pub(crate) const VTD_SECOND: Self = Self { model: Model::Vtd(Tables::Second), ..Self::VIRTIO };
    pub(crate) const VTD_FIRST: Self = Self { model: Model::Vtd(Tables::First), ..Self::VIRTIO };

    pub(crate) fn is_vtd(self) -> bool {
        matches!(self.model, Model::Vtd(_))
    }

    /// Options of `viommu serve`.
    pub(crate) fn options(self) -> Vec<String> {
        let caching_mode = if self.strict { "on" } else { "off" };
        let tables = match self.model {
            Model::Virtio => return Vec::new(),
            Model::Vtd(Tables::Legacy) => "",
            Model::Vtd(Tables::Second) => ",scalable=second-stage",
            Model::Vtd(Tables::First) => ",scalable=first-stage",
        };
        vec!["--iommu".to_owned(), format!("vtd@00:01.0,caching-mode={caching_mode}{tables}")]
    }

    /// Words of the kernel's command line.
    pub(crate) fn words(self) -> String {
        let model = match self.model {
            Model::Virtio => "unit=virtio",
            Model::Vtd(_) => "unit=vtd intel_iommu=on",
        };
        format!("{model} iommu.strict={}", u8::from(self.strict))
    }

    /// What Linux calls the domain of a group that it translates.
    pub(crate) fn group(self) -> &'static str {
        if self.strict { "DMA" } else { "DMA-FQ" }
    }

    /// Whether the server's record follows what the guest maps when it is told to write a history.
    pub(crate) fn records(self) -> bool {
        self.model == Model::Virtio || self.strict && self.model != Model::Vtd(Tables::First)
    }

    /// Whether endpoints of one group share a domain of the record.
    pub(crate) fn shares(self) -> bool {
        self.records()
    }

    /// What is in the guest's log, whatever its kernel, of a write by the device at `address` that was blocked at `iova`.
    pub(crate) fn blocked_write(self, address: &str, iova: u64) -> String {
        match self.model {
            Model::Virtio => format!("page fault from EP {} at {iova:#x}", requester(address)),
            Model::Vtd(tables) => {
                // In scalable mode, each stage has a reason of its own for an entry that allows nothing.
                let reason = match tables {
                    Tables::Second => "0x79",
                    Tables::First => "0x71",
                    Tables::Legacy => "0x05",
                };
                format!("{address}] fault addr {iova:#x} [fault reason {reason}]")
            }
        }
    }
}

/// The number of a function of bus 00 as an endpoint: 24 of 00:03.0.
fn requester(address: &str) -> u32 {
    let (device, function) = address.trim_start_matches("00:").split_once('.').unwrap_or((address, "0"));
    let number = |text: &str| u32::from_str_radix(text, 16).unwrap_or(0);
    number(device) << 3 | number(function)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocked_write_names_the_device_as_each_driver_does() {
        let virtio = Iommu::VIRTIO.blocked_write("00:03.0", 0x80_0000);
        assert_eq!(virtio, "page fault from EP 24 at 0x800000");
        assert!(Iommu::VTD.blocked_write("00:03.1", 0x80_0000).starts_with("00:03.1] fault addr 0x800000 "));
        assert_eq!((requester("00:1e.7"), requester("00:03.0")), (0xf7, 24));
    }
}
