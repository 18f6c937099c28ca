//! A naive model of virtio-iommu, written from the specification: lists, looked through from the beginning. It shares
//! nothing with the device but the numbers that the specification gives.

use std::collections::BTreeMap;

pub(crate) const OK: u8 = 0;
pub(crate) const UNSUPP: u8 = 2;
pub(crate) const DEVERR: u8 = 3;
pub(crate) const INVAL: u8 = 4;
pub(crate) const RANGE: u8 = 5;
pub(crate) const NOENT: u8 = 6;
pub(crate) const NOMEM: u8 = 8;

pub(crate) const BYPASS: u64 = 1 << 3;
pub(crate) const PROBE: u64 = 1 << 4;
pub(crate) const MMIO: u64 = 1 << 5;
pub(crate) const BYPASS_CONFIG: u64 = 1 << 6;

const PAGE: u64 = 4096;

/// A mapping: exactly one successful MAP. Ends are inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) phys: u64,
    pub(crate) flags: u32,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Domain {
    pub(crate) bypass: bool,
    pub(crate) mappings: Vec<Mapping>,
}

/// A region that PROBE tells of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) msi: bool,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Endpoint {
    pub(crate) regions: Vec<Region>,
    pub(crate) attached: Option<u32>,
    /// Its device has been cut off.
    pub(crate) fenced: bool,
    /// An attach could not be undone: it sees nothing until it is attached again.
    pub(crate) blocked: bool,
}

/// Somebody with a full copy of what an endpoint sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mirror {
    pub(crate) endpoint: u32,
    /// The most pieces that it can hold.
    pub(crate) entries: Option<usize>,
    /// What it says to pieces over the page at [`Model::poison`], if it minds.
    pub(crate) refuses: Option<u8>,
    /// Device registers are given to it too.
    pub(crate) mmio: bool,
    /// The next removal cuts it off.
    pub(crate) armed: bool,
    /// It has been cut off.
    pub(crate) fenced: bool,
}

/// What lies at guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) rom: bool,
    pub(crate) mmio: bool,
}

/// What becomes of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Bytes written; 0: nothing was done at all.
    pub(crate) used: u32,
    pub(crate) status: Option<u8>,
    /// Of a PROBE that was understood: the area before the tail.
    pub(crate) properties: Option<Vec<u8>>,
    /// The domain that lost mappings.
    pub(crate) lost: Option<u32>,
}

/// Why an access reaches nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Blocked,
    Unmapped,
    Permission,
    Reserved,
    NoBacking,
    Fenced,
}

/// What an access reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reached {
    Memory(u64),
    Rom(u64),
    Registers(u64),
    Interrupt,
}

/// What an endpoint sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    Nothing,
    Identity,
    Domain(u32),
}

#[derive(Clone, Debug)]
pub(crate) struct Model {
    pub(crate) granule: u64,
    pub(crate) input: (u64, u64),
    pub(crate) domain_range: (u32, u32),
    pub(crate) probe_size: u32,
    pub(crate) offered: u64,
    pub(crate) negotiated: u64,
    pub(crate) bypass: bool,
    pub(crate) initial_bypass: bool,
    pub(crate) endpoints: BTreeMap<u32, Endpoint>,
    pub(crate) domains: BTreeMap<u32, Domain>,
    pub(crate) mirrors: Vec<Mirror>,
    pub(crate) memory: Vec<Extent>,
    /// Mirrors that mind refuse every piece over this page.
    pub(crate) poison: Option<u64>,
    pub(crate) most_in_domain: usize,
    pub(crate) most_in_all: usize,
    pub(crate) most_domains: usize,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 <= b.1 && b.0 <= a.1
}

impl Model {
    /// A request: what the driver wrote, and how many bytes it has room for.
    pub(crate) fn request(&mut self, readable: &[u8], writable: u32) -> Verdict {
        let nothing = Verdict::default();
        let Some(&kind) = readable.first() else { return nothing };
        let needed = match kind {
            1 | 2 => 20,
            3 => 36,
            4 => 28,
            5 if self.offered & PROBE != 0 => 72,
            _ => return nothing,
        };
        if readable.len() < needed || writable < 4 {
            return nothing;
        }
        if kind == 5 {
            return self.probe(readable, writable);
        }
        let mut lost = None;
        let outcome = match kind {
            1 => self.attach(readable),
            2 => self.detach(readable),
            3 => self.map(readable),
            _ => self.unmap(readable, &mut lost),
        };
        let status = outcome.err().unwrap_or(OK);
        Verdict { used: 4, status: Some(status), properties: None, lost }
    }

