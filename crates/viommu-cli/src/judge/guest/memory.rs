//! What recorded accesses touch: guest memory, mostly never there.

use std::collections::HashSet;
use std::sync::Arc;

use viommu::{Access, Fault, Iova, Place, Reader, Translation};
use viommu_memory::{EndpointMemory, MemoryGuard};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, Permissions,
};

pub(super) type Ram = Arc<GuestMemoryMmap>;

/// How an endpoint's device reaches memory.
pub(crate) enum Eyes {
    /// It asks for translations.
    Reader(Reader),
    /// It reads and writes.
    Memory(EndpointMemory<Ram>),
}

/// Bits of the addresses that memory is tried to be had for: address space alone, until it is touched.
const SIZES: [u32; 4] = [46, 42, 38, 32];
/// Where the rings are: behind all of them.
pub(super) const RINGS: u64 = 1 << 62;
/// Pages whose bytes are read and written; of others the address is compared. They stay in this process's memory.
const PAGES: usize = 32_768;

/// Guest memory from address 0 on, and the rings' above it.
pub(super) struct Sparse {
    ram: Ram,
    /// Without the rings.
    pub(super) bytes: u64,
    touched: HashSet<u64>,
    stamp: u8,
    /// Accesses that went through memory: bytes were moved.
    pub(super) moved: u64,
    /// Accesses of which the host address was compared.
    pub(super) compared: u64,
    /// Accesses where there is no such memory: device registers, interrupts, addresses beyond it.
    pub(super) translated: u64,
}

impl Sparse {
    /// As large as can be had.
    pub(super) fn new(rings: u64) -> Result<Self, Box<dyn std::error::Error>> {
        let rings = (GuestAddress(RINGS), usize::try_from(rings)?);
        let with = |bits: &u32| {
            let bytes = 1_u64 << bits;
            let ranges = [(GuestAddress(0), usize::try_from(bytes).ok()?), rings];
            Some((GuestMemoryMmap::from_ranges(&ranges).ok()?, bytes))
        };
        let (ram, bytes) = match SIZES.iter().find_map(with) {
            Some(found) => found,
            None => (GuestMemoryMmap::from_ranges(&[rings])?, 0),
        };
        Ok(Self {
            ram: Arc::new(ram),
            bytes,
            touched: HashSet::new(),
            stamp: 0,
            moved: 0,
            compared: 0,
            translated: 0,
        })
    }

    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Makes an access that `hit` is the translation of. An error says what is wrong with it.
    pub(super) fn access(
        &mut self,
        guard: &MemoryGuard<'_, Ram>,
        iova: Iova,
        access: Access,
        hit: &Translation,
    ) -> Result<(), String> {
        let memory = matches!(hit.place, Place::Ram | Place::Rom) && hit.gpa.0 < self.bytes;
        let Some(permissions) = permissions(access).filter(|_| memory) else {
            self.translated += 1;
            return Ok(());
        };
        let (at, gpa) = (GuestAddress(iova.0), GuestAddress(hit.gpa.0));
        let told = |error: GuestMemoryError| format!("no memory through the endpoint's view: {error}");
        let slice = guard.get_slices(at, 1, permissions).map_err(told)?.next();
        let slice = slice.ok_or("no slice through the endpoint's view")?.map_err(told)?;
        let there = self.ram.get_host_address(gpa).map_err(told)?;
        if slice.ptr_guard().as_ptr() != there.cast_const() {
            return Err(format!("the endpoint's view reaches another byte than that at {}", hit.gpa));
        }
        let page = hit.gpa.0 >> 12;
        if self.touched.len() >= PAGES && !self.touched.contains(&page) {
            self.compared += 1;
            return Ok(());
        }
        self.touched.insert(page);
        if access.contains(Access::WRITE) {
            let byte = self.ram.read_obj::<u8>(gpa).map_err(told)?.wrapping_add(1);
            guard.write_obj(byte, at).map_err(told)?;
            if self.ram.read_obj::<u8>(gpa).map_err(told)? != byte {
                return Err(format!("what is written does not arrive at {}", hit.gpa));
            }
        }
        if access.contains(Access::READ) {
            self.stamp = self.stamp.wrapping_add(1);
            self.ram.write_obj(self.stamp, gpa).map_err(told)?;
            if guard.read_obj::<u8>(at).map_err(told)? != self.stamp {
                return Err(format!("what is read does not come from {}", hit.gpa));
            }
        }
        self.moved += 1;
        Ok(())
    }
}

/// Makes an access that must fault as `fault`, which is reported then. An error says what is wrong with it. Gives whether
/// it could be made at all.
pub(super) fn fault(guard: &MemoryGuard<'_, Ram>, fault: &Fault) -> Result<bool, String> {
    let Some(permissions) = permissions(fault.access) else { return Ok(false) };
    match guard.get_slices(GuestAddress(fault.iova.0), 1, permissions) {
        Ok(_) => Err(format!("there is memory where the record has a fault: {}", fault.reason)),
        Err(_) => Ok(true),
    }
}

fn permissions(access: Access) -> Option<Permissions> {
    match (access.contains(Access::READ), access.contains(Access::WRITE)) {
        (true, false) => Some(Permissions::Read),
        (false, true) => Some(Permissions::Write),
        (true, true) => Some(Permissions::ReadWrite),
        (false, false) => None,
    }
}
