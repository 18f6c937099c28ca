//! The kernel's words for what went wrong.

use viommu::subscribe::{RefusalKind, Refused};

/// What an ioctl of the container fails with; the numbers are Linux's on x86 and Arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(i32)]
#[non_exhaustive]
pub enum Errno {
    /// No mapping at that address (`MAP_DMA` with VADDR).
    #[error("ENOENT")]
    ENOENT = 2,
    /// Locked memory would pass its limit.
    #[error("ENOMEM")]
    ENOMEM = 12,
    /// No memory at the host address, or it is read-only.
    #[error("EFAULT")]
    EFAULT = 14,
    /// Not while mediated devices are there.
    #[error("EBUSY")]
    EBUSY = 16,
    /// Something is mapped there already.
    #[error("EEXIST")]
    EEXIST = 17,
    /// The arguments: flags, alignment, size, wrap, window, a cut.
    #[error("EINVAL")]
    EINVAL = 22,
    /// The container's entries are used up.
    #[error("ENOSPC")]
    ENOSPC = 28,
    /// The container has been detached from its device.
    #[error("EBADFD")]
    EBADFD = 77,
}

impl Errno {
    /// The positive number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self as i32
    }

    /// What it means to the record; `call` names the ioctl for the logs.
    #[must_use]
    pub fn refused(self, call: &str) -> Refused {
        let kind = match self {
            Self::ENOSPC | Self::ENOMEM => RefusalKind::Resources,
            Self::EINVAL => RefusalKind::Range,
            Self::ENOENT | Self::EFAULT | Self::EBUSY | Self::EEXIST | Self::EBADFD => RefusalKind::Device,
        };
        Refused::new(kind, format!("{call}: {self}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_linux() {
        let all = [
            (Errno::ENOENT, 2),
            (Errno::ENOMEM, 12),
            (Errno::EFAULT, 14),
            (Errno::EBUSY, 16),
            (Errno::EEXIST, 17),
            (Errno::EINVAL, 22),
            (Errno::ENOSPC, 28),
            (Errno::EBADFD, 77),
        ];
        for (errno, number) in all {
            assert_eq!(errno.raw(), number);
        }
    }

    #[test]
    fn refusal_has_the_kind_that_a_guest_is_told() {
        assert_eq!(Errno::ENOSPC.refused("MAP_DMA").kind, RefusalKind::Resources);
        assert_eq!(Errno::ENOMEM.refused("MAP_DMA").kind, RefusalKind::Resources);
        assert_eq!(Errno::EINVAL.refused("MAP_DMA").kind, RefusalKind::Range);
        assert_eq!(Errno::EEXIST.refused("MAP_DMA").kind, RefusalKind::Device);
        assert_eq!(Errno::EEXIST.refused("MAP_DMA").reason, "MAP_DMA: EEXIST");
    }
}
