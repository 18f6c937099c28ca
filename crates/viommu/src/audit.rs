//! Audits: what a subscriber says it holds, against record and backing.

use crate::addr::{Iova, IovaRange};
use crate::mapping::Mapping;

/// The differences, as ranges in the subscriber's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Should be held and is not.
    pub missing: Vec<Mapping>,
    /// Is held and should not be, or not so: another target, more or less access.
    pub extra: Vec<Mapping>,
    /// Extents held.
    pub held: usize,
}

impl Audit {
    /// Whether nothing differs.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty()
    }
}

/// Compares page by page, by pieces: extents may be cut differently. `exact`: also what is missing counts.
pub(crate) fn compare(mut due: Vec<Mapping>, mut held: Vec<Mapping>, exact: bool) -> Audit {
    due.sort_unstable_by_key(|m| m.range);
    held.sort_unstable_by_key(|m| m.range);
    let mut audit = Audit { held: held.len(), extra: without(&held, &due), ..Audit::default() };
    if exact {
        audit.missing = without(&due, &held);
    }
    // Two extents over one address are wrong whatever they say.
    for pair in held.windows(2) {
        if let [a, b] = pair
            && a.range.overlaps(b.range)
        {
            audit.extra.push(*b);
        }
    }
    audit
}

/// The parts of `list` that `other` does not say in the same way. Both ascend.
fn without(list: &[Mapping], other: &[Mapping]) -> Vec<Mapping> {
    let mut rest = Vec::new();
    let mut from = 0;
    for m in list {
        while other.get(from).is_some_and(|o| o.range.last() < m.range.start()) {
            from += 1;
        }
        let mut at = Some(m.range.start());
        for o in other.iter().skip(from).take_while(|o| o.range.start() <= m.range.last()) {
            let Some(common) = o.range.intersect(m.range) else { continue };
            let same = o.clip(common).map(|o| (o.gpa, o.access)) == m.clip(common).map(|m| (m.gpa, m.access));
            if !same {
                continue;
            }
            let before = common.start().0.checked_sub(1).map(Iova);
            rest.extend(at.zip(before).and_then(|(at, last)| m.clip(IovaRange::new(at, last)?)));
            at = common.next();
        }
        rest.extend(at.and_then(|at| m.clip(IovaRange::new(at, m.range.last())?)));
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gpa;
    use crate::mapping::Access;

    fn m(iova: u64, bytes: u64, gpa: u64, access: Access) -> Mapping {
        Mapping::new(Iova(iova), bytes, Gpa(gpa), access).unwrap()
    }

    #[test]
    fn compare_by_pages_whatever_the_extents() {
        let due = vec![m(0x1000, 0x3000, 0x9000, Access::RW)];
        let held = vec![m(0x1000, 0x1000, 0x9000, Access::RW), m(0x2000, 0x2000, 0xa000, Access::RW)];
        assert!(compare(due, held, true).is_clean());
    }

    #[test]
    fn compare_names_what_is_missing_and_what_is_wrong() {
        let due = vec![m(0x1000, 0x3000, 0x9000, Access::RW)];
        let held = vec![m(0x2000, 0x1000, 0xa000, Access::READ), m(0x8000, 0x1000, 0, Access::READ)];
        let audit = compare(due.clone(), held.clone(), true);
        assert_eq!(audit.missing, due);
        assert_eq!(audit.extra, held);
        assert!(compare(due, vec![], false).is_clean());
    }

    #[test]
    fn compare_finds_two_extents_over_one_address() {
        let due = vec![m(0x1000, 0x2000, 0x9000, Access::RW)];
        let held = vec![m(0x1000, 0x2000, 0x9000, Access::RW), m(0x2000, 0x1000, 0xa000, Access::RW)];
        assert!(!compare(due, held, true).is_clean());
    }
}
