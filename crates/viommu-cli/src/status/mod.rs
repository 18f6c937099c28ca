//! `viommu status`, `plug` and `unplug`: what a server tells over its control socket, and is asked there.

pub(crate) mod client;
mod format;
mod page;
mod rates;
mod text;
mod watch;

use std::io::{self, IsTerminal, Write};

use viommu_virtio::viot::Bdf;

use crate::args::{self, Plug, Unplug};
use crate::serve::control::protocol::{self, Answer, Plugged, Request};
use crate::serve::device::Kind;
use client::Client;

type Error = Box<dyn std::error::Error>;

/// Shows the live state, once or until it is told to stop.
///
/// # Errors
/// Nobody serves there, or what is asked for cannot be shown.
pub(crate) fn run(args: &args::Status) -> Result<(), Error> {
    let directory = args.socket_dir.display().to_string();
    let mut client = Client::connect(&args.socket_dir)?;
    if args.watch {
        if !io::stdout().is_terminal() {
            return Err("--watch needs a terminal; --json gives the state to programs".into());
        }
        return Ok(watch::run(&args.socket_dir, client, args.interval)?);
    }
    let snapshot = client.snapshot(args.mappings)?;
    if args.json {
        return print(&(serde_json::to_string(&snapshot)? + "\n"));
    }
    print(&text::show(&directory, snapshot))
}

/// Has a device come. The line for QEMU goes to standard output, alone.
///
/// # Errors
/// What stands against it.
pub(crate) fn plug(args: &Plug) -> Result<(), Error> {
    let expected = || format!("{}: BDF=DEVICE is expected, such as 01:00.0=rng", args.endpoint);
    let (address, device) = args.endpoint.split_once('=').ok_or_else(expected)?;
    let address: Bdf = address.parse()?;
    // The server's working directory is another one.
    let kind =
        Kind::parse(device).and_then(Kind::absolute).map_err(|why| format!("{}: {why}", args.endpoint))?;
    let plug = protocol::Plug { address: address.to_string(), device: kind.to_string() };
    match Client::connect(&args.socket_dir)?.ask(&Request::Plug { plug })? {
        Answer::Plugged(plugged) => tell("QEMU takes it in with", &plugged),
        _ => Err("the server has answered something else".into()),
    }
}

/// Has a device go. The line for QEMU goes to standard output, alone.
///
/// # Errors
/// What stands against it.
pub(crate) fn unplug(args: &Unplug) -> Result<(), Error> {
    let address: Bdf = args.address.parse()?;
    let unplug = protocol::Unplug { address: address.to_string() };
    match Client::connect(&args.socket_dir)?.ask(&Request::Unplug { unplug })? {
        Answer::Unplugged(plugged) => tell("QEMU gives it up with", &plugged),
        _ => Err("the server has answered something else".into()),
    }
}

fn tell(what: &str, plugged: &Plugged) -> Result<(), Error> {
    eprintln!("{}: {}; {what} this line on its QMP socket:", plugged.address, plugged.socket);
    print(&format!("{}\n", plugged.qmp))
}

fn print(text: &str) -> Result<(), Error> {
    match anstream::stdout().lock().write_all(text.as_bytes()) {
        // Who reads no further has seen enough.
        Err(why) if why.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => Ok(outcome?),
    }
}
