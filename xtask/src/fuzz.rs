//! libFuzzer, with the compiler that is there: the instrumentation is LLVM's, which every rustc carries. No address
//! sanitizer (that needs a nightly): the crates under test have no unsafe code.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, bail};
use clap::Args;

use crate::{
    context::{self, Context},
    run::{run as run_filtered, run_quietly},
    stage::Outcome,
};

/// The manifest of the targets, from the workspace's folder: a workspace of its own, for its flags are its own.
pub(crate) const MANIFEST: &str = "fuzz/Cargo.toml";

/// Runs of each target in the smoke test.
const SMOKE_RUNS: u64 = 20_000;

/// And no longer than so, where a target is slow.
const SMOKE_SECONDS: u64 = 30;

/// Targets that run at a time: one a processor of a small machine.
const AT_A_TIME: usize = 2;

/// The seed of the smoke test: what fails there fails again, and is due to the change at hand.
const SMOKE_SEED: u32 = 1;

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub(crate) struct Options {
    /// The target; without it, the targets are listed.
    target: Option<String>,
    /// End after so many runs.
    #[arg(long, value_name = "N")]
    runs: Option<u64>,
    /// End after so many seconds.
    #[arg(long, value_name = "S")]
    seconds: Option<u64>,
    /// Run only this input, a failure that was found before, say.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["runs", "seconds"])]
    input: Option<PathBuf>,
    /// Further arguments of libFuzzer, after `--`.
    #[arg(last = true)]
    more: Vec<String>,
}

/// Fuzzes until something fails, or the options end it.
///
/// # Errors
///
/// If there is no such target, it does not build, or an input fails.
pub(crate) fn run(options: &Options, context: &Context) -> anyhow::Result<()> {
    let targets = targets(context)?;
    let Some(target) = &options.target else {
        targets.iter().for_each(|target| println!("{target}"));
        return Ok(());
    };
    if !targets.contains(target) {
        bail!("there is no target {target}; there are {}", targets.join(", "));
    }
    if !has_compiler(context) {
        bail!("libFuzzer is C++ and is built here: a C++ compiler is needed, c++ or what CXX names");
    }
    let program = build(context)?.join(target);

    let folder = context.target("fuzz").join("found").join(target);
    let mut command = fuzzer(context, &program, target, &folder)?;
    command.args(options.runs.map(|runs| format!("-runs={runs}")));
    command.args(options.seconds.map(|seconds| format!("-max_total_time={seconds}")));
    command.args(&options.more);
    match &options.input {
        Some(input) => {
            command.arg(std::path::absolute(input)?);
        }
        None => corpora(context, target, &folder, &mut command)?,
    }
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("{} does not start", program.display()))?;
    if !status.success() {
        bail!("{target}: {status}; what failed is in {}", folder.display());
    }
    Ok(())
}

/// Runs each target for a short while, from the corpus in the tree.
///
/// # Errors
///
/// If one does not build, or an input fails.
pub(crate) fn smoke(context: &Context) -> anyhow::Result<Outcome> {
    if !has_compiler(context) {
        return Ok(Outcome::Skipped("no C++ compiler, and libFuzzer is C++".to_owned()));
    }
    let targets = targets(context)?;
    let programs = build(context)?;
    let left = Mutex::new(targets.iter());
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        let worker = || -> anyhow::Result<()> {
            while let Some(target) = next() {
                smoke_one(context, &programs.join(target), target)?;
            }
            Ok(())
        };
        let workers: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(worker)).collect();
        let ends: Vec<_> = workers.into_iter().map(thread::ScopedJoinHandle::join).collect();
        ends.into_iter().try_for_each(|end| end.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(Outcome::Passed(format!("{} targets, {SMOKE_RUNS} runs or {SMOKE_SECONDS} s each", targets.len())))
}

/// Runs one target of the smoke test.
fn smoke_one(context: &Context, program: &Path, target: &str) -> anyhow::Result<()> {
    // Only the corpus in the tree counts: what an earlier smoke test found would make this one another.
    let folder = context.target("fuzz").join("smoke").join(target);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    let mut command = fuzzer(context, program, target, &folder)?;
    command.arg(format!("-runs={SMOKE_RUNS}")).arg(format!("-seed={SMOKE_SEED}"));
    command.arg(format!("-max_total_time={SMOKE_SECONDS}"));
    corpora(context, target, &folder, &mut command)?;
    println!("fuzzing {target}, with seed {SMOKE_SEED}");
    run_quietly(context, command)
        .map(drop)
        .with_context(|| format!("{target}, input in {}", folder.display()))
}

/// The names of the targets.
fn targets(context: &Context) -> anyhow::Result<Vec<String>> {
    let metadata = context::metadata(&context.root().join(MANIFEST)).exec().with_context(|| {
        format!("fuzz/Cargo.lock may be older than the crates' manifests: cargo update --workspace --manifest-path {MANIFEST}")
    })?;
    let package = metadata.root_package().with_context(|| format!("{MANIFEST} holds no package"))?;
    Ok(package.targets.iter().filter(|target| target.is_bin()).map(|target| target.name.clone()).collect())
}

/// The flags under which libFuzzer sees which branches and comparisons an input reaches, as cargo-fuzz sets them.
/// Lints are clippy's stage.
const FLAGS: [&str; 9] = [
    "-Awarnings",
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "-Ccodegen-units=1",
];

/// Builds all targets; the folder with the programs.
fn build(context: &Context) -> anyhow::Result<PathBuf> {
    let host = host(context)?;
    let folder = context.target("fuzz");
    // With --target, build scripts and macros are not instrumented.
    let mut command =
        context.cargo(&["build", "--manifest-path", MANIFEST, "--release", "--bins", "--target", &host]);
    command.arg("--target-dir").arg(&folder).env("RUSTFLAGS", FLAGS.join(" "));
    run_filtered(context, command)?;
    Ok(folder.join(host).join("release"))
}

/// The compiler's own platform.
fn host(context: &Context) -> anyhow::Result<String> {
    let output = context.command("rustc").arg("-vV").output().context("rustc does not start")?;
    let text = String::from_utf8(output.stdout)?;
    let host =
        text.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
    Ok(host.to_owned())
}

fn has_compiler(context: &Context) -> bool {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let mut command = context.command(&compiler);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// The target's program, which leaves inputs that fail in `folder`.
fn fuzzer(context: &Context, program: &Path, target: &str, folder: &Path) -> anyhow::Result<Command> {
    fs::create_dir_all(folder.join("corpus"))?;
    let mut command =
        context.command(program.to_str().with_context(|| format!("the path of {target} is not UTF-8"))?);
    command.arg(format!("-artifact_prefix={}/", folder.display())).arg("-timeout=10");
    Ok(command)
}

/// New inputs go into the first corpus, below `folder`; the second, in the tree, is only read.
fn corpora(context: &Context, target: &str, folder: &Path, command: &mut Command) -> anyhow::Result<()> {
    command.arg(folder.join("corpus"));
    let seeds = context.root().join("fuzz/corpus").join(target);
    if !seeds.is_dir() {
        bail!("{} is missing: each target has inputs to begin with", seeds.display());
    }
    command.arg(seeds);
    Ok(())
}
