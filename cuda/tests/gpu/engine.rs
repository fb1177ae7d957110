//! The copy engine over a GPU.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kvbm_cuda::copy_engine::{
    CopyBatch, CopyEnd, CopyEngine, CopyEngineConfig, CopyMemory, Direction, Fence, LaneId, Urgency,
};
use kvbm_cuda::{DeviceMemory, DeviceRange, RegisteredMemory, VmmMemory};
use kvbm_shm::SharedMemory;

use crate::patterns::{block, check, fill_device, host, scatter};
use crate::peer::Peer;
use crate::{Gpu, Outcome};

const BLOCK: usize = 256 << 10;

pub fn start(gpu: &Gpu) -> Result<CopyEngine, String> {
    let config = CopyEngineConfig { queue: 4096, ..CopyEngineConfig::default() };
    CopyEngine::start(&gpu.driver, &gpu.context, config).map_err(|error| error.to_string())
}

/// A batch of whole blocks, (from, to) each, and its end.
pub fn blocks(
    direction: Direction,
    (from, to): (&CopyMemory, &CopyMemory),
    block_bytes: usize,
    pairs: &[(usize, usize)],
) -> (CopyBatch, Receiver<CopyEnd>) {
    let (sender, end) = channel();
    let mut batch = CopyBatch::new(direction, LaneId(1), Urgency::Demanded, move |end| {
        let _ = sender.send(end);
    });
    for (a, b) in pairs {
        batch.copy((from, a * block_bytes), (to, b * block_bytes), block_bytes);
    }
    (batch, end)
}

pub fn submit(engine: &CopyEngine, batch: CopyBatch) -> Result<(), String> {
    engine.submit(batch).map_err(|refused| format!("{:?}", refused.reason))
}

pub fn done(end: &Receiver<CopyEnd>) -> Result<(u64, Duration), String> {
    match end.recv_timeout(Duration::from_secs(60)) {
        Ok(CopyEnd::Done { bytes, took }) => Ok((bytes, took)),
        Ok(CopyEnd::Failed(failure)) => Err(failure.to_string()),
        Err(_) => Err("a batch did not end".into()),
    }
}

/// Blocks that lie across the boundary of two registrations arrive whole, in both directions.
pub fn chunks(gpu: &Gpu) -> Outcome {
    let text = |error: kvbm_cuda::Error| error.to_string();
    let (count, shift) = (8, 12 << 10);
    let memory = SharedMemory::create("chunks", count * BLOCK + (1 << 20)).map_err(|e| e.to_string())?;
    let mut registered =
        RegisteredMemory::begin(&gpu.context, Arc::new(memory), BLOCK + 4096).map_err(text)?;
    let mut calls = 0;
    while registered.register_next().map_err(text)? {
        calls += 1;
    }
    let pool = Arc::new(DeviceMemory::allocate(&gpu.context, count * BLOCK).map_err(text)?);
    fill_device(&*pool, 1, BLOCK)?;
    let registered = Arc::new(registered);
    let (device, host) = (CopyMemory::Device(pool.clone()), CopyMemory::Registered(registered.clone()));
    let engine = start(gpu)?;
    let (sender, end) = channel();
    let mut batch = CopyBatch::new(Direction::Offload, LaneId(1), Urgency::Demanded, move |end| {
        let _ = sender.send(end);
    });
    for number in 0..count {
        batch.copy((&device, number * BLOCK), (&host, shift + number * BLOCK), BLOCK);
    }
    submit(&engine, batch)?;
    done(&end)?;
    let mut seen = vec![0; BLOCK];
    for number in 0..count {
        registered.memory().read(shift + number * BLOCK, &mut seen);
        check(1, number, &seen)?;
        registered.memory().write(shift + number * BLOCK, &block(2, number, BLOCK));
    }
    let (sender, end) = channel();
    let mut batch = CopyBatch::new(Direction::Onboard, LaneId(1), Urgency::Demanded, move |end| {
        let _ = sender.send(end);
    });
    for number in 0..count {
        batch.copy((&host, shift + number * BLOCK), (&device, number * BLOCK), BLOCK);
    }
    submit(&engine, batch)?;
    done(&end)?;
    crate::patterns::check_device(&*pool, 2, BLOCK)?;
    Ok(format!("{count} blocks over {calls} registrations"))
}

