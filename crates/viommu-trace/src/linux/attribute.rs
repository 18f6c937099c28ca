//! Which domain a mapping belongs to, found from the lines around it.

use std::collections::{BTreeMap, HashMap, VecDeque};

use viommu::addr::{Gpa, IovaRange};
use viommu::mapping::{Access, Target};

use super::line::{Said, Task};
use crate::event::{Entry, Event};

/// Entries that wait for a line that names their device.
const WAITING: usize = 2048;
/// How far back a naming line looks.
const LOOK_BACK: usize = 512;
/// Devices, groups and domain ids that are remembered.
const NAMES: usize = 32_768;
/// Domains whose mappings are remembered.
const DOMAINS: usize = 4096;
/// Mappings that are remembered, in all domains together.
const LIVE: usize = 1 << 20;
/// `dma_free` lines whose unmap is still to come.
const FREES: usize = 16;
/// The first group number of devices whose group the trace does not name.
const UNNAMED: u32 = 32_768;
/// The largest page that a bus address may have been rounded to.
const PAGE: u64 = 64 * 1024;

/// How much of Linux trace text could be attributed to a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attribution {
    /// `iommu:map` lines.
    pub maps: u64,
    /// Of these, attributed and told as events.
    pub maps_attributed: u64,
    /// `iommu:unmap` lines.
    pub unmaps: u64,
    /// Of these, attributed and told as events.
    pub unmaps_attributed: u64,
    /// Unmaps told without a line of their own, since the domain maps the range anew.
    pub unmaps_inferred: u64,
}

#[derive(Debug)]
enum State {
    Ready(Event),
    WaitingMap { range: IovaRange, phys: u64 },
    WaitingUnmap { range: IovaRange },
    Map { domain: u32, range: IovaRange, phys: u64, access: Access, target: Target, lost: Option<IovaRange> },
    Dropped,
}

struct Item {
    line: u64,
    time: Option<u64>,
    task: Task,
    state: State,
    /// Emitted before the item itself.
    attach: Option<(u32, u32)>,
}

#[derive(Clone, Copy)]
struct Device {
    endpoint: u32,
    group: usize,
    /// The generation of its group that it was attached to last.
    attached: Option<u32>,
}

struct Group {
    number: u32,
    generation: u32,
}

impl Group {
    fn domain(&self) -> u32 {
        self.generation << 16 | self.number
    }
}

/// The mappings of one domain: last address by first.
#[derive(Default)]
struct Live(BTreeMap<u64, u64>);

impl Live {
    /// All that overlaps `range`, as first and last address of each.
    fn over(&self, range: IovaRange) -> impl Iterator<Item = (u64, u64)> {
        let before = self.0.range(..range.start().0).next_back();
        let before = before.filter(move |(_, last)| **last >= range.start().0);
        before.into_iter().chain(self.0.range(range.start().0..=range.last().0)).map(|(s, l)| (*s, *l))
    }

    fn holds(&self, range: IovaRange) -> bool {
        self.over(range).next().is_some()
    }

    /// Takes `range` out; gives the number of mappings that there are more (or, negative, fewer).
    fn remove(&mut self, range: IovaRange) -> isize {
        let before = self.0.len().cast_signed();
        let hit: Vec<_> = self.over(range).collect();
        for (start, last) in hit {
            self.0.remove(&start);
            if start < range.start().0 {
                self.0.insert(start, range.start().0 - 1);
            }
            if let Some(next) = range.next()
                && last >= next.0
            {
                self.0.insert(next.0, last);
            }
        }
        self.0.len().cast_signed() - before
    }
}

/// Holds entries back until lines that follow have named their device.
#[derive(Default)]
pub(super) struct Attributor {
    items: VecDeque<Item>,
    devices: HashMap<Box<[u8]>, Device>,
    groups: Vec<Group>,
    by_number: HashMap<u64, usize>,
    /// Group by IOMMU and domain id.
    dids: HashMap<(Box<[u8]>, u64), usize>,
    /// `cache_tag_assign` whose attach is still to come.
    assigned: Option<(Task, Box<[u8]>, u64)>,
    frees: VecDeque<(Task, usize, IovaRange)>,
    domains: BTreeMap<u32, Live>,
    /// Mappings that nothing named.
    unknown: Live,
    live: usize,
    /// Not all mappings are remembered: that nobody else holds a range says nothing any more.
    overflow: bool,
    counts: Attribution,
}

impl Attributor {
    pub(super) fn counts(&self) -> Attribution {
        self.counts
    }

