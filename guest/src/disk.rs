//! What is on a disk after a guest has written to it, looked at from the host.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail, ensure};
use viommu_guest_inside::pattern::{BLOCK, Pattern, SECTOR};

/// The part of a disk that one thread of the load has written to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) thread: u64,
    pub(crate) pattern: Pattern,
    /// The last write that is safe: it was flushed after.
    pub(crate) flushed: u64,
}

/// The last write that is safe of each disk and thread, by what the load has said after its flushes: "disk thread write".
///
/// # Errors
///
/// If a line is none of these.
pub(crate) fn flushed(lines: &[String]) -> anyhow::Result<BTreeMap<(u64, u64), u64>> {
    let mut flushed = BTreeMap::new();
    for line in lines {
        let words: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [disk, thread, write] = words[..] else { bail!("{line:?}") };
        flushed.insert((disk, thread), write);
    }
    Ok(flushed)
}

/// Checks that each block holds the last write to it that was flushed, or a later one; how many blocks were written.
///
/// # Errors
///
/// If one holds anything else, or the image cannot be read.
pub(crate) fn check(image: &Path, part: Part) -> anyhow::Result<u64> {
    let bytes = fs::read(image).with_context(|| image.display().to_string())?;
    let Part { thread, pattern, flushed } = part;
    let mut last = HashMap::new();
    for write in 1..=flushed {
        last.insert(pattern.block_of(write), write);
    }
    let start = usize::try_from(thread * pattern.blocks())? * BLOCK;
    let blocks = bytes.get(start..).context("the image is too short")?.chunks_exact(BLOCK);
    let mut written = 0;
    for (number, block) in (0..pattern.blocks()).zip(blocks) {
        let safe = last.get(&number).copied().unwrap_or(0);
        let mut newest = 0;
        for (index, sector) in block.chunks_exact(SECTOR).enumerate() {
            match pattern.write_of(number, index, sector) {
                Some(write) if write >= safe => newest = newest.max(write),
                Some(write) => bail!(
                    "{}: thread {thread} block {number} sector {index}: expected write {safe} or later, seen {write}",
                    image.display()
                ),
                None => bail!(
                    "{}: thread {thread} block {number} sector {index}: expected write {safe} or later, seen other bytes",
                    image.display()
                ),
            }
        }
        written += u64::from(newest > 0);
    }
    Ok(written)
}

/// The MD5 sum of a file, as the guest reckons it too.
///
/// # Errors
///
/// If it cannot be read.
pub(crate) fn md5(path: &Path) -> anyhow::Result<String> {
    let output = Command::new("md5sum").stdin(fs::File::open(path)?).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "md5sum: {}", output.status);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushed_when_a_line_comes_twice_has_the_last_of_each_thread() {
        let lines = ["0 1 64", "1 1 64", "0 1 128", "0 1 128"].map(str::to_owned);
        assert_eq!(flushed(&lines).expect("lines"), BTreeMap::from([((0, 1), 128), ((1, 1), 64)]));
        flushed(&["0 1".to_owned()]).expect_err("a word less");
    }

    #[test]
    fn check_takes_later_writes_and_refuses_earlier_and_torn_sectors() {
        let pattern = Pattern::new(3, 4);
        let folder = tempfile::tempdir().expect("a folder");
        let image = folder.path().join("image");
        // Thread 1's part comes after thread 0's, which is empty.
        let mut bytes = vec![0; 8 * BLOCK];
        let place = |write| usize::try_from(4 + pattern.block_of(write)).expect("small") * BLOCK;
        for write in 1..=20 {
            pattern.fill(&mut bytes[place(write)..][..BLOCK], write);
        }
        let part = |flushed| Part { thread: 1, pattern, flushed };
        fs::write(&image, &bytes).expect("to be written");
        assert_eq!(check(&image, part(20)).expect("all there"), 4);
        assert_eq!(check(&image, part(10)).expect("later ones are there"), 4);
        assert!(check(&image, part(200)).is_err(), "what was flushed is not there");
        bytes[place(20) + 3 * SECTOR + 9] ^= 1;
        fs::write(&image, &bytes).expect("to be written");
        assert!(check(&image, part(20)).is_err(), "a torn sector");
    }
}
