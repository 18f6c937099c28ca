//! Kernel modules with what they depend on, in the order to load them, by what each says of itself: packages do not
//! hold the list that depmod makes.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};

/// The modules of one kernel.
pub(crate) struct Modules {
    files: HashMap<String, PathBuf>,
    /// Some packages do not tell: what is not there is then taken for built in.
    builtin: Option<BTreeSet<String>>,
    read: BTreeMap<String, Vec<u8>>,
}

impl Modules {
    /// Looks through a kernel's folder, /lib/modules/RELEASE.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(crate) fn open(folder: &Path) -> anyhow::Result<Modules> {
        let mut modules = Modules { files: HashMap::new(), builtin: None, read: BTreeMap::new() };
        if let Ok(list) = fs::read_to_string(folder.join("modules.builtin")) {
            modules.builtin = Some(list.lines().filter_map(|line| module_name(Path::new(line))).collect());
        }
        let mut folders = vec![folder.join("kernel")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    modules.files.insert(name, entry.path());
                }
            }
        }
        Ok(modules)
    }

    /// What to load, in order, so that `name` is loaded: nothing, if it is built in.
    ///
    /// # Errors
    ///
    /// If there is no such module, or it cannot be read.
    pub(crate) fn order(&mut self, name: &str) -> anyhow::Result<Vec<String>> {
        let mut order = Vec::new();
        self.add(&normal(name), &mut order, true)?;
        Ok(order)
    }

    /// The modules that [`Modules::order`] has named, unpacked.
    pub(crate) fn read(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.read.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    fn add(&mut self, name: &str, order: &mut Vec<String>, needed: bool) -> anyhow::Result<()> {
        if order.iter().any(|module| module == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            // A soft dependency may be an alias, or of a kernel that is built otherwise.
            let missing = needed && self.builtin.as_ref().is_some_and(|builtin| !builtin.contains(name));
            ensure!(!missing, "the kernel has no module {name}");
            return Ok(());
        };
        if !self.read.contains_key(name) {
            let bytes = unpacked(path).with_context(|| path.display().to_string())?;
            self.read.insert(name.to_owned(), bytes);
        }
        let bytes = self.read.get(name).map_or(&[][..], Vec::as_slice);
        let hard = says(bytes, "depends=");
        let soft: Vec<String> = says(bytes, "softdep=pre: ");
        for other in hard {
            self.add(&other, order, true)?;
        }
        for other in soft {
            // An algorithm's plainest form is in a module of this name.
            let generic = format!("{}_generic", other.strip_prefix("crypto_").unwrap_or(&other));
            let other = if self.files.contains_key(&generic) { &generic } else { &other };
            self.add(other, order, false)?;
        }
        order.push(name.to_owned());
        Ok(())
    }
}

/// The words that a module gives for `key`, names brought to one form.
fn says(module: &[u8], key: &str) -> Vec<String> {
    // Strings of the form key=value, each with a zero before and after it.
    let key = format!("\0{key}");
    let Some(at) = memchr::memmem::find(module, key.as_bytes()) else {
        return Vec::new();
    };
    let value = &module[at + key.len()..];
    let value = &value[..memchr::memchr(0, value).unwrap_or(value.len())];
    let value = String::from_utf8_lossy(value);
    value
        .split([',', ' '])
        .take_while(|word| *word != "post:")
        .filter(|word| !word.is_empty())
        .map(normal)
        .collect()
}

/// A file's name without .ko, .ko.xz or .ko.zst; none, if it is no module.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let name = name.strip_suffix(".xz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    name.strip_suffix(".ko").map(normal)
}

/// The kernel takes `-` and `_` for the same.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn unpacked(path: &Path) -> anyhow::Result<Vec<u8>> {
    let packed = fs::read(path)?;
    let mut bytes = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => {
            lzma_rust2::XzReader::new(&packed[..], true).read_to_end(&mut bytes)?;
        }
        Some("zst") => {
            ruzstd::decoding::StreamingDecoder::new(&packed[..])?.read_to_end(&mut bytes)?;
        }
        _ => return Ok(packed),
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_puts_what_is_needed_first_and_leaves_out_what_is_built_in() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a folder above")).expect("to be made");
            fs::write(path, text).expect("to be written");
        };
        write("modules.builtin", "kernel/lib/crc16.ko\n");
        write(
            "kernel/fs/ext4.ko",
            "x\0depends=jbd2,crc16\0softdep=pre: crypto-crc32c aes post: other\0license=GPL\0",
        );
        write("kernel/fs/jbd2.ko", "x\0depends=\0");
        write("kernel/lib/crc32c_generic.ko", "\0depends=\0");
        let mut modules = Modules::open(folder.path()).expect("a folder of modules");
        assert_eq!(modules.order("ext4").expect("all there"), ["jbd2", "crc32c_generic", "ext4"]);
        assert_eq!(modules.order("crc16").expect("built in"), [""; 0]);
        assert!(modules.order("nowhere").is_err());
        assert_eq!(modules.read().count(), 3);
    }

    #[test]
    fn order_without_a_list_takes_what_is_not_there_for_built_in() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("kernel")).expect("to be made");
        let mut modules = Modules::open(folder.path()).expect("a folder of modules");
        assert_eq!(modules.order("ext4").expect("no list"), [""; 0]);
    }
}
