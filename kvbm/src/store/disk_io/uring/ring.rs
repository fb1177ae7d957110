//! The ring itself, and what the kernel was told about files and memory.
//!
//! Invariant that all unsafe code here rests on: from the moment an entry is pushed until its completion was taken, `ios`
//! keeps the I/O, and with it the memory; files, eventfd and the word that its reads go to live as long as the ring. A
//! ring that goes while I/Os are under way ends the process.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, opcode};
use kvbm_shm::SharedMemory;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use super::table::BufferTable;
use crate::store::disk_io::{IO_BYTES_MAX, Io, StartError};

/// Completions of what is not an I/O of a slot.
const WAKE: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;
/// Kernels have no more room for registered buffers.
const BUFFERS_MAX: u32 = 1 << 14;

/// Ends the owner's sleep in the kernel.
#[derive(Debug)]
pub(super) struct Waker(OwnedFd);

impl Waker {
    pub fn new() -> io::Result<Self> {
        // Blocking: of one that is not, the ring would say "try again" instead of waiting.
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC)?))
    }

    pub fn wake(&self) {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&self.0, &1u64.to_ne_bytes()));
        written.expect("an eventfd takes 2^64 - 2 before it is full");
    }
}

/// The kernel is done with the I/O of a slot.
pub(super) struct Completed {
    pub slot: usize,
    pub io: Io,
    /// Bytes, or a negated error number.
    pub result: i32,
}

/// See the header.
pub(super) struct Ring {
    ring: IoUring,
    /// By slot: what is with the kernel.
    ios: Vec<Option<Io>>,
    files: Arc<Vec<File>>,
    files_registered: bool,
    buffers: BufferTable,
    /// A memory could not be registered, and it was said.
    told: bool,
    waker: Arc<Waker>,
    waker_value: Box<AtomicU64>,
    waker_armed: bool,
}

impl Ring {
    /// Must be called on the thread that uses it.
    pub fn new(
        depth: usize,
        files: Arc<Vec<File>>,
        waker: Arc<Waker>,
        memories_max: u32,
    ) -> Result<Self, StartError> {
        // Besides the I/Os there is a read of the eventfd and at most a cancellation of each. The queue of completions is
        // twice as long, so it never overflows.
        let entries = u32::try_from(depth + 1).unwrap_or(u32::MAX);
        let ring = set_up(entries).map_err(StartError::at("set up io_uring"))?;
        let descriptors: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let registered = ring.submitter().register_files(&descriptors);
        if let Err(refused) = &registered {
            tracing::warn!(%refused, "io_uring: files are not registered, disk i/o costs a little more");
        }
        let mut buffers_len = memories_max.min(BUFFERS_MAX);
        let mut told = false;
        if buffers_len > 0
            && let Err(refused) = ring.submitter().register_buffers_sparse(buffers_len)
        {
            tracing::warn!(%refused, "io_uring: memory is not registered, disk i/o costs more CPU time");
            (buffers_len, told) = (0, true);
        }
        Ok(Self {
            ring,
            ios: (0..depth).map(|_| None).collect(),
            files,
            files_registered: registered.is_ok(),
            buffers: BufferTable::new(buffers_len as u16),
            told,
            waker,
            waker_value: Box::default(),
            waker_armed: false,
        })
    }

    pub fn depth(&self) -> usize {
        self.ios.len()
    }

    /// Pins a memory, so that its I/Os need not. Without that they are as correct.
    pub fn register(&mut self, memory: &Arc<SharedMemory>) {
        if self.buffers.find(memory).is_some() {
            return;
        }
        for number in self.buffers.orphans() {
            if self.set_buffer(number, std::ptr::null_mut(), 0).is_ok() {
                self.buffers.remove(number);
            }
        }
        let refused = match self.buffers.free_number() {
            None => io::Error::other("there is no room for more"),
            Some(number) => match self.set_buffer(number, memory.address().as_ptr(), memory.bytes()) {
                Ok(()) => return self.buffers.insert(number, memory),
                Err(refused) => refused,
            },
        };
        if !self.told {
            self.told = true;
            tracing::warn!(
                %refused, bytes = memory.bytes(),
                "io_uring: some memory is not registered (locked memory may be limited), its disk i/o costs more CPU time"
            );
        }
    }

    pub fn registered_count(&self) -> usize {
        self.buffers.count()
    }

    fn set_buffer(&self, number: u16, base: *mut u8, len: usize) -> io::Result<()> {
        let buffer = [libc::iovec { iov_base: base.cast(), iov_len: len }];
        // SAFETY: the range is a whole mapping that the table keeps from now on, or nothing.
        unsafe { self.ring.submitter().register_buffers_update(u32::from(number), &buffer, None) }
    }

    /// Hands an I/O to the kernel with the next submission.
    pub fn start(&mut self, slot: usize, io: Io) {
        let entry = self.entry(&io).user_data(slot as u64);
        assert!(self.ios[slot].is_none(), "a slot holds one i/o");
        self.ios[slot] = Some(io);
        self.push(&entry);
    }

