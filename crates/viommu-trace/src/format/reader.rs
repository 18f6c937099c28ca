//! Reads viommu's own format.

use super::record::{Bytes, Got, Last, get};
use super::{BLOCK_HEADER, END, HAS_LINES, HEADER, MAX_BLOCK, RECORDS, checksum};
use crate::error::{Place, Stop};
use crate::event::Entry;
use crate::input::Input;
use crate::passed_over::PassedOver;

/// Reads blocks and hands out their records.
pub(crate) struct OwnReader {
    lines: bool,
    block: Vec<u8>,
    /// Where the next record begins in `block`.
    at: usize,
    /// Where `block` begins in the input.
    start: u64,
    last: Last,
    records: u64,
    done: bool,
}

impl OwnReader {
    /// Behind the header, whose flags these are.
    pub(crate) fn new(input: &mut Input, flags: u8) -> Self {
        input.skip(HEADER);
        Self {
            lines: flags & HAS_LINES != 0,
            block: Vec::new(),
            at: 0,
            start: 0,
            last: Last::default(),
            records: 0,
            done: false,
        }
    }

    /// Records handed out or passed over so far.
    pub(crate) fn records(&self) -> u64 {
        self.records
    }

    #[inline]
    pub(crate) fn next(&mut self, input: &mut Input, passed: &mut PassedOver) -> Result<Option<Entry>, Stop> {
        loop {
            let left = self.block.get(self.at..).unwrap_or_default();
            if left.is_empty() {
                if self.done || !self.next_block(input, passed)? {
                    return Ok(None);
                }
                continue;
            }
            let mut bytes = Bytes(left);
            let got = get(&mut bytes, &mut self.last, self.lines);
            let taken = left.len() - bytes.0.len();
            let place = self.start + self.at as u64;
            self.at += taken;
            self.records += 1;
            match got {
                Some(Got::Entry(mut entry)) => {
                    if !self.lines {
                        entry.line = self.records;
                    }
                    return Ok(Some(entry));
                }
                Some(Got::Unknown(kind)) => passed.event(format!("record kind {kind}").as_bytes()),
                None => return Err(Stop::byte(place, "a malformed record")),
            }
        }
    }

    /// Takes the next block of records; `false` behind the end block.
    fn next_block(&mut self, input: &mut Input, passed: &mut PassedOver) -> Result<bool, Stop> {
        loop {
            let at = input.offset();
            let cut = |input: &mut Input, what: &str| {
                let reason = format!("{what}: the file is cut off");
                input.trouble(Place::Byte(at)).unwrap_or_else(|| Stop::byte(at, reason))
            };
            if !input.want(BLOCK_HEADER) {
                return Err(cut(input, "no end mark"));
            }
            let Some(&[kind, l0, l1, l2, l3, c0, c1, c2, c3]) = input.window().first_chunk() else {
                return Err(cut(input, "the block that begins here has no end"));
            };
            let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
            let crc = u32::from_le_bytes([c0, c1, c2, c3]);
            if length > MAX_BLOCK {
                return Err(Stop::byte(at, "a block longer than any may be"));
            }
            if !input.want(BLOCK_HEADER + length) {
                return Err(cut(input, "the block that begins here has no end"));
            }
            let payload = input.window().get(BLOCK_HEADER..BLOCK_HEADER + length).unwrap_or_default();
            if checksum(kind, payload) != crc {
                return Err(Stop::byte(at, "the checksum of a block differs"));
            }
            match kind {
                RECORDS => {
                    self.block.clear();
                    self.block.extend_from_slice(payload);
                    self.at = 0;
                    self.start = at + BLOCK_HEADER as u64;
                    self.last = Last::default();
                    input.skip(BLOCK_HEADER + length);
                    if length > 0 {
                        return Ok(true);
                    }
                }
                END => {
                    let count = Bytes(payload).varint();
                    if count != Some(self.records) {
                        return Err(Stop::byte(at, "the end mark counts other records than there are"));
                    }
                    input.skip(BLOCK_HEADER + length);
                    self.done = true;
                    let behind = input.offset();
                    if input.want(1) {
                        return Err(Stop::byte(behind, "there is something behind the end mark"));
                    }
                    return match input.trouble(Place::Byte(behind)) {
                        Some(stop) => Err(stop),
                        None => Ok(false),
                    };
                }
                _ => {
                    passed.event(format!("block kind {kind}").as_bytes());
                    input.skip(BLOCK_HEADER + length);
                }
            }
        }
    }
}
