//! What others hold of the thread of a GPU: batches go in, figures come out.

use std::fmt;
use std::sync::Arc;
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
    /// Rate that the pacer allows now, bytes per second; `None`: copies go as fast as they can.
    pub paced_bytes_per_second: Option<u64>,
}

/// The copy engine of one GPU. Dropping it ends what is in flight, and fails what waits.
pub struct CopyEngine {
    shared: Arc<Shared>,
    reaches: fn(&CopyMemory) -> bool,
    thread: Option<JoinHandle<()>>,
}

/// What the thread and its owners share.
pub(super) struct Shared {
    pub inbox: Mutex<Inbox>,
    pub changed: Condvar,
    queue: usize,
}

/// What is asked of the thread, and what it tells.
#[derive(Default)]
pub(super) struct Inbox {
    pub batches: Vec<CopyBatch>,
    /// Accepted and not ended, by direction.
    pub open: [usize; 2],
    pub closed_lanes: Vec<LaneId>,
    /// Where engines tell how fast they decode; changed: the thread has not yet taken notice.
    pub engines: Vec<(LaneId, StepWords)>,
    pub engines_changed: bool,
    pub full_rate: bool,
    pub stopping: bool,
    pub out_of_service: Option<Arc<Error>>,
    pub figures: Figures,
}

/// Of a direction, in pairs.
pub(super) fn index(direction: Direction) -> usize {
    match direction {
        Direction::Onboard => 0,
        Direction::Offload => 1,
    }
}

impl CopyEngine {
    /// Starts the thread of a GPU.
    pub fn start(driver: &Driver, context: &Context, config: CopyEngineConfig) -> Result<Self, Error> {
        let device = CudaDevice::new(driver, context, config.streams)?;
        let name = format!("gpu-{}", context.device().ordinal);
        let node = context.device().numa_node;
        let on_its_node = move || {
            node.into_iter().for_each(topology::stay_on);
            device
        };
        Ok(Self::start_over(on_its_node, &name, config))
    }

    /// Starts an engine that copies between memories of the host: for tests, and where there is no GPU.
    pub fn start_on_host(config: CopyEngineConfig) -> Self {
        Self::start_over(MemcpyDevice::new, "gpu-none", config)
    }

    pub(super) fn start_over<D: CopyDevice>(
        device: impl FnOnce() -> D + Send + 'static,
        name: &str,
        config: CopyEngineConfig,
    ) -> Self {
        let shared =
            Arc::new(Shared { inbox: Mutex::default(), changed: Condvar::new(), queue: config.queue.max(1) });
        let for_thread = shared.clone();
        let run = move || Executor::new(device(), for_thread, &config).run();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(run)
            .expect("a process that cannot start a thread per GPU cannot serve");
        Self { shared, reaches: D::reaches, thread: Some(thread) }
    }

    /// Takes a batch, or gives it back at once and says why.
    pub fn submit(&self, batch: CopyBatch) -> Result<(), NotAccepted> {
        let refuse = |batch, reason| Err(NotAccepted { batch: Box::new(batch), reason });
        if !batch.memories.iter().all(self.reaches) {
            return refuse(batch, Refusal::Unreachable);
        }
        let mut inbox = self.shared.inbox.lock();
        if let Some(error) = &inbox.out_of_service {
            return refuse(batch, Refusal::OutOfService(error.clone()));
        }
        if inbox.stopping {
            return refuse(batch, Refusal::Stopped);
        }
        let open = &mut inbox.open[index(batch.direction)];
        if *open >= self.shared.queue {
            return refuse(batch, Refusal::Full);
        }
        *open += 1;
        inbox.batches.push(batch);
        self.shared.changed.notify_one();
        Ok(())
    }

    /// True if a batch of that direction would be accepted now.
    pub fn has_room(&self, direction: Direction) -> bool {
        let inbox = self.shared.inbox.lock();
        inbox.out_of_service.is_none() && !inbox.stopping && inbox.open[index(direction)] < self.shared.queue
    }

    /// Fails what waits in a lane. What is in flight ends first, as it does.
    pub fn close_lane(&self, lane: LaneId) {
        let mut inbox = self.shared.inbox.lock();
        inbox.closed_lanes.push(lane);
        inbox.engines.retain(|(other, _)| *other != lane);
        inbox.engines_changed = true;
        self.shared.changed.notify_one();
    }

    /// Paces copies in the background by what the engine of a lane tells, until the lane is closed.
    pub fn pace_by(&self, lane: LaneId, words: StepWords) {
        let mut inbox = self.shared.inbox.lock();
        inbox.engines.retain(|(other, _)| *other != lane);
        inbox.engines.push((lane, words));
        inbox.engines_changed = true;
        self.shared.changed.notify_one();
    }

    /// Lets copies in the background go as fast as they can, or paces them again: when the host needs the room.
    pub fn set_full_rate(&self, full_rate: bool) {
        self.shared.inbox.lock().full_rate = full_rate;
        self.shared.changed.notify_one();
    }

    /// Why the GPU is out of service, if it is.
    pub fn out_of_service(&self) -> Option<Arc<Error>> {
        self.shared.inbox.lock().out_of_service.clone()
    }

    /// What it has done so far.
    pub fn figures(&self) -> Figures {
        self.shared.inbox.lock().figures
    }
}

impl Drop for CopyEngine {
    fn drop(&mut self) {
        self.shared.inbox.lock().stopping = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            // The last share may be dropped by a callback, on the thread itself: then it ends by itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
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
