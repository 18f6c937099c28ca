//! What both ends can, from the client's side: the VERSION message ("Version/Capabilities").

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use super::error::ClientError;
use crate::message::MAX_FDS;
use crate::server::MAX_TRANSFER;
use crate::spec::Version;

/// Windows that a client may have at most, as QEMU's may.
pub(crate) const MAX_WINDOWS: u32 = 65535;

/// What a server can do, as agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Descriptors that it takes with one message.
    pub fds: usize,
    /// Bytes of data that it takes in one message.
    pub transfer: usize,
    /// Windows that it holds at a time.
    pub windows: u32,
    /// Bit n set: windows of 2^n bytes and multiples. Nothing below 4 KiB.
    pub page_sizes: u64,
}

#[derive(Serialize)]
struct Proposal {
    capabilities: Ours,
}

#[derive(Serialize)]
struct Ours {
    max_msg_fds: usize,
    max_data_xfer_size: usize,
    max_dma_maps: u32,
    pgsizes: u64,
}

/// What it leaves out has the document's default.
#[derive(Deserialize)]
#[serde(default)]
struct Theirs {
    max_msg_fds: u64,
    max_data_xfer_size: u64,
    max_dma_maps: u64,
    pgsizes: u64,
}

impl Default for Theirs {
    fn default() -> Self {
        Self { max_msg_fds: 1, max_data_xfer_size: 1 << 20, max_dma_maps: 65535, pgsizes: 4096 }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Answer {
    capabilities: Theirs,
}

/// The payload of our VERSION. Minor version 0 is what all servers speak.
pub(crate) fn proposal() -> Result<Vec<u8>, ClientError> {
    let ours = Ours {
        max_msg_fds: MAX_FDS,
        max_data_xfer_size: MAX_TRANSFER,
        max_dma_maps: MAX_WINDOWS,
        pgsizes: crate::memory::PAGE,
    };
    let mut payload = Version { major: 0.into(), minor: 0.into() }.as_bytes().to_vec();
    let written = serde_json::to_writer(&mut payload, &Proposal { capabilities: ours });
    written.map_err(|error| ClientError::Io(error.into()))?;
    payload.push(0);
    Ok(payload)
}

/// What the server makes of it.
pub(crate) fn agreed(payload: &[u8]) -> Result<Capabilities, ClientError> {
    let broken = |why: String| ClientError::Broken(why);
    let (version, text) =
        Version::read_from_prefix(payload).map_err(|_| broken("a reply to VERSION without one".into()))?;
    let (major, minor) = (version.major.get(), version.minor.get());
    if major != 0 || minor != 0 {
        return Err(broken(format!("version {major}.{minor} where 0.0 was proposed")));
    }
    let answer: Answer = match text.strip_suffix(&[0]) {
        Some(json) => {
            serde_json::from_slice(json).map_err(|why| broken(format!("its capabilities: {why}")))?
        }
        None if text.is_empty() => Answer::default(),
        None => return Err(broken("its capabilities do not end in a zero byte".into())),
    };
    let Theirs { max_msg_fds, max_data_xfer_size, max_dma_maps, pgsizes } = answer.capabilities;
    // Smaller pages than ours make ours whole pages too.
    let small = pgsizes & (crate::memory::PAGE - 1) != 0;
    let page_sizes = (pgsizes & !(crate::memory::PAGE - 1)) | if small { crate::memory::PAGE } else { 0 };
    if page_sizes == 0 || max_data_xfer_size == 0 || max_dma_maps == 0 {
        return Err(broken("it has no page sizes, takes no data, or holds no windows".into()));
    }
    Ok(Capabilities {
        fds: usize::try_from(max_msg_fds).unwrap_or(MAX_FDS).min(MAX_FDS),
        transfer: usize::try_from(max_data_xfer_size).unwrap_or(MAX_TRANSFER).min(MAX_TRANSFER),
        windows: u32::try_from(max_dma_maps).unwrap_or(MAX_WINDOWS).min(MAX_WINDOWS),
        page_sizes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(minor: u16, text: &[u8]) -> Vec<u8> {
        [Version { major: 0.into(), minor: minor.into() }.as_bytes(), text].concat()
    }

    #[test]
    fn what_a_server_leaves_out_has_the_documents_default() {
        let default = Capabilities { fds: 1, transfer: 1 << 20, windows: 65535, page_sizes: 4096 };
        assert_eq!(agreed(&reply(0, b"")).unwrap(), default);
        assert_eq!(agreed(&reply(0, b"{\"capabilities\":{\"else\":[1]},\"x\":2}\0")).unwrap(), default);
    }

    #[test]
    fn what_a_server_says_is_taken_as_far_as_ours_goes() {
        let text = br#"{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":4096,"max_dma_maps":16,"pgsizes":2101248}}"#;
        let said = agreed(&reply(0, &[&text[..], b"\0"].concat())).unwrap();
        assert_eq!(said, Capabilities { fds: 8, transfer: 4096, windows: 16, page_sizes: 0x20_1000 });
        let text = br#"{"capabilities":{"max_msg_fds":999,"max_data_xfer_size":99999999,"max_dma_maps":9999999,"pgsizes":512}}"#;
        let said = agreed(&reply(0, &[&text[..], b"\0"].concat())).unwrap();
        assert_eq!(said, Capabilities { fds: 16, transfer: 1 << 20, windows: 65535, page_sizes: 4096 });
    }

    #[test]
    fn answer_that_makes_no_sense_is_none() {
        for wrong in [
            &reply(1, b"")[..],
            &[0, 0, 0],
            &[1, 0, 0, 0],
            &reply(0, b"{}"),
            &reply(0, b"{\0"),
            &reply(0, b"{\"capabilities\":{\"pgsizes\":0}}\0"),
            &reply(0, b"{\"capabilities\":{\"max_dma_maps\":0}}\0"),
            &reply(0, b"{\"capabilities\":{\"max_data_xfer_size\":0}}\0"),
            &reply(0, b"{\"capabilities\":{\"max_msg_fds\":-1}}\0"),
        ] {
            assert!(matches!(agreed(wrong), Err(ClientError::Broken(_))), "{wrong:?}");
        }
    }
}
