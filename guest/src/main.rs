//! Live tests: an unmodified Linux in an unmodified QEMU, with viommu as its IOMMU. Run by `cargo xtask guest`.
#![forbid(unsafe_code)]

mod cases;
mod cpio;
mod disk;
mod initramfs;
mod lab;
mod live;
mod modules;
mod qmp;
mod server;
mod setup;
mod status;
mod vm;
mod vmlinux;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

/// Live tests: an unmodified Linux in an unmodified QEMU, with viommu as its IOMMU.
#[derive(Debug, Parser)]
struct Options {
    /// Where packages are unpacked, and the runs' files go.
    #[arg(long)]
    folder: PathBuf,
    /// The viommu program.
    #[arg(long)]
    viommu: PathBuf,
    /// The program that runs inside the guests, linked statically.
    #[arg(long)]
    inside: PathBuf,
    /// Only this kernel, by the first numbers of its release; may be given several times.
    #[arg(long, value_name = "RELEASE")]
    kernel: Vec<String>,
    /// Only this case; may be given several times.
    #[arg(long, value_name = "NAME")]
    case: Vec<String>,
    /// Lists the cases and runs none.
    #[arg(long)]
    list: bool,
    /// Longer runs under load.
    #[arg(long)]
    full: bool,
    /// Keeps the files of cases that pass.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        for case in cases::CASES {
            println!("{:<12}{}", case.name, case.about);
        }
        return ExitCode::SUCCESS;
    }
    match lab::run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
