//! Takes the kernel proper out of a bzImage: a guest under emulation is slow to unpack it.

use std::io::Read;

use anyhow::{Context as _, bail, ensure};

/// The ELF file inside a bzImage; an ELF file is given back as it is.
///
/// # Errors
///
/// If the image is of another kind, is cut short, or is packed in a way unknown.
pub(crate) fn unpack(image: &[u8]) -> anyhow::Result<Vec<u8>> {
    if image.starts_with(b"\x7fELF") {
        return Ok(image.to_owned());
    }
    let payload = payload(image).context("not a bzImage")?;
    let mut elf = Vec::new();
    if payload.starts_with(b"\xfd7zXZ\0") {
        lzma_rust2::XzReader::new(payload, false).read_to_end(&mut elf).context("xz")?;
    } else if payload.starts_with(b"\x28\xb5\x2f\xfd") {
        let mut decoder = ruzstd::decoding::StreamingDecoder::new(payload).context("zstd")?;
        decoder.read_to_end(&mut elf).context("zstd")?;
    } else if payload.starts_with(b"\x1f\x8b") {
        flate2::read::GzDecoder::new(payload).read_to_end(&mut elf).context("gzip")?;
    } else {
        bail!("packed in a way unknown here: it begins with {:02x?}", payload.get(..6).unwrap_or(payload));
    }
    ensure!(elf.starts_with(b"\x7fELF"), "what is packed is not an ELF file");
    Ok(elf)
}

/// The packed kernel, found by the fields of the x86 boot protocol.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize);
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let sectors = match *image.get(0x1f1)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1).checked_mul(512)?.checked_add(word(0x248)?)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// A bzImage of one setup sector that holds `payload` 16 bytes into its protected-mode part.
    fn bz_image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        let length = u32::try_from(payload.len()).expect("a short payload");
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(payload);
        image
    }

    #[test]
    fn unpack_finds_a_packed_kernel() {
        let elf = b"\x7fELF and the rest".repeat(100);
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(&elf).expect("to memory");
        let packed = encoder.finish().expect("to memory");
        assert_eq!(unpack(&bz_image(&packed)).expect("a good image"), elf);
    }

    #[test]
    fn unpack_refuses_what_is_no_kernel() {
        assert!(unpack(b"MZ").is_err());
        assert!(unpack(&bz_image(b"\x00\x00\x00\x00\x00\x00")).is_err());
        let mut short = bz_image(b"\x1f\x8b\x08");
        short[0x24c] = 200;
        assert!(unpack(&short).is_err());
    }
}
