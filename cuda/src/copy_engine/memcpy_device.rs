//! Memory of the host in place of a GPU: a thread per direction copies, while the executor goes on.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::device::CopyDevice;
use super::{CopyMemory, Direction};
use crate::{Error, RawCopy};

/// Pieces that wait for a thread. The executor bounds bytes, so this is hardly ever full.
const QUEUE: usize = 64;

/// One direction: a thread that copies in order.
#[derive(Debug)]
struct Lane {
    sender: Option<SyncSender<Vec<RawCopy>>>,
    thread: Option<JoinHandle<()>>,
    issued: u64,
    ended: Arc<AtomicU64>,
}

/// Two lanes.
#[derive(Debug)]
pub(super) struct MemcpyDevice {
    onboard: Lane,
    offload: Lane,
}

impl MemcpyDevice {
    pub fn new() -> Self {
        Self { onboard: Lane::start(), offload: Lane::start() }
    }

    fn lane(&mut self, direction: Direction) -> &mut Lane {
        match direction {
            Direction::Onboard => &mut self.onboard,
            Direction::Offload => &mut self.offload,
        }
    }
}

impl Lane {
    fn start() -> Self {
        let (sender, receiver) = sync_channel(QUEUE);
        let ended = Arc::new(AtomicU64::new(0));
        let count = ended.clone();
        let thread = std::thread::spawn(move || copy_all(&receiver, &count));
        Self { sender: Some(sender), thread: Some(thread), issued: 0, ended }
    }

    fn stop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.stop();
    }
}

fn copy_all(receiver: &Receiver<Vec<RawCopy>>, ended: &AtomicU64) {
    while let Ok(copies) = receiver.recv() {
        for copy in copies {
            let from = ptr::with_exposed_provenance::<u8>(copy.from.0 as usize);
            let to = ptr::with_exposed_provenance_mut::<u8>(copy.to.0 as usize);
            // SAFETY: the promise made to `issue`. Ranges of shared memory may overlap, when a batch copies within one.
            unsafe { ptr::copy(from, to, copy.bytes) };
        }
        ended.fetch_add(1, Ordering::Release);
    }
}

impl CopyDevice for MemcpyDevice {
    type Mark = (Direction, u64);

    fn reaches(memory: &CopyMemory) -> bool {
        matches!(memory, CopyMemory::Shared(_))
    }

    unsafe fn issue(&mut self, direction: Direction, copies: &[RawCopy]) -> Result<(), Error> {
        let lane = self.lane(direction);
        lane.issued += 1;
        let sender = lane.sender.as_ref().expect("only `finish` takes it, and nothing is issued afterwards");
        sender.send(copies.to_vec()).expect("the thread ends after the sender");
        Ok(())
    }

    fn mark(&mut self, direction: Direction) -> Result<Self::Mark, Error> {
        Ok((direction, self.lane(direction).issued))
    }

    fn is_reached(&mut self, mark: &Self::Mark) -> Result<bool, Error> {
        Ok(self.lane(mark.0).ended.load(Ordering::Acquire) >= mark.1)
    }

    fn recycle(&mut self, _mark: Self::Mark) {}

    fn finish(&mut self) {
        self.onboard.stop();
        self.offload.stop();
    }
}
