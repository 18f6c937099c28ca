//! Steps of one mapping go to ordinary mirrors by a short way. As batches of one change, or beside a mirror that is not
//! ordinary, the same steps go the long way: nobody may notice which.

use proptest::prelude::*;
use viommu::subscribe::Reach;
use viommu::{Access, Domain, Extent, Interest, Iommu, Mapping, Medium, StepErrorKind, Subscription};

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

fn run(domain: &Domain, step: &Step, as_batch: bool) -> Result<(), StepErrorKind> {
    let done = match (step, as_batch) {
        (Step::Map(m), false) => domain.map(*m),
        (Step::Map(m), true) => domain.batch().map(*m).commit(),
        (Step::Unmap(first, last), false) => domain.unmap(pages(*first, *last)),
        (Step::Unmap(first, last), true) => domain.batch().unmap(pages(*first, *last)).commit(),
    };
    done.map(over).map_err(|error| error.kind)
}

/// Ordinary mirrors: one with batches, one with few entries, one with a page of its own, one that refuses now and then,
/// and behind it one with batches that reaches but a part.
fn ordinary(iommu: &Iommu, refuse_at: usize) -> [(Subscription, Handle); 5] {
    let batches = Reach { batches: true, ..Reach::default() };
    let first = mirror_on(iommu, 1, batches.clone());
    let few = mirror_on(iommu, 1, Reach { entries: Some(4), ..Reach::default() });
    let (window, windowed) = RecordingMirror::new(Reach { mmio: true, ..Reach::default() });
    let interest = Interest::MIRROR.within(pages(20, 29));
    let window = iommu.subscribe_mirror(viommu::Space::Domain(1), window, interest).unwrap();
    let unsure = mirror_on(iommu, 1, Reach::default());
    unsure.1.refuse_nth(refuse_at, 2, is_map);
    let apertures = vec![pages(0, 4), pages(6, 10)];
    let narrow = mirror_on(iommu, 1, Reach { apertures, ..batches });
    [first, few, (window, windowed), unsure, narrow]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ordinary_mirrors_hear_the_same_by_both_ways(
        steps in prop::collection::vec(step(), 1..60),
        refuse_at in 1_usize..30,
        as_batch in any::<bool>(),
    ) {
        // The other world takes batches, or it has one more mirror, which replaces.
        let subscribers = |replaces: bool| {
            let (iommu, domain) = world();
            let mirrors = ordinary(&iommu, refuse_at);
            let more = replaces.then(|| mirror_on(&iommu, 1, Reach { replace: true, ..Reach::default() }));
            (domain, mirrors, more)
        };
        let (short, here, _) = subscribers(false);
        let (long, there, more) = subscribers(!as_batch);
        for step in &steps {
            let same = match (run(&short, step, false), run(&long, step, as_batch)) {
                (Ok(()), Ok(())) => true,
                (Err(a), Err(b)) => core::mem::discriminant(&a) == core::mem::discriminant(&b),
                _ => false,
            };
            prop_assert!(same, "{:?}", step);
            prop_assert_eq!(short.len(), long.len());
            for ((a, here), (b, there)) in here.iter().zip(&there) {
                prop_assert_eq!(here.take(), there.take());
                prop_assert_eq!(here.lock().batches, there.lock().batches);
                prop_assert!(!here.lock().in_batch, "its batch has not ended");
                let (a, b) = (a.counts(), b.counts());
                prop_assert_eq!((a.map, a.unmap, a.held, a.refused), (b.map, b.unmap, b.held, b.refused));
            }
            prop_assert!(here.iter().chain(&there).chain(&more).all(|(s, _)| s.audit().unwrap().is_clean()));
        }
    }
}
