//! The other end: guest memory in which pages vanish, and a driver that builds any chain it is told to.

mod driver;
mod space;

#[cfg(test)]
pub(crate) use driver::{AVAIL, Request, USED};
pub(crate) use driver::{Driver, Piece, TABLE};
pub(crate) use space::{PAGE, Space};
