//! Where firmware puts a VT-d unit's registers, and the table that tells the guest.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::serve::dmar;

/// The register page's place. Firmware chooses it anew at each start of a machine, and a machine that is started in the
/// same way has it at the same place; the table is read by the VMM before.
pub(crate) struct Place {
    path: PathBuf,
    plan: dmar::Plan,
    /// 0: nowhere.
    at: AtomicU64,
    /// What the table says; 0: there is none.
    table: AtomicU64,
}

impl Place {
    /// Writes the table for the registers at `base`; without that it is the one that is there, if it says the same of
    /// all else.
    ///
    /// # Errors
    /// The table cannot be written, or not be removed.
    pub(crate) fn new(path: PathBuf, plan: dmar::Plan, base: Option<u64>) -> io::Result<Self> {
        let table = match base {
            Some(base) => plan.write(&path, base).map(|()| Some(base)),
            None => plan.written(&path),
        };
        let table = table.map_err(|why| io::Error::new(why.kind(), format!("{}: {why}", path.display())))?;
        Ok(Self { path, plan, at: AtomicU64::new(0), table: AtomicU64::new(table.unwrap_or(0)) })
    }

    /// Where the registers are now, if firmware has come so far.
    pub(crate) fn at(&self) -> Option<u64> {
        Some(self.at.load(Ordering::SeqCst)).filter(|at| *at != 0)
    }

    /// What the table says, if there is one.
    pub(crate) fn in_table(&self) -> Option<u64> {
        Some(self.table.load(Ordering::SeqCst)).filter(|at| *at != 0)
    }

    /// The table's file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Firmware has put the registers at `at`. The table says so when [`Place::at`] does.
    pub(super) fn placed(&self, at: u64) {
        if self.at() == Some(at) {
            return;
        }
        match self.in_table() {
            Some(before) if before == at => {}
            before => {
                if let Some(before) = before {
                    // The guest has the old table in its memory.
                    tracing::warn!(
                        "the VT-d registers are at {at:#x}, and the table said {before:#x}: start the machine again"
                    );
                } else {
                    tracing::info!("the VT-d registers are at {at:#x}; {} says so now", self.path.display());
                }
                match self.plan.write(&self.path, at) {
                    Ok(()) => self.table.store(at, Ordering::SeqCst),
                    Err(error) => tracing::error!("{}: {error}", self.path.display()),
                }
            }
        }
        self.at.store(at, Ordering::SeqCst);
    }

    /// The machine has been reset, or has gone.
    pub(super) fn left(&self) {
        self.at.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &Path, base: Option<u64>) -> Place {
        Place::new(path.to_owned(), dmar::Plan { host_bits: 48, ..dmar::Plan::default() }, base).unwrap()
    }

    #[test]
    fn placed_writes_the_table_when_it_says_something_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("dmar.bin");
        let first = place(&path, None);
        assert_eq!((first.at(), first.in_table(), path.exists()), (None, None, false));
        first.placed(0xfebf_c000);
        assert_eq!((first.at(), first.in_table()), (Some(0xfebf_c000), Some(0xfebf_c000)));
        first.left();
        assert_eq!((first.at(), first.in_table()), (None, Some(0xfebf_c000)));
        // A server that is started again finds it.
        let second = place(&path, None);
        assert_eq!((second.at(), second.in_table()), (None, Some(0xfebf_c000)));
        second.placed(0xfebf_8000);
        assert_eq!(place(&path, None).in_table(), Some(0xfebf_8000));
        assert_eq!(place(&path, Some(0x1000)).in_table(), Some(0x1000));
        assert_eq!(place(&path, None).in_table(), Some(0x1000));
    }
}
