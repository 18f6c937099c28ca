//! An observer that says what changes, as events of `tracing`.

use crate::change::Change;
use crate::endpoint::{EndpointId, View};
use crate::mapping::Mapping;
use crate::subscribe::{Observer, Space};

/// Says each committed change of an address space (at TRACE), and each new view of an endpoint (at DEBUG), as events of the
/// target `viommu::change`. They come under the locks of the step, as many as there are changes: for whoever looks for
/// something, not for a log that is always on. What was there when it was subscribed is not said.
///
/// ```
/// use viommu::{EndpointConfig, Interest, Iommu, subscribe::Traced};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let iommu = Iommu::builder().build()?;
/// # let endpoint = iommu.add_endpoint(8, EndpointConfig::default())?;
/// let traced = endpoint.subscribe_observer(Box::new(Traced), Interest::MIRROR)?;
/// # drop(traced);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Traced;

/// One event for a mapping.
macro_rules! say {
    ($space:expr, $m:expr, $what:literal $(, $old:expr)?) => {{
        let Mapping { range, gpa, access, target } = $m;
        tracing::trace!(
            target: "viommu::change",
            space = %$space, iova = %range, %gpa, ?access, ?target $(, old_gpa = %$old.gpa, old_access = ?$old.access)?,
            $what
        );
    }};
}

impl Observer for Traced {
    fn changed(&mut self, space: Space, change: &Change) {
        match change {
            Change::Map { new } => say!(space, new, "map"),
            Change::Unmap { old } => say!(space, old, "unmap"),
            Change::Replace { old, new } => say!(space, new, "replace", old),
        }
    }

    fn moved(&mut self, endpoint: EndpointId, to: View) {
        tracing::debug!(target: "viommu::change", %endpoint, ?to, "moved");
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use core::fmt::{Debug, Write as _};
    use std::sync::{Arc, Mutex};

    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata};

    use super::*;
    use crate::domain::Tables;
    use crate::{Access, EndpointConfig, Gpa, Interest, Iommu, Iova, Kinds};

    /// What a subscriber of `tracing` hears.
    #[derive(Clone, Default)]
    struct Heard(Arc<Mutex<Vec<String>>>);

    struct Line(String);

    impl Visit for Line {
        fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
            match field.name() {
                "message" => self.0.insert_str(0, &format!("{value:?}")),
                name => write!(self.0, " {name}={value:?}").unwrap(),
            }
        }
    }

    impl tracing::Subscriber for Heard {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.target() == "viommu::change"
        }
        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn event(&self, event: &Event<'_>) {
            let mut line = Line(String::new());
            event.record(&mut line);
            self.0.lock().unwrap().push(line.0);
        }
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }

    /// Another observer, which writes down the same.
    #[derive(Clone, Default)]
    struct Beside(Arc<Mutex<Vec<String>>>);

    impl Observer for Beside {
        fn changed(&mut self, space: Space, change: &Change) {
            let (what, m) = match change {
                Change::Map { new } => ("map", new),
                Change::Unmap { old } => ("unmap", old),
                Change::Replace { new, .. } => ("replace", new),
            };
            let Mapping { range, gpa, access, target } = m;
            let mut line =
                format!("{what} space={space} iova={range} gpa={gpa} access={access:?} target={target:?}");
            if let Change::Replace { old, .. } = change {
                write!(line, " old_gpa={} old_access={:?}", old.gpa, old.access).unwrap();
            }
            self.0.lock().unwrap().push(line);
        }

        fn moved(&mut self, endpoint: EndpointId, to: View) {
            self.0.lock().unwrap().push(format!("moved endpoint={endpoint} to={to:?}"));
        }
    }

    #[test]
    fn what_is_traced_is_what_an_observer_hears() {
        let iommu = Iommu::builder().ram(0, 0x10_0000).build().unwrap();
        let domain = iommu.create_domain(1, Tables::Owned).unwrap();
        let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
        let (heard, beside) = (Heard::default(), Beside::default());
        let all = Interest::all_of(Kinds::MAP | Kinds::UNMAP);
        let _traced = endpoint.subscribe_observer(Box::new(Traced), all).unwrap();
        let _beside = endpoint.subscribe_observer(Box::new(beside.clone()), all).unwrap();
        let page = |iova, gpa, access| Mapping::new(Iova(iova), 0x1000, Gpa(gpa), access).unwrap();
        tracing::subscriber::with_default(heard.clone(), || {
            drop(endpoint.attach(1).unwrap());
            drop(domain.map(page(0x1000, 0x8000, Access::READ)).unwrap());
            drop(domain.map(page(0x2000, 0x9000, Access::RW).mmio()).unwrap());
            drop(domain.replace(page(0x1000, 0xa000, Access::RW)).unwrap());
            drop(domain.map(page(0x1000, 0xa000, Access::RW)).unwrap_err());
            drop(domain.unmap(crate::IovaRange::ALL).unwrap());
            drop(endpoint.block().unwrap());
        });
        let heard = heard.0.lock().unwrap();
        assert_eq!(*heard, *beside.0.lock().unwrap());
        assert_eq!(heard[0], "moved endpoint=endpoint 8 to=Domain(1)");
        assert!(heard[1].starts_with("map space=domain 1 iova="), "{heard:?}");
        assert_eq!(heard.len(), 7, "{heard:?}");
        assert!(
            heard[3].starts_with("replace") && heard[3].ends_with("old_access=Access(READ)"),
            "{heard:?}"
        );
    }
}
