use viommu::{Access, Gpa, Iova};

use super::*;
use crate::software::{Config, Container, SoftwareMirror};

fn deferred(later: Later) -> (Deferred<SoftwareMirror>, Acks) {
    let container = Container::new(Config::default()).unwrap();
    Deferred::new(SoftwareMirror::new(Arc::new(Mutex::new(container))), later)
}

fn extent(n: u64) -> Mapping {
    Mapping::new(Iova(n * 0x1000), 0x1000, Gpa(0), Access::RW).unwrap()
}

fn pends(ack: &Ack) -> bool {
    matches!(ack, Ack::Pending(_))
}

#[test]
fn only_chosen_calls_wait() {
    let (mut mirror, acks) = deferred(Later::UNMAP);
    assert!(!pends(&mirror.map(&extent(1)).unwrap()));
    let unmapped = mirror.unmap(extent(1).range).unwrap();
    assert_eq!(unmapped.bytes, 0x1000);
    assert!(pends(&unmapped.ack));
    assert!(!pends(&mirror.commit()));
    assert_eq!(acks.waiting(), [Call::Unmap(extent(1).range)]);
}

#[test]
fn acks_are_given_in_turn_out_of_turn_or_at_once() {
    let (mut mirror, acks) = deferred(Later::ALL);
    for n in 1..=4 {
        assert!(pends(&mirror.map(&extent(n)).unwrap()));
    }
    assert!(pends(&mirror.commit()));
    assert_eq!(mirror.held().len(), 4, "the calls took effect");
    assert_eq!(acks.done(), Some(Call::Map(extent(1))));
    assert_eq!(acks.done_at(1), Some(Call::Map(extent(3))));
    assert_eq!(acks.failed(), Some(Call::Map(extent(2))));
    assert_eq!(acks.all_done(), 2);
    assert_eq!((acks.done(), acks.failed(), acks.done_at(0)), (None, None, None));
}

#[test]
fn refused_call_owes_nothing() {
    let (mut mirror, acks) = deferred(Later::ALL);
    let _ = mirror.map(&extent(1)).unwrap();
    acks.all_done();
    assert!(mirror.map(&extent(1)).is_err());
    assert!(acks.waiting().is_empty());
}
