//! The other end of the control socket.

use core::fmt;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::serve::control::protocol::{Answer, Request, What, line};
use crate::serve::options::control_socket;
use crate::serve::snapshot::Snapshot;

/// How long a server may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum ClientError {
    /// Nobody serves there.
    Nobody(PathBuf),
    /// The socket cannot be used.
    Io(PathBuf, io::Error),
    /// What came is no answer.
    Garbled(String),
    /// The server has refused.
    Refused(String),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody(directory) => {
                write!(f, "nobody serves in {}: start `viommu serve --socket-dir` there", directory.display())
            }
            Self::Io(path, why) => write!(f, "{}: {why}", path.display()),
            Self::Garbled(why) => {
                write!(f, "the server's answer cannot be read ({why}): is it of this version?")
            }
            Self::Refused(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for ClientError {}

/// A connection to who serves in a directory.
#[derive(Debug)]
pub(crate) struct Client {
    path: PathBuf,
    stream: BufReader<UnixStream>,
}

impl Client {
    /// # Errors
    /// [`ClientError::Nobody`], [`ClientError::Io`].
    pub(crate) fn connect(directory: &Path) -> Result<Self, ClientError> {
        let path = control_socket(directory);
        let connected = UnixStream::connect(&path).and_then(|stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(BufReader::new(stream))
        });
        match connected {
            Ok(stream) => Ok(Self { path, stream }),
            Err(why) if matches!(why.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                Err(ClientError::Nobody(directory.to_owned()))
            }
            Err(why) => Err(ClientError::Io(path, why)),
        }
    }

    /// Asks, and gives what is answered.
    ///
    /// # Errors
    /// All but [`ClientError::Nobody`]. After another one than [`ClientError::Refused`] the connection is of no use.
    pub(crate) fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        let mut text = Vec::new();
        let outcome = self.stream.get_mut().write_all(&line(request));
        match outcome.and_then(|()| self.stream.read_until(b'\n', &mut text)) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(why) if why.kind() == io::ErrorKind::WouldBlock => Err(io::ErrorKind::TimedOut.into()),
            Err(why) => Err(why),
        }
        .map_err(|why| ClientError::Io(self.path.clone(), why))?;
        match serde_json::from_slice(&text) {
            Ok(Answer::Error(why)) => Err(ClientError::Refused(why)),
            Ok(answer) => Ok(answer),
            Err(why) => Err(ClientError::Garbled(why.to_string())),
        }
    }

    /// The live state.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub(crate) fn snapshot(&mut self, mappings: bool) -> Result<Snapshot, ClientError> {
        match self.ask(&Request::Get { get: What::Snapshot, mappings })? {
            Answer::Snapshot(snapshot) => Ok(*snapshot),
            _ => Err(ClientError::Garbled("another answer was expected".into())),
        }
    }
}
