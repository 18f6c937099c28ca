//! vhost-user's IOTLB, both ends: [`frontend`] is the VMM's, a cache of the core; [`backend`] is the device's, in a
//! process of its own. What lies between them is in [`spec`] and [`crate::spec::IotlbMsg`].
//!
//! Each takes the socket of a connection and gives another in its place for what there is of vhost-user already, so that
//! neither end needs a front or back end of its own: the `vhost` crate's know no IOTLB messages, but nor do they mind
//! ring addresses that are I/O virtual ones.
#![cfg_attr(
    not(test),
    warn(clippy::arithmetic_side_effects, clippy::as_conversions, clippy::indexing_slicing)
)]

pub mod backend;
pub mod frontend;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        reason = "what it plays with is its own; a panic is what it is for"
    )
)]
pub mod fuzzing;
pub mod spec;
mod wire;

use viommu::Access;
use zerocopy::FromBytes;

use crate::spec::{IotlbMsg, perm};

pub use wire::WireError;

/// The payload of an IOTLB message. The document names fields and no padding, so 26 bytes are enough.
fn iotlb_message(payload: &[u8]) -> Option<IotlbMsg> {
    const NEEDED: usize = 26;
    if !(NEEDED..=size_of::<IotlbMsg>()).contains(&payload.len()) {
        return None;
    }
    let mut whole = [0; size_of::<IotlbMsg>()];
    whole.get_mut(..payload.len())?.copy_from_slice(payload);
    IotlbMsg::read_from_bytes(&whole).ok()
}

/// What [`IotlbMsg::perm`] says; `None` for what is not defined.
fn access_of(bits: u8) -> Option<Access> {
    match bits {
        0 => Some(Access::empty()),
        perm::READ => Some(Access::READ),
        perm::WRITE => Some(Access::WRITE),
        perm::READ_WRITE => Some(Access::RW),
        _ => None,
    }
}

/// What must be allowed for slices that are asked for with `permissions`; none means "whatever is done with them".
fn access_for(permissions: vm_memory::Permissions) -> Access {
    match permissions {
        vm_memory::Permissions::Read => Access::READ,
        vm_memory::Permissions::Write => Access::WRITE,
        vm_memory::Permissions::No | vm_memory::Permissions::ReadWrite => Access::RW,
    }
}