/// Offloads and onboards at the same time, scattered, of many small batches.
pub fn both_ways(gpu: &Gpu) -> Outcome {
    let text = |error: kvbm_cuda::Error| error.to_string();
    let count = 1024;
    let pool = Arc::new(VmmMemory::create(&gpu.context, 2 * count * BLOCK).map_err(text)?);
    let host = host(&gpu.context, 2 * count * BLOCK)?;
    fill_device(&*pool, 1, BLOCK)?;
    for number in 0..2 * count {
        host.memory().write(number * BLOCK, &block(2, number, BLOCK));
    }
    let (device, memory) = (CopyMemory::Device(pool.clone()), CopyMemory::Registered(host.clone()));
    // The even blocks of the pool go to the upper half of host memory; the lower half goes to the odd ones.
    let order = scatter(count, 9);
    let out: Vec<_> = order.iter().enumerate().map(|(i, o)| (2 * o, count + i)).collect();
    let back: Vec<_> = order.iter().enumerate().map(|(i, o)| (i, 2 * o + 1)).collect();
    let engine = start(gpu)?;
    let mut ends = Vec::new();
    for (out, back) in out.chunks(17).zip(back.chunks(17)) {
        let (batch, end) = blocks(Direction::Offload, (&device, &memory), BLOCK, out);
        submit(&engine, batch)?;
        ends.push(end);
        let (batch, end) = blocks(Direction::Onboard, (&memory, &device), BLOCK, back);
        submit(&engine, batch)?;
        ends.push(end);
    }
    ends.iter().try_for_each(|end| done(end).map(|_| ()))?;
    let mut seen = vec![0; BLOCK];
    for (from, to) in out {
        host.memory().read(to * BLOCK, &mut seen);
        check(1, from, &seen)?;
    }
    for (from, to) in back {
        pool.read(to * BLOCK, &mut seen).map_err(text)?;
        check(2, from, &seen)?;
    }
    let figures = engine.figures();
    if figures.bytes != [(count * BLOCK) as u64; 2] || figures.failed != [0, 0] {
        return Err(format!("{figures:?}"));
    }
    Ok(format!("{} batches of 17 blocks of 256 KiB", ends.len()))
}

/// A batch that waits for a word copies what another process's stream wrote before it wrote the word.
pub fn fence(gpu: &Gpu) -> Outcome {
    let text = |error: kvbm_cuda::Error| error.to_string();
    let peer = Peer::start("late-writer")?;
    let page = Arc::new(SharedMemory::create("page", 4096).map_err(|error| error.to_string())?);
    let pool = Arc::new(VmmMemory::create(&gpu.context, 64 << 20).map_err(text)?);
    pool.fill(0, 0x11, pool.bytes()).map_err(text)?;
    let (bytes, host) = (pool.bytes(), host(&gpu.context, pool.bytes())?);
    let descriptor = pool.export().map_err(text)?;
    use std::os::fd::AsFd;
    peer.channel.send(&bytes.to_string(), &[descriptor.as_fd(), page.fd()])?;
    peer.channel.expect("ready")?;
    let engine = start(gpu)?;
    let (device, memory) = (CopyMemory::Device(pool), CopyMemory::Registered(host.clone()));
    let (batch, end) = blocks(Direction::Offload, (&device, &memory), bytes, &[(0, 0)]);
    let batch = batch.after(Fence { memory: page, offset: 64, value: 1, limit: Duration::from_secs(30) });
    submit(&engine, batch)?;
    if end.recv_timeout(Duration::from_millis(100)).is_ok() {
        return Err("the copy did not wait".into());
    }
    peer.channel.send("go", &[])?;
    done(&end)?;
    let mut wrong = 0;
    host.memory()
        .for_each_piece(0, bytes, |piece| wrong += piece.iter().filter(|byte| **byte != 0x22).count());
    peer.finish()?;
    if wrong > 0 { Err(format!("{wrong} bytes were copied too early")) } else { Ok("64 MiB in order".into()) }
}
