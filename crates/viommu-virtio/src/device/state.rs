//! Save and restore. The rings' own state is the transport's; see [`RequestQueue::queue_mut`].
//!
//! [`RequestQueue::queue_mut`]: crate::RequestQueue::queue_mut

use viommu::endpoint::Region;
use viommu::state::SavedTables;
use viommu::{Completion, Mapping, Tables, View};
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use super::{Control, GuestDomain, Kind, VirtioIommu, granule};
use crate::journal::Entry;
use crate::spec::{Features, event};

/// The version that [`VirtioIommu::save`] writes. [`VirtioIommu::restore`] takes this and all before it.
pub const STATE_VERSION: u32 = 1;

/// What a guest has programmed and may know. Serialisable with feature `serde`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Saved {
    /// [`STATE_VERSION`] of who saved it.
    pub version: u32,
    /// Bypass, domains, mappings and views.
    pub record: viommu::Saved,
    /// Features that were negotiated.
    pub negotiated: u64,
    /// The page sizes that the driver may have read.
    pub page_size_mask: u64,
    /// Whether it may have.
    pub frozen: bool,
    /// In order of number.
    pub members: Vec<SavedMember>,
    /// Fault reports that wait for a buffer, as they lie in memory.
    pub events: Vec<[u8; event::SIZE]>,
}

/// What the driver knows of an endpoint, and where it has attached it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedMember {
    /// Its number.
    pub endpoint: u32,
    /// The number of its domain, of a bypass domain too.
    pub domain: Option<u32>,
    /// What a PROBE has said or will say.
    pub regions: Vec<Region>,
}

/// The device cannot be saved now: wait until the queue has nothing pending.
pub use viommu::SaveError;

