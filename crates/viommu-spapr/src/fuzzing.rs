//! Any bytes, read as what a hostile guest and its embedder do: hypercalls with good and bad arguments, windows that come
//! and go, resets, endpoints plugged with mirrors that refuse. After each, the record is held against an array of entries
//! for each window, every copy against the record. For fuzzing and tests alone; nothing here is stable.

use core::ops::ControlFlow;

use viommu::fuzzing::recording::{Event, Handle, RecordingCache, RecordingMirror};
use viommu::subscribe::Reach;
use viommu::{
    Access, Endpoint, EndpointConfig, Extent, Gpa, GpaRange, Interest, Iommu, Iova, IovaRange, Medium,
    Reader, Subscription,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::metrics::CALLS;
use crate::spec::{self, Code, PageSizes};
use crate::{Bus, BusConfig, Merge, Slot, Spapr, Window};

const MEMORY: u64 = 1 << 16;
const LIST: u64 = 0x2000;
/// RAM to here, ROM to the next, nothing behind.
const RAM: u64 = 0x8_0000;
const BACKED: u64 = 0x9_0000;
const DEFAULT: u32 = 0x10;
const SLOTS: [Slot; 2] = [Slot { liobn: 0x11, start: 1 << 20 }, Slot { liobn: 0x12, start: 1 << 59 }];
const ENTRIES: u64 = 64;
const MAPPINGS: u64 = 24;
const STEPS: usize = 128;
const IDS: [u32; 3] = [8, 9, 0x100];

/// Bytes to take from.
struct Input<'d>(&'d [u8]);

impl Input<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn long(&mut self) -> u64 {
        u64::from_le_bytes(core::array::from_fn(|_| self.byte()))
    }
}

struct Member {
    endpoint: Endpoint,
    reader: Reader,
    mirror: Handle,
    /// Mirror and cache. Who drops one, leaves.
    subscriptions: [Subscription; 2],
    limited: bool,
}

/// What each entry of each window says, and nothing cleverer: 0 is not mapped.
#[derive(Clone, Default)]
struct Model(Vec<(Window, Vec<u64>)>);

enum Expected {
    Parameter,
    Value(u64),
    /// Entries of a window, from an index on.
    Set {
        window: usize,
        first: usize,
        entries: Vec<u64>,
    },
}

struct World {
    spapr: Spapr,
    bus: Bus,
    memory: GuestMemoryMmap,
    members: [Option<Member>; 3],
    model: Model,
    merge: Merge,
}

fn config() -> BusConfig {
    BusConfig {
        default_window: Window::new(DEFAULT, 0, 17, 12),
        slots: SLOTS.to_vec(),
        page_sizes: PageSizes::K4 | PageSizes::K64,
        entries: ENTRIES,
    }
}

fn spapr(merge: Merge) -> (Spapr, Bus) {
    let rom = GpaRange::new(Gpa(RAM), Gpa(BACKED - 1)).expect("a range");
    let builder = Iommu::builder().ram(0, RAM).backing(Extent { range: rom, medium: Medium::Rom });
    // A cut has no room at a cap, and takes more along than the model knows.
    let builder = if merge == Merge::Never { builder.domain_mappings(MAPPINGS) } else { builder };
    let spapr = Spapr::new(builder.table_bytes(1 << 20), merge).expect("a small one");
    let bus = spapr.add_bus(1, config()).expect("a bus of this module's own");
    (spapr, bus)
}

impl Model {
    fn reset(&mut self) {
        self.0 = config().default_window.into_iter().map(|window| (window, vec![0; 32])).collect();
    }

    /// What an entry becomes by a TCE; `None`: it is refused.
    fn entry(window: &Window, tce: u64) -> Option<u64> {
        if tce & 3 == 0 {
            return Some(0);
        }
        let (gpa, page) = (tce & !3, window.page());
        let fits = gpa % page == 0 && gpa.checked_add(page).is_some_and(|end| end <= BACKED);
        fits.then_some(tce)
    }

