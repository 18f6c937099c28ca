//! Root and context tables: what they say of an endpoint. Those of legacy mode are read here.

use viommu::{EndpointId, Gpa};

use crate::memory::{TableMemory, WORD, word};
use crate::paging::{Format, Paging, Rules, ones};
use crate::spec::fault::Reason;
use crate::spec::register::root as mode;
use crate::spec::table::{ADDRESS, context, root};
use crate::unit::Stage;

/// What the unit can do, as far as entries may ask for it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    pub(crate) rules: Rules,
    /// The most levels of tables; the fewest are 3.
    pub(crate) levels: u32,
    pub(crate) pass_through: bool,
    pub(crate) scalable: Option<Stage>,
}

/// What becomes of a requester's accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Context {
    /// They are translated.
    Paging { did: u16, paging: Paging, quiet: bool },
    /// They pass.
    Pass,
    /// They are blocked.
    Blocked(Reason, bool),
}

impl Context {
    /// Whether faults of the requester are not to be recorded. Those of the tables above always are.
    pub(crate) fn is_quiet(&self) -> bool {
        matches!(self, Self::Paging { quiet: true, .. } | Self::Blocked(_, true))
    }

    pub(crate) fn did(&self) -> Option<u16> {
        match self {
            Self::Paging { did, .. } => Some(*did),
            Self::Pass | Self::Blocked(..) => None,
        }
    }
}

/// What is found, or why nothing is, and whether that is not to be recorded.
pub(crate) type Found = Result<Context, (Reason, bool)>;

/// Reads the tables of `root_table` (as the register has it) for an endpoint: its requester has the bus in the upper half,
/// device and function in the lower.
pub(crate) fn look_up(
    memory: &dyn TableMemory,
    abilities: &Abilities,
    root_table: u64,
    id: EndpointId,
) -> Context {
    let requester = u16::try_from(id.requester).unwrap_or(u16::MAX);
    let found = match (root_table >> mode::MODE & 3, abilities.scalable) {
        (mode::LEGACY, _) if id.pasid.is_some() => Err((Reason::LEGACY_PASID, false)),
        (mode::LEGACY, _) => legacy(memory, abilities, root_table, requester),
        (mode::SCALABLE, Some(stage)) => {
            crate::scalable::read(memory, abilities, stage, root_table, requester, id.pasid)
        }
        _ => Err((Reason::ROOT_MODE, false)),
    };
    found.unwrap_or_else(|(reason, quiet)| Context::Blocked(reason, quiet))
}

fn legacy(memory: &dyn TableMemory, abilities: &Abilities, root_table: u64, requester: u16) -> Found {
    let loud = |reason| (reason, false);
    let beyond = !ones(abilities.rules.host_bits);
    let [bus, function] = requester.to_be_bytes();
    let at = entry(root_table & ADDRESS, u64::from(bus), root::SIZE);
    let (lo, hi) = pair(memory, at).ok_or_else(|| loud(Reason::ROOT_UNREADABLE))?;
    if lo & root::PRESENT == 0 {
        return Err(loud(Reason::ROOT_ABSENT));
    }
    if lo & (root::RESERVED | beyond) != 0 || hi != 0 {
        return Err(loud(Reason::ROOT_RESERVED));
    }
    let at = entry(lo & ADDRESS, u64::from(function), context::SIZE);
    let (lo, hi) = pair(memory, at).ok_or_else(|| loud(Reason::CONTEXT_UNREADABLE))?;
    // One that is not present has the bit, too.
    let quiet = lo & context::FAULTS_DISABLED != 0;
    let blocked = |reason| (reason, quiet);
    if lo & context::PRESENT == 0 {
        return Err(blocked(Reason::CONTEXT_ABSENT));
    }
    if lo & (context::RESERVED_0 | beyond) != 0 || hi & context::RESERVED_1 != 0 {
        // Recorded whatever it says.
        return Err(loud(Reason::CONTEXT_RESERVED));
    }
    let levels = u32::try_from(hi & context::WIDTH).unwrap_or(0).saturating_add(2);
    if !(3..=abilities.levels).contains(&levels) {
        return Err(blocked(Reason::CONTEXT_INVALID));
    }
    match lo >> context::TYPE & 3 {
        context::TRANSLATE => {}
        context::TRANSLATE_DEVICE_TLB if abilities.rules.device_tlb => {}
        context::PASS if abilities.pass_through => return Ok(Context::Pass),
        _ => return Err(blocked(Reason::CONTEXT_INVALID)),
    }
    let did = u16::try_from(hi >> context::DOMAIN & 0xffff).unwrap_or(0);
    let paging = Paging { root: Gpa(lo & ADDRESS), levels, format: Format::Legacy, has_pasid: false };
    Ok(Context::Paging { did, paging, quiet })
}

/// Where an entry is.
pub(crate) fn entry(table: u64, index: u64, size: u64) -> Option<u64> {
    table.checked_add(index.checked_mul(size)?)
}

fn pair(memory: &dyn TableMemory, at: Option<u64>) -> Option<(u64, u64)> {
    // The present bit is in the first word, which a driver writes last: the second word is read behind it.
    let lo = word(memory, at)?;
    let hi = word(memory, at?.checked_add(WORD))?;
    Some((lo, hi))
}
