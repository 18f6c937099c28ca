//! Live tests: an unmodified Linux in an unmodified QEMU, with viommu as its IOMMU. Run by `cargo xtask guest`.
#![forbid(unsafe_code)]

mod bench;
mod cases;
mod cpio;
mod differential;
mod disk;
mod initramfs;
mod iommu;
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
    /// The disk that is a vhost-user back end.
    #[arg(long)]
    vhost_user_blk: PathBuf,
    /// The front end of a vhost-user network device.
    #[arg(long)]
    vhost_user_net_front: PathBuf,
    /// The device of a vfio-user server that is not ours.
    #[arg(long)]
    rust_vmm_device: PathBuf,
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
    /// So many cases of the comparison with QEMU's VT-d.
    #[arg(long, value_name = "NUMBER", default_value_t = 5000)]
    cases: u64,
    /// The seed of its first case; those of the next follow.
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Longer runs under load, and cases that are left out otherwise.
    #[arg(long)]
    full: bool,
    /// Keeps the files of cases that pass.
    #[arg(long)]
    keep: bool,
    /// Runs no case, and builds the kernel that Debian does not ship, unless it is there.
    #[arg(long, conflicts_with = "bench")]
    build_kernel: bool,
    /// Runs no case, and measures beside QEMU's own devices, so many boots of each set-up.
    #[arg(long, value_name = "RUNS")]
    bench: Option<u32>,
    /// Where the measured figures go, as JSON.
    #[arg(long, value_name = "FILE", requires = "bench")]
    json: Option<PathBuf>,
}

/// How `--build-kernel` ends where what it needs cannot be had; `cargo xtask` knows the number.
const NOT_HERE: u8 = 3;

fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        for case in cases::CASES {
            println!("{:<20}{}{}", case.name, case.about, if case.full { " (--full)" } else { "" });
        }
        return ExitCode::SUCCESS;
    }
    let result = match options.bench {
        _ if options.build_kernel => lab::build_kernel(&options).map(|()| true),
        Some(runs) => bench::run(&options, runs).map(|()| true),
        None => lab::run(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<setup::NotHere>() { NOT_HERE.into() } else { ExitCode::FAILURE }
        }
    }
}
