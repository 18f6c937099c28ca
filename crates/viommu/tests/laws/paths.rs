//! Steps of one mapping go to ordinary mirrors by a short way. Beside a mirror that is not ordinary the same steps go
//! the long way: nobody may notice which.

use proptest::prelude::*;
use viommu::subscribe::Reach;
use viommu::{Access, Domain, Extent, Interest, Iommu, Mapping, Medium, StepErrorKind};

use crate::support::*;

/// One step over few pages: RAM in two extents (pages 0-15 and 16-31), ROM at 32-39, nothing at 40-47, MMIO at 48-55.
#[derive(Clone, Debug)]
enum Step {
    Map(Mapping),
    Unmap(u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let mapping =
        (0_u64..12, 1_u64..3, 0_u64..54, 0_u8..4, any::<bool>()).prop_map(|(at, len, gpa, access, mmio)| {
            let m = map_of(at, at + len - 1, gpa, Access::from_bits_truncate(access));
            Step::Map(if mmio && gpa >= 48 { m.mmio() } else { m })
        });
    let unmap = (0_u64..12, 1_u64..3).prop_map(|(at, len)| Step::Unmap(at, at + len - 1));
    prop_oneof![3 => mapping, 2 => unmap]
}

fn world() -> (Iommu, Domain) {
    let (iommu, _) = unit_with(|b| {
        b.ram(0, 16 * PAGE)
            .ram(16 * PAGE, 16 * PAGE)
            .backing(Extent { range: gpas(32, 39), medium: Medium::Rom })
            .backing(Extent { range: gpas(48, 55), medium: Medium::Mmio })
    });
    let domain = iommu.create_domain(1, viommu::Tables::Owned).unwrap();
    (iommu, domain)
}

fn run(domain: &Domain, step: &Step) -> Result<(), StepErrorKind> {
    let done = match step {
        Step::Map(m) => domain.map(*m),
        Step::Unmap(first, last) => domain.unmap(pages(*first, *last)),
    };
    done.map(over).map_err(|error| error.kind)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ordinary_mirrors_hear_the_same_by_both_ways(
        steps in prop::collection::vec(step(), 1..60),
        refuse_at in 1_usize..30,
    ) {
        // Two ordinary mirrors: one with few entries, one with a page of its own and one that refuses now and then. The
        // other world has one more behind them, with batches.
        let subscribers = |batches: bool| {
            let (iommu, domain) = world();
            let few = mirror_on(&iommu, 1, Reach { entries: Some(4), ..Reach::default() });
            let (window, windowed) = RecordingMirror::new(Reach { mmio: true, ..Reach::default() });
            let interest = Interest::MIRROR.within(pages(20, 29));
            let window = iommu.subscribe_mirror(viommu::Space::Domain(1), window, interest).unwrap();
            let unsure = mirror_on(&iommu, 1, Reach::default());
            unsure.1.refuse_nth(refuse_at, 2, is_map);
            let more = batches.then(|| mirror_on(&iommu, 1, Reach { batches: true, ..Reach::default() }));
            (domain, [few, (window, windowed), unsure], more)
        };
        let (short, here, _) = subscribers(false);
        let (long, there, more) = subscribers(true);
        for step in &steps {
            let same = match (run(&short, step), run(&long, step)) {
                (Ok(()), Ok(())) => true,
                (Err(a), Err(b)) => core::mem::discriminant(&a) == core::mem::discriminant(&b),
                _ => false,
            };
            prop_assert!(same, "{:?}", step);
            prop_assert_eq!(short.len(), long.len());
            for ((a, here), (b, there)) in here.iter().zip(&there) {
                prop_assert_eq!(here.take(), there.take());
                let (a, b) = (a.counts(), b.counts());
                prop_assert_eq!((a.map, a.unmap, a.held, a.refused), (b.map, b.unmap, b.held, b.refused));
            }
            prop_assert!(here.iter().chain(&there).chain(&more).all(|(s, _)| s.audit().unwrap().is_clean()));
        }
    }
}
