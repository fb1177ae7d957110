//! Events: marks in a stream, which tell when everything before them has ended.

use std::fmt;
use std::ptr;

use crate::sys::{call, check, check_ready, cu, symbol};
use crate::{Context, Error, Stream};

/// A mark that can be set again and again.
pub struct Event {
    context: Context,
    raw: cu::CUevent,
}

// SAFETY: events may be used from any thread; the driver synchronises.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// A mark that only tells whether it was reached: cheaper than one that also tells when.
    pub fn new(context: &Context) -> Result<Self, Error> {
        Self::with_flags(context, cu::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32)
    }

    /// A mark whose waiters sleep. Those of others poll: that is sooner by some ten microseconds, and takes a core.
    pub fn restful(context: &Context) -> Result<Self, Error> {
        let flags = cu::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32
            | cu::CUevent_flags_enum::CU_EVENT_BLOCKING_SYNC as u32;
        Self::with_flags(context, flags)
    }

    /// A mark that also tells when it was reached.
    pub fn timing(context: &Context) -> Result<Self, Error> {
        Self::with_flags(context, 0)
    }

    fn with_flags(context: &Context, flags: u32) -> Result<Self, Error> {
        context.bind()?;
        let mut raw = ptr::null_mut();
        // SAFETY: writes one handle, which `self` destroys.
        unsafe { call!(cuEventCreate(&mut raw, flags)) }?;
        Ok(Self { context: context.clone(), raw })
    }

    /// Sets the mark behind everything that was issued on `stream` so far.
    pub fn record(&self, stream: &Stream) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: both are alive.
        unsafe { call!(cuEventRecord(self.raw, stream.raw())) }
    }

    /// Sets the mark behind everything that was issued so far on a stream that somebody else made, by its handle; 0 is the
    /// default stream.
    ///
    /// # Safety
    /// The handle is that of a live stream of this context.
    pub unsafe fn record_foreign(&self, stream: u64) -> Result<(), Error> {
        self.context.bind()?;
        let stream = ptr::with_exposed_provenance_mut(stream as usize);
        // SAFETY: the event is ours, the stream alive by the caller's promise.
        unsafe { call!(cuEventRecord(self.raw, stream)) }
    }

    /// What is issued from now on, on a stream that somebody else made, begins when the mark is reached. 0 is the default
    /// stream.
    ///
    /// # Safety
    /// The handle is that of a live stream of this context.
    pub unsafe fn hold_foreign(&self, stream: u64) -> Result<(), Error> {
        self.context.bind()?;
        let stream = ptr::with_exposed_provenance_mut(stream as usize);
        // SAFETY: the event is ours, the stream alive by the caller's promise; 0 is the only flag that is needed.
        unsafe { call!(cuStreamWaitEvent(stream, self.raw, 0)) }
    }

    /// True once everything before the mark has ended, also if it never was set.
    pub fn is_reached(&self) -> Result<bool, Error> {
        self.context.bind()?;
        // SAFETY: our own event.
        check_ready("cuEventQuery", unsafe { cu::cuEventQuery(self.raw) })
    }

    /// Waits until everything before the mark has ended.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: our own event.
        unsafe { call!(cuEventSynchronize(self.raw)) }
    }

    /// Milliseconds between two timing marks that both were reached, by the GPU's clock.
    pub fn ms_since(&self, earlier: &Event) -> Result<f32, Error> {
        self.context.bind()?;
        // By name: the bindings have its second version, which drivers before CUDA 12.8 lack.
        type ElapsedTime = unsafe extern "C" fn(*mut f32, cu::CUevent, cu::CUevent) -> cu::CUresult;
        let elapsed = symbol::<ElapsedTime>("cuEventElapsedTime").ok_or_else(|| {
            Error::missing("cuEventElapsedTime", "the driver does not have it", "install driver 525 or newer")
        })?;
        let mut ms = 0.0;
        // SAFETY: writes one number; both events are alive.
        check("cuEventElapsedTime", unsafe { elapsed(&mut ms, earlier.raw, self.raw) })?;
        Ok(ms)
    }

    pub(crate) fn raw(&self) -> cu::CUevent {
        self.raw
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: created by `with_flags`; the driver keeps it until nothing waits for it.
        let _ = unsafe { call!(cuEventDestroy_v2(self.raw)) };
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event of {:?}", self.context)
    }
}
