//! Any bytes, read as steps: after each, the record, every copy of it and every answer to a device are held against a
//! naive reference. For fuzzing and property tests alone; nothing here is stable.

pub mod recording;
pub mod reference;
mod world;

use core::mem::ManuallyDrop;

use world::World;

/// Bytes a step.
const STEP: usize = 6;

/// Plays the bytes. Any input is legal.
///
/// # Panics
/// When a law is broken.
pub fn fuzz_steps(data: &[u8]) {
    let Some((header, steps)) = data.split_first() else { return };
    // Left where it is when a law is broken: a unit that panicked inside a step cannot be taken apart.
    let mut world = ManuallyDrop::new(World::new(*header));
    for step in steps.chunks_exact(STEP).take(256) {
        if let Ok(step) = step.try_into() {
            world.step(step);
            world.check();
        }
    }
    ManuallyDrop::into_inner(world).finish();
}
