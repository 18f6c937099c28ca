//! What QEMU is to be told: its command line, and the QMP lines for devices that come and go later.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use viommu_virtio::viot::Bdf;

use super::options::{Model, OptionError, ServePlan, file_name, refused};

/// Functions of a PCI device.
const FUNCTIONS: u8 = 8;

/// Where the root ports are: bus to function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ports(BTreeMap<u8, Bdf>);

impl Ports {
    /// A port for each bus up to the last that is named, since firmware numbers buses in the order of the ports'
    /// addresses; in the last slots of bus 00 that nothing else needs, so that the user's own devices find the first.
    fn of(plan: &ServePlan) -> Result<Self, OptionError> {
        let fixed = plan.devices.iter().map(|device| device.address);
        let last =
            fixed.chain(plan.hotplug.iter().map(|range| *range.end())).map(Bdf::bus).max().unwrap_or(0);
        // 00 is the host bridge, 1f the chip set.
        let mut free: Vec<u8> = (1..0x1f).filter(|slot| !is_taken(plan, *slot)).collect();
        let slots = usize::from(last.div_ceil(FUNCTIONS));
        let spare = free.len().checked_sub(slots).ok_or_else(|| {
            let why =
                format!("it takes {last} root ports, and {} slots are left on bus 00 for 8 each", free.len());
            refused("--endpoint", format!("on bus {last:02x}"), why)
        })?;
        let places = free
            .split_off(spare)
            .into_iter()
            .flat_map(|slot| (0..FUNCTIONS).filter_map(move |function| Bdf::new(0, slot, function)));
        Ok(Self((1..=last).zip(places).collect()))
    }

    fn arguments(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(bus, at)| {
            let multifunction = if at.function() == 0 && self.0.len() > 1 { ",multifunction=on" } else { "" };
            format!(
                "pcie-root-port,id={},bus=pcie.0,addr={}{multifunction},chassis={bus},slot={bus}",
                port(*bus),
                slot_and_function(*at)
            )
        })
    }
}

fn is_taken(plan: &ServePlan, slot: u8) -> bool {
    let ends = Bdf::new(0, slot, 0).zip(Bdf::new(0, slot, 7));
    ends.is_none_or(|(first, last)| {
        let inside = |address: Bdf| (first..=last).contains(&address);
        plan.iommu.as_ref().is_some_and(|iommu| inside(iommu.address))
            || plan.devices.iter().any(|device| inside(device.address))
            || plan.hotplug.iter().any(|range| *range.start() <= last && first <= *range.end())
    })
}

/// Whether there is a machine that has all the buses that are named.
///
/// # Errors
/// There are too many.
pub(crate) fn check(plan: &ServePlan) -> Result<(), OptionError> {
    Ports::of(plan).map(drop)
}

/// The root port that has that bus behind it, in the machine that is printed.
pub(crate) fn port_of(plan: &ServePlan, bus: u8) -> Option<Bdf> {
    Ports::of(plan).ok()?.0.get(&bus).copied()
}

fn port(bus: u8) -> String {
    format!("port{bus:02x}")
}

fn slot_and_function(address: Bdf) -> String {
    format!("{:x}.{}", address.device(), address.function())
}

/// QEMU's name for the device at that address.
fn id(address: Bdf) -> String {
    format!("vfu-{}", file_name(address))
}

/// The `device_add` arguments of the function at that address.
fn device(plan: &ServePlan, address: Bdf, socket: &std::path::Path) -> Value {
    let bus = if address.bus() == 0 { "pcie.0".into() } else { port(address.bus()) };
    let mut device = json!({
        "driver": "vfio-user-pci",
        "id": id(address),
        "bus": bus,
        "addr": slot_and_function(address),
        // It is UTF-8: the plan has looked.
        "socket": { "type": "unix", "path": socket.to_string_lossy() },
    });
    if let (true, Some(fields)) = (plan.shares_slot(address), device.as_object_mut()) {
        fields.insert("multifunction".into(), true.into());
    }
    device
}

