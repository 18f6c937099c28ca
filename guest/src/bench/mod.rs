//! Figures: the same guest and work behind viommu, behind QEMU's own virtio-iommu, and behind no IOMMU at all.

mod stamps;
mod stats;
mod table;

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, bail, ensure};

use self::stats::Median;
use crate::{
    Options,
    iommu::Iommu,
    lab,
    lab::Run,
    server::Server,
    vm::{Config, Vm, expect},
};

/// Where the disk is.
const BLK: &str = "00:02.0";

/// MiB of the disk.
const DISK: usize = 32;

/// Requests each way of 4 KiB and of 64 KiB.
const SMALL: u64 = 1000;
const LARGE: u64 = 400;

/// How long a machine may live: this is for machines with other work, too.
const LIMIT: Duration = Duration::from_secs(240);

/// What is timed in each boot.
const WORK: [&str; 4] = ["read 4096", "write 4096", "read 65536", "write 65536"];

/// Who offers the disk, and what is before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Devices {
    Ours,
    OursBare,
    Qemu,
    QemuBare,
}

/// One of the set-ups that are compared.
#[derive(Debug)]
struct Setup {
    name: &'static str,
    about: &'static str,
    devices: Devices,
    strict: bool,
}

const A_STRICT: usize = 0;
const A_LAZY: usize = 1;
const B_STRICT: usize = 2;
const B_LAZY: usize = 3;
const C: usize = 4;
const D: usize = 5;

/// In the order in which a round runs them, by the numbers above.
const SETUPS: [Setup; 6] = [
    setup("a strict", "viommu serve over vfio-user", Devices::Ours, true),
    setup("a lazy", "viommu serve over vfio-user", Devices::Ours, false),
    setup("b strict", "QEMU's virtio-iommu and virtio-blk", Devices::Qemu, true),
    setup("b lazy", "QEMU's virtio-iommu and virtio-blk", Devices::Qemu, false),
    setup("c", "viommu serve --no-iommu over vfio-user", Devices::OursBare, true),
    setup("d", "QEMU's virtio-blk without an IOMMU", Devices::QemuBare, true),
];

const fn setup(name: &'static str, about: &'static str, devices: Devices, strict: bool) -> Setup {
    Setup { name, about, devices, strict }
}

/// What one boot gave.
#[derive(Debug, Default)]
struct Boot {
    /// Microseconds of a request, for each of [`WORK`].
    micros: [f64; WORK.len()],
    /// Requests of 4 KiB, those before the timed ones too.
    small: u64,
    /// Requests of the IOMMU of ours in that time, by the time of their answer, MAPs and UNMAPs.
    classes: Vec<u64>,
    maps: u64,
    unmaps: u64,
    /// Bytes of QEMU's own output when the requests of 4 KiB began and ended.
    log: (usize, usize),
    clock: String,
}

/// What was measured.
struct Figures {
    qemu: String,
    kernel: String,
    /// The system's load at the start and at the end.
    load: [String; 2],
    /// Of each of [`SETUPS`], of each round.
    boots: [Vec<Boot>; SETUPS.len()],
    inside: Inside,
}

/// Times inside the processes for the IOMMU's requests of the strict mode's 4 KiB phase.
struct Inside {
    ours: Ours,
    qemu: anyhow::Result<Qemu>,
}

/// Ours, over all rounds.
struct Ours {
    /// MAPs and UNMAPs for each request of the disk.
    maps: f64,
    unmaps: f64,
    /// Of one MAP or UNMAP, in microseconds.
    median: Option<Median>,
    /// Of all of them for one request of the disk.
    sum: Option<Median>,
    classes: Vec<u64>,
}

/// QEMU's own, of two boots: in the second, each request writes one line more to the trace.
struct Qemu {
    /// MAPs, UNMAPs, and all requests, for each request of the disk.
    maps: f64,
    unmaps: f64,
    requests: f64,
    /// The share of kicks that had more than one request, and are not timed.
    several: f64,
    one_line: stamps::Times,
    two_lines: stamps::Times,
}

