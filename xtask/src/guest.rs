//! `cargo xtask guest`: live tests with real guests, in the package `guest`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};

use crate::{context::Context, run::run_quietly, stage::Outcome};

/// Where guests and host agree, and the only place that the packages are for.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The variable that leaves the live tests out of `cargo xtask test`.
const SKIP: &str = "VIOMMU_SKIP_GUEST";

/// The one that leaves out the building of a kernel, and the cases that need it.
const SKIP_KERNEL: &str = "VIOMMU_SKIP_GUEST_KERNEL";

/// How the tests' program ends where what a kernel is built with cannot be had.
const NOT_HERE: i32 = 3;

/// Options of `cargo xtask guest`.
#[derive(clap::Args, Debug, Default)]
pub(crate) struct Options {
    /// Only this kernel, by the first numbers of its release; may be given several times.
    #[arg(long, value_name = "RELEASE")]
    kernel: Vec<String>,
    /// Only this case; may be given several times.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// So many cases of the comparison with QEMU's VT-d.
    #[arg(long, value_name = "NUMBER")]
    cases: Option<u64>,
    /// The seed of its first case; those of the next follow.
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// List the cases and run none.
    #[arg(long)]
    list: bool,
    /// Longer runs under load, and cases that are left out otherwise.
    #[arg(long)]
    full: bool,
    /// Keep the files of cases that pass.
    #[arg(long)]
    keep: bool,
}

/// Builds what is tested, what tests it and what runs in the guests, and runs the cases.
///
/// # Errors
///
/// If something does not build, cannot be had, or a case fails.
pub(crate) fn run(options: &Options, context: &Context) -> anyhow::Result<()> {
    let mut command = program(context, &built(context, "viommu-cli", "viommu")?)?;
    for (option, values) in [("--kernel", &options.kernel), ("--case", &options.case)] {
        values.iter().for_each(|value| {
            command.args([option, value]);
        });
    }
    for (option, value) in [("--cases", options.cases), ("--seed", options.seed)] {
        value.iter().for_each(|value| {
            command.arg(option).arg(value.to_string());
        });
    }
    for (option, on) in [("--list", options.list), ("--full", options.full), ("--keep", options.keep)] {
        command.args([option].iter().filter(|_| on));
    }
    let status = command.status().context("the live tests do not start")?;
    if !status.success() {
        bail!("the live tests: {status}");
    }
    Ok(())
}

/// Builds the kernel that Debian does not ship, unless it is there.
///
/// # Errors
///
/// If something does not build, or cannot be had.
pub(crate) fn kernel(context: &Context) -> anyhow::Result<()> {
    if !kernel_if_possible(context)? {
        bail!("what the kernel is built with, or from, cannot be had here");
    }
    Ok(())
}

/// The same; whether all that it is built with could be had.
fn kernel_if_possible(context: &Context) -> anyhow::Result<bool> {
    let mut command = program(context, &context.target("debug").join("viommu"))?;
    command.arg("--build-kernel");
    let status = command.status().context("the live tests do not start")?;
    match status.code() {
        Some(0) => Ok(true),
        Some(NOT_HERE) => Ok(false),
        _ => bail!("the kernel: {status}"),
    }
}

/// The stage of `cargo xtask test`. The kernel is built here, where nothing else needs the processors.
///
/// # Errors
///
/// As [`run`]; with `--full`, also if the kernel cannot be had.
pub(crate) fn stage(context: &Context) -> anyhow::Result<Outcome> {
    let is_set = |name: &str| env::var_os(name).is_some_and(|value| value == "1");
    if is_set(SKIP) {
        return Ok(Outcome::Skipped(format!("{SKIP}=1: NO GUEST HAS RUN")));
    }
    let note = if context.full {
        kernel(context)?;
        String::new()
    } else if is_set(SKIP_KERNEL) {
        format!("{SKIP_KERNEL}=1: what needs a kernel built here HAS NOT RUN, unless one was there")
    } else if kernel_if_possible(context)? {
        String::new()
    } else {
        println!("SKIPPED: no kernel can be built here, and the cases that need it do not run");
        "SKIPPED those on a kernel built here: it cannot be had".to_owned()
    };
    run(&Options { full: context.full, ..Options::default() }, context)?;
    Ok(Outcome::Passed(note))
}

/// Builds what tests and what runs in the guests; the tests' command, with all that it must be told.
///
/// # Errors
///
/// If something does not build.
pub(crate) fn program(context: &Context, viommu: &Path) -> anyhow::Result<Command> {
    let folder = context.target("guest");
    let program = built(context, "viommu-guest", "viommu-guest")?;

    let mut inside = context.cargo(&["build", "--release", "-p", "viommu-guest-inside", "--target", TARGET]);
    inside.arg("--target-dir").arg(folder.join("inside"));
    inside.env("RUSTFLAGS", "-C target-feature=+crt-static");
    run_quietly(context, inside)?;

    let examples = ["-p", "viommu-vhost", "-p", "viommu-vfio-user"];
    run_quietly(context, context.cargo(&[&["build", "--examples"], &examples[..]].concat()))?;

    let mut command = context.command(&program.display().to_string());
    for (option, example) in [
        ("--vhost-user-blk", "vhost_user_blk"),
        ("--vhost-user-net-front", "vhost_user_net_front"),
        ("--rust-vmm-device", "rust_vmm_device"),
    ] {
        command.arg(option).arg(context.target("debug").join("examples").join(example));
    }
    command.arg("--folder").arg(&folder).arg("--viommu").arg(viommu);
    command.arg("--inside").arg(folder.join("inside").join(TARGET).join("release/viommu-guest-inside"));
    Ok(command)
}

/// Builds a program of the workspace, assertions on; where it is.
fn built(context: &Context, package: &str, program: &str) -> anyhow::Result<PathBuf> {
    run_quietly(context, context.cargo(&["build", "-p", package, "--bin", program]))?;
    Ok(context.target("debug").join(program))
}
