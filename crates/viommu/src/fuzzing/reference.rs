//! The naive reference: what each page maps to, one page at a time.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use viommu::{Access, Domain, Extent, Gpa, Iova, IovaRange, Mapping, Medium, Target};

/// Bytes a page.
pub const PAGE: u64 = 4096;

/// What one page maps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// The page's target.
    pub gpa: u64,
    /// What is allowed.
    pub access: Access,
    /// Aimed at registers.
    pub mmio: bool,
    /// The first page of the mapping that it is of.
    pub first: u64,
    /// The last one.
    pub last: u64,
}

/// A domain, page by page. Page numbers, not addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages(pub BTreeMap<u64, Cell>);

/// The range of those pages.
pub fn range_of(first: u64, last: u64) -> IovaRange {
    let start = Iova(first * PAGE);
    IovaRange::new(start, Iova(last * PAGE + (PAGE - 1))).unwrap_or(IovaRange::ALL)
}

impl Pages {
    /// Maps pages of which none is mapped.
    pub fn map(&mut self, m: &Mapping) {
        let (first, last) = (m.range.start().0 / PAGE, m.range.last().0 / PAGE);
        for page in first..=last {
            let gpa = m.gpa.0 / PAGE + (page - first);
            let cell = Cell { gpa, access: m.access, mmio: m.target == Target::Mmio, first, last };
            assert_eq!(self.0.insert(page, cell), None, "the reference maps a page twice");
        }
    }

    /// Whether a mapping sticks out of the pages at either end.
    pub fn cuts(&self, first: u64, last: u64) -> bool {
        self.0.range(first..=last).any(|(_, c)| c.first < first || c.last > last)
    }

    /// Whether any of the pages is mapped.
    pub fn any(&self, first: u64, last: u64) -> bool {
        self.0.range(first..=last).next().is_some()
    }

    /// Unmaps the pages; what sticks out stays.
    pub fn unmap(&mut self, first: u64, last: u64) {
        self.0.retain(|page, _| *page < first || *page > last);
        for (page, cell) in &mut self.0 {
            if cell.first <= last && first <= cell.last {
                if *page < first {
                    cell.last = first - 1;
                } else {
                    cell.first = last + 1;
                }
            }
        }
    }

    /// Its mappings, ascending.
    pub fn mappings(&self) -> Vec<Mapping> {
        let firsts = self.0.iter().filter(|(page, c)| **page == c.first);
        firsts
            .map(|(_, c)| {
                let target = if c.mmio { Target::Mmio } else { Target::Ram };
                let range = range_of(c.first, c.last);
                Mapping { range, gpa: Gpa(c.gpa * PAGE), access: c.access, target }
            })
            .collect()
    }

    /// Whether the domain's record says the same.
    pub fn check(&self, domain: &Domain) {
        let mut record = Vec::new();
        domain.for_each(IovaRange::ALL, |m| {
            record.push(m);
            ControlFlow::Continue(())
        });
        assert_eq!(record, self.mappings(), "the record is not what the steps say");
        assert_eq!(domain.len(), record.len(), "the record miscounts");
    }
}

/// What lies at a guest physical page.
pub fn medium_at(backing: &[Extent], gpa: u64) -> Option<Medium> {
    let at = Gpa(gpa * PAGE);
    backing.iter().find(|e| e.range.contains(at)).map(|e| e.medium)
}

/// What a consumer may be given of a page: target, access, whether it is registers.
pub fn given(backing: &[Extent], cell: &Cell) -> Option<(u64, Access, bool)> {
    let medium = medium_at(backing, cell.gpa)?;
    let access = if medium == Medium::Rom { cell.access & Access::READ } else { cell.access };
    (!access.is_empty()).then_some((cell.gpa, access, cell.mmio || medium == Medium::Mmio))
}
