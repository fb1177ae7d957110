//! Memory of a GPU, and of the host, in two processes, one of which may die at any moment.

use std::os::fd::AsFd;
use std::sync::Arc;

use kvbm_cuda::copy_engine::{CopyMemory, Direction};
use kvbm_cuda::{DeviceMemory, DeviceRange, IpcHandle, IpcMemory, RegisteredMemory, Stream, VmmMemory};
use kvbm_shm::SharedMemory;

use crate::engine::{blocks, done, start, submit};
use crate::patterns::{block, check, check_device, fill_device, host, scatter};
use crate::peer::{Channel, Peer};
use crate::{Gpu, Outcome};

pub const BLOCK: usize = 256 << 10;
pub const BLOCKS: usize = 1024;

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}

/// Creates a pool, fills it with pattern 1, hands it over; then checks that it holds pattern 2.
pub fn play_vmm_owner(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    let pool = VmmMemory::create(&gpu.context, BLOCKS * BLOCK).map_err(text)?;
    fill_device(&pool, 1, BLOCK)?;
    let descriptor = pool.export().map_err(text)?;
    channel.send(&pool.bytes().to_string(), &[descriptor.as_fd()])?;
    own(&pool, channel)
}

/// The same by a legacy handle.
pub fn play_ipc_owner(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    let pool = DeviceMemory::allocate(&gpu.context, BLOCKS * BLOCK).map_err(text)?;
    fill_device(&pool, 1, BLOCK)?;
    channel.send_bytes(&pool.ipc_handle().map_err(text)?.0)?;
    own(&pool, channel)
}

fn own(pool: &dyn DeviceRange, channel: &Channel) -> Result<(), String> {
    loop {
        match String::from_utf8_lossy(&channel.receive()?.0).as_ref() {
            "check" => channel.send(&check_device(pool, 2, BLOCK).err().unwrap_or("right".into()), &[])?,
            _ => return Ok(()),
        }
    }
}

fn import(gpu: &Gpu, peer: &Peer) -> Result<Arc<dyn DeviceRange>, String> {
    let (bytes, fds) = peer.channel.receive()?;
    let bytes: usize = String::from_utf8_lossy(&bytes)
        .parse()
        .map_err(|error: std::num::ParseIntError| error.to_string())?;
    let wrong = VmmMemory::import(&gpu.context, fds[0].as_fd(), bytes * 2);
    if wrong.is_ok() {
        return Err("a pool of twice the size was mapped".into());
    }
    let pool = VmmMemory::import(&gpu.context, fds[0].as_fd(), bytes).map_err(text)?;
    Ok(Arc::new(pool))
}

pub fn open(gpu: &Gpu, peer: &Peer) -> Result<Arc<dyn DeviceRange>, String> {
    let (bytes, _) = peer.channel.receive()?;
    let handle = IpcHandle(bytes.try_into().map_err(|_| "a handle has 64 bytes")?);
    if IpcMemory::open(&gpu.context, handle, BLOCKS * BLOCK * 16).is_ok() {
        return Err("a pool was opened as larger than it is".into());
    }
    Ok(Arc::new(IpcMemory::open(&gpu.context, handle, BLOCKS * BLOCK).map_err(text)?))
}

pub fn vmm(gpu: &Gpu) -> Outcome {
    let peer = Peer::start("vmm-owner")?;
    let pool = import(gpu, &peer)?;
    out_and_back(gpu, peer, pool)
}

pub fn ipc(gpu: &Gpu) -> Outcome {
    let peer = Peer::start("ipc-owner")?;
    let pool = open(gpu, &peer)?;
    out_and_back(gpu, peer, pool)
}