    fn in_domain_range(&self, domain: u32) -> Result<(), u8> {
        let (first, last) = self.domain_range;
        if first <= domain && domain <= last { Ok(()) } else { Err(RANGE) }
    }

    fn attach(&mut self, bytes: &[u8]) -> Result<(), u8> {
        let (domain, endpoint, flags) = (u32_at(bytes, 4), u32_at(bytes, 8), u32_at(bytes, 12));
        if bytes[16..20] != [0; 4] {
            return Err(INVAL);
        }
        let known = if self.negotiated & BYPASS_CONFIG != 0 { 1 } else { 0 };
        if flags & !known != 0 {
            return Err(INVAL);
        }
        self.in_domain_range(domain)?;
        let Some(who) = self.endpoints.get(&endpoint) else { return Err(NOENT) };
        let bypass = flags & 1 != 0;
        if self.domains.get(&domain).is_some_and(|there| there.bypass != bypass) {
            return Err(INVAL);
        }
        if who.attached == Some(domain) {
            return Ok(());
        }
        let paged = self.domains.values().filter(|d| !d.bypass).count();
        if !bypass && !self.domains.contains_key(&domain) && paged >= self.most_domains {
            return Err(NOMEM);
        }
        if who.fenced {
            return Err(DEVERR);
        }
        let mappings = self.domains.get(&domain).map_or(Vec::new(), |d| d.mappings.clone());
        let meets = |m: &Mapping| who.regions.iter().any(|r| overlap((r.start, r.end), (m.start, m.end)));
        if mappings.iter().any(meets) {
            return Err(UNSUPP);
        }
        if !bypass {
            let mirrors = self.mirrors.iter().filter(|m| m.endpoint == endpoint && !m.fenced);
            for mirror in mirrors.clone() {
                let count: usize = mappings.iter().map(|m| self.pieces(m, mirror.mmio).len()).sum();
                if mirror.entries.is_some_and(|most| count > most) {
                    return Err(NOMEM);
                }
            }
            // Who is cut off on the way from what it saw is not asked any more.
            for mirror in mirrors.filter(|m| !(m.armed && self.holds_something(m))) {
                if let Some(status) = mirror.refuses
                    && mappings.iter().any(|m| self.is_poisoned(m, mirror.mmio))
                {
                    return Err(status);
                }
            }
        }
        self.leave(endpoint);
        self.domains.entry(domain).or_insert(Domain { bypass, mappings: Vec::new() });
        self.endpoints.get_mut(&endpoint).unwrap().attached = Some(domain);
        Ok(())
    }

    /// The endpoint is attached to nothing; the domain dies with its last one.
    fn leave(&mut self, endpoint: u32) {
        let Some(who) = self.endpoints.get_mut(&endpoint) else { return };
        who.blocked = false;
        let Some(domain) = who.attached.take() else { return };
        if !self.endpoints.values().any(|e| e.attached == Some(domain)) {
            self.domains.remove(&domain);
        }
    }

    fn detach(&mut self, bytes: &[u8]) -> Result<(), u8> {
        let (domain, endpoint) = (u32_at(bytes, 4), u32_at(bytes, 8));
        let Some(who) = self.endpoints.get(&endpoint) else { return Err(NOENT) };
        if who.attached != Some(domain) {
            return Err(INVAL);
        }
        self.leave(endpoint);
        Ok(())
    }

