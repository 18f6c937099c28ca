//! The cases: each a function here and a script in the guest.

mod own;

use crate::lab::Run;

/// A case.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// What it shows, in half a line.
    pub(crate) about: &'static str,
    /// Runs it; a note for the reader.
    pub(crate) run: fn(&Run<'_>) -> anyhow::Result<String>,
}

/// All cases, those that take long first.
pub(crate) const CASES: &[Case] = &[Case {
    name: "own",
    about: "these tests themselves: the same guest with QEMU's own virtio-iommu",
    run: own::run,
}];

/// What the guests run, by name.
pub(crate) const SCRIPTS: [(&str, &str); 2] =
    [("io", include_str!("io.sh")), ("probe", include_str!("probe.sh"))];
