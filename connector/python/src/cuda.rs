//! Moves blocks of engines whose KV memory is on a GPU, on streams of our own in the engine's process.
//!
//! Copy engines cross the wire: a kernel would take its turns with the engine's for as long. Blocks that come in whole are
//! spread by a kernel from where they came, see [`Scatter`]. Each way has a stream, so that loads never wait behind saves. Who
//! waits sleeps: the cores are the engine's.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use kvbm_connector::engine::{
    BlockCopy, Export, Exported, ExportedMemory, ExportedRegion, Fence, Mover, Piece, PoolShape,
    issued_at_once,
};
use kvbm_cuda::{
    BatchCopier, BesideRecordings, Context, DeviceAddress, DeviceName, Driver, Error, Event, IpcHandle,
    RawCopy, RegisteredMemory, Scatter, Spread, Stream, chunk_plan,
};
use kvbm_shm::SharedMemory;
use parking_lot::{Mutex, RwLock};

/// Bytes moved at once, at most, unless a single block has more: a load can be called back between two of these.
const BATCH_BYTES_MAX: usize = 16 << 20;
const BATCH_BLOCKS_MAX: usize = 64;

/// Copies given to the driver in one call, at most: while it takes them, the engine's thread launches nothing.
const PIECES_AT_ONCE: usize = 128;

/// Bytes registered with one call, up to a millisecond in which the engine launches nothing.
const REGISTERED_AT_ONCE_BYTES: usize = 8 << 20;

/// An engine that saved or loaded so recently is at work. A step launches hundreds of kernels, each of which may have to wait
/// for a call; then calls get a twentieth of the time, so that few steps meet one.
const AT_WORK: Duration = Duration::from_millis(200);
const PAUSES_AT_WORK: u32 = 19;

/// One way.
struct Lane {
    stream: Stream,
    copier: BatchCopier,
    done: Event,
    /// Of the way in.
    scatter: Option<Scatter>,
}

pub(crate) struct CudaMover {
    shape: PoolShape,
    /// Where each region begins.
    bases: Vec<DeviceAddress>,
    context: Context,
    loads: Mutex<Lane>,
    saves: Mutex<Lane>,
    /// Host segments by where they are mapped.
    segments: RwLock<HashMap<usize, Arc<RegisteredMemory>>>,
    callable_back: bool,
    made: Instant,
    /// When the engine last saved or loaded, in milliseconds behind `made`; 0: never.
    at_work: AtomicU64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

impl CudaMover {
    /// On the GPU with this number, as the engine's process counts them.
    ///
    /// # Safety
    /// All regions of `shape` are memory of that GPU, valid from now until this is dropped.
    pub unsafe fn new(shape: PoolShape, device: u32) -> Result<Self, Error> {
        let driver = Driver::load()?;
        let context = Context::open(&driver, &driver.device(&DeviceName::Ordinal(device))?)?;
        let lane = |scatter| -> Result<_, Error> {
            Ok(Mutex::new(Lane {
                stream: Stream::new(&context)?,
                copier: BatchCopier::new(&driver),
                done: Event::restful(&context)?,
                scatter,
            }))
        };
        let scatter = Scatter::new(&driver, &context)
            .inspect_err(|error| tracing::warn!(%error, "blocks are brought in piece by piece"))
            .ok();
        Ok(Self {
            bases: shape.regions().map(|(_, region)| DeviceAddress(region.base as u64)).collect(),
            shape,
            loads: lane(scatter)?,
            saves: lane(None)?,
            segments: RwLock::default(),
            context,
            callable_back: true,
            made: Instant::now(),
            at_work: AtomicU64::new(0),
        })
    }

    /// Of an engine that gives blocks to nobody while they are loaded: nothing is called back, so a load is one batch.
    #[must_use]
    pub fn never_called_back(self) -> Self {
        Self { callable_back: false, ..self }
    }

    /// The GPU's name for status.
    pub fn device(&self) -> String {
        self.context.device().uuid.clone()
    }

    /// The pool by the handles of the allocations that it lies in.
    pub fn exported(&self) -> Result<Exported, String> {
        let (mut exports, mut regions, mut known) = (Vec::new(), Vec::new(), Vec::new());
        for (_, region) in self.shape.regions() {
            let at = DeviceAddress(region.base as u64);
            let (handle, base, bytes) =
                IpcHandle::of(&self.context, at).map_err(|error| error.to_string())?;
            let offset = at.0 - base.0;
            let end = offset + (region.stride * (region.pages as usize - 1) + region.bytes) as u64;
            if end > bytes as u64 {
                return Err("a layer's pages are spread over several allocations".into());
            }
            let export = known.iter().position(|known| *known == base).unwrap_or_else(|| {
                let memory = ExportedMemory::CudaIpc { handle: handle.0, gpu_uuid: self.device() };
                exports.push(Export { memory, bytes: bytes as u64 });
                known.push(base);
                known.len() - 1
            });
            let export = u32::try_from(export).map_err(|error| error.to_string())?;
            regions.push(ExportedRegion { export, offset });
        }
        Ok(Exported { exports, regions })
    }

