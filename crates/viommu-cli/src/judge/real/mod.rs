//! Real interfaces that follow an endpoint besides the software consumers: a device of this machine's, or of another process,
//! gets what the endpoint's domain has.
//!
//! What a bypassed endpoint sees, all of memory, is not mapped there: a history does not say how much that is. So a mirror
//! follows the domain that the endpoint is in, from when it comes to when it goes.

mod interface;
mod memory;
mod watched;

use std::sync::{Arc, Mutex};

use serde::Serialize;
use viommu::subscribe::{Bound, Reach, Space};
use viommu::{Interest, Iommu, Mapping, Subscription, Target, View};

use super::told::lock;
use super::world::Judge;
use interface::Host;
pub(crate) use interface::Interface;
use memory::Ram;
use watched::{Seen, Watched};

/// Which endpoint is followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    /// One of the domain that gets the first mapping.
    First,
    /// The one that a domain has, or turns out to have.
    Of(u32),
    Endpoint(u32),
}

/// All interfaces, and the endpoint where their devices are.
pub(crate) struct Reals {
    all: Vec<Real>,
    whose: Whose,
}

/// One interface.
struct Real {
    interface: Interface,
    host: Host,
    memory: Ram,
    /// What the host had room for when nothing was mapped.
    room: Option<u32>,
    now: Option<Following>,
    /// Domains that were followed.
    domains: u64,
    /// A mirror was fenced, and none has followed it.
    is_over: bool,
    /// The domain that it could not come to: not tried again until its endpoint is elsewhere.
    shunned: Option<u32>,
    /// Where it was at the history's end, and how much it held.
    last: Option<(u32, u64)>,
    seen: Arc<Mutex<Seen>>,
}

/// A domain that is followed.
struct Following {
    /// As the record numbers it.
    number: u32,
    subscription: Subscription,
    reach: Reach,
    /// Refusals that have been looked at.
    looked: u64,
}

/// What came of one, as JSON has it.
#[derive(Debug, Serialize)]
pub(crate) struct RealLine {
    pub(crate) interface: String,
    pub(crate) endpoint: Option<u32>,
    pub(crate) domain: Option<u32>,
    pub(crate) domains: u64,
    pub(crate) map: u64,
    pub(crate) unmap: u64,
    pub(crate) held: u64,
    pub(crate) refused: u64,
    pub(crate) refusals: Vec<Refusal>,
    pub(crate) fences: u64,
    pub(crate) seconds: f64,
}

/// Calls that were refused for one reason.
#[derive(Debug, Serialize)]
pub(crate) struct Refusal {
    pub(crate) why: String,
    pub(crate) count: u64,
}

impl Reals {
    /// None at all.
    #[cfg(test)]
    pub(crate) fn none() -> Self {
        Self { all: Vec::new(), whose: Whose::First }
    }

    /// # Errors
    /// What cannot be opened, with its name.
    pub(crate) fn open(interfaces: &[Interface], endpoint: Option<u32>) -> Result<Self, String> {
        let whose = endpoint.map_or(Whose::First, Whose::Endpoint);
        let open = |interface: &Interface| {
            let opened = || {
                let memory = memory::from_zero()?;
                let host = Host::open(interface, &memory)?;
                let (room, seen) = (host.room(), Arc::default());
                let interface = interface.clone();
                let (now, shunned, last) = (None, None, None);
                Ok(Real {
                    interface,
                    host,
                    memory,
                    room,
                    now,
                    domains: 0,
                    is_over: false,
                    shunned,
                    last,
                    seen,
                })
            };
            opened().map_err(|why: Box<dyn core::error::Error>| format!("--mirror {interface}: {why}"))
        };
        Ok(Self { all: interfaces.iter().map(open).collect::<Result<_, _>>()?, whose })
    }

    /// Those whose mirror is in the domain.
    fn in_domain(&mut self, number: Option<u32>) -> impl Iterator<Item = &mut Following> {
        let now = self.all.iter_mut().filter_map(|real| real.now.as_mut());
        now.filter(move |now| number == Some(now.number) && !now.subscription.is_fenced())
    }

    /// Whether one has refused anything of the domain since this was asked last.
    pub(super) fn newly_refused(&mut self, number: Option<u32>) -> bool {
        let newly = |now: &mut Following| {
            let refused = now.subscription.counts().refused;
            refused > core::mem::replace(&mut now.looked, refused)
        };
        // Each is looked at.
        self.in_domain(number).fold(false, |any, now| newly(now) | any)
    }

    /// Whether one cannot hold a mapping, of so many extents of memory, beside what it has.
    pub(super) fn cannot_hold(&mut self, number: Option<u32>, m: &Mapping, extents: u64) -> bool {
        self.in_domain(number).any(|now| {
            let registers = m.target == Target::Mmio && now.reach.mmio && !m.access.is_empty();
            let more = extents + u64::from(registers);
            let held = now.subscription.counts().held + more;
            let full = now.reach.entries.is_some_and(|limit| held > limit.into());
            more != 0 && (full || now.reach.refuses(m).is_some())
        })
    }

    /// Each with its subscription, for audits.
    pub(super) fn subscriptions(&self) -> impl Iterator<Item = (&Interface, &Subscription)> {
        self.all.iter().filter_map(|real| Some((&real.interface, &real.now.as_ref()?.subscription)))
    }

    /// What the hosts say otherwise than our count.
    pub(super) fn miscounted(&self) -> Vec<String> {
        self.all.iter().filter_map(Real::miscounted).collect()
    }
}

