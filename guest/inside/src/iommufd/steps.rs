//! Random steps and moves, and what the kernel says of each page after them.

use std::{
    error::Error,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use viommu::{Access, Completion, IovaRange, StepError};
use viommu_vfio::iommufd::Device;

use super::{
    iommufd,
    mock::Mock,
    say,
    world::{BASE, World},
};
use crate::type1::{
    random::Random,
    world::{mapping, memory, over, pages, plugged},
};

/// Pages of the devices' addresses that the steps are about.
const PAGES: u64 = 64;

/// Steps between two looks at every page.
const BETWEEN: u64 = 16;

/// Makes `steps` steps.
///
/// # Errors
///
/// If the kernel maps a page otherwise than the record says.
pub(super) fn run(steps: u64, seed: u64) -> Result<(), Box<dyn Error>> {
    let (iommufd, mock) = iommufd()?;
    let made = [mock.device(true)?, mock.device(true)?];
    let tables = made.each_ref().map(|(_, table)| table.clone());
    let devices: Vec<Box<dyn Device>> =
        made.into_iter().map(|(device, _)| Box::new(device) as Box<dyn Device>).collect();
    let world = World::new(iommufd, devices, memory()?)?;
    let mut before = Vec::new();
    let mut random = Random(seed);
    let (mut refused, mut looks, mut mapped) = (0, 0, 0);
    for done in 0..steps {
        if !step(&world, &mut random)? {
            refused += 1;
        }
        if done % BETWEEN == 0 {
            mapped += look(&world, &mock, &tables, &mut before)
                .map_err(|error| format!("step {done} of seed {seed}: {error}"))?;
            looks += 1;
        }
    }
    world.unhurt()?;
    for endpoint in &world.endpoints {
        over(endpoint.block()?)?;
    }
    if world.handle.spaces() != 0 || world.handle.entries() != 0 {
        return Err(format!("with all devices blocked, something is left: {:?}", world.handle).into());
    }
    say(
        "steps",
        &format!("{steps}, {refused} refused; {looks} looks at every page, {mapped} of them mapped"),
    );
    Ok(())
}

/// Makes a step; whether it was not refused.
fn step(world: &World, random: &mut Random) -> Result<bool, Box<dyn Error>> {
    let settled = |outcome: Result<Completion, StepError>| match outcome {
        Ok(done) => over(done).map(|()| true),
        Err(error) => over(error.completion).map(|()| false),
    };
    let domain = &world.domains[usize::from(random.one_in(4))];
    let first = BASE + random.below(PAGES);
    let last = first + random.of(&[0, 0, 0, 1, 3, 7, 20]);
    // The border of two regions, memory that comes and goes, and none at all are among them.
    let target = random.of(&[random.0 % 200, random.0 % 200, 250, 255, 4100, 8000]) + random.below(6);
    let access = random.of(&[Access::RW, Access::RW, Access::RW, Access::READ, Access::WRITE]);
    let new = mapping(first, last, target, access)?;
    match random.below(64) {
        0..3 => {
            let endpoint = &world.endpoints[usize::from(random.one_in(2))];
            over(match random.below(5) {
                0 => endpoint.block()?,
                1 => endpoint.attach_identity()?,
                2 => endpoint.attach(2)?,
                _ => endpoint.attach(1)?,
            })?;
            Ok(true)
        }
        3 => settled(match random.one_in(2) {
            true => world.iommu.add_backing(plugged()?),
            false => world.iommu.remove_backing(plugged()?.range),
        }),
        4 => settled(domain.unmap(IovaRange::ALL)),
        5..12 => settled(domain.batch().unmap(pages(first, last + random.below(8))?).map(new).commit()),
        12..26 => settled(domain.replace(new)),
        26..44 => settled(domain.unmap(pages(first, last)?)),
        _ => settled(domain.map(new)),
    }
}

/// Compares each page, for each device; how many are mapped. `before` is what was mapped at earlier looks.
fn look(
    world: &World,
    mock: &Mock,
    tables: &[Arc<AtomicU32>; 2],
    before: &mut Vec<(u64, u64)>,
) -> Result<u64, Box<dyn Error>> {
    let mut mapped = 0;
    for (endpoint, table) in world.endpoints.iter().zip(tables) {
        let hwpt = table.load(Ordering::Relaxed);
        let window = pages(BASE, BASE + PAGES + 32)?;
        let expected = world.expected(endpoint, window);
        if hwpt == 0 {
            if !expected.is_empty() {
                return Err("a device is nowhere that should reach something".into());
            }
            continue;
        }
        for (iova, address) in &expected {
            if !mock.maps(hwpt, *iova, 4096, *address)? {
                return Err(format!("{iova:#x} is not mapped as the record says").into());
            }
        }
        mapped += expected.len() as u64;
        // What it reached at an earlier look, and should no more, it does not.
        for (iova, address) in before.iter() {
            if !expected.contains(&(*iova, *address)) && mock.maps(hwpt, *iova, 4096, *address)? {
                return Err(format!("{iova:#x} is still mapped, and the record has nothing like that").into());
            }
        }
        before.extend(expected);
        if before.len() > 400 {
            *before = before.split_off(200);
        }
    }
    Ok(mapped)
}