impl Qemu {
    /// What is left without lines, for all requests of one of the disk: as the two boots have it, the smaller first.
    fn estimates(&self) -> (f64, f64) {
        let (one, two) = (self.one_line.left * self.requests, self.two_lines.left * self.requests);
        (one.min(two), one.max(two))
    }

    /// The same with the lines of the first boot.
    fn most(&self) -> f64 {
        self.one_line.traced * self.requests
    }
}

/// Measures and prints.
///
/// # Errors
///
/// If a machine fails, or the figures cannot be written.
pub(crate) fn run(options: &Options, runs: u32) -> anyhow::Result<()> {
    ensure!(runs > 0, "no runs, no figures");
    let (lab, _alone) = lab::open(options)?;
    let index = match &options.kernel[..] {
        [] => lab.parts.kernels.len().checked_sub(1),
        [name] => lab.parts.kernels.iter().position(|kernel| kernel.release.starts_with(name.as_str())),
        _ => bail!("one kernel at a time"),
    };
    let index = index.with_context(|| format!("no such kernel; there are {}", lab.releases()))?;
    let run = lab.run("bench", index, Iommu::VIRTIO)?;
    let before = load();
    let mut boots = [const { Vec::new() }; SETUPS.len()];
    for round in 1..=runs {
        for (setup, boots) in SETUPS.iter().zip(&mut boots) {
            let boot = boot(&run, setup, &[]).with_context(|| format!("{}, round {round}", setup.name))?;
            eprintln!("{round}/{runs} {:<9}{:8.1?} us", setup.name, boot.micros);
            boots.push(boot);
        }
    }
    let ours = ours(&boots[A_STRICT]);
    let inside = Inside { ours, qemu: qemu(&run) };
    let figures = Figures {
        qemu: lab.parts.qemu.version()?,
        kernel: run.kernel.release.clone(),
        load: [before, load()],
        boots,
        inside,
    };
    print!("{}", table::text(&figures));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&table::json(&figures))? + "\n";
        fs::write(path, text).with_context(|| path.display().to_string())?;
    }
    let _ = fs::remove_dir_all(&run.folder);
    Ok(())
}

/// Starts one set-up's machine and lets it work.
fn boot(run: &Run<'_>, setup: &Setup, further: &[String]) -> anyhow::Result<Boot> {
    let name = setup.name.replace(' ', "-");
    let image = run.folder.join("disk.img");
    fill(&image)?;
    let mut config = Config::new("bench")
        .append(&format!("iommu.strict={} blk={BLK} small={SMALL} large={LARGE}", u8::from(setup.strict)));
    config.limit = LIMIT;
    let config = config.arguments(further.iter().cloned());
    let (server, mut vm) = match setup.devices {
        Devices::Ours | Devices::OursBare => {
            let mut options = vec!["--endpoint".to_owned(), format!("{BLK}=blk:{}", image.display())];
            options.extend((setup.devices == Devices::OursBare).then(|| "--no-iommu".to_owned()));
            let server = run.serve(&options, &format!("{name}-server"))?;
            let vm = run.start_with(&server, config, &name)?;
            (Some(server), vm)
        }
        Devices::Qemu => (
            None,
            run.start(
                &config
                    .arguments(["-device", "virtio-iommu-pci,addr=1"])
                    .arguments(disk(&image, ",iommu_platform=on")),
                &name,
            )?,
        ),
        Devices::QemuBare => (None, run.start(&config.arguments(disk(&image, "")), &name)?),
    };
    let boot = work(setup, server.as_ref(), &mut vm)?;
    server.map_or(Ok(()), Server::stop)?;
    Ok(boot)
}

/// QEMU's own disk.
fn disk(image: &Path, further: &str) -> [String; 4] {
    [
        "-drive".to_owned(),
        format!("file={},if=none,id=disk,format=raw,cache=writeback,aio=threads", image.display()),
        "-device".to_owned(),
        format!("virtio-blk-pci,drive=disk,addr=2,disable-legacy=on{further}"),
    ]
}

