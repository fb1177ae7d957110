//! What copies in the background do to an engine that decodes in another process, paced and unpaced.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use kvbm_cuda::copy_engine::{
    CopyBatch, CopyEnd, CopyEngine, CopyEngineConfig, CopyFailure, CopyMemory, Direction, LaneId, PassKind,
    StepWords, Urgency,
};
use kvbm_cuda::{Blas, DeviceMemory, DeviceRange, Gemm, Graph, Matrix, Stream, VmmMemory};
use kvbm_shm::SharedMemory;

use crate::patterns::{host, scatter};
use crate::peer::{Channel, Peer};
use crate::{Gpu, Outcome};

/// One layer's weights, bfloat16.
const WIDTH: usize = 8192;
/// Layers: 8 GiB of weights, which a step reads once, as decoding does.
const LAYERS: usize = 64;
/// Sequences that are decoded together.
const BATCH: usize = 32;
/// Behind the words: what each step took, nanoseconds.
const STEPS_AT: usize = 4096;
const STEPS_MAX: usize = 1 << 17;

const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 1024;
/// More than the share that is aimed at: a few seconds of steps vary by themselves.
const SLOWDOWN_MAX: f64 = 0.05;

fn text(error: kvbm_cuda::Error) -> String {
    error.to_string()
}

/// Decodes without end, and tells how long each step takes.
pub fn play_decoder(gpu: &Gpu, channel: &Channel) -> Result<(), String> {
    let (_, mut fds) = channel.receive()?;
    let page = Arc::new(SharedMemory::from_fd(fds.remove(0)).map_err(|error| error.to_string())?);
    let words = StepWords::new(page.clone(), 0);
    let layer_bytes = WIDTH * WIDTH * 2;
    let weights = DeviceMemory::allocate(&gpu.context, LAYERS * layer_bytes).map_err(text)?;
    weights.fill(0, 0, weights.bytes()).map_err(text)?;
    let hidden = DeviceMemory::allocate(&gpu.context, 2 * BATCH * WIDTH * 2).map_err(text)?;
    hidden.fill(0, 0, hidden.bytes()).map_err(text)?;
    let stream = Stream::new(&gpu.context).map_err(text)?;
    let mut blas = Blas::new(&gpu.driver, Arc::new(stream)).map_err(text)?;
    let layer = |blas: &mut Blas, index: usize| {
        let (from, to) = (index % 2, (index + 1) % 2);
        let gemm = Gemm {
            m: WIDTH,
            n: BATCH,
            k: WIDTH,
            a: Matrix::transposed(weights.address().plus(index * layer_bytes), WIDTH),
            b: Matrix::plain(hidden.address().plus(from * BATCH * WIDTH * 2), WIDTH),
            c: Matrix::plain(hidden.address().plus(to * BATCH * WIDTH * 2), WIDTH),
            alpha: 1.0,
            beta: 0.0,
            c_is_f32: false,
        };
        // SAFETY: weights and hidden states are mapped until the end of this function, which waits for each step.
        unsafe { blas.gemm(&gemm) }
    };
    // Once outside the graph: cuBLAS loads its kernels.
    layer(&mut blas, 0).map_err(text)?;
    let stream = blas.stream().clone();
    stream.synchronize().map_err(text)?;
    let issue = || (0..LAYERS).try_for_each(|index| layer(&mut blas, index));
    let mut graph = Graph::record(&stream, issue).map_err(text)?;
    let mut decodes = 0;
    loop {
        words.begin();
        let started = Instant::now();
        // SAFETY: as above.
        unsafe { graph.launch(&stream) }.map_err(text)?;
        stream.synchronize().map_err(text)?;
        let took = started.elapsed();
        page.word64(STEPS_AT + decodes % STEPS_MAX * 8)
            .store(took.as_nanos() as u64, std::sync::atomic::Ordering::Relaxed);
        decodes += 1;
        words.end(PassKind::Decode, took);
        if decodes == 100 {
            channel.send("decoding", &[])?;
        }
    }
}

/// A decoder beside, and what it tells.
struct Decoder {
    page: Arc<SharedMemory>,
    words: StepWords,
}

impl Decoder {
    fn decodes(&self) -> Result<u64, String> {
        self.words.read().map(|sample| sample.decodes).ok_or_else(|| "the decoder tells nothing".into())
    }

    /// Median and 99th percentile of the steps since so many, milliseconds.
    fn steps_since(&self, first: u64) -> Result<(f64, f64), String> {
        let word = |index: u64| self.page.word64(STEPS_AT + index as usize % STEPS_MAX * 8);
        let mut steps: Vec<u64> = (first..self.decodes()?)
            .map(|index| word(index).load(std::sync::atomic::Ordering::Relaxed))
            .collect();
        steps.sort_unstable();
        if steps.len() < 100 {
            return Err(format!("only {} steps", steps.len()));
        }
        let ms = |index: usize| steps[index] as f64 / 1e6;
        Ok((ms(steps.len() / 2), ms(steps.len() * 99 / 100)))
    }
}

