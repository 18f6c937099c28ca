//! vhost consumers.
#![forbid(unsafe_code)]
