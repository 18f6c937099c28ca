//! What comes back for an operation, against what it should be.

use viommu::error::{AttachErrorKind, StepErrorKind};
use viommu_spapr::spec::Code;
use viommu_virtio::spec::request::{ATTACH, MAP, Status};

/// Why an operation is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// Not whole pages.
    Unaligned,
    /// The target passes 2^64-1.
    OutOfRange,
    /// A mapping and a region of an endpoint meet.
    Reserved,
    Overlap,
    Cut,
    /// A cap of ours.
    Cap,
    /// A mirror has no room for it.
    Unreachable,
    /// A mirror refused.
    Refused,
    /// A mirror of the endpoint could not follow.
    Fenced,
    NoDomain,
    /// It is a bypass domain.
    Bypass,
    /// The endpoint is not in that domain.
    NotAttached,
    /// The model has no way to say it.
    Inexpressible,
    Other(String),
}

impl Why {
    pub(crate) fn of_step(kind: &StepErrorKind) -> Self {
        match kind {
            StepErrorKind::Unaligned { .. } => Self::Unaligned,
            StepErrorKind::OutOfRange { .. } => Self::OutOfRange,
            StepErrorKind::Reserved { .. } => Self::Reserved,
            StepErrorKind::Overlap { .. } => Self::Overlap,
            StepErrorKind::Cut { .. } => Self::Cut,
            StepErrorKind::Cap(_) => Self::Cap,
            StepErrorKind::Unreachable { .. } => Self::Unreachable,
            StepErrorKind::Refused { .. } => Self::Refused,
            StepErrorKind::Gone(_) => Self::NoDomain,
            other => Self::Other(other.to_string()),
        }
    }

    pub(crate) fn of_attach(kind: &AttachErrorKind) -> Self {
        match kind {
            AttachErrorKind::Reserved { .. } => Self::Reserved,
            AttachErrorKind::Cap(_) => Self::Cap,
            AttachErrorKind::Unreachable { .. } => Self::Unreachable,
            AttachErrorKind::Refused(_) => Self::Refused,
            AttachErrorKind::Fenced(_) => Self::Fenced,
            AttachErrorKind::NoDomain(_) => Self::NoDomain,
            other => Self::Other(other.to_string()),
        }
    }

    /// The status that a request of that kind is to be answered with. Mirrors here have room for so many extents, and
    /// refuse for lack of resources.
    fn status(&self, kind: u8) -> Option<Status> {
        Some(match self {
            Self::Unaligned | Self::OutOfRange | Self::Cut => Status::RANGE,
            Self::Reserved if kind == ATTACH => Status::UNSUPP,
            Self::Reserved | Self::Overlap | Self::Bypass | Self::NotAttached => Status::INVAL,
            Self::Cap | Self::Unreachable | Self::Refused => Status::NOMEM,
            Self::Fenced => Status::DEVERR,
            Self::NoDomain => Status::NOENT,
            Self::Inexpressible | Self::Other(_) => return None,
        })
    }

    /// The code that a hypercall is to return; a LIOBN that is not there, and one of a domain that bypasses, is a wrong
    /// argument.
    fn code(&self) -> Option<Code> {
        match self {
            Self::Cap | Self::Unreachable | Self::Refused => Some(Code::Resource),
            Self::Reserved | Self::NoDomain | Self::Bypass => Some(Code::Parameter),
            _ => None,
        }
    }
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    /// Number of the request.
    pub(super) kind: u8,
    /// `None`: nothing was written, or no answer came.
    pub(super) status: Option<Status>,
    pub(super) used: u32,
    /// What the used length must be.
    pub(super) due: u32,
}

impl Reply {
    /// Whether it is what `expected` comes to. An error says what is wrong.
    pub(super) fn check(&self, expected: &Result<(), Why>) -> Result<(), String> {
        let status = match expected {
            Ok(()) => Some(Status::OK),
            Err(why) => why.status(self.kind),
        };
        let name = name_of_request(self.kind);
        if self.status != status || status.is_none() {
            let due = match expected {
                Ok(()) => "OK".to_owned(),
                Err(why) => format!("{} ({why:?})", name_of_status(status)),
            };
            return Err(format!("{name} is answered {}, where {due} is due", name_of_status(self.status)));
        }
        if self.used != self.due {
            return Err(format!("{name} is answered with {} bytes, where {} are due", self.used, self.due));
        }
        Ok(())
    }
}

/// What an operation came to.
#[derive(Clone, Debug)]
pub(crate) enum Answer {
    /// The record says why itself.
    Core(Result<(), Why>),
    /// A device gives a status.
    Device(Reply),
    /// A hypercall returns a code.
    Hypercall(Code),
    /// The model has no way to say it.
    Inexpressible,
}

impl Answer {
    pub(crate) fn is_ok(&self) -> bool {
        match self {
            Self::Core(outcome) => outcome.is_ok(),
            Self::Device(reply) => reply.status == Some(Status::OK),
            Self::Hypercall(code) => *code == Code::Success,
            Self::Inexpressible => false,
        }
    }

