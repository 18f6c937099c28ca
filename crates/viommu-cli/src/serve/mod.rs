//! `viommu serve`: a virtio-iommu and devices behind it, for a virtual machine monitor that speaks vfio-user.

pub(crate) mod args;
pub(crate) mod device;
mod machine;
pub(crate) mod options;
mod times;

use std::io::Write;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::args::Serve;
use self::machine::Machine;
use self::options::ServePlan;

/// Serves until it is told to stop by SIGINT or SIGTERM.
///
/// # Errors
/// What keeps it from serving, or what may be lost after it.
pub(crate) fn run(args: &Serve) -> Result<(), String> {
    // First, so that a signal that comes early is not lost.
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|why| why.to_string())?;
    let plan = ServePlan::new(args).map_err(|why| why.to_string())?;
    let machine = Machine::start(plan).map_err(|why| why.to_string())?;
    let mut out = std::io::stdout();
    writeln!(out, "ready: Ctrl-C stops it").and_then(|()| out.flush()).map_err(|why| why.to_string())?;
    let _signal = signals.forever().next();
    machine.stop().map_err(|lost| lost.join("; "))
}
