//! The live state of what is served, as the control socket gives it: one JSON object.
//!
//! Addresses are texts in hexadecimal, since JSON's readers lose bits of large numbers. Ranges are inclusive at both
//! ends. Times are nanoseconds; what has a time of its own is dated since the server's start.

pub(crate) mod gather;
mod histogram;

use core::fmt;
use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub(crate) use gather::nanos;
pub(crate) use histogram::Histogram;

/// Everything at one time. Parts are read one after the other: while the guest runs they may be of different moments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    /// The program's.
    pub(crate) version: String,
    /// The server's process.
    pub(crate) pid: u32,
    /// Since the server's start.
    pub(crate) uptime_ns: u64,
    /// `None`: devices reach all of memory.
    pub(crate) iommu: Option<Iommu>,
    /// The devices behind it, by address.
    pub(crate) endpoints: Vec<Endpoint>,
}

/// A PCI function that is offered on a socket.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Function {
    /// Bus, device, function: `00:02.0`.
    pub(crate) address: String,
    /// What it is, as in the options: `blk:disk.img`. The IOMMU is `virtio-iommu`.
    pub(crate) device: String,
    /// The path of its socket.
    pub(crate) socket: String,
    /// A virtual machine monitor is at the other end.
    pub(crate) connected: bool,
    /// Clients that it has had.
    pub(crate) connections: u64,
    /// The guest's driver has said that it is ready, and nothing has been reset since.
    pub(crate) driver_ready: bool,
    /// Feature bits that were negotiated.
    pub(crate) features: Hex,
    /// Guest memory that came over its socket.
    pub(crate) memory: Windows,
    /// Requests by the time from the kick that reached the process to the used ring, if it has such.
    pub(crate) request_times: Option<Histogram>,
    /// What the device itself counts: reads, bytes and the like.
    pub(crate) counters: BTreeMap<String, u64>,
}

/// Guest memory that a client has given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Windows {
    /// Regions that are mapped.
    pub(crate) windows: u64,
    /// Bytes of them.
    pub(crate) bytes: u64,
    /// Regions that came without a descriptor, or with one that is not taken: no device reaches them.
    pub(crate) refused: u64,
}

/// A device behind the IOMMU, or without one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    /// Where it is, and its state.
    #[serde(flatten)]
    pub(crate) function: Function,
    /// Its number at the IOMMU.
    pub(crate) id: u32,
    /// What it sees.
    pub(crate) view: View,
    /// Its device has been cut off.
    pub(crate) fenced: bool,
    /// Batches of translations (guards of its readers) since the start. Translations themselves are not counted, since
    /// that would cost each of them.
    pub(crate) batches: u64,
}

/// What an endpoint sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum View {
    /// Nothing.
    #[default]
    Blocked,
    /// All of memory, through the IOMMU.
    Identity,
    /// The domain of that number.
    Domain(u32),
    /// All of memory: there is no IOMMU.
    Untranslated,
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blocked => f.pad("blocked"),
            Self::Identity => f.pad("identity"),
            Self::Domain(id) => f.pad(&format!("domain {id}")),
            Self::Untranslated => f.pad("no IOMMU"),
        }
    }
}

/// The IOMMU and its record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Iommu {
    /// The function that the guest's driver uses.
    #[serde(flatten)]
    pub(crate) function: Function,
    /// What endpoints see that are attached to nothing.
    pub(crate) bypass: bool,
    /// By number.
    pub(crate) domains: Vec<Domain>,
    /// Answers since the start, by request and status; only what there has been.
    pub(crate) requests: Vec<Requests>,
    /// Requests that could not be read or answered.
    pub(crate) malformed: u64,
    /// UNMAPs by the time until their answer: how long nothing was allowed to use what they took away.
    pub(crate) unmap_times: Histogram,
    /// Completions that have not resolved yet: answers that the guest waits for.
    pub(crate) outstanding: u64,
    /// Accesses that reached nothing.
    pub(crate) faults: Faults,
    /// Bytes of tables of all domains.
    pub(crate) table_bytes: u64,
    /// Of a VT-d unit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) vtd: Option<VtdState>,
}

/// What there is of a VT-d unit alone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VtdState {
    /// What it offers: `legacy` mode alone, or scalable mode with tables of the `second-stage` or the `first-stage`.
    pub(crate) mode: String,
    /// The driver announces new entries (but those of first-stage tables), so that the record can follow its tables.
    pub(crate) caching_mode: bool,
    /// Where firmware has put the registers, since the last reset.
    pub(crate) registers: Option<Hex>,
    /// Where the ACPI table says that they are.
    pub(crate) in_table: Option<Hex>,
    /// The path of the table.
    pub(crate) table: String,
}

