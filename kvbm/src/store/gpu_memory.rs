//! KV memory that an engine has on a GPU, mapped by the daemon: its copies go to the GPU's copy engine.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvbm_cuda::copy_engine::StepWords;
use kvbm_cuda::copy_engine::{CopyMemory, Copying, Direction, Gpu, Gpus, LaneId, Urgency};
use kvbm_cuda::{Context, DeviceName, DeviceRange, IpcHandle, IpcMemory, VmmMemory};
use kvbm_shm::{DeviceMemory, SharedMemory};
use parking_lot::Mutex;

use super::{EngineMemory, Export, MapExports, MapShared, NoDeviceMemory, Pace, PeerCopy, RangeCopy};

/// Bytes in one batch: some milliseconds of the link, beside which handing over the next takes nothing. Tests have small pools,
/// and loads of several batches all the same.
const BYTES_AT_ONCE: usize = if cfg!(test) { 64 << 10 } else { 128 << 20 };

/// Maps memory of GPUs, and memfds.
#[derive(Debug)]
pub struct MapGpus {
    gpus: Arc<Gpus>,
    lanes: AtomicU64,
}

impl MapGpus {
    /// On the GPUs of this node.
    pub fn new(gpus: Arc<Gpus>) -> Self {
        Self { gpus, lanes: AtomicU64::new(0) }
    }

    fn open(&self, gpu: &Gpu, export: Export) -> Result<Mapped, String> {
        let text = |error: kvbm_cuda::Error| error.to_string();
        let context = gpu.context().ok_or("it is not a GPU")?;
        let usable = |bytes: u64| usize::try_from(bytes).map_err(|_| format!("{bytes} bytes are too many"));
        let (memory, start): (Arc<dyn DeviceRange>, usize) = match export {
            Export::CudaIpc { handle, offset, bytes, .. } => {
                let whole = offset.checked_add(bytes).ok_or("its end is beyond all addresses")?;
                let memory = IpcMemory::open(context, IpcHandle(handle), usable(whole)?).map_err(text)?;
                (Arc::new(memory), usable(offset)?)
            }
            Export::CudaVmm { descriptor, bytes, .. } => {
                use std::os::fd::AsFd;
                let memory = VmmMemory::import(context, descriptor.as_fd(), usable(bytes)?).map_err(text)?;
                (Arc::new(memory), 0)
            }
            Export::Shared(_) => return Err("memory of GPU and host in one pool".into()),
        };
        Ok(Mapped { bytes: memory.bytes() - start, memory: CopyMemory::Device(memory), start })
    }

    fn exports(&self, gpu: Arc<Gpu>, mapped: Vec<Mapped>) -> Arc<dyn EngineMemory> {
        let lane = LaneId(self.lanes.fetch_add(1, Ordering::Relaxed));
        let (gpus, elsewhere) = (Some(Arc::clone(&self.gpus)), Mutex::default());
        Arc::new(GpuExports { gpus, gpu, lane, mapped, elsewhere })
    }
}

/// Memory that can be handed to other processes, zeroed.
fn create(gpu: &Gpu, bytes: usize) -> Result<VmmMemory, NoDeviceMemory> {
    let impossible = |error: kvbm_cuda::Error| NoDeviceMemory::Impossible(error.to_string());
    let context = gpu.context().ok_or_else(|| NoDeviceMemory::Impossible("it is not a GPU".into()))?;
    let memory = VmmMemory::create(context, bytes).map_err(|error| match error.is_out_of_memory() {
        true => NoDeviceMemory::Exhausted(context.memory().unwrap_or_default().0),
        false => impossible(error),
    })?;
    memory.fill(0, 0, memory.bytes()).map_err(impossible)?;
    Ok(memory)
}

impl MapExports for MapGpus {
    fn node_of(&self, device: &str) -> Option<u32> {
        let devices = self.gpus.devices().ok()?;
        devices.into_iter().find(|found| found.uuid == device)?.numa_node
    }

    fn map(&self, exports: Vec<Export>) -> Result<Arc<dyn EngineMemory>, String> {
        let uuid = exports.iter().find_map(|export| match export {
            Export::Shared(_) => None,
            Export::CudaIpc { gpu_uuid, .. } | Export::CudaVmm { gpu_uuid, .. } => Some(gpu_uuid.clone()),
        });
        let Some(uuid) = uuid else { return MapShared.map(exports) };
        let of_another = |export: &Export| match export {
            Export::Shared(_) => false,
            Export::CudaIpc { gpu_uuid, .. } | Export::CudaVmm { gpu_uuid, .. } => *gpu_uuid != uuid,
        };
        if exports.iter().any(of_another) {
            return Err("memory of several GPUs in one pool: open one pool for each".into());
        }
        let gpu = self.gpus.gpu(&DeviceName::Uuid(uuid)).map_err(|error| error.to_string())?;
        let mapped: Result<Vec<_>, String> =
            exports.into_iter().map(|export| self.open(&gpu, export)).collect();
        Ok(self.exports(gpu, mapped?))
    }

