//! GPUs for tests: their memory is memory of the host, and the copy engine is the real one over it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use kvbm_cuda::copy_engine::{CopyEngineConfig, CopyMemory, Gpu, LaneId};
use kvbm_shm::{DeviceMemory, SharedMemory};
use parking_lot::Mutex;

use super::{EngineMemory, Export, GpuExports, MapExports, Mapped, NoDeviceMemory};

/// One of each name, made when it is first asked for.
#[derive(Debug, Default)]
pub(crate) struct StandInGpus {
    gpus: Mutex<HashMap<String, Arc<Gpu>>>,
    lanes: Mutex<u64>,
    allocated: Mutex<Vec<(String, Weak<SharedMemory>)>>,
}

impl StandInGpus {
    /// Memory of each.
    pub const BYTES: usize = 1 << 20;

    pub fn new() -> Self {
        Self::default()
    }

    fn exports(&self, name: &str, memories: Vec<Arc<SharedMemory>>) -> Arc<dyn EngineMemory> {
        let on_host = || Arc::new(Gpu::on_host(CopyEngineConfig::default()));
        let gpu = self.gpus.lock().entry(name.to_owned()).or_insert_with(on_host).clone();
        let mut lanes = self.lanes.lock();
        *lanes += 1;
        let mapped = |memory: Arc<SharedMemory>| Mapped {
            bytes: memory.bytes(),
            memory: CopyMemory::Shared(memory),
            start: 0,
        };
        let (lane, elsewhere) = (LaneId(*lanes), Mutex::default());
        let mapped = memories.into_iter().map(mapped).collect();
        Arc::new(GpuExports { gpus: None, gpu, lane, mapped, elsewhere })
    }
}

impl MapExports for StandInGpus {
    /// Each GPU has a node of its own.
    fn node_of(&self, device: &str) -> Option<u32> {
        device.strip_prefix("GPU-")?.parse().ok()
    }

    /// All of one GPU.
    fn map(&self, exports: Vec<Export>) -> Result<Arc<dyn EngineMemory>, String> {
        let (mut name, mut memories) = (String::new(), Vec::new());
        for export in exports {
            match export {
                Export::CudaVmm { descriptor, gpu_uuid, .. } if gpu_uuid.starts_with("GPU-") => {
                    let memory = SharedMemory::from_fd(descriptor).map_err(|error| error.to_string())?;
                    memories.push(Arc::new(memory));
                    name = gpu_uuid;
                }
                other => return Err(format!("{other:?} is not memory of a GPU")),
            }
        }
        Ok(self.exports(&name, memories))
    }

    fn allocate(
        &self,
        gpu_uuid: &str,
        bytes: usize,
    ) -> Result<(Arc<dyn EngineMemory>, DeviceMemory), NoDeviceMemory> {
        let mut allocated = self.allocated.lock();
        allocated.retain(|(_, memory)| memory.strong_count() > 0);
        let used = allocated.iter().filter(|(name, _)| name == gpu_uuid);
        let used: usize = used.filter_map(|(_, memory)| memory.upgrade()).map(|memory| memory.bytes()).sum();
        let free = Self::BYTES - used;
        if bytes > free {
            return Err(NoDeviceMemory::Exhausted(free as u64));
        }
        let impossible = |error: kvbm_shm::Error| NoDeviceMemory::Impossible(error.to_string());
        let memory = Arc::new(SharedMemory::create("stand-in-gpu", bytes).map_err(impossible)?);
        allocated.push((gpu_uuid.to_owned(), Arc::downgrade(&memory)));
        let descriptor = memory.fd().try_clone_to_owned().expect("a test has descriptors");
        Ok((self.exports(gpu_uuid, vec![memory]), DeviceMemory { descriptor, bytes }))
    }
}
