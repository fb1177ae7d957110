//! Processes that share memory with us are killed again and again: nothing of it stays behind.

use std::os::fd::AsFd;
use std::sync::Arc;

use kvbm_cuda::copy_engine::{CopyMemory, Direction};
use kvbm_cuda::{DeviceMemory, DeviceRange, IpcHandle, IpcMemory, RegisteredMemory, VmmMemory};
use kvbm_shm::SharedMemory;

use crate::engine::{blocks, start, submit};
use crate::patterns::host;
use crate::peer::{Channel, Peer};
use crate::{Gpu, Outcome};

const BLOCK: usize = 64 << 10;
const BYTES: usize = 64 << 20;

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}

/// Has a pool of each kind and registered host memory, hands all over, and waits for its death.
pub fn play_victim(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    let (_, mut fds) = channel.receive()?;
    let memory = SharedMemory::from_fd(fds.remove(0)).map_err(|error| error.to_string())?;
    let _registered = RegisteredMemory::new(&gpu.context, Arc::new(memory)).map_err(text)?;
    let vmm = VmmMemory::create(&gpu.context, BYTES).map_err(text)?;
    let ipc = DeviceMemory::allocate(&gpu.context, BYTES).map_err(text)?;
    let descriptor = vmm.export().map_err(text)?;
    channel.send(&vmm.bytes().to_string(), &[descriptor.as_fd()])?;
    channel.send_bytes(&ipc.ipc_handle().map_err(text)?.0)?;
    channel.wait_closed();
    Ok(())
}

pub fn cycles(gpu: &Gpu) -> Outcome {
    let cycles: usize =
        std::env::var("KVBM_GPU_CYCLES").ok().and_then(|text| text.parse().ok()).unwrap_or(100);
    let engine = start(gpu)?;
    let host = host(&gpu.context, BYTES)?;
    // The first cycles let the driver allocate what it keeps.
    for _ in 0..2 {
        cycle(gpu, &engine, &host)?;
    }
    let (before, _) = gpu.context.memory().map_err(text)?;
    let descriptors = open_descriptors();
    for number in 0..cycles {
        cycle(gpu, &engine, &host).map_err(|error| format!("cycle {number}: {error}"))?;
    }
    let (after, _) = gpu.context.memory().map_err(text)?;
    if after < before {
        return Err(format!("{} bytes of the GPU are gone after {cycles} cycles", before - after));
    }
    let left = open_descriptors();
    if left > descriptors {
        return Err(format!("{} descriptors more than before", left - descriptors));
    }
    Ok(format!(
        "{cycles} processes killed in the middle of copies, {} MB free before and after",
        before / 1_000_000
    ))
}

/// One life: copies both ways with both pools are under way when the owner is killed; all of them end.
fn cycle(
    gpu: &Gpu,
    engine: &kvbm_cuda::copy_engine::CopyEngine,
    host: &Arc<RegisteredMemory>,
) -> Result<(), String> {
    let mut peer = Peer::start("victim")?;
    peer.channel.send("memory", &[host.memory().fd()])?;
    let (bytes, fds) = peer.channel.receive()?;
    let bytes: usize = String::from_utf8_lossy(&bytes)
        .parse()
        .map_err(|error: std::num::ParseIntError| error.to_string())?;
    let vmm: Arc<dyn DeviceRange> =
        Arc::new(VmmMemory::import(&gpu.context, fds[0].as_fd(), bytes).map_err(text)?);
    let (handle, _) = peer.channel.receive()?;
    let handle = IpcHandle(handle.try_into().map_err(|_| "a handle has 64 bytes")?);
    let ipc: Arc<dyn DeviceRange> = Arc::new(IpcMemory::open(&gpu.context, handle, BYTES).map_err(text)?);
    let memory = CopyMemory::Registered(host.clone());
    let pairs: Vec<_> = (0..BYTES / BLOCK).map(|number| (number, number)).collect();
    let mut ends = Vec::new();
    for pool in [vmm, ipc] {
        let device = CopyMemory::Device(pool);
        for _ in 0..4 {
            let (batch, end) = blocks(Direction::Offload, (&device, &memory), BLOCK, &pairs);
            submit(engine, batch)?;
            ends.push(end);
            let (batch, end) = blocks(Direction::Onboard, (&memory, &device), BLOCK, &pairs);
            submit(engine, batch)?;
            ends.push(end);
        }
    }
    peer.kill();
    ends.iter().try_for_each(|end| crate::engine::done(end).map(|_| ()))
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or_default()
}
