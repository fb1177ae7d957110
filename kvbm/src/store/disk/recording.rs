//! Drives for tests: one in memory that remembers what was asked of it and in what order, so that the bytes after a power
//! cut at any moment can be made from it; one over real files; one that carries out everything in a random order.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use kvbm_shm::SharedMemory;
use parking_lot::{Condvar, Mutex};

use super::exchange::IoResult;
use crate::store::disk_io::{Buffer, DiskIo, Io, IoBatch, IoFailure, IoLoad};

pub const SECTOR: usize = 512;
const PAGE: usize = 4096;

/// Small, seeded, good enough.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x1234_5678_9ABC_DEF1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        (1..items.len()).for_each(|at| items.swap(at, self.below(at + 1)));
    }
}

/// A file's bytes: pages that are not there are zeros.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Image(BTreeMap<u64, Vec<u8>>);

impl Image {
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (at, part) in bytes.chunks(SECTOR).enumerate() {
            let at = offset + (at * SECTOR) as u64;
            let page = self.0.entry(at / PAGE as u64).or_insert_with(|| vec![0; PAGE]);
            let within = (at % PAGE as u64) as usize;
            page[within..within + part.len()].copy_from_slice(part);
        }
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let zeros = vec![0; PAGE];
        let pages = (0..len.div_ceil(PAGE) as u64).map(|page| offset / PAGE as u64 + page);
        let mut bytes: Vec<u8> =
            pages.flat_map(|page| self.0.get(&page).unwrap_or(&zeros).iter().copied()).collect();
        bytes.truncate(len);
        bytes
    }
}

/// What a drive was asked, in the order in which it ended.
#[derive(Debug, Clone)]
pub enum Event {
    Write { file: usize, offset: u64, bytes: Vec<u8> },
    Sync { file: usize },
}

#[derive(Debug)]
struct Drive {
    images: Vec<Image>,
    log: Vec<Event>,
    registered: Vec<Arc<SharedMemory>>,
    abandoned: bool,
    closed: bool,
    /// One write in so many fails half done.
    faults: Option<(usize, Random)>,
}

/// Carries out everything at once, in memory. The real files only have the size.
#[derive(Debug)]
pub struct Recording {
    files: Vec<File>,
    drive: Mutex<Drive>,
    /// I/Os that a batch may have.
    batch_max: usize,
}

impl Recording {
    pub fn new(files: Vec<File>, images: Vec<Image>) -> Self {
        Self::with_batches_of(files, images, usize::MAX)
    }

    pub fn with_batches_of(files: Vec<File>, mut images: Vec<Image>, batch_max: usize) -> Self {
        images.resize(files.len(), Image::default());
        let drive = Drive {
            images,
            log: Vec::new(),
            registered: Vec::new(),
            abandoned: false,
            closed: false,
            faults: None,
        };
        Self { files, drive: Mutex::new(drive), batch_max }
    }

    pub fn fail_one_in(&self, n: usize, seed: u64) {
        self.drive.lock().faults = Some((n, Random::new(seed)));
    }

    pub fn work_again(&self) {
        self.drive.lock().faults = None;
    }

    /// Events so far.
    pub fn events(&self) -> usize {
        self.drive.lock().log.len()
    }

    pub fn log(&self) -> Vec<Event> {
        self.drive.lock().log.clone()
    }

    pub fn is_registered(&self, memory: &Arc<SharedMemory>) -> bool {
        self.drive.lock().registered.iter().any(|other| Arc::ptr_eq(other, memory))
    }

    /// As everybody but a power cut sees them.
    pub fn live(&self) -> Vec<Image> {
        self.drive.lock().images.clone()
    }

