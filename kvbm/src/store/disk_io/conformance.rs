//! What every engine must do, run on each of them. Reads of empty pipes stand for a drive that does not answer: they end
//! when the test says so, or never.

mod order;
mod results;
mod uring_only;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use kvbm_shm::SharedMemory;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::backlog::IoResult;
use super::pread::{self, PreadEngine};
use super::uring::UringEngine;
use super::{Buffer, DiskIo, Io, IoBatch, IoOptions};

/// An engine under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Uring,
    Pread,
}

impl Subject {
    /// Skips where the kernel, or a container around us, does not permit io_uring at all.
    fn is_there(self) -> bool {
        let Self::Uring = self else { return true };
        let Err(refused) = UringEngine::start(Arc::default(), IoOptions::default()) else { return true };
        let code = refused.source.raw_os_error();
        let not_permitted = [Errno::PERM, Errno::NOSYS].map(|errno| Some(errno.raw_os_error()));
        assert!(not_permitted.contains(&code), "{refused}");
        eprintln!("skipped: {refused}");
        false
    }

    fn start(self, files: Vec<File>, options: IoOptions) -> Arc<dyn DiskIo> {
        let files = Arc::new(files);
        match self {
            Self::Uring => Arc::new(UringEngine::start(files, options).unwrap()),
            Self::Pread => Arc::new(PreadEngine::start_with(files, options, carry_out).unwrap()),
        }
    }
}

/// As the engine does, but pipes, which have no positions, are read all the same.
fn carry_out(file: &File, io: &Io) -> io::Result<usize> {
    match io {
        Io::Read { buffer, .. } if file.metadata()?.file_type().is_fifo() => {
            let mut bytes = vec![0; buffer.len];
            let moved = (&mut &*file).read(&mut bytes)?;
            buffer.memory.write(buffer.offset, &bytes[..moved]);
            Ok(moved)
        }
        _ => pread::carry_out(file, io),
    }
}

/// A file whose reads end when the test wants.
struct Stall(io::PipeWriter);

impl Stall {
    const LEN: usize = 4096;

    fn new() -> (File, Self) {
        let (reader, writer) = io::pipe().unwrap();
        (File::from(OwnedFd::from(reader)), Self(writer))
    }

    /// Lets one read of `LEN` bytes end.
    fn release(&mut self) {
        self.0.write_all(&[7; Self::LEN]).unwrap();
    }
}

fn memory(bytes: usize) -> Arc<SharedMemory> {
    Arc::new(SharedMemory::create("test", bytes).unwrap())
}

fn read(file: usize, offset: u64, memory: &Arc<SharedMemory>, at: usize, len: usize) -> Io {
    Io::Read { file, offset, buffer: Buffer { memory: Arc::clone(memory), offset: at, len } }
}

fn write(file: usize, offset: u64, memory: &Arc<SharedMemory>, at: usize, len: usize) -> Io {
    Io::Write { file, offset, buffer: Buffer { memory: Arc::clone(memory), offset: at, len } }
}

/// Hands in a batch that is to be accepted; its results come out of the channel.
fn submit(engine: &Arc<dyn DiskIo>, ios: Vec<Io>) -> mpsc::Receiver<Vec<IoResult>> {
    let (tell, told) = mpsc::channel();
    // A test that is over does not listen.
    let finished = Box::new(move |results| drop(tell.send(results)));
    engine.submit(IoBatch { ios, finished }).unwrap();
    told
}

fn carry_out_all(engine: &Arc<dyn DiskIo>, ios: Vec<Io>) -> Vec<IoResult> {
    submit(engine, ios).recv().unwrap()
}

/// Returns when the engine says so of itself; nothing tells of that but looking.
fn until(engine: &Arc<dyn DiskIo>, reached: impl Fn(super::IoLoad) -> bool) {
    while !reached(engine.load()) {
        std::thread::yield_now();
    }
}

/// The engine's file past the page cache if possible, and the same file for the test.
fn open(direct: bool) -> (File, File) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let flags = if direct { OFlags::DIRECT.bits() as i32 } else { 0 };
    let again = File::options().read(true).write(true).custom_flags(flags).open(file.path());
    let again = again.unwrap_or_else(|error| {
        assert_eq!(error.raw_os_error(), Some(Errno::INVAL.raw_os_error()));
        eprintln!("no O_DIRECT in the directory for temporary files: tested without");
        file.reopen().unwrap()
    });
    (again, file.into_file())
}

/// Never overdue in a test.
fn patient() -> IoOptions {
    IoOptions { deadline: Duration::from_secs(3600), ..IoOptions::default() }
}

/// Makes a test of each function for each engine.
macro_rules! for_each_engine {
    ($($name:ident),* $(,)?) => {
        mod uring {
            $(#[test] fn $name() {
                let subject = super::super::Subject::Uring;
                if subject.is_there() { super::$name(subject) }
            })*
        }
        mod pread {
            $(#[test] fn $name() { super::$name(super::super::Subject::Pread) })*
        }
    };
}
use for_each_engine;
