//! One line of the answer: a figure of ours, the peers', and whether the goal is met.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::cells::Cells;
use crate::work::{Figures, Who, Work};

/// Which of the rounds counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Pick {
    /// The least: of CPU time, which other work can only add to.
    Min,
    /// The middle one: of what two threads do to each other.
    Median,
}

/// Where the goal lies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Limit {
    AtMost(f64),
    AtLeast(f64),
    /// Only reported.
    None,
}

/// What decides.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Rule {
    /// The limit alone.
    Limit,
    /// The factors to the peers of the same run; the limit where no such peer could be measured.
    Factors,
    /// Both.
    Both,
}

/// How many times better than a peer ours has to be, and is.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Factor {
    pub(crate) wanted: f64,
    pub(crate) reached: Option<f64>,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) goal: &'static str,
    pub(crate) what: String,
    pub(crate) ours: f64,
    pub(crate) unit: &'static str,
    /// Null: it has no such operation, or is not on this machine.
    pub(crate) peers: BTreeMap<&'static str, Option<f64>>,
    /// By how many times ours is better, of each peer.
    pub(crate) ratio: BTreeMap<&'static str, f64>,
    /// Factors that the goal asks for, of some peers.
    pub(crate) factors: BTreeMap<&'static str, Factor>,
    pub(crate) limit: Limit,
    /// Whether the limit itself is kept; null when there is none.
    pub(crate) within_limit: Option<bool>,
    /// Whether the goal is met; null when there is none.
    pub(crate) met: Option<bool>,
    /// How far our rounds lie apart, as a part of the value.
    pub(crate) noise: f64,
    #[serde(skip)]
    rule: Rule,
}

/// A value and its noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Value {
    pub(crate) value: f64,
    pub(crate) noise: f64,
}

impl Pick {
    /// Of the rounds of a figure; `None` without any.
    pub(crate) fn of(self, rounds: &[f64]) -> Option<Value> {
        let mut rounds = rounds.to_vec();
        rounds.sort_by(f64::total_cmp);
        let (least, middle, most) = (*rounds.first()?, *rounds.get(rounds.len() / 2)?, *rounds.last()?);
        let part = |spread: f64, of: f64| if of == 0.0 { 0.0 } else { spread / of };
        Some(match self {
            Self::Min => Value { value: least, noise: part(middle - least, least) },
            Self::Median => Value { value: middle, noise: part(most - least, middle) },
        })
    }

    pub(crate) fn figure(self, figures: &Figures, name: &str) -> Option<Value> {
        self.of(figures.get(name)?)
    }
}

impl Row {
    pub(crate) fn new(
        goal: &'static str,
        what: impl Into<String>,
        unit: &'static str,
        limit: Limit,
        ours: Value,
    ) -> Self {
        Self {
            goal,
            what: what.into(),
            ours: ours.value,
            unit,
            peers: BTreeMap::new(),
            ratio: BTreeMap::new(),
            factors: BTreeMap::new(),
            limit,
            within_limit: None,
            met: None,
            noise: ours.noise,
            rule: Rule::Limit,
        }
    }

    /// Puts peers beside it: the same figure of the same work.
    pub(crate) fn beside(
        mut self,
        cells: &mut Cells,
        work: Work,
        figure: &str,
        pick: Pick,
        peers: &[Who],
    ) -> Self {
        for who in peers {
            let value = cells.peer(work, *who).and_then(|figures| pick.figure(figures, figure));
            self.peers.insert(who.name(), value.map(|value| value.value));
        }
        self
    }

    /// Puts one peer's value beside it.
    pub(crate) fn peer(mut self, who: Who, value: Option<f64>) -> Self {
        self.peers.insert(who.name(), value);
        self
    }

    /// Asks for factors to peers.
    pub(crate) fn wants(mut self, rule: Rule, factors: &[(Who, f64)]) -> Self {
        self.rule = rule;
        for (who, wanted) in factors {
            self.factors.insert(who.name(), Factor { wanted: *wanted, reached: None });
        }
        self
    }

    /// Judges.
    pub(crate) fn done(mut self) -> Self {
        let more_is_better = matches!(self.limit, Limit::AtLeast(_));
        for (name, value) in &self.peers {
            if let Some(value) = value {
                let ratio = if more_is_better { self.ours / value } else { value / self.ours };
                if ratio.is_finite() {
                    self.ratio.insert(name, ratio);
                }
            }
        }
        for (name, factor) in &mut self.factors {
            factor.reached = self.ratio.get(name).copied();
        }
        self.within_limit = match self.limit {
            Limit::AtMost(most) => Some(self.ours <= most),
            Limit::AtLeast(least) => Some(self.ours >= least),
            Limit::None => None,
        };
        let reached = self.factors.values().filter_map(|factor| Some(factor.reached? >= factor.wanted));
        let factors = reached.reduce(|all, one| all && one);
        self.met = match (self.rule, factors) {
            (Rule::Factors, Some(factors)) => Some(factors),
            (Rule::Both, Some(factors)) => Some(factors && self.within_limit != Some(false)),
            _ => self.within_limit,
        };
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(limit: Limit, ours: f64) -> Row {
        Row::new("G1", "translate", "ns", limit, Value { value: ours, noise: 0.0 })
    }

    #[test]
    fn min_and_median_of_rounds_with_their_spread() {
        let rounds = [12.0, 10.0, 20.0];
        assert_eq!(Pick::Min.of(&rounds), Some(Value { value: 10.0, noise: 0.2 }));
        assert_eq!(Pick::Median.of(&rounds), Some(Value { value: 12.0, noise: 10.0 / 12.0 }));
        assert_eq!(Pick::Min.of(&[]), None);
    }

    #[test]
    fn factors_decide_and_the_limit_does_when_no_peer_is_there() {
        let judged = |peer: Option<f64>| {
            let row = row(Limit::AtMost(10.0), 8.0).peer(Who::Crosvm, peer);
            row.wants(Rule::Factors, &[(Who::Crosvm, 12.0)]).done()
        };
        let good = judged(Some(100.0));
        assert_eq!((good.met, good.within_limit, good.ratio["crosvm"]), (Some(true), Some(true), 12.5));
        assert_eq!(judged(Some(90.0)).met, Some(false));
        assert_eq!(judged(None).met, Some(true));
    }

    #[test]
    fn more_is_better_turns_the_ratio_round() {
        let row = row(Limit::AtLeast(40.0), 80.0).peer(Who::Qemu, Some(2.0)).done();
        assert_eq!((row.met, row.ratio["qemu"]), (Some(true), 40.0));
    }

    #[test]
    fn both_need_the_limit_too() {
        let judged = row(Limit::AtMost(12.0), 13.0).peer(Who::Qemu, Some(1300.0));
        assert_eq!(judged.wants(Rule::Both, &[(Who::Qemu, 10.0)]).done().met, Some(false));
    }

    #[test]
    fn what_has_no_limit_is_only_reported() {
        assert_eq!(row(Limit::None, 8.0).done().met, None);
    }
}