/// QEMU's arguments, without its own name and without what the guest boots. `accelerators` are tried in their order.
///
/// # Errors
/// As [`check`].
pub(crate) fn arguments(plan: &ServePlan, accelerators: &[&str]) -> Result<Vec<String>, OptionError> {
    let ports = Ports::of(plan)?;
    let mebibytes = plan.memory >> 20;
    let mut all: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
    add("-M", "q35".into());
    accelerators.iter().for_each(|name| add("-accel", (*name).to_owned()));
    add("-m", format!("{mebibytes}M"));
    // Guest memory must be shared: its descriptors go over the sockets.
    add("-object", format!("memory-backend-memfd,id=ram,size={mebibytes}M,share=on"));
    add("-machine", "memory-backend=ram".into());
    if plan.iommu.is_some() {
        add("-acpitable", format!("file={}", commas(&plan.table_file())));
    }
    // Without QEMU's own display and network card, which would take the first slots.
    all.extend(["-nodefaults".to_owned()]);
    let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
    ports.arguments().for_each(|port| add("-device", port));
    let iommu = plan.iommu.as_ref().map(|iommu| device(plan, iommu.address, &plan.iommu_socket()));
    let devices = plan.devices.iter().map(|one| device(plan, one.address, &plan.socket(one.address)));
    iommu.into_iter().chain(devices).for_each(|device| add("-device", device.to_string()));
    if !plan.hotplug.is_empty() {
        let socket = plan.socket_dir.join("qmp.sock");
        add("-qmp", format!("unix:{},server=on,wait=off", commas(&socket)));
    }
    Ok(all)
}

/// A path inside an option of QEMU, where commas are written twice.
fn commas(path: &std::path::Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The command line to paste: what stands in capitals at its end is the user's.
///
/// # Errors
/// As [`check`].
pub(crate) fn command_line(plan: &ServePlan) -> Result<String, OptionError> {
    let vtd = plan.iommu.as_ref().and_then(|iommu| match &iommu.model {
        Model::Virtio => None,
        Model::Vtd(vtd) => Some(vtd),
    });
    let mut text = String::new();
    if vtd.is_some_and(|vtd| vtd.base.is_none()) {
        // Its table must say where firmware puts the registers.
        let directory = quoted(&plan.socket_dir.to_string_lossy());
        text = format!("viommu boot --socket-dir {directory} -- \\\n");
    }
    text.push_str("qemu-system-x86_64");
    let words = if vtd.is_some() { "console=ttyS0 intel_iommu=on" } else { "console=ttyS0" };
    let mut all = arguments(plan, &["kvm", "tcg"])?;
    all.extend(["-display", "none", "-serial", "mon:stdio"].map(str::to_owned));
    all.extend(["-kernel", "KERNEL", "-initrd", "INITRD", "-append", words].map(str::to_owned));
    for argument in &all {
        // An option begins a line.
        text.push_str(if argument.starts_with('-') { " \\\n  " } else { " " });
        text.push_str(&quoted(argument));
    }
    Ok(text)
}

/// Places of `--endpoint FIRST-LAST=hotplug` where QEMU's q35 takes no device while it runs.
pub(crate) fn not_pluggable(plan: &ServePlan) -> Option<String> {
    let range = plan.hotplug.iter().find(|range| range.start().bus() == 0)?;
    let (first, last) = (range.start(), range.end());
    Some(format!("{first}-{last}: QEMU's q35 takes no device on bus 00 while it runs; use bus 01 and up"))
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// The QMP line that plugs in the function at that address.
pub(crate) fn device_add(plan: &ServePlan, address: Bdf) -> String {
    json!({ "execute": "device_add", "arguments": device(plan, address, &plan.socket(address)) }).to_string()
}

/// The QMP line that takes it away.
pub(crate) fn device_del(address: Bdf) -> String {
    json!({ "execute": "device_del", "arguments": { "id": id(address) } }).to_string()
}

#[cfg(test)]
mod tests;
