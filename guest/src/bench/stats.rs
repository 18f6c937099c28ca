//! Few numbers for many.

/// The middle and the ends of some figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    /// Of any figures; `None` of none at all.
    pub(super) fn of(values: &[f64]) -> Option<Spread> {
        let sorted = sorted(values);
        Some(Spread { median: median(&sorted)?, least: *sorted.first()?, most: *sorted.last()? })
    }
}

/// The mean of the half in the middle: as many of the least are left out as of the most, a quarter each.
pub(super) fn middle_mean(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let out = sorted.len() / 4;
    let middle = sorted.get(out..sorted.len() - out)?;
    (!middle.is_empty()).then(|| middle.iter().sum::<f64>() / middle.len() as f64)
}

/// Where the middle one of some times in classes is, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Median {
    /// The ends of its class, which are sure.
    pub(super) least: f64,
    pub(super) most: f64,
    /// Its place there, if the class's times lie evenly.
    pub(super) about: f64,
}

impl Median {
    /// Class n is below 2^n and not below half of it. `None` without any, or if the class has no end.
    pub(super) fn of(classes: &[u64]) -> Option<Median> {
        let due = classes.iter().sum::<u64>() as f64 / 2.0;
        let mut before = 0.0;
        let class = classes.iter().position(|count| {
            let found = *count > 0 && before + *count as f64 >= due;
            before += if found { 0.0 } else { *count as f64 };
            found
        })?;
        let most = f64::from(u32::try_from(class).ok()?).exp2();
        let least = if class == 0 { 0.0 } else { most / 2.0 };
        let share = (due - before) / *classes.get(class)? as f64;
        (class + 1 < classes.len()).then_some(Median { least, most, about: least + share * (most - least) })
    }

    /// So many times as much.
    pub(super) fn times(self, factor: f64) -> Median {
        Median { least: self.least * factor, most: self.most * factor, about: self.about * factor }
    }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

fn median(sorted: &[f64]) -> Option<f64> {
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get(sorted.len().saturating_sub(1) / 2)?;
    Some(f64::midpoint(*lower, *upper))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_any_order_has_the_middle_and_the_ends() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0]), Some(Spread { median: 3.0, least: 3.0, most: 3.0 }));
        assert_eq!(Spread::of(&[9.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 9.0 }));
        assert_eq!(Spread::of(&[9.0, 1.0, 2.0, 4.0]).map(|spread| spread.median), Some(3.0));
    }

    #[test]
    fn middle_mean_leaves_out_what_is_far_off() {
        assert_eq!(middle_mean(&[]), None);
        assert_eq!(middle_mean(&[5.0]), Some(5.0));
        assert_eq!(middle_mean(&[1000.0, 2.0, 4.0, 0.0]), Some(3.0));
    }

    #[test]
    fn median_has_the_ends_of_its_class_and_a_place_there() {
        assert_eq!(Median::of(&[0; 8]), None);
        let median = Median { least: 4.0, most: 8.0, about: 7.0 };
        assert_eq!(Median::of(&[0, 0, 0, 2, 1, 0]), Some(median));
        assert_eq!(median.times(2.0), Median { least: 8.0, most: 16.0, about: 14.0 });
        assert_eq!(Median::of(&[4, 0, 0, 2]).map(|median| (median.least, median.most)), Some((0.0, 1.0)));
        assert_eq!(Median::of(&[0, 0, 7]), None, "the last class has no end");
    }
}
