//! The stages of `cargo xtask test`.

use std::{
    collections::{HashMap, HashSet},
    env,
    process::Command,
};

use anyhow::{Context as _, bail};
use cargo_metadata::{DependencyKind, Package, PackageId, TargetKind};

use crate::{
    context::{self, Context},
    deny, fuzz, guest, house,
    run::{Said, run},
    stage::{Outcome, Stage},
};

/// All stages: what fails fast and often comes first.
pub(crate) const STAGES: [Stage; 16] = [
    Stage { name: "fmt", about: "formatting", run: fmt },
    Stage {
        name: "house",
        about: "the rules of the house: leftovers, long files, required files",
        run: house::check,
    },
    Stage { name: "msrv", about: "dependencies that need a newer Rust than we promise", run: msrv },
    Stage { name: "deny", about: "licences and sources of dependencies", run: deny::check },
    Stage { name: "clippy", about: "lints, all targets and features", run: clippy },
    Stage { name: "no-default-features", about: "each library alone, without features", run: bare },
    Stage { name: "tests", about: "unit, property and integration tests, default features", run: tests },
    Stage {
        name: "tests-all-features",
        about: "the same of crates that have further features",
        run: tests_all,
    },
    Stage { name: "doc-tests", about: "examples in the documentation", run: doc_tests },
    Stage { name: "docs", about: "documentation builds without warnings", run: docs },
    Stage { name: "release", about: "tests of the core, optimised and without assertions", run: release },
    Stage {
        name: "loom",
        about: "all schedules of small models of the core",
        run: |context| counted(loom(context, None)),
    },
    Stage {
        name: "shuttle",
        about: "many random schedules of larger models of the core",
        run: |context| counted(shuttle(context, None)),
    },
    Stage { name: "fuzz-smoke", about: "a short run of each fuzz target", run: fuzz::smoke },
    Stage {
        name: "guest",
        about: "unmodified Linux guests in QEMU, their devices behind viommu",
        run: guest::stage,
    },
    Stage { name: "publish", about: "the crates can be packaged, and built from the packages", run: publish },
];

fn fmt(context: &Context) -> anyhow::Result<Outcome> {
    run(context, context.cargo(&["fmt", "--all", "--check"]))?;
    run(context, context.cargo(&["fmt", "--manifest-path", fuzz::MANIFEST, "--check"]))?;
    Ok(Outcome::passed())
}

fn clippy(context: &Context) -> anyhow::Result<Outcome> {
    let arguments = ["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"];
    run(context, context.cargo(&arguments))?;
    Ok(Outcome::passed())
}

/// With clippy rather than `cargo check`: warnings of code that only lacks its features count too.
fn bare(context: &Context) -> anyhow::Result<Outcome> {
    let mut crates = 0;
    for package in context.published().filter(|package| has_library(package)) {
        let arguments =
            ["clippy", "-p", &package.name, "--lib", "--no-default-features", "--", "-D", "warnings"];
        run(context, context.cargo(&arguments))?;
        crates += 1;
    }
    Ok(Outcome::Passed(format!("{crates} crates")))
}

fn tests(context: &Context) -> anyhow::Result<Outcome> {
    let arguments = ["test", "--workspace", "--lib", "--bins", "--tests", "--examples"];
    counted(tested(context, seeded(context.cargo(&arguments))))
}

fn tests_all(context: &Context) -> anyhow::Result<Outcome> {
    let mut arguments = vec!["test", "--all-features", "--lib", "--bins", "--tests", "--examples"];
    for package in context.published().filter(|package| has_further_features(package)) {
        arguments.extend(["-p", &package.name]);
    }
    if !arguments.contains(&"-p") {
        return Ok(Outcome::Passed("no crate has any".to_owned()));
    }
    counted(tested(context, seeded(context.cargo(&arguments))))
}

/// There may be none: the count is for the reader.
fn doc_tests(context: &Context) -> anyhow::Result<Outcome> {
    counted(run(context, context.cargo(&["test", "--workspace", "--doc", "--all-features"])))
}

fn docs(context: &Context) -> anyhow::Result<Outcome> {
    let mut command = context.cargo(&["doc", "--workspace", "--no-deps", "--all-features"]);
    command.env("RUSTDOCFLAGS", "-D warnings");
    run(context, command)?;
    Ok(Outcome::passed())
}

/// Code as it is shipped, but for link-time optimisation, which costs minutes and changes no test's meaning.
fn release(context: &Context) -> anyhow::Result<Outcome> {
    let arguments = [
        "test",
        "-p",
        "viommu",
        "--release",
        "--lib",
        "--tests",
        "--config",
        "profile.release.lto=false",
        "--config",
        "profile.release.codegen-units=16",
    ];
    counted(tested(context, seeded(context.cargo(&arguments))))
}

