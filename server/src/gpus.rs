//! The GPUs of this node: looked for once, when the daemon starts.

use std::sync::Arc;

use kvbm_cuda::copy_engine::{CopyEngineConfig, Gpu, Gpus, PacerConfig};
use kvbm_cuda::{Device, Error};

use crate::Config;
use crate::status::GpuStatus;

/// What was found.
#[derive(Debug)]
pub(crate) struct NodeGpus {
    /// To be opened as engines need them.
    pub gpus: Arc<Gpus>,
    devices: Vec<Device>,
}

impl NodeGpus {
    /// Looks for the driver and its GPUs, which may take some hundred milliseconds. Without them the daemon serves engines on
    /// CPUs, and says so once.
    pub fn find(config: &Config) -> Option<Self> {
        let pacer =
            PacerConfig { slowdown_share: config.gpu_slowdown_percent / 100.0, ..PacerConfig::default() };
        let engine = CopyEngineConfig { pacer, ..CopyEngineConfig::default() };
        let found = Gpus::find(engine).and_then(|gpus| -> Result<Self, Error> {
            let devices = gpus.devices()?;
            Ok(Self { gpus: Arc::new(gpus), devices })
        });
        match found {
            Ok(found) => {
                for device in &found.devices {
                    let (gpu, name, numa_node) = (&device.uuid, &device.name, device.numa_node);
                    tracing::info!(
                        gpu,
                        name,
                        numa_node,
                        cuda = found.gpus.driver().version(),
                        "a GPU can be used"
                    );
                }
                Some(found)
            }
            Err(error) => {
                tracing::info!(%error, "no GPU is used");
                None
            }
        }
    }

    /// The node of each GPU that says it.
    pub fn nodes(&self) -> Vec<u32> {
        self.devices.iter().filter_map(|device| device.numa_node).collect()
    }

    /// One entry for each GPU.
    pub fn status(&self) -> Vec<GpuStatus> {
        let opened = self.gpus.opened();
        let gpu =
            |device: &Device| opened.iter().find(|(uuid, _)| *uuid == device.uuid).map(|(_, gpu)| &**gpu);
        let registered = self.gpus.host_registered_bytes();
        self.devices.iter().map(|device| status(device, gpu(device), registered)).collect()
    }
}

fn status(device: &Device, gpu: Option<&Gpu>, host_registered_bytes: u64) -> GpuStatus {
    let figures = gpu.map(|gpu| gpu.engine().figures()).unwrap_or_default();
    let broken = gpu.and_then(|gpu| gpu.engine().out_of_service());
    let state = match (gpu, &broken) {
        (None, _) => "idle",
        (Some(_), None) => "on",
        (Some(_), Some(_)) => "out",
    };
    let seconds = figures.busy.map(|busy| busy.as_secs_f64());
    GpuStatus {
        uuid: device.uuid.clone(),
        name: device.name.clone(),
        pci_bus_id: device.pci_bus_id.clone(),
        numa_node: device.numa_node,
        memory_bytes: device.memory_bytes,
        memory_free_bytes: gpu.and_then(Gpu::context).and_then(|c| c.memory().ok()).map(|(free, _)| free),
        state: state.to_owned(),
        reason: broken.map(|error| error.to_string()).unwrap_or_default(),
        onboard_bytes: figures.bytes[0],
        offload_bytes: figures.bytes[1],
        onboard_batches: figures.batches[0],
        offload_batches: figures.batches[1],
        failed_batches: figures.failed.iter().sum(),
        onboard_busy_s: seconds[0],
        offload_busy_s: seconds[1],
        host_registered_bytes,
        paced_bytes_per_second: figures.paced_bytes_per_second,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_nobody_needed_is_idle_and_one_that_copied_tells_what() {
        let device = Device {
            ordinal: 0,
            uuid: "GPU-00112233-4455-6677-8899-aabbccddeeff".into(),
            pci_bus_id: "0000:17:00.0".into(),
            name: "Test".into(),
            memory_bytes: 80_000_000_000,
            numa_node: Some(1),
            capability: (9, 0),
            multiprocessors: 132,
            copy_engines: 3,
            exports_descriptors: true,
            registers_host_memory: true,
        };
        let idle = status(&device, None, 0);
        assert_eq!((idle.state.as_str(), idle.offload_bytes, idle.numa_node), ("idle", 0, Some(1)));
        let gpu = Gpu::on_host(CopyEngineConfig::default());
        let memory = || {
            let memory = kvbm_shm::SharedMemory::create("test", 8192).unwrap();
            kvbm_cuda::copy_engine::CopyMemory::Shared(Arc::new(memory))
        };
        let (from, to) = (memory(), memory());
        let copies = [((&from, 0), (&to, 0), 8192)].into_iter();
        let lane = kvbm_cuda::copy_engine::LaneId(0);
        let (direction, urgency) =
            (kvbm_cuda::copy_engine::Direction::Offload, kvbm_cuda::copy_engine::Urgency::Demanded);
        assert_eq!(gpu.copy(direction, lane, urgency, copies), Ok(8192));
        let on = status(&device, Some(&gpu), 4096);
        assert_eq!((on.state.as_str(), on.offload_bytes, on.offload_batches), ("on", 8192, 1));
        assert_eq!(on.host_registered_bytes, 4096);
        assert_eq!((on.onboard_bytes, on.failed_batches, on.reason.as_str()), (0, 0, ""));
    }
}
