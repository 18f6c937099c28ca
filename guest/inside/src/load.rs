//! Load on a disk by several threads, each with a part of its own, that knows at all times what must be there.

use std::{
    collections::{HashMap, HashSet},
    error::Error,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use viommu_guest_inside::pattern::{BLOCK, Pattern, SECTOR};

/// Writes between two flushes.
const FLUSH: u64 = 64;

/// What all threads have done.
#[derive(Default)]
struct Totals {
    writes: AtomicU64,
    reads: AtomicU64,
    flushes: AtomicU64,
    /// Requests that the disk refused.
    errors: AtomicU64,
}

/// A block with the alignment that direct access asks for.
#[repr(align(4096))]
struct Block([u8; BLOCK]);

/// The lines for the host begin with `name`. Writes and reads back until each thread has done its writes or time is up (a zero is no limit). Thread `t` has the
/// seed `seed + t` and the blocks from `t * blocks` on.
///
/// A refused request is counted and leaves the block's old or new content; content that is neither is an error.
///
/// # Errors
///
/// If a word is no number, the disk cannot be opened, or something else is read than was written.
pub(crate) fn run(name: &str, disk: &str, numbers: [&str; 5]) -> Result<(), Box<dyn Error>> {
    let mut parsed = [0; 5];
    for (number, text) in parsed.iter_mut().zip(numbers) {
        *number = text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"))?;
    }
    let [seed, threads, blocks, writes, seconds] = parsed;
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(disk)?;
    let totals = Totals::default();
    let until = (seconds > 0).then(|| Instant::now() + Duration::from_secs(seconds));
    let result = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let (file, totals) = (&file, &totals);
                scope.spawn(move || {
                    let pattern = Pattern::new(seed + thread, blocks);
                    let mut worker =
                        Worker { name, thread, file, pattern, last: HashMap::new(), torn: HashSet::new() };
                    worker.run(writes, until, totals)
                })
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| "a thread panicked".to_owned())?)
    });
    let count = |total: &AtomicU64| total.load(Ordering::Relaxed);
    println!(
        "@@LOAD {name} writes {} reads {} flushes {} errors {}",
        count(&totals.writes),
        count(&totals.reads),
        count(&totals.flushes),
        count(&totals.errors)
    );
    Ok(result?)
}

/// One thread's part of the disk.
struct Worker<'a> {
    name: &'a str,
    thread: u64,
    file: &'a File,
    pattern: Pattern,
    /// The last write to each block that the disk took.
    last: HashMap<u64, u64>,
    /// Writes that the disk refused, and may have done all the same.
    torn: HashSet<u64>,
}

impl Worker<'_> {
    fn run(&mut self, writes: u64, until: Option<Instant>, totals: &Totals) -> Result<(), String> {
        let mut block = Box::new(Block([0; BLOCK]));
        let mut write = 0;
        let mut told = Instant::now();
        while (writes == 0 || write < writes) && until.is_none_or(|until| Instant::now() < until) {
            write += 1;
            let number = self.pattern.block_of(write);
            self.pattern.fill(&mut block.0, write);
            match self.file.write_all_at(&block.0, self.place(number)) {
                Ok(()) => {
                    self.last.insert(number, write);
                    totals.writes.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    self.refused(&error, totals)?;
                    self.torn.insert(write);
                }
            }
            // Of what was written some time ago, most is no longer in any cache; the very last must be right too.
            for number in [number, self.pattern.block_of(1 + write / 2)] {
                self.check(number, &mut block, totals)?;
            }
            if write % FLUSH == 0 && self.flush(totals)? && told.elapsed() > Duration::from_millis(50) {
                // The host looks for the last of these lines.
                self.tell(write);
                told = Instant::now();
            }
        }
        // However few there were in the time, the host can look at them.
        if self.flush(totals)? {
            self.tell(write);
        }
        Ok(())
    }

    /// Whether the disk did it.
    fn flush(&self, totals: &Totals) -> Result<bool, String> {
        match self.file.sync_data() {
            Ok(()) => {
                totals.flushes.fetch_add(1, Ordering::Relaxed);
                Ok(true)
            }
            Err(error) => self.refused(&error, totals).map(|()| false),
        }
    }

    fn tell(&self, write: u64) {
        println!("@@FLUSHED {} {} {write}", self.name, self.thread);
    }

    fn check(&self, number: u64, block: &mut Block, totals: &Totals) -> Result<(), String> {
        // What a read leaves undone must not pass for what was there before.
        block.0.fill(0xff);
        if let Err(error) = self.file.read_exact_at(&mut block.0, self.place(number)) {
            return self.refused(&error, totals);
        }
        totals.reads.fetch_add(1, Ordering::Relaxed);
        let last = self.last.get(&number).copied().unwrap_or(0);
        for (index, sector) in block.0.chunks_exact(SECTOR).enumerate() {
            let found = self.pattern.write_of(number, index, sector);
            let right =
                found == Some(last) || found.is_some_and(|write| write > last && self.torn.contains(&write));
            // A disk that was written to in an earlier run has that run's writes.
            if !right && last != 0 {
                let what = format!(
                    "{} thread {} block {number} sector {index}: expected write {last}, found {found:?}",
                    self.name, self.thread
                );
                // At once: other threads may never end.
                println!("@@FAIL {what}");
                return Err(what);
            }
        }
        Ok(())
    }

    fn place(&self, number: u64) -> u64 {
        (self.thread * self.pattern.blocks() + number) * BLOCK as u64
    }

    /// Counts a request that the disk refused; what else goes wrong is an error.
    fn refused(&self, error: &io::Error, totals: &Totals) -> Result<(), String> {
        totals.errors.fetch_add(1, Ordering::Relaxed);
        match error.raw_os_error() {
            Some(libc::EIO | libc::ENOMEM | libc::ENOSPC | libc::EAGAIN) => Ok(()),
            _ => Err(error.to_string()),
        }
    }
}
