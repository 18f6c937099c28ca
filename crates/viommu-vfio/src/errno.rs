//! The kernel's words for what went wrong.

use core::fmt;

use viommu::subscribe::{RefusalKind, Refused};

/// What an ioctl fails with. The numbers are Linux's on x86 and Arm; any other may come from a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

/// The constants, and the names by which they are shown.
macro_rules! errnos {
    ($($name:ident = $number:literal, $doc:literal;)*) => {
        impl Errno {
            $(#[doc = $doc] pub const $name: Self = Self($number);)*

            fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

errnos! {
    EPERM = 1, "Not allowed.";
    ENOENT = 2, "No mapping at that address (`MAP_DMA` with VADDR).";
    EINTR = 4, "The calling thread is being killed.";
    EIO = 5, "The host's IOMMU failed.";
    EBADF = 9, "The descriptor is closed.";
    EAGAIN = 11, "Not now.";
    ENOMEM = 12, "Locked memory would pass its limit, or there is no memory.";
    EACCES = 13, "Not on a type1 v1 container (`DIRTY_PAGES`).";
    EFAULT = 14, "No memory at the host address, or it is read-only.";
    EBUSY = 16, "Not while mediated devices are there, or while a host address is invalid.";
    EEXIST = 17, "Something is mapped there already.";
    ENODEV = 19, "The device is gone.";
    EINVAL = 22, "The arguments: flags, alignment, size, wrap, window, a cut.";
    ENOTTY = 25, "The kernel does not know this call.";
    ENOSPC = 28, "The container's entries are used up.";
    EMSGSIZE = 90, "The answer does not fit (`IOAS_IOVA_RANGES`).";
    EADDRINUSE = 98, "A mapping lies where the device's IOMMU allows none (attach to an iommufd's table).";
    EOVERFLOW = 75, "A range passes 2^64 (since some release after 6.12).";
    EBADFD = 77, "The container has been detached from its device.";
    EOPNOTSUPP = 95, "The kernel does not do this here.";
}

impl Errno {
    /// The error of this positive number.
    #[must_use]
    pub const fn from_raw(number: i32) -> Self {
        Self(number)
    }

    /// The positive number.
    #[must_use]
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// What it means to the record; `call` names the ioctl for the logs.
    #[must_use]
    pub fn refused(self, call: &str) -> Refused {
        let kind = match self {
            Self::ENOSPC | Self::ENOMEM | Self::EAGAIN | Self::EINTR => RefusalKind::Resources,
            Self::EINVAL | Self::EOVERFLOW | Self::EADDRINUSE => RefusalKind::Range,
            Self::ENOTTY | Self::EOPNOTSUPP => RefusalKind::Unsupported,
            _ => RefusalKind::Device,
        };
        Refused::new(kind, format!("{call}: {self}"))
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl core::error::Error for Errno {}

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
    fn a_number_without_a_name_is_shown_as_it_is() {
        assert_eq!(Errno::from_raw(28).to_string(), "ENOSPC");
        assert_eq!(Errno::from_raw(131).to_string(), "errno 131");
    }

    #[test]
    fn refusal_has_the_kind_that_a_guest_is_told() {
        assert_eq!(Errno::ENOSPC.refused("MAP_DMA").kind, RefusalKind::Resources);
        assert_eq!(Errno::ENOMEM.refused("MAP_DMA").kind, RefusalKind::Resources);
        assert_eq!(Errno::EINVAL.refused("MAP_DMA").kind, RefusalKind::Range);
        assert_eq!(Errno::ENOTTY.refused("MAP_DMA").kind, RefusalKind::Unsupported);
        assert_eq!(Errno::EEXIST.refused("MAP_DMA").kind, RefusalKind::Device);
        assert_eq!(Errno::from_raw(131).refused("MAP_DMA").kind, RefusalKind::Device);
        assert_eq!(Errno::EEXIST.refused("MAP_DMA").reason, "MAP_DMA: EEXIST");
    }
}