    fn note_work(&self) {
        let now = u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.at_work.store(now.max(1), Ordering::Relaxed);
    }

    fn is_at_work(&self) -> bool {
        let last = self.at_work.load(Ordering::Relaxed);
        last > 0 && self.made.elapsed() < Duration::from_millis(last) + AT_WORK
    }

    fn copy(&self, blocks: &[BlockCopy<'_>], way: Way) -> Result<(), String> {
        let _beside = BesideRecordings::begin().map_err(|error| error.to_string())?;
        let mut lane = if way == Way::In { self.loads.lock() } else { self.saves.lock() };
        let whole = 0..self.shape.block_bytes();
        // SAFETY: the copies have ended before this function returns.
        let issued = unsafe { self.issue(&mut lane, blocks, &whole, way) };
        // Also when some were not issued: those that were must not outlast this call.
        let Lane { stream, done, .. } = &*lane;
        let ended = done.record(stream).and_then(|()| done.synchronize()).or_else(|_| stream.synchronize());
        issued.and(ended.map_err(|error| error.to_string()))
    }

    /// Issues the copies of these bytes of each block.
    ///
    /// # Safety
    /// The blocks' pages and slots are left alone, and their segments kept, until the copies have ended.
    unsafe fn issue(
        &self,
        lane: &mut Lane,
        blocks: &[BlockCopy<'_>],
        bytes: &Range<usize>,
        way: Way,
    ) -> Result<(), String> {
        let Lane { stream, copier, scatter, .. } = lane;
        let mut scatter = scatter.as_mut().filter(|_| bytes.len() == self.shape.block_bytes());
        let mut copies = Vec::new();
        issued_at_once(blocks.len(), bytes.len()).try_for_each(|part| {
            let blocks = &blocks[part];
            if let Some(scatter) = &mut scatter {
                let mut spread = Vec::new();
                blocks.iter().try_for_each(|block| self.spread(block, &mut spread))?;
                if Scatter::takes(&spread) {
                    // SAFETY: as below.
                    return unsafe { scatter.issue(stream, &spread) }.map_err(|error| error.to_string());
                }
            }
            copies.clear();
            blocks.iter().try_for_each(|block| self.pieces(block, bytes, way, &mut copies))?;
            copies.chunks(PIECES_AT_ONCE).try_for_each(|pieces| {
                // SAFETY: the engine's pages are valid (see `new`); the segments are registered for as long as the map
                // holds them, which is until `self` goes or they are let go of; pieces lie within one chunk each, and
                // within bounds that were checked when they were placed. The rest is the caller's promise.
                unsafe { copier.copy(stream, pieces) }.map_err(|error| error.to_string())
            })
        })
    }

    /// A block as it lies on the host, and where its pieces go.
    fn spread(&self, block: &BlockCopy<'_>, to: &mut Vec<Spread>) -> Result<(), String> {
        let memory = self.registered(block)?;
        let (chunk, bytes) = (memory.chunk_bytes(), self.shape.block_bytes());
        for start in (0..bytes).step_by(Scatter::BYTES_MAX) {
            let end = bytes.min(start + Scatter::BYTES_MAX);
            let (mut spread, mut done) = (Spread::default(), start);
            while done < end {
                let at = block.offset + done;
                let part = (end - done).min(chunk - at % chunk);
                spread.host.push((memory.device_address(at), part));
                done += part;
            }
            let place =
                |piece: Piece| (piece.at - start, self.bases[piece.region].plus(piece.from), piece.bytes);
            spread.pieces.extend(self.shape.pieces(block.pages, start..end).map(place));
            to.push(spread);
        }
        Ok(())
    }

    fn registered(&self, block: &BlockCopy<'_>) -> Result<Arc<RegisteredMemory>, String> {
        let at = block.segment.address().addr().get();
        let known = self.segments.read().get(&at).cloned();
        known.ok_or_else(|| "a host segment is not registered with CUDA".into())
    }

    /// These bytes of a block as pieces that lie within one page and one registered chunk.
    fn pieces(
        &self,
        block: &BlockCopy<'_>,
        bytes: &Range<usize>,
        way: Way,
        to: &mut Vec<RawCopy>,
    ) -> Result<(), String> {
        let memory = self.registered(block)?;
        let chunk = memory.chunk_bytes();
        for piece in self.shape.pieces(block.pages, bytes.clone()) {
            let (device, offset) = (self.bases[piece.region].plus(piece.from), block.offset + piece.at);
            let mut done = 0;
            while done < piece.bytes {
                let bytes = (piece.bytes - done).min(chunk - (offset + done) % chunk);
                let (host, device) = (memory.device_address(offset + done), device.plus(done));
                let (from, into) = if way == Way::In { (host, device) } else { (device, host) };
                to.push(RawCopy { from, to: into, bytes });
                done += bytes;
            }
        }
        Ok(())
    }
}

impl Mover for CudaMover {
    fn batch_blocks(&self) -> usize {
        if !self.callable_back {
            return usize::MAX;
        }
        (BATCH_BYTES_MAX / self.shape.block_bytes().max(1)).clamp(1, BATCH_BLOCKS_MAX)
    }

    fn prepare(&self, segment: &Arc<SharedMemory>) -> Result<(), String> {
        let at = segment.address().addr().get();
        // The engine may be recording its graphs.
        let _beside = BesideRecordings::begin().map_err(|error| error.to_string())?;
        let registered = RegisteredMemory::begin(&self.context, segment.clone(), REGISTERED_AT_ONCE_BYTES);
        let mut registered = registered.map_err(|error| error.to_string())?;
        for piece in chunk_plan(segment.bytes(), REGISTERED_AT_ONCE_BYTES) {
            let begun = Instant::now();
            // The daemon has provided the pages; this process finds them now, and not while the driver holds its locks. A
            // kernel that cannot do that does it then.
            let _ = segment.populate(piece);
            if let Err(error) = registered.register_next() {
                // SAFETY: nobody was told of it.
                let _ = unsafe { registered.end() };
                return Err(error.to_string());
            }
            if self.is_at_work() {
                thread::sleep(begun.elapsed() * PAUSES_AT_WORK);
            }
        }
        self.segments.write().insert(at, Arc::new(registered));
        Ok(())
    }

    fn release(&self, segment: &SharedMemory) {
        let released = self.segments.write().remove(&segment.address().addr().get());
        let _beside = BesideRecordings::begin();
        if let Some(memory) = released.and_then(Arc::into_inner) {
            // SAFETY: whoever copies holds the segment until its copies have ended, also those of a load in steps.
            let _ = unsafe { memory.end() };
        }
    }

    fn fence(&self, stream: u64) -> Result<Arc<dyn Fence>, String> {
        self.note_work();
        let event = Event::restful(&self.context).map_err(|error| error.to_string())?;
        // SAFETY: the engine passes a stream of its own, which it keeps.
        unsafe { event.record_foreign(stream) }.map_err(|error| error.to_string())?;
        Ok(Arc::new(Reached(event)))
    }

    fn load(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String> {
        self.note_work();
        self.copy(blocks, Way::In)
    }

    fn load_in_steps(
        &self,
        blocks: &[BlockCopy<'_>],
        steps: &[Range<usize>],
        begun: &mut dyn FnMut(Arc<dyn Fence>),
    ) -> Result<(), String> {
        self.note_work();
        let _beside = BesideRecordings::begin().map_err(|error| error.to_string())?;
        let mut lane = self.loads.lock();
        let issued: Result<(), String> = steps.iter().try_for_each(|step| {
            // SAFETY: who loads keeps pages, slots and segments until the last fence was reached; if not all were
            // issued, those that were have ended when this returns.
            unsafe { self.issue(&mut lane, blocks, step, Way::In) }?;
            let there = Event::restful(&self.context).map_err(|error| error.to_string())?;
            there.record(&lane.stream).map_err(|error| error.to_string())?;
            begun(Arc::new(Reached(there)));
            Ok(())
        });
        if issued.is_err() {
            lane.stream.synchronize().map_err(|error| error.to_string())?;
        }
        issued
    }

    fn save(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String> {
        self.copy(blocks, Way::Out)
    }
}

impl fmt::Debug for CudaMover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "copies on {:?}", self.context.device())
    }
}

#[derive(Debug)]
struct Reached(Event);

impl Fence for Reached {
    fn wait(&self) -> Result<(), String> {
        let _beside = BesideRecordings::begin().map_err(|error| error.to_string())?;
        self.0.synchronize().map_err(|error| error.to_string())
    }

    fn hold(&self, stream: u64) -> Result<(), String> {
        // SAFETY: the engine passes a stream of its own, which it keeps.
        unsafe { self.0.hold_foreign(stream) }.map_err(|error| error.to_string())
    }
}
