//! What the mirrors of one binding share: the iommufd, its devices, and which tables they are switched between.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use viommu::EndpointId;
use viommu::subscribe::{FenceFailed, RefusalKind, Refused, Space};

use crate::errno::Errno;
use crate::iommufd::device::Device;
use crate::iommufd::ioas::Ioas;
use crate::iommufd::kernel::{Kernel, Limits};

/// Shared by binding, mirrors and handle. A mirror's own lock is taken before that of `devices`.
pub(super) struct Hub {
    pub(super) kernel: Arc<dyn Kernel>,
    devices: Mutex<Devices>,
}

/// A device, and where it is.
pub(super) struct Slot {
    device: Box<dyn Device>,
    tracks: bool,
    pub(super) limits: Limits,
    /// The IOAS whose table it uses.
    at: Option<u32>,
}

/// A hardware page table, filled from an IOAS.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hwpt {
    pub(super) id: u32,
    /// Whether it says which pages were written.
    pub(super) tracks: bool,
}

/// What a space of the record's has here: one IOAS, and as many hardware page tables as its devices' IOMMUs need.
pub(super) struct Table {
    space: Space,
    pub(super) ioas: u32,
    pub(super) hwpts: Vec<Hwpt>,
    pub(super) state: Weak<Mutex<Ioas>>,
}

#[derive(Default)]
pub(super) struct Devices {
    pub(super) slots: BTreeMap<EndpointId, Slot>,
    /// The newest of a space's last: an older one may wait for the end of its completion.
    pub(super) tables: Vec<Table>,
    /// Whether written pages are tracked.
    pub(super) tracking: bool,
}

impl Hub {
    pub(super) fn new(kernel: Arc<dyn Kernel>) -> Self {
        Self { kernel, devices: Mutex::default() }
    }

    pub(super) fn devices(&self) -> MutexGuard<'_, Devices> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a device, and finds out what it leaves of an address space.
    pub(super) fn add(&self, id: EndpointId, mut device: Box<dyn Device>) -> Result<Limits, Errno> {
        let mut devices = self.devices();
        if devices.slots.contains_key(&id) {
            return Err(Errno::EEXIST);
        }
        let tracks = self.kernel.can_track(device.id())?;
        let group = device.group();
        let neighbour = devices.slots.values().find(|slot| group.is_some() && slot.device.group() == group);
        let limits = match neighbour {
            // It could not be attached where its group is not; and what one may reach, all of them may.
            Some(slot) => slot.limits.clone(),
            None => self.look(&mut *device)?,
        };
        devices.slots.insert(id, Slot { device, tracks, limits: limits.clone(), at: None });
        Ok(limits)
    }

    /// What a device leaves of an IOAS is known once it is attached to one: to an empty one, for a moment.
    fn look(&self, device: &mut dyn Device) -> Result<Limits, Errno> {
        let ioas = self.kernel.ioas_alloc()?;
        let limits = device.attach(ioas).and_then(|()| {
            let limits = self.kernel.limits(ioas);
            device.detach()?;
            limits
        });
        let destroyed = self.kernel.destroy(ioas);
        limits.and_then(|limits| destroyed.map(|()| limits))
    }

    /// Gives a device back, detached.
    pub(super) fn remove(&self, id: EndpointId) -> Result<Box<dyn Device>, Errno> {
        let mut devices = self.devices();
        let mut slot = devices.slots.remove(&id).ok_or(Errno::ENODEV)?;
        if slot.at.is_some()
            && let Err(errno) = slot.device.detach()
        {
            devices.slots.insert(id, slot);
            return Err(errno);
        }
        Ok(slot.device)
    }

    /// A new IOAS for a space, with a table of the kind that `first` needs: what is mapped is pinned at once then, and
    /// refused where it cannot be.
    pub(super) fn make(&self, first: EndpointId) -> Result<(u32, Hwpt, Limits), Refused> {
        let devices = self.devices();
        let slot = devices.slots.get(&first).ok_or_else(|| no_device(first))?;
        let ioas = self.kernel.ioas_alloc().map_err(|e| e.refused("IOAS_ALLOC"))?;
        match self.hwpt(ioas, slot, devices.tracking) {
            Ok(hwpt) => Ok((ioas, hwpt, slot.limits.clone())),
            Err(refused) => {
                self.forget(ioas);
                Err(refused)
            }
        }
    }

    fn hwpt(&self, ioas: u32, slot: &Slot, tracking: bool) -> Result<Hwpt, Refused> {
        let alloc = |tracks| self.kernel.hwpt_alloc(slot.device.id(), ioas, tracks);
        let id = alloc(slot.tracks).map_err(|e| e.refused("HWPT_ALLOC"))?;
        if tracking
            && slot.tracks
            && let Err(errno) = self.kernel.track(id, true)
        {
            self.forget(id);
            return Err(errno.refused("HWPT_SET_DIRTY_TRACKING"));
        }
        Ok(Hwpt { id, tracks: slot.tracks })
    }

