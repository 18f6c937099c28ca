//! Structures and requests of <linux/iommufd.h>, and those of <linux/vfio.h> for a device's file.

/// Requests: `_IO(';', 0x80 + n)`, without a size in them.
const fn request(number: u32) -> u32 {
    0x3b80 + number
}

pub(super) const DESTROY: u32 = request(0);
pub(super) const IOAS_ALLOC: u32 = request(1);
pub(super) const IOAS_IOVA_RANGES: u32 = request(4);
pub(super) const IOAS_MAP: u32 = request(5);
pub(super) const IOAS_UNMAP: u32 = request(6);
pub(super) const HWPT_ALLOC: u32 = request(9);
pub(super) const GET_HW_INFO: u32 = request(10);
pub(super) const HWPT_SET_DIRTY_TRACKING: u32 = request(11);
pub(super) const HWPT_GET_DIRTY_BITMAP: u32 = request(12);
pub(super) const IOAS_MAP_FILE: u32 = request(15);

/// On a device's file: `_IO(';', 100 + 18)` and those after it.
pub(super) const DEVICE_BIND_IOMMUFD: u32 = 0x3b76;
pub(super) const DEVICE_ATTACH_IOMMUFD_PT: u32 = 0x3b77;
pub(super) const DEVICE_DETACH_IOMMUFD_PT: u32 = 0x3b78;

/// Of IOAS_MAP: the address is the caller's; the device may write; the device may read.
pub(super) const MAP_FIXED_IOVA: u32 = 1;
pub(super) const MAP_WRITEABLE: u32 = 2;
pub(super) const MAP_READABLE: u32 = 4;
/// Of HWPT_ALLOC: the table says which pages were written.
pub(super) const HWPT_DIRTY_TRACKING: u32 = 2;
/// Of HWPT_SET_DIRTY_TRACKING.
pub(super) const DIRTY_TRACKING_ENABLE: u32 = 1;
/// Of GET_HW_INFO's capabilities.
pub(super) const CAP_DIRTY_TRACKING: u64 = 1;

/// What an argument begins with.
pub(super) const fn size_of_arg<T>() -> u32 {
    let size = size_of::<T>();
    assert!(size < 4096);
    #[expect(clippy::cast_possible_truncation, reason = "just looked at")]
    let size = size as u32;
    size
}

/// An argument: its first word is its size.
#[repr(C)]
pub(super) struct Destroy {
    pub(super) size: u32,
    pub(super) id: u32,
}

#[repr(C)]
pub(super) struct IoasAlloc {
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) out_ioas: u32,
}

/// What IOAS_IOVA_RANGES fills a list with: both ends are inside.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct IovaRangeEntry {
    pub(super) start: u64,
    pub(super) last: u64,
}

#[repr(C)]
pub(super) struct IoasIovaRanges {
    pub(super) size: u32,
    pub(super) ioas: u32,
    pub(super) count: u32,
    pub(super) reserved: u32,
    pub(super) ranges: u64,
    pub(super) out_alignment: u64,
}

#[repr(C)]
pub(super) struct IoasMap {
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) ioas: u32,
    pub(super) reserved: u32,
    pub(super) vaddr: u64,
    pub(super) length: u64,
    pub(super) iova: u64,
}

#[repr(C)]
pub(super) struct IoasMapFile {
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) ioas: u32,
    pub(super) fd: i32,
    pub(super) start: u64,
    pub(super) length: u64,
    pub(super) iova: u64,
}

#[repr(C)]
pub(super) struct IoasUnmap {
    pub(super) size: u32,
    pub(super) ioas: u32,
    pub(super) iova: u64,
    pub(super) length: u64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct HwptAlloc {
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) device: u32,
    pub(super) ioas: u32,
    pub(super) out_hwpt: u32,
    pub(super) reserved: u32,
    pub(super) data_type: u32,
    pub(super) data_length: u32,
    pub(super) data: u64,
    pub(super) fault: u32,
    pub(super) reserved2: u32,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct GetHwInfo {
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) device: u32,
    pub(super) data_length: u32,
    pub(super) data: u64,
    pub(super) out_type: u32,
    pub(super) out_pasid_bits: u8,
    pub(super) reserved: [u8; 3],
    pub(super) out_capabilities: u64,
}

#[repr(C)]
pub(super) struct SetDirtyTracking {
    pub(super) size: u32,
    pub(super) flags: u32,
    pub(super) hwpt: u32,
    pub(super) reserved: u32,
}

#[repr(C)]
pub(super) struct GetDirtyBitmap {
    pub(super) size: u32,
    pub(super) hwpt: u32,
    pub(super) flags: u32,
    pub(super) reserved: u32,
    pub(super) iova: u64,
    pub(super) length: u64,
    pub(super) page_size: u64,
    pub(super) data: u64,
}

#[repr(C)]
pub(super) struct DeviceBind {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) iommufd: i32,
    pub(super) out_device: u32,
}

#[repr(C)]
pub(super) struct DeviceAttach {
    pub(super) argsz: u32,
    pub(super) flags: u32,
    pub(super) table: u32,
}

const _: () = {
    assert!(size_of::<Destroy>() == 8 && size_of::<IoasAlloc>() == 12 && size_of::<IoasIovaRanges>() == 32);
    assert!(size_of::<IoasMap>() == 40 && size_of::<IoasMapFile>() == 40 && size_of::<IoasUnmap>() == 24);
    assert!(size_of::<HwptAlloc>() == 48 && size_of::<GetHwInfo>() == 40);
    assert!(size_of::<SetDirtyTracking>() == 16 && size_of::<GetDirtyBitmap>() == 48);
    assert!(size_of::<DeviceBind>() == 16 && size_of::<DeviceAttach>() == 12);
    assert!(core::mem::offset_of!(IoasMap, vaddr) == 16 && core::mem::offset_of!(IoasMap, iova) == 32);
    assert!(core::mem::offset_of!(GetHwInfo, out_capabilities) == 32);
};
