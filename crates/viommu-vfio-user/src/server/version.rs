//! What both ends can: the VERSION message ("Version/Capabilities").

use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use crate::message::MAX_FDS;
use crate::spec::Version;

/// Bytes of data in one message that we take and send at most.
pub(crate) const MAX_TRANSFER: usize = 1 << 20;

/// As a client states them; what it leaves out has the document's default.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(default)]
pub(crate) struct ClientCapabilities {
    max_msg_fds: u64,
    max_data_xfer_size: u64,
}

impl Default for ClientCapabilities {
    fn default() -> Self {
        Self { max_msg_fds: 1, max_data_xfer_size: 1 << 20 }
    }
}

impl ClientCapabilities {
    /// Descriptors that it takes with one message.
    pub(crate) fn fds(&self) -> usize {
        usize::try_from(self.max_msg_fds).unwrap_or(MAX_FDS).min(MAX_FDS)
    }

    /// Bytes of data that it takes in one message.
    pub(crate) fn transfer(&self) -> usize {
        usize::try_from(self.max_data_xfer_size).unwrap_or(MAX_TRANSFER).min(MAX_TRANSFER)
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Proposal {
    capabilities: ClientCapabilities,
}

#[derive(Serialize)]
struct Answer {
    capabilities: ServerCapabilities,
}

#[derive(Serialize)]
struct ServerCapabilities {
    max_msg_fds: usize,
    max_data_xfer_size: usize,
    max_dma_maps: usize,
    pgsizes: u64,
    write_multiple: bool,
}

/// What the client said, and the payload of the reply.
///
/// # Errors
/// `EINVAL` for what is no proposal, `ENOTSUP` for another major version.
pub(crate) fn negotiate(payload: &[u8], windows: usize) -> Result<(ClientCapabilities, Vec<u8>), Errno> {
    let (version, text) = Version::read_from_prefix(payload).map_err(|_| Errno::INVAL)?;
    if version.major.get() != 0 {
        return Err(Errno::NOTSUP);
    }
    let proposal: Proposal = match text.strip_suffix(&[0]) {
        Some(json) => serde_json::from_slice(json).map_err(|_| Errno::INVAL)?,
        None if text.is_empty() => Proposal::default(),
        None => return Err(Errno::INVAL),
    };
    let answer = Answer {
        capabilities: ServerCapabilities {
            max_msg_fds: MAX_FDS,
            max_data_xfer_size: MAX_TRANSFER,
            max_dma_maps: windows.min(65535),
            pgsizes: crate::memory::PAGE,
            write_multiple: true,
        },
    };
    // Minor version 0 is what all clients speak.
    let mut reply = Version { major: 0.into(), minor: 0.into() }.as_bytes().to_vec();
    serde_json::to_writer(&mut reply, &answer).map_err(|_| Errno::IO)?;
    reply.push(0);
    Ok((proposal.capabilities, reply))
}
