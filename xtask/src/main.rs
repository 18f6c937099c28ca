//! The chores of the project: `cargo xtask test` and its stages, benchmarks, and fuzzing.
#![forbid(unsafe_code)]

mod bench;
mod bench_guest;
mod context;
mod deny;
mod fuzz;
mod guest;
mod house;
mod run;
mod stage;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::context::Context;

/// The chores of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Options {
    /// Also print what cargo compiles and each test that passes.
    #[arg(long, short, global = true)]
    verbose: bool,
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Runs every check and test, in stages.
    Test(stage::Options),
    /// Runs the loom models, all or those whose name contains FILTER.
    Loom {
        /// Part of a test's name.
        filter: Option<String>,
    },
    /// Runs the shuttle schedules, all or those whose name contains FILTER.
    Shuttle {
        /// Part of a test's name.
        filter: Option<String>,
    },
    /// Measures the goals for speed and size beside other structures.
    Bench(bench::Options),
    /// Runs real guests behind viommu: the live tests.
    Guest(guest::Options),
    /// Builds a guest kernel that Debian does not ship, with iommufd and vDPA's simulators: some minutes.
    GuestKernel,
    /// Measures what a guest's disk takes behind viommu, beside QEMU's own devices.
    BenchGuest(bench_guest::Options),
    /// Fuzzes one target with libFuzzer, or lists the targets.
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let options = Options::parse();
    match chore(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is well; the chore has said itself what is not.
fn chore(options: &Options) -> anyhow::Result<bool> {
    let mut context = Context::load(options.verbose)?;
    if let Chore::Test(options) = &options.chore {
        context.full = options.full;
    }
    match &options.chore {
        Chore::Test(options) => stage::run(&test::STAGES, options, &context),
        Chore::Loom { filter } => test::loom(&context, filter.as_deref()).map(|_| true),
        Chore::Shuttle { filter } => test::shuttle(&context, filter.as_deref()).map(|_| true),
        Chore::Bench(options) => bench::run(options, &context).map(|()| true),
        Chore::Guest(options) => guest::run(options, &context).map(|()| true),
        Chore::GuestKernel => guest::kernel(&context).map(|()| true),
        Chore::BenchGuest(options) => bench_guest::run(options, &context).map(|()| true),
        Chore::Fuzz(options) => fuzz::run(options, &context).map(|()| true),
    }
}
