//! vhost-user's IOTLB: each end against a naive peer, and both against each other.
#![cfg(feature = "user")]

mod backend;
mod both;
mod frontend;
mod regions;
mod support;
