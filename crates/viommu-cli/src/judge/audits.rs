//! What every subscriber says it holds, against record and backing.

use viommu::Subscription;

use super::world::Judge;

/// Guest operations between two audits.
const EVERY: u64 = 1000;

impl Judge {
    pub(super) fn audit_now_and_then(&mut self) {
        let operations = self.tally.operations();
        if operations / EVERY != self.audited_at / EVERY {
            self.audited_at = operations;
            self.audit_all();
        }
    }

    pub(super) fn audit_all(&mut self) {
        let line = self.op.line;
        let mut found = Vec::new();
        let mut run = 0;
        let mut look = |who: &dyn Fn() -> String, subscription: Option<&Subscription>| {
            let Some(audit) = subscription.and_then(Subscription::audit) else { return };
            run += 1;
            if !audit.is_clean() {
                let first = audit.missing.first().or_else(|| audit.extra.first());
                let range = first.map(|m| m.range.to_string()).unwrap_or_default();
                let (missing, extra) = (audit.missing.len(), audit.extra.len());
                found.push(format!(
                    "audit of the {}: {missing} missing, {extra} too many or wrong, first {range}",
                    who()
                ));
            }
        };
        for (id, ep) in &self.endpoints {
            look(&|| format!("mirror of endpoint {id}"), ep.follower.mirror());
            look(&|| format!("cache of endpoint {id}"), ep.follower.cache());
        }
        for (id, dom) in &self.domains {
            if let Some(follower) = &dom.follower {
                look(&|| format!("mirror of domain {id}"), follower.mirror());
                look(&|| format!("cache of domain {id}"), follower.cache());
            }
        }
        for (interface, subscription) in self.reals.subscriptions() {
            look(&|| format!("mirror over {interface}"), Some(subscription));
        }
        found.extend(self.reals.miscounted());
        self.tally.audits_run += run;
        self.tally.audits_failed += found.len() as u64;
        for what in found {
            self.tally.differ(line, || what);
        }
    }
}
