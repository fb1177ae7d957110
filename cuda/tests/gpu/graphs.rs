//! What our threads ask of the driver while another thread records a graph, as the engine does in whose process we are.

use std::ptr;
use std::sync::Arc;
use std::thread;

use cudarc::driver::sys as cu;
use kvbm_cuda::{BesideRecordings, DeviceMemory, DeviceRange, Error, Event, RegisteredMemory, Stream};
use kvbm_shm::SharedMemory;

use crate::{Gpu, Outcome};

const BYTES: usize = 8 << 20;

/// What our threads ask, by its name.
const ASKED: [(&str, Ask); 4] =
    [("wait", wait), ("register", register), ("unregister", unregister), ("load", load)];

type Ask = fn(&Gpu) -> Result<(), Error>;

pub fn beside(gpu: &Gpu) -> Outcome {
    let mut refused = Vec::new();
    for (name, ask) in ASKED {
        let guarded = || BesideRecordings::begin().and_then(|_beside| ask(gpu));
        match recorded(gpu, guarded)? {
            (Ok(()), 0) => {}
            (asked, ended) => return Err(format!("{name}: {asked:?}; the recording ended with {ended}")),
        }
        // What libraries forbid: where the driver does not mind, the guard is of no use.
        match recorded(gpu, || ask(gpu))? {
            (Ok(()), 0) => {}
            (asked, ended) => refused.push(format!("{name} ({asked:?}, {ended})")),
        }
    }
    if refused.is_empty() {
        return Err("nothing is refused without the guard, so this shows nothing".into());
    }
    Ok(format!("refused without the guard: {}", refused.join(", ")))
}

fn wait(gpu: &Gpu) -> Result<(), Error> {
    let stream = Stream::new(&gpu.context)?;
    let event = Event::restful(&gpu.context)?;
    event.record(&stream)?;
    event.synchronize()
}

fn registered(gpu: &Gpu) -> Result<RegisteredMemory, Error> {
    let memory = SharedMemory::create("kvbm-gpu-test", BYTES).expect("there is memory");
    let mut registered = RegisteredMemory::begin(&gpu.context, Arc::new(memory), BYTES)?;
    registered.register_next()?;
    Ok(registered)
}

/// It stays registered: unregistering is another matter.
fn register(gpu: &Gpu) -> Result<(), Error> {
    registered(gpu).map(std::mem::forget)
}

fn unregister(gpu: &Gpu) -> Result<(), Error> {
    // SAFETY: nothing is copied.
    registered(gpu).map(|registered| unsafe { registered.end() })
}

fn load(gpu: &Gpu) -> Result<(), Error> {
    let (host, stream) = (registered(gpu)?, Stream::new(&gpu.context)?);
    let memory = DeviceMemory::allocate(&gpu.context, BYTES)?;
    // SAFETY: both are there until the copy has ended.
    unsafe { stream.copy(memory.address(), host.device_address(0), BYTES) }?;
    stream.synchronize()?;
    // SAFETY: it has.
    unsafe { host.end() };
    std::mem::forget(memory);
    Ok(())
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
