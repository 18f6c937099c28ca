//! From the options to a plan in which everything has been looked at.

use core::ops::RangeInclusive;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use viommu::endpoint::{Region, RegionKind};
use viommu::{Iova, IovaRange};
use viommu_virtio::viot::Bdf;
use viommu_vtd::Stage;

use super::args::{Serve, Switch};
use super::device::{Kind, SUN_PATH};
use super::qemu;

/// Bytes: what reserved regions and apertures are made of, and the smallest page there can be.
const PAGE: u64 = 4096;
/// Bytes: what the guest's memory is made of.
const MEBI: u64 = 1 << 20;
/// Where x86 devices write interrupts.
const X86_MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// Regions that the properties of an endpoint have room for: 24 bytes each, 64 KiB in all.
const REGIONS: usize = 2730;

/// An option that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OptionError {
    option: &'static str,
    value: String,
    why: String,
}

impl core::fmt::Display for OptionError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let Self { option, value, why } = self;
        if value.is_empty() { write!(f, "{option}: {why}") } else { write!(f, "{option} {value}: {why}") }
    }
}

impl std::error::Error for OptionError {}

pub(super) fn refused(option: &'static str, value: impl ToString, why: impl ToString) -> OptionError {
    OptionError { option, value: value.to_string(), why: why.to_string() }
}

/// What is to be served.
#[derive(Clone, Debug)]
pub(crate) struct ServePlan {
    /// Absolute, UTF-8, and there.
    pub(crate) socket_dir: PathBuf,
    /// `None`: devices reach all of memory.
    pub(crate) iommu: Option<IommuPlan>,
    /// The devices that are there from the start: by address, each address once, none the IOMMU's.
    pub(crate) devices: Vec<Device>,
    /// Where devices may be plugged in: ascending, no two overlap, and none meets a device or the IOMMU.
    pub(crate) hotplug: Vec<RangeInclusive<Bdf>>,
    /// Where the history goes.
    pub(crate) record: Option<PathBuf>,
    /// Bytes of guest memory, for the command line that is printed: whole MiB.
    pub(crate) memory: u64,
    /// Takes memory that its owner can shrink.
    pub(crate) allow_unsealed_memory: bool,
    /// Without an IOMMU: devices say that they are behind one.
    pub(crate) access_platform: bool,
}

/// The IOMMU.
#[derive(Clone, Debug)]
pub(crate) struct IommuPlan {
    /// Its own function.
    pub(crate) address: Bdf,
    /// What it is.
    pub(crate) model: Model,
    /// What endpoints that are attached to nothing see at first: all of memory, or nothing.
    pub(crate) bypass: bool,
    /// One bit for each size; the smallest is of 4 KiB or more.
    pub(crate) page_size_mask: u64,
    /// Of each endpoint: ascending, disjoint, whole pages, at most one for interrupts.
    pub(crate) regions: Vec<Region>,
    /// What can be mapped: whole pages of the smallest size.
    pub(crate) input_range: IovaRange,
    /// The most mappings in all domains.
    pub(crate) max_mappings: Option<u64>,
    /// The most domains.
    pub(crate) max_domains: Option<usize>,
}

/// What an IOMMU is to its driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Model {
    /// A virtio-iommu.
    Virtio,
    /// An Intel VT-d unit.
    Vtd(VtdPlan),
}

/// An Intel VT-d unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VtdPlan {
    /// Whether the driver announces new entries.
    pub(crate) caching_mode: bool,
    /// Scalable mode, with tables of that stage; `None`: legacy mode.
    pub(crate) scalable: Option<Stage>,
    /// Where firmware puts the registers, if that is known.
    pub(crate) base: Option<u64>,
}

impl VtdPlan {
    /// What the unit offers.
    pub(crate) fn config(&self) -> viommu_vtd::Config {
        viommu_vtd::Config {
            caching_mode: self.caching_mode,
            scalable: self.scalable,
            host_bits: super::viot::HOST_BITS.into(),
            ..viommu_vtd::Config::default()
        }
    }
}

impl core::fmt::Display for Model {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::Virtio => "virtio-iommu",
            Self::Vtd(_) => "vtd",
        })
    }
}

