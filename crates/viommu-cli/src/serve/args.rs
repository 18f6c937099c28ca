//! The options of `viommu serve`, as they are written.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Where the sockets, the ACPI table viot.bin and the control socket are made; comes into being if it is not there
    #[arg(long, value_name = "DIR")]
    pub(crate) socket_dir: PathBuf,
    /// The PCI function that is the IOMMU: a virtio-iommu. vtd@BDF[,caching-mode=on|off]
    /// [,scalable=second-stage|first-stage][,base=ADDRESS] is an Intel VT-d unit; its table dmar.bin names the address that firmware gives its BAR (`viommu boot` sees to that), or base
    #[arg(long, value_name = "[vtd@]BDF", default_value = "00:01.0")]
    pub(crate) iommu: String,
    /// A device behind the IOMMU: BDF=blk:FILE[,ro][,queues=N] is a disk (FILE is a raw image), BDF=rng a source of
    /// random numbers, BDF=proxy:SOCKET a device of another process that listens there (vfio-user), which reaches what the guest mapped. FIRST-LAST=hotplug: devices can be plugged in there later (`viommu plug`)
    #[arg(long = "endpoint", value_name = "BDF=DEVICE")]
    pub(crate) endpoints: Vec<String>,
    /// Serves the devices without an IOMMU before them
    #[arg(long, conflicts_with_all = ["iommu", "bypass", "page_sizes", "reserved", "aperture", "max_mappings", "max_domains", "record"])]
    pub(crate) no_iommu: bool,
    /// The devices say that they are behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM), which is somebody else's: another `viommu serve`, as its proxy
    #[arg(long, requires = "no_iommu")]
    pub(crate) access_platform: bool,
    /// Whether devices that the guest has attached to nothing reach its memory, as firmware needs it
    #[arg(long, value_enum, default_value_t)]
    pub(crate) bypass: Switch,
    /// Sizes of pages that the guest may use, such as 4K,2M,1G; without it all from 4K on
    #[arg(long, value_name = "LIST")]
    pub(crate) page_sizes: Option<String>,
    /// Addresses that no mapping may meet, both ends inclusive, such as 0x1000-0x1fff:reserved; :msi is where interrupts
    /// are written. x86's 0xfee00000-0xfeefffff:msi is there unless `none` is said
    #[arg(long, value_name = "START-END:KIND")]
    pub(crate) reserved: Vec<String>,
    /// Addresses that can be mapped, both ends inclusive; without it all
    #[arg(long, alias = "input-range", value_name = "START-END")]
    pub(crate) aperture: Option<String>,
    /// The most mappings in all domains
    #[arg(long, value_name = "N")]
    pub(crate) max_mappings: Option<NonZeroU64>,
    /// The most domains
    #[arg(long, value_name = "N")]
    pub(crate) max_domains: Option<NonZeroUsize>,
    /// Writes what the guest does with the IOMMU, for `viommu replay`
    #[arg(long, value_name = "FILE")]
    pub(crate) record: Option<PathBuf>,
    /// The guest's memory, for the command line that is printed
    #[arg(long, value_name = "SIZE", default_value = "512M")]
    pub(crate) memory: String,
    /// Takes guest memory that its owner can shrink (a file, a memfd without seals): who does so ends the server
    #[arg(long)]
    pub(crate) allow_unsealed_memory: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    #[default]
    On,
    Off,
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        serve: Serve,
    }

    #[test]
    fn the_options_are_consistent() {
        Line::command().debug_assert();
    }

    #[test]
    fn no_iommu_with_an_option_of_the_iommu_is_refused() {
        let parse = |more: &[&str]| Line::try_parse_from(["serve", "--socket-dir", "x"].iter().chain(more));
        assert!(parse(&["--no-iommu"]).unwrap().serve.no_iommu);
        for more in [["--bypass", "on"], ["--iommu", "00:01.0"], ["--max-mappings", "1"], ["--record", "f"]] {
            assert!(parse(&["--no-iommu", more[0], more[1]]).is_err(), "{more:?}");
        }
        assert!(parse(&["--max-mappings", "0"]).is_err());
        assert!(parse(&["--access-platform"]).is_err());
        assert!(parse(&["--access-platform", "--no-iommu"]).is_ok());
    }
}
