//! One record: a tag, line and time as differences, and the event's fields.

use viommu::addr::{Gpa, Iova, IovaRange};
use viommu::mapping::{Access, Target};

use crate::event::{Entry, Event, Label, Region, Reserved, Reset, from_map_flags, to_map_flags};

/// Kinds from here on carry their length.
const EXTENSION: u8 = 24;
const KIND: u8 = 0x1f;
const TIME: u8 = 0x60;
const TIME_NANOS: u8 = 0x20;
const TIME_MICROS: u8 = 0x40;
const TIME_SAME: u8 = 0x60;
/// The line does not just go up by one.
const LINE: u8 = 0x80;

mod kind {
    pub(super) const RESET: u8 = 0;
    pub(super) const ATTACH: u8 = 1;
    pub(super) const DETACH: u8 = 2;
    pub(super) const DETACHED: u8 = 3;
    pub(super) const MAP: u8 = 4;
    pub(super) const UNMAP: u8 = 5;
    pub(super) const UNMAPPED: u8 = 6;
    pub(super) const ACCESS: u8 = 7;
    pub(super) const TRANSLATED: u8 = 8;
    pub(super) const NOTIFY_MAP: u8 = 9;
    pub(super) const NOTIFY_UNMAP: u8 = 10;
    pub(super) const REMAP: u8 = 11;
    pub(super) const SWITCH: u8 = 12;
    pub(super) const FAULT: u8 = 13;
    pub(super) const BYPASS: u8 = 14;
    pub(super) const CONFIG: u8 = 15;
    pub(super) const RESERVED: u8 = 16;
    pub(super) const REGION_ADDED: u8 = 17;
    pub(super) const DOMAIN_ADDED: u8 = 18;
    pub(super) const DOMAIN_REMOVED: u8 = 19;
    pub(super) const ENDPOINT_ADDED: u8 = 20;
    pub(super) const ENDPOINT_REMOVED: u8 = 21;
    pub(super) const MARK: u8 = 22;
}

/// What differences are taken against: the last values in this block.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Last {
    line: u64,
    time: u64,
    iova: u64,
    gpa: u64,
    domain: u32,
    endpoint: u32,
}

// ---- writing

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(low_byte(value) | 0x80);
        value >>= 7;
    }
    out.push(low_byte(value));
}

fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

/// A difference modulo 2^64 with small ones of either sign as small numbers.
fn zigzag(value: u64) -> u64 {
    value << 1 ^ (value.cast_signed() >> 63).cast_unsigned()
}

fn unzigzag(value: u64) -> u64 {
    value >> 1 ^ (value & 1).wrapping_neg()
}

fn delta(out: &mut Vec<u8>, last: &mut u64, value: u64) {
    varint(out, zigzag(value.wrapping_sub(*last)));
    *last = value;
}

fn delta32(out: &mut Vec<u8>, last: &mut u32, value: u32) {
    varint(out, u64::from(value ^ *last));
    *last = value;
}

fn put_range(out: &mut Vec<u8>, last: &mut Last, range: IovaRange) {
    delta(out, &mut last.iova, range.start().0);
    varint(out, range.last().0 - range.start().0);
}

fn put_region(out: &mut Vec<u8>, region: Region) {
    varint(out, region.rid.map_or(0, |rid| u64::from(rid) + 1));
    varint(out, u64::from(region.index));
    out.push(region.devfn);
}

/// A record of the end block and of tests: the number of records.
pub(super) fn put_count(out: &mut Vec<u8>, count: u64) {
    varint(out, count);
}

/// Appends `entry`; without `lines` its line is left out.
pub(super) fn put(out: &mut Vec<u8>, last: &mut Last, entry: &Entry, lines: bool) {
    let at = out.len();
    out.push(0);
    let mut tag = 0;
    if lines {
        if entry.line != last.line.wrapping_add(1) {
            tag |= LINE;
            varint(out, zigzag(entry.line.wrapping_sub(last.line)));
        }
        last.line = entry.line;
    }
    if let Some(time) = entry.time {
        // Signed, so that thousands divide on both sides of zero.
        let difference = time.wrapping_sub(last.time).cast_signed();
        let (flag, value) = match difference {
            0 => (TIME_SAME, None),
            d if d % 1000 == 0 => (TIME_MICROS, Some(d / 1000)),
            d => (TIME_NANOS, Some(d)),
        };
        tag |= flag;
        if let Some(value) = value {
            varint(out, zigzag(value.cast_unsigned()));
        }
        last.time = time;
    }
    tag |= put_event(out, last, &entry.event);
    if let Some(slot) = out.get_mut(at) {
        *slot = tag;
    }
}

