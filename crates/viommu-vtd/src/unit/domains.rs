//! Domains of the record: one for each set of page tables and domain id, or, without caching mode, for each endpoint.

use std::collections::BTreeMap;
use std::sync::Arc;

use viommu::{AttachErrorKind, Completion, Domain, EndpointId, Tables};

use super::{Control, Inner};
use crate::log;
use crate::paging::Paging;
use crate::space::{EndpointWalker, TableWalker};

/// What a guest tells domains apart by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Key {
    pub(crate) did: u16,
    pub(crate) paging: Paging,
}

/// By number in the record.
#[derive(Default)]
pub(crate) struct Domains(pub(crate) BTreeMap<u32, Space>);

pub(crate) struct Space {
    pub(crate) domain: Domain,
    pub(crate) kind: Kind,
}

pub(crate) enum Kind {
    /// Tables that any number of endpoints use.
    Tables { key: Key, walker: Arc<TableWalker> },
    /// Whatever the context of the endpoint says.
    Endpoint { walker: Arc<EndpointWalker> },
}

impl Domains {
    pub(crate) fn find(&self, key: Key) -> Option<u32> {
        let is = |space: &Space| matches!(&space.kind, Kind::Tables { key: own, .. } if *own == key);
        self.0.iter().find(|(_, space)| is(space)).map(|(number, _)| *number)
    }

    /// A number that is free: the domain id, where that is.
    fn number(&self, like: u32) -> u32 {
        let mut number = like;
        while self.0.contains_key(&number) {
            number = number.wrapping_add(1 << 16);
            if number == like {
                // More than the record has room for: it says so.
                break;
            }
        }
        number
    }
}

impl Inner {
    /// The domain of `key`, made if it is not there.
    pub(super) fn domain_of(&self, control: &mut Control, key: Key) -> Result<u32, AttachErrorKind> {
        if let Some(number) = control.domains.find(key) {
            return Ok(number);
        }
        let walker = Arc::new(TableWalker::new(self.shared.clone(), key.paging));
        let tables = Tables::Walked { walker: walker.clone(), caching_mode: true };
        self.make(control, u32::from(key.did), tables, Kind::Tables { key, walker })
    }

    /// The domain of one endpoint.
    pub(super) fn domain_for(
        &self,
        control: &mut Control,
        id: EndpointId,
        walker: Arc<EndpointWalker>,
    ) -> Result<u32, AttachErrorKind> {
        let tables = Tables::Walked { walker: walker.clone(), caching_mode: false };
        self.make(control, id.requester, tables, Kind::Endpoint { walker })
    }

    fn make(
        &self,
        control: &mut Control,
        like: u32,
        tables: Tables,
        kind: Kind,
    ) -> Result<u32, AttachErrorKind> {
        let number = control.domains.number(like);
        let domain = self.iommu.create_domain(number, tables).map_err(|error| error.kind)?;
        control.domains.0.insert(number, Space { domain, kind });
        Ok(number)
    }

    /// Ends the domains that no endpoint uses.
    pub(super) fn sweep(&self, control: &mut Control, done: &mut Completion) {
        let members = &control.members;
        let unused: Vec<u32> = control
            .domains
            .0
            .keys()
            .copied()
            .filter(|number| {
                let uses = |member: &super::Member| {
                    member.attached == Some(viommu::View::Domain(*number)) || member.own == Some(*number)
                };
                !members.values().any(uses)
            })
            .collect();
        for number in unused {
            control.domains.0.remove(&number);
            match self.iommu.destroy_domain(number) {
                Ok(completion) => done.merge(completion),
                Err(error) => log::trouble("a domain without endpoints is still in use", &error.kind),
            }
        }
    }
}
