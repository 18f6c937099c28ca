//! The rules of the house that no lint knows.

mod text;

use std::{env, fs, path::Path, process::Stdio};

use anyhow::{Context as _, bail};

use crate::{context::Context, stage::Outcome};

/// Files without which the tree is not whole.
const REQUIRED: [&str; 11] = [
    ".ci/run",
    "CHANGELOG.md",
    "Cargo.lock",
    "LICENSE-APACHE",
    "LICENSE-BSD-3-Clause",
    "README.md",
    "clippy.toml",
    "deny.toml",
    "docs/design.md",
    "fuzz/Cargo.lock",
    "rustfmt.toml",
];

/// Licences that each published crate carries.
const LICENCES: [&str; 2] = ["LICENSE-APACHE", "LICENSE-BSD-3-Clause"];

/// Checks every file that git keeps or would keep.
///
/// # Errors
///
/// If a rule is broken, after all that are have been printed.
pub(crate) fn check(context: &Context) -> anyhow::Result<Outcome> {
    let root = context.root();
    let mut faults = Vec::new();

    for name in REQUIRED {
        if !root.join(name).is_file() {
            faults.push(format!("{name}: missing"));
        }
    }
    if !is_executable(&root.join(".ci/run")) {
        faults.push(".ci/run: not executable".to_owned());
    }
    for package in context.published() {
        let folder = package.manifest_path.parent().context("a manifest without a folder")?;
        for licence in LICENCES {
            if !folder.join(licence).is_file() {
                faults.push(format!("{folder}: {licence} is missing, a link to the one in the root"));
            }
        }
    }

    let names = files(context)?;
    for name in &names {
        // Links are checked where they lead; what is not text is data.
        let path = root.join(name);
        if path.is_symlink() {
            continue;
        }
        if let Ok(text) = String::from_utf8(fs::read(&path).with_context(|| name.clone())?) {
            faults.extend(text::faults(name, &text));
        }
    }

    // Elsewhere a lock file may be at work; where CI runs, a command must have brought it up to date.
    if env::var_os("CI").is_some() {
        let mut command = context.command("git");
        command.args(["diff", "--quiet", "HEAD", "--", "Cargo.lock"]).stdin(Stdio::null());
        if !command.status().context("git does not start")?.success() {
            faults.push("Cargo.lock: older than the manifests".to_owned());
        }
    }

    for fault in &faults {
        println!("{fault}");
    }
    match faults.len() {
        0 => Ok(Outcome::Passed(format!("{} files", names.len()))),
        count => bail!("{count} faults"),
    }
}

/// What git keeps, or would if it were told to keep all that is not ignored; not what is deleted.
fn files(context: &Context) -> anyhow::Result<Vec<String>> {
    let mut command = context.command("git");
    command.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).stdin(Stdio::null());
    let output = command.output().context("git does not start")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let mut names: Vec<String> =
        String::from_utf8(output.stdout)?.split_terminator('\0').map(str::to_owned).collect();
    names.sort_unstable();
    names.dedup();
    names.retain(|name| context.root().join(name).is_file());
    if names.is_empty() {
        bail!("git knows no file here");
    }
    Ok(names)
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o111 != 0)
}
