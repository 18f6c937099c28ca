//! vm-memory's `IommuMemory` over an endpoint.

use viommu::{Access, Completion, Domain, Iova, IovaRange};
use viommu_memory::iommu::EndpointIommu;
use vm_memory::bitmap::{AtomicBitmap, BitmapSlice, NewBitmap};
use vm_memory::iommu::Iommu as _;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, IommuMemory, Permissions, ReadVolatile, VolatileMemoryError,
    VolatileSlice,
};

use crate::{Memory, Rig};

fn over(rig: &Rig) -> IommuMemory<Memory, EndpointIommu> {
    let iommu = EndpointIommu::new(rig.endpoint.reader("iommu").unwrap());
    IommuMemory::new((*rig.memory).clone(), iommu, true, AtomicBitmap::with_len(1 << 20))
}

#[test]
fn accesses_are_translated_and_checked() {
    let rig = Rig::new();
    rig.map(0x1000, 1, 0x5000, Access::RW);
    rig.map(0x2000, 1, 0x2000, Access::RW);
    rig.map(0x3000, 1, 0x9000, Access::READ);
    let memory = over(&rig);
    memory.write_slice(&[7; 16], GuestAddress(0x1ff8)).unwrap();
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(0x5fff)).unwrap(), 7);
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(0x2007)).unwrap(), 7);
    assert!(memory.write_slice(&[7; 16], GuestAddress(0x2ff8)).is_err());
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(0x2ff8)).unwrap(), 0);
    assert!(memory.check_range(GuestAddress(0x1000), 0x3000, Permissions::Read));
    assert!(!memory.check_range(GuestAddress(0x1000), 0x3001, Permissions::Read));
    assert!(memory.read_slice(&mut [0; 0x3000], GuestAddress(0x1000)).is_ok());
    assert!(memory.iommu().translate(GuestAddress(0), 1, Permissions::Read).is_err());
}

#[test]
fn unmapped_is_unmapped_at_once_and_names_where() {
    let rig = Rig::new();
    let range = rig.map(0x1000, 2, 0x5000, Access::RW);
    let memory = over(&rig);
    memory.write_obj(7u8, GuestAddress(0x2000)).unwrap();
    let tail = IovaRange::new(Iova(0x2000), range.last()).unwrap();
    rig.domain.unmap(tail).unwrap().wait().unwrap();
    let error = memory.iommu().translate(GuestAddress(0x1ff8), 16, Permissions::Read).unwrap_err();
    let vm_memory::iommu::Error::CannotResolve { iova_range, .. } = error else { panic!("{error}") };
    assert_eq!((iova_range.base.0, iova_range.length), (0x2000, 8));
}

/// Two things that vm-memory's `Iotlb` panics at.
#[test]
fn last_page_of_all_and_no_bytes_at_all_are_ordinary() {
    let rig = Rig::new();
    rig.map(u64::MAX - 0xfff, 1, 0x1000, Access::RW);
    let memory = over(&rig);
    let iommu = memory.iommu();
    let last: Vec<_> = iommu.translate(GuestAddress(u64::MAX - 7), 8, Permissions::Write).unwrap().collect();
    assert_eq!((last.len(), last[0].base.0, last[0].length), (1, 0x1ff8, 8));
    assert!(iommu.translate(GuestAddress(u64::MAX), 2, Permissions::Read).is_err());
    assert_eq!(iommu.translate(GuestAddress(0x1234), 0, Permissions::Read).unwrap().count(), 0);
    assert_eq!(memory.read(&mut [], GuestAddress(0x1234)).unwrap(), 0);
}

/// A source that unmaps the page in the middle of being read into it.
struct Unmapping<'d>(&'d Domain, IovaRange, Option<Completion>);

impl ReadVolatile for Unmapping<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut done = self.0.unmap(self.1).unwrap();
        assert!(!done.is_complete(), "the access is not over");
        self.2 = Some(done);
        buf.copy_from(&[7u8; 8]);
        Ok(8)
    }
}

#[test]
fn access_in_progress_delays_the_unmap() {
    let rig = Rig::new();
    let range = rig.map(0x1000, 1, 0x5000, Access::RW);
    let memory = over(&rig);
    let mut source = Unmapping(&rig.domain, range, None);
    memory.read_exact_volatile_from(GuestAddress(0x1000), &mut source, 8).unwrap();
    assert!(source.2.unwrap().is_complete());
    assert_eq!(rig.memory.read_obj::<u8>(GuestAddress(0x5007)).unwrap(), 7);
    assert!(memory.read_obj::<u8>(GuestAddress(0x1000)).is_err());
}

/// The limit that `EndpointIommu` tells of: `IommuMemory` lets go of the iterator, and the slices stay.
#[test]
fn slices_collected_from_an_iommu_memory_do_not_delay_the_unmap() {
    let rig = Rig::new();
    let range = rig.map(0x1000, 1, 0x5000, Access::RW);
    let memory = over(&rig);
    let slices = memory.get_slices(GuestAddress(0x1000), 8, Permissions::Write).unwrap();
    let slices: Vec<_> = slices.map(Result::unwrap).collect();
    assert!(rig.domain.unmap(range).unwrap().is_complete());
    assert_eq!(slices.len(), 1);
}