/// Runs the loom models whose names contain `filter`.
///
/// # Errors
///
/// If one fails, or there is none.
pub(crate) fn loom(context: &Context, filter: Option<&str>) -> anyhow::Result<Said> {
    model(context, "loom", &["viommu"], filter)
}

/// Runs the shuttle tests whose names contain `filter`.
///
/// # Errors
///
/// If one fails, or there is none.
pub(crate) fn shuttle(context: &Context, filter: Option<&str>) -> anyhow::Result<Said> {
    model(context, "shuttle", &["viommu", "viommu-virtio"], filter)
}

/// The checker's name is the cfg that chooses its primitives, a part of its tests' names, and its target folder's.
fn model(context: &Context, checker: &str, packages: &[&str], filter: Option<&str>) -> anyhow::Result<Said> {
    let mut command = context.cargo(&["test", "--profile", "model", "--lib"]);
    packages.iter().for_each(|package| {
        command.args(["-p", package]);
    });
    command.arg("--target-dir").arg(context.target(checker));
    command.arg(filter.unwrap_or(checker));
    // Lints are clippy's stage: what only the models leave unused is no news.
    command.env("RUSTFLAGS", format!("--cfg {checker} -Awarnings"));
    tested(context, command)
}

/// Packages what would be uploaded, and builds it from the packages: a file that one lacks is found out.
fn publish(context: &Context) -> anyhow::Result<Outcome> {
    let arguments = ["publish", "--workspace", "--dry-run", "--allow-dirty"];
    run(context, context.cargo(&arguments))?;
    Ok(Outcome::Passed(format!("{} crates", context.published().count())))
}

/// Looks at what published crates are built from; the standard library's age is clippy's to check.
fn msrv(context: &Context) -> anyhow::Result<Outcome> {
    let metadata = context::metadata(&context.root().join("Cargo.toml"))
        .exec()
        .context("cargo metadata, with dependencies")?;
    let resolve = metadata.resolve.as_ref().context("cargo metadata tells no dependencies")?;
    let packages: HashMap<&PackageId, &Package> =
        metadata.packages.iter().map(|package| (&package.id, package)).collect();
    let promised = context
        .published()
        .filter_map(|package| package.rust_version.as_ref())
        .min()
        .context("no rust-version is promised")?;

    let mut queue: Vec<&PackageId> = context.published().map(|package| &package.id).collect();
    let mut seen: HashSet<&PackageId> = queue.iter().copied().collect();
    let mut newer = Vec::new();
    while let Some(id) = queue.pop() {
        let package = packages.get(id).context("a dependency that is not a package")?;
        if let Some(needed) = package.rust_version.as_ref().filter(|needed| *needed > promised) {
            newer.push(format!("{} {} needs Rust {needed}", package.name, package.version));
        }
        let node = resolve.nodes.iter().find(|node| node.id == *id).context("an unresolved dependency")?;
        for dependency in &node.deps {
            let built = dependency.dep_kinds.iter().any(|kind| kind.kind != DependencyKind::Development);
            if built && seen.insert(&dependency.pkg) {
                queue.push(&dependency.pkg);
            }
        }
    }
    if !newer.is_empty() {
        bail!("Rust {promised} is promised, but {}", newer.join(", "));
    }
    Ok(Outcome::Passed(format!("{} packages build with Rust {promised} by their own word", seen.len())))
}

/// A seed for the property tests, which the printed command shows: the same in each run unless another is given, so
/// that what a change broke is told apart from what was found by luck. Searching is what `cargo xtask fuzz` is for.
fn seeded(mut command: Command) -> Command {
    const SEED: &str = "PROPTEST_RNG_SEED";
    let seed = env::var(SEED).unwrap_or_else(|_| "2016".to_owned());
    command.env(SEED, seed);
    command
}

/// Runs tests, of which there must be some.
fn tested(context: &Context, command: Command) -> anyhow::Result<Said> {
    let said = run(context, command)?;
    if said.passed == 0 {
        bail!("no test ran");
    }
    Ok(said)
}

fn counted(said: anyhow::Result<Said>) -> anyhow::Result<Outcome> {
    Ok(Outcome::Passed(format!("{} tests", said?.passed)))
}

fn has_library(package: &Package) -> bool {
    package.targets.iter().any(|target| target.kind.contains(&TargetKind::Lib))
}

/// Whether there are features that are not on by default.
fn has_further_features(package: &Package) -> bool {
    let default = package.features.get("default").map_or(&[][..], Vec::as_slice);
    package.features.keys().any(|feature| feature != "default" && !default.contains(feature))
}
