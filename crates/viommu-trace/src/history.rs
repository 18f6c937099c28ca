//! A history that is read: recognised by its content, handed out entry by entry.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::compression::{MEMORY, decompress};
use crate::error::{Place, ReadError, Stop};
use crate::event::Entry;
use crate::format::{HEADER, MAGIC, MAJOR, MINOR, OwnReader};
use crate::input::{Counting, Input, Progress};
use crate::linux::{self, Attribution, LinuxReader};
use crate::passed_over::PassedOver;
use crate::qemu::{self, QemuReader};

/// How much of an input is looked at to find out what it is, in bytes.
const LOOK: usize = 256 * 1024;

/// What a history is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Format {
    /// The log of QEMU's `-trace`.
    QemuLog,
    /// viommu's own format.
    Viommu,
    /// Linux tracepoint text.
    LinuxTrace,
}

impl Format {
    /// `qemu-log`, `viommu` or `linux-trace`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::QemuLog => "qemu-log",
            Self::Viommu => "viommu",
            Self::LinuxTrace => "linux-trace",
        }
    }
}

impl core::fmt::Display for Format {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

enum Reader {
    Qemu(QemuReader),
    Own(Box<OwnReader>),
    Linux(Box<LinuxReader>),
}

/// A history, read as it is asked for. Memory does not depend on its length.
///
/// ```no_run
/// # fn main() -> Result<(), viommu_trace::ReadError> {
/// let mut history = viommu_trace::History::open("qemu.log.xz")?;
/// while let Some(entry) = history.next()? {
///     println!("{}: {:?}", entry.line, entry.event);
/// }
/// # Ok(())
/// # }
/// ```
pub struct History {
    source: String,
    total: Option<u64>,
    progress: Progress,
    input: Input,
    reader: Reader,
    passed: PassedOver,
    failed: bool,
}

impl History {
    /// Opens a file, or standard input for `-`, plain or compressed (.xz, .zst, .gz), and finds out by its content
    /// what it is.
    ///
    /// # Errors
    /// [`ReadError::Io`], [`ReadError::Empty`], [`ReadError::Unrecognised`], [`ReadError::Version`], or
    /// [`ReadError::Corrupt`] where not even the beginning can be decompressed.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ReadError> {
        let path = path.as_ref();
        if path == Path::new("-") {
            return Self::begin(Box::new(io::stdin()), "-".to_owned(), None, MEMORY);
        }
        let source = path.display().to_string();
        let opened = File::open(path).and_then(|file| Ok((file.metadata()?, file)));
        match opened {
            Ok((meta, file)) => {
                let total = meta.is_file().then_some(meta.len());
                Self::begin(Box::new(file), source, total, MEMORY)
            }
            Err(error) => Err(ReadError::Io { source_name: source, error }),
        }
    }

    /// Reads from `reader`; `source` is what errors call it. The reader need not be buffered.
    ///
    /// # Errors
    /// As [`History::open`].
    pub fn from_reader(
        reader: impl Read + Send + 'static,
        source: impl Into<String>,
    ) -> Result<Self, ReadError> {
        Self::begin(Box::new(reader), source.into(), None, MEMORY)
    }

    pub(crate) fn begin(
        reader: Box<dyn Read + Send>,
        source: String,
        total: Option<u64>,
        memory: u64,
    ) -> Result<Self, ReadError> {
        let progress = Progress::default();
        let counting = Box::new(Counting::new(reader, progress.clone()));
        let plain = match decompress(counting, memory) {
            Ok(plain) => plain,
            Err(error) => return Err(ReadError::Io { source_name: source, error }),
        };
        let mut input = Input::new(plain, progress.clone());
        let reader = match recognise(&mut input) {
            Ok(reader) => reader,
            Err(Unknown::Stop(stop)) => return Err(stop.of(&source)),
            Err(Unknown::Empty) => return Err(ReadError::Empty { source_name: source }),
            Err(Unknown::Format) => return Err(ReadError::Unrecognised { source_name: source }),
            Err(Unknown::Version(major, minor)) => {
                return Err(ReadError::Version { source_name: source, major, minor });
            }
        };
        Ok(Self { source, total, progress, input, reader, passed: PassedOver::default(), failed: false })
    }

