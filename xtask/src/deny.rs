//! cargo-deny: taken as it is found, else installed below the target folder.

use std::process::{Command, Stdio};

use crate::{context::Context, run::run, stage::Outcome};

/// The version that is installed where there is none.
const VERSION: &str = "0.20.2";

/// Checks `deny.toml`. Advisories are left out: they need a database from the network, and change without a commit.
///
/// # Errors
///
/// If a dependency is not to be had.
pub(crate) fn check(context: &Context) -> anyhow::Result<Outcome> {
    let installed = context.target("tools").join("bin").join("cargo-deny");
    let installed = installed.to_string_lossy();
    let program = if runs(context.command("cargo-deny")) {
        "cargo-deny"
    } else {
        if !runs(context.command(&installed))
            && let Err(error) = run(context, install(context))
        {
            return Ok(Outcome::Skipped(format!("cargo-deny is not there and does not install ({error:#})")));
        }
        &*installed
    };
    let mut command = context.command(program);
    command.args(["--log-level", "error", "check", "licenses", "bans", "sources"]);
    run(context, command)?;
    Ok(Outcome::passed())
}

fn runs(mut program: Command) -> bool {
    program.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    program.status().is_ok_and(|status| status.success())
}

/// Not optimised: it runs for a second, and would take minutes to build.
fn install(context: &Context) -> Command {
    let tools = context.target("tools");
    let mut command = context.cargo(&["install", &format!("cargo-deny@{VERSION}"), "--locked", "--debug"]);
    command.arg("--root").arg(&tools);
    command.env("CARGO_TARGET_DIR", tools.join("build")).env("CARGO_PROFILE_DEV_DEBUG", "0");
    command
}
