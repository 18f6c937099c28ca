//! What endpoints see: contexts that appear, change and vanish; translation on and off.

use std::collections::BTreeMap;
use std::sync::Arc;

use viommu::{AttachErrorKind, Completion, EndpointId, IovaRange, View};

use super::domains::{Key, Kind, Space};
use super::{Control, Inner};
use crate::context::{Context, look_up};
use crate::faults::Known;
use crate::log;
use crate::metrics::bump;
use crate::space::EndpointWalker;

/// An endpoint.
pub(crate) struct Member {
    /// What it was told to see; `None`: nothing in particular, so what all see while translation is off.
    pub(crate) attached: Option<View>,
    /// Without caching mode: who translates for it, in a domain of its own.
    pub(crate) walker: Option<Arc<EndpointWalker>>,
    pub(crate) own: Option<u32>,
}

/// Whose contexts are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    All,
    /// Requesters that are the same under the mask.
    Source {
        source: u16,
        mask: u16,
    },
    /// Those of scalable mode that a PASID entry says.
    Pasids,
    /// The PASID, of any requester; and requests without one, which may have any.
    Pasid(u32),
}

impl Which {
    fn has(self, id: EndpointId) -> bool {
        match self {
            Self::All | Self::Pasids => true,
            Self::Source { source, mask } => {
                u16::try_from(id.requester).is_ok_and(|requester| (requester ^ source) & mask == 0)
            }
            Self::Pasid(pasid) => id.pasid.is_none_or(|own| own == pasid),
        }
    }
}

impl Inner {
    /// An endpoint has come.
    pub(super) fn join(&self, control: &mut Control, id: EndpointId) -> Result<(), AttachErrorKind> {
        let mut member = Member { attached: None, walker: None, own: None };
        if self.config.announces() {
            self.faults.know(id, None);
        } else {
            let walker = Arc::new(EndpointWalker::new(self.shared.clone(), id));
            member.own = Some(self.domain_for(control, id, walker.clone())?);
            self.faults.know(id, Some(Known::Walker(walker.clone())));
            member.walker = Some(walker);
        }
        control.members.insert(id, member);
        let mut done = Completion::ready();
        self.refresh_those(control, &[id], &mut done);
        control.done(done);
        Ok(())
    }

    /// An endpoint goes, and its PASIDs with it.
    pub(super) fn leave(&self, control: &mut Control, id: EndpointId) -> Completion {
        let goes = |other: &EndpointId| *other == id || id.pasid.is_none() && other.requester == id.requester;
        let ids: Vec<_> = control.members.keys().copied().filter(goes).collect();
        for id in ids {
            control.members.remove(&id);
            self.faults.know(id, None);
        }
        let mut done = match self.iommu.endpoint(id).map(viommu::Endpoint::remove) {
            Some(Ok(completion)) => completion,
            Some(Err(error)) => {
                log::trouble("an endpoint stays", &error.kind);
                error.completion
            }
            None => Completion::ready(),
        };
        self.sweep(control, &mut done);
        done
    }

    /// Translation has been switched on or off.
    pub(super) fn switch(&self, control: &mut Control, done: &mut Completion) {
        let on = control.registers.is_translating();
        if on {
            self.faults.set_translates(true);
            self.refresh(control, Which::All, done);
        }
        // What those see who come later; and, when it is switched off, all.
        match self.iommu.set_bypass(!on) {
            Ok(completion) => done.merge(completion),
            Err(error) => {
                log::trouble("bypass stays as it was", &error.kind);
                done.merge(error.completion);
            }
        }
        if !on {
            let ids: Vec<_> = control.members.keys().map(|id| (*id, None)).collect();
            self.move_all(control, &ids, done);
            self.faults.set_translates(false);
            self.sweep(control, done);
        }
    }

    /// Reads contexts again, and brings their endpoints to what they say. Gives whether domains may have mirrors that are
    /// to be filled.
    pub(super) fn refresh(&self, control: &mut Control, which: Which, done: &mut Completion) {
        let ids: Vec<_> = control.members.keys().copied().filter(|id| which.has(*id)).collect();
        self.refresh_those(control, &ids, done);
    }

    fn refresh_those(&self, control: &mut Control, ids: &[EndpointId], done: &mut Completion) {
        if !control.registers.is_translating() {
            return;
        }
        if self.config.announces() {
            self.follow_contexts(control, ids, done);
        } else {
            self.forget_contexts(control, ids, done);
        }
        self.sweep(control, done);
    }

