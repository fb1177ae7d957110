//! Words of a shared page that streams of two processes write and wait for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_cuda::{DeviceMemory, DeviceRange, RegisteredMemory, Stream, StreamWord, VmmMemory};
use kvbm_shm::SharedMemory;

use crate::patterns::host;
use crate::peer::{Channel, Peer};
use crate::{Gpu, Outcome};

const ROUNDS: u32 = 200;

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}

fn page(gpu: &Gpu, memory: SharedMemory) -> Result<Arc<RegisteredMemory>, String> {
    Ok(Arc::new(RegisteredMemory::new(&gpu.context, Arc::new(memory)).map_err(text)?))
}

/// Answers each ping with a pong, all issued at once.
pub fn play_ponger(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    let (_, mut fds) = channel.receive()?;
    let page = page(gpu, SharedMemory::from_fd(fds.remove(0)).map_err(|error| error.to_string())?)?;
    let (ping, pong) = (StreamWord::new(&page, 0).map_err(text)?, StreamWord::new(&page, 64).map_err(text)?);
    let stream = Stream::new(&gpu.context).map_err(text)?;
    for round in 1..=ROUNDS {
        stream.wait_word(&ping, round).map_err(text)?;
        stream.write_word(&pong, round).map_err(text)?;
    }
    channel.send("ready", &[])?;
    stream.synchronize().map_err(text)?;
    channel.wait_closed();
    Ok(())
}

pub fn ping_pong(gpu: &Gpu) -> Outcome {
    let page = host(&gpu.context, 4096)?;
    let (ping, pong) = (StreamWord::new(&page, 0).map_err(text)?, StreamWord::new(&page, 64).map_err(text)?);
    let peer = Peer::start("ponger")?;
    peer.channel.send("page", &[page.memory().fd()])?;
    peer.channel.expect("ready")?;
    let stream = Stream::new(&gpu.context).map_err(text)?;
    let started = Instant::now();
    for round in 1..=ROUNDS {
        stream.write_word(&ping, round).map_err(text)?;
        stream.wait_word(&pong, round).map_err(text)?;
    }
    stream.synchronize().map_err(text)?;
    let took = started.elapsed();
    if (ping.load(), pong.load()) != (ROUNDS, ROUNDS) {
        return Err(format!("ping {}, pong {}", ping.load(), pong.load()));
    }
    Ok(format!("{:.1} us per round", took.as_secs_f64() * 1e6 / f64::from(ROUNDS)))
}

/// A stream that waits for a word which nobody writes goes on when the host writes it; others are not held up meanwhile.
pub fn released(gpu: &Gpu) -> Outcome {
    let page = host(&gpu.context, 4096)?;
    let words = [0, 64].map(|offset| StreamWord::new(&page, offset));
    let [first, second] = words;
    let (first, second) = (first.map_err(text)?, second.map_err(text)?);
    let streams = (0..3).map(|_| Stream::new(&gpu.context)).collect::<Result<Vec<_>, _>>().map_err(text)?;
    let memory = DeviceMemory::allocate(&gpu.context, 16 << 20).map_err(text)?;
    let free = host(&gpu.context, 16 << 20)?;
    streams[0].wait_word(&first, 7).map_err(text)?;
    streams[1].wait_word(&second, 7).map_err(text)?;
    let started = Instant::now();
    // SAFETY: both are mapped until the stream was waited for.
    unsafe { streams[2].copy(free.device_address(0), memory.address(), 16 << 20) }.map_err(text)?;
    streams[2].synchronize().map_err(text)?;
    let beside = started.elapsed();
    if streams[0].is_idle().map_err(text)? || streams[1].is_idle().map_err(text)? {
        return Err("a stream did not wait".into());
    }
    let started = Instant::now();
    first.store(7);
    second.store(8);
    for stream in &streams[..2] {
        while !stream.is_idle().map_err(text)? {
            if started.elapsed() > Duration::from_secs(20) {
                return Err("a stream was not released".into());
            }
        }
    }
    let released = started.elapsed();
    Ok(format!(
        "16 MiB beside two waiting streams {:.2} ms, released after {:.0} us",
        beside.as_secs_f64() * 1e3,
        released.as_secs_f64() * 1e6
    ))
}

/// Fills the pool that it is given when told to, and then writes a word, in the order of its stream.
pub fn play_late_writer(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    use std::os::fd::AsFd;
    let (bytes, mut fds) = channel.receive()?;
    let bytes: usize = String::from_utf8_lossy(&bytes)
        .parse()
        .map_err(|error: std::num::ParseIntError| error.to_string())?;
    let pool = VmmMemory::import(&gpu.context, fds[0].as_fd(), bytes).map_err(text)?;
    let page = page(gpu, SharedMemory::from_fd(fds.remove(1)).map_err(|error| error.to_string())?)?;
    let word = StreamWord::new(&page, 64).map_err(text)?;
    let stream = Stream::new(&gpu.context).map_err(text)?;
    channel.send("ready", &[])?;
    channel.expect("go")?;
    for byte in [0x44, 0x55, 0x22] {
        // SAFETY: mapped until the stream was waited for.
        unsafe { stream.fill(pool.address(), byte, bytes) }.map_err(text)?;
    }
    stream.write_word(&word, 1).map_err(text)?;
    stream.synchronize().map_err(text)?;
    channel.expect("end").map(|_| ())
}
