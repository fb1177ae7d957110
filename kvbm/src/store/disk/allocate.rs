//! Reserving the files' space, once, so that a full file system is found out now and not when a block is written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_shm::SharedMemory;
use rustix::fs::{FallocateFlags, fallocate, fstatvfs};
use rustix::io::{Errno, retry_on_intr};
use tracing::{info, warn};

use super::error::DiskError;
use super::exchange::{carry_out, first_failure};
use super::files::CacheFile;
use crate::store::disk_io::{Buffer, DiskIo, Io};

/// Reserved in one call to the kernel, so that stopping does not take long.
const RESERVED_BYTES: u64 = 1 << 30;
/// Zeros written by one I/O,
const ZEROS_BYTES: usize = 1 << 20;
/// and how many such I/Os are handed over at a time.
const ZEROS_AT_ONCE: usize = 32;
/// Between two lines about progress.
const PROGRESS: Duration = Duration::from_secs(5);

/// Cuts every file to at most this size.
pub fn cut(files: &[CacheFile], bytes: u64) -> Result<(), DiskError> {
    for file in files {
        if file.bytes()? > bytes {
            file.file.set_len(bytes).map_err(DiskError::io("shorten", &file.path))?;
        }
    }
    Ok(())
}

/// Reserves space from the end of each file up to this size. What is new reads as zeros.
pub fn reserve(
    files: &[CacheFile],
    bytes: u64,
    zerofill: bool,
    engine: &dyn DiskIo,
    stopping: &dyn Fn() -> bool,
) -> Result<(), DiskError> {
    for (number, file) in files.iter().enumerate() {
        let mut at = file.bytes()?;
        find_space(file, bytes.saturating_sub(at))?;
        while at < bytes {
            stop_if(stopping)?;
            let piece = RESERVED_BYTES.min(bytes - at);
            match retry_on_intr(|| fallocate(&file.file, FallocateFlags::empty(), at, piece)) {
                Ok(()) => at += piece,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) if zerofill => {
                    fill(number, file, at..bytes, engine, stopping)?;
                    at = bytes;
                }
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    let path = file.path.display();
                    warn!("{path}: its file system cannot reserve space: a full one will be noticed late");
                    file.file.set_len(bytes).map_err(DiskError::io("extend", &file.path))?;
                    at = bytes;
                }
                Err(errno) => return Err(DiskError::io("reserve space for", &file.path)(errno)),
            }
        }
    }
    Ok(())
}

/// Too little space is found out before all of it has been taken from everybody else.
fn find_space(file: &CacheFile, bytes: u64) -> Result<(), DiskError> {
    let system = fstatvfs(&file.file).map_err(DiskError::io("look for space for", &file.path))?;
    if bytes > system.f_bavail.saturating_mul(system.f_frsize) {
        return Err(DiskError::io("reserve space for", &file.path)(Errno::NOSPC));
    }
    Ok(())
}

/// Writes zeros to the end of a file whose file system has no other way to reserve space.
pub(super) fn fill(
    number: usize,
    file: &CacheFile,
    range: std::ops::Range<u64>,
    engine: &dyn DiskIo,
    stopping: &dyn Fn() -> bool,
) -> Result<(), DiskError> {
    let (path, total) = (file.path.display(), range.end - range.start);
    warn!("{path}: its file system cannot reserve space: {total} bytes of zeros are written instead");
    let zeros = Arc::new(SharedMemory::create("kvbm-disk-zeros", ZEROS_BYTES)?);
    let (mut at, mut told) = (range.start, Instant::now());
    while at < range.end {
        stop_if(stopping)?;
        let mut ios = Vec::with_capacity(ZEROS_AT_ONCE);
        while at < range.end && ios.len() < ZEROS_AT_ONCE {
            let len = (range.end - at).min(ZEROS_BYTES as u64) as usize;
            let buffer = Buffer { memory: Arc::clone(&zeros), offset: 0, len };
            ios.push(Io::Write { file: number, offset: at, buffer });
            at += len as u64;
        }
        first_failure(&carry_out(engine, ios))
            .map_err(|(_, failure)| DiskError::drive("write zeros to", &file.path)(failure))?;
        if told.elapsed() >= PROGRESS {
            told = Instant::now();
            info!("{path}: {} of {total} bytes of zeros written", at - range.start);
        }
    }
    Ok(())
}

/// Ends early when the daemon does.
pub fn stop_if(stopping: &dyn Fn() -> bool) -> Result<(), DiskError> {
    if stopping() { Err(DiskError::Stopped) } else { Ok(()) }
}