    pub(super) fn push_ready(&mut self, entry: Entry) {
        let Entry { line, time, event } = entry;
        self.push(line, time, Task::default(), State::Ready(event));
    }

    fn push(&mut self, line: u64, time: Option<u64>, task: Task, state: State) {
        self.items.push_back(Item { line, time, task, state, attach: None });
    }

    /// Moves the first item to `ready` where it is decided, or has waited long enough; `false` when it stays.
    pub(super) fn pop(&mut self, ready: &mut VecDeque<Entry>, done: bool) -> bool {
        let overdue = done || self.items.len() > WAITING;
        match self.items.front() {
            None => return false,
            Some(item) => match item.state {
                State::WaitingMap { .. } | State::WaitingUnmap { .. } if !overdue => return false,
                _ => {}
            },
        }
        let Some(item) = self.items.pop_front() else { return false };
        let Item { line, time, state, attach, .. } = item;
        let mut tell = |event| ready.push_back(Entry { line, time, event });
        if let Some((domain, endpoint)) = attach {
            tell(Event::Attach { domain, endpoint, bypass: false });
        }
        match state {
            State::Ready(event) => tell(event),
            State::Map { domain, range, phys, access, target, lost } => {
                if let Some(range) = lost {
                    tell(Event::Unmap { domain, range });
                }
                tell(Event::Map { domain, range, gpa: Gpa(phys), access, target });
            }
            State::WaitingMap { range, .. } => {
                self.make_room(None, range);
            }
            State::WaitingUnmap { range } => {
                let change = self.unknown.remove(range);
                self.live = self.live.saturating_add_signed(change);
            }
            State::Dropped => {}
        }
        true
    }

    /// Takes what a line says.
    pub(super) fn take(&mut self, line: u64, time: Option<u64>, task: Task, said: &Said<'_>) {
        match *said {
            Said::Map { range, phys } => {
                self.counts.maps += 1;
                self.push(line, time, task, State::WaitingMap { range, phys });
            }
            Said::Unmap { range } => self.unmap(line, time, task, range),
            Said::AddToGroup { group, device } => self.add_to_group(group, device),
            Said::Attach { device } => self.attach(line, time, task, device),
            Said::Assign { unit, did } => self.assigned = Some((task, unit.into(), did)),
            Said::Flush { unit, did, range, mapped } => {
                let Some(group) = self.group_of_did(unit, did) else { return };
                if mapped {
                    self.name_maps(task, group, range, 1, Access::RW, Target::Ram, None);
                } else {
                    self.name_unmaps(task, group, range, 1);
                }
            }
            Said::DmaMap { device, range, access, target } => {
                let Some(at) = self.device(device, None) else { return };
                self.name_maps(task, at.group, range, PAGE, access, target, Some(device));
            }
            Said::DmaUnmap { device, range } => {
                let Some(at) = self.device(device, None) else { return };
                self.name_unmaps(task, at.group, range, PAGE);
            }
            Said::DmaFree { device, range } => {
                let Some(at) = self.device(device, None) else { return };
                if self.frees.len() == FREES {
                    self.frees.pop_front();
                }
                self.frees.push_back((task, at.group, range));
            }
            Said::Mark(_) | Said::Other => {}
        }
    }

    fn new_group(&mut self, number: Option<u32>) -> Option<usize> {
        if self.groups.len() >= NAMES {
            return None;
        }
        let at = self.groups.len();
        let number = match number {
            Some(number) => number,
            None => UNNAMED + u32::try_from(at).ok()?,
        };
        self.groups.push(Group { number, generation: 0 });
        Some(at)
    }

    /// The device of that name, made where it is new.
    fn device(&mut self, name: &[u8], group: Option<usize>) -> Option<Device> {
        if let Some(device) = self.devices.get_mut(name) {
            if let Some(group) = group {
                device.group = group;
            }
            return Some(*device);
        }
        if self.devices.len() >= NAMES {
            return None;
        }
        let group = match group {
            Some(group) => group,
            None => self.new_group(None)?,
        };
        let endpoint = match pci_address(name) {
            Some(endpoint) => endpoint,
            None => (1 << 31) + u32::try_from(self.devices.len()).ok()?,
        };
        let device = Device { endpoint, group, attached: None };
        self.devices.insert(name.into(), device);
        Some(device)
    }

