//! What a drive gives when nothing stands between it and a ring: the figure that the engine is measured against where
//! there is no fio.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};
use kvbm_shm::SharedMemory;
use rustix::time::{ClockId, clock_gettime};

/// One size of I/O, one after the other through a file and from its start again, always `depth` of them under way.
#[derive(Debug)]
pub struct PlainLoop<'a> {
    /// Opened with O_DIRECT.
    pub file: &'a File,
    /// Multiple of `io_bytes`.
    pub file_bytes: u64,
    /// At least `depth` times `io_bytes`, and at most 1 GiB.
    pub memory: &'a Arc<SharedMemory>,
    /// Multiple of 4096.
    pub io_bytes: u32,
    /// At least 1.
    pub depth: u32,
    /// Else it reads.
    pub writes: bool,
}

/// What it gave.
#[derive(Debug, Clone, Copy)]
pub struct PlainFigures {
    /// Moved.
    pub bytes: u64,
    /// From the first submission to the last completion.
    pub seconds: f64,
    /// Used by the thread.
    pub cpu_seconds: f64,
}

impl PlainLoop<'_> {
    /// Runs for about `time`.
    pub fn run(&self, time: Duration) -> io::Result<PlainFigures> {
        let ios_in_memory = self.memory.bytes() as u64 / u64::from(self.io_bytes);
        assert!(ios_in_memory >= u64::from(self.depth), "each i/o under way has its own bytes");
        let mut ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(self.depth)?;
        ring.submitter().register_files(&[self.file.as_raw_fd()])?;
        let base = self.memory.address().as_ptr();
        let whole = [libc::iovec { iov_base: base.cast(), iov_len: self.memory.bytes() }];
        // SAFETY: a whole mapping, borrowed until this returns, which is after the last completion.
        unsafe { ring.submitter().register_buffers(&whole) }?;

        let (started, cpu_before) = (Instant::now(), cpu_seconds());
        let (mut bytes, mut offset, mut under_way) = (0, 0, 0);
        for slot in 0..self.depth {
            self.push(&mut ring, slot, &mut offset);
            under_way += 1;
        }
        let mut failure = None;
        while under_way > 0 {
            match ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => panic!("enter io_uring: {error}"),
                _ => {}
            }
            let go_on = started.elapsed() < time;
            loop {
                let Some(completion) = ring.completion().next() else { break };
                under_way -= 1;
                if completion.result() != self.io_bytes as i32 {
                    failure = Some(completion.result());
                    continue;
                }
                bytes += u64::from(self.io_bytes);
                if go_on && failure.is_none() {
                    self.push(&mut ring, completion.user_data() as u32, &mut offset);
                    under_way += 1;
                }
            }
        }
        let (seconds, cpu_seconds) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu_before);
        match failure {
            None => Ok(PlainFigures { bytes, seconds, cpu_seconds }),
            Some(moved @ 0..) => Err(io::Error::other(format!("only {moved} bytes were moved"))),
            Some(code) => Err(io::Error::from_raw_os_error(-code)),
        }
    }

    fn push(&self, ring: &mut IoUring, slot: u32, offset: &mut u64) {
        let (file, len) = (Fixed(0), self.io_bytes);
        // SAFETY: there is room for `depth` I/Os in the memory, as checked at the start.
        let address = unsafe { self.memory.address().as_ptr().add(slot as usize * len as usize) };
        let entry = if self.writes {
            opcode::WriteFixed::new(file, address, len, 0).offset(*offset).build()
        } else {
            opcode::ReadFixed::new(file, address, len, 0).offset(*offset).build()
        };
        *offset = (*offset + u64::from(len)) % self.file_bytes;
        // SAFETY: the memory is borrowed for the whole run, which does not end before the last completion; an error of
        // the kernel in between is a panic, and then the pages stay pinned by the kernel's own references.
        let pushed = unsafe { ring.submission().push(&entry.user_data(u64::from(slot))) };
        pushed.expect("the queue has room for `depth`");
    }
}

fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}
