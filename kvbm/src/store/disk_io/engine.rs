//! Which engine, and how much of it.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

use super::pread::PreadEngine;
use super::uring::UringEngine;
use super::{DiskIo, IoBatch};

/// Larger I/Os are refused: the kernel moves at most 2 GiB at once, and io_uring registers at most 1 GiB in one piece.
pub const IO_BYTES_MAX: usize = 1 << 30;

/// How an engine works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoOptions {
    /// I/Os with the kernel at most; at least 1. Fast drives want 32 and more. The engine `pread` has a thread for each
    /// and no more than 8.
    pub depth: usize,
    /// Bytes with the kernel at most. An I/O of more is carried out alone.
    pub bytes_in_flight_max: usize,
    /// After this long with the kernel an I/O counts as overdue.
    pub deadline: Duration,
    /// What is done about it.
    pub overdue: Overdue,
    /// Writes and syncs that may wait for the kernel. A longer batch is accepted when none waits.
    pub waiting_writes_max: usize,
    /// Reads that may wait for the kernel. A longer batch is accepted when none waits.
    pub waiting_reads_max: usize,
    /// Memories that may be registered with the kernel (io_uring only, 16384 at most). More are used unregistered.
    pub memories_registered_max: u32,
    /// Which engine.
    pub kind: IoKind,
}

impl Default for IoOptions {
    fn default() -> Self {
        Self {
            depth: 64,
            bytes_in_flight_max: 128 << 20,
            deadline: Duration::from_secs(5),
            overdue: Overdue::Cancel,
            waiting_writes_max: 16384,
            waiting_reads_max: 16384,
            memories_registered_max: 4096,
            kind: IoKind::Auto,
        }
    }
}

/// What is done about an I/O that is overdue. Whatever it is, its batch does not end before the kernel is done with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overdue {
    /// The kernel is asked once to give it up. It seldom can once the drive has it; `pread` cannot ask.
    #[default]
    Cancel,
    /// Nothing.
    Wait,
}

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IoKind {
    /// `Uring`, and `Pread` where the kernel does not permit it.
    #[default]
    Auto,
    /// One thread with a ring shared with the kernel.
    Uring,
    /// A few threads that each carry out one I/O after the other.
    Pread,
}

/// Why there is no engine.
#[derive(Debug, Error)]
#[error("{op}: {source}")]
pub struct StartError {
    /// What was tried.
    pub op: &'static str,
    /// The kernel's answer.
    #[source]
    pub source: io::Error,
}

impl StartError {
    pub(super) fn at(op: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { op, source }
    }
}

/// Starts an engine for these files. It ends with [`DiskIo::close`]; one that is dropped unclosed ends by itself when
/// everything accepted has ended.
pub fn start(files: Vec<File>, options: IoOptions) -> Result<Arc<dyn DiskIo>, StartError> {
    let files = Arc::new(files);
    match options.kind {
        IoKind::Uring => Ok(Arc::new(UringEngine::start(files, options)?)),
        IoKind::Pread => Ok(Arc::new(PreadEngine::start(files, options)?)),
        IoKind::Auto => match UringEngine::start(Arc::clone(&files), options) {
            Ok(engine) => Ok(Arc::new(engine)),
            Err(refused) => {
                tracing::warn!(%refused, "no io_uring: disk i/o goes through a few threads, which is slower");
                Ok(Arc::new(PreadEngine::start(files, options)?))
            }
        },
    }
}

/// Panics if an I/O names what is not there: the kernel would be sent to memory that is not ours.
pub(super) fn check(batch: &IoBatch, files_count: usize) {
    for io in &batch.ios {
        assert!(io.file() < files_count, "file {} of {files_count} is not there", io.file());
        let Some(buffer) = io.buffer() else { continue };
        // Positions are signed for the kernel, and io_uring takes -1 for "wherever the file is now".
        assert!(i64::try_from(io.offset()).is_ok(), "no file has a byte {}", io.offset());
        let end = buffer.offset.checked_add(buffer.len);
        assert!(
            buffer.len <= IO_BYTES_MAX && end.is_some_and(|end| end <= buffer.memory.bytes()),
            "[{}, +{}) is too much or lies outside {} shared bytes",
            buffer.offset,
            buffer.len,
            buffer.memory.bytes()
        );
    }
}

/// True if the kernel wants to be asked again.
pub(super) fn is_transient(error: i32) -> bool {
    [Errno::AGAIN, Errno::INTR].map(Errno::raw_os_error).contains(&error)
}
