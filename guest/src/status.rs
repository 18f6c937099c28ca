//! What `viommu status --json` says, as far as the cases ask.

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::live::{Access, Live, Mapping};

/// The live state of a server.
#[derive(Clone, Debug)]
pub(crate) struct Status(Value);

impl Status {
    pub(crate) fn new(value: Value) -> Status {
        Status(value)
    }

    /// The answers to a request (`MAP`, say), and how many of them were not OK.
    pub(crate) fn answers(&self, request: &str) -> (u64, u64) {
        let rows = self.0["iommu"]["requests"].as_array().map_or(&[][..], Vec::as_slice);
        rows.iter().filter(|row| row["request"] == request).fold((0, 0), |(all, refused), row| {
            let count = row["count"].as_u64().unwrap_or(0);
            (all + count, refused + if row["status"] == "OK" { 0 } else { count })
        })
    }

    /// The IOMMU's requests by the time until their answer: class n is below 2^n nanoseconds, and the last one is open.
    ///
    /// # Errors
    ///
    /// If the answer does not say.
    pub(crate) fn request_times(&self) -> anyhow::Result<Vec<u64>> {
        let classes = &self.0["iommu"]["request_times"]["classes"];
        let classes = classes.as_array().context("no times of the IOMMU's requests")?;
        classes.iter().map(|count| count.as_u64().with_context(|| format!("{count}"))).collect()
    }

    /// Accesses that reached nothing.
    ///
    /// # Errors
    ///
    /// If the answer does not say.
    pub(crate) fn faults(&self) -> anyhow::Result<u64> {
        let faults = &self.0["iommu"]["faults"];
        ["domain", "mapping", "unknown"].iter().try_fold(0, |sum, reason| {
            Ok(sum + faults[reason].as_u64().with_context(|| format!("no faults of {reason}: {faults}"))?)
        })
    }

    /// The last accesses that reached nothing, as they are told.
    pub(crate) fn recent_faults(&self) -> &[Value] {
        self.0["iommu"]["faults"]["recent"].as_array().map_or(&[], Vec::as_slice)
    }

    /// Requests that could not be read, and answers that the guest waits for.
    ///
    /// # Errors
    ///
    /// If the answer does not say.
    pub(crate) fn malformed_and_outstanding(&self) -> anyhow::Result<(u64, u64)> {
        let number = |name: &str| {
            self.0["iommu"][name].as_u64().with_context(|| format!("no {name}: {}", self.0["iommu"]))
        };
        Ok((number("malformed")?, number("outstanding")?))
    }

