//! Guest memory as the device reaches it.

use core::cell::RefCell;
use core::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use viommu::{FaultReason, Iova, IovaRange, Translator};
use viommu_memory::{EndpointSpace, OwnedMemoryGuard};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryResult,
    Permissions,
};

use super::BackendError;
use super::iotlb::{Iotlb, Memory};
use super::misses::{Miss, MissError};
use crate::user::access_for;

/// Misses that are asked for at a time.
const AT_A_TIME: usize = 512;

/// Guest memory at the device's addresses, for whatever takes a [`GuestAddressSpace`]. A handle to share.
///
/// `memory()` starts a guard, as [`EndpointSpace`]'s does: it covers one bounded batch, and an INVALIDATE is
/// answered only when all guards that began before it have ended.
///
/// What the IOTLB does not hold is asked for, and waited for. That is best done before a batch, by
/// [`DeviceMemory::prepare`]: a guard that waits for an UPDATE holds up INVALIDATEs, and a front end may send one and wait
/// for its answer before it looks at MISSes. So a wait inside a guard ends with an error as soon as an INVALIDATE comes.
#[derive(Clone)]
pub struct DeviceMemory {
    iotlb: Arc<Iotlb>,
    space: EndpointSpace<Memory>,
}

impl DeviceMemory {
    pub(super) fn new(iotlb: Arc<Iotlb>) -> Result<Self, BackendError> {
        let space = EndpointSpace::new(iotlb.reader()?, iotlb.memory.clone());
        Ok(Self { iotlb, space })
    }

    /// Has in the IOTLB what `look` looks at. It is called under a guard, in which what is not there is an error; that is
    /// then asked for under none, and `look` is called again, until all is there: so it may only look. What it gives is
    /// what it gave at last. Blocks: no guard may be held.
    ///
    /// # Errors
    /// See [`MissError`]; the front end may take as long as [`BackendOptions::patience`](super::BackendOptions) in all.
    pub fn prepare<R>(&self, mut look: impl FnMut(&DeviceGuard) -> R) -> Result<R, MissError> {
        let until = self.until();
        let mut before = Vec::new();
        loop {
            let guard = self.guard(true);
            let seen = look(&guard);
            let missed = guard.missed.take();
            drop(guard);
            if self.iotlb.misses.is_closed() {
                return Err(MissError::Closed);
            }
            if missed.is_empty() {
                return Ok(seen);
            }
            let wanted: Vec<_> = missed.iter().map(|(miss, _)| *miss).collect();
            if stays(&before, &missed) {
                return Err(MissError::Refused);
            }
            self.iotlb.fetch(&wanted, false, until)?;
            before = missed;
        }
    }

    pub(super) fn until(&self) -> Instant {
        let now = Instant::now();
        now.checked_add(self.iotlb.patience).unwrap_or(now)
    }

    fn guard(&self, asking: bool) -> DeviceGuard {
        DeviceGuard {
            inner: self.space.memory(),
            missed: RefCell::default(),
            asking,
            until: self.until(),
            iotlb: self.iotlb.clone(),
        }
    }
}

/// Whether the front end has answered for something, and it is still forbidden: it has no more to give.
fn stays(before: &[(Miss, FaultReason)], now: &[(Miss, FaultReason)]) -> bool {
    now.iter().any(|miss| miss.1 == FaultReason::Permission && before.contains(miss))
}

impl GuestAddressSpace for DeviceMemory {
    type M = DeviceGuard;
    type T = Rc<DeviceGuard>;

    fn memory(&self) -> Self::T {
        Rc::new(self.guard(false))
    }
}

impl fmt::Debug for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceMemory").field("space", &self.space).finish_non_exhaustive()
    }
}

/// One batch of accesses of a [`DeviceMemory`]. It holds up every later INVALIDATE if it is leaked.
pub struct DeviceGuard {
    inner: Rc<OwnedMemoryGuard<Memory>>,
    missed: RefCell<Vec<(Miss, FaultReason)>>,
    /// Misses are noted, and nothing waits.
    asking: bool,
    until: Instant,
    iotlb: Arc<Iotlb>,
}

impl DeviceGuard {
    /// The guard on the IOTLB: translations without access, leases.
    #[must_use]
    pub fn translator(&self) -> &Translator {
        self.inner.translator()
    }

    /// The first addresses of `[addr, addr + count - 1]` that the IOTLB does not hold for `access`.
    fn lacks(&self, addr: GuestAddress, count: usize, access: Permissions) -> Vec<(Miss, FaultReason)> {
        let mut lacking = Vec::new();
        if !self.iotlb.is_active() {
            return lacking;
        }
        let bytes = u64::try_from(count).ok();
        let Some(range) = bytes.and_then(|bytes| IovaRange::from_len(Iova(addr.0), bytes)) else {
            return lacking;
        };
        let access = access_for(access);
        let mut at = range.start();
        while lacking.len() < AT_A_TIME {
            let last = match self.translator().probe(at, access) {
                Ok(hit) => hit.last,
                Err(fault) => match fault.reason {
                    FaultReason::Unmapped | FaultReason::Permission => {
                        let miss = Miss::at(at, access);
                        lacking.push((miss, fault.reason));
                        Iova(miss.page.0 | 0xfff)
                    }
                    _ => break, // nothing that an UPDATE would change
                },
            };
            match last.checked_add(1) {
                Some(next) if last < range.last() => at = next,
                _ => break,
            }
        }
        lacking
    }

    /// Asks for what is lacking: whether it is worth another look.
    fn miss(
        &self,
        before: &mut Vec<(Miss, FaultReason)>,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> bool {
        let lacking = self.lacks(addr, count, access);
        if self.asking {
            let mut missed = self.missed.borrow_mut();
            let room = AT_A_TIME.saturating_sub(missed.len());
            missed.extend(lacking.into_iter().take(room));
            return false;
        }
        if lacking.is_empty() || stays(before, &lacking) {
            return false;
        }
        let wanted: Vec<_> = lacking.iter().map(|(miss, _)| *miss).collect();
        *before = lacking;
        self.iotlb.fetch(&wanted, true, self.until).is_ok()
    }
}

impl GuestMemory for DeviceGuard {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let mut before = Vec::new();
        loop {
            if self.inner.check_range(addr, count, access) {
                return true;
            }
            if !self.miss(&mut before, addr, count, access) {
                return false;
            }
        }
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let mut before = Vec::new();
        loop {
            match self.inner.get_slices(addr, count, access) {
                Err(GuestMemoryError::InvalidGuestAddress(_))
                    if self.miss(&mut before, addr, count, access) => {}
                outcome => return outcome,
            }
        }
    }
}

impl fmt::Debug for DeviceGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceGuard").field("asking", &self.asking).finish_non_exhaustive()
    }
}

/// How long something may take that an access waits for, unless told otherwise.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
