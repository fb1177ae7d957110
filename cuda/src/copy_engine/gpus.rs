//! The GPUs of a node as a daemon uses them: each opened when first needed, with one copy engine; and the host memory that
//! all of them know.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use kvbm_shm::SharedMemory;
use parking_lot::{Mutex, RwLock};

use super::{
    CopyBatch, CopyEnd, CopyEngine, CopyEngineConfig, CopyMemory, Direction, LaneId, Refusal, Urgency,
};
use crate::{Context, Device, DeviceName, Driver, Error, RegisteredMemory};

/// How long a copy that found the queue full waits before it tries again.
const TRY_AGAIN: Duration = Duration::from_micros(200);

/// One GPU, or memory of the host in its place.
#[derive(Debug)]
pub struct Gpu {
    context: Option<Context>,
    engine: CopyEngine,
}

impl Gpu {
    /// Its context; `None` if it is memory of the host.
    pub fn context(&self) -> Option<&Context> {
        self.context.as_ref()
    }

    /// What copies from and to it.
    pub fn engine(&self) -> &CopyEngine {
        &self.engine
    }

    /// Begins to copy. Each copy is (from, to, bytes), each place a memory and an offset.
    pub fn begin<'a>(
        &self,
        direction: Direction,
        lane: LaneId,
        urgency: Urgency,
        copies: impl Iterator<Item = (Place<'a>, Place<'a>, usize)>,
    ) -> Result<Copying, String> {
        let (sender, end) = sync_channel(1);
        let mut batch = CopyBatch::new(direction, lane, urgency, move |end| {
            let _ = sender.send(end);
        });
        for (from, to, bytes) in copies {
            batch.copy(from, to, bytes);
        }
        while let Err(refused) = self.engine.submit(batch) {
            match refused.reason {
                Refusal::Full => std::thread::sleep(TRY_AGAIN),
                Refusal::OutOfService(error) => return Err(format!("the GPU is out of service: {error}")),
                Refusal::Unreachable => return Err("the memory is not known to the GPU".into()),
                Refusal::Stopped => return Err("the copy engine stops".into()),
            }
            batch = *refused.batch;
        }
        Ok(Copying(Some(end)))
    }

    /// Copies and waits for the end.
    pub fn copy<'a>(
        &self,
        direction: Direction,
        lane: LaneId,
        urgency: Urgency,
        copies: impl Iterator<Item = (Place<'a>, Place<'a>, usize)>,
    ) -> Result<u64, String> {
        self.begin(direction, lane, urgency, copies)?.wait()
    }
}

/// Copies that have begun. Dropped, it waits for them too: whoever had it may use the memories again.
#[must_use]
#[derive(Debug)]
pub struct Copying(Option<Receiver<CopyEnd>>);

impl Copying {
    /// Copies that ended before anybody could wait.
    pub fn ended() -> Self {
        Self(None)
    }

    /// Returns the bytes, or why not all of them arrived; in either case nothing touches the memories any more.
    pub fn wait(mut self) -> Result<u64, String> {
        match self.0.take().map(|end| end.recv()) {
            None => Ok(0),
            Some(Ok(CopyEnd::Done { bytes, .. })) => Ok(bytes),
            Some(Ok(CopyEnd::Failed(failure))) => Err(failure.to_string()),
            Some(Err(_)) => Err("the thread of the GPU is gone".into()),
        }
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            let _ = end.recv();
        }
    }
}

/// A memory and an offset.
pub type Place<'a> = (&'a CopyMemory, usize);

/// All GPUs of a node. Nothing is opened before it is asked for: a context takes some hundred MB of a GPU.
#[derive(Debug)]
pub struct Gpus {
    driver: Driver,
    config: CopyEngineConfig,
    opened: Mutex<BTreeMap<String, Arc<Gpu>>>,
    host: HostMemory,
}

impl Gpus {
    /// Finds the driver. The error says what is missing.
    pub fn find(config: CopyEngineConfig) -> Result<Self, Error> {
        let (opened, host) = (Mutex::default(), HostMemory::default());
        Ok(Self { driver: Driver::load()?, config, opened, host })
    }

    /// The driver.
    pub fn driver(&self) -> &Driver {
        &self.driver
    }

    /// All that this process may use, opened or not.
    pub fn devices(&self) -> Result<Vec<Device>, Error> {
        self.driver.devices()
    }

    /// Those in use, by UUID.
    pub fn opened(&self) -> Vec<(String, Arc<Gpu>)> {
        self.opened.lock().iter().map(|(uuid, gpu)| (uuid.clone(), gpu.clone())).collect()
    }

    /// The GPU of that name, opened if it was not.
    pub fn gpu(&self, name: &DeviceName) -> Result<Arc<Gpu>, Error> {
        let device = self.driver.device(name)?;
        let mut opened = self.opened.lock();
        if let Some(gpu) = opened.get(&device.uuid) {
            return Ok(gpu.clone());
        }
        let context = Context::open(&self.driver, &device)?;
        let engine = CopyEngine::start(&self.driver, &context, self.config.clone())?;
        let gpu = Arc::new(Gpu { context: Some(context), engine });
        opened.insert(device.uuid, gpu.clone());
        Ok(gpu)
    }