    /// An endpoint by its PCI address.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub(crate) fn endpoint(&self, address: &str) -> anyhow::Result<&Value> {
        let endpoints = self.0["endpoints"].as_array().context("no endpoints")?;
        let found = endpoints.iter().find(|endpoint| endpoint["address"] == address);
        found.with_context(|| format!("no endpoint {address}: {endpoints:?}"))
    }

    /// The domain that an endpoint sees; none, if it sees something else.
    ///
    /// # Errors
    ///
    /// If there is no such endpoint.
    pub(crate) fn domain(&self, address: &str) -> anyhow::Result<Option<u64>> {
        Ok(self.endpoint(address)?["view"]["domain"].as_u64())
    }

    /// Mappings of all domains.
    ///
    /// # Errors
    ///
    /// If the answer does not say.
    pub(crate) fn live(&self) -> anyhow::Result<u64> {
        let domains = self.0["iommu"]["domains"].as_array().context("no domains")?;
        domains.iter().try_fold(0, |sum, domain| {
            Ok(sum + domain["live"].as_u64().with_context(|| format!("{domain}"))?)
        })
    }

    /// What is mapped for each endpoint that is in a domain: by the record, or, where that does not follow the guest's
    /// tables, by those.
    ///
    /// # Errors
    ///
    /// If the answer cannot be read.
    pub(crate) fn mappings(&self) -> anyhow::Result<Live> {
        self.listed(|domain| {
            let list = [&domain["mappings"], &domain["tables"]].into_iter().find(|list| list.is_array());
            let count = domain["live"].as_u64();
            let listed = list.and_then(Value::as_array).map(|list| list.len() as u64);
            ensure!(count == listed, "{count:?} mappings, but {listed:?} listed");
            list.with_context(|| format!("no mappings: {domain}"))
        })
    }

    /// What the record has for each endpoint that is in a domain; nothing for one whose tables it does not follow.
    ///
    /// # Errors
    ///
    /// If the answer cannot be read.
    pub(crate) fn recorded(&self) -> anyhow::Result<Live> {
        self.listed(|domain| Ok(&domain["mappings"]))
    }

    /// What the guest's tables in its memory map for each endpoint that is in a domain; nothing, if it has no such.
    ///
    /// # Errors
    ///
    /// If the answer cannot be read.
    pub(crate) fn tables(&self) -> anyhow::Result<Live> {
        self.listed(|domain| Ok(&domain["tables"]))
    }

    fn listed<'a>(&'a self, list: impl Fn(&'a Value) -> anyhow::Result<&'a Value>) -> anyhow::Result<Live> {
        let domains = self.0["iommu"]["domains"].as_array().context("no domains")?;
        let endpoints = self.0["endpoints"].as_array().context("no endpoints")?;
        let mut live = Live::new();
        for domain in domains {
            let Some(mappings) = list(domain)?.as_array() else { continue };
            let mappings: Vec<Mapping> = mappings
                .iter()
                .map(|value| mapping(value).with_context(|| format!("{value}")))
                .collect::<Result<_, _>>()?;
            let members = domain["endpoints"].as_array().with_context(|| format!("{domain}"))?;
            for member in members {
                let endpoint = endpoints.iter().find(|endpoint| endpoint["id"] == *member);
                let address = endpoint.and_then(|endpoint| endpoint["address"].as_str());
                let address = address.with_context(|| format!("no endpoint {member}"))?;
                live.insert(address.to_owned(), mappings.clone());
            }
        }
        Ok(live)
    }
}

fn mapping(value: &Value) -> anyhow::Result<Mapping> {
    let number = |name: &str| {
        let digits = value[name].as_str().and_then(|text| text.strip_prefix("0x"));
        let digits = digits.with_context(|| format!("no {name}"))?;
        u64::from_str_radix(digits, 16).with_context(|| name.to_owned())
    };
    let access = value["access"].as_str().context("no access")?;
    let access = Access { read: access.contains('r'), write: access.contains('w') };
    Ok(Mapping { start: number("start")?, end: number("last")?, gpa: number("gpa")?, access })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn status_is_read_as_it_is_written() {
        let status = Status::new(json!({
            "iommu": {
                "requests": [
                    { "request": "MAP", "status": "OK", "count": 7 },
                    { "request": "MAP", "status": "NOMEM", "count": 2 },
                    { "request": "UNMAP", "status": "OK", "count": 6 },
                ],
                "malformed": 0,
                "outstanding": 1,
                "faults": { "domain": 1, "mapping": 2, "unknown": 0, "recent": [] },
                "domains": [{
                    "id": 1,
                    "endpoints": [16],
                    "live": 1,
                    "mappings": [{ "start": "0x1000", "last": "0x1fff", "gpa": "0x5000", "access": "rw" }],
                }],
            },
            "endpoints": [{ "address": "00:02.0", "id": 16, "view": { "domain": 1 } }],
        }));
        assert_eq!(status.answers("MAP"), (9, 2));
        assert_eq!(status.faults().expect("there"), 3);
        assert_eq!(status.malformed_and_outstanding().expect("there"), (0, 1));
        assert_eq!(status.domain("00:02.0").expect("there"), Some(1));
        assert_eq!(status.live().expect("there"), 1);
        let access = Access { read: true, write: true };
        let mapping = Mapping { start: 0x1000, end: 0x1fff, gpa: 0x5000, access };
        assert_eq!(status.mappings().expect("there")["00:02.0"], [mapping]);
        assert!(status.endpoint("00:03.0").is_err());
    }
}
