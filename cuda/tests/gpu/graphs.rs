//! What our threads ask of the driver while another thread records a graph, as the engine does in whose process we are.

use std::ptr;
use std::sync::Arc;
use std::thread;

use cudarc::driver::sys as cu;
use kvbm_cuda::{BesideRecordings, DeviceMemory, DeviceRange, Error, Event, RegisteredMemory, Stream};
use kvbm_shm::SharedMemory;

use crate::{Gpu, Outcome};

const BYTES: usize = 8 << 20;

/// What is asked, made ready before anything is recorded.
type Asked<'a> = Box<dyn FnOnce() -> Result<(), Error> + Send + 'a>;
type Prepare = for<'a> fn(&'a Gpu) -> Result<Asked<'a>, Error>;

/// What our threads ask, by its name.
const ASKED: [(&str, Prepare); 4] =
    [("wait", wait), ("register", register), ("unregister", unregister), ("load", load)];

pub fn beside(gpu: &Gpu) -> Outcome {
    let text = |error: Error| error.to_string();
    let mut refused = Vec::new();
    for (name, prepare) in ASKED {
        let ask = prepare(gpu).map_err(text)?;
        match recorded(gpu, || BesideRecordings::begin().and_then(|_beside| ask()))? {
            (Ok(()), 0) => {}
            (asked, ended) => return Err(format!("{name}: {asked:?}; the recording ended with {ended}")),
        }
        // What libraries forbid: where the driver does not mind, the guard is of no use.
        match recorded(gpu, prepare(gpu).map_err(text)?)? {
            (Ok(()), 0) => {}
            (asked, ended) => refused.push(format!("{name} ({asked:?}, {ended})")),
        }
    }
    if refused.is_empty() {
        return Err("nothing is refused without the guard, so this shows nothing".into());
    }
    Ok(format!("refused without the guard: {}", refused.join(", ")))
}

fn wait(gpu: &Gpu) -> Result<Asked<'_>, Error> {
    let (stream, event) = (Stream::new(&gpu.context)?, Event::restful(&gpu.context)?);
    Ok(Box::new(move || {
        event.record(&stream)?;
        event.synchronize()
    }))
}

fn begun(gpu: &Gpu) -> Result<RegisteredMemory, Error> {
    let memory = SharedMemory::create("kvbm-gpu-test", BYTES).expect("there is memory");
    RegisteredMemory::begin(&gpu.context, Arc::new(memory), BYTES)
}

fn register(gpu: &Gpu) -> Result<Asked<'_>, Error> {
    let mut memory = begun(gpu)?;
    Ok(Box::new(move || {
        memory.register_next()?;
        // It stays registered: unregistering is another matter.
        std::mem::forget(memory);
        Ok(())
    }))
}

fn unregister(gpu: &Gpu) -> Result<Asked<'_>, Error> {
    let mut memory = begun(gpu)?;
    memory.register_next()?;
    // SAFETY: nothing is copied.
    Ok(Box::new(move || unsafe { memory.end() }))
}

fn load(gpu: &Gpu) -> Result<Asked<'_>, Error> {
    let (mut host, stream) = (begun(gpu)?, Stream::new(&gpu.context)?);
    host.register_next()?;
    let memory = DeviceMemory::allocate(&gpu.context, BYTES)?;
    Ok(Box::new(move || {
        // SAFETY: both are there until the copy has ended.
        unsafe { stream.copy(memory.address(), host.device_address(0), BYTES) }?;
        stream.synchronize()?;
        // What ends here with them is no part of it.
        std::mem::forget((host, memory));
        Ok(())
    }))
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
