//! What the chores know of the workspace, and the commands that they build on it.

use std::{
    env,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;
use cargo_metadata::{Metadata, MetadataCommand, Package};

/// The workspace that this program was built from.
pub(crate) struct Context {
    /// Of the workspace's own packages only.
    pub(crate) metadata: Metadata,
    /// Print what is otherwise left out.
    pub(crate) verbose: bool,
    /// Do what takes long, too.
    pub(crate) full: bool,
}

impl Context {
    /// Asks cargo about the workspace.
    ///
    /// # Errors
    ///
    /// If cargo does not run or cannot read a manifest.
    pub(crate) fn load(verbose: bool) -> anyhow::Result<Context> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        let metadata = metadata(&manifest).no_deps().exec().context("cargo metadata")?;
        Ok(Context { metadata, verbose, full: false })
    }

    /// The workspace's folder.
    pub(crate) fn root(&self) -> &Path {
        self.metadata.workspace_root.as_std_path()
    }

    /// A folder below the target folder, for builds whose flags differ, or for tools.
    pub(crate) fn target(&self, name: &str) -> PathBuf {
        self.metadata.target_directory.as_std_path().join(name)
    }

    /// The packages that can be published.
    pub(crate) fn published(&self) -> impl Iterator<Item = &Package> {
        self.metadata
            .workspace_packages()
            .into_iter()
            .filter(|package| package.publish.as_ref().is_none_or(|registries| !registries.is_empty()))
    }

    /// Cargo, run in the workspace's folder.
    pub(crate) fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = self.command("cargo");
        command.args(arguments);
        command.env("CARGO_TERM_PROGRESS_WHEN", "never");
        if std::io::stdout().is_terminal() {
            command.env("CARGO_TERM_COLOR", "always");
        }
        command
    }

    /// A program, run in the workspace's folder.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.root());
        forget_package(&mut command);
        command
    }
}

/// `cargo metadata` on a manifest.
pub(crate) fn metadata(manifest: &Path) -> MetadataCommand {
    let mut command = MetadataCommand::new();
    command.manifest_path(manifest).other_options(["--locked".to_owned()]);
    command
}

/// Takes away what `cargo run` tells a program about its own package: a cargo below must not take it for itself.
fn forget_package(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if let Some(text) = name.to_str()
            && (text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(&name);
        }
    }
}
