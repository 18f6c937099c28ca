//! The cases: each a function here and a script in the guest.

mod consumers;
mod dpdk;
mod firmware;
mod hotplug;
mod io;
mod killed;
mod load;
mod own;
mod passthrough;
mod probe;
mod proxy;
mod proxy_killed;
mod reboot;
mod refusals;
mod rust_vmm;
mod vhost_user;

use crate::{iommu::Iommu, lab::Run};

/// A case.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    /// What it shows, in half a line.
    pub(crate) about: &'static str,
    pub(crate) iommu: Iommu,
    /// Only with `--full`.
    pub(crate) full: bool,
    /// Whether there is a guest at all.
    pub(crate) has_guest: bool,
    /// On the kernel that is built here, and no other.
    pub(crate) own_kernel: bool,
    /// On the first kernel alone: it does not depend on the guest's.
    pub(crate) one_kernel: bool,
    /// Runs it; a note for the reader.
    pub(crate) run: fn(&Run<'_>) -> anyhow::Result<String>,
}

const fn case(
    name: &'static str,
    iommu: Iommu,
    run: fn(&Run<'_>) -> anyhow::Result<String>,
    about: &'static str,
) -> Case {
    Case { name, about, iommu, full: false, has_guest: true, own_kernel: false, one_kernel: false, run }
}

/// One that needs what no kernel of Debian's has.
const fn on_own_kernel(case: Case) -> Case {
    Case { own_kernel: true, ..case }
}

/// One that does not depend on the guest's kernel.
const fn on_one_kernel(case: Case) -> Case {
    Case { one_kernel: true, ..case }
}

/// One that shows what others show, too.
const fn full(case: Case) -> Case {
    Case { full: true, ..case }
}

/// One without a guest.
const fn alone(case: Case) -> Case {
    Case { has_guest: false, ..case }
}

const LOAD: &str = "three disks and random numbers in three groups, two processors, under load";
const IO: &str = "a file system, and our record beside the guest's own";
const PROBE: &str = "a device driven through VFIO: DMA after unmap is blocked";
const PROXY: &str = "devices of another process, which reaches what the guest maps and nothing else";
const PROXY_KILLED: &str =
    "the process of a device is killed amid writes: others go on, and it is plugged anew";
const PROXY_RUST_VMM: &str = "a device of a vfio-user server that is not ours";
const PROXY_HUNG: &str = "the same, and it hangs: the guest stands still until it ends";
const HOTPLUG: &str = "a device comes, is removed, and is found again";
const REBOOT: &str = "a reboot and a kexec: no mapping survives";

/// All cases, those that take long first.
#[rustfmt::skip]
pub(crate) const CASES: &[Case] = &[
    case("load", Iommu::VIRTIO, load::run, LOAD),
    case("vtd-load", Iommu::VTD, load::run, LOAD),
    full(case("vtd-lazy-load", Iommu::VTD_LAZY, load::run, LOAD)),
    alone(case("vtd-differential", Iommu::VTD, differential, "our VT-d beside QEMU's own: random tables, invalidations, accesses")),
    case("own", Iommu::VIRTIO, own::run, "these tests themselves: the same guest with QEMU's own virtio-iommu"),
    case("type1-intel", Iommu::VIRTIO, consumers::type1::intel, "our type1 mirror on the guest's own VFIO, under QEMU's VT-d"),
    case("type1-virtio", Iommu::VIRTIO, consumers::type1::virtio, "the same under QEMU's virtio-iommu"),
    case("type1-amd", Iommu::VIRTIO, consumers::type1::amd, "the same under QEMU's AMD-Vi"),
    case("vhost-user-intel", Iommu::VIRTIO, vhost_user::intel, "our vhost-user back end behind QEMU's VT-d, QEMU the front end"),
    case("vhost-user-virtio", Iommu::VIRTIO, vhost_user::virtio, "the same behind QEMU's virtio-iommu"),
    on_own_kernel(case("iommufd", Iommu::VIRTIO, consumers::iommufd::run, "our iommufd binding on the guest's own iommufd: its mock IOMMU, and a device")),
    on_own_kernel(case("vdpa", Iommu::VIRTIO, consumers::vdpa::run, "our vhost-vDPA mirror on the guest's own simulators of a disk and a card")),
    case("replay", Iommu::VIRTIO, consumers::replay::type1, "a history replayed into the guest's own VFIO, beside the software container"),
    on_own_kernel(case("replay-own", Iommu::VIRTIO, consumers::replay::own, "the same into its own iommufd, and a simulator of vDPA")),
    full(alone(case("vhost-user-dpdk", Iommu::VIRTIO, dpdk::run, "our vhost-user front end, with DPDK's testpmd as the device: no guest"))),
    case("vhost-net", Iommu::VIRTIO, consumers::vhost::net, "our vhost cache on the guest's own vhost-net, to a tap"),
    case("vhost-vsock", Iommu::VIRTIO, consumers::vhost::vsock, "our vhost cache on the guest's own vhost-vsock"),
    case("strict", Iommu::VIRTIO, io::run, IO),
    case("lazy", Iommu::VIRTIO_LAZY, io::run, IO),
    case("vtd-io", Iommu::VTD, io::run, IO),
    case("vtd-lazy-io", Iommu::VTD_LAZY, io::run, IO),
    case("vtd-second-io", Iommu::VTD_SECOND, io::run, IO),
    case("vtd-first-io", Iommu::VTD_FIRST, io::run, IO),
    case("proxy", Iommu::VIRTIO, proxy::run, PROXY),
    case("vtd-proxy", Iommu::VTD, proxy::run, PROXY),
    on_one_kernel(case("proxy-killed", Iommu::VIRTIO, proxy_killed::run, PROXY_KILLED)),
    on_one_kernel(case("proxy-hung", Iommu::VIRTIO, proxy_killed::hung, PROXY_HUNG)),
    full(case("vtd-proxy-hung", Iommu::VTD, proxy_killed::hung, PROXY_HUNG)),
    full(case("vtd-proxy-killed", Iommu::VTD, proxy_killed::run, PROXY_KILLED)),
    on_one_kernel(case("proxy-rust-vmm", Iommu::VIRTIO, rust_vmm::run, PROXY_RUST_VMM)),
    full(case("vtd-proxy-rust-vmm", Iommu::VTD, rust_vmm::run, PROXY_RUST_VMM)),
    case("probe", Iommu::VIRTIO, probe::run, PROBE),
    case("vtd-probe", Iommu::VTD, probe::run, PROBE),
    full(case("vtd-lazy-probe", Iommu::VTD_LAZY, probe::run, PROBE)),
    case("vtd-second-probe", Iommu::VTD_SECOND, probe::run, PROBE),
    case("vtd-first-probe", Iommu::VTD_FIRST, probe::run, PROBE),
    case("passthrough", Iommu::VIRTIO, passthrough::run, "identity domains, and a group that changes from one to the other and back"),
    case("firmware", Iommu::VIRTIO, firmware::run, "the firmware boots from a disk, before any driver"),
    case("hotplug", Iommu::VIRTIO, hotplug::run, HOTPLUG),
    full(case("vtd-hotplug", Iommu::VTD, hotplug::run, HOTPLUG)),
    full(case("vtd-lazy-hotplug", Iommu::VTD_LAZY, hotplug::run, HOTPLUG)),
    case("vtd-second-hotplug", Iommu::VTD_SECOND, hotplug::run, HOTPLUG),
    full(case("vtd-first-hotplug", Iommu::VTD_FIRST, hotplug::run, HOTPLUG)),
    case("reboot", Iommu::VIRTIO, reboot::run, REBOOT),
    case("vtd-reboot", Iommu::VTD, reboot::run, REBOOT),
    full(case("vtd-lazy-reboot", Iommu::VTD_LAZY, reboot::run, REBOOT)),
    case("refusals", Iommu::VIRTIO, refusals::run, "more mappings are asked for than there may be"),
    case("killed", Iommu::VIRTIO, killed::run, "the server is killed amid writes, and serves again"),
];

fn differential(run: &Run<'_>) -> anyhow::Result<String> {
    let (seed, cases) = run.lab.seeds;
    crate::differential::run(&run.lab.parts.qemu, &run.folder, seed, cases)
}

/// What the guests run, by name.
pub(crate) const SCRIPTS: [(&str, &str); 11] = [
    ("bench", include_str!("../bench/bench.sh")),
    ("consumers", include_str!("consumers.sh")),
    ("hotplug", include_str!("hotplug.sh")),
    ("io", include_str!("io.sh")),
    ("load", include_str!("load.sh")),
    ("probe", include_str!("probe.sh")),
    ("proxy-killed", include_str!("proxy_killed.sh")),
    ("reboot", include_str!("reboot.sh")),
    ("rust-vmm", include_str!("rust_vmm.sh")),
    ("switch", include_str!("switch.sh")),
    ("vhost-user", include_str!("vhost_user.sh")),
];

/// An option that puts a device behind the IOMMU.
fn endpoint(address: &str, device: &str) -> [String; 2] {
    ["--endpoint".to_owned(), format!("{address}={device}")]
}

/// The same for a disk.
fn blk(address: &str, image: &std::path::Path) -> [String; 2] {
    endpoint(address, &format!("blk:{}", image.display()))
}
