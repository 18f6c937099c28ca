//! What a device behind the IOMMU is: `blk:FILE[,ro][,queues=N]`, `rng`, `proxy:SOCKET`.

use core::fmt;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

/// The most queues of a disk.
const QUEUES: u16 = 64;
/// Bytes: what a disk is made of.
const SECTOR: u64 = 512;
/// Bytes of a socket's path that the kernel takes (`sun_path`), with the NUL at its end.
pub(super) const SUN_PATH: usize = 108;

/// A device, not made yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// virtio-blk.
    Blk {
        /// A raw image.
        file: PathBuf,
        /// The guest cannot write.
        read_only: bool,
        /// Request queues.
        queues: u16,
    },
    /// virtio-rng.
    Rng,
    /// Another process's, over vfio-user.
    Proxy {
        /// Where that process listens.
        socket: PathBuf,
    },
}

impl Kind {
    /// Reads what `Display` writes.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once(':').map_or((text, None), |(name, rest)| (name, Some(rest)));
        match (name, rest) {
            ("rng", None) => Ok(Self::Rng),
            ("rng", Some(_)) => Err("rng takes nothing more".into()),
            ("blk", Some(rest)) => Self::blk(rest),
            ("blk", None) => Err("a disk needs its image: blk:FILE".into()),
            ("proxy", Some(socket)) if !socket.is_empty() => Ok(Self::Proxy { socket: socket.into() }),
            ("proxy", _) => Err("a proxy needs the socket of its device: proxy:SOCKET".into()),
            _ => Err(format!("{name:?} is no device: blk:FILE[,ro][,queues=N], rng and proxy:SOCKET are")),
        }
    }

    fn blk(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let file = parts.next().unwrap_or_default();
        if file.is_empty() {
            return Err("a disk needs its image: blk:FILE".into());
        }
        let (mut read_only, mut queues) = (false, 1);
        for part in parts {
            match part.split_once('=') {
                None if part == "ro" => read_only = true,
                Some(("queues", count)) => {
                    let count = count.parse().ok().filter(|count| (1..=QUEUES).contains(count));
                    queues = count.ok_or_else(|| format!("queues must be 1 to {QUEUES}"))?;
                }
                _ => {
                    return Err(format!(
                        "{part:?} is no option of a disk: ro and queues=N are (the file's name ends at the first comma)"
                    ));
                }
            }
        }
        Ok(Self::Blk { file: file.into(), read_only, queues })
    }

    /// The same, with a path that does not depend on the working directory.
    ///
    /// # Errors
    /// There is no working directory.
    pub(crate) fn absolute(self) -> Result<Self, String> {
        let absolute =
            |file: PathBuf| std::path::absolute(&file).map_err(|why| format!("{}: {why}", file.display()));
        match self {
            Self::Blk { file, read_only, queues } => {
                Ok(Self::Blk { file: absolute(file)?, read_only, queues })
            }
            Self::Rng => Ok(self),
            Self::Proxy { socket } => Ok(Self::Proxy { socket: absolute(socket)? }),
        }
    }

    /// Whether it can be made now.
    ///
    /// # Errors
    /// A disk whose image cannot be opened as it must be, or is none; a proxy's socket that is something else. One that is not
    /// there yet may come.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Blk { file, read_only, .. } => {
                check_image(file, *read_only).map_err(|why| format!("{}: {why}", file.display()))
            }
            Self::Rng => Ok(()),
            Self::Proxy { socket } => {
                check_socket(socket).map_err(|why| format!("{}: {why}", socket.display()))
            }
        }
    }

    /// Whether what the guest maps must be known, so that another process can be told.
    pub(crate) fn mirrors(&self) -> bool {
        matches!(self, Self::Proxy { .. })
    }
}

fn check_socket(socket: &Path) -> Result<(), String> {
    use std::os::unix::fs::FileTypeExt;
    let bytes = std::path::absolute(socket).map_err(|why| why.to_string())?.as_os_str().len();
    if bytes >= SUN_PATH {
        return Err(format!("it has {bytes} bytes, and paths of sockets have room for {}", SUN_PATH - 1));
    }
    match std::fs::metadata(socket) {
        Ok(found) if !found.file_type().is_socket() => Err("it is no socket".into()),
        Ok(_) => Ok(()),
        Err(why) if why.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(why) => Err(why.to_string()),
    }
}

