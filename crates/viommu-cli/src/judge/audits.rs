//! What every subscriber says it holds, against record and backing.

use viommu::Subscription;

use super::follower::Follower;
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
        let mut look = |who: &dyn Fn() -> String, follower: &Follower| {
            for (kind, subscription) in [("mirror", follower.mirror()), ("cache", follower.cache())] {
                let Some(audit) = subscription.and_then(Subscription::audit) else { continue };
                run += 1;
                if !audit.is_clean() {
                    let first = audit.missing.first().or_else(|| audit.extra.first());
                    let range = first.map(|m| m.range.to_string()).unwrap_or_default();
                    let (missing, extra) = (audit.missing.len(), audit.extra.len());
                    found.push(format!(
                        "audit of the {kind} of {}: {missing} missing, {extra} too many or wrong, first {range}",
                        who()
                    ));
                }
            }
        };
        for (id, ep) in &self.endpoints {
            look(&|| format!("endpoint {id}"), &ep.follower);
        }
        for (id, dom) in &self.domains {
            if let Some(follower) = &dom.follower {
                look(&|| format!("domain {id}"), follower);
            }
        }
        self.tally.audits_run += run;
        self.tally.audits_failed += found.len() as u64;
        for what in found {
            self.tally.differ(line, || what);
        }
    }
}