    fn add_to_group(&mut self, number: u64, device: &[u8]) {
        let group = match self.by_number.get(&number) {
            Some(group) => Some(*group),
            None => {
                let small = u32::try_from(number).ok().filter(|n| *n < UNNAMED);
                let group = self.new_group(small);
                if let Some(group) = group {
                    self.by_number.insert(number, group);
                }
                group
            }
        };
        if group.is_some() {
            self.device(device, group);
        }
    }

    fn attach(&mut self, line: u64, time: Option<u64>, task: Task, name: &[u8]) {
        let Some(device) = self.device(name, None) else { return };
        let Some(group) = self.groups.get_mut(device.group) else { return };
        if device.attached == Some(group.generation) {
            // Its first device to be attached once more takes the group to another domain.
            group.generation = (group.generation + 1) & 0xffff;
        }
        let generation = group.generation;
        let domain = group.domain();
        if let Some(device) = self.devices.get_mut(name) {
            device.attached = Some(generation);
        }
        if let Some((by, unit, did)) = self.assigned.take()
            && by == task
            && self.dids.len() < NAMES
        {
            self.dids.insert((unit, did), device.group);
        }
        // The group's direct mappings are made just before its device is attached.
        for at in self.recent() {
            let Some(item) = self.items.get(at) else { break };
            if let State::WaitingMap { range, phys } = item.state
                && item.task == task
                && range.start().0 == phys
            {
                self.decide_map(at, domain, Access::RW, Target::Ram);
            }
        }
        self.push(
            line,
            time,
            task,
            State::Ready(Event::Attach { domain, endpoint: device.endpoint, bypass: false }),
        );
    }

    fn group_of_did(&mut self, unit: &[u8], did: u64) -> Option<usize> {
        let key = (unit.into(), did);
        if let Some(group) = self.dids.get(&key) {
            return Some(*group);
        }
        if self.dids.len() >= NAMES {
            return None;
        }
        let group = self.new_group(None)?;
        self.dids.insert(key, group);
        Some(group)
    }

    /// Positions of the newest items, the newest first.
    fn recent(&self) -> impl Iterator<Item = usize> + use<> {
        let len = self.items.len();
        (len.saturating_sub(LOOK_BACK)..len).rev()
    }

    /// Positions of the waiting items of `task` that make up `range`, which may have been rounded to pages.
    fn matching(&self, task: Task, range: IovaRange, page: u64, maps: bool) -> Vec<usize> {
        let mask = page - 1;
        let (low, high) = (range.start().0 & !mask, range.last().0 | mask);
        let mut left = range.bytes();
        let mut found = Vec::new();
        for at in self.recent() {
            let Some(item) = self.items.get(at) else { break };
            let waiting = match item.state {
                State::WaitingMap { range, .. } if maps => range,
                State::WaitingUnmap { range } if !maps => range,
                _ => continue,
            };
            let Some(part) = waiting.intersect(range) else { continue };
            if item.task != task || waiting.start().0 < low || waiting.last().0 > high {
                continue;
            }
            found.push(at);
            left = left.saturating_sub(part.bytes());
            if left == 0 {
                break;
            }
        }
        // A flush names what it flushes to the byte. One that is wider gathers what others unmapped.
        if page == 1 && left > 0 {
            found.clear();
        }
        found
    }

    #[expect(clippy::too_many_arguments, reason = "one call from each kind of naming line")]
    fn name_maps(
        &mut self,
        task: Task,
        group: usize,
        range: IovaRange,
        page: u64,
        access: Access,
        target: Target,
        device: Option<&[u8]>,
    ) {
        let Some(domain) = self.groups.get(group).map(Group::domain) else { return };
        let found = self.matching(task, range, page, true);
        let first = found.last().copied();
        for at in found.into_iter().rev() {
            self.decide_map(at, domain, access, target);
        }
        // A trace that begins in the middle does not show the attach.
        if let (Some(first), Some(device)) = (first, device.and_then(|name| self.devices.get_mut(name)))
            && device.attached.is_none()
        {
            device.attached = Some(domain >> 16);
            let endpoint = device.endpoint;
            if let Some(item) = self.items.get_mut(first) {
                item.attach = Some((domain, endpoint));
            }
        }
    }

    fn decide_map(&mut self, at: usize, domain: u32, access: Access, target: Target) {
        let Some(&State::WaitingMap { range, phys }) = self.items.get(at).map(|item| &item.state) else {
            return;
        };
        self.counts.maps_attributed += 1;
        let lost = self.make_room(Some(domain), range);
        if lost.is_some() {
            self.counts.unmaps_inferred += 1;
        }
        if let Some(item) = self.items.get_mut(at) {
            item.state = State::Map { domain, range, phys, access, target, lost };
        }
    }