    fn carry_out(&self, io: &Io) -> IoResult {
        let mut drive = self.drive.lock();
        match io {
            Io::Read { file, offset, buffer } => {
                let there = self.files[*file].metadata().expect("stat").len();
                if offset + buffer.len as u64 > there {
                    return Err(IoFailure::Short { moved: 0, wanted: buffer.len });
                }
                let bytes = drive.images[*file].read(*offset, buffer.len);
                buffer.memory.write(buffer.offset, &bytes);
                Ok(())
            }
            Io::Write { file, offset, buffer } => {
                let end = offset + buffer.len as u64;
                if self.files[*file].metadata().expect("stat").len() < end {
                    self.files[*file].set_len(end).expect("extend");
                }
                let bytes = bytes_of(buffer);
                let mut fails = None;
                if let Some((n, random)) = &mut drive.faults
                    && random.one_in(*n)
                {
                    fails = Some(random.clone());
                }
                for (at, part) in bytes.chunks(if fails.is_some() { SECTOR } else { usize::MAX }).enumerate()
                {
                    if fails.as_mut().is_none_or(|random| random.one_in(2)) {
                        let offset = offset + (at * SECTOR) as u64;
                        drive.images[*file].write(offset, part);
                        drive.log.push(Event::Write { file: *file, offset, bytes: part.to_vec() });
                    }
                }
                if fails.is_some() { Err(IoFailure::Os(5)) } else { Ok(()) }
            }
            Io::Sync { file } => {
                drive.log.push(Event::Sync { file: *file });
                Ok(())
            }
        }
    }
}

fn bytes_of(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len];
    buffer.memory.read(buffer.offset, &mut bytes);
    bytes
}

impl DiskIo for Recording {
    fn name(&self) -> &'static str {
        "recording"
    }

    fn submit(&self, batch: IoBatch) -> Result<(), IoBatch> {
        if self.drive.lock().closed || batch.ios.len() > self.batch_max {
            return Err(batch);
        }
        let results = batch.ios.iter().map(|io| self.carry_out(io)).collect();
        (batch.finished)(results);
        Ok(())
    }

    fn register(&self, memory: &Arc<SharedMemory>) {
        self.drive.lock().registered.push(Arc::clone(memory));
    }

    fn abandon_waiting(&self) {
        self.drive.lock().abandoned = true;
    }

    fn load(&self) -> IoLoad {
        IoLoad { overdue: usize::from(self.drive.lock().abandoned), ..IoLoad::default() }
    }

    fn close(&self) {
        self.drive.lock().closed = true;
    }
}

/// What the death of the daemon leaves: everything that a drive was told.
pub fn image_of_all(base: &[Image], log: &[Event]) -> Vec<Image> {
    let mut images = base.to_vec();
    for event in log {
        match event {
            Event::Write { file, offset, bytes } => images[*file].write(*offset, bytes),
            Event::Sync { .. } => {}
        }
    }
    images
}

/// What a power cut after so many events may leave: everything that was synced, and any of what was written later, in any
/// order, each write torn between sectors or pages.
pub fn image_after(base: &[Image], log: &[Event], random: &mut Random) -> Vec<Image> {
    let mut images = base.to_vec();
    for (number, image) in images.iter_mut().enumerate() {
        let synced = log.iter().rposition(|event| matches!(event, Event::Sync { file } if *file == number));
        let synced = synced.map_or(0, |at| at + 1);
        let writes = |events: &[Event]| -> Vec<(u64, Vec<u8>)> {
            let of_file = |event: &Event| match event {
                Event::Write { file, offset, bytes } if *file == number => Some((*offset, bytes.clone())),
                Event::Write { .. } | Event::Sync { .. } => None,
            };
            events.iter().filter_map(of_file).collect()
        };
        for (offset, bytes) in writes(&log[..synced]) {
            image.write(offset, &bytes);
        }
        let mut later = writes(&log[synced..]);
        let arrived = random.below(5);
        if random.one_in(2) {
            random.shuffle(&mut later);
        }
        for (offset, bytes) in later {
            // From nothing at all to everything.
            if random.below(4) >= arrived {
                continue;
            }
            let piece = [usize::MAX, PAGE, SECTOR][random.below(3)];
            for (at, part) in bytes.chunks(piece).enumerate() {
                if piece == usize::MAX || random.one_in(2) {
                    image.write(offset + (at * piece.min(bytes.len())) as u64, part);
                }
            }
        }
    }
    images
}

/// Real files, one I/O after the other.
#[derive(Debug)]
pub struct FileIo(pub Vec<File>);