    /// The next entry; `None` at the end, and ever after an error.
    ///
    /// # Errors
    /// [`ReadError::Corrupt`] at a malformed line of a known event, at damaged or cut-off data, and at a last line
    /// without its end; [`ReadError::Io`]. Everything before the place of the error has been handed out.
    #[expect(clippy::should_implement_trait, reason = "an error ends it, which an iterator does not say")]
    #[inline]
    pub fn next(&mut self) -> Result<Option<Entry>, ReadError> {
        if self.failed {
            return Ok(None);
        }
        let got = match &mut self.reader {
            Reader::Own(own) => own.next(&mut self.input, &mut self.passed),
            Reader::Qemu(qemu) => qemu.next(&mut self.input, &mut self.passed),
            Reader::Linux(linux) => linux.next(&mut self.input, &mut self.passed),
        };
        got.map_err(|stop| {
            self.failed = true;
            stop.of(&self.source)
        })
    }

    /// What the history is written in.
    #[must_use]
    pub fn format(&self) -> Format {
        match self.reader {
            Reader::Qemu(_) => Format::QemuLog,
            Reader::Own(_) => Format::Viommu,
            Reader::Linux(_) => Format::LinuxTrace,
        }
    }

    /// The path, `-`, or what [`History::from_reader`] was told.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Lines of the uncompressed input read so far; records for viommu's own format.
    #[must_use]
    pub fn lines(&self) -> u64 {
        match &self.reader {
            Reader::Own(own) => own.records(),
            _ => self.input.lines(),
        }
    }

    /// Lines and records that hold no event of this crate, so far.
    #[must_use]
    pub fn passed_over(&self) -> &PassedOver {
        &self.passed
    }

    /// How much of Linux trace text could be attributed so far; `None` for other formats.
    #[must_use]
    pub fn attribution(&self) -> Option<Attribution> {
        match &self.reader {
            Reader::Linux(linux) => Some(linux.attribution()),
            _ => None,
        }
    }

    /// Bytes of the file itself (compressed, if it is) read so far.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.progress.bytes_read()
    }

    /// Bytes of the file itself in all; `None` for standard input and readers.
    #[must_use]
    pub fn total_bytes(&self) -> Option<u64> {
        self.total
    }

    /// A handle that tells [`History::bytes_read`] on another thread.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.progress.clone()
    }
}

impl core::fmt::Debug for History {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("History")
            .field("source", &self.source)
            .field("format", &self.format())
            .field("lines", &self.lines())
            .finish_non_exhaustive()
    }
}

enum Unknown {
    Stop(Stop),
    Empty,
    Format,
    Version(u8, u8),
}

fn recognise(input: &mut Input) -> Result<Reader, Unknown> {
    let whole = input.want(HEADER);
    let head = input.window();
    if let Some(rest) = head.strip_prefix(MAGIC) {
        return match *rest {
            [major, minor, ..] if major != MAJOR => Err(Unknown::Version(major, minor)),
            [_, minor, flags, ..] if whole => {
                if minor == MINOR && flags > crate::format::HAS_LINES {
                    return Err(Unknown::Stop(Stop::byte(9, "flags that this version does not define")));
                }
                Ok(Reader::Own(Box::new(OwnReader::new(input, flags))))
            }
            _ => Err(Unknown::Stop(
                input
                    .trouble(Place::Byte(0))
                    .unwrap_or_else(|| Stop::byte(0, "the file is cut off in its header")),
            )),
        };
    }
    if head.is_empty() {
        return Err(input.trouble(Place::Byte(0)).map_or(Unknown::Empty, Unknown::Stop));
    }
    let mut from = 0;
    loop {
        while let Some(len) = memchr::memchr(b'\n', input.window().get(from..).unwrap_or_default()) {
            let line = input.window().get(from..from + len).unwrap_or_default();
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if qemu::recognises(line) {
                return Ok(Reader::Qemu(QemuReader::default()));
            }
            if linux::recognises(line) {
                return Ok(Reader::Linux(Box::default()));
            }
            from += len + 1;
        }
        if from > LOOK || input.window().len() > 2 * LOOK || !input.more() {
            break;
        }
    }
    if let Some(stop) = input.trouble(Place::Line(1)) {
        return Err(Unknown::Stop(stop));
    }
    // A single line that was cut off may still tell what it is.
    let rest = input.window().get(from..).unwrap_or_default();
    if qemu::recognises(rest) {
        return Ok(Reader::Qemu(QemuReader::default()));
    }
    if linux::recognises(rest) {
        return Ok(Reader::Linux(Box::default()));
    }
    if input.window().iter().all(u8::is_ascii_whitespace) {
        Err(Unknown::Empty)
    } else {
        Err(Unknown::Format)
    }
}