    fn expect(
        &self,
        number: u64,
        [liobn, ioba, third, fourth]: [u64; 4],
        memory: &GuestMemoryMmap,
    ) -> Expected {
        let Some(window) = self.0.iter().position(|(window, _)| u64::from(window.liobn) == liobn) else {
            return Expected::Parameter;
        };
        let (shape, table) = &self.0[window];
        if ioba < shape.range.start().0 || ioba > shape.range.last().0 {
            return Expected::Parameter;
        }
        let first = usize::try_from((ioba - shape.range.start().0) / shape.page()).expect("small");
        let tces = match number {
            spec::H_GET_TCE => return Expected::Value(table[first]),
            spec::H_PUT_TCE => vec![third],
            spec::H_STUFF_TCE if third & 3 != 0 => return Expected::Parameter,
            spec::H_STUFF_TCE => match usize::try_from(fourth) {
                Ok(count) if count <= table.len() => vec![0; count],
                _ => return Expected::Parameter,
            },
            _ => {
                if fourth > 512 || third % 4096 != 0 {
                    return Expected::Parameter;
                }
                let read = |at: u64| {
                    let mut bytes = [0; 8];
                    let at = third.checked_add(8 * at)?;
                    memory.read_slice(&mut bytes, GuestAddress(at)).ok()?;
                    Some(u64::from_be_bytes(bytes))
                };
                match (0..fourth).map(read).collect::<Option<Vec<u64>>>() {
                    Some(tces) => tces,
                    None => return Expected::Parameter,
                }
            }
        };
        if tces.is_empty() || first + tces.len() > table.len() {
            return Expected::Parameter;
        }
        match tces.iter().map(|tce| Self::entry(shape, *tce)).collect() {
            Some(entries) => Expected::Set { window, first, entries },
            None => Expected::Parameter,
        }
    }

    /// What a device reads through at an address.
    fn at(&self, iova: u64) -> Option<u64> {
        let (window, table) = self.0.iter().find(|(window, _)| window.range.contains(Iova(iova)))?;
        let offset = iova - window.range.start().0;
        let entry = table[usize::try_from(offset / window.page()).expect("small")];
        (entry & 1 != 0).then_some((entry & !3) + offset % window.page())
    }
}

impl World {
    fn new(header: u8) -> Self {
        let merge = if header & 1 == 0 { Merge::Never } else { Merge::Hypercall };
        let (spapr, bus) = spapr(merge);
        let size = usize::try_from(MEMORY).expect("small");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("64 KiB");
        let mut model = Model::default();
        model.reset();
        let mut world = Self { spapr, bus, memory, members: [None, None, None], model, merge };
        world.plug(0, header >> 1);
        world.plug(1, 4);
        world
    }

    fn plug(&mut self, at: usize, shape: u8) {
        let near = IovaRange::new(Iova(0), Iova((1 << 20) + 0xffff)).expect("a range");
        let reach = Reach {
            apertures: if shape & 1 == 0 { vec![IovaRange::ALL] } else { vec![near] },
            entries: (shape & 2 != 0).then_some(8),
            replace: shape & 4 != 0,
            batches: shape & 8 != 0,
            wide_unmap: shape & 16 == 0,
            ..Reach::default()
        };
        let limited = shape & 3 != 0;
        let Ok((endpoint, done)) = self.bus.add_endpoint(IDS[at], EndpointConfig::default()) else {
            panic!("nothing is in the way of an endpoint without regions and subscribers");
        };
        done.wait().expect("nobody holds a guard");
        let (mirror, handle) = RecordingMirror::new(reach);
        let (cache, _) = RecordingCache::new();
        let mirror = endpoint.subscribe_mirror(mirror, Interest::MIRROR);
        let cache = endpoint.subscribe_cache(cache, Interest::CACHE).expect("a cache has no limits");
        let reader = endpoint.reader("fuzz").expect("it is there");
        match mirror {
            Ok(mirror) => {
                let subscriptions = [mirror, cache];
                self.members[at] = Some(Member { endpoint, reader, mirror: handle, subscriptions, limited });
            }
            Err(error) => {
                assert!(limited, "a mirror without limits is refused: {error}");
                drop((reader, cache));
                endpoint.remove().expect("it is there").wait().expect("nobody holds a guard");
            }
        }
    }

    /// A hypercall, and what must become of it.
    fn call(&mut self, number: u64, args: [u64; 4]) {
        let expected = self.model.expect(number, args, &self.memory);
        let before = self.bus.domain().len();
        self.members.iter().flatten().for_each(|member| drop(member.mirror.take()));
        let answer = self.spapr.hypercall(number, args, &self.memory).expect("one of the four");
        let answer = answer.wait().expect("nobody holds a guard");
        match expected {
            Expected::Parameter => {
                assert_eq!((answer.code, answer.value), (Code::Parameter, 0));
                assert_eq!(self.bus.domain().len(), before);
            }
            Expected::Value(value) => assert_eq!((answer.code, answer.value), (Code::Success, value)),
            Expected::Set { window, first, entries } => {
                let table = &mut self.model.0[window].1[first..first + entries.len()];
                if *table == entries[..] {
                    let told = |member: &Member| member.mirror.lock().log.clone();
                    let told: Vec<Event> = self.members.iter().flatten().flat_map(told).collect();
                    assert_eq!((answer.code, told), (Code::Success, vec![]), "nothing is different");
                }
                let adds = table.iter().zip(&entries).any(|(old, new)| *new != 0 && old != new);
                match answer.code {
                    Code::Success => table.copy_from_slice(&entries),
                    Code::Resource => {
                        assert!(adds, "a clear is refused");
                        assert!(self.can_refuse(), "L4: a refusal with nobody to say it");
                        // Who differs is empty now.
                        let table = &mut self.model.0[window].1[first..first + entries.len()];
                        for (old, new) in table.iter_mut().zip(&entries) {
                            *old = if old == new { *old } else { 0 };
                        }
                    }
                    code => panic!("{code:?}"),
                }
            }
        }
    }

