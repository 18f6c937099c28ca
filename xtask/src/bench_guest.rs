//! `cargo xtask bench-guest`: what a guest's disk takes behind viommu as it is shipped, beside QEMU's own devices.

use std::{num::NonZeroU32, path::PathBuf};

use anyhow::{Context as _, bail};

use crate::{context::Context, guest, run::run_quietly};

/// Options of `cargo xtask bench-guest`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// This kernel instead of the newest, by the first numbers of its release.
    #[arg(long, value_name = "RELEASE")]
    kernel: Option<String>,
    /// Boots of each set-up, one after the other in rounds.
    #[arg(long, value_name = "N", default_value = "7")]
    runs: NonZeroU32,
    /// Write all figures to a file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Builds what is measured, with optimisation, and measures it.
///
/// # Errors
///
/// If something does not build or cannot be had, or a guest fails; a goal that is missed is no error.
pub(crate) fn run(options: &Options, context: &Context) -> anyhow::Result<()> {
    eprintln!("building viommu: link-time optimisation takes a while");
    run_quietly(context, context.cargo(&["build", "--release", "-p", "viommu-cli", "--bin", "viommu"]))?;
    let mut command = guest::program(context, &context.target("release").join("viommu"))?;
    command.args(["--bench", &options.runs.to_string()]);
    if let Some(kernel) = &options.kernel {
        command.args(["--kernel", kernel]);
    }
    if let Some(json) = &options.json {
        command.arg("--json").arg(std::path::absolute(json)?);
    }
    let status = command.status().context("the measurement does not start")?;
    if !status.success() {
        bail!("the measurement: {status}");
    }
    Ok(())
}
