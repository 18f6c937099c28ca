//! Save and restore (L17): what a guest has programmed, versioned. Backing, endpoints and subscribers are the
//! embedder's to bring back first.

use core::ops::ControlFlow;
use std::collections::BTreeSet;

use crate::addr::IovaRange;
use crate::domain::Tables;
use crate::endpoint::{EndpointId, View};
use crate::error::{AttachErrorKind, StepErrorKind};
use crate::iommu::{EndpointConfig, Iommu, ResetKind};
use crate::mapping::Mapping;
use crate::quiesce::completion::Completion;
use crate::sync::lock;

/// The version that [`Iommu::save`] writes. [`Iommu::restore`] takes this and all before it.
pub const STATE_VERSION: u32 = 1;

/// What a guest has programmed. Serialisable with feature `serde`; fields that later versions add have defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Saved {
    /// [`STATE_VERSION`] of who saved it.
    pub version: u32,
    /// What unattached endpoints see.
    pub bypass: bool,
    /// In order of number.
    pub domains: Vec<SavedDomain>,
    /// In order of id.
    pub endpoints: Vec<SavedEndpoint>,
}

/// One domain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedDomain {
    /// Its number.
    pub id: u32,
    /// Whose its tables are.
    pub tables: SavedTables,
    /// Ascending and disjoint. For tables in guest memory: what has been announced.
    pub mappings: Vec<Mapping>,
}

/// As [`Tables`], without what cannot be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum SavedTables {
    /// [`Tables::Owned`].
    Owned,
    /// [`Tables::OwnedCut`].
    OwnedCut,
    /// [`Tables::Walked`].
    Walked,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct SavedEndpoint {
    /// Its id.
    pub id: EndpointId,
    /// What the guest has attached it to.
    pub attached: Option<View>,
}

/// The unit cannot be saved now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SaveError {
    /// Answers to the guest are still out: let their completions resolve first.
    #[error("{0} completions are pending")]
    Pending(usize),
}

/// The state cannot be restored. Nothing of it is left: the unit is as after a system reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// It was saved by a later version.
    #[error("state of version {0}; this is version {STATE_VERSION}")]
    Version(u32),
    /// The unit has domains already. Nothing has changed.
    #[error("the unit is not empty")]
    NotEmpty,
    /// An endpoint is named twice.
    #[error("{0} is there twice")]
    Twice(EndpointId),
    /// A domain could not be made.
    #[error("domain {id}: {kind}")]
    Domain {
        /// Its number.
        id: u32,
        /// Why.
        kind: AttachErrorKind,
    },
    /// A mapping could not be made.
    #[error("domain {domain}: {kind}")]
    Mapping {
        /// The domain's number.
        domain: u32,
        /// Why.
        kind: StepErrorKind,
    },
    /// A view could not be restored: an endpoint is missing, or a subscriber refused.
    #[error(transparent)]
    Views(AttachErrorKind),
}

impl Iommu {
    /// Saves what the guest has programmed. The virtual machine is stopped, and all completions have resolved.
    ///
    /// # Errors
    /// [`SaveError::Pending`].
    pub fn save(&self) -> Result<Saved, SaveError> {
        let control = lock(&self.unit.control);
        let pending = self.unit.outstanding(&control);
        if pending != 0 {
            return Err(SaveError::Pending(pending));
        }
        let domains = control.domains.iter().map(|(id, domain)| {
            let state = lock(&domain.state);
            let mut mappings = Vec::with_capacity(state.writer.len());
            state.writer.for_each(IovaRange::ALL, &mut |m| {
                mappings.push(m);
                ControlFlow::Continue(())
            });
            let tables = match (domain.walker.is_some(), state.may_cut) {
                (true, _) => SavedTables::Walked,
                (false, true) => SavedTables::OwnedCut,
                (false, false) => SavedTables::Owned,
            };
            SavedDomain { id: *id, tables, mappings }
        });
        let endpoints = control.endpoints.iter();
        Ok(Saved {
            version: STATE_VERSION,
            bypass: control.bypass,
            domains: domains.collect(),
            endpoints: endpoints.map(|(id, m)| SavedEndpoint { id: *id, attached: m.attached }).collect(),
        })
    }

    /// Restores what a guest had programmed, before it runs: the ordinary way, so that every cap holds and every
    /// subscriber is filled. `tables` gives the tables of a domain that lie in guest memory; it is not asked for others.
    /// PASIDs of endpoints that are there are added.
    ///
    /// # Errors
    /// See [`RestoreError`]: all or nothing.
    pub fn restore(
        &self,
        saved: &Saved,
        mut tables: impl FnMut(u32) -> Tables,
    ) -> Result<Completion, RestoreError> {
        if saved.version > STATE_VERSION {
            return Err(RestoreError::Version(saved.version));
        }
        if !self.domains().is_empty() {
            return Err(RestoreError::NotEmpty);
        }
        self.restore_all(saved, &mut tables).inspect_err(|_| {
            // Whoever was filled is emptied again; the guest has not run, so nobody waits for that.
            if let Err(error) = self.reset(ResetKind::System) {
                drop(error.completion);
            }
        })
    }