/// A domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Domain {
    /// Its number.
    pub(crate) id: u32,
    /// Endpoints that see it.
    pub(crate) endpoints: Vec<u32>,
    /// How many mappings there are: in the record, or, where that does not follow the guest's tables, in those.
    pub(crate) live: u64,
    /// Bytes of its tables.
    pub(crate) table_bytes: u64,
    /// All that are in the record, ascending, if they were asked for. They are of one moment. `None` where the record does
    /// not follow the guest's tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mappings: Option<Vec<Mapping>>,
    /// All that are in the tables that the guest has in its memory, if it has such and they were asked for. The guest may
    /// change them meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tables: Option<Vec<Mapping>>,
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mapping {
    /// The first address.
    pub(crate) start: Hex,
    /// The last one.
    pub(crate) last: Hex,
    /// What the first address translates to.
    pub(crate) gpa: Hex,
    /// What devices may do.
    pub(crate) access: Access,
    /// It is device registers and not memory.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub(crate) mmio: bool,
}

/// What a device may do, or did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Access {
    /// Nothing.
    #[default]
    #[serde(rename = "-")]
    None,
    /// It may read.
    #[serde(rename = "r")]
    Read,
    /// It may write.
    #[serde(rename = "w")]
    Write,
    /// Both.
    #[serde(rename = "rw")]
    Both,
}

impl From<viommu::Access> for Access {
    fn from(access: viommu::Access) -> Self {
        match (access.contains(viommu::Access::READ), access.contains(viommu::Access::WRITE)) {
            (false, false) => Self::None,
            (true, false) => Self::Read,
            (false, true) => Self::Write,
            (true, true) => Self::Both,
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::None => "-",
            Self::Read => "r",
            Self::Write => "w",
            Self::Both => "rw",
        })
    }
}

/// How often a request was answered with a status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Requests {
    /// `MAP` and the like.
    pub(crate) request: String,
    /// `OK` and the like.
    pub(crate) status: String,
    /// Since the start.
    pub(crate) count: u64,
}

/// Accesses that reached nothing, since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Faults {
    /// By endpoints that are attached to nothing.
    pub(crate) domain: u64,
    /// To what is not mapped so.
    pub(crate) mapping: u64,
    /// For a reason of the host's.
    pub(crate) unknown: u64,
    /// Reports that wait for a buffer of the guest's.
    pub(crate) pending: u64,
    /// Reports that the guest has got.
    pub(crate) reported: u64,
    /// Reports that are lost: too many at a time.
    pub(crate) lost: u64,
    /// The last ones, oldest first.
    pub(crate) recent: Vec<Fault>,
}

impl Faults {
    /// Of any reason.
    pub(crate) fn total(&self) -> u64 {
        self.domain.saturating_add(self.mapping).saturating_add(self.unknown)
    }
}

/// An access that reached nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fault {
    /// Since the server's start.
    pub(crate) at_ns: u64,
    /// The endpoint's number.
    pub(crate) endpoint: u32,
    /// Where.
    pub(crate) iova: Hex,
    /// What it tried.
    pub(crate) access: Access,
    /// `blocked`, `unmapped`, `permission` and the like.
    pub(crate) reason: String,
}

impl Iommu {
    /// Answers to that request, of any status.
    pub(crate) fn answers(&self, request: &str) -> u64 {
        self.requests.iter().filter(|row| row.request == request).map(|row| row.count).sum()
    }

    /// Answers to that request that were not `OK`.
    pub(crate) fn refusals(&self, request: &str) -> u64 {
        let refused = self.requests.iter().filter(|row| row.request == request && row.status != "OK");
        refused.map(|row| row.count).sum()
    }

    /// Mappings of all domains.
    pub(crate) fn live(&self) -> u64 {
        self.domains.iter().map(|domain| domain.live).sum()
    }
}

impl Snapshot {
    /// The address of an endpoint, or its number if it is gone.
    pub(crate) fn name_of(&self, id: u32) -> String {
        let known = self.endpoints.iter().find(|endpoint| endpoint.id == id);
        known.map_or_else(
            || match u16::try_from(id) {
                Ok(id) => viommu_virtio::viot::Bdf(id).to_string(),
                Err(_) => id.to_string(),
            },
            |endpoint| endpoint.function.address.clone(),
        )
    }
}

/// A number that JSON has as a text: `0x1000`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Hex(pub(crate) u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x");
        let number = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        number.map(Self).ok_or_else(|| serde::de::Error::custom(format!("{text:?} is no number")))
    }
}

#[cfg(test)]
pub(crate) mod tests;
