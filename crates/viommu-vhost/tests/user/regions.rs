//! Memory regions that come and go by themselves: the `vhost` crate's two ends, with ours between them.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserHeaderFlag,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, Frontend as VhostFrontend, GpuBackend, Result as VhostResult,
    VhostUserBackendReqHandlerMut, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionBase, VhostUserMemoryRegionInfo};
use viommu::{
    Access, Domain, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Interest, Iommu, Iova, IovaRange,
    Mapping, Medium, Subscription, Tables,
};
use viommu_vhost::spec::VIRTIO_F_ACCESS_PLATFORM;
use viommu_vhost::user::backend::{Backend, BackendError, BackendOptions};
use viommu_vhost::user::frontend::{Frontend, FrontendError};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, Permissions,
};

use super::support::{LIMIT, PAGE, memory, wait};

/// The second region's place in guest memory; the first is at 0.
const PLACE: u64 = 1 << 20;
const BYTES: u64 = 16 * PAGE;

/// A VMM and a device, each with the `vhost` crate's code for its end.
struct Both {
    iommu: Iommu,
    endpoint: Endpoint,
    domain: Domain,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    frontend: Arc<Frontend>,
    subscription: Arc<Subscription>,
    vhost: VhostFrontend,
    backend: Arc<Backend>,
    /// What the daemon's own code was told.
    heard: Arc<Mutex<Vec<(&'static str, u64)>>>,
    front: JoinHandle<FrontendError>,
    back: JoinHandle<BackendError>,
    daemon: JoinHandle<VhostError>,
}

fn both(options: BackendOptions) -> Both {
    let (main, theirs) = UnixStream::pair().unwrap();
    let (backend, inner) = Backend::new(theirs, options).unwrap();
    let backend = Arc::new(backend);
    let serving = backend.clone();
    let back = thread::spawn(move || serving.serve());
    let heard = Arc::new(Mutex::new(Vec::new()));
    let mut handler = BackendReqHandler::from_stream(inner, Arc::new(Mutex::new(Daemon(heard.clone()))));
    let daemon = thread::spawn(move || {
        loop {
            if let Err(error) = handler.handle_request() {
                return error;
            }
        }
    });

    let iommu = Iommu::builder().build().unwrap();
    let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    wait(endpoint.attach(1).unwrap());
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let (frontend, inner) = Frontend::new(main, LIMIT, None).unwrap();
    let cache = frontend.cache(memory.clone(), Box::new(|| Ok(())));
    let subscription = Arc::new(endpoint.subscribe_cache(Box::new(cache), Interest::CACHE).unwrap());
    let frontend = Arc::new(frontend);
    let (serving, fills) = (frontend.clone(), subscription.clone());
    let front = thread::spawn(move || serving.serve(&fills));

    let mut vhost = VhostFrontend::from_stream(inner, 1);
    vhost.set_owner().unwrap();
    vhost.get_features().unwrap();
    let wanted = VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(vhost.get_protocol_features().unwrap().contains(wanted));
    vhost.set_protocol_features(wanted).unwrap();
    vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    vhost.set_features(VIRTIO_F_ACCESS_PLATFORM | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()).unwrap();
    assert_eq!(vhost.get_max_mem_slots().unwrap(), 32);
    Both {
        iommu,
        endpoint,
        domain,
        memory,
        frontend,
        subscription,
        vhost,
        backend,
        heard,
        front,
        back,
        daemon,
    }
}

fn extent(start: u64) -> Extent {
    Extent { range: GpaRange::from_len(Gpa(start), BYTES).unwrap(), medium: Medium::Ram }
}

/// A region of its own file.
fn region(start: u64) -> Arc<GuestRegionMmap> {
    memory(&[(start, BYTES)]).remove_region(GuestAddress(start), BYTES).unwrap().1
}

fn mapping(iova: u64, gpa: u64) -> Mapping {
    Mapping::new(Iova(iova), PAGE, Gpa(gpa), Access::RW).unwrap()
}

impl Both {
    fn set(&self, memory: GuestMemoryMmap) {
        self.memory.lock().unwrap().replace(memory);
    }