impl Model {
    /// Reads `BDF`, or `vtd@BDF` with options.
    fn parse(text: &str) -> Result<(Self, Bdf), String> {
        let address = |text: &str| text.parse().map_err(|why| format!("{why}"));
        let Some(rest) = text.strip_prefix("vtd@") else { return Ok((Self::Virtio, address(text)?)) };
        let mut parts = rest.split(',');
        let at = address(parts.next().unwrap_or_default())?;
        let mut plan = VtdPlan { caching_mode: true, scalable: None, base: None };
        for part in parts {
            match part.split_once('=') {
                Some(("caching-mode", "on")) => plan.caching_mode = true,
                Some(("caching-mode", "off")) => plan.caching_mode = false,
                Some(("scalable", "second-stage")) => plan.scalable = Some(Stage::Second),
                Some(("scalable", "first-stage")) => plan.scalable = Some(Stage::First),
                Some(("base", base)) => {
                    let base = self::address(base).filter(|base| *base != 0 && base.is_multiple_of(PAGE));
                    plan.base = Some(base.ok_or("base=ADDRESS must be a multiple of 4096")?);
                }
                _ => {
                    return Err(format!(
                        "{part:?} is no option of vtd: caching-mode=on|off, scalable=second-stage|first-stage and \
                         base=ADDRESS are"
                    ));
                }
            }
        }
        Ok((Self::Vtd(plan), at))
    }
}

impl IommuPlan {
    /// Bytes of the properties of an endpoint: with room for its regions.
    pub(crate) fn probe_size(&self) -> u32 {
        const LEAST: u32 = 512;
        u32::try_from(self.regions.len().saturating_mul(24)).map_or(LEAST, |bytes| bytes.max(LEAST))
    }
}

/// A device behind the IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    /// Its PCI function, whose number is the endpoint's.
    pub(crate) address: Bdf,
    /// What it is.
    pub(crate) kind: Kind,
}

impl ServePlan {
    /// Looks at all options, and makes the directory of the sockets.
    ///
    /// # Errors
    /// The first option that cannot be taken. The directory comes last, so nothing has been made.
    pub(crate) fn new(args: &Serve) -> Result<Self, OptionError> {
        let iommu = if args.no_iommu { None } else { Some(iommu_plan(args)?) };
        let (devices, hotplug) = endpoints(&args.endpoints, iommu.as_ref().map(|iommu| iommu.address))?;
        let named = hotplug.iter().find(|range| range.start().bus() == 0);
        if let (Some(IommuPlan { model: Model::Vtd(_), .. }), Some(range)) = (&iommu, named) {
            let (first, last) = (range.start(), range.end());
            let why =
                "a VT-d unit's table names root ports, with all that comes behind them: use bus 01 and up";
            return Err(refused("--endpoint", format!("{first}-{last}=hotplug"), why));
        }
        if iommu.is_none() && devices.is_empty() && hotplug.is_empty() {
            return Err(refused("--no-iommu", "", "there is no --endpoint, so there is nothing to serve"));
        }
        let memory = size(&args.memory).filter(|bytes| *bytes != 0 && bytes.is_multiple_of(MEBI));
        let why = "a size in whole MiB is expected, such as 512M or 2G";
        let memory = memory.ok_or_else(|| refused("--memory", &args.memory, why))?;
        if let Some(record) = &args.record {
            check_record(record)?;
        }
        let plan = Self {
            socket_dir: PathBuf::new(),
            iommu,
            devices,
            hotplug,
            record: args.record.clone(),
            memory,
            allow_unsealed_memory: args.allow_unsealed_memory,
            access_platform: args.access_platform,
        };
        for Device { address, kind } in &plan.devices {
            if let Some(why) = plan.cannot_serve(kind) {
                return Err(refused("--endpoint", format!("{address}={kind}"), why));
            }
        }
        qemu::check(&plan)?;
        Ok(Self { socket_dir: socket_dir(&args.socket_dir)?, ..plan })
    }

    /// The IOMMU's socket.
    pub(crate) fn iommu_socket(&self) -> PathBuf {
        self.socket_dir.join("iommu.sock")
    }

    /// The socket of the device at that address.
    pub(crate) fn socket(&self, address: Bdf) -> PathBuf {
        self.socket_dir.join(format!("{}.sock", file_name(address)))
    }

    /// Where the live state is asked for.
    pub(crate) fn control_socket(&self) -> PathBuf {
        control_socket(&self.socket_dir)
    }

