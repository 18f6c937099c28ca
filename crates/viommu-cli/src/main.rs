//! The program `viommu`.
#![forbid(unsafe_code)]

mod args;
mod boot;
mod convert;
mod input;
mod judge;
mod progress;
mod replay;
mod report;
mod serve;
mod status;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use replay::Verdict;

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Replay(args) => replay::run(&args),
        Command::Serve(args) => {
            tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).init();
            serve::run(&args).map(|()| Verdict::Agrees).map_err(Into::into)
        }
        Command::Convert(args) => convert::run(&args).map(|()| Verdict::Agrees).map_err(Into::into),
        Command::Boot(args) => boot::run(&args).map(|never| match never {}),
        Command::Status(args) => status::run(&args).map(|()| Verdict::Agrees),
        Command::Plug(args) => status::plug(&args).map(|()| Verdict::Agrees),
        Command::Unplug(args) => status::unplug(&args).map(|()| Verdict::Agrees),
    };
    match outcome {
        Ok(Verdict::Agrees) => ExitCode::SUCCESS,
        Ok(Verdict::Differs) => ExitCode::from(1),
        Ok(Verdict::Unreadable) => ExitCode::from(2),
        Err(why) => {
            eprintln!("viommu: {why}");
            ExitCode::from(2)
        }
    }
}
