//! Acks that come late, fail or never come, where nobody waits for them: subscribe, save, fences.

use std::sync::mpsc;
use std::time::Duration;
use viommu::subscribe::*;
use viommu::*;
/// A mirror whose map calls are acknowledged never, or (`true`) with a failure.
#[derive(Default)]
struct Late(Vec<Mapping>, bool, Vec<ack::Resolver>);
impl Mirror for Late {
    fn reach(&self) -> Reach {
        Reach::default()
    }
    fn map(&mut self, m: &Mapping) -> Result<Ack, Refused> {
        self.0.push(*m);
        let (ack, r) = Ack::pending();
        if self.1 {
            drop(r)
        } else {
            self.2.push(r)
        }
        Ok(ack)
    }
    fn unmap(&mut self, r: IovaRange) -> Result<Unmapped, Refused> {
        Ok(Unmapped::done(self.0.extract_if(.., |m| r.covers(m.range)).map(|m| m.range.bytes()).sum()))
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        Ok(())
    }
    fn held(&self) -> Vec<Mapping> {
        self.0.clone()
    }
}
fn setup() -> (Iommu, Endpoint, Domain) {
    let iommu = Iommu::builder().ram(0, 1 << 30).build().unwrap();
    let e = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
    let d = iommu.create_domain(1, Tables::Owned).unwrap();
    drop(e.attach(1).unwrap());
    (iommu, e, d)
}
fn within(f: impl FnOnce() + Send + 'static) -> bool {
    let (tx, rx) = mpsc::channel();
    std::thread::spawn(move || {
        f();
        tx.send(()).unwrap();
    });
    rx.recv_timeout(Duration::from_secs(3)).is_ok()
}
fn page() -> Mapping {
    Mapping::new(Iova(0x1000), 0x1000, Gpa(0x8000), Access::RW).unwrap()
}
#[test]
fn subscribe_whose_ack_fails_at_once_does_not_deadlock() {
    assert!(
        within(|| {
            let (_i, e, d) = setup();
            drop(d.map(page()).unwrap());
            let s = e.subscribe_mirror(Box::new(Late(vec![], true, vec![])), Interest::MIRROR);
            println!("{s:?}");
        }),
        "deadlock"
    );
}
#[test]
fn subscribe_with_a_pending_ack_is_waited_for_by_filled() {
    let (_i, e, d) = setup();
    drop(d.map(page()).unwrap());
    let mut subscription =
        e.subscribe_mirror(Box::new(Late(vec![], false, vec![])), Interest::MIRROR).unwrap();
    assert!(!subscription.filled().is_complete());
}
#[test]
fn save_is_refused_while_an_addition_is_not_acknowledged() {
    let (i, e, d) = setup();
    let _s = e.subscribe_mirror(Box::new(Late(vec![], false, vec![])), Interest::MIRROR).unwrap();
    let _c = d.map(page()).unwrap();
    assert!(i.save().is_err());
}
/// A cache whose invalidations fail.
struct Failing;
impl Cache for Failing {
    fn install(&mut self, _: &Mapping) {}
    fn invalidate(&mut self, _: IovaRange) -> Ack {
        let (a, r) = Ack::pending();
        drop(r);
        a
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        Ok(())
    }
}
struct Quiet;
impl Cache for Quiet {
    fn install(&mut self, _: &Mapping) {}
    fn invalidate(&mut self, _: IovaRange) -> Ack {
        Ack::Done
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        Ok(())
    }
}
#[test]
fn a_new_cache_brings_a_fenced_endpoint_back() {
    let (_i, e, d) = setup();
    let s = e.subscribe_cache(Box::new(Failing), Interest::CACHE).unwrap();
    drop(d.map(page()).unwrap());
    d.unmap(page().range).unwrap().wait().unwrap();
    assert!(e.is_fenced());
    drop(s.leave());
    let _s = e.subscribe_cache(Box::new(Quiet), Interest::CACHE).unwrap();
    assert!(!e.is_fenced());
}
/// Answers later, and tells when it was cut off.
#[derive(Clone, Default)]
struct Owing(std::sync::Arc<std::sync::Mutex<(Vec<ack::Resolver>, bool)>>);
impl Cache for Owing {
    fn install(&mut self, _: &Mapping) {}
    fn invalidate(&mut self, _: IovaRange) -> Ack {
        let (ack, resolver) = Ack::pending();
        self.0.lock().unwrap().0.push(resolver);
        ack
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        self.0.lock().unwrap().1 = true;
        Ok(())
    }
}
#[test]
fn a_cache_that_has_left_is_there_until_it_has_answered() {
    for (done, fenced) in [(true, false), (false, true)] {
        let (_i, e, _d) = setup();
        let late = Owing::default();
        let mut left = e.subscribe_cache(Box::new(late.clone()), Interest::CACHE).unwrap().leave();
        assert!(!left.is_complete());
        assert_eq!(std::sync::Arc::strong_count(&late.0), 2, "it may have to be cut off");
        let resolver = late.0.lock().unwrap().0.pop().unwrap();
        if done {
            resolver.done()
        } else {
            resolver.failed()
        }
        assert!(left.is_complete());
        assert_eq!(late.0.lock().unwrap().1, fenced);
        assert_eq!(std::sync::Arc::strong_count(&late.0), 1);
    }
}
struct Seen(std::sync::Arc<std::sync::Mutex<Vec<View>>>);
impl Observer for Seen {
    fn changed(&mut self, _: Space, _: &Change) {}
    fn moved(&mut self, _: EndpointId, to: View) {
        self.0.lock().unwrap().push(to);
    }
}
#[test]
fn an_observer_hears_that_its_endpoint_is_blocked() {
    let (_i, e, _d) = setup();
    let seen = std::sync::Arc::default();
    let _s = e
        .subscribe_observer(Box::new(Seen(std::sync::Arc::clone(&seen))), Interest::all_of(Kinds::MAP))
        .unwrap();
    drop(e.block().unwrap());
    assert_eq!(*seen.lock().unwrap(), [View::Blocked]);
}
/// Answers later, and cannot be cut off.
#[derive(Clone, Default)]
struct Uncut(std::sync::Arc<std::sync::Mutex<Vec<ack::Resolver>>>);
impl Uncut {
    fn pending(&self) -> Ack {
        let (ack, resolver) = Ack::pending();
        self.0.lock().unwrap().push(resolver);
        ack
    }
}
impl Mirror for Uncut {
    fn reach(&self) -> Reach {
        Reach::default()
    }
    fn map(&mut self, _: &Mapping) -> Result<Ack, Refused> {
        Ok(Ack::Done)
    }
    fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        Ok(Unmapped { bytes: range.bytes(), dirty: None, ack: self.pending() })
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        Err(FenceFailed("told to fail".into()))
    }
    fn held(&self) -> Vec<Mapping> {
        Vec::new()
    }
}
impl Cache for Uncut {
    fn install(&mut self, _: &Mapping) {}
    fn invalidate(&mut self, _: IovaRange) -> Ack {
        self.pending()
    }
    fn fence(&mut self) -> Result<(), FenceFailed> {
        Err(FenceFailed("told to fail".into()))
    }
}
#[test]
fn a_fence_that_failed_for_one_step_has_not_held_for_the_next() {
    for cache in [false, true] {
        let (_i, e, d) = setup();
        let uncut = Uncut::default();
        let _s = if cache {
            e.subscribe_cache(Box::new(uncut.clone()), Interest::CACHE).unwrap()
        } else {
            e.subscribe_mirror(Box::new(uncut.clone()), Interest::MIRROR).unwrap()
        };
        let other = Mapping::new(Iova(0x9000), 0x1000, Gpa(0xa000), Access::RW).unwrap();
        d.map(page()).unwrap().wait().unwrap();
        d.map(other).unwrap().wait().unwrap();
        let first = d.unmap(page().range).unwrap();
        let second = d.unmap(other.range).unwrap();
        uncut.0.lock().unwrap().drain(..).for_each(ack::Resolver::failed);
        assert!(matches!(first.wait(), Err(WaitError::FenceFailed)), "cache: {cache}");
        assert!(matches!(second.wait(), Err(WaitError::FenceFailed)), "cache: {cache}");
    }
}
