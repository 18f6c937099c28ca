//! `cargo xtask bench`: builds the benchmark as it is shipped and runs it.

use anyhow::{Context as _, bail};

use crate::context::Context;

/// What is passed on to the benchmark.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Print a list of objects instead of a table.
    #[arg(long)]
    json: bool,
    /// Fewer rounds and smaller tables: under a minute, for a look.
    #[arg(long)]
    quick: bool,
    /// Only these goals: G1,G7. `none` is what is reported without a goal.
    #[arg(long, value_name = "GOALS")]
    only: Option<String>,
}

/// Runs the benchmark with this program's own outputs, so that `--json` prints nothing else on standard output.
///
/// # Errors
///
/// If it does not build, or a measurement fails; a goal that is missed is no error.
pub(crate) fn run(options: &Options, context: &Context) -> anyhow::Result<()> {
    let mut command = context.cargo(&["run", "--quiet", "--release", "-p", "viommu-bench", "--"]);
    if options.json {
        command.arg("--json");
    }
    if options.quick {
        command.arg("--quick");
    }
    if let Some(goals) = &options.only {
        command.args(["--only", goals]);
    }
    eprintln!("building the benchmark: link-time optimisation takes a while");
    let status = command.status().context("cargo does not start")?;
    if !status.success() {
        bail!("the benchmark: {status}");
    }
    Ok(())
}
