//! Plain and compressed input, told apart by its first bytes.

use std::io::{self, Read};

const XZ: &[u8] = b"\xfd7zXZ\0";
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const GZIP: &[u8] = &[0x1f, 0x8b];
const LONGEST: usize = 6;

/// The most memory that decompression may take, in bytes: what `xz -9` and `zstd --ultra -22` need.
pub(crate) const MEMORY: u64 = 192 << 20;

/// What lies behind `reader`, decompressed. `memory` bounds what a decoder may allocate.
pub(crate) fn decompress(mut reader: Box<dyn Read + Send>, memory: u64) -> io::Result<Box<dyn Read + Send>> {
    let mut head = Vec::with_capacity(LONGEST);
    reader.by_ref().take(LONGEST as u64).read_to_end(&mut head)?;
    let kind = [XZ, ZSTD, GZIP].into_iter().find(|magic| head.starts_with(magic));
    // Skippable zstd frames may come first.
    let skippable = matches!(head.as_slice(), [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    let whole = io::Cursor::new(head).chain(reader);
    match kind {
        None if !skippable => Ok(Box::new(whole)),
        kind => decoder(kind.unwrap_or(ZSTD), Box::new(whole), memory),
    }
}

#[cfg(not(feature = "compression"))]
fn decoder(_: &[u8], _: Box<dyn Read + Send>, _: u64) -> io::Result<Box<dyn Read + Send>> {
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        "compressed, and this program was built without decompression",
    ))
}

#[cfg(feature = "compression")]
fn decoder(kind: &[u8], whole: Box<dyn Read + Send>, memory: u64) -> io::Result<Box<dyn Read + Send>> {
    let whole = io::BufReader::with_capacity(64 * 1024, whole);
    Ok(match kind {
        XZ => {
            let kib = u32::try_from(memory / 1024).unwrap_or(u32::MAX);
            Box::new(lzma_rust2::XzReader::new_mem_limit(whole, true, kib))
        }
        GZIP => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        _ => Box::new(zstd::Frames::new(whole, memory)),
    })
}

#[cfg(feature = "compression")]
mod zstd {
    use std::io::{self, BufRead, Read};

    use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
    use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

    /// One zstd frame after another, checksums compared.
    pub(super) struct Frames<R> {
        source: R,
        decoder: FrameDecoder,
        inside: bool,
    }

    impl<R: BufRead> Frames<R> {
        pub(super) fn new(source: R, memory: u64) -> Self {
            let mut decoder = FrameDecoder::new();
            decoder.set_max_window_size(memory);
            Self { source, decoder, inside: false }
        }

        /// Goes to the next frame; `false` when there is none.
        fn enter(&mut self) -> io::Result<bool> {
            while !self.source.fill_buf()?.is_empty() {
                match self.decoder.reset(&mut self.source) {
                    Ok(()) => return Ok(true),
                    Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                        length,
                        ..
                    })) => {
                        let length = u64::from(length);
                        if io::copy(&mut self.source.by_ref().take(length), &mut io::sink())? < length {
                            return Err(io::ErrorKind::UnexpectedEof.into());
                        }
                    }
                    Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
                }
            }
            Ok(false)
        }

        fn leave(&mut self) -> io::Result<()> {
            self.inside = false;
            match (self.decoder.get_checksum_from_data(), self.decoder.get_calculated_checksum()) {
                (Some(told), Some(found)) if told != found => {
                    Err(io::Error::new(io::ErrorKind::InvalidData, "the checksum of a zstd frame differs"))
                }
                _ => Ok(()),
            }
        }
    }

    impl<R: BufRead> Read for Frames<R> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            if buf.is_empty() {
                return Ok(0);
            }
            loop {
                if !self.inside {
                    if !self.enter()? {
                        return Ok(0);
                    }
                    self.inside = true;
                }
                while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                    self.decoder
                        .decode_blocks(&mut self.source, BlockDecodingStrategy::UptoBlocks(1))
                        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                }
                match self.decoder.read(buf)? {
                    0 => self.leave()?,
                    n => return Ok(n),
                }
            }
        }
    }
}