fn put_event(out: &mut Vec<u8>, last: &mut Last, event: &Event) -> u8 {
    match *event {
        Event::Reset(reset) => {
            out.push(u8::from(reset == Reset::System));
            kind::RESET
        }
        Event::Attach { domain, endpoint, bypass } => {
            delta32(out, &mut last.domain, domain);
            delta32(out, &mut last.endpoint, endpoint);
            out.push(u8::from(bypass));
            kind::ATTACH
        }
        Event::Detach { domain, endpoint } => {
            delta32(out, &mut last.domain, domain);
            delta32(out, &mut last.endpoint, endpoint);
            kind::DETACH
        }
        Event::Detached { domain, endpoint } => {
            delta32(out, &mut last.domain, domain);
            delta32(out, &mut last.endpoint, endpoint);
            kind::DETACHED
        }
        Event::Map { domain, range, gpa, access, target } => {
            delta32(out, &mut last.domain, domain);
            put_range(out, last, range);
            delta(out, &mut last.gpa, gpa.0);
            out.push(to_map_flags(access, target));
            kind::MAP
        }
        Event::Unmap { domain, range } => {
            delta32(out, &mut last.domain, domain);
            put_range(out, last, range);
            kind::UNMAP
        }
        Event::Unmapped { domain, range } => {
            delta32(out, &mut last.domain, domain);
            put_range(out, last, range);
            kind::UNMAPPED
        }
        Event::Access { endpoint, iova, access } => {
            delta32(out, &mut last.endpoint, endpoint);
            delta(out, &mut last.iova, iova.0);
            out.push(access.bits());
            kind::ACCESS
        }
        Event::Translated { endpoint, iova, gpa } => {
            delta32(out, &mut last.endpoint, endpoint);
            delta(out, &mut last.iova, iova.0);
            delta(out, &mut last.gpa, gpa.0);
            kind::TRANSLATED
        }
        Event::NotifyMap { region, range, gpa, access, target } => {
            put_region(out, region);
            put_range(out, last, range);
            delta(out, &mut last.gpa, gpa.0);
            out.push(to_map_flags(access, target));
            kind::NOTIFY_MAP
        }
        Event::NotifyUnmap { region, range } => {
            put_region(out, region);
            put_range(out, last, range);
            kind::NOTIFY_UNMAP
        }
        Event::Remap { region, range, gpa } => {
            put_region(out, region);
            put_range(out, last, range);
            delta(out, &mut last.gpa, gpa.0);
            kind::REMAP
        }
        Event::SwitchAddressSpace { bus, devfn, enabled } => {
            out.extend([bus, devfn, u8::from(enabled)]);
            kind::SWITCH
        }
        Event::Fault { reason, flags, endpoint, address } => {
            delta32(out, &mut last.endpoint, endpoint);
            delta(out, &mut last.iova, address.0);
            varint(out, u64::from(reason));
            varint(out, u64::from(flags));
            kind::FAULT
        }
        Event::Bypass { on } => {
            out.push(u8::from(on));
            kind::BYPASS
        }
        Event::Config { page_sizes, input, bypass } => {
            varint(out, page_sizes);
            put_range(out, last, input);
            out.push(u8::from(bypass));
            kind::CONFIG
        }
        Event::ReservedRegion { endpoint, kind, range } => {
            delta32(out, &mut last.endpoint, endpoint);
            put_range(out, last, range);
            out.push(u8::from(kind == Reserved::Msi));
            kind::RESERVED
        }
        Event::RegionAdded { region } => {
            put_region(out, region);
            kind::REGION_ADDED
        }
        Event::DomainAdded { domain } => {
            delta32(out, &mut last.domain, domain);
            kind::DOMAIN_ADDED
        }
        Event::DomainRemoved { domain } => {
            delta32(out, &mut last.domain, domain);
            kind::DOMAIN_REMOVED
        }
        Event::EndpointAdded { endpoint } => {
            delta32(out, &mut last.endpoint, endpoint);
            kind::ENDPOINT_ADDED
        }
        Event::EndpointRemoved { endpoint } => {
            delta32(out, &mut last.endpoint, endpoint);
            kind::ENDPOINT_REMOVED
        }
        Event::Mark(label) => {
            let text = label.as_str().as_bytes();
            out.push(u8::try_from(text.len()).unwrap_or(0));
            out.extend(text);
            kind::MARK
        }
    }
}

