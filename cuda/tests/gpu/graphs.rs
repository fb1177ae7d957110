//! What our threads ask of the driver while another thread records a graph, as the engine does in whose process we are.

use std::ptr;
use std::sync::Arc;
use std::thread;

use cudarc::driver::sys as cu;
use kvbm_cuda::{BesideRecordings, Error, Event, RegisteredMemory, Stream};
use kvbm_shm::SharedMemory;

use crate::{Gpu, Outcome};

const BYTES: usize = 8 << 20;

pub fn beside(gpu: &Gpu) -> Outcome {
    let guarded = || -> Result<(), Error> {
        let _beside = BesideRecordings::begin()?;
        asked(gpu)
    };
    match recorded(gpu, guarded)? {
        (Ok(()), 0) => {}
        (asked, ended) => return Err(format!("asked: {asked:?}; the recording ended with {ended}")),
    }
    // What libraries forbid: if the driver does not mind, the guard is of no use here.
    let (asked, ended) = recorded(gpu, || asked(gpu))?;
    let refused = asked.err().map_or("nothing".into(), |error| error.to_string());
    Ok(format!("without the guard {refused} is refused, and the recording ends with {ended}"))
}

/// Waits, registers and unregisters, as for a host segment.
fn asked(gpu: &Gpu) -> Result<(), Error> {
    let stream = Stream::new(&gpu.context)?;
    let event = Event::new(&gpu.context)?;
    event.record(&stream)?;
    event.synchronize()?;
    let memory = Arc::new(SharedMemory::create("kvbm-gpu-test", BYTES).expect("there is memory"));
    let mut registered = RegisteredMemory::begin(&gpu.context, memory, BYTES)?;
    registered.register_next().map(|_| ())
}

/// Records in the mode that libraries use by default, while another thread runs `ask`. What that returned, and the code with
/// which the recording ended.
fn recorded(
    gpu: &Gpu,
    ask: impl FnOnce() -> Result<(), Error> + Send,
) -> Result<(Result<(), Error>, u32), String> {
    gpu.context.bind().map_err(|error| error.to_string())?;
    let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
    let (mut stream, mut graph) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: a stream of this function's own, used and destroyed by this thread; nothing is issued on it.
    let (begun, asked, ended) = unsafe {
        let created = cu::cuStreamCreate(&mut stream, cu::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32);
        assert_eq!(created as u32, 0, "a stream can be created");
        let begun = cu::cuStreamBeginCapture_v2(stream, mode);
        let asked = thread::scope(|scope| scope.spawn(ask).join().expect("it returns"));
        let ended = cu::cuStreamEndCapture(stream, &mut graph);
        if !graph.is_null() {
            let _ = cu::cuGraphDestroy(graph);
        }
        let _ = cu::cuStreamDestroy_v2(stream);
        (begun as u32, asked, ended as u32)
    };
    if begun != 0 { Err(format!("recording cannot begin: {begun}")) } else { Ok((asked, ended)) }
}