    /// The ACPI table that tells the guest which functions are behind the IOMMU.
    pub(crate) fn viot_file(&self) -> PathBuf {
        self.socket_dir.join("viot.bin")
    }

    /// The ACPI table that tells the guest of the IOMMU that there is.
    pub(crate) fn table_file(&self) -> PathBuf {
        match &self.iommu {
            Some(IommuPlan { model: Model::Vtd(_), .. }) => self.socket_dir.join("dmar.bin"),
            _ => self.viot_file(),
        }
    }

    /// Why that device cannot be behind this IOMMU, if so.
    pub(crate) fn cannot_serve(&self, kind: &Kind) -> Option<&'static str> {
        let Some(IommuPlan { model: Model::Vtd(vtd), .. }) = &self.iommu else { return None };
        match (kind.mirrors() && !vtd.config().announces(), vtd.caching_mode) {
            (false, _) => None,
            (true, true) => Some(
                "in first-stage tables a driver does not say what it maps, and the device's process must be told",
            ),
            (true, false) => Some(
                "without caching mode a driver does not say what it maps, and the device's process must be told",
            ),
        }
    }

    /// Whether a device may be plugged in there.
    pub(crate) fn takes_hotplug(&self, address: Bdf) -> bool {
        self.hotplug.iter().any(|range| range.contains(&address))
    }

    /// Whether more than one function of that slot is there, or may come.
    pub(crate) fn shares_slot(&self, address: Bdf) -> bool {
        let slot = |bdf: Bdf| bdf.0 >> 3;
        let fixed = self.devices.iter().map(|device| device.address);
        let fixed = fixed.chain(self.iommu.as_ref().map(|iommu| iommu.address));
        let others = fixed.filter(|other| slot(*other) == slot(address) && *other != address).count();
        let plugged = self.hotplug.iter().any(|range| {
            let (first, last) = (Bdf(address.0 & !7), Bdf(address.0 | 7));
            let first = first.max(*range.start());
            let last = last.min(*range.end());
            first < last || (first == last && first != address)
        });
        others != 0 || plugged
    }
}

/// The control socket of whoever serves in `directory`.
pub(crate) fn control_socket(directory: &Path) -> PathBuf {
    directory.join("control.sock")
}

/// An address as it is in file names: `00-02.0`.
pub(crate) fn file_name(address: Bdf) -> String {
    address.to_string().replace(':', "-")
}

fn iommu_plan(args: &Serve) -> Result<IommuPlan, OptionError> {
    let (model, address) = Model::parse(&args.iommu).map_err(|why| refused("--iommu", &args.iommu, why))?;
    if model != Model::Virtio {
        let of_virtio = [
            ("--bypass", args.bypass == Switch::Off),
            ("--page-sizes", args.page_sizes.is_some()),
            ("--aperture", args.aperture.is_some()),
            ("--reserved", !args.reserved.is_empty()),
        ];
        if let Some((option, _)) = of_virtio.into_iter().find(|(_, given)| *given) {
            return Err(refused(option, "", "it is an option of the virtio-iommu"));
        }
        if let (Model::Vtd(vtd), Some(record)) = (&model, &args.record)
            && !vtd.config().announces()
        {
            let place = if vtd.caching_mode { "in first-stage tables" } else { "without caching mode" };
            let why = format!("{place} a driver does not say what it maps, so there is nothing to record");
            return Err(refused("--record", record.display(), why));
        }
    }
    if let Some(why) = not_free(address) {
        return Err(refused("--iommu", &args.iommu, why));
    }
    if address.bus() != 0 {
        // What is behind a root port comes after what is not, and the IOMMU must be there before its endpoints.
        return Err(refused("--iommu", &args.iommu, "the IOMMU must be on bus 00"));
    }
    if address.function() != 0 {
        let why = "the IOMMU must be function 0 of its device, since a guest looks there first";
        return Err(refused("--iommu", &args.iommu, why));
    }
    let page_size_mask = match &args.page_sizes {
        None => !(PAGE - 1),
        Some(list) => page_sizes(list).map_err(|why| refused("--page-sizes", list, why))?,
    };
    let granule = page_size_mask & page_size_mask.wrapping_neg();
    let input_range = match &args.aperture {
        None => IovaRange::ALL,
        Some(text) => aperture(text, granule).map_err(|why| refused("--aperture", text, why))?,
    };
    Ok(IommuPlan {
        address,
        model,
        bypass: args.bypass == Switch::On,
        page_size_mask,
        regions: regions(&args.reserved)?,
        input_range,
        max_mappings: args.max_mappings.map(Into::into),
        max_domains: args.max_domains.map(Into::into),
    })
}

