//! What an access may come to: a plain reading of the tables as they are, and of what a unit may have kept since the last
//! invalidation ("Caching Translation Information" of the specification: it may keep anything until it is told).

/// Memory as the tables' bytes lie in it.
pub(super) trait Words {
    /// `None`: there is no memory.
    fn word(&self, at: u64) -> Option<u64>;
}

/// Where writes are interrupts.
pub(super) const INTERRUPTS: std::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// Bits of a guest physical address, and of an address that a device may use.
const WIDTH: u32 = 48;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const READ: u64 = 1;
const WRITE: u64 = 2;
const LARGE: u64 = 1 << 7;
const SNOOP: u64 = 1 << 11;
const TRANSIENT: u64 = 1 << 62;

/// What becomes of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It reaches an address, where there may be nothing.
    Reaches(u64),
    /// It is blocked, and that is recorded or not.
    Blocked { reason: u8, is_quiet: bool },
}

/// What a context entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Context {
    Paging { did: u16, root: u64, levels: u32, is_quiet: bool },
    Pass,
    Blocked { reason: u8, is_quiet: bool },
}

/// A page, as tables say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) start: u64,
    pub(super) bytes: u64,
    gpa: u64,
    /// Bits of an entry.
    access: u64,
}

impl Page {
    fn has(&self, iova: u64) -> bool {
        iova.wrapping_sub(self.start) < self.bytes
    }

    /// Whether some of it leads to the interrupts.
    pub(super) fn touches_interrupts(&self) -> bool {
        self.gpa <= *INTERRUPTS.end() && self.gpa + (self.bytes - 1) >= *INTERRUPTS.start()
    }
}

/// A page that a unit may have kept.
#[derive(Clone, Copy, Debug)]
struct Kept {
    source: u16,
    did: u16,
    root: u64,
    page: Page,
}

/// One access.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) source: u16,
    pub(super) iova: u64,
    pub(super) is_write: bool,
}

impl Request {
    fn need(&self) -> u64 {
        if self.is_write { WRITE } else { READ }
    }

    fn denied(&self) -> u8 {
        if self.is_write { 5 } else { 6 }
    }
}

/// What a walk finds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Walk {
    pub(super) outcome: Outcome,
    /// The page, whether this access may use it or not.
    pub(super) page: Option<Page>,
    /// An entry on the way has all bits set.
    pub(super) has_all_ones: bool,
}

/// What may have been kept, by any unit that does as the specification says.
#[derive(Debug, Default)]
pub(super) struct Model {
    pub(super) translates: bool,
    pub(super) root_table: u64,
    sources: Vec<u16>,
    /// What each source's context entry has said at a moment when it may have been read.
    contexts: Vec<(u16, Context)>,
    pages: Vec<Kept>,
}

impl Model {
    pub(super) fn new(sources: &[u16]) -> Self {
        Self { sources: sources.to_vec(), ..Self::default() }
    }

    /// What the entries say now.
    pub(super) fn look_up(&self, memory: &impl Words, source: u16) -> Context {
        let loud = |reason| Context::Blocked { reason, is_quiet: false };
        let [bus, function] = source.to_be_bytes();
        let pair = |at: u64| Some((memory.word(at)?, memory.word(at + 8)?));
        let beyond = ADDRESS & !((1 << WIDTH) - 1);
        let Some((low, high)) = pair(self.root_table + u64::from(bus) * 16) else { return loud(8) };
        if low & 1 == 0 {
            return loud(1);
        }
        if low & (0xffe | beyond | !ADDRESS & !0xfff) != 0 || high != 0 {
            return loud(0xa);
        }
        let Some((low, high)) = pair((low & ADDRESS) + u64::from(function) * 16) else { return loud(9) };
        let is_quiet = low & 2 != 0;
        let blocked = |reason| Context::Blocked { reason, is_quiet };
        if low & 1 == 0 {
            return blocked(2);
        }
        if low & (0xff0 | beyond | !ADDRESS & !0xfff) != 0 || high & !0xff_ff7f != 0 {
            // Always recorded.
            return loud(0xb);
        }
        let levels = (high & 7) as u32 + 2;
        if !(3..=4).contains(&levels) {
            return blocked(3);
        }
        match low >> 2 & 3 {
            0 => Context::Paging {
                did: u16::try_from(high >> 8 & 0xffff).unwrap_or(0),
                root: low & ADDRESS,
                levels,
                is_quiet,
            },
            2 => Context::Pass,
            _ => blocked(3),
        }
    }

