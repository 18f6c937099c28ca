//! What goes wrong between a client and its server.

use std::io;

use viommu::subscribe::{RefusalKind, Refused};

use crate::message::ReceiveError;
use crate::spec::Command;

/// Why a server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// It answered with an error. The connection goes on.
    #[error("{}: errno {errno}", name(*.command))]
    Refused {
        /// What was asked for.
        command: Command,
        /// The server's number; servers may leave it 0.
        errno: i32,
    },
    /// It closed the connection, or its process has ended.
    #[error("the server has closed the connection")]
    Ended,
    /// It did not answer within the limit. The connection is over: whether it has done it, nobody knows.
    #[error("no reply to {} within the limit", name(*.0))]
    Late(Command),
    /// What it sent makes no sense. The connection is over.
    #[error("the server breaks the protocol: {0}")]
    Broken(String),
    /// The socket. The connection is over.
    #[error("the connection: {0}")]
    Io(#[from] io::Error),
    /// The connection is over since something went wrong earlier, or the device was fenced.
    #[error("the connection is over: {0}")]
    Over(String),
    /// The request cannot be made: nothing was sent.
    #[error("{0}")]
    Request(&'static str),
}

impl ClientError {
    /// Whether the connection is as good as before.
    #[must_use]
    pub fn goes_on(&self) -> bool {
        matches!(self, Self::Refused { .. } | Self::Request(_))
    }

    pub(crate) fn broken(why: impl Into<String>) -> Self {
        Self::Broken(why.into())
    }

    pub(crate) fn receiving(error: ReceiveError, command: Command) -> Self {
        match error {
            ReceiveError::Late => Self::Late(command),
            ReceiveError::CutOff => Self::Ended,
            ReceiveError::Io(error) => Self::Io(error),
            other => Self::Broken(other.to_string()),
        }
    }

    /// What it means to the record.
    pub(crate) fn refused(&self) -> Refused {
        let kind = match self {
            Self::Refused { errno, .. } => kind_of(*errno),
            _ => RefusalKind::Device,
        };
        Refused::new(kind, self.to_string())
    }
}

/// Linux's numbers on x86 and Arm. The document has EEXIST for windows that overlap, libvfio-user EINVAL.
fn kind_of(errno: i32) -> RefusalKind {
    match errno {
        // EINTR, EAGAIN, ENOMEM, EMFILE, ENFILE, ENOSPC
        4 | 11 | 12 | 23 | 24 | 28 => RefusalKind::Resources,
        // E2BIG, EINVAL, ERANGE, EOVERFLOW
        7 | 22 | 34 | 75 => RefusalKind::Range,
        // ENOTTY, ENOSYS, EOPNOTSUPP
        25 | 38 | 95 => RefusalKind::Unsupported,
        _ => RefusalKind::Device,
    }
}

fn name(command: Command) -> &'static str {
    match command {
        Command::VERSION => "VERSION",
        Command::DMA_MAP => "DMA_MAP",
        Command::DMA_UNMAP => "DMA_UNMAP",
        Command::DEVICE_GET_INFO => "DEVICE_GET_INFO",
        Command::DEVICE_GET_REGION_INFO => "DEVICE_GET_REGION_INFO",
        Command::DEVICE_GET_IRQ_INFO => "DEVICE_GET_IRQ_INFO",
        Command::DEVICE_SET_IRQS => "DEVICE_SET_IRQS",
        Command::REGION_READ => "REGION_READ",
        Command::REGION_WRITE => "REGION_WRITE",
        Command::DEVICE_RESET => "DEVICE_RESET",
        _ => "a message",
    }
}
