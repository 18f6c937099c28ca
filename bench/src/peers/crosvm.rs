//! As crosvm keeps its mappings: a `BTreeMap` by start behind a trait object in a `Mutex`, a list of keys on removal,
//! the answer of a translation as a `Vec`. Without its list of exported regions, which makes the original dearer.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::peers::walk;
use crate::table::Table;

const ASKED: u64 = 64;
const READ: u32 = 1;
const READ_WRITE: u32 = 3;

struct Entry {
    iova: u64,
    gpa: u64,
    bytes: u64,
    access: u32,
}

struct Piece {
    gpa: u64,
    #[expect(dead_code, reason = "a part of the answer, so of its size")]
    bytes: u64,
    access: u32,
}

trait Mapper: Send {
    fn add(&mut self, entry: Entry) -> bool;
    fn remove(&mut self, iova: u64, bytes: u64) -> bool;
    fn export(&self, iova: u64, bytes: u64) -> Vec<Piece>;
    fn each(&self, see: &mut dyn FnMut(u64, u64, u64));
}

struct Basic(BTreeMap<u64, Entry>);

impl Mapper for Basic {
    fn add(&mut self, new: Entry) -> bool {
        let before = self.0.range(..new.iova + new.bytes).next_back();
        if before.is_some_and(|(_, entry)| entry.iova + entry.bytes > new.iova) {
            return false;
        }
        self.0.insert(new.iova, new);
        true
    }

    fn remove(&mut self, iova: u64, bytes: u64) -> bool {
        let end = iova + bytes;
        let mut keys = Vec::new();
        for (key, entry) in self.0.range(..end).rev() {
            let entry_end = entry.iova + entry.bytes;
            if entry_end <= iova {
                break;
            }
            if entry.iova < iova || entry_end > end {
                return false;
            }
            keys.push(*key);
        }
        for key in keys {
            self.0.remove(&key);
        }
        true
    }

    fn export(&self, iova: u64, bytes: u64) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut end = iova + bytes;
        for (_, entry) in self.0.range(..end).rev() {
            if end > entry.iova + entry.bytes {
                break;
            }
            pieces.push(Piece {
                gpa: entry.gpa + iova.saturating_sub(entry.iova),
                bytes: end - entry.iova.max(iova),
                access: entry.access,
            });
            if iova >= entry.iova {
                pieces.reverse();
                return pieces;
            }
            end = entry.iova;
        }
        Vec::new()
    }

    fn each(&self, see: &mut dyn FnMut(u64, u64, u64)) {
        for entry in self.0.values() {
            see(entry.iova, entry.bytes, entry.gpa);
        }
    }
}

#[derive(Clone)]
pub(crate) struct Crosvm(Arc<Mutex<Box<dyn Mapper>>>);

impl Table for Crosvm {
    fn new() -> anyhow::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Box::new(Basic(BTreeMap::new()))))))
    }

    fn map(&mut self, iova: u64, bytes: u64, gpa: u64) -> bool {
        self.0.lock().is_ok_and(|mut mapper| mapper.add(Entry { iova, gpa, bytes, access: READ_WRITE }))
    }

    fn unmap(&mut self, iova: u64, bytes: u64) {
        if let Ok(mut mapper) = self.0.lock() {
            mapper.remove(iova, bytes);
        }
    }

    #[inline]
    fn translate(&mut self, iova: u64) -> Option<u64> {
        let pieces = self.0.lock().ok()?.export(iova, ASKED);
        pieces.first().filter(|piece| piece.access & READ != 0).map(|piece| piece.gpa)
    }

    fn replay(&mut self) -> Option<(Duration, u64)> {
        let mapper = self.0.lock().ok()?;
        Some(walk(|see| mapper.each(see)))
    }
}
