//! A PCI function's configuration space (type 0 header).

/// Identity of a function, as a driver finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor and device.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Base class, sub-class, programming interface: 0x00BBSSPP.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// Where the first capability lies.
const FIRST: usize = 0x40;

/// Configuration space: bytes, and which bits of them can be written.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// Where the next capability goes, and where its address is to be written.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    /// A function that uses interrupt pin A if `pin` says so.
    #[must_use]
    pub fn new(identity: Identity, pin: bool) -> Self {
        let mut space = Self { bytes: [0; SIZE], writable: [0; SIZE], next: FIRST, link: CAPABILITIES };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(0x08, &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes());
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.set(INTERRUPT_PIN, &[u8::from(pin)]);
        // Memory space, bus master, parity, SERR, interrupt disable.
        space.allow(COMMAND, &0x0546_u16.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Says that the function masters the bus always: the bit reads one whatever is written. A client whose guest has no
    /// driver for the function then takes its DMA all the same.
    #[must_use]
    pub fn always_bus_master(mut self) -> Self {
        let [low, high] = 0x0004_u16.to_le_bytes();
        self.set(COMMAND, &[low, high]);
        self.allow(COMMAND, &0x0542_u16.to_le_bytes());
        self
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(bits) {
            *to = *from;
        }
    }

    /// Makes BAR `index` a 32-bit one in memory, of `size` bytes: a power of two, 16 or more.
    pub fn add_memory_bar(&mut self, index: u8, size: u32) {
        let at = BARS.saturating_add(usize::from(index).saturating_mul(4));
        self.allow(at, &(!size.saturating_sub(1)).to_le_bytes());
    }

    /// Adds a capability: its id, what follows the id and the link, and which bits of that can be written (those behind
    /// the end cannot). Gives where it lies; `None` when there is no room any more.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u8> {
        let at = self.next;
        let end = at.checked_add(2)?.checked_add(body.len())?.checked_next_multiple_of(4)?;
        let here = u8::try_from(at).ok().filter(|_| end <= SIZE)?;
        self.set(self.link, &[here]);
        self.set(at, &[id, 0]);
        self.set(at.saturating_add(2), body);
        self.allow(at.saturating_add(2), writable);
        // The list bit.
        self.set(STATUS, &[0x10]);
        self.link = at.saturating_add(1);
        self.next = end;
        Some(here)
    }

    /// Reads; what lies behind the end is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(from)) {
            *to = *from;
        }
    }

    /// Writes the bits that can be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let places = self.bytes.iter_mut().zip(&self.writable).skip(at);
        for ((byte, writable), new) in places.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// Eight bytes or fewer, little-endian, from `offset` on.
    #[must_use]
    pub fn value(&self, offset: u8, bytes: usize) -> u64 {
        let mut value = [0; 8];
        self.read(u64::from(offset), value.get_mut(..bytes).unwrap_or_default());
        u64::from_le_bytes(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            vendor: 0x1af4,
            device: 0x1057,
            class: 0x08_06_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        }
    }

    #[test]
    fn identity_when_read_lies_where_pci_says() {
        let space = ConfigSpace::new(identity(), true);
        assert_eq!(space.value(0, 4), 0x1057_1af4);
        assert_eq!(space.value(8, 4), 0x0806_0001);
        assert_eq!(space.value(0x2c, 4), 0x1100_1af4);
        assert_eq!(space.value(INTERRUPT_PIN.try_into().unwrap(), 1), 1);
    }

    #[test]
    fn bar_when_sized_reads_its_size_and_keeps_its_address() {
        let mut space = ConfigSpace::new(identity(), false);
        space.add_memory_bar(1, 0x4000);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(space.value(0x14, 4), 0xffff_c000);
        space.write(0x14, &0xfebf_c123_u32.to_le_bytes());
        assert_eq!(space.value(0x14, 4), 0xfebf_c000);
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.value(0x10, 4), 0);
    }

    #[test]
    fn capabilities_when_added_are_a_list_until_there_is_no_room() {
        let mut space = ConfigSpace::new(identity(), false);
        assert_eq!(space.value(0x34, 1), 0);
        assert_eq!(space.add_capability(9, &[1; 14], &[]), Some(0x40));
        assert_eq!(space.add_capability(0x11, &[2; 5], &[0, 0xc0]), Some(0x50));
        assert_eq!((space.value(0x34, 1), space.value(0x41, 1), space.value(0x51, 1)), (0x40, 0x50, 0));
        assert_eq!(space.value(6, 2), 0x10);
        space.write(0x52, &[0xff; 5]);
        assert_eq!(space.value(0x52, 5), 0x02_02_02_c2_02);
        assert_eq!(space.add_capability(5, &[0; 200], &[]), None);
        assert_eq!(space.add_capability(5, &[0; 10], &[]), Some(0x58));
    }

    #[test]
    fn command_when_written_keeps_bits_that_no_function_has() {
        let mut space = ConfigSpace::new(identity(), false);
        space.write(4, &[0xff, 0xff, 0xff, 0xff]);
        assert_eq!(space.value(4, 4), 0x0546);
        let mut master = ConfigSpace::new(identity(), false).always_bus_master();
        master.write(4, &[0, 0]);
        assert_eq!(master.value(4, 2), 4);
    }

    #[test]
    fn accesses_behind_the_end_read_zero_and_write_nothing() {
        let mut space = ConfigSpace::new(identity(), false);
        space.write(250, &[0xff; 20]);
        let mut data = [0xaa; 16];
        space.read(248, &mut data);
        assert_eq!(data, [0; 16]);
        space.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 16]);
    }
}
