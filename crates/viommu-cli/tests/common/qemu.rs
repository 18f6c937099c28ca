//! A small virtio-iommu as QEMU's: it answers requests and writes the lines that QEMU traces.

use std::collections::BTreeMap;
use std::fmt::Write;

pub(crate) const READ: u32 = 1;
pub(crate) const WRITE: u32 = 2;
pub(crate) const MMIO: u32 = 4;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Map {
    pub(crate) last: u64,
    pub(crate) gpa: u64,
    pub(crate) flags: u32,
}

#[derive(Default)]
pub(crate) struct Domain {
    pub(crate) maps: BTreeMap<u64, Map>,
    pub(crate) members: Vec<u32>,
}

/// What the log should be counted as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) attach: u64,
    pub(crate) detach: u64,
    pub(crate) map: u64,
    pub(crate) unmap: u64,
    pub(crate) resets: u64,
    pub(crate) removed: u64,
    pub(crate) deviations: u64,
    pub(crate) translated: u64,
    pub(crate) msi: u64,
    pub(crate) bypass: u64,
    pub(crate) fault: u64,
    pub(crate) notified: u64,
}

#[derive(Default)]
pub(crate) struct Qemu {
    pub(crate) log: String,
    pub(crate) domains: BTreeMap<u32, Domain>,
    /// Endpoint and its domain.
    pub(crate) endpoints: BTreeMap<u32, Option<u32>>,
    /// Endpoints with a subscriber that wants MAP and UNMAP.
    pub(crate) notified: Vec<u32>,
    pub(crate) bypass: bool,
    pub(crate) counts: Counts,
    /// Microseconds; 0: lines without a time.
    pub(crate) clock: u64,
}

impl Qemu {
    pub(crate) fn line(&mut self, text: std::fmt::Arguments<'_>) {
        if self.clock != 0 {
            self.clock += 7;
            let (s, us) = (self.clock / 1_000_000, self.clock % 1_000_000);
            write!(self.log, "4711@{s}.{us:06}:").unwrap();
        }
        writeln!(self.log, "virtio_iommu_{text}").unwrap();
    }

    pub(crate) fn attach(&mut self, domain: u32, endpoint: u32) {
        self.counts.attach += 1;
        self.line(format_args!("attach domain={domain} endpoint={endpoint}"));
        if let Some(Some(old)) = self.endpoints.get(&endpoint).copied() {
            let dom = &self.domains[&old];
            if old == domain && dom.members == [endpoint] && !dom.maps.is_empty() {
                self.counts.deviations += 1;
            }
            self.leave(old, endpoint);
        } else if !self.endpoints.contains_key(&endpoint) {
            self.line(format_args!("get_endpoint Alloc endpoint={endpoint}"));
        }
        if !self.domains.contains_key(&domain) {
            self.line(format_args!("get_domain Alloc domain={domain}"));
            self.domains.insert(domain, Domain::default());
        }
        self.domains.get_mut(&domain).unwrap().members.push(endpoint);
        self.endpoints.insert(endpoint, Some(domain));
        self.switch(endpoint, true);
        for (start, map) in self.domains[&domain].maps.clone() {
            self.notify_map(endpoint, start, map);
        }
    }

    fn switch(&mut self, endpoint: u32, enabled: bool) {
        let (bus, device, function) = (endpoint >> 8, endpoint >> 3 & 31, endpoint & 7);
        self.line(format_args!(
            "switch_address_space Device {bus:02x}:{device:02x}.{function} switching address space (iommu enabled={})",
            u8::from(enabled)
        ));
    }

    fn leave(&mut self, domain: u32, endpoint: u32) {
        self.line(format_args!("detach_endpoint_from_domain domain={domain} endpoint={endpoint}"));
        for (start, map) in self.domains[&domain].maps.clone() {
            self.notify_unmap(endpoint, start, map.last);
        }
        self.endpoints.insert(endpoint, None);
        self.switch(endpoint, !self.bypass);
        let members = &mut self.domains.get_mut(&domain).unwrap().members;
        members.retain(|e| *e != endpoint);
        if members.is_empty() {
            self.domains.remove(&domain);
            self.line(format_args!("put_domain Free domain={domain}"));
        }
    }

    pub(crate) fn detach(&mut self, domain: u32, endpoint: u32) {
        self.counts.detach += 1;
        self.line(format_args!("detach domain={domain} endpoint={endpoint}"));
        if self.endpoints.get(&endpoint) == Some(&Some(domain)) {
            self.leave(domain, endpoint);
        }
    }

    fn region(endpoint: u32) -> String {
        format!("virtio-iommu-memory-region-{}-{}", endpoint >> 3, endpoint & 0xff)
    }