/// The state cannot be restored. The device is as after a system reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// It was saved by a later version.
    #[error("state of version {0}; this is version {STATE_VERSION}")]
    Version(u32),
    /// An endpoint of the state is not here, or one here is not in the state, or is there twice.
    #[error("endpoint {0} is not on both sides")]
    Endpoint(u32),
    /// The driver knows other regions than the endpoint has here.
    #[error("the regions of endpoint {0} differ")]
    Regions(u32),
    /// The driver may use smaller pages than can be mapped here.
    #[error("pages of {saved:#x} bytes are in use, and the smallest that can be mapped here is {here:#x}")]
    PageSize {
        /// Bytes.
        saved: u64,
        /// Bytes.
        here: u64,
    },
    /// The driver has negotiated what is not offered here.
    #[error("features {0:?} are negotiated and not offered here")]
    Features(Features),
    /// A domain, a mapping or a report is not one that this device could have made.
    #[error("{0}")]
    Invalid(&'static str),
    /// The record could not be restored.
    #[error(transparent)]
    Record(#[from] viommu::RestoreError),
}

impl VirtioIommu {
    /// Saves what the guest has programmed and may know. The virtual machine is stopped, and nothing is pending in the
    /// request queue.
    ///
    /// # Errors
    /// [`SaveError::Pending`].
    pub fn save(&self) -> Result<Saved, SaveError> {
        let control = self.lock();
        let record = self.iommu().save()?;
        let members = control.members.iter().map(|(id, member)| SavedMember {
            endpoint: *id,
            domain: control.attached.get(id).copied(),
            regions: member.regions.clone(),
        });
        let bytes = |fault: event::Fault| {
            let mut bytes = [0; event::SIZE];
            bytes.copy_from_slice(fault.as_bytes());
            bytes
        };
        Ok(Saved {
            version: STATE_VERSION,
            record,
            negotiated: control.negotiated.bits(),
            page_size_mask: control.page_size_mask,
            frozen: control.frozen,
            members: members.collect(),
            events: self.faults().save().into_iter().map(bytes).collect(),
        })
    }

    /// Restores a device that has the same endpoints and no domains, before the guest runs. Subscribers are filled the
    /// ordinary way. Nothing in `saved` is trusted.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(&self, saved: &Saved) -> Result<Completion, RestoreError> {
        // Taken apart without `..`: a field that a later version adds must be thought of here.
        let Saved { version, record, negotiated, page_size_mask, frozen, members, events } = saved;
        if *version > STATE_VERSION {
            return Err(RestoreError::Version(*version));
        }
        let mut control = self.lock();
        let negotiated = Features::from_bits_retain(*negotiated);
        let unknown = negotiated.difference(self.features());
        if !unknown.is_empty() {
            return Err(RestoreError::Features(unknown));
        }
        let (saved, here) = (granule(*page_size_mask), granule(control.page_size_mask));
        if saved < here {
            return Err(RestoreError::PageSize { saved, here });
        }
        check_members(&control, members)?;
        self.check_record(record, members, saved)?;
        let reports = events.iter().map(|bytes| event::Fault::read_from_bytes(bytes));
        let reports: Vec<_> = reports.filter_map(Result::ok).collect();
        let reserved = |report: &event::Fault| report.reserved != [0; 3] || report.reserved1.get() != 0;
        if reports.iter().any(reserved) {
            return Err(RestoreError::Invalid("a fault report that this device does not make"));
        }
        let done = self.iommu().restore(record, |_| Tables::Owned)?;
        control.negotiated = negotiated;
        control.page_size_mask = *page_size_mask;
        control.frozen = *frozen;
        for member in members {
            let Some(id) = member.domain else { continue };
            control.attached.insert(member.endpoint, id);
            let kind = self.iommu().domain(id).map_or(Kind::Bypass, Kind::Paged);
            let domain = control.domains.entry(id).or_insert(GuestDomain { kind, endpoints: 0 });
            domain.endpoints = domain.endpoints.saturating_add(1);
        }
        self.note(|| Entry::Bypass { on: self.iommu().bypass() });
        control.for_each_attached(|entry| self.note(|| entry));
        drop(control);
        self.faults().restore(reports);
        Ok(done)
    }

    /// Whether the record is one that requests could have made.
    fn check_record(
        &self,
        record: &viommu::Saved,
        members: &[SavedMember],
        granule: u64,
    ) -> Result<(), RestoreError> {
        let config = self.config();
        let domain_of = |id| members.iter().find(|member| member.endpoint == id)?.domain;
        for endpoint in record.endpoints.iter().filter(|endpoint| endpoint.id.pasid.is_none()) {
            let paged = |id| record.domains.iter().any(|domain| domain.id == id);
            let fits = match (endpoint.attached, domain_of(endpoint.id.requester)) {
                (None | Some(View::Blocked), None) => true,
                (Some(View::Identity), Some(id)) => !paged(id) && config.domain_range.contains(&id),
                (Some(View::Domain(seen)), Some(id)) => seen == id,
                _ => false,
            };
            if !fits {
                return Err(RestoreError::Invalid("an endpoint does not see its domain"));
            }
        }
        for domain in &record.domains {
            let used = members.iter().any(|member| member.domain == Some(domain.id));
            if !used || domain.tables != SavedTables::Owned || !config.domain_range.contains(&domain.id) {
                return Err(RestoreError::Invalid("a domain that requests could not have made"));
            }
            let fits = |m: &Mapping| {
                m.range.is_aligned(granule)
                    && m.gpa.0 & granule.wrapping_sub(1) == 0
                    && config.input_range.covers(m.range)
            };
            if !domain.mappings.iter().all(fits) {
                return Err(RestoreError::Invalid("a mapping that requests could not have made"));
            }
        }
        Ok(())
    }
}

/// The same endpoints on both sides, with the same regions.
fn check_members(control: &Control, members: &[SavedMember]) -> Result<(), RestoreError> {
    let mut missing: Vec<u32> = control.members.keys().copied().collect();
    for member in members {
        let at = missing.iter().position(|id| *id == member.endpoint);
        missing.swap_remove(at.ok_or(RestoreError::Endpoint(member.endpoint))?);
        let here = control.members.get(&member.endpoint).map(|here| &here.regions);
        if here != Some(&member.regions) {
            return Err(RestoreError::Regions(member.endpoint));
        }
    }
    missing.first().map_or(Ok(()), |id| Err(RestoreError::Endpoint(*id)))
}