    fn candidates(&self, memory: &impl Words, source: u16) -> Vec<Context> {
        let mut all = vec![self.look_up(memory, source)];
        for (_, context) in self.contexts.iter().filter(|(of, _)| *of == source) {
            if !all.contains(context) {
                all.push(*context);
            }
        }
        all
    }

    /// The entries on the way of an address now, with their levels.
    pub(super) fn way(&self, memory: &impl Words, source: u16, iova: u64) -> Vec<(u32, u64)> {
        let mut way = Vec::new();
        let Context::Paging { root, levels, .. } = self.look_up(memory, source) else { return way };
        let mut table = root;
        for level in (1..=levels).rev() {
            let at = table + (iova >> (3 + 9 * level) & 0x1ff) * 8;
            way.push((level, at));
            match memory.word(at) {
                Some(raw) if raw & 3 != 0 && raw & LARGE == 0 => table = raw & ADDRESS,
                _ => break,
            }
        }
        way
    }

    /// All that an access may come to. The first is what the tables say now.
    pub(super) fn allowed(&self, memory: &impl Words, request: Request) -> Vec<Outcome> {
        if !self.translates {
            return vec![Outcome::Reaches(request.iova)];
        }
        let mut all = Vec::new();
        let mut add = |outcome| {
            if !all.contains(&outcome) {
                all.push(outcome);
            }
        };
        let contexts = self.candidates(memory, request.source);
        for context in &contexts {
            match *context {
                Context::Pass => add(Outcome::Reaches(request.iova)),
                Context::Blocked { reason, is_quiet } => add(Outcome::Blocked { reason, is_quiet }),
                Context::Paging { root, levels, is_quiet, .. } => {
                    add(walk(memory, root, levels, is_quiet, request).outcome);
                }
            }
        }
        for kept in self.kept(&contexts, request) {
            if kept.access & request.need() != 0 {
                let gpa = kept.gpa + (request.iova - kept.start);
                if !INTERRUPTS.contains(&gpa) {
                    add(Outcome::Reaches(gpa));
                }
                continue;
            }
            for context in &contexts {
                let is_quiet = matches!(
                    context,
                    Context::Paging { is_quiet: true, .. } | Context::Blocked { is_quiet: true, .. }
                );
                add(Outcome::Blocked { reason: request.denied(), is_quiet });
            }
        }
        all
    }

    /// Pages that may have been kept for an access: for its source, or for others in the same domain.
    fn kept(&self, contexts: &[Context], request: Request) -> Vec<Page> {
        let is_of = |kept: &&Kept| {
            let same = |context: &Context| matches!(context, Context::Paging { did, root, .. } if (*did, *root) == (kept.did, kept.root));
            kept.page.has(request.iova) && (kept.source == request.source || contexts.iter().any(same))
        };
        self.pages.iter().filter(is_of).map(|kept| kept.page).collect()
    }

    /// Whether a page may have been kept that does not allow the access.
    pub(super) fn may_be_denied_by_a_kept_page(&self, memory: &impl Words, request: Request) -> bool {
        let contexts = self.candidates(memory, request.source);
        self.kept(&contexts, request).iter().any(|page| page.access & request.need() == 0)
    }

    /// The walks that an access may make now.
    pub(super) fn walks(&self, memory: &impl Words, request: Request) -> Vec<Walk> {
        let contexts = self.candidates(memory, request.source);
        let walk = |context: &Context| match *context {
            Context::Paging { root, levels, is_quiet, .. } => {
                Some(walk(memory, root, levels, is_quiet, request))
            }
            _ => None,
        };
        contexts.iter().filter_map(walk).collect()
    }