/// Offloads that never end.
struct Feeder {
    engine: CopyEngine,
    device: CopyMemory,
    memory: CopyMemory,
    pairs: Vec<(usize, usize)>,
    ends: (std::sync::mpsc::Sender<CopyEnd>, Receiver<CopyEnd>),
}

impl Feeder {
    fn feed(&self) {
        while self.engine.has_room(Direction::Offload) {
            let sender = self.ends.0.clone();
            let mut batch = CopyBatch::new(Direction::Offload, LaneId(1), Urgency::Background, move |end| {
                let _ = sender.send(end);
            });
            for (from, to) in &self.pairs {
                batch.copy((&self.device, from * BLOCK), (&self.memory, to * BLOCK), BLOCK);
            }
            let _ = self.engine.submit(batch);
        }
    }

    /// For so long, with copies or without. Returns bytes per second that ended meanwhile.
    fn run(&self, time: Duration, copies: bool) -> Result<f64, String> {
        let (started, before) = (Instant::now(), self.engine.figures().bytes[1]);
        while started.elapsed() < time {
            if copies {
                self.feed();
            }
            match self.ends.1.recv_timeout(Duration::from_millis(20)) {
                // When the lane is closed, what waits there ends like this.
                Ok(CopyEnd::Failed(CopyFailure::Cancelled)) if !copies => {}
                Ok(CopyEnd::Failed(failure)) => return Err(failure.to_string()),
                Ok(CopyEnd::Done { .. }) | Err(_) => {}
            }
        }
        Ok((self.engine.figures().bytes[1] - before) as f64 / started.elapsed().as_secs_f64())
    }
}

pub fn paced(gpu: &Gpu) -> Outcome {
    let page = SharedMemory::create("steps", STEPS_AT + STEPS_MAX * 8).map_err(|error| error.to_string())?;
    let page = Arc::new(page);
    let decoder = Decoder { page: page.clone(), words: StepWords::new(page, 0) };
    let peer = Peer::start("decoder")?;
    peer.channel.send("page", &[decoder.page.fd()])?;
    peer.channel.expect("decoding")?;
    let pool = VmmMemory::create(&gpu.context, BLOCKS * BLOCK).map_err(text)?;
    let config = CopyEngineConfig { queue: 2, ..CopyEngineConfig::default() };
    let feeder = Feeder {
        engine: CopyEngine::start(&gpu.driver, &gpu.context, config).map_err(text)?,
        device: CopyMemory::Device(Arc::new(pool)),
        memory: CopyMemory::Registered(host(&gpu.context, BLOCKS * BLOCK)?),
        pairs: scatter(128, 3).into_iter().zip(scatter(128, 5)).collect(),
        ends: channel(),
    };
    feeder.engine.pace_by(LaneId(1), &decoder.words);
    let seconds = Duration::from_secs;
    let phase = |time: Duration, copies: bool| -> Result<((f64, f64), f64), String> {
        let first = decoder.decodes()?;
        let rate = feeder.run(time, copies)?;
        Ok((decoder.steps_since(first)?, rate))
    };
    phase(seconds(1), false)?;
    let (alone, _) = phase(seconds(2), false)?;
    phase(seconds(8), true)?;
    let (paced, paced_rate) = phase(seconds(5), true)?;
    feeder.engine.set_full_rate(true);
    phase(seconds(1), true)?;
    let (full, full_rate) = phase(seconds(2), true)?;
    feeder.engine.set_full_rate(false);
    feeder.engine.close_lane(LaneId(1));
    phase(seconds(1), false)?;
    let (again, _) = phase(seconds(2), false)?;
    let more = |steps: (f64, f64)| ((steps.0 / alone.0 - 1.0) * 100.0, (steps.1 / alone.1 - 1.0) * 100.0);
    let told = format!(
        "step alone p50 {:.3} ms p99 {:.3} ms; alone again {:+.1} % {:+.1} %; paced {:+.1} % {:+.1} % at {:.1} GB/s; at full \
         rate {:+.1} % {:+.1} % at {:.1} GB/s",
        alone.0,
        alone.1,
        more(again).0,
        more(again).1,
        more(paced).0,
        more(paced).1,
        paced_rate / 1e9,
        more(full).0,
        more(full).1,
        full_rate / 1e9
    );
    if paced.0 / alone.0 - 1.0 > SLOWDOWN_MAX || paced_rate == 0.0 {
        return Err(told);
    }
    Ok(told)
}
