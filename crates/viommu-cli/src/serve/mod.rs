//! `viommu serve`: a virtio-iommu and devices behind it, for a virtual machine monitor that speaks vfio-user.

pub(crate) mod args;
pub(crate) mod control;
pub(crate) mod device;
mod dmar;
mod hush;
mod machine;
pub(crate) mod options;
pub(crate) mod qemu;
pub(crate) mod record;
pub(crate) mod snapshot;
mod times;
pub(crate) mod viot;

use std::io::{self, Write};
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use self::args::Serve;
use self::control::Control;
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
    qemu::check(&plan).map_err(|why| why.to_string())?;
    allow_descriptors();
    let path = plan.control_socket();
    let machine = Arc::new(Machine::start(plan).map_err(|why| why.to_string())?);
    let plan = machine.plan();
    viot::write(plan).map_err(|why| format!("{}: {why}", plan.table_file().display()))?;
    let control = Control::start(&path, machine.clone()).map_err(|why| why.to_string())?;
    tell(plan).map_err(|why| format!("standard output: {why}"))?;
    let _signal = signals.forever().next();
    control.stop();
    machine.stop().map_err(|lost| lost.join("; "))
}

/// Windows and queues have descriptors; the usual soft limit is for programs that use select.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(why) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the limit of descriptors stays as it is: {why}");
    }
}

/// Says what is served, and how a guest gets it.
fn tell(plan: &ServePlan) -> io::Result<()> {
    let mut out = anstream::stdout();
    if let Some(iommu) = &plan.iommu {
        writeln!(out, "{}  {}", iommu.address, iommu.model)?;
    }
    for device in &plan.devices {
        writeln!(out, "{}  {}", device.address, device.kind)?;
    }
    for range in &plan.hotplug {
        writeln!(out, "{}-{}  hot-plug (viommu plug)", range.start(), range.end())?;
    }
    if let Some(remark) = qemu::not_pluggable(plan) {
        writeln!(out, "{remark}")?;
    }
    let line = qemu::command_line(plan).map_err(io::Error::other)?;
    writeln!(out, "\nIn another terminal, with your own KERNEL and INITRD:\n{line}\n")?;
    writeln!(out, "ready in {}; Ctrl-C stops it", plan.socket_dir.display())?;
    out.flush()
}