/// Reads all blocks out of the other's pool, and writes others into it, which the owner checks.
fn out_and_back(gpu: &Gpu, peer: Peer, pool: Arc<dyn DeviceRange>) -> Outcome {
    let engine = start(gpu)?;
    let host = host(&gpu.context, BLOCKS * BLOCK)?;
    let (device, memory) = (CopyMemory::Device(pool), CopyMemory::Registered(host.clone()));
    let pairs: Vec<_> = scatter(BLOCKS, 3).into_iter().zip(scatter(BLOCKS, 5)).collect();
    let (batch, end) = blocks(Direction::Offload, (&device, &memory), BLOCK, &pairs);
    submit(&engine, batch)?;
    let (bytes, took) = done(&end)?;
    let mut seen = vec![0; BLOCK];
    for (from, to) in &pairs {
        host.memory().read(to * BLOCK, &mut seen);
        check(1, *from, &seen)?;
        host.memory().write(to * BLOCK, &block(2, *from, BLOCK));
    }
    let back: Vec<_> = pairs.iter().map(|(from, to)| (*to, *from)).collect();
    let (batch, end) = blocks(Direction::Onboard, (&memory, &device), BLOCK, &back);
    submit(&engine, batch)?;
    let (_, back_took) = done(&end)?;
    peer.channel.send("check", &[])?;
    peer.channel.expect("right")?;
    drop(engine);
    drop(device);
    peer.finish()?;
    let rate = |took: std::time::Duration| bytes as f64 / took.as_secs_f64() / 1e9;
    Ok(format!("{BLOCKS} blocks of 256 KiB, {:.1} GB/s out, {:.1} GB/s in", rate(took), rate(back_took)))
}

pub fn vmm_owner_killed(gpu: &Gpu) -> Outcome {
    let peer = Peer::start("vmm-owner")?;
    let pool = import(gpu, &peer)?;
    kill_while_copying(gpu, peer, pool)
}

pub fn ipc_owner_killed(gpu: &Gpu) -> Outcome {
    let peer = Peer::start("ipc-owner")?;
    let pool = open(gpu, &peer)?;
    kill_while_copying(gpu, peer, pool)
}

/// The owner dies while its pool is copied out again and again. Every copy ends well, every byte is right, and afterwards
/// the memory is still there until it is closed.
fn kill_while_copying(gpu: &Gpu, mut peer: Peer, pool: Arc<dyn DeviceRange>) -> Outcome {
    const ROUNDS: usize = 80;
    let engine = start(gpu)?;
    let host = host(&gpu.context, BLOCKS * BLOCK)?;
    let (device, memory) = (CopyMemory::Device(pool.clone()), CopyMemory::Registered(host.clone()));
    let pairs: Vec<_> = scatter(BLOCKS, 3).into_iter().zip(scatter(BLOCKS, 5)).collect();
    let mut ends = Vec::new();
    for _ in 0..ROUNDS {
        let (batch, end) = blocks(Direction::Offload, (&device, &memory), BLOCK, &pairs);
        submit(&engine, batch)?;
        ends.push(end);
    }
    done(&ends[ROUNDS / 8])?;
    peer.kill();
    let after_death = ends.iter().filter(|end| end.try_recv().is_err()).count();
    for end in &ends {
        // Those that were received above are disconnected by now.
        match end.recv_timeout(std::time::Duration::from_secs(60)) {
            Ok(kvbm_cuda::copy_engine::CopyEnd::Failed(failure)) => return Err(failure.to_string()),
            Ok(_) | Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {}
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => return Err("a batch did not end".into()),
        }
    }
    if after_death == 0 {
        return Err("the owner died too late to show anything".into());
    }
    let mut seen = vec![0; BLOCK];
    for (from, to) in &pairs {
        host.memory().read(to * BLOCK, &mut seen);
        check(1, *from, &seen)?;
    }
    check_device(&*pool, 1, BLOCK)?;
    pool.fill(0, 0x33, pool.bytes()).map_err(text)?;
    Ok(format!("{after_death} of {ROUNDS} batches of 256 MiB ended after its death, all bytes right"))
}