    /// Whether a MAP was refused as a cap would have it.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        match self {
            Self::Core(outcome) => *outcome == Err(Why::Cap),
            Self::Device(reply) => reply.kind == MAP && reply.status == Some(Status::NOMEM),
            Self::Hypercall(code) => *code == Code::Resource,
            Self::Inexpressible => false,
        }
    }

    /// What it came to, where one of `expected` is expected, and what is wrong with it.
    pub(crate) fn conclude(self, expected: &[Result<(), Why>]) -> (Result<(), Why>, Option<String>) {
        match self {
            Self::Core(outcome) => {
                let other = matches!(outcome, Err(Why::Other(_)));
                debug_assert!(
                    expected.is_empty() || other || expected.contains(&outcome),
                    "{outcome:?}, expected {expected:?}"
                );
                (outcome, None)
            }
            Self::Device(reply) => {
                if let Some(fits) = expected.iter().find(|expected| reply.check(expected).is_ok()) {
                    return (fits.clone(), None);
                }
                let wrong = expected.first().and_then(|expected| reply.check(expected).err());
                let outcome = match reply.status {
                    Some(Status::OK) => Ok(()),
                    status => Err(Why::Other(name_of_status(status).into())),
                };
                (outcome, wrong)
            }
            Self::Hypercall(code) => {
                let due = |expected: &Result<(), Why>| match expected {
                    Ok(()) => Some(Code::Success),
                    Err(why) => why.code(),
                };
                if let Some(fits) = expected.iter().find(|expected| due(expected) == Some(code)) {
                    return (fits.clone(), None);
                }
                let wrong = format!("a hypercall returns {code:?}, where {expected:?} is due");
                let outcome = if code == Code::Success { Ok(()) } else { Err(Why::Other(wrong.clone())) };
                (outcome, Some(wrong))
            }
            // The replay ends here.
            Self::Inexpressible => (Err(Why::Inexpressible), None),
        }
    }
}

/// Requests by number; 0 is none of them.
pub(crate) const REQUESTS: [&str; 6] = ["-", "ATTACH", "DETACH", "MAP", "UNMAP", "PROBE"];
/// Statuses by number.
pub(crate) const STATUSES: [&str; 9] =
    ["OK", "IOERR", "UNSUPP", "DEVERR", "INVAL", "RANGE", "NOENT", "FAULT", "NOMEM"];

fn name_of_request(kind: u8) -> &'static str {
    REQUESTS.get(usize::from(kind)).copied().unwrap_or("-")
}

fn name_of_status(status: Option<Status>) -> &'static str {
    status.map_or("nothing", |status| STATUSES.get(usize::from(status.0)).copied().unwrap_or("no status"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(kind: u8, status: Status) -> Answer {
        Answer::Device(Reply { kind, status: Some(status), used: 4, due: 4 })
    }

    #[test]
    fn a_status_that_is_due_is_no_difference() {
        for (answer, expected) in [
            (reply(MAP, Status::OK), Ok(())),
            (reply(MAP, Status::INVAL), Err(Why::Reserved)),
            (reply(ATTACH, Status::UNSUPP), Err(Why::Reserved)),
            (reply(MAP, Status::NOMEM), Err(Why::Refused)),
            (reply(ATTACH, Status::DEVERR), Err(Why::Fenced)),
        ] {
            assert_eq!(answer.conclude(core::slice::from_ref(&expected)), (expected, None));
        }
    }

    #[test]
    fn a_wrong_status_is_a_difference_whether_it_accepts_or_refuses() {
        let (outcome, wrong) = reply(MAP, Status::OK).conclude(&[Err(Why::Overlap)]);
        assert_eq!(outcome, Ok(()));
        assert_eq!(wrong.unwrap(), "MAP is answered OK, where INVAL (Overlap) is due");
        let (outcome, wrong) = reply(MAP, Status::NOENT).conclude(&[Ok(())]);
        assert_eq!(outcome, Err(Why::Other("NOENT".into())));
        assert_eq!(wrong.unwrap(), "MAP is answered NOENT, where OK is due");
        let (_, wrong) = reply(ATTACH, Status::INVAL).conclude(&[Err(Why::Reserved)]);
        assert!(wrong.is_some());
    }

    #[test]
    fn a_wrong_used_length_is_a_difference() {
        let short = Reply { kind: ATTACH, status: Some(Status::OK), used: 8, due: 4 };
        let (outcome, wrong) = Answer::Device(short).conclude(&[Ok(())]);
        assert_eq!((outcome, wrong.unwrap().contains("8 bytes")), (Ok(()), true));
        let nothing = Reply { kind: ATTACH, status: None, used: 0, due: 4 };
        let (outcome, wrong) = Answer::Device(nothing).conclude(&[Ok(())]);
        assert!(outcome.is_err() && wrong.unwrap().contains("answered nothing"));
    }

    #[test]
    fn a_code_of_a_hypercall_is_held_against_what_is_due() {
        for (code, expected) in [
            (Code::Success, Ok(())),
            (Code::Resource, Err(Why::Refused)),
            (Code::Resource, Err(Why::Unreachable)),
            (Code::Parameter, Err(Why::Reserved)),
        ] {
            let answer = Answer::Hypercall(code);
            assert_eq!(answer.conclude(core::slice::from_ref(&expected)), (expected, None));
        }
        for (code, expected) in [(Code::Success, Err(Why::Reserved)), (Code::Parameter, Ok(()))] {
            assert!(Answer::Hypercall(code).conclude(&[expected]).1.is_some());
        }
    }

    #[test]
    fn one_of_two_that_may_be_is_what_it_came_to() {
        let either = [Ok(()), Err(Why::Unreachable)];
        assert_eq!(reply(ATTACH, Status::NOMEM).conclude(&either), (Err(Why::Unreachable), None));
        assert_eq!(reply(ATTACH, Status::OK).conclude(&either), (Ok(()), None));
        assert!(reply(ATTACH, Status::RANGE).conclude(&either).1.is_some());
    }
}