    fn map(&mut self, bytes: &[u8]) -> Result<(), u8> {
        let domain = u32_at(bytes, 4);
        let new = Mapping {
            start: u64_at(bytes, 8),
            end: u64_at(bytes, 16),
            phys: u64_at(bytes, 24),
            flags: u32_at(bytes, 32),
        };
        let known = if self.negotiated & MMIO != 0 { 7 } else { 3 };
        if new.flags & !known != 0 {
            return Err(INVAL);
        }
        self.in_domain_range(domain)?;
        if new.end <= new.start || new.start < self.input.0 || new.end > self.input.1 {
            return Err(RANGE);
        }
        let aligned = |address: u128| address.is_multiple_of(u128::from(self.granule));
        if !aligned(new.start.into()) || !aligned(u128::from(new.end) + 1) || !aligned(new.phys.into()) {
            return Err(RANGE);
        }
        if u128::from(new.phys) + u128::from(new.end - new.start) > u128::from(u64::MAX) {
            return Err(RANGE);
        }
        let Some(there) = self.domains.get(&domain) else { return Err(NOENT) };
        if there.bypass {
            return Err(INVAL);
        }
        let range = (new.start, new.end);
        let members = || self.endpoints.iter().filter(|(_, e)| e.attached == Some(domain));
        if members().any(|(_, e)| e.regions.iter().any(|r| overlap((r.start, r.end), range))) {
            return Err(INVAL);
        }
        if there.mappings.iter().any(|m| overlap((m.start, m.end), range)) {
            return Err(INVAL);
        }
        let all: usize = self.domains.values().map(|d| d.mappings.len()).sum();
        if there.mappings.len() >= self.most_in_domain || all >= self.most_in_all {
            return Err(NOMEM);
        }
        let here = |m: &&Mirror| {
            !m.fenced && self.endpoints.get(&m.endpoint).is_some_and(|e| e.attached == Some(domain))
        };
        for mirror in self.mirrors.iter().filter(here) {
            let held: usize = there.mappings.iter().map(|m| self.pieces(m, mirror.mmio).len()).sum();
            if mirror.entries.is_some_and(|most| held + self.pieces(&new, mirror.mmio).len() > most) {
                return Err(NOMEM);
            }
        }
        for mirror in self.mirrors.iter().filter(here) {
            if let Some(status) = mirror.refuses
                && self.is_poisoned(&new, mirror.mmio)
            {
                return Err(status);
            }
        }
        self.domains.get_mut(&domain).unwrap().mappings.push(new);
        Ok(())
    }

    fn unmap(&mut self, bytes: &[u8], lost: &mut Option<u32>) -> Result<(), u8> {
        let (domain, start, end) = (u32_at(bytes, 4), u64_at(bytes, 8), u64_at(bytes, 16));
        self.in_domain_range(domain)?;
        if end < start || start < self.input.0 || end > self.input.1 {
            return Err(RANGE);
        }
        let Some(there) = self.domains.get_mut(&domain) else { return Err(NOENT) };
        if there.bypass {
            return Err(INVAL);
        }
        let touched = |m: &Mapping| overlap((m.start, m.end), (start, end));
        let inside = |m: &Mapping| start <= m.start && m.end <= end;
        if there.mappings.iter().any(|m| touched(m) && !inside(m)) {
            return Err(RANGE);
        }
        let before = there.mappings.len();
        there.mappings.retain(|m| !inside(m));
        if there.mappings.len() != before {
            *lost = Some(domain);
        }
        Ok(())
    }

    fn probe(&self, bytes: &[u8], writable: u32) -> Verdict {
        if writable - 4 < self.probe_size {
            return Verdict { used: writable, status: Some(INVAL), ..Verdict::default() };
        }
        let mut properties = Vec::new();
        let mut status = NOENT;
        if let Some(endpoint) = self.endpoints.get(&u32_at(bytes, 4)) {
            status = OK;
            let mut regions = endpoint.regions.clone();
            regions.sort_unstable();
            for region in regions {
                properties.extend([1, 0, 20, 0, u8::from(region.msi), 0, 0, 0]);
                properties.extend(region.start.to_le_bytes());
                properties.extend(region.end.to_le_bytes());
            }
        }
        properties.resize(self.probe_size as usize, 0);
        let used = self.probe_size + 4;
        Verdict { used, status: Some(status), properties: Some(properties), lost: None }
    }

    /// The pieces of a mapping that a mirror gets: where there is memory, as far as access is left.
    pub(crate) fn pieces(&self, m: &Mapping, registers_too: bool) -> Vec<(u64, u64)> {
        let last = m.phys + (m.end - m.start);
        let there = self.memory.iter().filter(|e| overlap((e.start, e.end), (m.phys, last)));
        there
            .filter(|e| m.flags & 3 & if e.rom { 1 } else { 3 } != 0)
            .filter(|e| registers_too || !(e.mmio || m.flags & 4 != 0))
            .map(|e| {
                let (from, to) = (e.start.max(m.phys), e.end.min(last));
                (m.start + (from - m.phys), m.start + (to - m.phys))
            })
            .collect()
    }