    /// Host memory as the copy engine of a GPU takes it, registered if it was not: the first time takes about 30 ms per GiB.
    pub fn host_memory(&self, gpu: &Gpu, memory: &Arc<SharedMemory>) -> Result<CopyMemory, Error> {
        self.host.known_to(gpu, memory)
    }

    /// Bytes of host memory that are registered by now.
    pub fn host_registered_bytes(&self) -> u64 {
        self.host.bytes.load(Ordering::Relaxed)
    }
}

/// Host memory that is registered. Once is enough for all GPUs of the process.
#[derive(Debug, Default)]
struct HostMemory {
    by_address: RwLock<BTreeMap<usize, Known>>,
    bytes: AtomicU64,
}

/// Each has a lock of its own: registering one takes long, and holds up nobody who copies from or to another.
type Known = Arc<Mutex<Option<CopyMemory>>>;

impl HostMemory {
    fn known_to(&self, gpu: &Gpu, memory: &Arc<SharedMemory>) -> Result<CopyMemory, Error> {
        let address = memory.address().addr().get();
        let found = self.by_address.read().get(&address).cloned();
        let entry = found.unwrap_or_else(|| self.by_address.write().entry(address).or_default().clone());
        let mut entry = entry.lock();
        if let Some(known) = &*entry {
            return Ok(known.clone());
        }
        let known = match gpu.context() {
            None => CopyMemory::Shared(memory.clone()),
            Some(context) => {
                CopyMemory::Registered(Arc::new(RegisteredMemory::new(context, memory.clone())?))
            }
        };
        self.bytes.fetch_add(memory.bytes() as u64, Ordering::Relaxed);
        // Holding the memory keeps its address from being another's.
        *entry = Some(known.clone());
        Ok(known)
    }
}

impl Gpu {
    /// Memory of the host in place of a GPU: for tests of what is above.
    pub fn on_host(config: CopyEngineConfig) -> Self {
        Self { context: None, engine: CopyEngine::start_on_host(config) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_returns_when_all_bytes_are_there_also_when_the_queue_is_short() {
        let gpu = Arc::new(Gpu::on_host(CopyEngineConfig { queue: 1, ..CopyEngineConfig::default() }));
        let memory = || CopyMemory::Shared(Arc::new(SharedMemory::create("test", 64 << 10).unwrap()));
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let (gpu, from, to) = (gpu.clone(), memory(), memory());
                scope.spawn(move || {
                    let CopyMemory::Shared(source) = &from else { unreachable!() };
                    let CopyMemory::Shared(target) = &to else { unreachable!() };
                    for round in 0..20u8 {
                        source.write(0, &[thread * 32 + round; 64 << 10]);
                        let copies = (0..16).map(|i| ((&from, i * 4096), (&to, (15 - i) * 4096), 4096));
                        let lane = LaneId(u64::from(thread));
                        let copied = gpu.copy(Direction::Offload, lane, Urgency::Demanded, copies);
                        assert_eq!(copied, Ok(64 << 10));
                        let mut seen = [0; 64 << 10];
                        target.read(0, &mut seen);
                        assert!(seen.iter().all(|byte| *byte == thread * 32 + round));
                    }
                });
            }
        });
    }

    #[test]
    fn who_lets_go_of_copies_that_have_begun_finds_them_ended() {
        let gpu = Gpu::on_host(CopyEngineConfig { piece_bytes: 4096, ..CopyEngineConfig::default() });
        let memory = || CopyMemory::Shared(Arc::new(SharedMemory::create("test", 8 << 20).unwrap()));
        let (from, to) = (memory(), memory());
        let (CopyMemory::Shared(source), CopyMemory::Shared(target)) = (&from, &to) else { unreachable!() };
        for round in 1..=50u8 {
            source.write(0, &vec![round; 8 << 20]);
            let copies = (0..2048).map(|i| ((&from, i * 4096), (&to, i * 4096), 4096));
            drop(gpu.begin(Direction::Onboard, LaneId(0), Urgency::Demanded, copies).unwrap());
            let mut last = [0; 4096];
            target.read((8 << 20) - 4096, &mut last);
            assert_eq!(last, [round; 4096]);
        }
    }

    #[test]
    fn host_memory_is_made_known_once() {
        let gpu = Gpu::on_host(CopyEngineConfig::default());
        let (known, memory) = (HostMemory::default(), Arc::new(SharedMemory::create("test", 4096).unwrap()));
        let first = known.known_to(&gpu, &memory).unwrap();
        assert!(first.is(&known.known_to(&gpu, &memory).unwrap()));
        assert_eq!((known.by_address.read().len(), known.bytes.into_inner()), (1, 4096));
    }

    #[test]
    fn without_cuda_there_are_no_gpus_and_the_reason_is_told() {
        match Gpus::find(CopyEngineConfig::default()) {
            Ok(gpus) => assert!(gpus.opened().is_empty() && !gpus.devices().unwrap().is_empty()),
            Err(error) => assert!(matches!(error, Error::Missing { .. }), "{error}"),
        }
    }
}
