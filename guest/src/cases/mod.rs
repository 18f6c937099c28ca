//! The cases: each a function here and a script in the guest.

mod consumers;
mod firmware;
mod hotplug;
mod io;
mod killed;
mod load;
mod own;
mod passthrough;
mod probe;
mod reboot;
mod refusals;

use crate::lab::Run;

/// A case.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// What it shows, in half a line.
    pub(crate) about: &'static str,
    /// Runs it; a note for the reader.
    pub(crate) run: fn(&Run<'_>) -> anyhow::Result<String>,
}

/// All cases, those that take long first.
pub(crate) const CASES: &[Case] = &[
    Case {
        name: "load",
        about: "three disks and random numbers in three groups, two processors, under load",
        run: load::run,
    },
    Case {
        name: "own",
        about: "these tests themselves: the same guest with QEMU's own virtio-iommu",
        run: own::run,
    },
    Case {
        name: "type1-intel",
        about: "our type1 mirror on the guest's own VFIO, under QEMU's VT-d",
        run: consumers::type1::intel,
    },
    Case { name: "type1-virtio", about: "the same under QEMU's virtio-iommu", run: consumers::type1::virtio },
    Case { name: "type1-amd", about: "the same under QEMU's AMD-Vi", run: consumers::type1::amd },
    Case { name: "strict", about: "a file system, and our record beside the guest's own", run: io::strict },
    Case { name: "lazy", about: "the same with unmaps that come late, in flocks", run: io::lazy },
    Case {
        name: "probe",
        about: "a device driven through VFIO: DMA after unmap is blocked",
        run: probe::run,
    },
    Case {
        name: "passthrough",
        about: "identity domains, and a group that changes from one to the other and back",
        run: passthrough::run,
    },
    Case { name: "firmware", about: "the firmware boots from a disk, before any driver", run: firmware::run },
    Case { name: "hotplug", about: "a device comes, is removed, and is found again", run: hotplug::run },
    Case { name: "reboot", about: "a reboot and a kexec: no mapping survives", run: reboot::run },
    Case { name: "refusals", about: "more mappings are asked for than there may be", run: refusals::run },
    Case { name: "killed", about: "the server is killed amid writes, and serves again", run: killed::run },
];

/// What the guests run, by name.
pub(crate) const SCRIPTS: [(&str, &str); 8] = [
    ("bench", include_str!("../bench/bench.sh")),
    ("consumers", include_str!("consumers.sh")),
    ("hotplug", include_str!("hotplug.sh")),
    ("io", include_str!("io.sh")),
    ("load", include_str!("load.sh")),
    ("probe", include_str!("probe.sh")),
    ("reboot", include_str!("reboot.sh")),
    ("switch", include_str!("switch.sh")),
];

/// An option that puts a device behind the IOMMU.
fn endpoint(address: &str, device: &str) -> [String; 2] {
    ["--endpoint".to_owned(), format!("{address}={device}")]
}

/// The same for a disk.
fn blk(address: &str, image: &std::path::Path) -> [String; 2] {
    endpoint(address, &format!("blk:{}", image.display()))
}