/// Onboards into the pool that it is given, without end.
pub fn play_writer(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    let (bytes, fds) = channel.receive()?;
    let bytes: usize = String::from_utf8_lossy(&bytes)
        .parse()
        .map_err(|error: std::num::ParseIntError| error.to_string())?;
    let pool: Arc<dyn DeviceRange> =
        Arc::new(VmmMemory::import(&gpu.context, fds[0].as_fd(), bytes).map_err(text)?);
    let host = host(&gpu.context, bytes)?;
    let engine = start(gpu)?;
    let (device, memory) = (CopyMemory::Device(pool), CopyMemory::Registered(host.clone()));
    let pairs: Vec<_> = scatter(bytes / BLOCK, 3).into_iter().zip(scatter(bytes / BLOCK, 5)).collect();
    for round in 0u8.. {
        // Each round writes other bytes, so that a late one would show.
        host.memory().write(0, &vec![round | 1; 1 << 20]);
        let ends: Vec<_> = (0..8)
            .map(|_| {
                let (batch, end) = blocks(Direction::Onboard, (&memory, &device), BLOCK, &pairs);
                submit(&engine, batch).map(|()| end)
            })
            .collect::<Result<_, _>>()?;
        if round == 0 {
            channel.send("writing", &[])?;
        }
        ends.iter().try_for_each(|end| done(end).map(|_| ()))?;
    }
    Ok(())
}

/// A process is killed with copies into our memory under way. Once it is reaped, nothing changes there any more.
pub fn writer_killed(gpu: &Gpu) -> Outcome {
    let pool = VmmMemory::create(&gpu.context, BLOCKS * BLOCK).map_err(text)?;
    let descriptor = pool.export().map_err(text)?;
    let mut peer = Peer::start("writer")?;
    peer.channel.send(&pool.bytes().to_string(), &[descriptor.as_fd()])?;
    peer.channel.expect("writing")?;
    let started = std::time::Instant::now();
    peer.kill();
    let reaped = started.elapsed();
    let marker = 0x5A;
    pool.fill(0, marker, pool.bytes()).map_err(text)?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut seen = vec![0; pool.bytes()];
    pool.read(0, &mut seen).map_err(text)?;
    match seen.iter().position(|byte| *byte != marker) {
        None => Ok(format!("reaped after {:.0} ms", reaped.as_secs_f64() * 1e3)),
        Some(at) => Err(format!("byte {at} changed after its death")),
    }
}

/// Registers host memory that it is given, and copies a pattern into it.
pub fn play_registrar(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    let (_, mut fds) = channel.receive()?;
    let memory = SharedMemory::from_fd(fds.remove(0)).map_err(|error| error.to_string())?;
    let bytes = memory.bytes();
    let registered = RegisteredMemory::new(&gpu.context, Arc::new(memory)).map_err(text)?;
    let pool = DeviceMemory::allocate(&gpu.context, bytes).map_err(text)?;
    fill_device(&pool, 4, BLOCK)?;
    let stream = Stream::new(&gpu.context).map_err(text)?;
    for number in 0..bytes / BLOCK {
        let (from, to) = (pool.address().plus(number * BLOCK), registered.device_address(number * BLOCK));
        // SAFETY: both are mapped until the stream was waited for.
        unsafe { stream.copy(to, from, BLOCK) }.map_err(text)?;
    }
    stream.synchronize().map_err(text)?;
    channel.send("copied", &[])?;
    channel.wait_closed();
    Ok(())
}

/// Both have the same memory registered; what one GPU process wrote there the other copies to the GPU. Then one dies.
pub fn registered_twice(gpu: &Gpu) -> Outcome {
    let bytes = 64 * BLOCK;
    let host = host(&gpu.context, bytes)?;
    let pool = DeviceMemory::allocate(&gpu.context, bytes).map_err(text)?;
    let stream = Stream::new(&gpu.context).map_err(text)?;
    let mut peer = Peer::start("registrar")?;
    peer.channel.send("memory", &[host.memory().fd()])?;
    peer.channel.expect("copied")?;
    for alive in [true, false] {
        if !alive {
            peer.kill();
        }
        pool.fill(0, 0, bytes).map_err(text)?;
        for number in 0..bytes / BLOCK {
            let (from, to) = (host.device_address(number * BLOCK), pool.address().plus(number * BLOCK));
            // SAFETY: both are mapped until the stream was waited for.
            unsafe { stream.copy(to, from, BLOCK) }.map_err(text)?;
        }
        stream.synchronize().map_err(text)?;
        check_device(&pool, 4, BLOCK)?;
    }
    Ok("also after one of them was killed".into())
}
