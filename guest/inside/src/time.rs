//! How long a disk takes for its requests, one at a time.

use std::{
    error::Error,
    fs::OpenOptions,
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    time::Instant,
};

/// Requests before those that are timed, each way.
const FIRST: u64 = 32;

/// The most bytes of a request.
const MOST: usize = 1 << 16;

/// What direct access asks for.
#[repr(align(4096))]
struct Buffer([u8; MOST]);

/// Reads and then writes `count` times `bytes` past the guest's page cache, and prints the nanoseconds of all of each.
///
/// # Errors
///
/// If a word is no number that fits, or the disk refuses a request.
pub(crate) fn run(disk: &str, bytes: &str, count: &str) -> Result<(), Box<dyn Error>> {
    let (bytes, count) = (bytes.parse::<usize>()?, count.parse::<u64>()?);
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let size = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    let places = size.checked_div(bytes as u64).filter(|places| *places > 0).ok_or("no room on the disk")?;
    let mut buffer = Box::new(Buffer([0x5a; MOST]));
    let buffer = buffer.0.get_mut(..bytes).ok_or("too many bytes")?;

    // A step with no factor in common with a power of two comes to all places, none beside the one before.
    let place = |number: u64| number.wrapping_mul(1237) % places * bytes as u64;
    timed("read", bytes, count, |number| file.read_exact_at(buffer, place(number)))?;
    timed("write", bytes, count, |number| file.write_all_at(buffer, place(number)))
}

fn timed(
    way: &str,
    bytes: usize,
    count: u64,
    mut request: impl FnMut(u64) -> io::Result<()>,
) -> Result<(), Box<dyn Error>> {
    (0..FIRST).try_for_each(&mut request)?;
    let begun = Instant::now();
    (FIRST..FIRST + count).try_for_each(&mut request)?;
    let nanos = begun.elapsed().as_nanos();
    println!("@@TIMED {way} {bytes} {} {count} {nanos}", FIRST + count);
    Ok(())
}
