//! The socket to a server: commands out, replies and the server's own commands in.

use core::fmt;
use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::dma::{self, DeviceMemory};
use super::error::ClientError;
use crate::message::{self, Received};
use crate::server::MAX_TRANSFER;
use crate::spec::{Command, DmaAccess, HEADER, Header, MessageFlags};

/// Bytes behind the header of the greatest message that is taken.
const MAX_PAYLOAD: usize = MAX_TRANSFER + size_of::<DmaAccess>();

/// Bits of a message's type.
const TYPE: u32 = 0xf;

/// What came of a command.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

enum Line {
    Open(UnixStream),
    /// Nothing is sent any more, and what comes is thrown away; the server has not closed its end yet.
    Closing(UnixStream, String),
    /// The server has closed its end.
    Ended(String),
}

/// One connection. A command at a time, or several whose replies are then taken in order.
pub(crate) struct Connection {
    line: Line,
    limit: Duration,
    memory: Box<dyn DeviceMemory>,
    next_id: u16,
    outstanding: VecDeque<(u16, Command)>,
    payload: Vec<u8>,
    answer: Vec<u8>,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = match &self.line {
            Line::Open(_) => "open",
            Line::Closing(_, why) | Line::Ended(why) => why,
        };
        f.debug_struct("Connection").field("line", &line).field("limit", &self.limit).finish_non_exhaustive()
    }
}