/// Why the machine itself needs that address, if it does.
fn not_free(address: Bdf) -> Option<&'static str> {
    match (address.bus(), address.device()) {
        (0, 0) => Some("that is the host bridge"),
        (0, 0x1f) => Some("that is the machine's chip set (ISA bridge, SATA, SMBus)"),
        _ => None,
    }
}

type Endpoints = (Vec<Device>, Vec<RangeInclusive<Bdf>>);

fn endpoints(options: &[String], iommu: Option<Bdf>) -> Result<Endpoints, OptionError> {
    const OPTION: &str = "--endpoint";
    let mut devices: Vec<Device> = Vec::new();
    let mut hotplug: Vec<RangeInclusive<Bdf>> = Vec::new();
    for text in options {
        let wrong = |why: String| refused(OPTION, text, why);
        let expected = || wrong("BDF=DEVICE or FIRST-LAST=hotplug is expected".into());
        let (place, what) = text.split_once('=').ok_or_else(expected)?;
        let parse = |text: &str| text.parse::<Bdf>().map_err(|why| wrong(why.to_string()));
        let (first, last) = match place.split_once('-') {
            Some((first, last)) => (parse(first)?, parse(last)?),
            None => (parse(place)?, parse(place)?),
        };
        if last < first {
            return Err(wrong(format!("{last} is before {first}")));
        }
        let range = first..=last;
        // A range may lie over what is the machine's, but for one that is nothing else.
        if let (Some(why), true) = (not_free(first), first.0 >> 3 == last.0 >> 3) {
            return Err(wrong(why.into()));
        }
        if iommu.is_some_and(|iommu| range.contains(&iommu)) {
            return Err(wrong("the IOMMU itself is there".into()));
        }
        let taken = devices.iter().find(|device| range.contains(&device.address));
        if let Some(taken) = taken {
            return Err(wrong(format!("there is a device at {} already", taken.address)));
        }
        let overlaps = |other: &&RangeInclusive<Bdf>| first <= *other.end() && *other.start() <= last;
        if let Some(other) = hotplug.iter().find(overlaps) {
            return Err(wrong(format!("it meets {}-{}=hotplug", other.start(), other.end())));
        }
        if what == "hotplug" {
            hotplug.push(range);
            continue;
        }
        if first != last {
            return Err(wrong("a range of addresses can only be for hotplug".into()));
        }
        if let Some(why) = behind_a_port(first) {
            return Err(wrong(why));
        }
        let kind = Kind::parse(what).map_err(wrong)?;
        kind.check().map_err(wrong)?;
        let kind = kind.absolute().map_err(wrong)?;
        devices.push(Device { address: first, kind });
    }
    devices.sort_by_key(|device| device.address);
    hotplug.sort_by_key(|range| *range.start());
    let alone = devices.iter().find(|device| {
        let first = Bdf(device.address.0 & !7);
        device.address != first
            && iommu != Some(first)
            && devices.binary_search_by_key(&first, |device| device.address).is_err()
    });
    if let Some(Device { address, kind }) = alone {
        let first = Bdf(address.0 & !7);
        let why = format!("a guest looks at {first} before it looks at {address}, and nothing is there");
        return Err(refused(OPTION, format!("{address}={kind}"), why));
    }
    Ok((devices, hotplug))
}

/// Why nothing can be there, if so: behind a root port (on bus 01 and up) there is one device.
pub(crate) fn behind_a_port(address: Bdf) -> Option<String> {
    (address.bus() != 0 && address.device() != 0)
        .then(|| format!("bus {:02x} is behind a root port, where there is device 00 alone", address.bus()))
}

/// A number of bytes, with K, M, G or T behind it or not.
fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..)? {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        _ => return None,
    };
    // parse takes a sign.
    let number: u64 = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())??;
    number.checked_mul(1 << shift)
}

fn page_sizes(list: &str) -> Result<u64, String> {
    list.split(',').try_fold(0, |mask, text| {
        let bytes = size(text).filter(|bytes| bytes.is_power_of_two() && *bytes >= PAGE);
        let why = || format!("{text:?} is no size of a page: a power of two from 4K on is expected");
        Ok(mask | bytes.ok_or_else(why)?)
    })
}

