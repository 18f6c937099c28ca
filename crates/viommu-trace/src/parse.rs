//! Fields of a line, byte by byte, without allocation until something is wrong.

use viommu::addr::{Iova, IovaRange};

/// What is wrong with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bad {
    /// This should come next and does not.
    Missing(&'static str),
    /// No number, or one that does not fit, after this.
    Number(&'static str),
    /// A range ends below its start.
    Backwards,
    /// Something else.
    Other(&'static str),
}

impl core::fmt::Display for Bad {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Missing(what) => write!(f, "`{}` is missing", what.trim()),
            Self::Number(what) => write!(f, "bad number after `{}`", what.trim()),
            Self::Backwards => f.write_str("a range ends below its start"),
            Self::Other(what) => f.write_str(what),
        }
    }
}

/// The rest of a line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl<'a> Fields<'a> {
    /// Goes past `text`.
    #[inline]
    pub(crate) fn literal(&mut self, text: &'static str) -> Result<(), Bad> {
        self.0 = self.0.strip_prefix(text.as_bytes()).ok_or(Bad::Missing(text))?;
        Ok(())
    }

    /// `text`, then a hexadecimal number (any `0x` is part of `text`).
    #[inline]
    pub(crate) fn hex(&mut self, text: &'static str) -> Result<u64, Bad> {
        self.literal(text)?;
        let mut value = 0u64;
        let mut digits = 0;
        for &byte in self.0 {
            let digit = match byte {
                b'0'..=b'9' => byte - b'0',
                b'a'..=b'f' => byte - b'a' + 10,
                b'A'..=b'F' => byte - b'A' + 10,
                _ => break,
            };
            if value >> 60 != 0 {
                return Err(Bad::Number(text));
            }
            value = value << 4 | u64::from(digit);
            digits += 1;
        }
        self.0 = self.0.get(digits..).unwrap_or_default();
        if digits == 0 { Err(Bad::Number(text)) } else { Ok(value) }
    }

    /// `text`, then a decimal number.
    #[inline]
    pub(crate) fn dec(&mut self, text: &'static str) -> Result<u64, Bad> {
        self.literal(text)?;
        let mut value = 0u64;
        let mut digits = 0;
        for &byte in self.0 {
            if !byte.is_ascii_digit() {
                break;
            }
            value = value
                .checked_mul(10)
                .and_then(|v| v.checked_add(u64::from(byte - b'0')))
                .ok_or(Bad::Number(text))?;
            digits += 1;
        }
        self.0 = self.0.get(digits..).unwrap_or_default();
        if digits == 0 { Err(Bad::Number(text)) } else { Ok(value) }
    }

    /// `text`, then a 32-bit number printed as `%d` or `%u`: from 2^31 on it may look negative.
    #[inline]
    pub(crate) fn dec32(&mut self, text: &'static str) -> Result<u32, Bad> {
        self.literal(text)?;
        if let Some(rest) = self.0.strip_prefix(b"-") {
            self.0 = rest;
            let below = self.dec("").ok().and_then(|v| u32::try_from(v).ok());
            return match below {
                Some(v) if v <= 1 << 31 => Ok(v.wrapping_neg()),
                _ => Err(Bad::Number(text)),
            };
        }
        self.dec("").ok().and_then(|v| u32::try_from(v).ok()).ok_or(Bad::Number(text))
    }

    /// `text`, then one 8-bit number in hexadecimal.
    pub(crate) fn hex8(&mut self, text: &'static str) -> Result<u8, Bad> {
        u8::try_from(self.hex(text)?).map_err(|_| Bad::Number(text))
    }

    /// A range with an inclusive end: `first`, number, `last`, number, both hexadecimal.
    #[inline]
    pub(crate) fn range(&mut self, first: &'static str, last: &'static str) -> Result<IovaRange, Bad> {
        let first = self.hex(first)?;
        let last = self.hex(last)?;
        IovaRange::new(Iova(first), Iova(last)).ok_or(Bad::Backwards)
    }

    /// The line ends here, or with a space and fields that a later version added.
    #[inline]
    pub(crate) fn end(&self) -> Result<(), Bad> {
        match self.0.first() {
            None | Some(b' ') => Ok(()),
            Some(_) => Err(Bad::Other("a field is followed by something else")),
        }
    }

    /// The bytes up to the next space, which is skipped too.
    pub(crate) fn word(&mut self) -> &'a [u8] {
        let at = memchr::memchr(b' ', self.0).unwrap_or(self.0.len());
        let (word, rest) = self.0.split_at_checked(at).unwrap_or_default();
        self.0 = rest.get(1..).unwrap_or_default();
        word
    }

    /// Goes past spaces.
    pub(crate) fn spaces(&mut self) {
        self.0 = self.0.trim_ascii_start();
    }
}

/// Nanoseconds of `SECONDS[.FRACTION]`, the fraction up to nine digits; what follows stays in `fields`.
pub(crate) fn seconds(fields: &mut Fields<'_>) -> Option<u64> {
    let whole = fields.dec("").ok()?;
    let nanos = whole.checked_mul(1_000_000_000)?;
    nanos.checked_add(fraction(fields)?)
}

/// Nanoseconds of `.FRACTION`; 0 where there is none.
pub(crate) fn fraction(fields: &mut Fields<'_>) -> Option<u64> {
    if fields.0.first() != Some(&b'.') {
        return Some(0);
    }
    let before = fields.0.len();
    let value = fields.dec(".").ok()?;
    let digits = before.checked_sub(fields.0.len() + 1)?;
    let scale = 10u64.checked_pow(u32::try_from(9usize.checked_sub(digits)?).ok()?)?;
    value.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_do_not_fit_are_bad() {
        assert_eq!(Fields(b"0xffffffffffffffff").hex("0x"), Ok(u64::MAX));
        assert_eq!(Fields(b"0x10000000000000000").hex("0x"), Err(Bad::Number("0x")));
        assert_eq!(Fields(b"0xg").hex("0x"), Err(Bad::Number("0x")));
        assert_eq!(Fields(b"=18446744073709551616").dec("="), Err(Bad::Number("=")));
        assert_eq!(Fields(b"=4294967296").dec32("="), Err(Bad::Number("=")));
        assert_eq!(Fields(b"=-1").dec32("="), Ok(u32::MAX));
        assert_eq!(Fields(b"=-2147483648").dec32("="), Ok(1 << 31));
        assert_eq!(Fields(b"=-2147483649").dec32("="), Err(Bad::Number("=")));
    }

    #[test]
    fn fractions_of_a_second_become_nanoseconds() {
        assert_eq!(seconds(&mut Fields(b"1.502920:")), Some(1_502_920_000));
        assert_eq!(seconds(&mut Fields(b"7")), Some(7_000_000_000));
        assert_eq!(seconds(&mut Fields(b"0.123456789")), Some(123_456_789));
        assert_eq!(seconds(&mut Fields(b"0.1234567890")), None);
        assert_eq!(seconds(&mut Fields(b"99999999999999")), None);
    }
}
