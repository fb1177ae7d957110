//! What others hold of the threads of a GPU: batches go in, figures come out.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::batch::CopyBatch;
use super::cuda_device::CudaDevice;
use super::device::CopyDevice;
use super::executor::Executor;
use super::memcpy_device::MemcpyDevice;
use super::{CopyMemory, Direction, LaneId, PacerConfig, StepWords};
use crate::{Context, Driver, Error, topology};

/// How a copy engine is set up.
#[derive(Debug, Clone)]
pub struct CopyEngineConfig {
    /// Batches of each direction that may wait or be under way. At least 1.
    pub queue: usize,
    /// Bytes that are issued with one call; at least one copy.
    pub piece_bytes: u64,
    /// Bytes of each direction that the GPU has been given and not yet moved. The copy engines are idle between two calls
    /// unless the next one waits already.
    pub in_flight_bytes: u64,
    /// Streams of each direction, on which pieces are issued in turn. At least 1.
    pub streams: usize,
    /// What decoding may suffer from copies in the background.
    pub pacer: PacerConfig,
}

impl Default for CopyEngineConfig {
    fn default() -> Self {
        Self {
            queue: 64,
            piece_bytes: 64 << 20,
            in_flight_bytes: 192 << 20,
            streams: 1,
            pacer: PacerConfig::default(),
        }
    }
}

/// A batch that was given back.
#[derive(Debug)]
pub struct NotAccepted {
    /// It, as it was.
    pub batch: Box<CopyBatch>,
    /// Why.
    pub reason: Refusal,
}

/// Why a batch was not accepted.
#[derive(Debug, Clone)]
pub enum Refusal {
    /// As many as the queue takes are waiting.
    Full,
    /// The GPU cannot be used any more, because of this.
    OutOfService(Arc<Error>),
    /// It copies from or to memory that this engine does not reach.
    Unreachable,
    /// The engine is being stopped.
    Stopped,
}

/// What an engine has done since its start. Only what has ended counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// Batches that ended well, by direction: onboard, offload.
    pub batches: [u64; 2],
    /// Batches that failed.
    pub failed: [u64; 2],
    /// Bytes of those that ended well.
    pub bytes: [u64; 2],
    /// Time during which something was in flight.
    pub busy: [Duration; 2],
    /// Rate that the pacer allows offloads now, bytes per second; `None`: they go as fast as they can.
    pub paced_bytes_per_second: Option<u64>,
}

/// The copy engine of one GPU. Dropping it ends what is in flight, and fails what waits.
pub struct CopyEngine {
    /// By direction: onboard, offload. One thread could not issue small copies of both as fast as the GPU moves them.
    directions: [Running; 2],
    reaches: fn(&CopyMemory) -> bool,
    queue: usize,
}

/// A direction and its thread.
struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the thread of a direction and its owners share.
pub(super) struct Shared {
    pub inbox: Mutex<Inbox>,
    pub changed: Condvar,
    /// Of the whole GPU, set by whichever thread finds out first.
    pub out_of_service: Arc<OnceLock<Arc<Error>>>,
}

/// What is asked of the thread, and what it tells.
#[derive(Default)]
pub(super) struct Inbox {
    pub batches: Vec<CopyBatch>,
    /// Accepted and not ended.
    pub open: usize,
    pub closed_lanes: Vec<LaneId>,
    /// Where engines tell how fast they decode; changed: the thread has not yet taken notice.
    pub engines: Vec<(LaneId, StepWords)>,
    pub engines_changed: bool,
    pub full_rate: bool,
    pub stopping: bool,
    pub figures: DirectionFigures,
}

/// [`Figures`] of one direction.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DirectionFigures {
    pub batches: u64,
    pub failed: u64,
    pub bytes: u64,
    pub busy: Duration,
    pub paced_bytes_per_second: Option<u64>,
}

impl CopyEngine {
    /// Starts the threads of a GPU.
    pub fn start(driver: &Driver, context: &Context, config: CopyEngineConfig) -> Result<Self, Error> {
        let node = context.device().numa_node;
        let on_its_node = |device| {
            move || {
                node.into_iter().for_each(topology::stay_on);
                device
            }
        };
        let device = || CudaDevice::new(driver, context, config.streams);
        let devices = [device()?, device()?].map(on_its_node);
        Ok(Self::start_over(devices, &format!("gpu-{}", context.device().ordinal), &config))
    }

    /// Starts an engine that copies between memories of the host: for tests, and where there is no GPU.
    pub fn start_on_host(config: CopyEngineConfig) -> Self {
        Self::start_over([MemcpyDevice::new; 2], "gpu-none", &config)
    }