fn address(text: &str) -> Option<u64> {
    let hex = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (digits, radix) = hex.map_or((text, 10), |digits| (digits, 16));
    // from_str_radix takes a sign.
    let are_digits = digits.chars().all(|c| c.is_digit(radix));
    are_digits.then(|| u64::from_str_radix(digits, radix).ok()).flatten()
}

fn range(text: &str, page: u64) -> Result<IovaRange, String> {
    let ends = text.split_once('-').and_then(|(start, last)| Some((address(start)?, address(last)?)));
    let (start, last) = ends.ok_or("START-END is expected, such as 0x1000-0x1fff")?;
    let range = IovaRange::new(Iova(start), Iova(last)).ok_or("it ends before it starts")?;
    if !range.is_aligned(page) {
        return Err(format!("it is not made of pages of {page:#x} bytes (its end is inclusive)"));
    }
    Ok(range)
}

fn aperture(text: &str, granule: u64) -> Result<IovaRange, String> {
    range(text, granule)
}

fn regions(options: &[String]) -> Result<Vec<Region>, OptionError> {
    const OPTION: &str = "--reserved";
    let mut regions = Vec::new();
    if !options.iter().any(|text| text == "none") {
        let range = IovaRange::new(Iova(X86_MSI.0), Iova(X86_MSI.1));
        regions.extend(range.map(|range| Region { range, kind: RegionKind::Msi }));
    }
    for text in options.iter().filter(|text| *text != "none") {
        let (place, kind) = text
            .split_once(':')
            .ok_or_else(|| refused(OPTION, text, "START-END:msi or START-END:reserved is expected"))?;
        let kind = match kind {
            "msi" => RegionKind::Msi,
            "reserved" => RegionKind::Reserved,
            _ => {
                let why = format!("{kind:?} is no kind of region: msi and reserved are");
                return Err(refused(OPTION, text, why));
            }
        };
        let range = range(place, PAGE).map_err(|why| refused(OPTION, text, why))?;
        regions.push(Region { range, kind });
        let mut others = regions.iter().rev().skip(1);
        if let Some(other) = others.clone().find(|other| other.range.overlaps(range)) {
            let (start, last) = (other.range.start(), other.range.last());
            let why = format!("it meets {start}-{last} (`--reserved none` takes x86's interrupts away)");
            return Err(refused(OPTION, text, why));
        }
        if kind == RegionKind::Msi && others.any(|other| other.kind == RegionKind::Msi) {
            let why = "one region for interrupts is there already (`--reserved none` takes x86's away)";
            return Err(refused(OPTION, text, why));
        }
        if regions.len() > REGIONS {
            return Err(refused(OPTION, text, format!("there are {REGIONS} regions at most")));
        }
    }
    regions.sort_by_key(|region| region.range);
    Ok(regions)
}

fn check_record(file: &Path) -> Result<(), OptionError> {
    let wrong = |why: &str| Err(refused("--record", file.display(), why));
    if file.is_dir() {
        return wrong("it is a directory");
    }
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => {
            wrong("its directory is not there")
        }
        None => wrong("a file is expected"),
        _ => Ok(()),
    }
}

fn socket_dir(directory: &Path) -> Result<PathBuf, OptionError> {
    let wrong = |why: String| refused("--socket-dir", directory.display(), why);
    let absolute = std::path::absolute(directory).map_err(|why| wrong(why.to_string()))?;
    if absolute.to_str().is_none() {
        return Err(wrong("it must be UTF-8, to be written into a command line".into()));
    }
    // Both kinds of names are of this length.
    let longest = absolute.join(format!("{}.sock", file_name(Bdf::MAX))).as_os_str().len();
    if longest >= SUN_PATH {
        let room = absolute.as_os_str().len().saturating_sub(longest.saturating_sub(SUN_PATH - 1));
        let why = format!(
            "it has {} bytes as an absolute path, and paths of sockets have room for {room}",
            absolute.as_os_str().len()
        );
        return Err(wrong(why));
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&absolute);
    made.map_err(|why| wrong(format!("it cannot be made: {why}")))?;
    Ok(absolute)
}

#[cfg(test)]
pub(crate) mod tests;