impl Real {
    fn miscounted(&self) -> Option<String> {
        let (first, now, ours) = (self.room?, self.host.room()?, self.host.entries()?);
        let theirs = u64::from(first.saturating_sub(now));
        let interface = &self.interface;
        (theirs != ours).then(|| format!("{interface} has {theirs} mappings by its own count, not {ours}"))
    }

    /// Goes to the domain, from wherever it is; an error says why it does not.
    fn go(&mut self, iommu: &Iommu, to: Option<u32>, again: bool) -> Result<(), String> {
        let mut problems = Vec::new();
        if self.now.as_ref().is_some_and(|now| now.subscription.is_fenced()) {
            self.is_over = !again;
            let seen = lock(&self.seen);
            let why: Vec<&str> = seen.refused.keys().map(String::as_str).collect();
            problems.push(format!("{} could not follow and was fenced: {}", self.interface, why.join("; ")));
            drop(seen);
            self.now = None;
        }
        if self.now.as_ref().is_some_and(|now| to != Some(now.number)) {
            problems.extend(self.leave().err());
        }
        self.shunned = self.shunned.filter(|shunned| to == Some(*shunned));
        if let (Some(number), None, None, false) = (to, &self.now, self.shunned, self.is_over)
            && let Err(why) = self.come(iommu, number)
        {
            self.shunned = to;
            problems.push(why);
        }
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    }

    fn leave(&mut self) -> Result<(), String> {
        let failed = |interface: &Interface, why: &dyn core::fmt::Display| format!("{interface}: {why}");
        let Some(now) = self.now.take() else { return Ok(()) };
        let switched = self.host.switch(Bound::Blocked);
        let fences = lock(&self.seen).fences;
        // Real mirrors are done when their calls return.
        let left = now.subscription.leave().is_complete() && lock(&self.seen).fences == fences;
        switched.map_err(|why| failed(&self.interface, &why))?;
        left.then_some(()).ok_or_else(|| failed(&self.interface, &"it could not be emptied, and was fenced"))
    }

    fn come(&mut self, iommu: &Iommu, number: u32) -> Result<(), String> {
        let interface = &self.interface;
        let failed =
            |why: &dyn core::fmt::Display| format!("{interface} cannot follow domain {number}: {why}");
        let space = Space::Domain(number);
        let mirror = self.host.mirror(space, &self.memory).map_err(|why| failed(&why))?;
        let reach = mirror.reach();
        let mirror = Box::new(Watched::new(mirror, self.seen.clone()));
        let subscription = iommu.subscribe_mirror(space, mirror, Interest::MIRROR);
        let subscription = subscription.map_err(|why| failed(&why))?;
        self.host.switch(Bound::Space(space)).map_err(|why| failed(&why))?;
        self.domains += 1;
        self.now = Some(Following { number, subscription, reach, looked: 0 });
        Ok(())
    }
}

impl Judge {
    /// Something is mapped in the domain.
    pub(super) fn interfaces_see(&mut self, domain: u32) {
        if self.reals.whose == Whose::First {
            self.reals.whose = Whose::Of(domain);
        }
    }

    /// The mirrors over real interfaces go where their endpoint is.
    pub(super) fn move_interfaces(&mut self) {
        if self.reals.all.is_empty() {
            return;
        }
        let translated = |id: &u32| match self.endpoints.get(id) {
            Some(ep) if ep.handle.is_fenced() => None,
            Some(ep) => match ep.handle.view() {
                Some(View::Domain(number)) => Some(number),
                _ => None,
            },
            None => None,
        };
        let number = match self.reals.whose {
            Whose::Endpoint(id) => translated(&id),
            Whose::First => None,
            Whose::Of(domain) => match self.domains.get(&domain) {
                Some(dom) => match dom.members.first() {
                    Some(id) => {
                        self.reals.whose = Whose::Endpoint(*id);
                        translated(id)
                    }
                    None => self.guest.number(domain).filter(|_| dom.handle.is_some()),
                },
                None => {
                    self.reals.whose = Whose::First;
                    None
                }
            },
        };
        let line = self.op.line;
        for real in &mut self.reals.all {
            if let Err(why) = real.go(self.guest.iommu(), number, self.options.unfence) {
                self.tally.differ(line, || why);
            }
        }
    }

    /// The history is over: whatever is mapped goes, and the hosts have nothing more.
    pub(super) fn end_interfaces(&mut self) {
        let line = self.op.line;
        for real in &mut self.reals.all {
            real.last = real.now.as_ref().map(|now| (now.number, now.subscription.counts().held));
            let left = real.go(self.guest.iommu(), None, false).err();
            for why in left.into_iter().chain(real.miscounted()) {
                self.tally.differ(line, || why);
            }
        }
    }

    pub(super) fn real_lines(&self) -> Vec<RealLine> {
        let line = |real: &Real| {
            let seen = lock(&real.seen);
            let endpoint = if let Whose::Endpoint(id) = self.reals.whose { Some(id) } else { None };
            RealLine {
                interface: real.interface.to_string(),
                endpoint,
                domain: real.last.map(|(number, _)| self.guest.name(number)),
                domains: real.domains,
                map: seen.map,
                unmap: seen.unmap,
                held: real.last.map_or(0, |(_, held)| held),
                refused: seen.refused.values().sum(),
                refusals: (seen.refused.iter())
                    .map(|(why, count)| Refusal { why: why.clone(), count: *count })
                    .collect(),
                fences: seen.fences,
                seconds: seen.time.as_secs_f64(),
            }
        };
        self.reals.all.iter().map(line).collect()
    }
}