    fn entry(&self, io: &Io) -> Entry {
        let file = io.file();
        let (fd, flags) = if self.files_registered {
            (Fd(file as RawFd), Flags::FIXED_FILE)
        } else {
            (Fd(self.files[file].as_raw_fd()), Flags::empty())
        };
        let Some(buffer) = io.buffer() else {
            return opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build().flags(flags);
        };
        let end = buffer.offset.checked_add(buffer.len);
        assert!(
            buffer.len <= IO_BYTES_MAX && end.is_some_and(|end| end <= buffer.memory.bytes()),
            "an i/o stays in its memory"
        );
        // The kernel's lengths have 32 bits, which is enough for what was just checked.
        let len = buffer.len as u32;
        // SAFETY: in bounds of the mapping, as just checked.
        let address = unsafe { buffer.memory.address().as_ptr().add(buffer.offset) };
        let entry = match (io, self.buffers.find(&buffer.memory)) {
            (Io::Read { offset, .. }, Some(number)) => {
                opcode::ReadFixed::new(fd, address, len, number).offset(*offset).build()
            }
            (Io::Read { offset, .. }, None) => opcode::Read::new(fd, address, len).offset(*offset).build(),
            (Io::Write { offset, .. }, Some(number)) => {
                opcode::WriteFixed::new(fd, address, len, number).offset(*offset).build()
            }
            (Io::Write { offset, .. }, None) => opcode::Write::new(fd, address, len).offset(*offset).build(),
            (Io::Sync { .. }, _) => unreachable!("a sync has no buffer"),
        };
        entry.flags(flags)
    }

    /// Asks the kernel to give up what is in this slot. That completes in any case, now or later.
    pub fn cancel(&mut self, slot: usize) {
        self.push(&opcode::AsyncCancel::new(slot as u64).build().user_data(CANCEL));
    }

    fn push(&mut self, entry: &Entry) {
        loop {
            // SAFETY: what the entry names lives until its completion; see the header.
            let pushed = unsafe { self.ring.submission().push(entry) };
            if pushed.is_ok() {
                return;
            }
            self.submit();
        }
    }

    /// Hands over all that was pushed.
    pub fn submit(&mut self) {
        let entered = self.ring.submit();
        tolerate(entered);
    }

    /// The same, and sleeps until something completes, somebody wakes, or the time is over.
    pub fn submit_and_wait(&mut self, patience: Option<Duration>) {
        if !self.waker_armed {
            self.waker_armed = true;
            let to = self.waker_value.as_ptr().cast();
            let read = opcode::Read::new(Fd(self.waker.0.as_raw_fd()), to, 8).build();
            self.push(&read.user_data(WAKE));
        }
        let entered = match patience {
            None => self.ring.submit_and_wait(1),
            Some(patience) => {
                let until = Timespec::from(patience);
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&until))
            }
        };
        tolerate(entered);
    }

    /// The next I/O that the kernel is done with.
    pub fn completed(&mut self) -> Option<Completed> {
        loop {
            let completion = self.ring.completion().next()?;
            match completion.user_data() {
                // Whatever came of the read: there is a turn, and the next one is pushed.
                WAKE => self.waker_armed = false,
                // Found, not found or too late: the I/O itself completes, and says which.
                CANCEL => {}
                slot => {
                    let slot = slot as usize;
                    let io = self.ios[slot].take().expect("only what was pushed completes");
                    return Some(Completed { slot, io, result: completion.result() });
                }
            }
        }
    }

    /// No I/O is under way, and none will be: ends the read of the eventfd, whose target goes with the ring.
    pub fn stop(&mut self) {
        while self.waker_armed {
            self.waker.wake();
            self.submit_and_wait(None);
            let left = self.completed();
            assert!(left.is_none(), "a ring is stopped when nothing is under way");
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let busy = self.ios.iter().flatten().count();
        if busy > 0 || self.waker_armed {
            // Only a bug comes here. The kernel may still write to memory that would now be unmapped and used again.
            tracing::error!(busy, "io_uring: the owner of the ring died with i/o under way");
            std::process::abort();
        }
    }
}

/// What the kernel may answer to being entered without anything being wrong.
fn tolerate(entered: io::Result<usize>) {
    let Err(error) = entered else { return };
    match Errno::from_io_error(&error) {
        // The time is over, or a signal came.
        Some(Errno::TIME | Errno::INTR) => {}
        // No memory for a request: what was pushed stays, and is handed over next time.
        Some(Errno::AGAIN | Errno::BUSY | Errno::NOMEM) => std::thread::sleep(Duration::from_millis(1)),
        _ => panic!("enter io_uring: {error}"),
    }
}

/// The best that this kernel has: completions are worked off by the owner when it sleeps, without interrupts.
fn set_up(entries: u32) -> io::Result<IoUring> {
    let settings: [fn(&mut Builder); 3] = [
        |builder| {
            builder.setup_submit_all().setup_coop_taskrun().setup_single_issuer().setup_defer_taskrun();
        },
        |builder| {
            builder.setup_submit_all().setup_coop_taskrun();
        },
        |_| {},
    ];
    let mut refused = Errno::INVAL.into();
    for set in settings {
        let mut builder = IoUring::builder();
        set(&mut builder);
        match builder.dontfork().build(entries) {
            Ok(ring) => {
                let has = ring.params();
                if has.is_feature_ext_arg() && has.is_feature_nodrop() && has.is_feature_fast_poll() {
                    return Ok(ring);
                }
                return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel is older than 5.11"));
            }
            Err(error) => refused = error,
        }
        if refused.raw_os_error() != Some(Errno::INVAL.raw_os_error()) {
            break;
        }
    }
    Err(refused)
}