    fn restore_all(
        &self,
        saved: &Saved,
        tables: &mut dyn FnMut(u32) -> Tables,
    ) -> Result<Completion, RestoreError> {
        // Taken apart without `..`: a field that a later version adds must be thought of here.
        let Saved { version: _, bypass, domains, endpoints } = saved;
        let mut done = self.set_bypass(*bypass).map_err(|error| RestoreError::Views(error.kind))?;
        for SavedDomain { id, tables: kind, mappings } in domains {
            let tables = match kind {
                SavedTables::Owned => Tables::Owned,
                SavedTables::OwnedCut => Tables::OwnedCut,
                SavedTables::Walked => tables(*id),
            };
            let domain = self.create_domain(*id, tables);
            let domain = domain.map_err(|error| RestoreError::Domain { id: *id, kind: error.kind })?;
            for mapping in mappings {
                let step = domain.map(*mapping);
                done.merge(step.map_err(|error| RestoreError::Mapping { domain: *id, kind: error.kind })?);
            }
        }
        let mut moves: Vec<(EndpointId, Option<View>)> = Vec::new();
        let mut seen = BTreeSet::new();
        for SavedEndpoint { id, attached } in endpoints {
            if !seen.insert(*id) {
                return Err(RestoreError::Twice(*id));
            }
            let requester = EndpointId::new(id.requester);
            if id.pasid.is_some() && self.endpoint(*id).is_none() && self.endpoint(requester).is_some() {
                let added = self.add_endpoint(*id, EndpointConfig::default());
                added.map_err(|error| RestoreError::Views(error.kind))?;
            }
            moves.push((*id, *attached));
        }
        done.merge(self.set_views(&moves).map_err(|error| RestoreError::Views(error.kind))?);
        Ok(done)
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;
    use crate::addr::{Gpa, Iova};
    use crate::mapping::Access;

    fn unit() -> Iommu {
        let iommu = Iommu::builder().ram(0, 1 << 30).build().unwrap();
        iommu.add_endpoint(1, EndpointConfig::default()).unwrap();
        iommu.add_endpoint(2, EndpointConfig::default()).unwrap();
        iommu
    }

    fn programmed() -> Saved {
        let iommu = unit();
        iommu.set_bypass(true).unwrap().wait().unwrap();
        let domain = iommu.create_domain(7, Tables::Owned).unwrap();
        for at in 0..3_u64 {
            let m = Mapping::new(Iova(at << 20), 0x3000, Gpa(0x10_0000 + (at << 16)), Access::RW).unwrap();
            domain.map(m).unwrap().wait().unwrap();
        }
        iommu.endpoint(1).unwrap().attach(7).unwrap().wait().unwrap();
        iommu.save().unwrap()
    }

    #[test]
    fn restore_gives_what_was_saved() {
        let saved = programmed();
        let iommu = unit();
        iommu.restore(&saved, |_| Tables::Owned).unwrap().wait().unwrap();
        assert_eq!(iommu.save().unwrap(), saved);
        assert_eq!(iommu.endpoint(1).unwrap().view(), Some(View::Domain(7)));
        assert_eq!(iommu.endpoint(2).unwrap().view(), Some(View::Identity));
    }

    #[test]
    fn restore_refuses_as_a_whole() {
        let mut saved = programmed();
        let again = saved.domains[0].mappings[0];
        saved.domains[0].mappings.push(again);
        let iommu = unit();
        let error = iommu.restore(&saved, |_| Tables::Owned).unwrap_err();
        assert!(matches!(error, RestoreError::Mapping { domain: 7, kind: StepErrorKind::Overlap { .. } }));
        assert!(iommu.domains().is_empty());
        assert_eq!(iommu.endpoint(1).unwrap().view(), Some(View::Blocked));

        let mut saved = programmed();
        saved.endpoints.push(SavedEndpoint { id: EndpointId::new(9), attached: Some(View::Domain(7)) });
        let error = iommu.restore(&saved, |_| Tables::Owned).unwrap_err();
        assert!(matches!(error, RestoreError::Views(AttachErrorKind::NoEndpoint(_))));
        assert!(iommu.domains().is_empty());
    }

    #[test]
    fn save_waits_for_completions() {
        let iommu = unit();
        let domain = iommu.create_domain(7, Tables::Owned).unwrap();
        iommu.endpoint(1).unwrap().attach(7).unwrap().wait().unwrap();
        let m = Mapping::new(Iova(0), 0x1000, Gpa(0), Access::RW).unwrap();
        domain.map(m).unwrap().wait().unwrap();
        let mut reader = iommu.endpoint(1).unwrap().reader("worker").unwrap();
        let guard = reader.enter();
        let done = domain.unmap(m.range).unwrap();
        assert_eq!(iommu.save(), Err(SaveError::Pending(1)));
        drop(guard);
        done.wait().unwrap();
        assert!(iommu.save().is_ok());
    }

    #[cfg(feature = "serde")]
    #[test]
    fn saved_state_survives_json() {
        let saved = programmed();
        let text = serde_json::to_string(&saved).unwrap();
        assert_eq!(serde_json::from_str::<Saved>(&text).unwrap(), saved);
        let wrong = text.replacen("\"version\":1", "\"version\":2", 1);
        let wrong: Saved = serde_json::from_str(&wrong).unwrap();
        assert!(matches!(unit().restore(&wrong, |_| Tables::Owned), Err(RestoreError::Version(2))));
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_range_that_ends_below_its_start_is_not_read() {
        assert!(serde_json::from_str::<IovaRange>("[4096, 4095]").is_err());
        assert_eq!(serde_json::from_str::<IovaRange>("[0, 18446744073709551615]").unwrap(), IovaRange::ALL);
    }
}
