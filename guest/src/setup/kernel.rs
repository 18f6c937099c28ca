//! A guest kernel: its image, unpacked, and its modules.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

use crate::vmlinux;

/// A kernel with its modules.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// The first two numbers of its release: 6.12.
    pub(crate) name: String,
    /// The whole: 6.12.107+deb13-amd64.
    pub(crate) release: String,
    /// The image as it is in the package.
    pub(crate) image: PathBuf,
    /// The image as an ELF file, which QEMU starts without the guest's having to unpack it.
    pub(crate) vmlinux: PathBuf,
    /// The folder with modules.builtin and kernel/.
    pub(crate) modules: PathBuf,
}

impl Kernel {
    /// Finds the kernel in the folder of an unpacked package; its image's unpacked form is kept in `cache`.
    ///
    /// # Errors
    ///
    /// If the folder has no image or no modules, or the image is of a kind unknown.
    pub(super) fn open(folder: &Path, cache: &Path) -> anyhow::Result<Kernel> {
        let modules = subfolder(folder, &["usr/lib/modules", "lib/modules"])
            .with_context(|| format!("{}: no lib/modules/RELEASE in it", folder.display()))?;
        let release = modules.file_name().context("a folder without a name")?.to_string_lossy().into_owned();
        let places = [modules.join("vmlinuz"), folder.join("boot").join(format!("vmlinuz-{release}"))];
        let Some(image) = places.iter().find(|place| place.is_file()) else {
            bail!("{}: no image of kernel {release}", folder.display());
        };
        let vmlinux = cache.join(format!("vmlinux-{release}"));
        if !is_newer(&vmlinux, image) {
            let packed = fs::read(image).with_context(|| image.display().to_string())?;
            let unpacked = vmlinux::unpack(&packed).with_context(|| format!("kernel {release}"))?;
            let part = cache.join(format!("vmlinux-{release}.part"));
            fs::write(&part, unpacked).with_context(|| part.display().to_string())?;
            fs::rename(&part, &vmlinux)?;
        }
        let name: Vec<&str> = release.splitn(3, ['.', '-', '+']).take(2).collect();
        Ok(Kernel { name: name.join("."), release: release.clone(), image: image.clone(), vmlinux, modules })
    }
}

/// The last of the folders below the first of `places` that is there.
fn subfolder(folder: &Path, places: &[&str]) -> Option<PathBuf> {
    let entries = places.iter().find_map(|place| fs::read_dir(folder.join(place)).ok())?;
    let mut folders: Vec<PathBuf> =
        entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders.pop()
}

/// Whether `file` was written after `than`.
fn is_newer(file: &Path, than: &Path) -> bool {
    // Unpacking keeps a package's times, which are old: the image's own change of status would not do better.
    let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified());
    matches!((time(file), time(than)), (Ok(file), Ok(than)) if file >= than)
}
