//! Names of PCI functions.

use core::fmt;
use core::str::FromStr;

/// A PCI function inside its segment: bus, device and function in 8, 5 and 3 bits, as in a requester id.
///
/// As text it is `00:1f.7`, in hexadecimal, without the segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct Bdf(pub u16);

impl Bdf {
    /// The first function of a segment.
    pub const MIN: Self = Self(0);
    /// The last one.
    pub const MAX: Self = Self(u16::MAX);

    /// A function by its three numbers; `None` if `device` is above 31 or `function` above 7.
    #[must_use]
    pub const fn new(bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 0x1f || function > 7 {
            return None;
        }
        Some(Self(u16::from_be_bytes([bus, device << 3 | function])))
    }

    /// The bus.
    #[must_use]
    pub const fn bus(self) -> u8 {
        self.0.to_be_bytes()[0]
    }

    /// The device on its bus, 0 to 31.
    #[must_use]
    pub const fn device(self) -> u8 {
        self.0.to_be_bytes()[1] >> 3
    }

    /// The function of its device, 0 to 7.
    #[must_use]
    pub const fn function(self) -> u8 {
        self.0.to_be_bytes()[1] & 7
    }
}

impl From<u16> for Bdf {
    fn from(raw: u16) -> Self {
        Self(raw)
    }
}

impl From<Bdf> for u16 {
    fn from(bdf: Bdf) -> Self {
        bdf.0
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.device(), self.function())
    }
}

/// A text that names no PCI function.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no PCI function: bus:device.function is expected, as in 00:1f.7")]
pub struct ParseBdfError(String);

impl FromStr for Bdf {
    type Err = ParseBdfError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let read = || {
            let (bus, rest) = text.split_once(':')?;
            let (device, function) = rest.split_once('.')?;
            Self::new(hex(bus)?, hex(device)?, hex(function)?)
        };
        read().ok_or_else(|| ParseBdfError(text.to_owned()))
    }
}

fn hex(digits: &str) -> Option<u8> {
    // from_str_radix takes a sign, and any number of zeros.
    let digits_only = digits.len() <= 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits_only.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn new_places_bus_device_and_function() {
        assert_eq!(Bdf::new(1, 2, 3), Some(Bdf(0x0113)));
        assert_eq!(Bdf::new(0xff, 0x1f, 7), Some(Bdf::MAX));
    }

    #[test]
    fn new_with_too_large_a_number_is_none() {
        assert_eq!(Bdf::new(0, 0x20, 0), None);
        assert_eq!(Bdf::new(0, 0, 8), None);
    }

    #[test]
    fn text_of_a_function_reads_as_it() {
        assert_eq!("00:01.0".parse(), Ok(Bdf(8)));
        assert_eq!("FF:1f.7".parse(), Ok(Bdf::MAX));
    }

    #[test]
    fn text_of_no_function_is_refused() {
        for text in [
            "",
            "00:01",
            "00.01:0",
            "00:20.0",
            "00:01.8",
            "0000:00:01.0",
            "100:00.0",
            "+1:00.0",
            "00:01.0 ",
            "::.",
            "0é:01.0",
        ] {
            assert_eq!(text.parse::<Bdf>(), Err(ParseBdfError(text.to_owned())), "{text:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn text_and_parts_give_the_function_again(raw in any::<u16>()) {
            let bdf = Bdf(raw);
            prop_assert_eq!(bdf.to_string().parse(), Ok(bdf));
            prop_assert_eq!(Bdf::new(bdf.bus(), bdf.device(), bdf.function()), Some(bdf));
        }
    }
}
