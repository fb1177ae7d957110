//! Figures of the copy engines, one for each GPU that is in use.

use super::text::Text;
use crate::status::{GpuStatus, Status};

pub(super) fn render(text: &mut Text, status: &Status) {
    let used: Vec<&GpuStatus> = status.gpus.iter().filter(|gpu| gpu.state != "idle").collect();
    if used.is_empty() {
        return;
    }
    let help = "1 while a GPU can be copied to and from.";
    let mut family = text.family("kvbm_gpu_in_service", "gauge", help);
    used.iter().for_each(|gpu| family.value(&[("gpu", &gpu.uuid)], u8::from(gpu.state == "on")));
    let help = "Bytes that a GPU's copy engines have moved, counted when the GPU said so.";
    let mut family = text.family("kvbm_gpu_copied_bytes_total", "counter", help);
    for gpu in &used {
        family.value(&[("gpu", &gpu.uuid), ("direction", "onboard")], gpu.onboard_bytes);
        family.value(&[("gpu", &gpu.uuid), ("direction", "offload")], gpu.offload_bytes);
    }
    let help = "Batches of copies that a GPU's copy engines have ended well.";
    let mut family = text.family("kvbm_gpu_batches_total", "counter", help);
    for gpu in &used {
        family.value(&[("gpu", &gpu.uuid), ("direction", "onboard")], gpu.onboard_batches);
        family.value(&[("gpu", &gpu.uuid), ("direction", "offload")], gpu.offload_batches);
    }
    let help = "Batches of copies that failed.";
    let mut family = text.family("kvbm_gpu_failed_batches_total", "counter", help);
    used.iter().for_each(|gpu| family.value(&[("gpu", &gpu.uuid)], gpu.failed_batches));
    let help = "Time during which a GPU's copy engines had something to do.";
    let mut family = text.family("kvbm_gpu_copy_busy_seconds_total", "counter", help);
    for gpu in &used {
        family.value(&[("gpu", &gpu.uuid), ("direction", "onboard")], gpu.onboard_busy_s);
        family.value(&[("gpu", &gpu.uuid), ("direction", "offload")], gpu.offload_busy_s);
    }
    let help = "Host memory that is registered, once for all GPUs, so that copies from and to it need not wait for that.";
    let mut family = text.family("kvbm_gpu_host_registered_bytes", "gauge", help);
    family.value(&[], used[0].host_registered_bytes);
    let help = "Rate at which copies in the background go while the engine decodes; absent while they go as fast as they can.";
    let mut family = text.family("kvbm_gpu_paced_bytes_per_second", "gauge", help);
    for gpu in &used {
        if let Some(rate) = gpu.paced_bytes_per_second {
            family.value(&[("gpu", &gpu.uuid)], rate);
        }
    }
}
