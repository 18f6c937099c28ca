//! From guest physical addresses to this process's.

use viommu::{Gpa, Iova, IovaRange, Mapping, Target};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion as _};

/// Where the first part of an entry lies in this process, as far as that is linear.
pub(crate) type Resolve = Box<dyn Fn(&Mapping) -> Option<(IovaRange, u64)> + Send>;

/// As vm-memory has it at the time of the call: the part of the entry up to the end of the region that its first address is
/// in. `None` where this process has no memory: device registers, an address outside, a region that is not mapped.
pub(crate) fn resolve_in<A>(memory: A) -> Resolve
where
    A: GuestAddressSpace + Send + 'static,
    A::M: GuestMemoryBackend,
{
    Box::new(move |entry| first_part(&*memory.memory(), entry))
}

fn first_part<M: GuestMemoryBackend>(memory: &M, entry: &Mapping) -> Option<(IovaRange, u64)> {
    if entry.target == Target::Mmio {
        return None;
    }
    let start = entry.range.start();
    let Gpa(gpa) = entry.gpa;
    let region = memory.find_region(GuestAddress(gpa))?;
    let offset = region.to_region_addr(GuestAddress(gpa))?;
    let host = region.get_host_address(offset).ok()?.addr();
    let room = region.last_addr().0.checked_sub(gpa)?;
    let last = Iova(start.0.saturating_add(room)).min(entry.range.last());
    Some((IovaRange::new(start, last)?, u64::try_from(host).ok()?))
}
