//! What the server holds, and how it changes.

use std::collections::BTreeMap;
use std::os::fd::AsFd;

use viommu::subscribe::{FenceFailed, Reach, RefusalKind, Refused, Unmapped};
use viommu::{Access, Ack, GpaRange, IovaRange, Mapping};
use zerocopy::IntoBytes;

use super::pieces::{Piece, Pieces, Resolve};
use super::{MirrorOptions, NoFile};
use crate::client::connection::Connection;
use crate::client::{Client, ClientError};
use crate::spec::{Command, DmaFlags, DmaMap, DmaUnmap};

/// Commands that are sent before the first reply is read: together they fit into a socket.
const PIPELINE: usize = 64;

/// One extent of the record's.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) mapping: Mapping,
    pub(crate) pieces: Pieces,
}

pub(crate) struct State {
    pub(crate) client: Client,
    options: MirrorOptions,
    resolve: Resolve,
    /// By the first address.
    pub(crate) held: BTreeMap<u64, Held>,
    /// Windows that the server has.
    pub(crate) windows: u64,
    pub(crate) fenced: bool,
}

/// A piece could not be mapped, and those before it could not be taken back.
const LEFT_BEHIND: &str = "what was mapped before it could not be taken back";

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}

/// First byte and size; none where it is 2^64 bytes, which a message cannot say.
fn start_and_size(range: IovaRange) -> Result<(u64, u64), ClientError> {
    let size = u64::try_from(range.bytes()).map_err(|_| ClientError::Request("a window of 2^64 bytes"))?;
    Ok((range.start().0, size))
}

fn map_piece(connection: &mut Connection, access: Access, piece: &Piece) -> Result<(), ClientError> {
    let (address, size) = start_and_size(piece.range)?;
    let mut flags = DmaFlags::empty();
    flags.set(DmaFlags::READ, access.contains(Access::READ));
    flags.set(DmaFlags::WRITE, access.contains(Access::WRITE));
    let map = DmaMap {
        argsz: u32::try_from(size_of::<DmaMap>()).unwrap_or_default().into(),
        flags: flags.bits().into(),
        offset: piece.offset.into(),
        address: address.into(),
        size: size.into(),
    };
    let fds: Vec<_> = piece.file.iter().map(|file| file.as_fd()).collect();
    connection.call(Command::DMA_MAP, &[map.as_bytes()], &fds, (0, 0)).map(drop)
}

/// Unmaps each of `pieces`. All replies are taken, whatever comes of one; gives how many windows went, and the first error.
fn unmap_pieces(connection: &mut Connection, pieces: &[&Piece]) -> (u64, Result<(), ClientError>) {
    let (mut gone, mut result) = (0_u64, Ok(()));
    for some in pieces.chunks(PIPELINE) {
        let mut sent = Vec::with_capacity(some.len());
        for piece in some {
            let unmap = start_and_size(piece.range).map(|(address, size)| DmaUnmap {
                argsz: u32::try_from(size_of::<DmaUnmap>()).unwrap_or_default().into(),
                flags: 0.into(),
                address: address.into(),
                size: size.into(),
            });
            let posted = unmap.and_then(|unmap| {
                connection.post(Command::DMA_UNMAP, &[unmap.as_bytes()], &[]).map(|()| unmap)
            });
            match posted {
                Ok(unmap) => sent.push(unmap),
                Err(error) => {
                    result = result.and(Err(error));
                    break;
                }
            }
        }
        for unmap in sent {
            let bytes = size_of::<DmaUnmap>();
            let outcome = connection.reply((bytes, bytes)).and_then(|reply| {
                let same = reply.payload == unmap.as_bytes();
                same.then_some(()).ok_or_else(|| ClientError::broken("a reply to another DMA_UNMAP"))
            });
            match outcome {
                Ok(()) => gone = gone.saturating_add(1),
                Err(error) => result = result.and(Err(error)),
            }
        }
        if result.is_err() {
            break;
        }
    }
    (gone, result)
}

/// For a mirror whose server may or may not have done it: the step stands, and the mirror is fenced.
fn failed() -> Ack {
    let (ack, resolver) = Ack::pending();
    resolver.failed();
    ack
}

impl State {
    pub(crate) fn new(client: Client, options: MirrorOptions, resolve: Resolve) -> Self {
        Self { client, options, resolve, held: BTreeMap::new(), windows: 0, fenced: false }
    }

    pub(crate) fn reach(&self) -> Reach {
        let capabilities = self.client.capabilities();
        Reach {
            page_sizes: capabilities.page_sizes,
            entries: Some(capabilities.windows),
            replace: false,
            wide_unmap: true,
            batches: false,
            mmio: false,
            out_of_reach: self.options.out_of_reach,
            ..Reach::default()
        }
    }

    fn pieces_of(&self, extent: &Mapping) -> Pieces {
        let message = |range| Piece { range, file: None, offset: 0 };
        if self.options.by_messages {
            return Pieces { there: vec![message(extent.range)], lacks: Vec::new() };
        }
        let mut pieces = (self.resolve)(extent);
        if self.options.no_file == NoFile::Messages {
            pieces.there.extend(core::mem::take(&mut pieces.lacks).into_iter().map(message));
            pieces.there.sort_by_key(|piece| piece.range.start());
        }
        pieces
    }