    /// Memory is plugged: first the VMM has it, then the device, then the guest.
    fn add(&mut self, region: &Arc<GuestRegionMmap>) {
        self.set(self.memory.memory().insert_region(region.clone()).unwrap());
        self.vhost.add_mem_region(&VhostUserMemoryRegionInfo::from_guest_region(&**region).unwrap()).unwrap();
        wait(self.iommu.add_backing(extent(region.start_addr().0)).unwrap());
    }

    /// And unplugged, the other way round.
    fn remove(&mut self, region: &Arc<GuestRegionMmap>) {
        wait(self.iommu.remove_backing(extent(region.start_addr().0).range).unwrap());
        self.take(region).unwrap();
        self.set(self.memory.memory().remove_region(region.start_addr(), region.len()).unwrap().0);
    }

    fn take(&mut self, region: &Arc<GuestRegionMmap>) -> VhostResult<()> {
        let info = VhostUserMemoryRegionInfo::from_guest_region(&**region).unwrap();
        self.vhost.remove_mem_region(&info).map_err(|_| VhostError::Disconnected)
    }

    fn end(self) -> BackendError {
        self.backend.close();
        self.frontend.close();
        self.front.join().unwrap();
        self.daemon.join().unwrap();
        self.back.join().unwrap()
    }
}

fn word(region: &GuestRegionMmap, at: u64) -> u32 {
    region.read_obj(vm_memory::MemoryRegionAddress(at)).unwrap()
}

#[test]
fn region_when_added_is_reached_and_when_removed_is_not() {
    let mut both = both(BackendOptions::default());
    let (first, second) = (region(0), region(PLACE));
    both.add(&first);
    both.add(&second);
    for (iova, gpa) in [(0x1000, 0x3000), (0x2000, PLACE + 0x3000)] {
        wait(both.domain.map(mapping(iova, gpa)).unwrap());
    }
    let space = both.backend.memory().unwrap();
    space.memory().write_obj(1_u32, GuestAddress(0x1000)).unwrap();
    space.memory().write_obj(2_u32, GuestAddress(0x2000)).unwrap();
    assert_eq!((word(&first, 0x3000), word(&second, 0x3000)), (1, 2));

    both.remove(&second);
    space.memory().write_obj(9_u32, GuestAddress(0x2000)).unwrap_err();
    space.memory().write_obj(3_u32, GuestAddress(0x1000)).unwrap();
    assert_eq!((word(&first, 0x3000), word(&second, 0x3000)), (3, 2));

    // Other memory in the same place, which the guest maps in the same place.
    let third = region(PLACE);
    both.add(&third);
    wait(both.domain.unmap(IovaRange::from_len(Iova(0x2000), PAGE).unwrap()).unwrap());
    wait(both.domain.map(mapping(0x2000, PLACE + 0x3000)).unwrap());
    space.memory().write_obj(4_u32, GuestAddress(0x2000)).unwrap();
    assert_eq!((word(&second, 0x3000), word(&third, 0x3000)), (2, 4));
    assert!(both.subscription.audit().unwrap().is_clean());
    assert!(!both.endpoint.is_fenced());
    let heard = both.heard.lock().unwrap().clone();
    assert_eq!(heard, [("add", 0), ("add", PLACE), ("remove", PLACE), ("add", PLACE)]);
    both.end();
}

#[test]
fn region_when_removed_under_mappings_is_reached_by_none() {
    let mut both = both(BackendOptions::default());
    let (first, second) = (region(0), region(PLACE));
    both.add(&first);
    both.add(&second);
    wait(both.domain.map(mapping(0x2000, PLACE + 0x3000)).unwrap());
    let space = both.backend.memory().unwrap();
    space.memory().write_obj(2_u32, GuestAddress(0x2000)).unwrap();
    // The VMM forgets that the guest has it mapped still, and gives other memory in its place.
    both.take(&second).unwrap();
    assert_eq!(both.backend.entries(), 0);
    assert_eq!(both.backend.physical().memory().num_regions(), 1);
    space.memory().write_obj(9_u32, GuestAddress(0x2000)).unwrap_err();
    let third = region(PLACE);
    let memory = both.memory.memory().remove_region(GuestAddress(PLACE), BYTES).unwrap().0;
    both.set(memory.insert_region(third.clone()).unwrap());
    both.vhost.add_mem_region(&VhostUserMemoryRegionInfo::from_guest_region(&*third).unwrap()).unwrap();
    space.memory().write_obj(4_u32, GuestAddress(0x2000)).unwrap();
    assert_eq!((word(&second, 0x3000), word(&third, 0x3000)), (2, 4));
    both.end();
}

#[test]
fn region_is_gone_when_the_guard_that_uses_it_has_ended() {
    let mut both = both(BackendOptions::default());
    let first = region(0);
    both.add(&first);
    wait(both.domain.map(mapping(0x1000, 0x3000)).unwrap());
    let space = both.backend.memory().unwrap();
    space.memory().write_obj(1_u32, GuestAddress(0x1000)).unwrap();
    thread::scope(|scope| {
        let guard = space.memory();
        let slice =
            guard.get_slices(GuestAddress(0x1000), 4, Permissions::Write).unwrap().next().unwrap().unwrap();
        let removing = scope.spawn(|| both.take(&first));
        thread::sleep(Duration::from_millis(200));
        assert!(!removing.is_finished(), "answered while the region is used");
        slice.write_obj(7_u32, 0).unwrap(); // it is in the middle of it, and may
        drop(guard);
        removing.join().unwrap().unwrap();
    });
    assert_eq!(word(&first, 0x3000), 7);
    space.memory().write_obj(9_u32, GuestAddress(0x1000)).unwrap_err();
    assert_eq!(word(&first, 0x3000), 7);
    both.end();
}

#[test]
fn guard_that_begins_while_a_region_goes_reaches_nothing_of_it_later() {
    let mut both = both(BackendOptions::default());
    let first = region(0);
    both.add(&first);
    let space = both.backend.memory().unwrap();
    // Nothing is mapped yet: what is waited for is the memory's own users.
    let holds = space.memory();
    let late = thread::scope(|scope| {
        let removing = scope.spawn(|| both.take(&first));
        thread::sleep(Duration::from_millis(200));
        assert!(!removing.is_finished(), "answered while a guard is held");
        let late = space.memory();
        drop(holds);
        removing.join().unwrap().unwrap();
        late
    });
    // Other memory in the same place, while that guard lives.
    let second = region(0);
    both.set(GuestMemoryMmap::from_arc_regions(vec![second.clone()]).unwrap());
    both.vhost.add_mem_region(&VhostUserMemoryRegionInfo::from_guest_region(&*second).unwrap()).unwrap();
    wait(both.domain.map(mapping(0x1000, 0x3000)).unwrap());
    space.memory().write_obj(2_u32, GuestAddress(0x1000)).unwrap();
    let _reaches_the_new_or_nothing = late.write_obj(9_u32, GuestAddress(0x1004));
    assert_eq!(word(&first, 0x3004), 0, "memory that was removed has been written");
    drop(late);
    both.end();
}

#[test]
fn guard_that_never_ends_costs_the_connection_and_not_the_region() {
    let mut options = BackendOptions::default();
    options.limit = Duration::from_millis(200);
    let mut both = both(options);
    let first = region(0);
    both.add(&first);
    wait(both.domain.map(mapping(0x1000, 0x3000)).unwrap());
    let space = both.backend.memory().unwrap();
    let guard = space.memory();
    guard.write_obj(1_u32, GuestAddress(0x1000)).unwrap();
    both.take(&first).unwrap_err();
    assert_eq!(both.heard.lock().unwrap().len(), 1, "the daemon was told that it has gone");
    drop(guard);
    space.memory().write_obj(9_u32, GuestAddress(0x1000)).unwrap_err();
    assert_eq!(word(&first, 0x3000), 1);
    let error = both.end();
    assert!(matches!(error, BackendError::Busy(_)), "{error}");
}

#[test]
fn region_that_cannot_be_ends_the_connection() {
    type Say = fn(&mut VhostFrontend, VhostUserMemoryRegionInfo) -> bool;
    let cases: [(&str, Say); 5] = [
        ("the same again", |vhost, region| vhost.add_mem_region(&region).is_err()),
        ("another at its user addresses", |vhost, mut region| {
            region.guest_phys_addr += 1 << 30;
            vhost.add_mem_region(&region).is_err()
        }),
        ("behind the file's end", |vhost, mut region| {
            region.guest_phys_addr += 1 << 30;
            region.userspace_addr ^= 1 << 40;
            region.mmap_offset = PAGE;
            vhost.add_mem_region(&region).is_err()
        }),
        ("a part goes", |vhost, mut region| {
            region.memory_size = PAGE;
            vhost.remove_mem_region(&region).is_err()
        }),
        ("what is not there goes", |vhost, mut region| {
            region.guest_phys_addr += 1 << 30;
            vhost.remove_mem_region(&region).is_err()
        }),
    ];
    for (what, say) in cases {
        let mut both = both(BackendOptions::default());
        let first = region(0);
        both.add(&first);
        wait(both.domain.map(mapping(0x1000, 0x3000)).unwrap());
        let space = both.backend.memory().unwrap();
        space.memory().write_obj(1_u32, GuestAddress(0x1000)).unwrap();
        let info = VhostUserMemoryRegionInfo::from_guest_region(&*first).unwrap();
        assert!(say(&mut both.vhost, info), "{what}");
        space.memory().write_obj(9_u32, GuestAddress(0x1000)).unwrap_err();
        assert_eq!(word(&first, 0x3000), 1, "{what}");
        let error = both.end();
        assert!(matches!(error, BackendError::Table(_)), "{what}: {error}");
    }
}

/// A daemon's vhost-user code, which notes regions and leaves them to the back end.
struct Daemon(Arc<Mutex<Vec<(&'static str, u64)>>>);

fn unsupported<T>() -> VhostResult<T> {
    Err(VhostError::InvalidOperation("not offered"))
}

impl VhostUserBackendReqHandlerMut for Daemon {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(VIRTIO_F_ACCESS_PLATFORM | 1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        _table: &[VhostUserMemoryRegion],
        _files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        Ok(None) // the back end has it
    }

    fn set_vring_num(&mut self, _index: u32, _num: u32) -> VhostResult<()> {
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        _index: u32,
        _flags: VhostUserVringAddrFlags,
        _descriptor: u64,
        _used: u64,
        _available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        Ok(())
    }

    fn set_vring_base(&mut self, _index: u32, _base: u32) -> VhostResult<()> {
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, 0))
    }

    fn set_vring_kick(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }

    fn set_vring_call(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> VhostResult<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        type Bits = VhostUserProtocolFeatures;
        Ok(Bits::REPLY_ACK | Bits::BACKEND_REQ | Bits::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> VhostResult<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(1)
    }

    fn set_vring_enable(&mut self, _index: u32, _enable: bool) -> VhostResult<()> {
        Ok(())
    }

    fn get_config(&mut self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> VhostResult<Vec<u8>> {
        unsupported()
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> VhostResult<()> {
        unsupported()
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> VhostResult<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> VhostResult<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> VhostResult<()> {
        unsupported()
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(32)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        _file: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        self.0.lock().unwrap().push(("add", region.guest_phys_addr));
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        self.0.lock().unwrap().push(("remove", region.guest_phys_addr));
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostResult<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        unsupported()
    }
}
