//! What a mirror may be given of the record: its interest, its reach, and the clipping of identity views.

use crate::addr::{Iova, IovaRange};
use crate::endpoint::Region;
use crate::mapping::{Mapping, Target};
use crate::subscribe::{Interest, OutOfReach, Reach};
use crate::table::PAGE;

/// From a backed piece of the record to the extents that a mirror must hold of it, in the mirror's addresses.
#[derive(Clone)]
pub(crate) struct Lens {
    pub(crate) interest: Interest,
    pub(crate) reach: Reach,
    /// Inside an identity view: the apertures less the reserved regions, in the domain's addresses.
    clip_to: Option<Vec<IovaRange>>,
    /// Here the guest cannot be refused.
    may_leave_out: bool,
    /// Nothing to clip or to leave out: every piece of memory is one extent, as it is.
    pub(crate) straight: bool,
    /// Straight, and nothing is out of reach but for want of entries.
    pub(crate) plain: bool,
}

impl Lens {
    pub(crate) fn new(interest: Interest, reach: Reach) -> Self {
        let mut lens =
            Self { interest, reach, clip_to: None, may_leave_out: false, straight: false, plain: false };
        lens.settle();
        lens
    }

    fn settle(&mut self) {
        let whole =
            self.clip_to.is_none() && self.interest.window == IovaRange::ALL && self.interest.offset == 0;
        let anywhere = self.reach.apertures == [IovaRange::ALL] && self.reach.granule() <= PAGE;
        self.straight = whole && (anywhere || !self.leaves_out());
        self.plain = whole && anywhere;
    }

    /// Comes to an address space: what of an identity view it may hold, and whether the guest can be refused there.
    pub(crate) fn set_space(&mut self, clip_to: Option<Vec<IovaRange>>, refusable: bool) {
        self.clip_to = clip_to;
        self.may_leave_out = !refusable;
        self.settle();
    }

    pub(crate) fn set_reach(&mut self, reach: Reach) {
        self.reach = reach;
        self.settle();
    }

    /// What may be held of an identity view: the apertures less `regions` (ascending), in the domain's addresses.
    pub(crate) fn identity_clip(&self, regions: &[Region]) -> Vec<IovaRange> {
        let mut parts: Vec<IovaRange> = Vec::new();
        for aperture in &self.reach.apertures {
            // Inside the window, where addresses do not wrap with the offset.
            let window = self.interest.outward(self.interest.window);
            let inside = aperture.intersect(window).and_then(|a| self.interest.inward(a));
            let Some(aperture) = inside else { continue };
            let mut at = Some(aperture.start());
            for region in regions.iter().filter(|r| r.range.overlaps(aperture)) {
                let before = region.range.start().0.checked_sub(1).map(Iova);
                parts.extend(at.zip(before).and_then(|(at, last)| IovaRange::new(at, last)));
                at = region.range.next();
            }
            parts.extend(at.and_then(|at| IovaRange::new(at, aperture.last())));
        }
        parts
    }

    /// Whether what is out of reach here is left out.
    fn leaves_out(&self) -> bool {
        self.may_leave_out && self.reach.out_of_reach == OutOfReach::LeaveOut
    }

    /// Whether any of `pieces`, which ascend, may lie in the window.
    #[inline]
    pub(crate) fn sees(&self, pieces: &[Mapping]) -> bool {
        let (Some(first), Some(last)) = (pieces.first(), pieces.last()) else { return false };
        self.interest.window.overlaps(first.range.hull(last.range))
    }

    /// Appends the extents of `piece`. Unreachable ones included, except in an identity view and where they are
    /// declared to be left out.
    pub(crate) fn extents(&self, piece: &Mapping, out: &mut Vec<Mapping>) {
        if piece.target == Target::Mmio && !self.reach.mmio {
            return;
        }
        if self.straight {
            out.push(*piece);
            return;
        }
        let Some(clipped) = piece.clip(self.interest.window) else { return };
        let leave_out = self.leaves_out();
        let mut push = |m: Mapping| {
            let extent = Mapping { range: self.interest.outward(m.range), ..m };
            if !(leave_out && self.reach.refuses(&extent).is_some()) {
                out.push(extent);
            }
        };
        match &self.clip_to {
            None => push(clipped),
            Some(parts) => {
                let parts = parts.iter().filter_map(|part| self.whole_pages(&clipped.clip(*part)?));
                parts.for_each(&mut push);
            }
        }
    }

    /// What of an identity extent is made of the host's pages.
    fn whole_pages(&self, extent: &Mapping) -> Option<Mapping> {
        let mask = self.reach.granule().wrapping_sub(1);
        let outward = self.interest.outward(extent.range);
        let start = outward.start().0.checked_add(mask)? & !mask;
        let end = (u128::from(outward.last().0) + 1) & !u128::from(mask);
        let last = u64::try_from(end.checked_sub(1)?).ok()?;
        let range = self.interest.inward(IovaRange::new(Iova(start), Iova(last))?)?;
        // An offset that is none of the host's pages leaves nothing that it can hold.
        extent.clip(range).filter(|m| m.gpa.0 & mask == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Gpa;
    use crate::endpoint::RegionKind;
    use crate::mapping::Access;
    use crate::subscribe::Kinds;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(start), Iova(last)).unwrap()
    }

    #[test]
    fn extents_are_clipped_to_the_window_and_moved_by_the_offset() {
        let interest =
            Interest::all_of(Kinds::MAP | Kinds::UNMAP).within(range(0x2000, 0x2fff)).with_offset(0x10_0000);
        let lens = Lens::new(interest, Reach::default());
        let piece = Mapping::new(Iova(0x1000), 0x3000, Gpa(0x9000), Access::RW).unwrap();
        let mut out = Vec::new();
        lens.extents(&piece, &mut out);
        assert_eq!(out, [Mapping::new(Iova(0x10_2000), 0x1000, Gpa(0xa000), Access::RW).unwrap()]);
    }

    #[test]
    fn identity_is_clipped_to_apertures_less_regions() {
        let reach =
            Reach { apertures: vec![range(0, 0xfff_ffff), range(0x2000_0000, u64::MAX)], ..Reach::default() };
        let lens = Lens::new(Interest::MIRROR, reach);
        let msi = Region { range: range(0x2000_0000, 0x2000_0fff), kind: RegionKind::Msi };
        assert_eq!(lens.identity_clip(&[msi]), [range(0, 0xfff_ffff), range(0x2000_1000, u64::MAX)]);
    }
}
