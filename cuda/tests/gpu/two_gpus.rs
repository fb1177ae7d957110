//! Blocks that go from one GPU to another. Skipped where there is one only.

use std::sync::Arc;
use std::time::Instant;

use kvbm_cuda::copy_engine::{CopyMemory, Direction};
use kvbm_cuda::{
    BatchCopier, BatchForm, Context, DeviceMemory, DeviceRange, RawCopy, RegisteredMemory, Stream, VmmMemory,
};

use crate::engine::{blocks, done, start, submit};
use crate::patterns::{check_device, fill_device, host, scatter};
use crate::peer::Peer;
use crate::{Gpu, Outcome, sharing};

const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 256;
const SKIPPED: &str = "skipped: no second GPU";

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}

/// The second GPU, if the first can be reached from there.
fn second(gpu: &Gpu) -> Result<Option<Gpu>, String> {
    let devices = gpu.driver.devices().map_err(text)?;
    let Some(device) = devices.iter().find(|device| device.uuid != gpu.context.device().uuid) else {
        return Ok(None);
    };
    let driver = kvbm_cuda::Driver::load().map_err(text)?;
    let context = Context::open(&driver, device).map_err(text)?;
    match context.can_reach(&gpu.context).map_err(text)? {
        true => Ok(Some(Gpu { driver, context })),
        false => Ok(None),
    }
}

/// Scattered blocks, by the copy engine of the GPU that wants them, out of memory of each kind.
pub fn engine(gpu: &Gpu) -> Outcome {
    let Some(other) = second(gpu)? else { return Ok(SKIPPED.into()) };
    let bytes = BLOCKS * BLOCK;
    let vmm: Arc<dyn DeviceRange> = Arc::new(VmmMemory::create(&gpu.context, bytes).map_err(text)?);
    let plain: Arc<dyn DeviceRange> = Arc::new(DeviceMemory::allocate(&gpu.context, bytes).map_err(text)?);
    let mut rates = Vec::new();
    for (seed, (name, from)) in [("vmm", vmm), ("plain", plain)].into_iter().enumerate() {
        let seed = seed as u64 + 1;
        fill_device(&*from, seed, BLOCK)?;
        from.let_in(&other.context).map_err(text)?;
        from.let_in(&other.context).map_err(|error| format!("the second time: {error}"))?;
        rates.push(format!("{name} {:.0} GB/s", rate(&other, from, (BLOCKS, BLOCK), seed)?));
    }
    Ok(format!("{BLOCKS} blocks of 2 MiB: {}", rates.join(", ")))
}

/// The same out of memory of another process, opened by its handle.
pub fn of_another_process(gpu: &Gpu) -> Outcome {
    let Some(other) = second(gpu)? else { return Ok(SKIPPED.into()) };
    let owner = Peer::start("ipc-owner")?;
    let pool = sharing::open(gpu, &owner)?;
    let seen = pool.seen_by(&other.context).map_err(text)?.ok_or("it was not opened there")?;
    let there = rate(&other, seen, (sharing::BLOCKS, sharing::BLOCK), 1)?;
    pool.let_in(&other.context).map_err(text)?;
    let here = rate(&other, pool, (sharing::BLOCKS, sharing::BLOCK), 1)?;
    owner.finish()?;
    Ok(format!("opened where it is wanted {there:.0} GB/s, where it is {here:.0} GB/s"))
}

/// Brings all blocks of memory with this pattern to another GPU, checks them, and says how fast, in GB/s.
fn rate(
    to: &Gpu,
    from: Arc<dyn DeviceRange>,
    (count, size): (usize, usize),
    seed: u64,
) -> Result<f64, String> {
    let engine = start(to)?;
    let bytes = count * size;
    let target: Arc<dyn DeviceRange> = Arc::new(VmmMemory::create(&to.context, bytes).map_err(text)?);
    target.fill(0, 0xEE, target.bytes()).map_err(text)?;
    // Each block to its own place, in an order without locality.
    let pairs: Vec<(usize, usize)> = scatter(count, 7).into_iter().map(|block| (block, block)).collect();
    let (from, memory) = (CopyMemory::Device(from), CopyMemory::Device(target.clone()));
    let mut best = f64::MAX;
    for _ in 0..3 {
        let (batch, end) = blocks(Direction::Onboard, (&from, &memory), size, &pairs);
        let started = Instant::now();
        submit(&engine, batch)?;
        done(&end)?;
        best = best.min(started.elapsed().as_secs_f64());
    }
    check_device(&*target, seed, size)?;
    Ok(bytes as f64 / 1e9 / best)
}

pub fn each_form(gpu: &Gpu) -> Outcome {
    let Some(other) = second(gpu)? else { return Ok(SKIPPED.into()) };
    let bytes = BLOCKS * BLOCK;
    let from = VmmMemory::create(&gpu.context, bytes).map_err(text)?;
    from.let_in(&other.context).map_err(text)?;
    let to = VmmMemory::create(&other.context, bytes).map_err(text)?;
    let stream = Stream::new(&other.context).map_err(text)?;
    let mut told = Vec::new();
    for (seed, form) in [BatchForm::V2, BatchForm::V1, BatchForm::Loop].into_iter().enumerate() {
        let Some(mut copier) = BatchCopier::with_form(&other.driver, form) else {
            told.push(format!("{form:?} is not there"));
            continue;
        };
        fill_device(&from, seed as u64 + 10, BLOCK)?;
        let copy = |at| RawCopy { from: from.address().plus(at), to: to.address().plus(at), bytes: BLOCK };
        let copies: Vec<RawCopy> = scatter(BLOCKS, 3).into_iter().map(|block| copy(block * BLOCK)).collect();
        // SAFETY: both pools are mapped, and the stream is waited for before they go.
        unsafe { copier.copy(&stream, &copies) }.map_err(text)?;
        stream.synchronize().map_err(text)?;
        check_device(&to, seed as u64 + 10, BLOCK)?;
        told.push(format!("{form:?} ok"));
    }
    Ok(told.join(", "))
}

/// Host memory that was registered through one GPU is known to the other.
pub fn registered_once(gpu: &Gpu) -> Outcome {
    let Some(other) = second(gpu)? else { return Ok(SKIPPED.into()) };
    let bytes = 64 * BLOCK;
    let memory: Arc<RegisteredMemory> = host(&gpu.context, bytes)?;
    let engine = start(&other)?;
    let pool: Arc<dyn DeviceRange> = Arc::new(VmmMemory::create(&other.context, bytes).map_err(text)?);
    for block in 0..64 {
        memory.memory().write(block * BLOCK, &crate::patterns::block(4, block, BLOCK));
    }
    let pairs: Vec<(usize, usize)> = scatter(64, 5).into_iter().map(|block| (block, block)).collect();
    let places = (&CopyMemory::Registered(memory.clone()), &CopyMemory::Device(pool.clone()));
    let (batch, end) = blocks(Direction::Onboard, places, BLOCK, &pairs);
    submit(&engine, batch)?;
    let (copied, took) = done(&end)?;
    check_device(&*pool, 4, BLOCK)?;
    Ok(format!("{:.1} GB/s", copied as f64 / 1e9 / took.as_secs_f64()))
}
