//! Maps and unmaps as hypercalls: a small pseries driver, with a LIOBN for each domain. Views and bypass are the
//! platform's there, and stay steps of the record.

use core::ops::ControlFlow;

use serde::Serialize;
use viommu::{AttachError, Completion, Domain, Iommu, IovaRange, Mapping, Target};
use viommu_spapr::spec::{self, Code, H_GET_TCE, H_PUT_TCE, H_PUT_TCE_INDIRECT, H_STUFF_TCE};
use viommu_spapr::{Answer as Returned, BusConfig, Merge, Spapr, Window};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::PATIENCE;
use super::reply::Answer;

const PAGE: u64 = 4096;
const CALLS: [(u64, &str); 4] = [
    (H_GET_TCE, "H_GET_TCE"),
    (H_PUT_TCE, "H_PUT_TCE"),
    (H_STUFF_TCE, "H_STUFF_TCE"),
    (H_PUT_TCE_INDIRECT, "H_PUT_TCE_INDIRECT"),
];
const CODES: [(Code, &str); 4] = [
    (Code::Success, "H_SUCCESS"),
    (Code::Hardware, "H_HARDWARE"),
    (Code::Parameter, "H_PARAMETER"),
    (Code::Resource, "H_RESOURCE"),
];

/// The tables, and the driver's page for lists.
pub(crate) struct Tce {
    spapr: Spapr,
    memory: GuestMemoryMmap,
    may_cut: bool,
    /// Answers by call and code.
    answers: [[u64; CODES.len()]; CALLS.len()],
    inexpressible: Option<String>,
}

/// What went between guest and tables.
#[derive(Debug, Serialize)]
pub(crate) struct TablesLine {
    pub(crate) hypercalls: u64,
    pub(crate) codes: Vec<CodeLine>,
}

/// Hypercalls of one number with one code.
#[derive(Debug, Serialize)]
pub(crate) struct CodeLine {
    pub(crate) hypercall: &'static str,
    pub(crate) code: &'static str,
    pub(crate) count: u64,
}