impl FileIo {
    fn carry_out(&self, io: &Io) -> IoResult {
        let failed = |error: std::io::Error| match error.raw_os_error() {
            Some(code) => IoFailure::Os(code),
            None => IoFailure::Short { moved: 0, wanted: 1 },
        };
        let aligned = |len: usize| {
            let bytes = vec![0_u8; len + PAGE];
            let at = bytes.as_ptr().align_offset(PAGE);
            (bytes, at..at + len)
        };
        match io {
            Io::Read { file, offset, buffer } => {
                let (mut bytes, range) = aligned(buffer.len);
                self.0[*file].read_exact_at(&mut bytes[range.clone()], *offset).map_err(failed)?;
                buffer.memory.write(buffer.offset, &bytes[range]);
            }
            Io::Write { file, offset, buffer } => {
                let (mut bytes, range) = aligned(buffer.len);
                buffer.memory.read(buffer.offset, &mut bytes[range.clone()]);
                self.0[*file].write_all_at(&bytes[range], *offset).map_err(failed)?;
            }
            Io::Sync { file } => self.0[*file].sync_data().map_err(failed)?,
        }
        Ok(())
    }
}

impl DiskIo for FileIo {
    fn name(&self) -> &'static str {
        "fileio"
    }

    fn submit(&self, batch: IoBatch) -> Result<(), IoBatch> {
        let results = batch.ios.iter().map(|io| self.carry_out(io)).collect();
        (batch.finished)(results);
        Ok(())
    }

    fn register(&self, _memory: &Arc<SharedMemory>) {}

    fn abandon_waiting(&self) {}

    fn load(&self) -> IoLoad {
        IoLoad::default()
    }

    fn close(&self) {}
}

/// Several threads carry out whatever waits, in a random order, on top of a recording. Panics if bytes are written by two
/// I/Os at a time.
#[derive(Debug)]
pub struct Shuffling {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    recording: Arc<Recording>,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug)]
struct Queue {
    waiting: Vec<IoBatch>,
    writing: Vec<(usize, std::ops::Range<u64>)>,
    random: Random,
    closed: bool,
}

impl Shuffling {
    pub fn new(recording: Arc<Recording>, seed: u64) -> Self {
        let queue =
            Queue { waiting: Vec::new(), writing: Vec::new(), random: Random::new(seed), closed: false };
        let shared = Arc::new(Shared { recording, queue: Mutex::new(queue), changed: Condvar::new() });
        let start = |_| {
            let shared = Arc::clone(&shared);
            thread::spawn(move || while shared.carry_out_one() {})
        };
        let threads = (0..3).map(start).collect();
        Self { shared, threads: Mutex::new(threads) }
    }
}

impl Shared {
    fn carry_out_one(&self) -> bool {
        let mut queue = self.queue.lock();
        while queue.waiting.is_empty() {
            if queue.closed {
                return false;
            }
            self.changed.wait(&mut queue);
        }
        let waiting = queue.waiting.len();
        let chosen = queue.random.below(waiting);
        let IoBatch { ios, finished } = queue.waiting.swap_remove(chosen);
        let written = |io: &Io| match io {
            Io::Write { file, offset, buffer } => Some((*file, *offset..offset + buffer.len as u64)),
            Io::Read { .. } | Io::Sync { .. } => None,
        };
        let ranges: Vec<_> = ios.iter().filter_map(written).collect();
        for (file, range) in &ranges {
            let overlaps = |(other, theirs): &(usize, std::ops::Range<u64>)| {
                other == file && theirs.start < range.end && range.start < theirs.end
            };
            assert!(!queue.writing.iter().any(overlaps), "file {file} {range:?} is written twice at a time");
        }
        queue.writing.extend(ranges.iter().cloned());
        let pause = queue.random.below(4);
        drop(queue);
        (0..pause).for_each(|_| thread::yield_now());
        let results = ios.iter().map(|io| self.recording.carry_out(io)).collect();
        let mut queue = self.queue.lock();
        queue.writing.retain(|range| !ranges.contains(range));
        drop(queue);
        finished(results);
        true
    }
}

impl DiskIo for Shuffling {
    fn name(&self) -> &'static str {
        "shuffling"
    }

    fn submit(&self, batch: IoBatch) -> Result<(), IoBatch> {
        let mut queue = self.shared.queue.lock();
        if queue.closed {
            return Err(batch);
        }
        queue.waiting.push(batch);
        self.shared.changed.notify_one();
        Ok(())
    }

    fn register(&self, _memory: &Arc<SharedMemory>) {}

    fn abandon_waiting(&self) {}

    fn load(&self) -> IoLoad {
        IoLoad::default()
    }

    fn close(&self) {
        self.shared.queue.lock().closed = true;
        self.shared.changed.notify_all();
        self.threads.lock().drain(..).for_each(|thread| thread.join().expect("no overlapping writes"));
    }
}