    /// Takes away what nobody uses. What is still used goes with the iommufd.
    fn forget(&self, id: u32) {
        let _ = self.kernel.destroy(id);
    }

    pub(super) fn register(&self, space: Space, ioas: u32, hwpt: Hwpt, state: Weak<Mutex<Ioas>>) {
        self.devices().tables.push(Table { space, ioas, hwpts: vec![hwpt], state });
    }

    /// The end of an IOAS: whatever it still maps goes with it.
    pub(super) fn close(&self, ioas: u32) {
        let mut devices = self.devices();
        let gone: Vec<Table> = devices.tables.extract_if(.., |table| table.ioas == ioas).collect();
        gone.iter().flat_map(|table| &table.hwpts).for_each(|hwpt| self.forget(hwpt.id));
        self.forget(ioas);
    }

    /// Switches a device to the IOAS of a space.
    pub(super) fn bind(&self, id: EndpointId, space: Space) -> Result<(), Refused> {
        let mut devices = self.devices();
        let Devices { slots, tables, tracking } = &mut *devices;
        let slot = slots.get_mut(&id).ok_or_else(|| no_device(id))?;
        let table = tables.iter_mut().rev().find(|table| table.space == space);
        let table =
            table.ok_or_else(|| Refused::new(RefusalKind::Device, format!("no table for {space}")))?;
        for hwpt in &table.hwpts {
            match slot.device.attach(hwpt.id) {
                Ok(()) => {
                    slot.at = Some(table.ioas);
                    return Ok(());
                }
                // Made for another kind of IOMMU; or its group is elsewhere, which is seen again below.
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(errno.refused("ATTACH_IOMMUFD_PT")),
            }
        }
        let hwpt = self.hwpt(table.ioas, slot, *tracking)?;
        if let Err(errno) = slot.device.attach(hwpt.id) {
            self.forget(hwpt.id);
            return Err(errno.refused("ATTACH_IOMMUFD_PT"));
        }
        table.hwpts.push(hwpt);
        slot.at = Some(table.ioas);
        Ok(())
    }

    /// Takes a device off whatever it uses.
    pub(super) fn unbind(&self, id: EndpointId) -> Result<(), Refused> {
        let mut devices = self.devices();
        let slot = devices.slots.get_mut(&id).ok_or_else(|| no_device(id))?;
        slot.leave().map_err(|e| e.refused("DETACH_IOMMUFD_PT"))
    }

    /// Cuts off the devices that `wanted` says, and all of their groups.
    pub(super) fn cut_off(
        &self,
        wanted: impl Fn(EndpointId, Option<u32>) -> bool,
    ) -> Result<(), FenceFailed> {
        let mut devices = self.devices();
        let slots = &mut devices.slots;
        let groups: Vec<u32> = (slots.iter().filter(|(id, slot)| wanted(**id, slot.at)))
            .filter_map(|(_, slot)| slot.device.group())
            .collect();
        let mut failed = Vec::new();
        for (id, slot) in slots.iter_mut() {
            let in_group = slot.device.group().is_some_and(|group| groups.contains(&group));
            if (in_group || wanted(*id, slot.at))
                && let Err(errno) = slot.leave()
            {
                failed.push(format!("DETACH_IOMMUFD_PT of {id}: {errno}"));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(FenceFailed(failed.join("; "))) }
    }

    /// Has every table track, or none.
    pub(super) fn track(&self, on: bool) -> Result<(), Errno> {
        let mut devices = self.devices();
        if on && devices.slots.values().any(|slot| !slot.tracks) {
            return Err(Errno::EOPNOTSUPP);
        }
        let all = devices.tables.iter().flat_map(|table| &table.hwpts).filter(|hwpt| hwpt.tracks);
        let all: Vec<u32> = all.map(|hwpt| hwpt.id).collect();
        for (at, hwpt) in all.iter().enumerate() {
            if let Err(errno) = self.kernel.track(*hwpt, on) {
                if on && !devices.tracking {
                    // One that cannot be switched off again tracks for nobody.
                    all.iter().take(at).for_each(|before| {
                        let _ = self.kernel.track(*before, false);
                    });
                }
                return Err(errno);
            }
        }
        devices.tracking = on;
        Ok(())
    }
}

impl Slot {
    fn leave(&mut self) -> Result<(), Errno> {
        if self.at.is_some() {
            self.device.detach()?;
            self.at = None;
        }
        Ok(())
    }
}

fn no_device(id: EndpointId) -> Refused {
    Refused::new(RefusalKind::Unsupported, format!("no device was added for endpoint {id}"))
}