    /// Without caching mode: all that was found out about them.
    fn forget_contexts(&self, control: &mut Control, ids: &[EndpointId], done: &mut Completion) {
        let mut moves = Vec::new();
        for id in ids {
            let Some(member) = control.members.get(id) else { continue };
            if let Some(walker) = &member.walker {
                walker.forget();
            }
            if let Some(space) = member.own.and_then(|own| control.domains.0.get(&own)) {
                match space.domain.invalidate(IovaRange::ALL) {
                    Ok(completion) => done.merge(completion),
                    Err(error) => {
                        log::trouble("an endpoint's translations could not be invalidated", &error.kind);
                        done.merge(error.completion);
                    }
                }
            }
            let to = member.own.map_or(View::Blocked, View::Domain);
            if member.attached != Some(to) {
                moves.push((*id, Some(to)));
            }
        }
        self.move_all(control, &moves, done);
    }

    fn follow_contexts(&self, control: &mut Control, ids: &[EndpointId], done: &mut Completion) {
        let root_table = self.shared.root_table.load(core::sync::atomic::Ordering::Acquire);
        let mut contexts = BTreeMap::new();
        for id in ids {
            let context = look_up(&*self.shared.memory, &self.shared.abilities, root_table, *id);
            contexts.insert(*id, context);
        }
        self.repoint(control, &contexts, done);
        let mut moves = Vec::new();
        for (id, context) in contexts {
            let to = match context {
                Context::Pass => View::Identity,
                Context::Blocked(..) => View::Blocked,
                Context::Paging { did, paging, .. } => match self.domain_of(control, Key { did, paging }) {
                    Ok(number) => View::Domain(number),
                    Err(kind) => {
                        bump(&self.shared.counters.refused_views);
                        log::trouble("there is no domain for an endpoint", &kind);
                        View::Blocked
                    }
                },
            };
            self.faults.know(id, Some(Known::Context(context)));
            if control.members.get(&id).is_some_and(|member| member.attached != Some(to)) {
                moves.push((id, Some(to)));
            }
        }
        self.move_all(control, &moves, done);
    }

    /// Where all endpoints of a domain go to the same new tables, or to another domain id, the domain goes with them: a
    /// mirror keeps what is the same in both.
    fn repoint(
        &self,
        control: &mut Control,
        contexts: &BTreeMap<EndpointId, Context>,
        done: &mut Completion,
    ) {
        let numbers: Vec<u32> = control.domains.0.keys().copied().collect();
        for number in numbers {
            let users = control.members.iter().filter(|(_, m)| m.attached == Some(View::Domain(number)));
            let wanted: Vec<_> = users
                .map(|(id, _)| match contexts.get(id) {
                    Some(Context::Paging { did, paging, .. }) => Some(Key { did: *did, paging: *paging }),
                    _ => None,
                })
                .collect();
            let Some((Some(new), rest)) = wanted.split_first() else { continue };
            if rest.iter().any(|other| *other != Some(*new)) || control.domains.find(*new).is_some() {
                continue;
            }
            let Some(Space { domain, kind: Kind::Tables { key, walker } }) =
                control.domains.0.get_mut(&number)
            else {
                continue;
            };
            *key = *new;
            walker.repoint(new.paging);
            if !self.wants.has_mirror(number)
                && let Ok(completion) = domain.invalidate(IovaRange::ALL)
            {
                done.merge(completion);
                continue;
            }
            control.jobs.compare(number, IovaRange::ALL);
        }
    }

    /// Moves endpoints, together if that is possible. Who cannot be moved is blocked.
    fn move_all(&self, control: &mut Control, moves: &[(EndpointId, Option<View>)], done: &mut Completion) {
        if moves.is_empty() {
            return;
        }
        let note = |control: &mut Control, moves: &[(EndpointId, Option<View>)]| {
            for (id, to) in moves {
                if let Some(member) = control.members.get_mut(id) {
                    member.attached = *to;
                }
            }
        };
        let error = match self.iommu.set_views(moves) {
            Ok(completion) => {
                done.merge(completion);
                return note(control, moves);
            }
            Err(error) => error,
        };
        done.merge(error.completion);
        let mut refused = Vec::new();
        for one in moves {
            match self.iommu.set_views(&[*one]) {
                Ok(completion) => {
                    done.merge(completion);
                    note(control, &[*one]);
                }
                Err(error) => {
                    bump(&self.shared.counters.refused_views);
                    log::trouble("an endpoint cannot see what its context entry says", &error.kind);
                    done.merge(error.completion);
                    refused.push((one.0, Some(View::Blocked)));
                }
            }
        }
        // Together first: some can only be moved so.
        let outcome = match self.iommu.set_views(&refused) {
            Ok(completion) => Ok(completion),
            Err(error) => {
                done.merge(error.completion);
                refused.iter().try_fold(Completion::ready(), |mut all, one| {
                    all.merge(self.iommu.set_views(&[*one])?);
                    Ok(all)
                })
            }
        };
        match outcome {
            Ok(completion) => done.merge(completion),
            Err::<_, viommu::AttachError>(error) => {
                log::trouble("an endpoint cannot be blocked", &error.kind);
                done.merge(error.completion);
            }
        }
        note(control, &refused);
    }
}
