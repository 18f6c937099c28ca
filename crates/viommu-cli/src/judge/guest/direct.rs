//! Operations as steps of the record; maps and unmaps as hypercalls, where there are TCE tables before it.

use viommu::endpoint::Region;
use viommu::{Completion, Domain, Endpoint, EndpointConfig, Iommu, IovaRange, Mapping, StepError, Tables};

use super::reply::{Answer, Why};
use super::settle;
use super::tce::Tce;

pub(crate) struct Direct {
    iommu: Iommu,
    may_cut: bool,
    pub(super) tce: Option<Box<Tce>>,
}

impl Direct {
    /// # Errors
    /// There is no address space for the tables.
    pub(crate) fn new(may_cut: bool) -> Result<Self, viommu::BuildError> {
        Ok(Self { iommu: super::builder().build()?, may_cut, tce: None })
    }

    /// With a LIOBN for each domain.
    ///
    /// # Errors
    /// There is no memory for tables or lists.
    pub(crate) fn with_tces(may_cut: bool) -> Result<Self, Box<dyn std::error::Error>> {
        let tce = Tce::new(may_cut)?;
        Ok(Self { iommu: tce.iommu().clone(), may_cut, tce: Some(Box::new(tce)) })
    }

    pub(crate) fn iommu(&self) -> &Iommu {
        &self.iommu
    }

    pub(super) fn add_endpoint(&self, id: u32, regions: Vec<Region>) -> Option<Endpoint> {
        self.iommu.add_endpoint(id, EndpointConfig { regions }).ok()
    }

    /// Makes a domain that is not there. Gives whether it is there now.
    pub(super) fn make(&self, domain: u32) -> bool {
        let tables = if self.may_cut { Tables::OwnedCut } else { Tables::Owned };
        self.iommu.domain(domain).is_some()
            || match &self.tce {
                Some(tce) => tce.make(domain),
                None => self.iommu.create_domain(domain, tables).is_ok(),
            }
    }

    /// `keeps`: the domain is there, and stays if this is refused.
    pub(super) fn attach(
        &self,
        endpoint: &Endpoint,
        domain: u32,
        bypass: bool,
        keeps: bool,
        complaints: &mut Vec<String>,
    ) -> Answer {
        if !bypass && !self.make(domain) {
            return Answer::Core(Err(Why::Cap));
        }
        let outcome = if bypass { endpoint.attach_identity() } else { endpoint.attach(domain) };
        Answer::Core(match outcome {
            Ok(done) => {
                settle(done, complaints);
                Ok(())
            }
            Err(error) => {
                settle(error.completion, complaints);
                if !keeps {
                    self.end(domain, complaints);
                }
                Err(Why::of_attach(&error.kind))
            }
        })
    }

    pub(super) fn detach(&self, endpoint: &Endpoint, is_in: bool, complaints: &mut Vec<String>) -> Answer {
        if !is_in {
            return Answer::Core(Err(Why::NotAttached));
        }
        Answer::Core(match endpoint.detach() {
            Ok(done) => {
                settle(done, complaints);
                Ok(())
            }
            Err(error) => {
                settle(error.completion, complaints);
                // It cannot bypass, so it sees nothing.
                match endpoint.block() {
                    Ok(done) => settle(done, complaints),
                    Err(error) => complaints.push(format!("taking a view away: {error}")),
                }
                Err(Why::of_attach(&error.kind))
            }
        })
    }

    /// Ends a domain, if it is one of mappings.
    pub(super) fn end(&self, domain: u32, complaints: &mut Vec<String>) {
        if self.iommu.domain(domain).is_some() {
            let ended = match &self.tce {
                Some(tce) => tce.end(domain),
                None => self.iommu.destroy_domain(domain),
            };
            match ended {
                Ok(done) => settle(done, complaints),
                Err(error) => complaints.push(format!("the end of a domain: {error}")),
            }
        }
    }

    pub(super) fn map(
        &mut self,
        id: u32,
        domain: Option<&Domain>,
        mapping: Mapping,
        complaints: &mut Vec<String>,
    ) -> Answer {
        match &mut self.tce {
            Some(tce) => tce.map(id, domain, &mapping, complaints),
            None => step(domain, |domain| domain.map(mapping), complaints),
        }
    }

    pub(super) fn unmap(
        &mut self,
        id: u32,
        domain: Option<&Domain>,
        range: IovaRange,
        complaints: &mut Vec<String>,
    ) -> Answer {
        match &mut self.tce {
            Some(tce) => tce.unmap(id, domain, range, complaints),
            None => step(domain, |domain| domain.unmap(range), complaints),
        }
    }

    /// A reset has ended all domains.
    pub(super) fn all_ended(&self) {
        if let Some(tce) = &self.tce {
            tce.all_ended();
        }
    }
}

fn step(
    domain: Option<&Domain>,
    make: impl FnOnce(&Domain) -> Result<Completion, StepError>,
    complaints: &mut Vec<String>,
) -> Answer {
    let Some(domain) = domain else { return Answer::Core(Err(Why::NoDomain)) };
    Answer::Core(match make(domain) {
        Ok(done) => {
            settle(done, complaints);
            Ok(())
        }
        Err(error) => {
            settle(error.completion, complaints);
            Err(Why::of_step(&error.kind))
        }
    })
}
