//! The engine for kernels without io_uring: a few threads, each with one I/O at a time.
//!
//! Nothing is cancelled here: a thread whose drive does not answer is stuck, and counted as overdue, until it does.
//! Batches that end without a thread (given up, or empty) are told by one thread of their own, so that stuck ones do not
//! matter.

use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvbm_shm::SharedMemory;
use parking_lot::{Condvar, Mutex};

use super::backlog::{Backlog, IoResult};
use super::engine::{check, is_transient};
use super::{DiskIo, Io, IoBatch, IoFailure, IoLoad, IoOptions, StartError};

const THREADS_MAX: usize = 8;
/// Between two attempts at an I/O that the kernel did not want now.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// Asks the kernel to carry out an I/O. Returns the bytes moved.
pub(super) type CarryOut = fn(&File, &Io) -> io::Result<usize>;

/// See the header.
pub(super) struct PreadEngine {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

struct Shared {
    backlog: Mutex<Backlog>,
    /// There may be something to start, or all is over.
    work: Condvar,
    /// Something ended without a thread, or all is over.
    ended: Condvar,
    files: Arc<Vec<File>>,
    deadline: Duration,
    carry_out: CarryOut,
}

impl PreadEngine {
    /// Starts the threads.
    pub fn start(files: Arc<Vec<File>>, options: IoOptions) -> Result<Self, StartError> {
        Self::start_with(files, options, carry_out)
    }

    /// The same, with another way to ask the kernel.
    pub fn start_with(
        files: Arc<Vec<File>>,
        options: IoOptions,
        carry_out: CarryOut,
    ) -> Result<Self, StartError> {
        let depth = options.depth.clamp(1, THREADS_MAX);
        let shared = Arc::new(Shared {
            backlog: Mutex::new(Backlog::new(depth, &options)),
            work: Condvar::new(),
            ended: Condvar::new(),
            files,
            deadline: options.deadline,
            carry_out,
        });
        // If a thread cannot be started, dropping this ends those that were.
        let engine = Self { shared, threads: Mutex::default() };
        for number in 0..=depth {
            let shared = Arc::clone(&engine.shared);
            let name = format!("kvbm-disk-{number}");
            let body = move || if number < depth { shared.carry_out_all() } else { shared.tell_all() };
            let thread = thread::Builder::new().name(name).spawn(body);
            engine.threads.lock().push(thread.map_err(StartError::at("start a thread for disk i/o"))?);
        }
        Ok(engine)
    }
}

impl DiskIo for PreadEngine {
    fn name(&self) -> &'static str {
        "pread"
    }

    fn submit(&self, batch: IoBatch) -> Result<(), IoBatch> {
        check(&batch, self.shared.files.len());
        let (several, empty) = (batch.ios.len() > 1, batch.ios.is_empty());
        self.shared.backlog.lock().accept(batch)?;
        if empty {
            self.shared.ended.notify_one();
        } else if several {
            self.shared.work.notify_all();
        } else {
            self.shared.work.notify_one();
        }
        Ok(())
    }

    fn register(&self, _memory: &Arc<SharedMemory>) {}

    fn abandon_waiting(&self) {
        self.shared.backlog.lock().abandon_waiting();
        self.shared.ended.notify_one();
    }

    fn load(&self) -> IoLoad {
        self.shared.backlog.lock().load(Instant::now(), self.shared.deadline)
    }

    fn close(&self) {
        self.shared.close();
        let mut threads = self.threads.lock();
        for thread in threads.drain(..) {
            // A panic has been printed, and there is nothing left to be done about it.
            let _ = thread.join();
        }
    }
}

impl Drop for PreadEngine {
    fn drop(&mut self) {
        // The threads end by themselves, with what was accepted; a hung drive must not hang whoever lets go of it.
        self.shared.close();
    }
}

impl fmt::Debug for PreadEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreadEngine").field("load", &self.load()).finish_non_exhaustive()
    }
}

impl Shared {
    fn close(&self) {
        self.backlog.lock().close();
        self.work.notify_all();
        self.ended.notify_all();
    }

    /// A thread of the engine.
    fn carry_out_all(&self) {
        let mut backlog = self.backlog.lock();
        while !backlog.is_over() {
            let Some(started) = backlog.start(Instant::now()) else {
                self.work.wait(&mut backlog);
                continue;
            };
            drop(backlog);
            let result = self.attempt(&started.io);
            backlog = self.backlog.lock();
            let ended = backlog.end(started.slot, result);
            // Room for bytes, or a sync whose writes have ended.
            if backlog.can_start() {
                self.work.notify_one();
            }
            if backlog.is_over() {
                self.work.notify_all();
                self.ended.notify_all();
            }
            if let Some(ended) = ended {
                drop(backlog);
                drop(started);
                ended.call();
                backlog = self.backlog.lock();
            }
        }
    }

    /// The thread that tells of batches that ended without the kernel.
    fn tell_all(&self) {
        let mut backlog = self.backlog.lock();
        while !backlog.is_over() {
            let ended = backlog.take_ended();
            if ended.is_empty() {
                self.ended.wait(&mut backlog);
                continue;
            }
            if backlog.is_over() {
                self.work.notify_all();
            }
            drop(backlog);
            for batch in ended {
                batch.call();
            }
            backlog = self.backlog.lock();
        }
    }

    fn attempt(&self, io: &Io) -> IoResult {
        let started = Instant::now();
        loop {
            match (self.carry_out)(&self.files[io.file()], io) {
                Ok(moved) if moved == io.bytes() => return Ok(()),
                Ok(moved) => return Err(IoFailure::Short { moved, wanted: io.bytes() }),
                Err(error) => {
                    let code = error.raw_os_error().expect("the kernel's errors have a number");
                    if !is_transient(code) {
                        return Err(IoFailure::Os(code));
                    }
                    if started.elapsed() > self.deadline {
                        return Err(IoFailure::TimedOut);
                    }
                    thread::sleep(RETRY_AFTER);
                }
            }
        }
    }
}

/// One call to the kernel.
pub(super) fn carry_out(file: &File, io: &Io) -> io::Result<usize> {
    match io {
        Io::Read { offset, buffer, .. } => {
            buffer.memory.read_from_file(buffer.offset, buffer.len, file, *offset)
        }
        Io::Write { offset, buffer, .. } => {
            buffer.memory.write_to_file(buffer.offset, buffer.len, file, *offset)
        }
        Io::Sync { .. } => file.sync_data().map(|()| 0),
    }
}
