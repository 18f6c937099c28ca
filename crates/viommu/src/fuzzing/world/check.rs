//! What everybody should hold, see and be told after a step.

use std::collections::BTreeMap;

use viommu::endpoint::RegionKind;
use viommu::subscribe::OutOfReach;
use viommu::{Access, Extent, FaultReason, Gpa, Iova, Medium, Place, Space, View};

use super::super::recording::Event;
use super::super::reference::{PAGE, Pages, given, medium_at, range_of};
use super::{Home, Kind, Sub, WALKED, WIDTH, World};

impl World {
    /// What a mirror must hold, or a cache may: by page, in the subscriber's addresses.
    pub(super) fn due_of(&self, sub: &Sub) -> BTreeMap<u64, (u64, Access)> {
        let Some(space) = self.space_of(sub.home) else { return BTreeMap::new() };
        let is_mirror = sub.kind == Kind::Mirror;
        let walked = space == Space::Domain(WALKED) && !is_mirror;
        let pages = if walked { self.guest.pages() } else { self.pages_of(space) };
        let backing = self.backing();
        let none = Vec::new();
        let regions = match sub.home {
            Home::Endpoint(at) => &self.regions[at],
            Home::Space(_) => &none,
        };
        let outward = |page: u64| (page * PAGE).wrapping_add(sub.interest.offset) / PAGE;
        let in_identity = |page: u64| {
            let range = range_of(page, page);
            let there = Iova(outward(page) * PAGE);
            pages.0.contains_key(&page)
                && !regions.iter().any(|r| r.range.overlaps(range))
                && sub.reach.apertures.iter().any(|a| a.contains(there))
        };
        let mut due = BTreeMap::new();
        for (page, cell) in &pages.0 {
            let range = range_of(*page, *page);
            if !sub.interest.window.covers(range) {
                continue;
            }
            let Some((gpa, access, mmio)) = given(&backing, cell) else { continue };
            if is_mirror && mmio && !sub.reach.mmio {
                continue;
            }
            if !is_mirror && regions.iter().any(|r| r.range.overlaps(range)) {
                continue;
            }
            if is_mirror && space == Space::Identity {
                let pair = sub.reach.granule() == PAGE || in_identity(page & !1) && in_identity(page | 1);
                if !(in_identity(*page) && pair) {
                    continue;
                }
            }
            due.insert(outward(*page), (gpa, access));
        }
        due
    }

    fn held(sub: &Sub) -> BTreeMap<u64, (u64, Access)> {
        let mut held = BTreeMap::new();
        for m in sub.handle.held() {
            let (first, last) = (m.range.start().0 / PAGE, m.range.last().0 / PAGE);
            for page in first..=last {
                let twice = held.insert(page, (m.gpa.0 / PAGE + (page - first), m.access));
                assert_eq!(twice, None, "two entries over one page");
            }
        }
        held
    }

    pub(in super::super) fn check(&mut self) {
        for (id, pages) in &self.domains {
            pages.check(&self.iommu.domain(*id).unwrap());
        }
        for (at, endpoint) in self.endpoints.iter().enumerate() {
            assert_eq!(endpoint.view(), Some(self.view(at)), "{} sees something else", endpoint.id());
        }
        for sub in self.subs.iter().flatten() {
            self.check_sub(sub);
        }
        for at in 0..self.endpoints.len() {
            self.check_endpoint(at);
        }
    }

    pub(super) fn check_sub(&self, sub: &Sub) {
        let fenced = sub.handle.lock().fenced;
        assert_eq!(sub.subscription.is_fenced(), fenced);
        assert!(!(fenced && sub.sound), "L11: fenced for no reason");
        if fenced {
            return;
        }
        for event in sub.handle.take() {
            let range = match event {
                Event::Map(m) | Event::Install(m) | Event::Replace(_, m) => m.range,
                Event::Unmap(range) | Event::Invalidate(range) => range,
                Event::Changed(change) => change.range(),
                Event::Fence | Event::Moved(..) => continue,
            };
            let window = sub.interest.window;
            let start = window.start().0.wrapping_add(sub.interest.offset);
            let last = window.last().0.wrapping_add(sub.interest.offset);
            assert!(range.start().0 >= start && range.last().0 <= last, "I8: {event:?} outside the window");
        }
        let (due, held) = (self.due_of(sub), Self::held(sub));
        match sub.kind {
            Kind::Mirror => {
                let all = sub.reach.out_of_reach == OutOfReach::Fence
                    || self.space_of(sub.home) != Some(Space::Domain(WALKED));
                if all {
                    assert_eq!(held, due, "I1: a mirror that is not equal");
                } else {
                    let within = held.iter().all(|(page, what)| due.get(page) == Some(what));
                    assert!(within, "I1: {held:?} beyond {due:?}");
                }
                let counts = sub.subscription.counts();
                assert_eq!(counts.held, sub.handle.lock().shadow.len() as u64, "miscounted");
            }
            Kind::Cache => {
                for (page, what) in &held {
                    assert_eq!(due.get(page), Some(what), "I2: stale at page {page:#x}");
                }
            }
            Kind::Observer => return,
        }
        let audit = sub.subscription.audit().expect("it tells what it holds");
        assert!(audit.is_clean(), "L16: {audit:?}");
    }

    fn check_endpoint(&mut self, at: usize) {
        let view = self.view(at);
        let fenced = self.endpoints[at].is_fenced();
        let backing = self.backing();
        let pages = match view {
            View::Blocked => None,
            View::Identity => Some(self.pages_of(Space::Identity)),
            View::Domain(WALKED) => Some(self.guest.pages()),
            View::Domain(id) => self.domains.get(&id).cloned(),
        };
        let guard = self.readers[at].enter();
        for page in self.base..=self.base + (WIDTH - 1) {
            let iova = Iova(page * PAGE + 16);
            for access in [Access::READ, Access::WRITE] {
                let answer = guard.probe(iova, access);
                let answer = answer.map(|t| (t.gpa, t.access, t.place)).map_err(|f| f.reason);
                let region = self.regions[at].iter().find(|r| r.range.contains(iova));
                let due = match (region, &pages) {
                    (Some(r), _) if r.kind == RegionKind::Msi && access == Access::WRITE => {
                        Ok((Gpa(iova.0), Access::WRITE, Place::Msi))
                    }
                    (Some(_), _) => Err(FaultReason::Reserved),
                    _ if fenced => Err(FaultReason::Fenced),
                    (None, None) => Err(FaultReason::Blocked),
                    (None, Some(pages)) => Self::answer(pages, &backing, page, access),
                };
                assert_eq!(answer, due, "{:?} of {iova} at {}", access, self.endpoints[at].id());
            }
        }
    }

    fn answer(
        pages: &Pages,
        backing: &[Extent],
        page: u64,
        access: Access,
    ) -> Result<(Gpa, Access, Place), FaultReason> {
        let cell = pages.0.get(&page).filter(|c| !c.access.is_empty()).ok_or(FaultReason::Unmapped)?;
        if !cell.access.contains(access) {
            return Err(FaultReason::Permission);
        }
        let medium = medium_at(backing, cell.gpa).ok_or(FaultReason::NoBacking)?;
        let place = match medium {
            Medium::Rom => Place::Rom,
            Medium::Ram if !cell.mmio => Place::Ram,
            _ => Place::Mmio,
        };
        let allowed = if medium == Medium::Rom { cell.access & Access::READ } else { cell.access };
        if !allowed.contains(access) {
            return Err(FaultReason::Permission);
        }
        Ok((Gpa(cell.gpa * PAGE + 16), allowed, place))
    }
}
