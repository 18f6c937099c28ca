//! A server on a socket, and its clients: well-behaved, broken and hostile.

mod common;
mod life;
mod log;
mod messages;
mod peer;
