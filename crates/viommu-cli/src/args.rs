//! The command line.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use viommu_virtio::viot::Bdf;

use crate::judge::Interface;

/// A virtual IOMMU's record, replayed and checked.
#[derive(Debug, Parser)]
#[command(name = "viommu", version, about, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Replays the history of a guest's mappings through the core and checks all that can be checked
    ///
    /// Every endpoint has a mirror (a VFIO type1 container in software) and a cache (a vhost IOTLB of 2048 entries).
    /// The translations and notifications that the history records are compared with theirs, and all of them are
    /// audited every 1000 operations.
    ///
    /// With --model virtio-iommu each operation is a request to a device, whose status and used length are checked too;
    /// with --model spapr-tce each map and unmap is a hypercall, whose return code is checked; with --model vtd a driver
    /// keeps context entries and page tables in guest memory, and says what has changed through the queue of a VT-d unit.
    ///
    /// Exit status: 0 all agree, 1 something differs, 2 the input cannot be read, or not be expressed by the model.
    Replay(Replay),
    /// Writes a history in viommu's own format
    Convert(Convert),
    /// Serves a virtio-iommu and devices behind it to a virtual machine monitor that speaks vfio-user
    Serve(crate::serve::args::Serve),
    /// Starts a machine on what `viommu serve` serves, when its firmware has said where it puts a VT-d unit's registers
    ///
    /// QEMU runs twice: for a moment, without the ACPI table, until its firmware has come so far, and then for good. With
    /// another IOMMU it runs for good at once. Its exit status is that of the machine; 2 if that does not start.
    Boot(Boot),
    /// Shows the live state of what `viommu serve` serves
    ///
    /// Exit status: 0 shown, 2 nobody serves there.
    Status(Status),
    /// Has `viommu serve` take a device in, and prints what QEMU is to be told
    Plug(Plug),
    /// Has `viommu serve` give a device up, and prints what QEMU is to be told
    Unplug(Unplug),
}

#[derive(Debug, Args)]
pub(crate) struct Replay {
    /// A QEMU -trace log, Linux trace text or viommu's own format, plain or compressed (.xz, .zst, .gz);
    /// `-` is standard input. Without it: a built-in history
    pub(crate) file: Option<PathBuf>,
    /// What to print
    #[arg(long, value_enum, default_value_t)]
    pub(crate) format: Format,
    /// Writes a self-contained page with pictures
    #[arg(long, value_name = "OUT.html")]
    pub(crate) report: Option<PathBuf>,
    /// Each mirror refuses every N-th map that a guest operation asks of it, and with it the operation
    #[arg(long, value_name = "N")]
    pub(crate) fail_map: Option<NonZeroU64>,
    /// Each mirror fails every N-th unmap that a guest operation asks of it, and is fenced
    #[arg(long, value_name = "N")]
    pub(crate) fail_unmap: Option<NonZeroU64>,
    /// A fenced mirror is brought back by a new subscription
    #[arg(long)]
    pub(crate) unfence: bool,
    /// Extents that a mirror can hold
    #[arg(long, value_name = "N")]
    pub(crate) limit_entries: Option<u32>,
    /// How the history's operations reach the core; what it comes to is the same
    #[arg(long, value_enum, default_value_t)]
    pub(crate) model: Model,
    /// A real interface gets what the domain of one endpoint has, besides: type1[:GROUP], iommufd[:DEVICE], vdpa[:NUMBER]
    /// (devices of this machine that nobody uses) or vfio-user:SOCKET. May be given several times
    #[arg(long, value_name = "INTERFACE")]
    pub(crate) mirror: Vec<Interface>,
    /// Which endpoint, a number or BUS:DEVICE.FUNCTION; without it the first that something is mapped for
    #[arg(long, value_name = "ENDPOINT", requires = "mirror", value_parser = endpoint)]
    pub(crate) mirror_endpoint: Option<u32>,
}

/// An endpoint as histories have it: a number, decimal or 0x, or the PCI address that such a number is.
fn endpoint(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok().or_else(|| Some(u16::from(text.parse::<Bdf>().ok()?).into())),
    };
    number.ok_or_else(|| "a number or BUS:DEVICE.FUNCTION is expected".to_owned())
}

#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// The history to read; `-` is standard input
    #[arg(value_name = "IN")]
    pub(crate) from: PathBuf,
    /// The file to write; `-` is standard output
    #[arg(value_name = "OUT")]
    pub(crate) to: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct Boot {
    /// Where the sockets are
    #[arg(long, value_name = "DIR")]
    pub(crate) socket_dir: PathBuf,
    /// The machine's program and all of its arguments, as `viommu serve` has printed them
    #[arg(value_name = "QEMU", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) machine: Vec<std::ffi::OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// Where the sockets are
    #[arg(long, value_name = "DIR")]
    pub(crate) socket_dir: PathBuf,
    /// Prints one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// With all mappings. Requests to a domain wait while its mappings are listed
    #[arg(long)]
    pub(crate) mappings: bool,
    /// A screen that refreshes, until q, Esc or Ctrl-C
    #[arg(long, conflicts_with_all = ["json", "mappings"])]
    pub(crate) watch: bool,
    /// Between two refreshes, 0.1 to 3600
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval, requires = "watch")]
    pub(crate) interval: Duration,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.1..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "0.1 to 3600 seconds are expected".to_owned())
}

#[derive(Debug, Args)]
pub(crate) struct Plug {
    /// Where the sockets are
    #[arg(long, value_name = "DIR")]
    pub(crate) socket_dir: PathBuf,
    /// The device, as in `viommu serve --endpoint`, at an address that is there for hotplug
    #[arg(value_name = "BDF=DEVICE")]
    pub(crate) endpoint: String,
}

#[derive(Debug, Args)]
pub(crate) struct Unplug {
    /// Where the sockets are
    #[arg(long, value_name = "DIR")]
    pub(crate) socket_dir: PathBuf,
    /// Where the device is
    #[arg(value_name = "BDF")]
    pub(crate) address: String,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table
    #[default]
    Text,
    /// One JSON object
    Json,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Model {
    /// As steps of the record, without a device model between
    #[default]
    Direct,
    /// As requests that a driver writes into the ring of a virtio-iommu in guest memory; accesses go through memory
    VirtioIommu,
    /// Maps and unmaps as hypercalls of a pseries guest, with a LIOBN for each domain
    SpaprTce,
    /// As tables that a driver keeps in guest memory, with the invalidations that it sends to a VT-d unit
    Vtd,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn an_endpoint_is_a_number_or_an_address() {
        for (text, number) in [("24", 24), ("0x18", 24), ("00:03.0", 24), ("01:00.1", 257)] {
            assert_eq!(endpoint(text), Ok(number), "{text}");
        }
        for text in ["", "x", "-1", "0x", "00:20.0", "4294967296"] {
            assert!(endpoint(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_interval_is_of_seconds_that_can_be_waited_for() {
        assert_eq!(interval("0.5"), Ok(Duration::from_millis(500)));
        for text in ["", "x", "0", "-1", "0.09", "3601", "inf", "NaN"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
