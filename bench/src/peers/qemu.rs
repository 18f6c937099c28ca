//! As QEMU's virtio-iommu keeps its mappings: one mutex, a glib tree of endpoints, and a glib tree of heap keys and
//! heap values in which intervals that overlap compare as equal. The mutex here is cheaper than the recursive one there.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::peers::glib::{Endpoints, Interval, Mappings, Target};
use crate::peers::walk;
use crate::table::Table;

const READ: u32 = 1;
const READ_WRITE: u32 = 3;
const ENDPOINT: usize = 16;

struct Device {
    endpoints: Endpoints,
    mappings: Mappings,
}

#[derive(Clone)]
pub(crate) struct Qemu(Arc<Mutex<Device>>);

impl Table for Qemu {
    fn new() -> anyhow::Result<Self> {
        let endpoints = Endpoints::new(&[8, ENDPOINT, 24, 32])?;
        Ok(Self(Arc::new(Mutex::new(Device { endpoints, mappings: Mappings::new()? }))))
    }

    fn map(&mut self, iova: u64, bytes: u64, gpa: u64) -> bool {
        let key = Interval { low: iova, high: iova + (bytes - 1) };
        self.0.lock().is_ok_and(|mut device| device.mappings.insert(key, Target { gpa, flags: READ_WRITE }))
    }

    fn unmap(&mut self, iova: u64, bytes: u64) {
        let Ok(mut device) = self.0.lock() else { return };
        let wanted = Interval { low: iova, high: iova + (bytes - 1) };
        while let Some((key, _)) = device.mappings.find(&wanted) {
            let found = Interval { low: key.low, high: key.high };
            if found.low < wanted.low || found.high > wanted.high || !device.mappings.remove(&found) {
                return;
            }
        }
    }

    #[inline]
    fn translate(&mut self, iova: u64) -> Option<u64> {
        let device = self.0.lock().ok()?;
        if device.endpoints.domain(ENDPOINT) != 1 {
            return None;
        }
        let (key, value) = device.mappings.find(&Interval { low: iova, high: iova + 1 })?;
        (value.flags & READ != 0).then(|| value.gpa + (iova - key.low))
    }

    fn replay(&mut self) -> Option<(Duration, u64)> {
        let device = self.0.lock().ok()?;
        Some(walk(|see| {
            device.mappings.each(&mut |key, value| see(key.low, key.high - key.low + 1, value.gpa));
        }))
    }
}