    fn notify_map(&mut self, endpoint: u32, start: u64, Map { last, gpa, flags }: Map) {
        if self.notified.contains(&endpoint) && flags & MMIO == 0 && flags & 3 != 0 {
            self.counts.notified += 1;
            let mr = Self::region(endpoint);
            self.line(format_args!(
                "notify_map mr={mr} virt_start={start:#x} virt_end={last:#x} phys_start={gpa:#x} flags={flags}"
            ));
        }
    }

    fn notify_unmap(&mut self, endpoint: u32, start: u64, last: u64) {
        if self.notified.contains(&endpoint) {
            self.counts.notified += 1;
            let mr = Self::region(endpoint);
            self.line(format_args!("notify_unmap mr={mr} virt_start={start:#x} virt_end={last:#x}"));
        }
    }

    fn touching(&self, domain: u32, start: u64, last: u64) -> Option<(u64, Map)> {
        let maps = &self.domains.get(&domain)?.maps;
        maps.range(..=last).next_back().filter(|(_, m)| m.last >= start).map(|(s, m)| (*s, *m))
    }

    /// Whether the mapping was made.
    pub(crate) fn map(&mut self, domain: u32, start: u64, last: u64, gpa: u64, flags: u32) -> bool {
        self.counts.map += 1;
        self.line(format_args!(
            "map domain={domain} virt_start={start:#x} virt_end={last:#x} phys_start={gpa:#x} flags={flags}"
        ));
        if !self.domains.contains_key(&domain) || self.touching(domain, start, last).is_some() {
            return false;
        }
        let map = Map { last, gpa, flags };
        for endpoint in self.domains[&domain].members.clone() {
            self.notify_map(endpoint, start, map);
        }
        self.domains.get_mut(&domain).unwrap().maps.insert(start, map);
        true
    }

    pub(crate) fn unmap(&mut self, domain: u32, start: u64, last: u64) {
        self.counts.unmap += 1;
        self.line(format_args!("unmap domain={domain} virt_start={start:#x} virt_end={last:#x}"));
        let mut removed = 0;
        while let Some((s, map)) = self.touching(domain, start, last) {
            if s < start || map.last > last {
                self.counts.deviations += u64::from(removed != 0);
                break;
            }
            for endpoint in self.domains[&domain].members.clone() {
                self.notify_unmap(endpoint, s, map.last);
            }
            self.domains.get_mut(&domain).unwrap().maps.remove(&s);
            self.line(format_args!("unmap_done domain={domain} virt_start={s:#x} virt_end={:#x}", map.last));
            removed += 1;
        }
        self.counts.removed += removed;
    }

    pub(crate) fn access(&mut self, endpoint: u32, iova: u64, flag: u32) {
        let mr = Self::region(endpoint);
        self.line(format_args!("translate mr={mr} rid={endpoint} addr={iova:#x} flag={flag}"));
        if iova >> 20 == 0xfee {
            self.counts.msi += 1;
            return;
        }
        let Some(domain) = self.endpoints.get(&endpoint).copied().flatten() else {
            if self.bypass {
                self.counts.bypass += 1;
            } else {
                self.fault(1, flag, endpoint, iova);
            }
            return;
        };
        match self.touching(domain, iova, iova) {
            Some((start, map)) if flag & !map.flags == 0 => {
                self.counts.translated += 1;
                let gpa = map.gpa + (iova - start);
                self.line(format_args!("translate_out {iova:#x} -> {gpa:#x} for sid={endpoint}"));
            }
            _ => self.fault(2, flag, endpoint, iova),
        }
    }

    fn fault(&mut self, reason: u32, flag: u32, endpoint: u32, iova: u64) {
        self.counts.fault += 1;
        self.line(format_args!(
            "report_fault FAULT reason={reason} flags={flag} endpoint={endpoint} address ={iova:#x}"
        ));
    }

    /// A reset of the device.
    pub(crate) fn reset(&mut self) {
        self.counts.resets += 1;
        self.line(format_args!("device_reset_exit reset!"));
        for (endpoint, domain) in self.endpoints.clone() {
            if let Some(domain) = domain {
                self.leave(domain, endpoint);
            }
            self.line(format_args!("put_endpoint Free endpoint={endpoint}"));
        }
        self.endpoints.clear();
    }

    /// The device's configuration, as the guest reads it.
    pub(crate) fn get_config(&mut self) {
        let bypass = u8::from(self.bypass);
        self.line(format_args!(
            "get_config page_size_mask=0xfffffffffffff000 input range start=0x0 input range end=0xffffffffffffffff \
             domain range start=0 domain range end=4294967295 probe_size=0x200 bypass={bypass:#x}"
        ));
    }
}
