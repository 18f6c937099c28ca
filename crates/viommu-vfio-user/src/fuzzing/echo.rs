//! A device that uses its queues and its memory, and looks at how it is treated.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::QUEUES;
use crate::memory::{PAGE, Window, Windows};
use crate::virtio::{Device, DeviceSignal, QueueSignal, ResetBy, feature};

/// Copies what it is given to where it may write.
pub(super) struct Echo {
    pub(super) windows: Windows,
    pub(super) queues: [Option<(Queue, QueueSignal)>; QUEUES],
    pub(super) signal: Option<DeviceSignal>,
    pub(super) known: Vec<Window>,
    pub(super) bell: Arc<OwnedFd>,
}

impl Echo {
    fn serve(&mut self, index: usize) {
        let memory = self.windows.memory();
        let Some((queue, signal)) = &mut self.queues[index] else { return };
        let mut served = Vec::new();
        let Ok(chains) = queue.iter(memory.clone()) else { return signal.needs_reset() };
        for chain in chains {
            let head = chain.head_index();
            let (mut text, mut written) = (Vec::new(), 0_u32);
            for part in chain {
                let bytes = usize::try_from(part.len()).unwrap_or(usize::MAX).min(256);
                if part.is_write_only() {
                    let bytes = bytes.min(text.len());
                    if memory.write_slice(&text[..bytes], part.addr()).is_ok() {
                        written += u32::try_from(bytes).expect("256 at most");
                    }
                } else {
                    let mut data = [0; 256];
                    if memory.read_slice(&mut data[..bytes], part.addr()).is_ok() {
                        text = data[..bytes].to_vec();
                    }
                }
            }
            served.push((head, written));
        }
        for (head, written) in served {
            match queue.add_used(&*memory, head, written).and_then(|()| queue.needs_notification(&*memory)) {
                Ok(true) => signal.interrupt(),
                Ok(false) => {}
                Err(_) => return signal.needs_reset(),
            }
        }
    }
}

impl Device for Echo {
    fn device_type(&self) -> u16 {
        42
    }

    fn class(&self) -> u32 {
        0xff_00_00
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16; QUEUES]
    }

    fn features(&self) -> u64 {
        feature::EVENT_IDX | feature::INDIRECT_DESC | 1
    }

    fn negotiate(&mut self, features: u64) -> bool {
        assert_eq!(features & !(self.features() | feature::VERSION_1 | feature::RING_RESET), 0);
        features & 1 == 0
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        assert!(offset + u64::try_from(data.len()).expect("small") <= PAGE);
    }

    fn ready(&mut self, signal: DeviceSignal) {
        assert!(self.queues.iter().all(Option::is_none));
        self.signal = Some(signal);
    }

    fn start(&mut self, index: u16, queue: Queue, signal: QueueSignal) {
        assert!(self.signal.is_some(), "ready comes first");
        let old = self.queues[usize::from(index)].replace((queue, signal));
        assert!(old.is_none(), "started twice");
        self.serve(index.into());
    }

    fn stop(&mut self, index: u16) {
        assert!(self.queues[usize::from(index)].take().is_some(), "stopped, and not started");
    }

    fn notify(&mut self, index: u16) {
        assert!(self.queues[usize::from(index)].is_some(), "notified, and not started");
        self.serve(index.into());
    }

    fn reset(&mut self, _: ResetBy) {
        assert!(self.queues.iter().all(Option::is_none), "reset while a queue goes on");
        self.signal = None;
    }

    fn doorbell(&self, index: u16) -> Option<Arc<OwnedFd>> {
        (index == 1).then(|| self.bell.clone())
    }

    fn mapped(&mut self, window: Window) {
        self.known.push(window);
    }

    fn unmapped(&mut self, window: Window) {
        let at = self.known.iter().position(|known| *known == window);
        self.known.remove(at.expect("it was mapped"));
        let gone = self.windows.memory().find_region(GuestAddress(window.address)).is_none();
        assert!(gone, "it is still found");
    }

    fn events(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.bell.as_fd()]
    }

    fn event(&mut self, _: usize) {
        self.serve(1);
    }
}
