//! Streams: work on a GPU that is done in the order in which it was issued.

use std::fmt;
use std::ptr;

use crate::sys::{call, check_ready, cu};
use crate::{Context, DeviceAddress, Error, Event, StreamWord};

/// One stream. It does not wait for the default stream.
pub struct Stream {
    context: Context,
    raw: cu::CUstream,
}

// SAFETY: streams may be used from any thread; the driver synchronises.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// Creates a stream.
    pub fn new(context: &Context) -> Result<Self, Error> {
        Self::with_priority(context, 0)
    }

    /// Creates a stream whose kernels go before those of others. It shares no hardware queue with streams that are not
    /// urgent: where a process has many, those that share one wait for each other.
    pub fn urgent(context: &Context) -> Result<Self, Error> {
        context.bind()?;
        let (mut least, mut most) = (0, 0);
        // SAFETY: writes two numbers.
        unsafe { call!(cuCtxGetStreamPriorityRange(&mut least, &mut most)) }?;
        Self::with_priority(context, most)
    }

    fn with_priority(context: &Context, priority: i32) -> Result<Self, Error> {
        context.bind()?;
        let mut raw = ptr::null_mut();
        let flags = cu::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle, which `self` destroys.
        unsafe { call!(cuStreamCreateWithPriority(&mut raw, flags, priority)) }?;
        Ok(Self { context: context.clone(), raw })
    }

    /// The context it belongs to.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Waits until everything issued so far has ended. An error may be that of earlier work.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: our own stream.
        unsafe { call!(cuStreamSynchronize(self.raw)) }
    }

    /// True if everything issued so far has ended.
    pub fn is_idle(&self) -> Result<bool, Error> {
        self.context.bind()?;
        // SAFETY: our own stream.
        check_ready("cuStreamQuery", unsafe { cu::cuStreamQuery(self.raw) })
    }

    /// What is issued from now on waits until `event` has happened.
    pub fn wait_event(&self, event: &Event) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: both are alive; the driver keeps what it needs of the event.
        unsafe { call!(cuStreamWaitEvent(self.raw, event.raw(), 0)) }
    }

    /// When all before it has ended, the word becomes `value`, after all bytes written before it are visible.
    pub fn write_word(&self, word: &StreamWord, value: u32) -> Result<(), Error> {
        self.context.bind()?;
        let address = word.device_address();
        // SAFETY: the word is registered memory that lives as long as `word`. Whoever drops it before the stream is done
        // has unregistered memory waited for first: `RegisteredMemory` synchronises when it is dropped.
        unsafe { call!(cuStreamWriteValue32_v2(self.raw, address, value, 0)) }
    }

    /// What is issued from now on waits until the word is `value` or later, in the cyclic order of 32 bits. Only few streams
    /// of a process may wait at a time: they share hardware queues, and with about 64 waiting every call hangs.
    pub fn wait_word(&self, word: &StreamWord, value: u32) -> Result<(), Error> {
        self.context.bind()?;
        let address = word.device_address();
        let or_later = cu::CUstreamWaitValue_flags_enum::CU_STREAM_WAIT_VALUE_GEQ as u32;
        // SAFETY: as for `write_word`.
        unsafe { call!(cuStreamWaitValue32_v2(self.raw, address, value, or_later)) }
    }

    /// Copies, in the order of the stream, between any two places that the GPU can reach.
    ///
    /// # Safety
    /// Both ranges are mapped, on a GPU or as registered host memory, and stay so until the copy has ended. Nothing in Rust
    /// holds a reference into either meanwhile.
    pub unsafe fn copy(&self, to: DeviceAddress, from: DeviceAddress, bytes: usize) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemcpyAsync(to.0, from.0, bytes, self.raw)) }
    }

    /// Sets every byte of a range of the GPU's memory, in the order of the stream.
    ///
    /// # Safety
    /// The range is mapped on the GPU and stays so until this has ended.
    pub unsafe fn fill(&self, at: DeviceAddress, byte: u8, bytes: usize) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: the caller's promise.
        unsafe { call!(cuMemsetD8Async(at.0, byte, bytes, self.raw)) }
    }

    pub(crate) fn raw(&self) -> cu::CUstream {
        self.raw
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: created by `new`; the driver finishes what was issued before it frees the stream.
        let _ = unsafe { call!(cuStreamDestroy_v2(self.raw)) };
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream of {:?}", self.context)
    }
}
