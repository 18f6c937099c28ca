//! From viommu's refusals to the statuses that VIRTIO names for them.

use viommu::error::{AttachErrorKind, StepErrorKind};
use viommu::subscribe::{RefusalKind, Refused, Unreachable};

use crate::spec::request::Status;

fn of_refusal(refused: &Refused) -> Status {
    match refused.kind {
        RefusalKind::Resources => Status::NOMEM,
        RefusalKind::Range => Status::RANGE,
        RefusalKind::Unsupported => Status::UNSUPP,
        _ => Status::DEVERR,
    }
}

/// A MAP or an UNMAP that the record, or one of those who hold a copy, refused.
pub(crate) fn of_step(kind: &StepErrorKind) -> Status {
    match kind {
        StepErrorKind::Unaligned { .. } | StepErrorKind::OutOfRange { .. } | StepErrorKind::Cut { .. } => {
            Status::RANGE
        }
        StepErrorKind::Overlap { .. } | StepErrorKind::Reserved { .. } => Status::INVAL,
        StepErrorKind::Cap(_) | StepErrorKind::Unreachable { why: Unreachable::Entries, .. } => Status::NOMEM,
        StepErrorKind::Unreachable { .. } => Status::RANGE,
        StepErrorKind::Refused { refused, .. } => of_refusal(refused),
        StepErrorKind::Gone(_) => Status::NOENT,
        _ => Status::DEVERR,
    }
}

/// An ATTACH or a DETACH that was refused.
pub(crate) fn of_attach(kind: &AttachErrorKind) -> Status {
    match kind {
        AttachErrorKind::NoEndpoint(_) | AttachErrorKind::NoDomain(_) => Status::NOENT,
        AttachErrorKind::Cap(_) | AttachErrorKind::Unreachable { why: Unreachable::Entries, .. } => {
            Status::NOMEM
        }
        // The endpoint does not go together with the domain or with its neighbours.
        AttachErrorKind::SplitsSet { .. }
        | AttachErrorKind::Reserved { .. }
        | AttachErrorKind::Unreachable { .. }
        | AttachErrorKind::NotProduced { .. } => Status::UNSUPP,
        AttachErrorKind::Refused(refused) => of_refusal(refused),
        _ => Status::DEVERR,
    }
}