    fn allocate(
        &self,
        gpu_uuid: &str,
        bytes: usize,
    ) -> Result<(Arc<dyn EngineMemory>, DeviceMemory), NoDeviceMemory> {
        let impossible = |error: kvbm_cuda::Error| NoDeviceMemory::Impossible(error.to_string());
        let gpu = self.gpus.gpu(&DeviceName::Uuid(gpu_uuid.to_owned())).map_err(impossible)?;
        let memory = create(&gpu, bytes)?;
        let device = DeviceMemory { descriptor: memory.export().map_err(impossible)?, bytes: memory.bytes() };
        let mapped = Mapped { bytes: device.bytes, memory: CopyMemory::Device(Arc::new(memory)), start: 0 };
        Ok((self.exports(gpu, vec![mapped]), device))
    }
}

#[derive(Debug)]
struct Mapped {
    memory: CopyMemory,
    /// Where the export begins in it.
    start: usize,
    /// How long it is.
    bytes: usize,
}

/// The exports of one pool, all of one GPU.
#[derive(Debug)]
struct GpuExports {
    /// `None`: host memory needs no registration.
    gpus: Option<Arc<Gpus>>,
    gpu: Arc<Gpu>,
    lane: LaneId,
    mapped: Vec<Mapped>,
    /// Each export as other GPUs see it, by their name.
    elsewhere: Mutex<HashMap<(String, usize), Arc<dyn DeviceRange>>>,
}

impl GpuExports {
    fn begin(
        &self,
        direction: Direction,
        urgency: Urgency,
        ranges: &[RangeCopy<'_>],
    ) -> Result<Copying, String> {
        let mut host = Vec::with_capacity(ranges.len());
        for range in ranges {
            host.push(match &self.gpus {
                Some(gpus) => gpus.host_memory(&self.gpu, range.host).map_err(|error| error.to_string())?,
                None => CopyMemory::Shared(Arc::clone(range.host)),
            });
        }
        let copies = ranges.iter().zip(&host).map(|(range, host)| {
            let mapped = &self.mapped[range.export];
            let (engine, host) = ((&mapped.memory, mapped.start + range.offset), (host, range.host_offset));
            match direction {
                Direction::Offload => (engine, host, range.bytes),
                Direction::Onboard => (host, engine, range.bytes),
            }
        });
        self.gpu.begin(direction, self.lane, urgency, copies)
    }

    /// All of another memory, as this GPU sees it.
    fn pieces_of(&self, from: &dyn EngineMemory) -> Result<Vec<(CopyMemory, usize)>, String> {
        (0..).map_while(|export| from.piece(export, self.gpu.context()).transpose()).collect()
    }
}

impl EngineMemory for GpuExports {
    fn bytes(&self, export: usize) -> Option<usize> {
        self.mapped.get(export).map(|mapped| mapped.bytes)
    }

    fn bytes_at_once(&self) -> usize {
        BYTES_AT_ONCE
    }