// ---- reading

/// What is left of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl<'a> Bytes<'a> {
    #[inline]
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    #[inline]
    pub(super) fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return None;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(head)
    }

    fn u32(&mut self) -> Option<u32> {
        u32::try_from(self.varint()?).ok()
    }

    fn bool(&mut self) -> Option<bool> {
        match self.byte()? {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        }
    }

    #[inline]
    fn delta(&mut self, last: &mut u64) -> Option<u64> {
        *last = last.wrapping_add(unzigzag(self.varint()?));
        Some(*last)
    }

    #[inline]
    fn delta32(&mut self, last: &mut u32) -> Option<u32> {
        *last ^= self.u32()?;
        Some(*last)
    }

    #[inline]
    fn range(&mut self, last: &mut Last) -> Option<IovaRange> {
        let start = self.delta(&mut last.iova)?;
        IovaRange::new(Iova(start), Iova(start.checked_add(self.varint()?)?))
    }

    fn gpa(&mut self, last: &mut Last) -> Option<Gpa> {
        self.delta(&mut last.gpa).map(Gpa)
    }

    fn flags(&mut self) -> Option<(Access, Target)> {
        from_map_flags(u32::from(self.byte()?))
    }

    fn region(&mut self) -> Option<Region> {
        let rid = match self.varint()? {
            0 => None,
            rid => Some(u16::try_from(rid - 1).ok()?),
        };
        Some(Region { rid, index: self.u32()?, devfn: self.byte()? })
    }
}

/// One record.
pub(super) enum Got {
    Entry(Entry),
    /// Of a kind that this version does not know.
    Unknown(u8),
}

/// Takes the next record; `None` when it is malformed. Without `lines` the entry's line is 0.
#[inline]
pub(super) fn get(bytes: &mut Bytes<'_>, last: &mut Last, lines: bool) -> Option<Got> {
    let tag = bytes.byte()?;
    if tag & KIND >= EXTENSION {
        // Differences against the records around it do not pass through one that is not understood.
        let length = usize::try_from(bytes.varint()?).ok()?;
        bytes.take(length)?;
        return Some(Got::Unknown(tag & KIND));
    }
    let mut line = 0;
    if lines {
        line = last.line.wrapping_add(if tag & LINE == 0 { 1 } else { unzigzag(bytes.varint()?) });
        last.line = line;
    } else if tag & LINE != 0 {
        return None;
    }
    let time = match tag & TIME {
        0 => None,
        flag => {
            let difference = match flag {
                TIME_NANOS => unzigzag(bytes.varint()?),
                TIME_MICROS => unzigzag(bytes.varint()?).wrapping_mul(1000),
                _ => 0,
            };
            last.time = last.time.wrapping_add(difference);
            Some(last.time)
        }
    };
    let event = get_event(bytes, last, tag & KIND)?;
    Some(Got::Entry(Entry { line, time, event }))
}

