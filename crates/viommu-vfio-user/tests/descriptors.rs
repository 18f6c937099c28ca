//! A process that has no descriptors left. In a program of its own: the limit is that of a process.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use viommu_vfio_user::{Function, Interrupts, Region, Server, WindowLimits, Windows};

struct Nothing {
    interrupts: Interrupts,
    windows: Windows,
    /// How often the server has looked for what there is to do.
    looked: Arc<AtomicU32>,
}

impl Function for Nothing {
    fn bars(&self) -> [u64; 6] {
        [0; 6]
    }

    fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    fn windows(&self) -> &Windows {
        &self.windows
    }

    fn read(&mut self, _: Region, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _: Region, _: u64, _: &[u8]) {}

    fn reset(&mut self) {}

    fn disconnected(&mut self) {}

    fn events(&self) -> Vec<BorrowedFd<'_>> {
        self.looked.fetch_add(1, Ordering::SeqCst);
        Vec::new()
    }
}

/// VERSION without a word about itself.
const VERSION: [u8; 20] = [1, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

#[test]
fn client_when_no_descriptor_is_left_is_served_later_and_nobody_spins() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let limits = WindowLimits::default();
    let looked = Arc::new(AtomicU32::new(0));
    let function =
        Nothing { interrupts: Interrupts::new(0), windows: Windows::new(limits), looked: looked.clone() };
    let mut server = Server::bind(&path, function, limits).unwrap();
    let stopper = server.stopper();
    let server = thread::spawn(move || server.run());

    let before = getrlimit(Resource::Nofile);
    let mut limited = before;
    limited.current = Some(256);
    setrlimit(Resource::Nofile, limited).unwrap();
    let mut hoard = Vec::new();
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
    }
    hoard.pop();
    // Has the last one.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&VERSION).unwrap();
    let calm = || {
        let before = looked.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(600));
        let often = looked.load(Ordering::SeqCst) - before;
        assert!((2..100).contains(&often), "{often} times in 600 ms");
    };
    calm();

    hoard.clear();
    client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut header = [0; 16];
    client.read_exact(&mut header).unwrap();
    assert_eq!((header[0], header[8] & 0xf, header[12]), (1, 1, 0));

    // The same while there is a client: another waits, and this one is served.
    while let Ok(file) = File::open("/dev/null") {
        hoard.push(file);
    }
    hoard.pop();
    let mut other = UnixStream::connect(&path).unwrap();
    calm();
    client.write_all(&VERSION).unwrap();
    hoard.clear();
    other.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert_eq!(other.read(&mut [0]).unwrap(), 0);

    setrlimit(Resource::Nofile, before).unwrap();
    stopper.stop();
    server.join().unwrap().unwrap();
}