    pub(crate) fn map(&mut self, extent: &Mapping) -> Result<Ack, Refused> {
        if self.fenced || !self.client.is_open() {
            return Ok(failed());
        }
        let pieces = self.pieces_of(extent);
        if let Err(error) = self.check(&pieces).and_then(|()| self.give(extent.access, &pieces.there)) {
            return if error.kind == RefusalKind::Lost || self.client.is_open() {
                Err(error)
            } else {
                Ok(failed())
            };
        }
        self.held.insert(extent.range.start().0, Held { mapping: *extent, pieces });
        Ok(Ack::Done)
    }

    /// Whether the server could hold these too. The record counts extents, and knows nothing of files.
    fn check(&self, pieces: &Pieces) -> Result<(), Refused> {
        let capabilities = self.client.capabilities();
        let more = count(pieces.there.len());
        if self.windows.saturating_add(more) > u64::from(capabilities.windows) {
            let (limit, held) = (capabilities.windows, self.windows);
            let why = format!("{more} windows are wanted beside {held} of {limit}");
            return Err(Refused::new(RefusalKind::Resources, why));
        }
        let granule = self.reach().granule();
        let fits =
            |piece: &Piece| piece.range.is_aligned(granule) && piece.offset & granule.saturating_sub(1) == 0;
        if !pieces.there.iter().all(fits) {
            let why = format!("memory that begins or ends within a page of {granule:#x} bytes");
            return Err(Refused::new(RefusalKind::Range, why));
        }
        Ok(())
    }

    /// Gives the server windows: all of them, or none.
    fn give(&mut self, access: Access, pieces: &[Piece]) -> Result<(), Refused> {
        let mut connection = self.client.connection();
        for (nth, piece) in pieces.iter().enumerate() {
            let Err(error) = map_piece(&mut connection, access, piece) else {
                self.windows = self.windows.saturating_add(1);
                continue;
            };
            let refused = error.refused();
            let before: Vec<_> = pieces.iter().take(nth).collect();
            let (gone, undone) = unmap_pieces(&mut connection, &before);
            self.windows = self.windows.saturating_sub(gone);
            return Err(match undone {
                Ok(()) => refused,
                Err(_) => Refused::new(RefusalKind::Lost, format!("{}; {LEFT_BEHIND}", refused.reason)),
            });
        }
        Ok(())
    }

    pub(crate) fn unmap(&mut self, range: IovaRange) -> Result<Unmapped, Refused> {
        let (start, last) = (range.start().0, range.last().0);
        if self.cuts(range) {
            return Err(Refused::new(RefusalKind::Range, format!("{range} would cut what is held")));
        }
        let inside = || self.held.range(start..=last).map(|(_, held)| held);
        let bytes = inside().fold(0, |sum: u128, held| sum.saturating_add(held.mapping.range.bytes()));
        let pieces: Vec<_> = inside().flat_map(|held| &held.pieces.there).collect();
        if !pieces.is_empty() {
            let (gone, result) = unmap_pieces(&mut self.client.connection(), &pieces);
            self.windows = self.windows.saturating_sub(gone);
            result.map_err(|error| error.refused())?;
        }
        while let Some((&first, _)) = self.held.range(start..=last).next() {
            self.held.remove(&first);
        }
        Ok(Unmapped::done(bytes))
    }

    /// Whether an extent sticks out of `range` at either end.
    fn cuts(&self, range: IovaRange) -> bool {
        let before = self.held.range(..range.start().0).next_back();
        let inside = self.held.range(range.start().0..=range.last().0).next_back();
        before.is_some_and(|(_, held)| held.mapping.range.overlaps(range))
            || inside.is_some_and(|(_, held)| !range.covers(held.mapping.range))
    }

    pub(crate) fn refresh(&mut self, gpas: GpaRange) -> Result<(), FenceFailed> {
        if self.fenced {
            return Ok(());
        }
        let meets = |held: &Held| {
            GpaRange::new(held.mapping.gpa, held.mapping.gpa_last())
                .is_some_and(|target| target.overlaps(gpas))
        };
        let touched: Vec<_> = self.held.iter().filter(|(_, held)| meets(held)).map(|(at, _)| *at).collect();
        for at in touched {
            if self.renew(at).is_err() {
                return self.fence();
            }
        }
        Ok(())
    }

    /// Looks up the pieces of one extent again: those that differ go, and then the new ones come.
    fn renew(&mut self, at: u64) -> Result<(), Refused> {
        let Some(Held { mapping, pieces: old }) = self.held.remove(&at) else { return Ok(()) };
        let new = self.pieces_of(&mapping);
        let gone: Vec<_> = old.there.iter().filter(|piece| !new.there.contains(piece)).collect();
        let come: Vec<_> = new.there.iter().filter(|piece| !old.there.contains(piece)).cloned().collect();
        let (count, result) = unmap_pieces(&mut self.client.connection(), &gone);
        self.windows = self.windows.saturating_sub(count);
        result.map_err(|error| error.refused())?;
        let fresh = Pieces { there: come, lacks: Vec::new() };
        self.check(&fresh)?;
        self.give(mapping.access, &fresh.there)?;
        self.held.insert(at, Held { mapping, pieces: new });
        Ok(())
    }

    /// Returns when the server has let go. Once it has, it does nothing.
    pub(crate) fn fence(&mut self) -> Result<(), FenceFailed> {
        if self.fenced {
            return Ok(());
        }
        match self.options.action.as_mut() {
            // Only the embedder knows of the process; what it says holds.
            Some(action) => {
                action()?;
                self.client.close("the device is cut off");
            }
            None if self.client.close("the device is cut off") => {}
            None => return Err(FenceFailed("the server does not close its connection".into())),
        }
        self.fenced = true;
        self.held.clear();
        self.windows = 0;
        Ok(())
    }
}
