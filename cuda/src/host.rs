//! Host memory that the GPU copies to and from at full speed: its pages are pinned.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kvbm_shm::SharedMemory;

use crate::memory::check;
use crate::sys::call;
use crate::{Context, DeviceAddress, Error};

/// Bytes that are registered with one call: about 10 ms, in which other calls to the driver wait.
pub const REGISTER_CHUNK_BYTES: usize = 256 << 20;

/// Portable: known to all GPUs of this process. Mapped: GPUs have an address for it.
const FLAGS: u32 = 1 | 2;

/// Shared memory, registered with the driver for as long as this lives. All GPUs of the process may use it.
///
/// Two processes may register the same memory.
pub struct RegisteredMemory {
    context: Context,
    memory: Arc<SharedMemory>,
    chunk_bytes: usize,
    /// How far it is registered, from its start on.
    registered: usize,
    /// Where GPUs see the start of each chunk.
    addresses: Vec<DeviceAddress>,
}

impl RegisteredMemory {
    /// Registers all of `memory`, chunk by chunk. It should be populated: pages that are not are provided one by one.
    pub fn new(context: &Context, memory: Arc<SharedMemory>) -> Result<Self, Error> {
        let mut registered = Self::begin(context, memory, REGISTER_CHUNK_BYTES)?;
        while registered.register_next()? {}
        Ok(registered)
    }

    /// Registers nothing yet. `chunk_bytes` is a multiple of 4096.
    pub fn begin(context: &Context, memory: Arc<SharedMemory>, chunk_bytes: usize) -> Result<Self, Error> {
        if chunk_bytes == 0 || !chunk_bytes.is_multiple_of(4096) {
            let reason = format!("{chunk_bytes} bytes is not a positive multiple of 4096");
            return Err(Error::refused("a chunk of host memory", reason));
        }
        Ok(Self { context: context.clone(), memory, chunk_bytes, registered: 0, addresses: Vec::new() })
    }

    /// Registers one more chunk; false if there was none left.
    pub fn register_next(&mut self) -> Result<bool, Error> {
        let Some(chunk) = chunk_plan(self.memory.bytes(), self.chunk_bytes).nth(self.addresses.len()) else {
            return Ok(false);
        };
        self.context.bind()?;
        // SAFETY: the chunk lies within the mapping.
        let start = unsafe { self.memory.address().add(chunk.start) }.as_ptr().cast();
        // SAFETY: mapped as long as `self.memory`, and unregistered before that goes.
        unsafe { call!(cuMemHostRegister_v2(start, chunk.len(), FLAGS)) }?;
        self.registered = chunk.end;
        let mut address = 0;
        // SAFETY: writes one address of memory that was just registered.
        let found = unsafe { call!(cuMemHostGetDevicePointer_v2(&mut address, start, 0)) };
        self.addresses.push(DeviceAddress(address));
        found.map(|()| true)
    }

    /// Unregisters it without waiting for the GPU, as dropping it does: that would be a wait for all work of this process,
    /// which is not permitted either while any of it is being recorded.
    ///
    /// # Safety
    /// What the GPU was told to copy from or to it has ended.
    pub unsafe fn end(mut self) -> Result<(), Error> {
        self.unregister()
    }

    /// All of it, and answers with the first failure.
    fn unregister(&mut self) -> Result<(), Error> {
        let chunks = std::mem::take(&mut self.addresses).len();
        let mut ended = self.context.bind();
        for chunk in chunk_plan(self.memory.bytes(), self.chunk_bytes).take(chunks) {
            // SAFETY: the chunk lies within the mapping.
            let start = unsafe { self.memory.address().add(chunk.start) }.as_ptr().cast();
            // SAFETY: registered by `register_next`, unregistered once.
            ended = ended.and(unsafe { call!(cuMemHostUnregister(start)) });
        }
        if ended.is_err() {
            // What may still be registered keeps its addresses: memory that came to lie there could not be registered, and
            // the GPU would be sent to these pages instead.
            std::mem::forget(self.memory.clone());
        }
        ended
    }

    /// The memory itself.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// How much of it is registered, from its start on, bytes.
    pub fn registered(&self) -> usize {
        self.registered
    }

    /// Largest piece that one copy may cover: copies do not cross multiples of this.
    pub fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// Where GPUs see the byte at `offset`. Valid for as many bytes as are left of its chunk.
    pub fn device_address(&self, offset: usize) -> DeviceAddress {
        check(offset, 1, self.registered);
        self.addresses[offset / self.chunk_bytes].plus(offset % self.chunk_bytes)
    }
}

impl Drop for RegisteredMemory {
    fn drop(&mut self) {
        if !self.addresses.is_empty() {
            // What the GPU was told to copy must end while the pages are pinned.
            let _ = self.context.synchronize();
            let _ = self.unregister();
        }
    }
}

impl fmt::Debug for RegisteredMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} bytes registered", self.registered, self.memory.bytes())
    }
}

/// The ranges in which so many bytes are registered: all of them `chunk_bytes` long, except the last.
pub fn chunk_plan(bytes: usize, chunk_bytes: usize) -> impl Iterator<Item = Range<usize>> {
    (0..bytes).step_by(chunk_bytes).map(move |start| start..bytes.min(start + chunk_bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_cover_everything_once_and_in_order(pages in 0usize..300, chunk_pages in 1usize..80) {
            let (bytes, chunk) = (pages * 4096, chunk_pages * 4096);
            let mut end = 0;
            for range in chunk_plan(bytes, chunk) {
                prop_assert_eq!(range.start, end);
                prop_assert!(range.start % chunk == 0 && !range.is_empty() && range.len() <= chunk);
                end = range.end;
            }
            prop_assert_eq!(end, bytes);
        }
    }
}