/// Leads a machine through its work.
fn work(setup: &Setup, server: Option<&Server>, vm: &mut Vm) -> anyhow::Result<Boot> {
    let server = server.filter(|_| setup.devices == Devices::Ours);
    let mut boot = Boot::default();
    vm.wait("READY")?;
    let before = server.map(Server::status).transpose()?;
    boot.log.0 = vm.log().len();
    vm.tell("go")?;
    vm.wait("SMALL")?;
    let after = server.map(Server::status).transpose()?;
    boot.log.1 = vm.log().len();
    vm.tell("go")?;
    vm.wait("DONE")?;
    vm.wait_end()?;

    let group = match (setup.devices, setup.strict) {
        (Devices::OursBare | Devices::QemuBare, _) => None,
        (_, true) => Some("DMA".to_owned()),
        (_, false) => Some("DMA-FQ".to_owned()),
    };
    expect("the disk's group", vm.said_lines("GROUP").pop(), group)?;
    boot.clock = vm.said_lines("CLOCK").pop().unwrap_or_default();
    let lines = vm.said_lines("TIMED");
    for (work, micros) in WORK.iter().zip(&mut boot.micros) {
        let line = lines.iter().find_map(|line| line.strip_prefix(&format!("{work} ")));
        let line = line.with_context(|| format!("the guest has not timed {work}: {lines:?}"))?;
        let numbers: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let [all, count, nanos] = numbers[..] else { bail!("{line:?} is not what the guest says") };
        *micros = nanos as f64 / 1e3 / count as f64;
        boot.small += if work.ends_with(" 4096") { all } else { 0 };
    }
    if let (Some(before), Some(after)) = (before, after) {
        let difference = |kind| after.answers(kind).0.saturating_sub(before.answers(kind).0);
        (boot.maps, boot.unmaps) = (difference("MAP"), difference("UNMAP"));
        let pairs = after.request_times()?.into_iter().zip(before.request_times()?);
        boot.classes = pairs.map(|(after, before)| after.saturating_sub(before)).collect();
        expect("faults", after.faults()?, 0)?;
    }
    Ok(boot)
}

fn ours(boots: &[Boot]) -> Ours {
    let sum = |of: fn(&Boot) -> u64| boots.iter().map(of).sum::<u64>() as f64;
    let small = sum(|boot| boot.small);
    let (maps, unmaps) = (sum(|boot| boot.maps) / small, sum(|boot| boot.unmaps) / small);
    let mut classes = Vec::new();
    for boot in boots {
        classes.resize(classes.len().max(boot.classes.len()), 0);
        for (class, count) in classes.iter_mut().zip(&boot.classes) {
            *class += count;
        }
    }
    let median = Median::of(&classes).map(|median| median.times(1e-3));
    let sum = median.map(|median| median.times(maps + unmaps));
    Ours { maps, unmaps, median, sum, classes }
}

/// Two boots with traces.
fn qemu(run: &Run<'_>) -> anyhow::Result<Qemu> {
    let setup = &SETUPS[B_STRICT];
    let kicks = |more| {
        let boot = boot(run, setup, &stamps::options(more))?;
        let path = run.folder.join(format!("{}.qemu.log", setup.name.replace(' ', "-")));
        let log = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        anyhow::Ok((stamps::kicks(&log, boot.log.0, boot.log.1)?, boot.small as f64))
    };
    let (less, small) = kicks(false)?;
    let (more, small_more) = kicks(true)?;
    let (single, several) = (less.single.len() as f64, less.several as f64);
    Ok(Qemu {
        maps: more.maps as f64 / small_more,
        unmaps: more.unmaps as f64 / small_more,
        requests: less.requests as f64 / small,
        several: several / (single + several),
        one_line: less.times(1.0).context("no kick of one request")?,
        two_lines: more.times(2.0).context("no kick of one request")?,
    })
}

/// Writes the whole disk, so that no request meets a hole, and all of it is in the page cache.
fn fill(image: &Path) -> anyhow::Result<()> {
    fs::write(image, vec![0xa5; DISK << 20]).with_context(|| image.display().to_string())
}

/// The load of the last minute.
fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("unknown").to_owned()
}