    /// An access is made: what it reads may be kept.
    pub(super) fn note(&mut self, memory: &impl Words, request: Request) {
        if !self.translates {
            return;
        }
        let contexts = self.candidates(memory, request.source);
        for context in &contexts {
            if !self.contexts.contains(&(request.source, *context)) {
                self.contexts.push((request.source, *context));
            }
            let Context::Paging { did, root, levels, is_quiet } = *context else { continue };
            if let Some(page) = walk(memory, root, levels, is_quiet, request).page {
                self.pages.push(Kept { source: request.source, did, root, page });
            }
        }
    }

    /// Contexts are invalidated: of sources that are the same under the mask.
    pub(super) fn forget_contexts(&mut self, memory: &impl Words, source: u16, mask: u16) {
        for of in self.sources.clone() {
            if (of ^ source) & mask != 0 {
                continue;
            }
            self.contexts.retain(|(other, _)| *other != of);
            // It may be read again at once.
            self.contexts.push((of, self.look_up(memory, of)));
        }
    }

    /// Translations are invalidated: of a domain id, or all; `pages` has the first address and the last.
    pub(super) fn forget_pages(&mut self, did: Option<u16>, (first, last): (u64, u64)) {
        self.pages.retain(|kept| {
            let page = kept.page;
            let overlaps = page.start <= last && page.start + (page.bytes - 1) >= first;
            did.is_some_and(|did| did != kept.did) || !overlaps
        });
    }

    /// Everything: translation has been switched, or the root table set.
    pub(super) fn forget_all(&mut self, memory: &impl Words) {
        self.forget_contexts(memory, 0, 0);
        self.pages.clear();
    }
}

/// Second-stage tables of legacy mode, from the root to the page.
fn walk(memory: &impl Words, root: u64, levels: u32, is_quiet: bool, request: Request) -> Walk {
    let mut found = Walk { outcome: Outcome::Reaches(0), page: None, has_all_ones: false };
    let mut reason = None;
    let bits = WIDTH.min(12 + 9 * levels);
    if request.iova >> bits != 0 {
        reason = Some(4);
    }
    let (mut table, mut access) = (root, READ | WRITE);
    let levels = if reason.is_some() { 0 } else { levels };
    for level in (1..=levels).rev() {
        let shift = 3 + 9 * level;
        let Some(raw) = memory.word(table + (request.iova >> shift & 0x1ff) * 8) else {
            // The first table is named by the context entry, which is not valid then.
            reason = reason.or(Some(if level == levels { 3 } else { 7 }));
            break;
        };
        found.has_all_ones |= raw == u64::MAX;
        access &= raw;
        if raw & request.need() == 0 {
            reason = reason.or_else(|| Some(request.denied()));
        }
        if raw & (READ | WRITE) == 0 {
            break;
        }
        let is_page = level == 1 || level <= 3 && raw & LARGE != 0;
        let inside = ((1_u64 << shift) - 1) & !0xfff;
        let beyond = ADDRESS & !((1 << WIDTH) - 1);
        let reserved = match is_page {
            true => beyond | inside | TRANSIENT,
            false => beyond | SNOOP | TRANSIENT | if level > 3 { LARGE } else { 0 },
        };
        if raw & reserved != 0 {
            reason = reason.or(Some(0xc));
            break;
        }
        table = raw & ADDRESS;
        if is_page {
            let mask = (1_u64 << shift) - 1;
            let start = request.iova & !mask;
            if access & (READ | WRITE) != 0 {
                found.page = Some(Page { start, bytes: mask + 1, gpa: table, access });
            }
            let gpa = table + (request.iova & mask);
            if INTERRUPTS.contains(&gpa) {
                reason = reason.or(Some(0xe));
            }
            found.outcome = Outcome::Reaches(gpa);
            break;
        }
    }
    if let Some(reason) = reason {
        found.outcome = Outcome::Blocked { reason, is_quiet };
    }
    found
}
