//! Bytes and lines of a possibly compressed input, with bounded memory.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Place, Stop};

/// The longest line that is taken for a line, in bytes.
pub const MAX_LINE: usize = 64 * 1024;

const CHUNK: usize = 256 * 1024;

/// Bytes read so far from the file itself, compressed or not. Can be asked from any thread.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    bytes: AtomicU64,
    failed: AtomicBool,
}

impl Progress {
    /// Bytes read so far from the file.
    #[must_use]
    pub fn bytes_read(&self) -> u64 {
        self.0.bytes.load(Ordering::Relaxed)
    }

    /// Whether the file itself failed, as opposed to what decompresses it.
    fn failed(&self) -> bool {
        self.0.failed.load(Ordering::Relaxed)
    }
}

/// Counts what passes.
pub(crate) struct Counting<R> {
    inner: R,
    progress: Progress,
}

impl<R> Counting<R> {
    pub(crate) fn new(inner: R, progress: Progress) -> Self {
        Self { inner, progress }
    }
}

impl<R: Read> Read for Counting<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buf) {
            Ok(n) => {
                self.progress.0.bytes.fetch_add(n as u64, Ordering::Relaxed);
                Ok(n)
            }
            Err(error) => {
                if error.kind() != io::ErrorKind::Interrupted {
                    self.progress.0.failed.store(true, Ordering::Relaxed);
                }
                Err(error)
            }
        }
    }
}

/// What the input ran into.
#[derive(Debug)]
enum End {
    /// Its regular end.
    Eof,
    /// The file could not be read.
    Io(io::Error),
    /// What the file holds cannot be decompressed.
    Damaged(String),
}

/// A window on the uncompressed input.
pub(crate) struct Input {
    source: Box<dyn Read + Send>,
    progress: Progress,
    buf: Vec<u8>,
    pos: usize,
    end: usize,
    /// Of the byte at `pos`, in the uncompressed input.
    offset: u64,
    /// The lines taken so far.
    lines: u64,
    ended: Option<End>,
}

impl Input {
    pub(crate) fn new(source: Box<dyn Read + Send>, progress: Progress) -> Self {
        Self { source, progress, buf: vec![0; CHUNK], pos: 0, end: 0, offset: 0, lines: 0, ended: None }
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    pub(crate) fn lines(&self) -> u64 {
        self.lines
    }

    /// What can be looked at without reading more.
    pub(crate) fn window(&self) -> &[u8] {
        self.buf.get(self.pos..self.end).unwrap_or_default()
    }

    /// Reads once; `false` when there is no more.
    pub(crate) fn more(&mut self) -> bool {
        if self.ended.is_some() {
            return false;
        }
        if self.end == self.buf.len() {
            if self.pos > 0 {
                self.buf.copy_within(self.pos..self.end, 0);
                self.end -= self.pos;
                self.pos = 0;
            } else {
                self.buf.resize(self.buf.len() + CHUNK, 0);
            }
        }
        loop {
            let room = self.buf.get_mut(self.end..).unwrap_or_default();
            match self.source.read(room) {
                Ok(0) => self.ended = Some(End::Eof),
                Ok(n) => {
                    self.end += n;
                    return true;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if self.progress.failed() => self.ended = Some(End::Io(error)),
                Err(error) => self.ended = Some(End::Damaged(error.to_string())),
            }
            return false;
        }
    }

    /// Reads until `bytes` can be looked at, or there is no more. The caller bounds `bytes`.
    pub(crate) fn want(&mut self, bytes: usize) -> bool {
        while self.end - self.pos < bytes {
            if !self.more() {
                return false;
            }
        }
        true
    }

    /// Goes past `bytes` bytes of the window.
    pub(crate) fn skip(&mut self, bytes: usize) {
        let bytes = bytes.min(self.end - self.pos);
        self.pos += bytes;
        self.offset += bytes as u64;
    }

    /// Why there is no more, as an error at `place`; `None` at the regular end.
    pub(crate) fn trouble(&mut self, place: Place) -> Option<Stop> {
        match self.ended.replace(End::Eof) {
            None | Some(End::Eof) => None,
            Some(End::Io(error)) => Some(Stop::Io(error)),
            Some(End::Damaged(reason)) => {
                Some(Stop::Corrupt(place, format!("the compressed data cannot be read on: {reason}")))
            }
        }
    }

    /// The next line with its number, without its end; `None` at the regular end of the input.
    pub(crate) fn line(&mut self) -> Result<Option<(u64, &[u8])>, Stop> {
        let mut seen = 0;
        let len = loop {
            let window = self.buf.get(self.pos..self.end).unwrap_or_default();
            let fresh = window.get(seen..).unwrap_or_default();
            if let Some(at) = memchr::memchr(b'\n', fresh) {
                break seen + at;
            }
            seen = window.len();
            let line = self.lines + 1;
            if seen > MAX_LINE {
                break seen;
            }
            if !self.more() {
                if let Some(stop) = self.trouble(Place::Line(line)) {
                    return Err(stop);
                }
                if seen > 0 {
                    return Err(Stop::line(line, "the input ends inside this line"));
                }
                return Ok(None);
            }
        };
        if len > MAX_LINE {
            return Err(Stop::line(self.lines + 1, format!("a line of more than {MAX_LINE} bytes")));
        }
        let start = self.pos;
        self.skip(len + 1);
        self.lines += 1;
        let line = self.buf.get(start..start + len).unwrap_or_default();
        Ok(Some((self.lines, line.strip_suffix(b"\r").unwrap_or(line))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input(bytes: &[u8]) -> Input {
        Input::new(Box::new(io::Cursor::new(bytes.to_vec())), Progress::default())
    }

    #[test]
    fn lines_are_numbered_from_one_and_lose_their_ends() {
        let mut input = input(b"a\r\n\nccc\n");
        assert_eq!(input.line().unwrap(), Some((1, &b"a"[..])));
        assert_eq!(input.line().unwrap(), Some((2, &b""[..])));
        assert_eq!(input.line().unwrap(), Some((3, &b"ccc"[..])));
        assert_eq!(input.line().unwrap(), None);
        assert_eq!(input.offset(), 8);
    }

    #[test]
    fn an_unfinished_last_line_is_an_error() {
        let mut input = input(b"a\nb");
        input.line().unwrap();
        assert!(matches!(input.line(), Err(Stop::Corrupt(Place::Line(2), _))));
    }

    #[test]
    fn a_line_beyond_the_limit_is_an_error_and_one_at_it_is_not() {
        let mut bytes = vec![b'x'; MAX_LINE];
        bytes.push(b'\n');
        bytes.extend(vec![b'y'; 3 * CHUNK]);
        let mut input = input(&bytes);
        assert_eq!(input.line().unwrap().unwrap().1.len(), MAX_LINE);
        assert!(matches!(input.line(), Err(Stop::Corrupt(Place::Line(2), _))));
        assert!(input.buf.len() <= 2 * CHUNK);
    }
}
