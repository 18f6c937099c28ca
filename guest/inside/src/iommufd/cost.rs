//! What an attach costs, by how much is mapped: as a switch, and where all must be unmapped and mapped.

use std::{error::Error, time::Instant};

use super::{
    iommufd, say,
    world::{BASE, World},
};
use crate::type1::world::{over, pages, rw};

/// Attaches of which the quickest counts.
const ROUNDS: usize = 5;

pub(super) fn run() -> Result<(), Box<dyn Error>> {
    let mut words = Vec::new();
    let mut switches = Vec::new();
    for count in [1, 1000, 65_000] {
        let (iommufd, mock) = iommufd()?;
        let (first, _) = mock.device(true)?;
        let (second, _) = mock.device(true)?;
        let world = World::plain(iommufd, vec![Box::new(first), Box::new(second)])?;
        for at in 0..count {
            let page = BASE + 2 * at;
            over(world.domains[0].map(rw(page, page, at % 256)?)?)?;
        }
        // The other device stays: this one is switched.
        let mut switched = Vec::new();
        for _ in 0..ROUNDS {
            over(world.endpoints[1].block()?)?;
            let begun = Instant::now();
            over(world.endpoints[1].attach(1)?)?;
            switched.push(begun.elapsed());
        }
        let switched = switched.into_iter().min().ok_or("no rounds")?;
        // Nobody else is there: all is unmapped when it leaves, and mapped when it comes.
        over(world.endpoints[0].block()?)?;
        let begun = Instant::now();
        over(world.endpoints[1].block()?)?;
        over(world.endpoints[1].attach(1)?)?;
        let anew = begun.elapsed();
        if world.handle.entries() != count {
            return Err(format!("{} mappings of {count}", world.handle.entries()).into());
        }
        over(world.domains[0].unmap(pages(0, 1 << 30)?)?)?;
        world.unhurt()?;
        world.end()?;
        words.push(format!("{count} mappings {switched:.0?}, anew {anew:.1?}"));
        switches.push(switched);
    }
    // Independent of what is mapped, as far as one can tell on a machine that is emulated.
    if switches[2] > switches[0] * 20 {
        return Err(format!("an attach costs more where more is mapped: {}", words.join("; ")).into());
    }
    say("cost", &format!("an attach: {}", words.join("; ")));
    Ok(())
}