impl Connection {
    pub(crate) fn new(
        stream: UnixStream,
        limit: Duration,
        memory: Box<dyn DeviceMemory>,
    ) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let (payload, answer) = (Vec::new(), Vec::new());
        let (next_id, outstanding) = (0, VecDeque::new());
        Ok(Self { line: Line::Open(stream), limit, memory, next_id, outstanding, payload, answer })
    }

    pub(crate) fn is_open(&self) -> bool {
        matches!(self.line, Line::Open(_))
    }

    /// Sends a command and waits for its reply, whose payload is to have `least` to `most` bytes.
    pub(crate) fn call(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
        (least, most): (usize, usize),
    ) -> Result<Reply, ClientError> {
        self.post(command, parts, fds)?;
        self.reply((least, most))
    }

    /// Sends a command. Its reply is taken by a later [`Self::reply`], one for each in order.
    pub(crate) fn post(
        &mut self,
        command: Command,
        parts: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ClientError> {
        let payload = parts.concat();
        self.next_id = self.next_id.wrapping_add(1);
        let header = header_of(self.next_id, command, payload.len(), MessageFlags::empty(), 0)?;
        let sent = message::send(self.stream()?, &header, &payload, fds);
        if let Err(error) = sent {
            return Err(self.over(match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Late(command),
                io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Ended,
                _ => ClientError::Io(error),
            }));
        }
        self.outstanding.push_back((self.next_id, command));
        Ok(())
    }

    /// The reply to the command that has waited longest. Commands of the server's are served meanwhile.
    pub(crate) fn reply(&mut self, (least, most): (usize, usize)) -> Result<Reply, ClientError> {
        let (id, command) =
            self.outstanding.pop_front().ok_or(ClientError::Request("no command waits for a reply"))?;
        let begin = Instant::now();
        loop {
            let left = self.limit.saturating_sub(begin.elapsed());
            match self.is_readable(left) {
                Ok(true) => {}
                Ok(false) => return Err(self.over(ClientError::Late(command))),
                Err(error) => return Err(self.over(error)),
            }
            let Some(Received { header, fds }) = self.receive(command)? else { continue };
            let payload = core::mem::take(&mut self.payload);
            let result = check(&header, &payload, id, command, (least, most));
            match result {
                Ok(()) => return Ok(Reply { payload, fds }),
                Err(error) if error.goes_on() => return Err(error),
                Err(error) => return Err(self.over(error)),
            }
        }
    }

    /// Serves what the server asks for at this moment, and waits for nothing. What comes on a connection that is over is
    /// thrown away.
    pub(crate) fn serve(&mut self) -> Result<(), ClientError> {
        while self.is_open() {
            match self.is_readable(Duration::ZERO) {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => return Err(self.over(error)),
            }
            if self.receive(Command::DMA_READ)?.is_some() {
                return Err(self.over(ClientError::broken("a reply to nothing")));
            }
        }
        self.drain(Duration::ZERO);
        Ok(())
    }

    /// Ends the connection and waits, for the limit at most, until the server has closed its end: gives whether it has.
    pub(crate) fn close(&mut self, why: &str) -> bool {
        self.hang_up(why);
        self.drain(self.limit)
    }

    /// Why nothing can be sent any more; none while it can.
    pub(crate) fn why_over(&self) -> Option<&str> {
        match &self.line {
            Line::Open(_) => None,
            Line::Closing(_, why) | Line::Ended(why) => Some(why),
        }
    }

    fn stream(&self) -> Result<&UnixStream, ClientError> {
        match &self.line {
            Line::Open(stream) => Ok(stream),
            Line::Closing(_, why) | Line::Ended(why) => Err(ClientError::Over(why.clone())),
        }
    }

    /// After what cannot be mended.
    fn over(&mut self, error: ClientError) -> ClientError {
        if matches!(error, ClientError::Ended) {
            self.line = Line::Ended(error.to_string());
            self.outstanding.clear();
        } else {
            self.hang_up(&error.to_string());
        }
        error
    }

    /// The reading side stays, to see when the server closes its end.
    fn hang_up(&mut self, why: &str) {
        self.outstanding.clear();
        let line = core::mem::replace(&mut self.line, Line::Ended(why.into()));
        self.line = match line {
            Line::Open(stream) => {
                // A connection that has ended already is what is wanted.
                let _ended = stream.shutdown(Shutdown::Write);
                Line::Closing(stream, why.into())
            }
            other => other,
        };
    }

    /// Throws away what comes, until the server's end is closed or `limit` has passed. Gives whether it is closed.
    fn drain(&mut self, limit: Duration) -> bool {
        let begin = Instant::now();
        let Line::Closing(stream, why) = &self.line else { return !self.is_open() };
        let mut bytes = [0; 4096];
        loop {
            let left = limit.saturating_sub(begin.elapsed());
            match wait_readable(stream, left) {
                Ok(true) => {}
                Ok(false) | Err(_) => return false,
            }
            match rustix::io::read(stream, &mut bytes) {
                Ok(0) | Err(Errno::CONNRESET) => break,
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        self.line = Line::Ended(why.clone());
        true
    }

    fn is_readable(&self, limit: Duration) -> Result<bool, ClientError> {
        Ok(wait_readable(self.stream()?, limit)?)
    }

    /// One message, which has begun to come: a reply, or none where it was a command and has been answered.
    fn receive(&mut self, awaited: Command) -> Result<Option<Received>, ClientError> {
        let (limit, mut payload) = (self.limit, core::mem::take(&mut self.payload));
        let received = message::receive(self.stream()?, MAX_PAYLOAD, limit, &mut payload);
        self.payload = payload;
        let received = match received {
            Ok(Some(received)) => received,
            Ok(None) => return Err(self.over(ClientError::Ended)),
            Err(error) => return Err(self.over(ClientError::receiving(error, awaited))),
        };
        match received.header.flags.get() & TYPE {
            0 => self.answer(&received).map(|()| None),
            1 => Ok(Some(received)),
            _ => Err(self.over(ClientError::broken("a message that is neither command nor reply"))),
        }
    }

    fn answer(&mut self, Received { header, fds }: &Received) -> Result<(), ClientError> {
        let command = Command(header.command.get());
        self.answer.clear();
        let done = match fds.is_empty() {
            true => dma::answer(&mut *self.memory, command, &self.payload, &mut self.answer),
            false => Err(Errno::INVAL),
        };
        if MessageFlags::from_bits_retain(header.flags.get()).contains(MessageFlags::NO_REPLY) {
            return Ok(());
        }
        let (mut flags, mut errno) = (MessageFlags::REPLY, 0);
        if let Err(error) = done {
            self.answer.clear();
            flags |= MessageFlags::ERROR;
            errno = u32::try_from(error.raw_os_error()).unwrap_or_default();
        }
        let reply = header_of(header.id.get(), command, self.answer.len(), flags, errno)?;
        let sent = message::send(self.stream()?, &reply, &self.answer, &[]);
        sent.map_err(|error| self.over(ClientError::Io(error)))
    }
}

/// Whether there is something to read, or the end, within `limit`.
fn wait_readable(stream: &UnixStream, limit: Duration) -> io::Result<bool> {
    let begin = Instant::now();
    loop {
        let left = Timespec::try_from(limit.saturating_sub(begin.elapsed()))
            .map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn header_of(
    id: u16,
    command: Command,
    payload: usize,
    flags: MessageFlags,
    errno: u32,
) -> Result<Header, ClientError> {
    let size = u32::try_from(payload.saturating_add(HEADER)).ok();
    Ok(Header {
        id: id.into(),
        command: command.0.into(),
        size: size.ok_or(ClientError::Request("more than a message can have"))?.into(),
        flags: flags.bits().into(),
        error: errno.into(),
    })
}

/// Whether it is the reply that is awaited, and one that can be.
fn check(
    header: &Header,
    payload: &[u8],
    id: u16,
    command: Command,
    (least, most): (usize, usize),
) -> Result<(), ClientError> {
    let broken = |why: String| Err(ClientError::Broken(why));
    if header.id.get() != id || header.command.get() != command.0 {
        let (said, what) = (header.id.get(), header.command.get());
        return broken(format!(
            "a reply to command {what} number {said}, where {} number {id} is awaited",
            command.0
        ));
    }
    if MessageFlags::from_bits_retain(header.flags.get()).contains(MessageFlags::ERROR) {
        let errno = i32::try_from(header.error.get()).unwrap_or(i32::MAX);
        return Err(ClientError::Refused { command, errno });
    }
    if !(least..=most).contains(&payload.len()) {
        return broken(format!("a reply to command {} with {} bytes", command.0, payload.len()));
    }
    Ok(())
}