    fn is_poisoned(&self, m: &Mapping, registers_too: bool) -> bool {
        let Some(page) = self.poison else { return false };
        self.pieces(m, registers_too).iter().any(|piece| overlap(*piece, (page, page | (PAGE - 1))))
    }

    fn holds_something(&self, mirror: &Mirror) -> bool {
        match self.view(mirror.endpoint) {
            None | Some(View::Nothing) => false,
            Some(View::Identity) => true,
            Some(View::Domain(domain)) => {
                let mappings = &self.domains[&domain].mappings;
                mappings.iter().any(|m| !self.pieces(m, mirror.mmio).is_empty())
            }
        }
    }

    /// Whether a mirror can come to what its endpoint sees.
    pub(crate) fn may_subscribe(&self, mirror: &Mirror) -> bool {
        let Some(View::Domain(domain)) = self.view(mirror.endpoint) else { return true };
        let mappings = &self.domains[&domain].mappings;
        let count: usize = mappings.iter().map(|m| self.pieces(m, mirror.mmio).len()).sum();
        let poisoned = || mappings.iter().any(|m| self.is_poisoned(m, mirror.mmio));
        mirror.entries.is_none_or(|most| count <= most) && !(mirror.refuses.is_some() && poisoned())
    }

    /// What the unattached see.
    fn default_view(&self) -> View {
        let bypass = self.offered & BYPASS_CONFIG != 0 && self.bypass;
        if bypass || self.negotiated & BYPASS != 0 { View::Identity } else { View::Nothing }
    }

    pub(crate) fn view(&self, endpoint: u32) -> Option<View> {
        let who = self.endpoints.get(&endpoint)?;
        Some(match who.attached {
            None if who.blocked => View::Nothing,
            None => self.default_view(),
            Some(domain) if self.domains[&domain].bypass => View::Identity,
            Some(domain) => View::Domain(domain),
        })
    }

    /// What an endpoint's access reaches.
    pub(crate) fn access(&self, endpoint: u32, at: u64, write: bool) -> Result<Reached, Fault> {
        let who = &self.endpoints[&endpoint];
        if let Some(region) = who.regions.iter().find(|r| r.start <= at && at <= r.end) {
            return if region.msi && write { Ok(Reached::Interrupt) } else { Err(Fault::Reserved) };
        }
        if who.fenced {
            return Err(Fault::Fenced);
        }
        let extent = |phys: u64| self.memory.iter().find(|e| e.start <= phys && phys <= e.end);
        let wanted = if write { 2 } else { 1 };
        let (phys, flags) = match self.view(endpoint).unwrap() {
            View::Nothing => return Err(Fault::Blocked),
            View::Identity => {
                extent(at).ok_or(Fault::Unmapped)?;
                (at, 3)
            }
            View::Domain(domain) => {
                let mappings = &self.domains[&domain].mappings;
                let hit = mappings.iter().find(|m| m.start <= at && at <= m.end && m.flags & 3 != 0);
                let hit = hit.ok_or(Fault::Unmapped)?;
                (hit.phys + (at - hit.start), hit.flags)
            }
        };
        if flags & wanted == 0 {
            return Err(Fault::Permission);
        }
        let extent = extent(phys).ok_or(Fault::NoBacking)?;
        if extent.rom && write {
            return Err(Fault::Permission);
        }
        Ok(if extent.rom {
            Reached::Rom(phys)
        } else if extent.mmio || flags & 4 != 0 {
            Reached::Registers(phys)
        } else {
            Reached::Memory(phys)
        })
    }

    /// The driver writes the byte `bypass`.
    pub(crate) fn write_bypass(&mut self, value: u8) {
        if self.negotiated & BYPASS_CONFIG != 0 && value <= 1 {
            self.bypass = value == 1;
        }
    }

    pub(crate) fn device_reset(&mut self) {
        self.domains.clear();
        for endpoint in self.endpoints.values_mut() {
            endpoint.attached = None;
            endpoint.blocked = false;
        }
        self.negotiated = 0;
    }

    pub(crate) fn system_reset(&mut self) {
        self.device_reset();
        self.bypass = self.initial_bypass;
    }

    pub(crate) fn remove_endpoint(&mut self, endpoint: u32) {
        self.leave(endpoint);
        self.endpoints.remove(&endpoint);
        self.mirrors.retain(|m| m.endpoint != endpoint);
    }
}
