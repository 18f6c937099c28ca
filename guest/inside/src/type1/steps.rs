//! Random steps of the record, with the device writing between them.

use std::error::Error;

use viommu::{Access, Completion, IovaRange, Mapping, StepError};
use viommu_vfio::type1::Container;

use super::{
    Place,
    edu::Edu,
    info,
    random::Random,
    say,
    world::{World, mapping, over, pages, plugged},
};

/// Pages of the device's addresses that the steps are about.
const PAGES: u64 = 96;

/// Steps between two looks at what the device has written, and at the kernel's entries.
const BETWEEN: u64 = 160;

enum Step {
    Map(Mapping),
    Replace(Mapping),
    Unmap(IovaRange),
    Batch(IovaRange, Mapping),
    Move(bool),
    Plug(bool),
}

impl Step {
    fn random(random: &mut Random) -> Result<Step, Box<dyn Error>> {
        let first = random.below(PAGES);
        let last = first + random.of(&[0, 0, 0, 1, 3, 7, 20]);
        // The border of two regions, memory that comes and goes, and none at all are among them.
        let target = random.of(&[random.0 % 200, random.0 % 200, 250, 255, 4100, 8000]) + random.below(6);
        let access = random.of(&[Access::RW, Access::RW, Access::RW, Access::READ, Access::WRITE]);
        let new = mapping(first, last, target, access)?;
        Ok(match random.below(64) {
            0 => Step::Move(random.one_in(6)),
            1 => Step::Plug(random.one_in(2)),
            2 => Step::Unmap(pages(0, PAGES + 32)?),
            3..10 => Step::Batch(pages(first, last + random.below(8))?, new),
            10..24 => Step::Replace(new),
            24..44 => Step::Unmap(pages(first, last)?),
            _ => Step::Map(new),
        })
    }

    /// Whether it can make a difference for an access to `page`.
    fn concerns(&self, page: u64) -> bool {
        let at = viommu::Iova(World::target(page));
        match self {
            Step::Map(new) => new.range.contains(at),
            // It may cut a mapping that lies over the page, which is unmapped for a moment then.
            Step::Replace(_) | Step::Batch(..) | Step::Move(_) | Step::Plug(_) => true,
            Step::Unmap(range) => range.contains(at),
        }
    }
}

/// Makes `steps` steps.
///
/// # Errors
///
/// If the device writes to where the record does not say, or the kernel has something else than the record.
pub(super) fn run(place: Place<'_>, steps: u64, seed: u64) -> Result<(), Box<dyn Error>> {
    let device = place.open()?;
    let container = Container::open(device.container()?)?;
    let limit = container.info().entries;
    let world = World::new(container)?;
    let edu = Edu::start(&device)?;
    world.load(edu)?;
    let mut random = Random(seed);
    let (mut done, mut refused, mut probes, mut written) = (0, 0, 0, 0);
    // A page that the device writes to meanwhile, and where that must arrive.
    let mut under_way: Option<(u64, Option<u64>)> = None;
    let settle = |under_way: &mut Option<(u64, Option<u64>)>, done| -> Result<u64, Box<dyn Error>> {
        let Some((page, expected)) = under_way.take() else { return Ok(0) };
        edu.wait()?;
        world.compare(expected, page, &format!("before step {done} of seed {seed}"))?;
        Ok(u64::from(expected.is_some()))
    };
    while done < steps {
        if done % BETWEEN == 0 && under_way.is_none() {
            world.audit(info(&device)?.entries, limit)?;
            let page = random.below(PAGES);
            under_way = Some((page, world.expected(page)?));
            edu.begin_store(World::target(page))?;
            probes += 1;
        }
        let step = Step::random(&mut random)?;
        // While the device is at it, nothing happens to its page.
        if under_way.is_some_and(|(page, _)| step.concerns(page)) {
            if done % BETWEEN < BETWEEN / 2 {
                continue; // another step, then
            }
            written += settle(&mut under_way, done)?;
        }
        if !apply(&world, &step)? {
            refused += 1;
        }
        done += 1;
        if done % BETWEEN == 0 {
            written += settle(&mut under_way, done)?;
        }
    }
    settle(&mut under_way, done)?;
    if !world.endpoint.attached().is_some_and(|view| view == viommu::View::Domain(1)) {
        over(world.endpoint.attach(1)?)?;
    }
    world.audit(info(&device)?.entries, limit)?;
    over(world.domain.unmap(IovaRange::ALL)?)?;
    if info(&device)?.entries != limit || !world.record().is_empty() {
        return Err(format!("at the end, {:?} entries of {limit:?} are left", info(&device)?.entries).into());
    }
    say(
        "steps",
        &format!(
            "{steps}, {refused} refused; the device wrote {probes} times, {written} of them to what was mapped"
        ),
    );
    Ok(())
}

/// Makes a step; whether it was not refused.
fn apply(world: &World, step: &Step) -> Result<bool, Box<dyn Error>> {
    let settled = |outcome: Result<Completion, StepError>| match outcome {
        Ok(done) => over(done).map(|()| true),
        Err(error) => over(error.completion).map(|()| false),
    };
    match step {
        Step::Map(new) => settled(world.domain.map(*new)),
        Step::Replace(new) => settled(world.domain.replace(*new)),
        Step::Unmap(range) => settled(world.domain.unmap(*range)),
        Step::Batch(range, new) => settled(world.domain.batch().unmap(*range).map(*new).commit()),
        Step::Move(away) => {
            over(if *away { world.endpoint.block()? } else { world.endpoint.attach(1)? })?;
            Ok(true)
        }
        Step::Plug(true) => settled(world.iommu.add_backing(plugged()?)),
        Step::Plug(false) => settled(world.iommu.remove_backing(plugged()?.range)),
    }
}
