//! Graphs: work recorded once and issued with one call.

use std::fmt;
use std::marker::PhantomData;
use std::ptr;

use crate::sys::{call, cu};
use crate::{Context, Error, Stream};

/// Recorded work, ready to be issued.
pub struct Graph {
    context: Context,
    raw: cu::CUgraphExec,
}

// SAFETY: one thread at a time issues it: `launch` needs `&mut self`.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `issue` issues on the stream, which does nothing yet. Calls in `issue` that wait, allocate or free are
    /// refused by the driver. Addresses and arguments are recorded as they are now.
    pub fn record(stream: &Stream, issue: impl FnOnce() -> Result<(), Error>) -> Result<Self, Error> {
        stream.context().bind()?;
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: our own stream.
        unsafe { call!(cuStreamBeginCapture_v2(stream.raw(), mode)) }?;
        let issued = issue();
        let mut graph = ptr::null_mut();
        // SAFETY: ends what was begun above, also when issuing failed; writes one handle or null.
        let ended = unsafe { call!(cuStreamEndCapture(stream.raw(), &mut graph)) };
        let recorded = issued.and(ended).and_then(|()| {
            let mut raw = ptr::null_mut();
            // SAFETY: writes one handle, which `Graph` destroys.
            unsafe { call!(cuGraphInstantiateWithFlags(&mut raw, graph, 0)) }?;
            Ok(Self { context: stream.context().clone(), raw })
        });
        if !graph.is_null() {
            // SAFETY: created by the capture; what was instantiated from it does not need it.
            let _ = unsafe { call!(cuGraphDestroy(graph)) };
        }
        recorded
    }

    /// Issues all of it.
    ///
    /// # Safety
    /// What was promised to each `unsafe` call when it was recorded still holds.
    pub unsafe fn launch(&mut self, stream: &Stream) -> Result<(), Error> {
        self.context.bind()?;
        // SAFETY: the caller's promise.
        unsafe { call!(cuGraphLaunch(self.raw, stream.raw())) }
    }
}

/// As long as this lives, what the calling thread asks of the driver is permitted beside recordings of other threads, and
/// does not spoil them. Libraries forbid by default that any thread of their process registers memory, waits for an event
/// or the like while they record; what is asked here has nothing to do with what they record.
#[derive(Debug)]
pub struct BesideRecordings {
    before: cu::CUstreamCaptureMode,
    /// It is of one thread.
    _thread: PhantomData<*const ()>,
}

impl BesideRecordings {
    /// From now on.
    pub fn begin() -> Result<Self, Error> {
        let relaxed = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        Ok(Self { before: exchange(relaxed)?, _thread: PhantomData })
    }
}

impl Drop for BesideRecordings {
    fn drop(&mut self) {
        let _ = exchange(self.before);
    }
}

/// Sets what the calling thread may ask beside recordings, and returns what it was.
fn exchange(mut mode: cu::CUstreamCaptureMode) -> Result<cu::CUstreamCaptureMode, Error> {
    // SAFETY: reads and writes one mode.
    unsafe { call!(cuThreadExchangeStreamCaptureMode(&mut mode)) }?;
    Ok(mode)
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _ = self.context.bind();
        // SAFETY: instantiated once; the driver finishes what is running.
        let _ = unsafe { call!(cuGraphExecDestroy(self.raw)) };
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph of {:?}", self.context)
    }
}
