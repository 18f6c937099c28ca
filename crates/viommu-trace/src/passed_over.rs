//! What a reader did not use, counted.

use std::collections::HashMap;

/// The most names that are counted one by one.
const NAMES: usize = 256;
const LONGEST: usize = 64;

/// Lines and records that a reader went past.
#[derive(Clone, Debug, Default)]
pub struct PassedOver {
    total: u64,
    chatter: u64,
    names: HashMap<Box<[u8]>, u64>,
}

impl PassedOver {
    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Those that are no event at all: comments, messages, empty lines.
    #[must_use]
    pub fn chatter(&self) -> u64 {
        self.chatter
    }

    /// Events by name, the most frequent first. The first 256 names are counted; others only in the total.
    #[must_use]
    pub fn names(&self) -> Vec<(String, u64)> {
        let mut names: Vec<_> = self
            .names
            .iter()
            .map(|(name, count)| (String::from_utf8_lossy(name).into_owned(), *count))
            .collect();
        names.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        names
    }

    pub(crate) fn chat(&mut self) {
        self.total += 1;
        self.chatter += 1;
    }

    pub(crate) fn event(&mut self, name: &[u8]) {
        self.total += 1;
        if let Some(count) = self.names.get_mut(name) {
            *count += 1;
        } else if self.names.len() < NAMES && name.len() <= LONGEST {
            self.names.insert(name.into(), 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_the_total_is_not() {
        let mut passed = PassedOver::default();
        for n in 0..1000u32 {
            passed.event(n.to_string().as_bytes());
            passed.event(b"often");
        }
        passed.chat();
        assert_eq!(passed.total(), 2001);
        assert_eq!(passed.chatter(), 1);
        assert_eq!(passed.names().len(), NAMES);
        assert_eq!(passed.names().first(), Some(&("often".to_owned(), 1000)));
    }
}
