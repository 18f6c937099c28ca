//! What was counted, and what differed.

use std::collections::BTreeMap;

/// Differences that are kept with their place; all are counted.
pub(crate) const KEPT: usize = 10;

/// Something that our record says otherwise than the log.
#[derive(Clone, Debug)]
pub(crate) struct Difference {
    /// The line of the log.
    pub(crate) line: u64,
    pub(crate) what: String,
}

/// Answers to one kind of recorded lines.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Answers {
    pub(crate) recorded: u64,
    pub(crate) agree: u64,
    pub(crate) differ: u64,
    pub(crate) unanswered: u64,
}

/// Translations that the log records without an answer, by what they are here.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Silent {
    pub(crate) msi: u64,
    pub(crate) bypass: u64,
    pub(crate) fault: u64,
    pub(crate) differ: u64,
}

/// The counts of a replay.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) attach: u64,
    pub(crate) detach: u64,
    pub(crate) map: u64,
    pub(crate) unmap: u64,
    pub(crate) resets: u64,
    /// Mappings that unmaps removed.
    pub(crate) removed: u64,
    /// Maps that the recorded VMM refused too: overlaps, domains that are not there.
    pub(crate) refused_by_both: u64,
    /// Guest operations that a mirror of ours refused.
    pub(crate) refused_here: u64,
    pub(crate) fences: u64,
    /// What our device would have done otherwise, by name.
    pub(crate) deviations: BTreeMap<&'static str, u64>,
    pub(crate) translations: Answers,
    pub(crate) silent: Silent,
    pub(crate) notifications: Answers,
    pub(crate) audits_run: u64,
    pub(crate) audits_failed: u64,
    pub(crate) differences: u64,
    pub(crate) first: Vec<Difference>,
    /// Domains that were there before the history begins, with the line that names them first.
    pub(crate) from_before: Vec<(u32, u64)>,
    /// Endpoints whose domain was found from other lines than an ATTACH.
    pub(crate) found: Vec<(u32, u32, u64)>,
}

/// Notes about a history's beginning that are kept.
const NOTES: usize = 64;

impl Tally {
    pub(crate) fn operations(&self) -> u64 {
        self.attach + self.detach + self.map + self.unmap + self.resets
    }

    pub(crate) fn deviate(&mut self, what: &'static str) {
        *self.deviations.entry(what).or_default() += 1;
    }

    pub(crate) fn differ(&mut self, line: u64, what: impl FnOnce() -> String) {
        self.differences += 1;
        if self.first.len() < KEPT {
            self.first.push(Difference { line, what: what() });
        }
    }

    pub(crate) fn note_from_before(&mut self, domain: u32, line: u64) {
        if self.from_before.len() < NOTES {
            self.from_before.push((domain, line));
        }
    }

    pub(crate) fn note_found(&mut self, endpoint: u32, domain: u32, line: u64) {
        if self.found.len() < NOTES {
            self.found.push((endpoint, domain, line));
        }
    }
}