fn check_image(file: &Path, read_only: bool) -> Result<(), String> {
    // Asked before it is opened: opening a FIFO waits.
    let kind = std::fs::metadata(file).map_err(|why| why.to_string())?.file_type();
    if kind.is_dir() {
        return Err("it is a directory".into());
    }
    let mut opened = OpenOptions::new();
    opened.read(true).write(!read_only);
    if !kind.is_file() {
        use std::os::unix::fs::FileTypeExt;
        if !kind.is_block_device() {
            return Err("it is neither a file nor a block device".into());
        }
        return opened.open(file).map(drop).map_err(|why| why.to_string());
    }
    let opened = opened.open(file).map_err(|why| match why.kind() {
        std::io::ErrorKind::PermissionDenied if !read_only => format!("{why} (`,ro` needs less)"),
        _ => why.to_string(),
    })?;
    let bytes = opened.metadata().map_err(|why| why.to_string())?.len();
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
        return Err(format!("it has {bytes} bytes: a disk is made of sectors of {SECTOR}"));
    }
    Ok(())
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blk { file, read_only, queues } => {
                write!(f, "blk:{}", file.display())?;
                if *read_only {
                    f.write_str(",ro")?;
                }
                if *queues != 1 {
                    write!(f, ",queues={queues}")?;
                }
                Ok(())
            }
            Self::Rng => f.write_str("rng"),
            Self::Proxy { socket } => write!(f, "proxy:{}", socket.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_reads_what_display_writes() {
        for text in [
            "rng",
            "proxy:/run/a b,c:1",
            "blk:disk.img",
            "blk:/a b:c,ro",
            "blk:x,queues=4",
            "blk:x,ro,queues=64",
        ] {
            assert_eq!(Kind::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn parse_of_no_device_says_what_is_wrong() {
        for (text, why) in [
            ("", "is no device"),
            ("net:tap=x", "\"net\" is no device"),
            ("rng:x", "nothing more"),
            ("proxy", "needs the socket"),
            ("proxy:", "needs the socket"),
            ("blk", "needs its image"),
            ("blk:", "needs its image"),
            ("blk:,ro", "needs its image"),
            ("blk:x,rw", "\"rw\" is no option"),
            ("blk:x,queues=0", "1 to 64"),
            ("blk:x,queues=65", "1 to 64"),
            ("blk:x,queues", "\"queues\" is no option"),
        ] {
            let said = Kind::parse(text).unwrap_err();
            assert!(said.contains(why), "{text:?}: {said}");
        }
    }

    #[test]
    fn check_of_a_proxys_socket_wants_one_or_nothing_there() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| Kind::Proxy { socket: directory.path().join(name) };
        assert_eq!(at("later").check(), Ok(()));
        std::fs::write(directory.path().join("file"), "").unwrap();
        assert!(at("file").check().unwrap_err().contains("no socket"));
        assert!(at("file/below").check().is_err());
        assert!(at(&"x".repeat(100)).check().unwrap_err().contains("room for 107"));
        let _listener = std::os::unix::net::UnixListener::bind(directory.path().join("socket")).unwrap();
        assert_eq!(at("socket").check(), Ok(()));
    }

    #[test]
    fn check_of_an_image_that_is_none_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let blk =
            |name: &str| Kind::parse(&format!("blk:{}", directory.path().join(name).display())).unwrap();
        let refused = |name: &str| blk(name).check().unwrap_err();
        assert!(refused("missing").contains("No such file"), "{}", refused("missing"));
        assert!(refused(".").contains("directory"));
        std::fs::write(directory.path().join("short"), [0; 700]).unwrap();
        assert!(refused("short").contains("700 bytes"));
        std::fs::write(directory.path().join("empty"), []).unwrap();
        assert!(refused("empty").contains("0 bytes"));
        std::fs::write(directory.path().join("disk"), [0; 1024]).unwrap();
        assert_eq!(blk("disk").check(), Ok(()));
        let null = Kind::Blk { file: "/dev/null".into(), read_only: false, queues: 1 };
        assert!(null.check().unwrap_err().contains("neither"));
    }
}