    fn can_refuse(&self) -> bool {
        let armed = |member: &Member| member.limited || member.mirror.lock().refuse.is_some();
        let live: usize =
            self.model.0.iter().map(|(_, table)| table.iter().filter(|tce| **tce != 0).count()).sum();
        let near_cap = u64::try_from(live).expect("small") + ENTRIES > MAPPINGS;
        self.members.iter().flatten().any(armed) || (self.merge == Merge::Never && near_cap)
    }

    /// A TCE that is good, mostly.
    fn tce(input: &mut Input<'_>) -> u64 {
        let (page, bits) = (u64::from(input.byte() % 0x94), input.byte());
        // Few pages, so that many entries are written again as they were.
        let page = if bits & 0x10 == 0 { page & !0xf } else { page };
        let poison = if bits & 0xc0 == 0xc0 { u64::from(bits & 0x3c) << 6 } else { 0 };
        page << 12 | u64::from(bits & 3) | poison
    }

    fn place(input: &mut Input<'_>) -> (u64, u64) {
        let (which, offset) = (input.byte(), u64::from(input.byte() % 66));
        let (liobn, start) = match which % 4 {
            0 | 1 => (DEFAULT, 0),
            2 => (SLOTS[0].liobn, SLOTS[0].start),
            _ => (SLOTS[1].liobn, SLOTS[1].start),
        };
        let shift = if which & 0x80 == 0 { 12 } else { 16 };
        (liobn.into(), start + (offset << shift) + u64::from(which & 0x7c))
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0..=3 => {
                let (liobn, ioba) = Self::place(input);
                let tce = Self::tce(input);
                self.call(spec::H_PUT_TCE, [liobn, ioba, tce, 0]);
            }
            4..=6 => {
                let (liobn, ioba) = Self::place(input);
                let (count, how) = (u64::from(input.byte() % 12), input.byte());
                let first = Self::tce(input);
                for at in 0..count {
                    // In a row, or anything.
                    let tce = if how & 1 == 0 { first + (at << 12) } else { Self::tce(input) };
                    let at = GuestAddress(LIST + 8 * at);
                    self.memory.write_slice(&tce.to_be_bytes(), at).expect("inside");
                }
                self.call(spec::H_PUT_TCE_INDIRECT, [liobn, ioba, LIST, count]);
            }
            7 | 8 => {
                let (liobn, ioba) = Self::place(input);
                let (value, count) = (u64::from(input.byte() & 0xf3) << 1, u64::from(input.byte() % 66));
                self.call(spec::H_STUFF_TCE, [liobn, ioba, value & !3, count]);
            }
            9 => {
                let (liobn, ioba) = Self::place(input);
                self.call(spec::H_GET_TCE, [liobn, ioba, 0, 0]);
            }
            10 => {
                let number = CALLS[usize::from(input.byte() % 4)];
                let args = core::array::from_fn(|_| {
                    let (how, word) = (input.byte(), input.long());
                    if how & 1 == 0 { word } else { word & 0xffff }
                });
                self.call(number, args);
            }
            11 => self.window(input),
            12 => {
                let (at, shape) = (usize::from(input.byte() % 3), input.byte());
                match self.members[at].take() {
                    Some(member) => {
                        let Member { endpoint, reader, subscriptions, .. } = member;
                        drop((reader, subscriptions));
                        endpoint.remove().expect("it is there").wait().expect("nobody holds a guard");
                    }
                    None => self.plug(at, shape),
                }
            }
            13 => {
                let (at, nth) = (usize::from(input.byte() % 3), usize::from(input.byte() % 4) + 1);
                let unmaps = input.byte() > 240;
                if let Some(member) = &self.members[at] {
                    let of: fn(&Event) -> bool = if unmaps {
                        |event| matches!(event, Event::Unmap(_))
                    } else {
                        |event| matches!(event, Event::Map(_) | Event::Replace(..))
                    };
                    member.mirror.refuse_nth(nth, 1, of);
                }
            }
            _ => {
                let at = usize::from(input.byte() % 3);
                let (_, iova) = Self::place(input);
                let expected = self.model.at(iova);
                let Some(member) = self.members[at].as_mut() else { return };
                if member.endpoint.is_fenced() {
                    return;
                }
                let seen = member.reader.enter().translate(Iova(iova), Access::READ);
                assert_eq!(seen.ok().map(|hit| hit.gpa.0), expected, "a device reads through {iova:#x}");
                // What is not mapped is not filled.
                let _ = member.subscriptions[1].fill(Iova(iova), Access::READ);
            }
        }
    }

    fn window(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        match how % 8 {
            0..=3 => {
                let (page, window) = (if how & 8 == 0 { 12 } else { 16 }, u32::from(input.byte() % 26));
                let made = self.bus.create_window(page, window);
                let Ok(made) = made else { return };
                let entries = made.range.bytes() >> made.page_shift;
                assert!(entries <= ENTRIES.into() && self.model.0.iter().all(|(w, _)| w.liobn != made.liobn));
                assert!(self.model.0.iter().all(|(w, _)| !w.range.overlaps(made.range)));
                self.model.0.push((made, vec![0; usize::try_from(entries).expect("few")]));
            }
            4 | 5 => {
                let liobn = DEFAULT + u32::from(input.byte() % 4);
                let gone = self.bus.remove_window(liobn);
                let at = self.model.0.iter().position(|(window, _)| window.liobn == liobn);
                assert_eq!(gone.is_ok(), at.is_some());
                if let (Ok(gone), Some(at)) = (gone, at) {
                    gone.wait().expect("nobody holds a guard");
                    self.model.0.remove(at);
                }
            }
            6 => {
                self.bus.reset().expect("outside of callbacks").wait().expect("nobody holds a guard");
                self.model.reset();
            }
            _ if how >= 0xf0 => {
                self.spapr.reset().expect("outside of callbacks").wait().expect("nobody holds a guard");
                self.model.reset();
            }
            _ => assert_eq!(self.bus.query().windows as usize, 3 - self.model.0.len()),
        }
    }

    fn check_record(&self) {
        let mut tables: Vec<(Window, Vec<u64>)> = self.model.0.clone();
        tables.iter_mut().for_each(|(_, table)| table.fill(0));
        self.bus.domain().for_each(IovaRange::ALL, |m| {
            let (window, table) = tables
                .iter_mut()
                .find(|(window, _)| window.could_hold(&m))
                .unwrap_or_else(|| panic!("{m:?} is no window's"));
            let count = m.range.bytes() / u128::from(window.page());
            assert!(self.merge == Merge::Hypercall || count == 1, "{m:?} is more than an entry");
            let mut at = m.range.start();
            for _ in 0..count {
                let index = (at.0 - window.range.start().0) / window.page();
                table[usize::try_from(index).expect("small")] = spec::encode(m.translate(at), m.access);
                at = Iova(at.0.wrapping_add(window.page()));
            }
            ControlFlow::Continue(())
        });
        assert!(tables == self.model.0, "the record is not what the hypercalls say: {tables:x?}");
    }

    fn check_copies(&self) {
        for member in self.members.iter().flatten() {
            for subscription in &member.subscriptions {
                if let Some(audit) = subscription.audit().filter(|_| !subscription.is_fenced()) {
                    assert!(audit.is_clean(), "L16: {audit:?}");
                }
            }
        }
    }

    /// What is saved can be restored, and is the same there.
    fn finish(self) {
        assert_eq!(self.spapr.iommu().outstanding(), 0, "answers that never came");
        let saved = self.spapr.save().expect("nothing is pending");
        let (other, _) = spapr(self.merge);
        other.restore(&saved).expect("the same caps").wait().expect("nobody looks");
        assert_eq!(other.save().expect("nothing is pending"), saved);
    }
}

/// Plays the bytes. Any input is legal.
///
/// # Panics
/// When something is wrong.
pub fn fuzz_hypercalls(data: &[u8]) {
    let mut input = Input(data);
    // Left where it is when something is wrong: a unit that panicked inside a step cannot be taken apart.
    let mut world = core::mem::ManuallyDrop::new(World::new(input.byte()));
    for nth in 1..=STEPS {
        if input.0.is_empty() {
            break;
        }
        world.step(&mut input);
        world.check_record();
        // Mirrors look at each call themselves.
        if nth % 8 == 0 {
            world.check_copies();
        }
    }
    world.check_copies();
    core::mem::ManuallyDrop::into_inner(world).finish();
}