impl Tce {
    /// # Errors
    /// There is no memory for tables or lists.
    pub(super) fn new(may_cut: bool) -> Result<Self, Box<dyn std::error::Error>> {
        // What the guest maps in one go is one mapping in the history.
        let spapr = Spapr::new(super::builder(), Merge::Hypercall)?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(PAGE)?)])?;
        Ok(Self { spapr, memory, may_cut, answers: Default::default(), inexpressible: None })
    }

    pub(super) fn iommu(&self) -> &Iommu {
        self.spapr.iommu()
    }

    pub(super) fn inexpressible(&self) -> Option<&str> {
        self.inexpressible.as_deref()
    }

    pub(super) fn line(&self) -> super::ModelLine {
        let codes = self.answers.iter().zip(CALLS).flat_map(|(row, (_, hypercall))| {
            row.iter().zip(CODES).filter(|(count, _)| **count != 0).map(move |(count, (_, code))| CodeLine {
                hypercall,
                code,
                count: *count,
            })
        });
        let tables = TablesLine { hypercalls: self.answers.iter().flatten().sum(), codes: codes.collect() };
        super::ModelLine { name: "spapr-tce", device: None, tables: Some(tables), unit: None }
    }

    /// What the tables say they have answered, against what came.
    pub(super) fn compare_counts(&self) -> Option<String> {
        let metrics = self.spapr.metrics();
        let theirs = CALLS.map(|(number, _)| CODES.map(|(code, _)| metrics.answers(number, code)));
        let differ = theirs != self.answers;
        differ.then(|| format!("the tables have answered {theirs:?}, the guest has {:?}", self.answers))
    }

    /// A bus with one window of all addresses.
    pub(super) fn make(&self, domain: u32) -> bool {
        let default_window = Window::new(domain, 0, 64, 12);
        let config = BusConfig { default_window, slots: Vec::new(), ..BusConfig::host_bridge(0) };
        self.spapr.add_bus(domain, config).is_ok()
    }

    pub(super) fn end(&self, domain: u32) -> Result<Completion, AttachError> {
        self.spapr.remove_bus(domain)
    }

    /// A reset of the record has ended all domains.
    pub(super) fn all_ended(&self) {
        for number in self.spapr.buses() {
            // Its domain has ended: nothing is left to wait for, and nothing to refuse.
            drop(self.spapr.remove_bus(number));
        }
    }

    fn cannot(&mut self, what: &str, range: IovaRange) -> Answer {
        self.inexpressible.get_or_insert_with(|| format!("TCEs cannot express {what}, at {range}"));
        Answer::Inexpressible
    }

    fn call(&mut self, number: u64, args: [u64; 4], complaints: &mut Vec<String>) -> Option<Returned> {
        let pending = self.spapr.hypercall(number, args, &self.memory);
        let returned = pending.map(|mut pending| pending.wait_timeout(PATIENCE));
        let Some(Ok(returned)) = returned else {
            complaints.push(format!("hypercall {number:#x} was not answered: {returned:?}"));
            return None;
        };
        let row = CALLS.iter().position(|(call, _)| *call == number);
        let column = CODES.iter().position(|(code, _)| *code == returned.code);
        let counter = row.zip(column).and_then(|(row, column)| self.answers.get_mut(row)?.get_mut(column));
        if let Some(counter) = counter {
            *counter += 1;
        }
        Some(returned)
    }

    fn answer(&mut self, number: u64, args: [u64; 4], complaints: &mut Vec<String>) -> Answer {
        let returned = self.call(number, args, complaints);
        Answer::Hypercall(returned.map_or(Code::Hardware, |returned| returned.code))
    }

    pub(super) fn map(
        &mut self,
        id: u32,
        domain: Option<&Domain>,
        m: &Mapping,
        complaints: &mut Vec<String>,
    ) -> Answer {
        let pages = m.range.bytes() / u128::from(PAGE);
        let wraps = Mapping::over(m.range, m.gpa, m.access).is_none();
        let holds = domain.and_then(|domain| domain.next_mapping(m.range.start()));
        let cannot = if m.target != Target::Ram {
            Some("a mapping of device registers")
        } else if m.access.is_empty() {
            Some("a mapping without access")
        } else if !m.range.is_aligned(PAGE) || !m.gpa.0.is_multiple_of(PAGE) || wraps {
            Some("a mapping that is not whole pages")
        } else if pages > spec::LIST_ENTRIES.into() {
            Some("a mapping of more pages than one list has")
        } else if holds.is_some_and(|there| there.range.overlaps(m.range)) {
            Some("a map that is refused since something is there, where it would be replaced")
        } else {
            None
        };
        if let Some(what) = cannot {
            return self.cannot(what, m.range);
        }
        let (liobn, ioba) = (u64::from(id), m.range.start().0);
        let tce = spec::encode(m.gpa, m.access);
        let pages = u64::try_from(pages).unwrap_or(u64::MAX);
        let answer = if pages == 1 {
            self.answer(H_PUT_TCE, [liobn, ioba, tce, 0], complaints)
        } else {
            let list = (0..pages).flat_map(|page| tce.wrapping_add(page * PAGE).to_be_bytes());
            if let Err(why) = self.memory.write_slice(&list.collect::<Vec<u8>>(), GuestAddress(0)) {
                complaints.push(format!("the driver's list: {why}"));
            }
            self.answer(H_PUT_TCE_INDIRECT, [liobn, ioba, 0, pages], complaints)
        };
        if answer.is_ok() {
            let last = m.range.last().0;
            self.expect_entry(liobn, ioba, tce, complaints);
            self.expect_entry(liobn, last, tce.wrapping_add((pages - 1) * PAGE), complaints);
        }
        answer
    }

    pub(super) fn unmap(
        &mut self,
        id: u32,
        domain: Option<&Domain>,
        range: IovaRange,
        complaints: &mut Vec<String>,
    ) -> Answer {
        let mut cuts = false;
        if let Some(domain) = domain.filter(|_| !self.may_cut) {
            domain.for_each(range, |m| {
                cuts |= !range.covers(m.range);
                if cuts { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
        }
        if cuts || !range.is_aligned(PAGE) {
            let what = "an unmap that is refused since it would cut a mapping, or is not whole pages";
            return self.cannot(what, range);
        }
        let (liobn, ioba) = (u64::from(id), range.start().0);
        let pages = u64::try_from(range.bytes() / u128::from(PAGE)).unwrap_or(u64::MAX);
        let answer = match pages {
            1 => self.answer(H_PUT_TCE, [liobn, ioba, 0, 0], complaints),
            _ => self.answer(H_STUFF_TCE, [liobn, ioba, 0, pages], complaints),
        };
        if answer.is_ok() {
            self.expect_entry(liobn, ioba, 0, complaints);
            self.expect_entry(liobn, range.last().0, 0, complaints);
        }
        answer
    }

    /// An entry reads as it was written.
    fn expect_entry(&mut self, liobn: u64, ioba: u64, tce: u64, complaints: &mut Vec<String>) {
        let read = self.call(H_GET_TCE, [liobn, ioba, 0, 0], complaints);
        if read.is_some_and(|read| read.value != tce) {
            complaints.push(format!("the entry of {ioba:#x} reads {read:x?}, where {tce:#x} is due"));
        }
    }
}
