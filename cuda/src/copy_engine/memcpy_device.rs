//! Memory of the host in place of a GPU: a thread copies, while the executor goes on.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::CopyMemory;
use super::device::CopyDevice;
use crate::{Error, RawCopy};

/// Pieces that wait for the thread. The executor bounds bytes, so this is hardly ever full.
const QUEUE: usize = 64;

/// A thread that copies in order.
#[derive(Debug)]
pub(super) struct MemcpyDevice {
    sender: Option<SyncSender<Vec<RawCopy>>>,
    thread: Option<JoinHandle<()>>,
    issued: u64,
    ended: Arc<AtomicU64>,
}

impl MemcpyDevice {
    pub fn new() -> Self {
        let (sender, receiver) = sync_channel(QUEUE);
        let ended = Arc::new(AtomicU64::new(0));
        let count = ended.clone();
        let thread = std::thread::spawn(move || copy_all(&receiver, &count));
        Self { sender: Some(sender), thread: Some(thread), issued: 0, ended }
    }
}

impl Drop for MemcpyDevice {
    fn drop(&mut self) {
        self.finish();
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
    type Mark = u64;

    fn reaches(memory: &CopyMemory) -> bool {
        matches!(memory, CopyMemory::Shared(_))
    }

    unsafe fn issue(&mut self, copies: &[RawCopy]) -> Result<(), Error> {
        self.issued += 1;
        let sender = self.sender.as_ref().expect("only `finish` takes it, and nothing is issued afterwards");
        sender.send(copies.to_vec()).expect("the thread ends after the sender");
        Ok(())
    }

    fn mark(&mut self) -> Result<Self::Mark, Error> {
        Ok(self.issued)
    }

    fn is_reached(&mut self, mark: &Self::Mark) -> Result<bool, Error> {
        Ok(self.ended.load(Ordering::Acquire) >= *mark)
    }

    fn recycle(&mut self, _mark: Self::Mark) {}

    fn finish(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
