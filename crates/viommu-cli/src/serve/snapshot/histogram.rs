//! Times in classes that double.

use serde::{Deserialize, Serialize};

/// How many took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Histogram {
    /// Class n is below 2^n nanoseconds and not below half of it; the last one is open.
    pub(crate) classes: Vec<u64>,
    /// Nanoseconds of the longest.
    pub(crate) longest_ns: u64,
}

impl Histogram {
    /// How many.
    pub(crate) fn count(&self) -> u64 {
        self.classes.iter().sum()
    }

    /// Nanoseconds that `percent` of them did not pass: the upper end of their class, at most the longest. `None`
    /// without any.
    pub(crate) fn percentile(&self, percent: u64) -> Option<u64> {
        let count = self.count();
        let due = u128::from(count).saturating_mul(percent.into()).div_ceil(100).max(1);
        let mut so_far = 0_u128;
        let class = self.classes.iter().position(|class| {
            so_far += u128::from(*class);
            so_far >= due
        })?;
        let open = class + 1 == self.classes.len();
        let end = u32::try_from(class).ok().and_then(|class| 1_u64.checked_shl(class));
        Some(end.filter(|_| !open).map_or(self.longest_ns, |end| end.min(self.longest_ns)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentile_is_the_upper_end_of_the_class_that_has_it() {
        let mut times = Histogram { classes: vec![0; 8], longest_ns: 100 };
        assert_eq!(times.percentile(50), None);
        times.classes[3] = 99;
        times.classes[7] = 1;
        assert_eq!((times.count(), times.percentile(0), times.percentile(99)), (100, Some(8), Some(8)));
        assert_eq!(times.percentile(100), Some(100));
        times.longest_ns = 6;
        assert_eq!(times.percentile(50), Some(6));
    }
}
