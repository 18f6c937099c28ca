//! Those who hold a copy, on a guest kernel's own interfaces: the program `inside` has the record and the mirrors, the
//! guest's kernel is their host, and the IOMMU that it programs is one of QEMU's own.

pub(super) mod iommufd;
pub(super) mod replay;
pub(super) mod type1;
pub(super) mod vdpa;
pub(super) mod vhost;

use std::time::Duration;

use crate::{
    lab::Run,
    vm::{Config, LIMIT, Vm},
};

/// One of QEMU's own IOMMUs, as the guest's kernel takes it for mirrors: strict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    Intel,
    Virtio,
    Amd,
}

impl Unit {
    /// As it is called in the names of files.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Intel => "intel",
            Self::Virtio => "virtio",
            Self::Amd => "amd",
        }
    }

    fn device(self) -> &'static str {
        match self {
            Self::Intel => "intel-iommu,caching-mode=on",
            Self::Virtio => "virtio-iommu-pci,addr=1",
            Self::Amd => "amd-iommu,dma-remap=on",
        }
    }

    /// Words of the kernel's command line.
    fn words(self) -> &'static str {
        match self {
            Self::Intel => "intel_iommu=on iommu.strict=1",
            Self::Virtio | Self::Amd => "iommu.strict=1",
        }
    }

    /// The module of its driver, where that is not built in.
    fn module(self) -> &'static [&'static str] {
        match self {
            Self::Virtio => &["virtio_iommu"],
            Self::Intel | Self::Amd => &[],
        }
    }
}

/// What a guest runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Program<'a> {
    /// The IOMMU of its machine.
    pub(super) unit: Unit,
    /// Processors of the machine.
    pub(super) processors: u32,
    /// QEMU's arguments for the devices.
    pub(super) devices: &'a [&'a str],
    /// The kernel's modules that are loaded: each must be among those of `initramfs`.
    pub(super) modules: &'a [&'a str],
    /// Addresses of the devices that are handed to vfio-pci: 00:04.0.
    pub(super) vfio: &'a [&'a str],
    /// The words for `inside`: a subcommand and what it is told. None has a space or a comma.
    pub(super) words: &'a [&'a str],
}

impl Program<'_> {
    /// Starts a machine that runs it. The guest says what `inside` prints, then DONE; it fails where `inside` does.
    ///
    /// # Errors
    ///
    /// If QEMU cannot be started.
    pub(super) fn start(&self, run: &Run<'_>) -> anyhow::Result<Vm> {
        run.start(&self.config(), self.unit.name())
    }

    /// The machine that runs it.
    fn config(&self) -> Config {
        let modules = [self.unit.module(), self.modules].concat();
        let append = format!(
            "{} modules={} vfio={} words={}",
            self.unit.words(),
            modules.join(","),
            self.vfio.join(","),
            self.words.join(",")
        );
        let config = Config::new("consumers").append(&append);
        let processors = self.processors;
        let config = Config { limit: LIMIT + Duration::from_secs(60), processors, ..config };
        config.arguments(["-device", self.unit.device()]).arguments(self.devices.iter().copied())
    }

    /// Runs it to its end.
    ///
    /// # Errors
    ///
    /// If the guest fails, or its time is up.
    pub(super) fn run(&self, run: &Run<'_>) -> anyhow::Result<Vm> {
        let mut vm = self.start(run)?;
        vm.wait("DONE")?;
        vm.wait_end()?;
        Ok(vm)
    }
}