#[inline]
fn get_event(b: &mut Bytes<'_>, last: &mut Last, kind: u8) -> Option<Event> {
    Some(match kind {
        kind::RESET => Event::Reset(if b.bool()? { Reset::System } else { Reset::Device }),
        kind::ATTACH => Event::Attach {
            domain: b.delta32(&mut last.domain)?,
            endpoint: b.delta32(&mut last.endpoint)?,
            bypass: b.bool()?,
        },
        kind::DETACH => {
            Event::Detach { domain: b.delta32(&mut last.domain)?, endpoint: b.delta32(&mut last.endpoint)? }
        }
        kind::DETACHED => {
            Event::Detached { domain: b.delta32(&mut last.domain)?, endpoint: b.delta32(&mut last.endpoint)? }
        }
        kind::MAP => {
            let domain = b.delta32(&mut last.domain)?;
            let range = b.range(last)?;
            let gpa = b.gpa(last)?;
            let (access, target) = b.flags()?;
            Event::Map { domain, range, gpa, access, target }
        }
        kind::UNMAP => Event::Unmap { domain: b.delta32(&mut last.domain)?, range: b.range(last)? },
        kind::UNMAPPED => Event::Unmapped { domain: b.delta32(&mut last.domain)?, range: b.range(last)? },
        kind::ACCESS => Event::Access {
            endpoint: b.delta32(&mut last.endpoint)?,
            iova: Iova(b.delta(&mut last.iova)?),
            access: Access::from_bits(b.byte()?)?,
        },
        kind::TRANSLATED => Event::Translated {
            endpoint: b.delta32(&mut last.endpoint)?,
            iova: Iova(b.delta(&mut last.iova)?),
            gpa: b.gpa(last)?,
        },
        kind::NOTIFY_MAP => {
            let region = b.region()?;
            let range = b.range(last)?;
            let gpa = b.gpa(last)?;
            let (access, target) = b.flags()?;
            Event::NotifyMap { region, range, gpa, access, target }
        }
        kind::NOTIFY_UNMAP => Event::NotifyUnmap { region: b.region()?, range: b.range(last)? },
        kind::REMAP => Event::Remap { region: b.region()?, range: b.range(last)?, gpa: b.gpa(last)? },
        kind::SWITCH => Event::SwitchAddressSpace { bus: b.byte()?, devfn: b.byte()?, enabled: b.bool()? },
        kind::FAULT => {
            let endpoint = b.delta32(&mut last.endpoint)?;
            let address = Iova(b.delta(&mut last.iova)?);
            Event::Fault { reason: b.u32()?, flags: b.u32()?, endpoint, address }
        }
        kind::BYPASS => Event::Bypass { on: b.bool()? },
        kind::CONFIG => Event::Config { page_sizes: b.varint()?, input: b.range(last)?, bypass: b.bool()? },
        kind::RESERVED => Event::ReservedRegion {
            endpoint: b.delta32(&mut last.endpoint)?,
            range: b.range(last)?,
            kind: if b.bool()? { Reserved::Msi } else { Reserved::Reserved },
        },
        kind::REGION_ADDED => Event::RegionAdded { region: b.region()? },
        kind::DOMAIN_ADDED => Event::DomainAdded { domain: b.delta32(&mut last.domain)? },
        kind::DOMAIN_REMOVED => Event::DomainRemoved { domain: b.delta32(&mut last.domain)? },
        kind::ENDPOINT_ADDED => Event::EndpointAdded { endpoint: b.delta32(&mut last.endpoint)? },
        kind::ENDPOINT_REMOVED => Event::EndpointRemoved { endpoint: b.delta32(&mut last.endpoint)? },
        kind::MARK => {
            let length = b.byte()?;
            if usize::from(length) > Label::MAX {
                return None;
            }
            Event::Mark(Label::new(core::str::from_utf8(b.take(usize::from(length))?).ok()?))
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_hold_all_64_bits_and_no_more() {
        for value in [0, 1, 0x7f, 0x80, 0x3fff, 0x4000, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
            let mut out = Vec::new();
            varint(&mut out, value);
            let mut bytes = Bytes(&out);
            assert_eq!(bytes.varint(), Some(value));
            assert!(bytes.0.is_empty());
            assert_eq!(unzigzag(zigzag(value)), value);
        }
        assert_eq!(Bytes(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]).varint(), None);
        assert_eq!(Bytes(&[0x80]).varint(), None);
        assert_eq!(zigzag(u64::MAX), 1);
    }
}
