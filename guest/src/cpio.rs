//! Writes a cpio archive in the "newc" form, as the kernel reads it for its first file system.

use std::collections::BTreeSet;

/// An archive in the making. Folders above what is added are made by themselves.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: BTreeSet<String>,
}

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    /// Adds an empty folder, unless it is there.
    pub(crate) fn folder(&mut self, path: &str) {
        self.folders_above(path);
        if self.folders.insert(path.to_owned()) {
            self.entry(path, FOLDER, &[], (0, 0));
        }
    }

    /// Adds a file that can be read.
    pub(crate) fn file(&mut self, path: &str, bytes: &[u8]) {
        self.folders_above(path);
        self.entry(path, FILE, bytes, (0, 0));
    }

    /// Adds a file that can be run.
    pub(crate) fn program(&mut self, path: &str, bytes: &[u8]) {
        self.folders_above(path);
        self.entry(path, PROGRAM, bytes, (0, 0));
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, to: &str) {
        self.folders_above(path);
        self.entry(path, LINK, to.as_bytes(), (0, 0));
    }

    /// Adds a character device.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.folders_above(path);
        self.entry(path, CHARACTER_DEVICE, &[], (major, minor));
    }

    /// The archive's bytes.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        self.pad(512);
        self.bytes
    }

    fn folders_above(&mut self, path: &str) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.folder(above);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, bytes: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let length = |count: usize| u32::try_from(count).expect("an archive of less than 4 GiB");
        let fields = [
            self.entries,
            mode,
            0, // user
            0, // group
            1, // links
            0, // time
            length(bytes.len()),
            0, // device that it is on
            0,
            device.0,
            device.1,
            length(path.len() + 1),
            0, // checksum, which this form does not use
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad(4);
        self.bytes.extend_from_slice(bytes);
        self.pad(4);
    }

    fn pad(&mut self, to: usize) {
        let length = self.bytes.len().next_multiple_of(to);
        self.bytes.resize(length, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_above_a_file_come_first_and_once() {
        let mut archive = Archive::default();
        archive.file("a/b/one", b"1");
        archive.program("a/b/two", b"22");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        let names = names(&bytes);
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/b/two", "TRAILER!!!"]);
    }

    /// Walks the archive as the kernel does.
    fn names(mut bytes: &[u8]) -> Vec<String> {
        let mut names = Vec::new();
        while bytes.starts_with(b"070701") {
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * index..14 + 8 * index]).expect("digits");
                usize::from_str_radix(text, 16).expect("hexadecimal digits")
            };
            let (size, length) = (field(6), field(11));
            names.push(String::from_utf8_lossy(&bytes[110..110 + length - 1]).into_owned());
            let data = (110 + length).next_multiple_of(4);
            bytes = &bytes[(data + size).next_multiple_of(4)..];
        }
        names
    }
}