    /// Over a device for each direction: onboard, offload.
    pub(super) fn start_over<D: CopyDevice>(
        devices: [impl FnOnce() -> D + Send + 'static; 2],
        name: &str,
        config: &CopyEngineConfig,
    ) -> Self {
        let out_of_service = Arc::default();
        let [onboard, offload] = devices;
        let start = |device, way| Running::start(device, format!("{name}-{way}"), config, &out_of_service);
        let directions = [start(onboard, "in"), start(offload, "out")];
        Self { directions, reaches: D::reaches, queue: config.queue.max(1) }
    }

    fn shared(&self, direction: Direction) -> &Shared {
        match direction {
            Direction::Onboard => &self.directions[0].shared,
            Direction::Offload => &self.directions[1].shared,
        }
    }

    /// Asks something of both threads.
    fn order(&self, mut each: impl FnMut(&mut Inbox)) {
        for Running { shared, .. } in &self.directions {
            each(&mut shared.inbox.lock());
            shared.changed.notify_one();
        }
    }

    /// Takes a batch, or gives it back at once and says why.
    pub fn submit(&self, batch: CopyBatch) -> Result<(), NotAccepted> {
        let refuse = |batch, reason| Err(NotAccepted { batch: Box::new(batch), reason });
        if !batch.memories.iter().all(self.reaches) {
            return refuse(batch, Refusal::Unreachable);
        }
        let shared = self.shared(batch.direction);
        let mut inbox = shared.inbox.lock();
        if let Some(error) = shared.out_of_service.get() {
            return refuse(batch, Refusal::OutOfService(error.clone()));
        }
        if inbox.stopping {
            return refuse(batch, Refusal::Stopped);
        }
        if inbox.open >= self.queue {
            return refuse(batch, Refusal::Full);
        }
        inbox.open += 1;
        inbox.batches.push(batch);
        shared.changed.notify_one();
        Ok(())
    }

    /// True if a batch of that direction would be accepted now.
    pub fn has_room(&self, direction: Direction) -> bool {
        let shared = self.shared(direction);
        let inbox = shared.inbox.lock();
        shared.out_of_service.get().is_none() && !inbox.stopping && inbox.open < self.queue
    }

    /// Fails what waits in a lane. What is in flight ends first, as it does.
    pub fn close_lane(&self, lane: LaneId) {
        self.order(|inbox| {
            inbox.closed_lanes.push(lane);
            inbox.engines.retain(|(other, _)| *other != lane);
            inbox.engines_changed = true;
        });
    }

    /// Paces copies in the background by what the engine of a lane tells, until the lane is closed.
    pub fn pace_by(&self, lane: LaneId, words: &StepWords) {
        self.order(|inbox| {
            inbox.engines.retain(|(other, _)| *other != lane);
            inbox.engines.push((lane, words.clone()));
            inbox.engines_changed = true;
        });
    }

    /// Lets copies in the background go as fast as they can, or paces them again: when the host needs the room.
    pub fn set_full_rate(&self, full_rate: bool) {
        self.order(|inbox| inbox.full_rate = full_rate);
    }

    /// Why the GPU is out of service, if it is.
    pub fn out_of_service(&self) -> Option<Arc<Error>> {
        self.directions[0].shared.out_of_service.get().cloned()
    }

    /// What it has done so far.
    pub fn figures(&self) -> Figures {
        let both = self.directions.each_ref().map(|running| running.shared.inbox.lock().figures);
        Figures {
            batches: both.map(|figures| figures.batches),
            failed: both.map(|figures| figures.failed),
            bytes: both.map(|figures| figures.bytes),
            busy: both.map(|figures| figures.busy),
            paced_bytes_per_second: both[1].paced_bytes_per_second,
        }
    }
}

impl Running {
    fn start<D: CopyDevice>(
        device: impl FnOnce() -> D + Send + 'static,
        name: String,
        config: &CopyEngineConfig,
        out_of_service: &Arc<OnceLock<Arc<Error>>>,
    ) -> Self {
        let out_of_service = out_of_service.clone();
        let shared = Arc::new(Shared { inbox: Mutex::default(), changed: Condvar::new(), out_of_service });
        let (for_thread, config) = (shared.clone(), config.clone());
        let run = move || Executor::new(device(), for_thread, &config).run();
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(run)
            .expect("a process that cannot start two threads per GPU cannot serve");
        Self { shared, thread: Some(thread) }
    }
}

impl Drop for CopyEngine {
    fn drop(&mut self) {
        self.order(|inbox| inbox.stopping = true);
        let threads = self.directions.each_mut().map(|running| running.thread.take());
        // The last share may be dropped by a callback, on one of the threads: then both end by themselves.
        let current = std::thread::current().id();
        if threads.iter().flatten().all(|thread| thread.thread().id() != current) {
            threads.into_iter().flatten().for_each(|thread| drop(thread.join()));
        }
    }
}

impl fmt::Debug for CopyEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CopyEngine {:?}", self.figures())
    }
}

impl Inbox {
    pub fn has_no_orders(&self) -> bool {
        self.batches.is_empty() && self.closed_lanes.is_empty() && !self.engines_changed && !self.stopping
    }
}
