//! What a disk has done, to be read at any time.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::spec::{Status, kind};

/// Answers to one kind of request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answers {
    /// Done.
    pub ok: u64,
    /// Status IOERR.
    pub ioerr: u64,
    /// Status UNSUPP.
    pub unsupp: u64,
}

/// What a disk has done since it was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metrics {
    /// Answers to IN.
    pub reads: Answers,
    /// Answers to OUT.
    pub writes: Answers,
    /// Answers to FLUSH.
    pub flushes: Answers,
    /// Answers to DISCARD.
    pub discards: Answers,
    /// Answers to WRITE_ZEROES.
    pub write_zeroes: Answers,
    /// Answers to GET_ID.
    pub ids: Answers,
    /// Answers to requests of no known kind, and to those whose header cannot be read.
    pub others: Answers,
    /// Requests that the driver does not get back: they are no chain, or their status could not be written.
    pub unanswered: u64,
    /// Bytes that drivers read.
    pub bytes_read: u64,
    /// Bytes that drivers wrote.
    pub bytes_written: u64,
    /// Times that data were made safe: for FLUSH, for writes without it, for [`Blk::flush`](super::Blk::flush).
    pub syncs: u64,
    /// Errors of the file.
    pub errors: u64,
    /// The last one.
    pub last_error: Option<String>,
}

/// Counters, shared by all queues: a row for each kind of request, by status.
#[derive(Debug, Default)]
pub(super) struct Counters {
    answers: [[AtomicU64; 3]; 7],
    unanswered: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    syncs: AtomicU64,
    errors: AtomicU64,
    last_error: Mutex<Option<String>>,
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Counters {
    /// A request was answered; `bytes` of data went in or out. No kind: its header cannot be read.
    pub(super) fn answered(&self, request: Option<u32>, status: Status, bytes: u64) {
        let [reads, writes, flushes, discards, write_zeroes, ids, others] = &self.answers;
        let [ok, ioerr, unsupp] = match request {
            Some(kind::IN) => reads,
            Some(kind::OUT) => writes,
            Some(kind::FLUSH) => flushes,
            Some(kind::DISCARD) => discards,
            Some(kind::WRITE_ZEROES) => write_zeroes,
            Some(kind::GET_ID) => ids,
            _ => others,
        };
        match status {
            Status::Ok => add(ok, 1),
            Status::IoErr => add(ioerr, 1),
            Status::Unsupp => add(unsupp, 1),
        }
        match (request, status) {
            (Some(kind::IN), Status::Ok) => add(&self.bytes_read, bytes),
            (Some(kind::OUT), Status::Ok) => add(&self.bytes_written, bytes),
            _ => {}
        }
    }

    pub(super) fn unanswered(&self) {
        add(&self.unanswered, 1);
    }

    pub(super) fn synced(&self) {
        add(&self.syncs, 1);
    }

    pub(super) fn failed(&self, error: &io::Error) {
        add(&self.errors, 1);
        *self.last_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
    }

    pub(super) fn snapshot(&self) -> Metrics {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [reads, writes, flushes, discards, write_zeroes, ids, others] = self
            .answers
            .each_ref()
            .map(|[ok, ioerr, unsupp]| Answers { ok: load(ok), ioerr: load(ioerr), unsupp: load(unsupp) });
        Metrics {
            reads,
            writes,
            flushes,
            discards,
            write_zeroes,
            ids,
            others,
            unanswered: load(&self.unanswered),
            bytes_read: load(&self.bytes_read),
            bytes_written: load(&self.bytes_written),
            syncs: load(&self.syncs),
            errors: load(&self.errors),
            last_error: self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}
