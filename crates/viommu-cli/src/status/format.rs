//! Numbers to look at.

/// A number with its thousands set apart; from 100 million on in millions.
pub(super) fn count(number: u64) -> String {
    let (number, unit) = if number < 100_000_000 { (number, "") } else { (number / 1_000_000, "M") };
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at != 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text + unit
}

/// A number a second.
pub(super) fn rate(number: f64) -> String {
    if number > 0.0 && number < 9.95 {
        return format!("{number:.1}");
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "saturates, and is looked at"
    )]
    let whole = number.round() as u64;
    count(whole)
}

/// Bytes in the unit that leaves the fewest digits.
pub(super) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let shift = (63 - bytes.leading_zeros()) / 10;
    let unit = UNITS.get(usize::try_from(shift).unwrap_or(0).saturating_sub(1)).copied().unwrap_or("EiB");
    let whole = bytes >> (10 * shift);
    // One digit behind the point, where it says something.
    let tenth = (bytes >> (10 * (shift - 1))) % 1024 * 10 / 1024;
    if whole < 10 && tenth != 0 { format!("{whole}.{tenth} {unit}") } else { format!("{whole} {unit}") }
}

/// Nanoseconds, in three digits at most.
pub(super) fn time(nanos: u64) -> String {
    const UNITS: [(&str, u64); 4] = [("ns", 1), ("µs", 1_000), ("ms", 1_000_000), ("s", 1_000_000_000)];
    let fits = UNITS.iter().find(|(_, size)| nanos / size < 1000);
    let (unit, size) = fits.copied().unwrap_or(("s", 1_000_000_000));
    let whole = nanos / size;
    let tenth = nanos % size * 10 / size;
    if whole < 10 && size != 1 { format!("{whole}.{tenth} {unit}") } else { format!("{whole} {unit}") }
}

/// How long something has been there.
pub(super) fn age(nanos: u64) -> String {
    let seconds = nanos / 1_000_000_000;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    if days != 0 {
        format!("{days}d{:02}h", hours % 24)
    } else if hours != 0 {
        format!("{hours}h{:02}m", minutes % 60)
    } else if minutes != 0 {
        format!("{minutes}m{:02}s", seconds % 60)
    } else {
        format!("{seconds}s")
    }
}

/// The end of a long text, which tells more than its beginning.
pub(super) fn end_of(text: &str, width: usize) -> String {
    let count = text.chars().count();
    if count <= width {
        return text.to_owned();
    }
    core::iter::once('…').chain(text.chars().skip(count + 1 - width)).collect()
}

/// The last values as bars, the newest to the right: each is as high as it is beside the highest.
pub(super) fn bars(values: impl DoubleEndedIterator<Item = f64> + Clone, width: usize) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let highest = values.clone().rev().take(width).fold(0.0_f64, f64::max);
    let bar = |value: f64| {
        let part = if highest > 0.0 { (value / highest * 8.0).ceil() } else { 0.0 };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 8")]
        BARS.get(part as usize).copied().unwrap_or(' ')
    };
    let newest_first: Vec<char> = values.rev().take(width).map(bar).collect();
    let bars: String = newest_first.iter().rev().collect();
    format!("{bars:>width$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_to_be_read() {
        let written = [0, 999, 1000, 1_234_567, 99_999_999, 100_000_000, 12_345_000_000_000].map(count);
        assert_eq!(written, ["0", "999", "1,000", "1,234,567", "99,999,999", "100M", "12,345,000M"]);
        assert!(!count(u64::MAX).is_empty());
        assert_eq!([0.0, 0.04, 0.5, 9.94, 9.96, 1234.4].map(rate), ["0", "0.0", "0.5", "9.9", "10", "1,234"]);
        assert_eq!(
            [0, 1023, 1024, 1536, 24_576, 512 << 20, 3 << 29, u64::MAX].map(bytes),
            ["0 B", "1023 B", "1 KiB", "1.5 KiB", "24 KiB", "512 MiB", "1.5 GiB", "15 EiB"]
        );
        assert_eq!(
            [0, 999, 1000, 8192, 131_072, 1_900_000, 12_345_678_901, u64::MAX].map(time),
            ["0 ns", "999 ns", "1.0 µs", "8.1 µs", "131 µs", "1.9 ms", "12 s", "18446744073 s"]
        );
        let second = 1_000_000_000;
        assert_eq!(
            [second - 1, 83 * second, 7_500 * second, 90_000 * second].map(age),
            ["0s", "1m23s", "2h05m", "1d01h"]
        );
    }

    #[test]
    fn end_of_a_long_text_fits() {
        assert_eq!((end_of("abcdef", 4), end_of("abc", 4)), ("…def".into(), "abc".into()));
    }

    #[test]
    fn bars_show_the_last_values_beside_the_highest_of_them() {
        assert_eq!(bars([100.0, 0.0, 1.0, 4.0, 8.0].into_iter(), 4), " ▁▄█");
        assert_eq!(bars([5.0].into_iter(), 3), "  █");
        assert_eq!(bars([0.0, 0.0].into_iter(), 3), "   ");
    }
}
