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

/// The class that has the middle one, and its ends in nanoseconds: class n is below 2^n and not below half of it.
/// `None` without any, or if the class has no end.
pub(super) fn median_class(classes: &[u64]) -> Option<(f64, f64)> {
    let count: u64 = classes.iter().sum();
    let due = count.div_ceil(2).max(1);
    let mut so_far = 0;
    let class = classes.iter().position(|count| {
        so_far += count;
        so_far >= due
    })?;
    let end = f64::from(u32::try_from(class).ok()?).exp2();
    (class + 1 < classes.len()).then_some((if class == 0 { 0.0 } else { end / 2.0 }, end))
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
    fn median_class_has_its_ends() {
        assert_eq!(median_class(&[0; 8]), None);
        assert_eq!(median_class(&[0, 0, 0, 2, 1, 0]), Some((4.0, 8.0)));
        assert_eq!(median_class(&[3, 0, 0, 2]), Some((0.0, 1.0)));
        assert_eq!(median_class(&[0, 0, 7]), None, "the last class has no end");
    }
}
