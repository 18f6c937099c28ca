//! What is printed and written.

pub(crate) mod html;
pub(crate) mod picture;
pub(crate) mod stats;
pub(crate) mod text;
