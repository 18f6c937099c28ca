//! Bytes as choices, and choices as requests.

use viommu_virtio::driver::{Request, Split};
use viommu_virtio::spec::request::{AttachFlags, MapFlags};

/// A sequence of choices.
pub(crate) struct Choices<'d>(pub(crate) &'d [u8]);

impl Choices<'_> {
    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// The next one; zeros when they are used up.
    pub(crate) fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    pub(crate) fn below(&mut self, limit: u8) -> u8 {
        self.byte() % limit
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[usize::from(self.byte()) % list.len()]
    }
}

pub(crate) const ENDPOINTS: [u32; 4] = [8, 9, 10, 11];
pub(crate) const HIGH: u64 = 0x10_0000_0000;

/// Where the windows that steps play with begin: `unit` bytes a piece, 16 pieces each.
pub(crate) fn windows(unit: u64) -> [u64; 3] {
    [0, HIGH, 0_u64.wrapping_sub(16 * unit)]
}

/// One of `live`, mostly; or any other.
fn domain(choices: &mut Choices<'_>, live: &[u32]) -> u32 {
    match choices.byte() {
        255 => u32::MAX,
        254 => 0,
        other if other < 192 && !live.is_empty() => live[usize::from(other) % live.len()],
        other => u32::from(other % 4) + 1,
    }
}

fn endpoint(choices: &mut Choices<'_>) -> u32 {
    choices.of(&[8, 8, 9, 9, 10, 10, 11, 11, 77])
}

fn range(choices: &mut Choices<'_>, unit: u64) -> (u64, u64) {
    let window = windows(unit)[usize::from(choices.of(&[0_u8, 1, 1, 2]))];
    let place = choices.byte();
    let (first, more) = (u64::from(place & 15), u64::from(place >> 4) % 6);
    let last = (first + more).min(15);
    let (start, end) = (window + first * unit, window + last * unit + (unit - 1));
    match choices.byte() {
        255 => (end, start),
        254 => (start, start),
        253 => (start + 1, end),
        252 => (start, end - 1),
        251 => (start.saturating_sub(unit / 2), end.saturating_add(unit / 2)),
        250 => (0, u64::MAX),
        249 => (start, u64::MAX),
        248 => (0, end),
        247 => (window, window + (16 * unit - 1)),
        _ => (start, end),
    }
}

fn typed(choices: &mut Choices<'_>, unit: u64, live: &[u32]) -> Request {
    match choices.below(16) {
        0..=5 => {
            let domain = domain(choices, live);
            let (virt_start, virt_end) = range(choices, unit);
            let phys_start = match choices.byte() {
                255 => u64::MAX - (unit - 1),
                254 => 0x8000_0000_0000_0000,
                253 => unit + 0x10,
                other => u64::from(other % 27) * unit,
            };
            let flags = choices.byte();
            let flags = if flags < 250 { [3, 3, 3, 1, 2, 0, 7, 5][usize::from(flags & 7)] } else { flags };
            let flags = MapFlags::from_bits_retain(flags.into());
            Request::Map { domain, virt_start, virt_end, phys_start, flags }
        }
        6..=8 => {
            let domain = domain(choices, live);
            let (virt_start, virt_end) = range(choices, unit);
            Request::Unmap { domain, virt_start, virt_end }
        }
        9..=12 => {
            let (domain, endpoint) = (domain(choices, &[]), endpoint(choices));
            let flags = match choices.byte() {
                255 => 0x8000_0000,
                254 => 2,
                other => u32::from(other % 5 == 4),
            };
            Request::Attach { domain, endpoint, flags: AttachFlags::from_bits_retain(flags) }
        }
        13 | 14 => Request::Detach { domain: domain(choices, live), endpoint: endpoint(choices) },
        _ => Request::Probe { endpoint: endpoint(choices) },
    }
}

/// A request, and how it lies in the ring. One in eight is not as it should be.
pub(crate) fn request(
    choices: &mut Choices<'_>,
    unit: u64,
    probe_size: u32,
    live: &[u32],
) -> (Request, Split) {
    let request = typed(choices, unit, live);
    let how = choices.byte();
    let request = if how >= 0xe0 {
        let mut bytes = request.to_bytes();
        let mut writable = request.writable(probe_size);
        match how & 7 {
            0 => bytes.truncate(usize::from(choices.byte()) % (bytes.len() + 1)),
            1 => bytes.extend([0xff; 40]),
            2 => writable = writable.saturating_sub(u32::from(choices.byte() % 8)),
            3 => writable += u32::from(choices.byte() % 64),
            4 => bytes[0] = choices.byte(),
            5 => {
                // The head's reserved bytes, or any other.
                let at = usize::from(choices.byte()) % bytes.len();
                bytes[at] = choices.byte();
            }
            6 => bytes[1..4].fill(0xff),
            _ => {
                let last = bytes.len();
                bytes[last - 4..].fill(choices.byte());
            }
        }
        Request::Raw { bytes, writable }
    } else {
        request
    };
    let split = match how & 15 {
        0..=8 => Split::default(),
        9 => Split { indirect: true, ..Split::default() },
        10..=12 => {
            let cut = |byte: u8| u32::from(byte % 80);
            let (a, b, c) = (cut(choices.byte()), cut(choices.byte()), cut(choices.byte()));
            let indirect = how & 16 != 0;
            Split { readable: vec![a.min(b), a.max(b)], writable: vec![c], indirect }
        }
        13 => Split { readable: (1..32).collect(), writable: vec![1, 2, 3], indirect: false },
        _ => Split { readable: vec![1, 4, 8, 16], writable: vec![probe_size], indirect: false },
    };
    (request, split)
}
