//! The engine under test, kept busy: as many I/Os wait in it as are under way, so that its own queue is part of what is
//! measured. Handed in by its own thread: fio has only one as well.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use kvbm::disk_io::{Buffer, DiskIo, Io, IoBatch, IoFailure, IoOptions, start};
use kvbm_shm::SharedMemory;
use rustix::time::{ClockId, clock_gettime};

use super::scratch::Scratch;
use super::{Direction, Figure, Task};

/// Batches that the engine has at any time.
const BATCHES: usize = 8;
const MEMORIES: usize = 4;
/// The largest I/O.
pub(super) const IO_BYTES_MAX: usize = 4 << 20;

/// See the header.
pub(super) struct Engine {
    io: Arc<dyn DiskIo>,
    memories: Vec<Arc<SharedMemory>>,
    file_bytes: u64,
    depth: usize,
}

impl Engine {
    pub fn start(scratch: &Scratch, depth: usize) -> Result<Self, String> {
        let bytes = depth.div_ceil(MEMORIES) * IO_BYTES_MAX;
        let file = scratch.file().try_clone().map_err(|error| error.to_string())?;
        let options = IoOptions { depth, bytes_in_flight_max: depth * IO_BYTES_MAX, ..IoOptions::default() };
        let io = start(vec![file], options).map_err(|error| error.to_string())?;
        let mut memories = Vec::new();
        for _ in 0..MEMORIES {
            let memory = bench_memory(bytes)?;
            io.register(&memory);
            memories.push(memory);
        }
        Ok(Self { io, memories, file_bytes: scratch.bytes(), depth })
    }

    pub fn name(&self) -> &'static str {
        self.io.name()
    }

    pub fn file_bytes(&self) -> u64 {
        self.file_bytes
    }

    pub fn registration(&self) -> &'static str {
        if self.io.memories_registered() == MEMORIES { "registered buffers" } else { "UNREGISTERED buffers" }
    }

    pub fn run(&self, task: Task) -> Result<Figure, String> {
        let (tell, told) = mpsc::channel();
        let run = Arc::new(Run {
            io: Arc::clone(&self.io),
            memories: self.memories.clone(),
            file_bytes: self.file_bytes,
            depth: self.depth,
            task,
            started: Instant::now(),
            progress: Mutex::new(Progress { handed_in: 0, bytes: 0, batches_left: BATCHES }),
            tell,
        });
        let cpu_before = process_cpu_seconds();
        for _ in 0..BATCHES {
            run.hand_in()?;
        }
        told.recv().map_err(|_| "the engine forgot a batch")??;
        let seconds = run.started.elapsed().as_secs_f64();
        let cpu_seconds = process_cpu_seconds() - cpu_before;
        Ok(Figure { bytes: run.progress().bytes, seconds, cpu_seconds })
    }
}

/// One run: whoever is told that a batch is finished hands in the next one.
struct Run {
    io: Arc<dyn DiskIo>,
    memories: Vec<Arc<SharedMemory>>,
    file_bytes: u64,
    depth: usize,
    task: Task,
    started: Instant,
    progress: Mutex<Progress>,
    /// Once, when all has ended or something failed.
    tell: mpsc::Sender<Result<(), String>>,
}

struct Progress {
    handed_in: u64,
    bytes: u64,
    batches_left: usize,
}

impl Run {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hand_in(self: &Arc<Self>) -> Result<(), String> {
        let mut progress = self.progress();
        let first = progress.handed_in;
        let ios: Vec<Io> = (0..self.batch_ios()).map(|i| self.io(first + i)).collect();
        progress.handed_in += ios.len() as u64;
        drop(progress);
        let run = Arc::clone(self);
        let finished = Box::new(move |results: Vec<_>| run.ended(results));
        let accepted = self.io.submit(IoBatch { ios, finished });
        accepted.map_err(|_| "the engine has no room for what the benchmark wants".to_owned())
    }

    fn ended(self: &Arc<Self>, results: Vec<Result<(), IoFailure>>) {
        let failed = results.iter().find_map(|result| result.err());
        let mut progress = self.progress();
        progress.bytes += (results.len() * self.task.io_bytes) as u64;
        let go_on = self.started.elapsed() < self.task.time && failed.is_none();
        progress.batches_left -= usize::from(!go_on);
        let over = progress.batches_left == 0;
        drop(progress);
        let failed = match failed {
            Some(failure) => Err(failure.to_string()),
            None if go_on => self.hand_in(),
            None => Ok(()),
        };
        if over || failed.is_err() {
            // After a failure nobody listens to the rest.
            let _ = self.tell.send(failed);
        }
    }

    /// Half of the batches wait in the engine, the others are under way.
    fn batch_ios(&self) -> u64 {
        (self.depth * 2).div_ceil(BATCHES) as u64
    }

    /// The I/O at this place of the sequence. It shares its bytes with one that is very probably over, so that no more
    /// memory is used than there are I/Os under way; nobody looks at what is in it.
    fn io(&self, sequence: u64) -> Io {
        let (offset, len) = (sequence * self.task.io_bytes as u64 % self.file_bytes, self.task.io_bytes);
        let place = sequence as usize % self.depth;
        let memory = Arc::clone(&self.memories[place % MEMORIES]);
        let buffer = Buffer { memory, offset: place / MEMORIES * len, len };
        match self.task.direction {
            Direction::Write => Io::Write { file: 0, offset, buffer },
            Direction::Read => Io::Read { file: 0, offset, buffer },
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.io.close();
    }
}

/// Memory in large pages if possible, full of noise.
pub(super) fn bench_memory(bytes: usize) -> Result<Arc<SharedMemory>, String> {
    let memory = SharedMemory::create("kvbm-bench", bytes).map_err(|error| error.to_string())?;
    memory.gather(0..bytes);
    fill_with_noise(&memory, 0);
    Ok(Arc::new(memory))
}

/// Bytes that no drive can compress.
pub(super) fn fill_with_noise(memory: &SharedMemory, from: usize) {
    let mut random = 0x2545_F491_4F6C_DD1D_u64;
    let mut page = [0; 4096];
    for offset in (from..memory.bytes()).step_by(page.len()) {
        for word in page.as_chunks_mut::<8>().0 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *word = random.to_le_bytes();
        }
        memory.write(offset, &page);
    }
}

pub(super) fn process_cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
