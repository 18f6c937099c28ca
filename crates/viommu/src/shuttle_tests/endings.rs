//! Fences that fail at first, and units that end, beside steps.

use shuttle::thread;

use super::peers::{Exact, Shadow};
use super::subscribers::any_reach;
use super::*;
use crate::ack::Ack;
use crate::endpoint::EndpointId;
use crate::iommu::ResetKind;
use crate::subscribe::{
    Binding, Bound, FenceFailed, Interest, Mirror, Reach, RefusalKind, Refused, Space, Unmapped,
};

/// Unmaps nothing, and cannot be cut off before it is told that it can.
struct Stubborn(Arc<AtomicBool>);

impl Mirror for Stubborn {
    fn reach(&self) -> Reach {
        Reach::default()
    }

    fn map(&mut self, _: &Mapping) -> Result<Ack, Refused> {
        Ok(Ack::Done)
    }

    fn unmap(&mut self, _: IovaRange) -> Result<Unmapped, Refused> {
        Err(Refused::new(RefusalKind::Device, "it never does"))
    }

    fn fence(&mut self) -> Result<(), FenceFailed> {
        if self.0.load(Ordering::SeqCst) { Ok(()) } else { Err(FenceFailed("not yet".into())) }
    }

    fn held(&self) -> Vec<Mapping> {
        Vec::new()
    }
}

/// Removals of a driver, while somebody cuts the device off at last.
fn removals_beside_a_late_cut() {
    let (iommu, domain, endpoint) = domain_and_endpoint();
    let mut driver = Driver::<3>::new(&domain, &Memory::new());
    driver.map_all();
    let may_cut = Arc::new(AtomicBool::new(false));
    let subscription =
        endpoint.subscribe_mirror(Box::new(Stubborn(may_cut.clone())), Interest::MIRROR).unwrap();
    let first = domain.unmap(place(0)).unwrap();
    assert!(first.is_stuck());
    let other = thread::spawn({
        let (domain, may_cut) = (domain.clone(), may_cut.clone());
        move || {
            // A reset may have taken the domain away.
            let later = [1, 2].into_iter().filter_map(|at| domain.unmap(place(at)).ok());
            for done in [first].into_iter().chain(later) {
                shuttle::future::block_on(done);
                assert!(may_cut.load(Ordering::SeqCst), "the device may still reach the page");
            }
        }
    });
    may_cut.store(true, Ordering::SeqCst);
    match roll(3) {
        0 => shuttle::future::block_on(subscription.leave()),
        1 => shuttle::future::block_on(endpoint.remove().unwrap()),
        _ => shuttle::future::block_on(iommu.reset(ResetKind::Device).map(|reset| reset.completion).unwrap()),
    }
    other.join().unwrap();
}

#[test]
fn removals_are_over_when_who_could_not_be_cut_off_is() {
    check(removals_beside_a_late_cut);
}

struct Host(Option<Box<Exact>>);

impl Binding for Host {
    fn mirror_for(&mut self, _: Space, _: EndpointId) -> Result<Box<dyn Mirror>, Refused> {
        match self.0.take() {
            Some(mirror) => Ok(mirror),
            None => Err(Refused::new(RefusalKind::Resources, "there is one")),
        }
    }

    fn bind(&mut self, _: EndpointId, _: Bound) -> Result<Ack, Refused> {
        Ok(Ack::Done)
    }

    fn fence(&mut self, _: EndpointId) -> Result<(), FenceFailed> {
        Ok(())
    }
}

/// The last handles go while a step runs.
fn end_beside_steps() {
    let (mirror, shadow): (_, Arc<Mutex<Shadow>>) =
        if roll(2) == 0 { Exact::new(any_reach()) } else { Exact::late() };
    let driver = {
        let (iommu, domain, endpoint) = domain_and_endpoint();
        let binding = iommu.add_binding(Box::new(Host(Some(mirror))));
        endpoint.bind_with(&binding).unwrap().wait().unwrap();
        let driver = thread::spawn(move || {
            for at in 0..2 {
                drop(domain.map(page_at(at, Gpa(at as u64 * PAGE))).unwrap());
            }
            drop(domain.unmap(IovaRange::ALL).unwrap());
        });
        let other = thread::spawn(move || drop(endpoint));
        drop(iommu);
        other.join().unwrap();
        driver
    };
    driver.join().unwrap();
    let resolvers = core::mem::take(&mut shadow.lock().unwrap().unresolved);
    resolvers.into_iter().for_each(crate::ack::Resolver::done);
    assert!(shadow.lock().unwrap().held.is_empty());
    assert_eq!(Arc::strong_count(&shadow), 1, "the mirror is gone");
}

#[test]
fn end_of_a_unit_beside_steps_leaves_nothing_behind() {
    check(end_beside_steps);
}
