//! What happens a second, from two states.

use std::collections::{BTreeMap, VecDeque};

use crate::serve::snapshot::Snapshot;

/// States that are remembered: as many as bars are shown.
const HISTORY: usize = 60;

/// How much happened in a second.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Rates {
    /// By request.
    requests: BTreeMap<String, f64>,
    /// Batches of translations, by endpoint.
    batches: BTreeMap<u32, f64>,
    /// Faults.
    pub(super) faults: f64,
}

impl Rates {
    /// `None`: they are not two states of one server, in their order.
    pub(super) fn between(before: &Snapshot, now: &Snapshot) -> Option<Self> {
        let nanos = now.uptime_ns.checked_sub(before.uptime_ns).filter(|nanos| *nanos != 0)?;
        if before.pid != now.pid {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "to look at")]
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 / (nanos as f64 / 1e9);
        let mut rates = Self::default();
        if let Some((before, now)) = before.iommu.as_ref().zip(now.iommu.as_ref()) {
            for row in &now.requests {
                let name = &row.request;
                let answers = rate(now.answers(name), before.answers(name));
                rates.requests.insert(name.clone(), answers);
            }
            rates.faults = rate(now.faults.total(), before.faults.total());
        }
        for endpoint in &now.endpoints {
            let same = |other: &&crate::serve::snapshot::Endpoint| other.id == endpoint.id;
            let old = before.endpoints.iter().find(same).map_or(0, |other| other.batches);
            // Fewer than before: it has been unplugged, and another one plugged in.
            let old = if old > endpoint.batches { 0 } else { old };
            rates.batches.insert(endpoint.id, rate(endpoint.batches, old));
        }
        Some(rates)
    }

    /// Answers to that request.
    pub(super) fn request(&self, name: &str) -> f64 {
        self.requests.get(name).copied().unwrap_or(0.0)
    }

    /// Batches of translations of that endpoint.
    pub(super) fn batches(&self, endpoint: u32) -> f64 {
        self.batches.get(&endpoint).copied().unwrap_or(0.0)
    }

    /// Of all endpoints.
    pub(super) fn all_batches(&self) -> f64 {
        self.batches.values().sum()
    }
}

/// The last rates, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    last: Option<Snapshot>,
    rates: VecDeque<Rates>,
}

impl History {
    /// The next state.
    pub(super) fn push(&mut self, snapshot: Snapshot) {
        match self.last.as_ref().map(|last| Rates::between(last, &snapshot)) {
            Some(Some(rates)) => {
                if self.rates.len() >= HISTORY {
                    self.rates.pop_front();
                }
                self.rates.push_back(rates);
            }
            // Another server.
            Some(None) => self.rates.clear(),
            None => {}
        }
        self.last = Some(snapshot);
    }

    /// The last state.
    pub(super) fn last(&self) -> Option<&Snapshot> {
        self.last.as_ref()
    }

    /// All there are, oldest first.
    pub(super) fn rates(&self) -> impl DoubleEndedIterator<Item = &Rates> + Clone {
        self.rates.iter()
    }

    /// The newest.
    pub(super) fn now(&self) -> Option<&Rates> {
        self.rates.back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::snapshot::tests::sample;

    /// `sample` two seconds later.
    fn later() -> Snapshot {
        let mut later = sample();
        later.uptime_ns += 2_000_000_000;
        let iommu = later.iommu.as_mut().unwrap();
        iommu.requests[1].count += 500;
        iommu.requests[2].count += 2;
        iommu.faults.mapping += 1;
        later.endpoints[0].batches += 3000;
        later
    }

    #[test]
    fn between_two_states_is_by_the_servers_clock() {
        let rates = Rates::between(&sample(), &later()).unwrap();
        assert_eq!(
            (rates.request("MAP"), rates.request("UNMAP"), rates.request("DETACH")),
            (251.0, 0.0, 0.0)
        );
        assert_eq!((rates.batches(0x10), rates.all_batches(), rates.faults), (1500.0, 1500.0, 0.5));
    }

    #[test]
    fn between_two_servers_there_are_none() {
        let other = Snapshot { pid: 1, ..later() };
        assert_eq!(Rates::between(&sample(), &other), None);
        assert_eq!(Rates::between(&later(), &sample()), None);
        assert_eq!(Rates::between(&sample(), &sample()), None);
    }

    #[test]
    fn history_keeps_the_last_rates_of_one_server() {
        let mut history = History::default();
        assert!(history.last().is_none() && history.now().is_none());
        for n in 0..100 {
            history.push(Snapshot { uptime_ns: sample().uptime_ns + n * 1_000_000_000, ..sample() });
        }
        assert_eq!(history.rates().count(), HISTORY);
        history.push(Snapshot { pid: 1, uptime_ns: 0, ..sample() });
        assert_eq!((history.rates().count(), history.last().unwrap().pid), (0, 1));
    }
}