    fn begin_copy_out(&self, pace: Pace, copies: &[RangeCopy<'_>]) -> Result<Copying, String> {
        let urgency = match pace {
            Pace::Background => Urgency::Background,
            Pace::Full => Urgency::Demanded,
        };
        self.begin(Direction::Offload, urgency, copies)
    }

    fn begin_copy_in(&self, copies: &[RangeCopy<'_>]) -> Result<Copying, String> {
        self.begin(Direction::Onboard, Urgency::Demanded, copies)
    }

    fn piece(&self, export: usize, reader: Option<&Context>) -> Result<Option<(CopyMemory, usize)>, String> {
        let Some(mapped) = self.mapped.get(export) else { return Ok(None) };
        let (CopyMemory::Device(memory), Some(reader)) = (&mapped.memory, reader) else {
            return Ok(Some((mapped.memory.clone(), mapped.start)));
        };
        let key = (reader.device().uuid.clone(), export);
        let mut elsewhere = self.elsewhere.lock();
        let seen = match elsewhere.entry(key) {
            Entry::Occupied(known) => known.get().clone(),
            Entry::Vacant(new) => {
                let seen = memory.seen_by(reader).map_err(|error| error.to_string())?;
                new.insert(seen.unwrap_or_else(|| Arc::clone(memory))).clone()
            }
        };
        Ok(Some((CopyMemory::Device(seen), mapped.start)))
    }

    fn connect(&self, from: &dyn EngineMemory) -> Result<(), String> {
        for (memory, _) in self.pieces_of(from)? {
            match (memory, self.gpu.context()) {
                (CopyMemory::Device(_), Some(_)) | (CopyMemory::Shared(_), None) => {}
                (CopyMemory::Device(_), None) => return Err("it is in memory of a GPU".into()),
                (CopyMemory::Shared(_), Some(_)) | (CopyMemory::Registered(_), _) => {
                    return Err("it is in memory of the host".into());
                }
            }
        }
        Ok(())
    }

    fn copy_from(&self, from: &dyn EngineMemory, ranges: &[PeerCopy]) -> Result<(), String> {
        let pieces = self.pieces_of(from)?;
        let copies = ranges.iter().map(|range| {
            let ((from, start), to) = (&pieces[range.from_export], &self.mapped[range.export]);
            ((from, start + range.from_offset), (&to.memory, to.start + range.offset), range.bytes)
        });
        self.gpu.copy(Direction::Onboard, self.lane, Urgency::Demanded, copies).map(|_| ())
    }

    fn prepare(&self, host: &Arc<SharedMemory>) {
        if let Some(gpus) = &self.gpus
            && let Err(error) = gpus.host_memory(&self.gpu, host)
        {
            tracing::warn!(%error, "host memory cannot be made known to a GPU");
        }
    }

    fn pace_by(&self, words: &Arc<SharedMemory>, offset: usize) {
        self.gpu.engine().pace_by(self.lane, &StepWords::new(Arc::clone(words), offset));
    }
}

impl Drop for GpuExports {
    fn drop(&mut self) {
        // Nobody waits for a copy any more: whoever does has a share in this.
        self.gpu.engine().close_lane(self.lane);
    }
}

#[cfg(test)]
mod stand_in;
#[cfg(test)]
pub(crate) use stand_in::StandInGpus;

#[cfg(test)]
mod tests {
    use kvbm_cuda::copy_engine::CopyEngineConfig;
    use kvbm_shm::SharedMemory;

    use super::super::engine_memory::MappedBlocks;
    use super::*;
    use crate::store::Fragment;

    /// Two layers in memory of the host in place of a GPU's, blocks scattered over both.
    #[test]
    fn blocks_of_several_pieces_go_through_the_copy_engine_and_come_back() {
        let shared = |bytes| Arc::new(SharedMemory::create("test", bytes).unwrap());
        let layers = [shared(1 << 20), shared(1 << 20)];
        let mapped = layers.iter().map(|layer| Mapped {
            memory: CopyMemory::Shared(Arc::clone(layer)),
            start: 4096,
            bytes: layer.bytes() - 4096,
        });
        let exports = GpuExports {
            gpus: None,
            gpu: Arc::new(Gpu::on_host(CopyEngineConfig::default())),
            lane: LaneId(0),
            mapped: mapped.collect(),
            elsewhere: Mutex::default(),
        };
        let fragment = |export| Fragment { export, offset: 512, stride: 3000, bytes: 2000 };
        let blocks = MappedBlocks::new(Arc::new(exports), vec![fragment(0), fragment(1)], 4000, 64).unwrap();
        let host = shared(1 << 20);
        let pattern = |block: u32| -> Vec<u8> { (0..4000u32).map(|i| (i * 7 + block * 13) as u8).collect() };
        let slot = |block: u32| ((block * 37 % 64) * 8192) as usize;
        for block in 0..64 {
            host.write(slot(block), &pattern(block));
        }
        let down: Vec<_> = (0..64).flat_map(|block| blocks.ranges(block, &host, slot(block))).collect();
        blocks.memory.copy_in(&down).unwrap();
        host.write(0, &vec![0; host.bytes()]);
        let up: Vec<_> = (0..64).flat_map(|block| blocks.ranges(block, &host, slot(63 - block))).collect();
        blocks.memory.copy_out(Pace::Background, &up).unwrap();
        for block in 0..64 {
            let mut seen = vec![0; 4000];
            host.read(slot(63 - block), &mut seen);
            assert!(seen == pattern(block), "block {block}");
        }
        let mut second_layer = [0; 2000];
        layers[1].read(4096 + 512 + 5 * 3000, &mut second_layer);
        assert!(second_layer[..] == pattern(5)[2000..]);
    }
}
