//! Over real descriptors: the other end of a pair of sockets is the device.

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use viommu::fuzzing::recording::RecordingCache as Other;
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::*;

/// A unit with a cache over a socket, and the device's end of it.
struct Pair {
    domain: Domain,
    memory: Arc<GuestMemoryMmap<()>>,
    handle: Handle,
    subscription: Subscription,
    device: OwnedFd,
}

fn pair(kind: SocketType) -> Pair {
    let (ours, device) = socketpair(AddressFamily::UNIX, kind, SocketFlags::empty(), None).unwrap();
    let memory = memory();
    let builder = backing().into_iter().fold(Iommu::builder(), viommu::Builder::backing);
    let iommu = builder.build().unwrap();
    let domain = iommu.create_domain(1, Tables::Owned).unwrap();
    let endpoint = iommu.add_endpoint(8, EndpointConfig::default()).unwrap();
    over(endpoint.attach(1).unwrap());
    let made = Device::new(ours, protocol()).unwrap();
    let (cache, handle) = made.fence(|| Ok(())).cache(memory.clone());
    let subscription = endpoint.subscribe_cache(Box::new(cache), Interest::CACHE).unwrap();
    handle.start().unwrap();
    let pair = Pair { domain, memory, handle, subscription, device };
    if kind == SocketType::SEQPACKET {
        assert_eq!((pair.told().size, pair.told().size), (1 << 63, 1 << 63));
    }
    pair
}

impl Pair {
    fn told(&self) -> IotlbMsg {
        let mut bytes = [0; 100];
        let got = rustix::io::read(&self.device, &mut bytes[..]).unwrap();
        assert_eq!(got, 72);
        let message = Message::read_from_bytes(&bytes[..72]).unwrap();
        assert_eq!((message.version, message.asid, message.padding), (2, 0, [0; 32]));
        message.iotlb
    }

    fn ask(&self, message: &Message) {
        assert_eq!(rustix::io::write(&self.device, message.as_bytes()).unwrap(), 72);
    }

    fn serve(&self) -> Result<Turn, ServeError> {
        self.handle.serve(&self.subscription)
    }
}

#[test]
fn messages_go_both_ways() {
    let pair = pair(SocketType::SEQPACKET);
    assert_eq!(pair.serve().unwrap(), Turn::default(), "reading does not block");
    over(pair.domain.map(map_of(4, 7, 8, Access::WRITE)).unwrap());
    pair.ask(&miss(4 * PAGE, Access::WRITE));
    assert_eq!(pair.serve().unwrap(), Turn::default());
    let host = pair.memory.get_host_address(GuestAddress(8 * PAGE)).unwrap().addr() as u64;
    assert_eq!(pair.told(), update(4, 7, Gpa(host), perm::WRITE));
    over(pair.domain.unmap(pages(4, 7)).unwrap());
    assert_eq!(pair.told(), invalidate(4, 7));
}

#[test]
fn full_socket_is_a_device_that_takes_nothing() {
    let pair = pair(SocketType::SEQPACKET);
    let mut waits = Vec::new();
    for page in 0.. {
        over(pair.domain.map(rw(0, 0, 0)).unwrap());
        pair.ask(&miss(0, Access::READ));
        if pair.serve().unwrap().waits {
            break;
        }
        let mut done = pair.domain.unmap(pages(0, 0)).unwrap();
        if !done.is_complete() {
            waits.push(done);
            break;
        }
        assert!(page < 100_000, "it takes everything");
    }
    let mut told = 0;
    while pair.serve().unwrap().waits {
        pair.told();
        told += 1;
    }
    assert!(told > 0);
    waits.into_iter().for_each(over);
}

#[test]
fn device_that_is_gone_is_cut_off_at_the_next_removal() {
    let pair = pair(SocketType::SEQPACKET);
    over(pair.domain.map(rw(0, 0, 0)).unwrap());
    pair.ask(&miss(0, Access::READ));
    assert_eq!(pair.serve().unwrap(), Turn::default());
    pair.told();
    let Pair { domain, handle, subscription, device, .. } = pair;
    drop(device);
    assert!(matches!(handle.serve(&subscription), Err(ServeError::Read(_))));
    over(domain.unmap(pages(0, 0)).unwrap());
    assert!(subscription.is_fenced() && handle.is_fenced());
}

#[test]
fn half_a_message_is_an_error() {
    let pair = pair(SocketType::SEQPACKET);
    rustix::io::write(&pair.device, &[0; 40][..]).unwrap();
    let Err(ServeError::Read(error)) = pair.serve() else { panic!() };
    assert_eq!(error.raw_os_error(), Some(Errno::BADMSG.raw_os_error()));
}

#[test]
fn subscription_of_another_kind_is_refused() {
    let pair = pair(SocketType::SEQPACKET);
    let builder = backing().into_iter().fold(Iommu::builder(), viommu::Builder::backing);
    let iommu = builder.build().unwrap();
    let (mirror, _) = recording::RecordingMirror::new(subscribe::Reach::default());
    let space = iommu.create_domain(1, Tables::Owned).unwrap().space();
    let mirror = iommu.subscribe_mirror(space, mirror, Interest::MIRROR).unwrap();
    pair.ask(&miss(0, Access::READ));
    assert!(matches!(pair.handle.serve(&mirror), Err(ServeError::Fill(viommu::FillError::NotACache))));
    // Another cache's gets the answer; ours has told the device nothing.
    let (other, told) = Other::new();
    let other = iommu.subscribe_cache(space, other, Interest::CACHE).unwrap();
    over(iommu.domain(1).unwrap().map(rw(0, 0, 0)).unwrap());
    pair.ask(&miss(0, Access::READ));
    assert_eq!(pair.handle.serve(&other).unwrap(), Turn::default());
    assert_eq!((told.held().len(), pair.handle.held().len()), (1, 0));
}
