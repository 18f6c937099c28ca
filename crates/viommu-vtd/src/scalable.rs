//! Tables of scalable mode: root and context entries, PASID directories, PASID entries ("Scalable Mode Address
//! Translation"). Whatever they refer to, five entries are read for one endpoint.

use viommu::Gpa;

use crate::context::{Abilities, Context, Found, entry};
use crate::memory::{TableMemory, WORD, word};
use crate::paging::{Format, Paging, ones};
use crate::spec::fault::Reason;
use crate::spec::table::{ADDRESS, directory, pasid as p, root, scalable_context as c};
use crate::unit::Stage;

pub(crate) fn read(
    memory: &dyn TableMemory,
    abilities: &Abilities,
    stage: Stage,
    root_table: u64,
    requester: u16,
    pasid: Option<u32>,
) -> Found {
    let loud = |reason| (reason, false);
    let beyond = !ones(abilities.rules.host_bits);
    let [bus, function] = requester.to_be_bytes();
    let function = u64::from(function);

    // Each half of a root entry has a present bit of its own.
    let at = entry(root_table & ADDRESS, u64::from(bus), root::SIZE);
    let half = if function < c::ENTRIES { 0 } else { WORD };
    let raw = word(memory, at.and_then(|at| at.checked_add(half)));
    let raw = raw.ok_or_else(|| loud(Reason::SCALABLE_ROOT_UNREADABLE))?;
    if raw & root::PRESENT == 0 {
        return Err(loud(Reason::SCALABLE_ROOT_ABSENT));
    }
    if raw & (root::RESERVED | beyond) != 0 {
        return Err(loud(Reason::SCALABLE_ROOT_RESERVED));
    }

    let at = entry(raw & ADDRESS, function & c::ENTRIES.saturating_sub(1), c::SIZE);
    let [low, high, rest @ ..] =
        words::<4>(memory, at).ok_or_else(|| loud(Reason::SCALABLE_CONTEXT_UNREADABLE))?;
    let mut quiet = low & c::FAULTS_DISABLED != 0;
    if low & c::PRESENT == 0 {
        return Err((Reason::SCALABLE_CONTEXT_ABSENT, quiet));
    }
    let device_tlb = if abilities.rules.device_tlb { 0 } else { c::DEVICE_TLB };
    if low & (c::RESERVED_0 | device_tlb | beyond) != 0 || high & c::RESERVED_1 != 0 || rest != [0; 2] {
        return Err((Reason::SCALABLE_CONTEXT_RESERVED, quiet));
    }
    // Entries of the directory: 2^7 to 2^14. A PASID has 20 bits at most.
    let order = u32::try_from(low >> c::DIRECTORY_SIZE & 7).unwrap_or(0);
    let bits = order.saturating_add(7).saturating_add(directory::TABLE_BITS);
    let is_beyond = |pasid: u64| pasid > ones(bits);
    let number = match pasid.map(u64::from) {
        None if is_beyond(high & c::RID_PASID) => return Err((Reason::SCALABLE_CONTEXT_INVALID, quiet)),
        None => high & c::RID_PASID,
        Some(_) if low & c::PASID_ENABLE == 0 => return Err((Reason::PASID_DISABLED, quiet)),
        Some(pasid) if is_beyond(pasid) => return Err((Reason::PASID_BEYOND, quiet)),
        Some(pasid) => pasid,
    };

    let at = entry(low & ADDRESS, number >> directory::TABLE_BITS, directory::SIZE);
    let raw = word(memory, at).ok_or_else(|| loud(Reason::DIRECTORY_UNREADABLE))?;
    quiet |= raw & directory::FAULTS_DISABLED != 0;
    if raw & directory::PRESENT == 0 {
        return Err((Reason::DIRECTORY_ABSENT, quiet));
    }
    if raw & (directory::RESERVED | beyond) != 0 {
        return Err((Reason::DIRECTORY_RESERVED, quiet));
    }

    let at = entry(raw & ADDRESS, number & ones(directory::TABLE_BITS), p::SIZE);
    let words = words::<8>(memory, at).ok_or_else(|| loud(Reason::PASID_UNREADABLE))?;
    quiet |= words.first().is_some_and(|word| word & p::FAULTS_DISABLED != 0);
    target(&words, abilities, stage, pasid.is_some()).map_err(|reason| (reason, quiet)).map(|context| {
        match context {
            Context::Paging { did, paging, .. } => Context::Paging { did, paging, quiet },
            other => other,
        }
    })
}

/// What a PASID entry says.
fn target(words: &[u64; 8], abilities: &Abilities, stage: Stage, has_pasid: bool) -> Result<Context, Reason> {
    let [zero, one, two, three, rest @ ..] = *words;
    let beyond = !ones(abilities.rules.host_bits);
    if zero & p::PRESENT == 0 {
        return Err(Reason::PASID_ABSENT);
    }
    let reserved = zero & p::RESERVED_0 | one & p::RESERVED_1 | two & p::RESERVED_2 | three;
    if reserved != 0 || rest != [0; 4] {
        return Err(Reason::PASID_RESERVED);
    }
    let field = |word: u64, at: u32, bits: u64| u32::try_from(word >> at & bits).unwrap_or(0);
    let (format, root, levels) = match (zero >> p::TYPE & 7, stage) {
        (p::PASS, _) if abilities.pass_through => return Ok(Context::Pass),
        (p::SECOND, Stage::Second) => (Format::Second, zero, field(zero, p::WIDTH, 7).saturating_add(2)),
        (p::FIRST, Stage::First) => (Format::First, two, field(two, p::MODE, 3).saturating_add(4)),
        _ => return Err(Reason::PASID_INVALID),
    };
    if !(3..=abilities.levels).contains(&levels) {
        return Err(Reason::PASID_INVALID);
    }
    if root & beyond != 0 {
        return Err(Reason::PASID_RESERVED);
    }
    let did = u16::try_from(one & p::DOMAIN).unwrap_or(0);
    let paging = Paging { root: Gpa(root & ADDRESS), levels, format, has_pasid };
    Ok(Context::Paging { did, paging, quiet: false })
}

/// An entry: its present bit is in the first word, which a driver writes last, so that the others are read behind it.
fn words<const N: usize>(memory: &dyn TableMemory, at: Option<u64>) -> Option<[u64; N]> {
    let mut words = [0; N];
    for (number, place) in (0..).zip(words.iter_mut()) {
        *place = word(memory, entry(at?, number, WORD))?;
    }
    Some(words)
}