    /// Remembers a mapping of `domain`, or of nobody known; gives what it must have replaced.
    fn make_room(&mut self, domain: Option<u32>, range: IovaRange) -> Option<IovaRange> {
        let full = self.live >= LIVE;
        let crowded = self.domains.len() >= DOMAINS;
        let live = match domain {
            None => &mut self.unknown,
            Some(domain) if crowded && !self.domains.contains_key(&domain) => {
                self.overflow = true;
                return None;
            }
            Some(domain) => self.domains.entry(domain).or_default(),
        };
        let lost = live
            .over(range)
            .filter_map(|(start, last)| IovaRange::new(viommu::addr::Iova(start), viommu::addr::Iova(last)))
            .reduce(IovaRange::hull);
        if let Some(lost) = lost {
            self.live = self.live.saturating_add_signed(live.remove(lost));
        }
        if full {
            self.overflow = true;
        } else {
            live.0.insert(range.start().0, range.last().0);
            self.live += 1;
        }
        lost
    }

    fn unmap(&mut self, line: u64, time: Option<u64>, task: Task, range: IovaRange) {
        self.counts.unmaps += 1;
        let freed = self.frees.iter().position(|(by, _, freed)| *by == task && freed.overlaps(range));
        let domain = match freed.and_then(|at| self.frees.remove(at)) {
            Some((_, group, _)) => self.holder(group, range),
            None => self.only_holder(range),
        };
        match domain {
            Some(domain) => {
                self.forget(domain, range);
                self.push(line, time, task, State::Ready(Event::Unmap { domain, range }));
            }
            None => self.push(line, time, task, State::WaitingUnmap { range }),
        }
    }

    /// The one domain that holds something of `range`, if only one may.
    fn only_holder(&self, range: IovaRange) -> Option<u32> {
        let mut holders = self.domains.iter().filter(|(_, live)| live.holds(range));
        let only = *holders.next()?.0;
        let waits = |item: &Item| match item.state {
            State::WaitingMap { range: mapped, .. } => mapped.overlaps(range),
            _ => false,
        };
        let alone = holders.next().is_none()
            && !self.overflow
            && !self.unknown.holds(range)
            && !self.items.iter().any(waits);
        alone.then_some(only)
    }

    /// The domain of `group` that holds something of `range`: the newest.
    fn holder(&self, group: usize, range: IovaRange) -> Option<u32> {
        let number = self.groups.get(group)?.number;
        let mut domains = self.domains.iter().rev();
        domains
            .find(|(domain, live)| **domain & 0xffff == number && live.holds(range))
            .map(|(domain, _)| *domain)
    }

    fn name_unmaps(&mut self, task: Task, group: usize, range: IovaRange, page: u64) {
        for at in self.matching(task, range, page, false) {
            let Some(&State::WaitingUnmap { range }) = self.items.get(at).map(|item| &item.state) else {
                continue;
            };
            let Some(domain) = self.holder(group, range) else {
                // Mapped before the trace began, or by a line that nothing named.
                let change = self.unknown.remove(range);
                self.live = self.live.saturating_add_signed(change);
                if let Some(item) = self.items.get_mut(at) {
                    item.state = State::Dropped;
                }
                continue;
            };
            self.forget(domain, range);
            if let Some(item) = self.items.get_mut(at) {
                item.state = State::Ready(Event::Unmap { domain, range });
            }
        }
    }

    fn forget(&mut self, domain: u32, range: IovaRange) {
        self.counts.unmaps_attributed += 1;
        let Some(live) = self.domains.get_mut(&domain) else { return };
        self.live = self.live.saturating_add_signed(live.remove(range));
        if live.0.is_empty() {
            self.domains.remove(&domain);
        }
    }
}

/// `SSSS:BB:DD.F` as `segment << 16 | bus << 8 | devfn`.
fn pci_address(name: &[u8]) -> Option<u32> {
    let mut f = crate::parse::Fields(name);
    let segment = u16::try_from(f.hex("").ok()?).ok()?;
    let bus = f.hex8(":").ok()?;
    let device = f.hex8(":").ok().filter(|d| *d < 32)?;
    let function = f.hex8(".").ok().filter(|n| *n < 8)?;
    f.0.is_empty().then_some(())?;
    let rid = u32::from(bus) << 8 | u32::from(device << 3 | function);
    // Beyond, numbers are of devices that are not on PCI.
    (segment < 1 << 15).then_some(u32::from(segment) << 16 | rid)
}
