//! The disk tier's part of the manager: it moves blocks between host memory and disk, watches the drive and looks after
//! what lies on it.
//!
//! ```text
//!              open, recover                  error, stall, file gone
//!   Opening ──────────────────► On ──────────────────────────────────► Out
//!      ▲                        ▲                                       │
//!      │                        └──── answers again ────────────────────┤
//!      └───────────────────────────── its files are gone ───────────────┘
//! ```
//!
//! While the tier is not on, nothing is found on it and nothing is written to it; everything else goes on as before.
//!
//! Lock order: an [`InOrder`], then the ledger, then anything else.

mod care;
mod flow;
mod keeper;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::Shared;
use crate::error::Error;
use crate::ledger::{BatchLimit, DiskRules};
use crate::store::disk::{DiskConfig, DiskError, DiskStore};
use crate::store::disk_io::{self, DiskIo, IoLoad, IoOptions};
use crate::transfer::{BoundedQueue, InOrder};
use flow::{DemoteEnd, DemoteJob, PromoteEnd, PromoteJob};

/// Batches that may wait to be written: what is not planned yet can still be planned better.
const DEMOTES_WAITING: usize = 8;
/// Threads that write: each batch waits for pages of tables before its bytes and behind them, which the drive writes behind
/// what it was given before, and batches whose pages are the same wait together. Others have the drive busy meanwhile.
/// All of their batches find room among the writes that may wait in the engine: what does not counts as a fault of the drive.
const DEMOTE_THREADS: usize = 48;
/// Threads that read: some check what has arrived while the drive is busy for others.
const PROMOTE_THREADS: usize = 16;
/// How long the kernel may take to unlock the files of a daemon that was killed.
const UNLOCKED_WITHIN: Duration = Duration::from_secs(5);
/// How long they may take to end.
const GOODBYE: Duration = Duration::from_secs(5);

/// How much disk the cache gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskCapacity {
    /// So many bytes.
    Bytes(u64),
    /// So many blocks of the first layout that attaches.
    Blocks(u32),
}

impl DiskCapacity {
    /// True if there is to be none.
    pub fn is_zero(self) -> bool {
        matches!(self, Self::Bytes(0) | Self::Blocks(0))
    }
}

/// Settings of the disk tier.
#[derive(Debug, Clone)]
pub struct DiskTierConfig {
    /// One file in each; blocks are striped over them.
    pub directories: Vec<PathBuf>,
    /// All files together.
    pub capacity: DiskCapacity,
    /// Past the page cache, where the file system can.
    pub direct: bool,
    /// Write zeros where space cannot be reserved otherwise.
    pub zerofill: bool,
    /// Discard what is there.
    pub reset: bool,
    /// What is written, and when.
    pub rules: DiskRules,
    /// How I/O is done.
    pub io: IoOptions,
    /// Bytes that are read per second to find damage before anybody asks for it; 0: none.
    pub scrub_bytes_per_second: u64,
    /// Blocks in a batch, and its bytes.
    pub batch: BatchLimit,
}

impl DiskTierConfig {
    /// Defaults for a capacity in directories.
    pub fn new(directories: Vec<PathBuf>, capacity: DiskCapacity) -> Self {
        Self {
            directories,
            capacity,
            direct: true,
            zerofill: false,
            reset: false,
            rules: DiskRules::default(),
            io: IoOptions::default(),
            scrub_bytes_per_second: 16 << 20,
            batch: BatchLimit { blocks: 256, bytes: 16 << 20 },
        }
    }
}

/// Whether the tier serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskState {
    /// It is not to be.
    Off,
    /// Its files are being made or read.
    Opening,
    /// It serves.
    On,
    /// It does not, for this reason; it is tried again.
    Out(String),
}

/// What was found when the tier was opened last.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Recovery {
    /// Blocks that are served again.
    pub blocks: u64,
    /// Entries that were damaged.
    pub damaged: u64,
    /// Blocks that lack one before them.
    pub left_out: u64,
    /// Segments and pieces of tables that could not be read: what was there is lost.
    pub unreadable: u64,
    /// The daemon before did not close the files.
    pub unclean: bool,
    /// How long it took, seconds.
    pub seconds: f64,
}

/// Figures of the disk tier, besides those of its routes.
#[derive(Debug, Clone, PartialEq)]
pub struct DiskFigures {
    /// Whether it serves.
    pub state: DiskState,
    /// Bytes of all segments; 0 until they are known.
    pub capacity_bytes: u64,
    /// What the drive is doing.
    pub load: IoLoad,
    /// How I/O is done: `io_uring` or `pread`.
    pub engine: &'static str,
    /// Blocks whose bytes were not those stored.
    pub corrupt: u64,
    /// Reads that failed, in blocks.
    pub read_failures: u64,
    /// Writes that failed or were dropped, in blocks.
    pub write_failures: u64,
    /// Bytes looked at in the background.
    pub scrubbed_bytes: u64,
    /// Times that the tier went out of service.
    pub outages: u64,
    /// What was found.
    pub recovery: Recovery,
}

pub(super) type StartEngine = dyn Fn(Vec<File>) -> Result<Arc<dyn DiskIo>, disk_io::StartError> + Send + Sync;

/// See the module.
pub(super) struct DiskTier {
    pub config: DiskTierConfig,
    start_engine: Box<StartEngine>,
    /// Known once the capacity is.
    capacity_bytes: Mutex<Option<u64>>,
    state: Mutex<DiskState>,
    store: RwLock<Option<Arc<DiskStore>>>,
    pub demotes: BoundedQueue<DemoteJob>,
    pub promotes: BoundedQueue<PromoteJob>,
    demoted: InOrder<DemoteEnd>,
    promoted: InOrder<PromoteEnd>,
    /// Numbers of the next batches; changed under the ledger's lock.
    demotes_planned: AtomicU64,
    promotes_planned: AtomicU64,
    corrupt: AtomicU64,
    read_failures: AtomicU64,
    write_failures: AtomicU64,
    scrubbed_bytes: AtomicU64,
    outages: AtomicU64,
    /// Batches of reads, one after the other, of which nothing arrived.
    reads_in_vain: AtomicU32,
    /// What was there has been discarded, as was asked: not a second time.
    has_reset: AtomicBool,
    /// Times that what is in the files could not be read.
    unread: AtomicU32,
    /// The file systems of the directories, as they were when the files were opened first.
    devices: Mutex<Option<Vec<u64>>>,
    recovery: Mutex<Recovery>,
    /// What is in the files has been made known to the ledger.
    is_recovered: AtomicBool,
}

impl DiskTier {
    /// Opens the files, if their size is known: what is there and not ours, or in use, is an error.
    pub fn open(
        config: DiskTierConfig,
        queue_depth: usize,
        start_engine: Box<StartEngine>,
    ) -> Result<Self, Error> {
        let off = config.capacity.is_zero();
        let capacity_bytes = match config.capacity {
            DiskCapacity::Bytes(bytes) => Some(bytes),
            DiskCapacity::Blocks(_) => None,
        };
        let tier = Self {
            start_engine,
            capacity_bytes: Mutex::new(capacity_bytes),
            state: Mutex::new(if off { DiskState::Off } else { DiskState::Opening }),
            store: RwLock::new(None),
            demotes: BoundedQueue::new(DEMOTES_WAITING),
            promotes: BoundedQueue::new(queue_depth),
            demoted: InOrder::default(),
            promoted: InOrder::default(),
            demotes_planned: AtomicU64::new(0),
            promotes_planned: AtomicU64::new(0),
            corrupt: AtomicU64::new(0),
            read_failures: AtomicU64::new(0),
            write_failures: AtomicU64::new(0),
            scrubbed_bytes: AtomicU64::new(0),
            outages: AtomicU64::new(0),
            reads_in_vain: AtomicU32::new(0),
            has_reset: AtomicBool::new(false),
            unread: AtomicU32::new(0),
            devices: Mutex::new(None),
            recovery: Mutex::default(),
            is_recovered: AtomicBool::new(false),
            config,
        };
        if let (false, Some(bytes)) = (off, capacity_bytes) {
            match tier.open_store(bytes) {
                Ok(store) => *tier.store.write() = Some(store),
                // The drive may behave later; what is refused for other reasons, a person must look at.
                Err(error @ (DiskError::Io { .. } | DiskError::Drive { .. })) => {
                    tier.is_out(&error.to_string())
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(tier)
    }

    /// Bytes of all segments; 0 until they are known, and while they are out of service.
    pub fn capacity_bytes(&self) -> u64 {
        self.store().map_or(0, |store| store.capacity_bytes())
    }

    fn open_store(&self, capacity_bytes: u64) -> Result<Arc<DiskStore>, DiskError> {
        let config = DiskConfig {
            directories: self.config.directories.clone(),
            capacity_bytes,
            direct: self.config.direct,
            zerofill: self.config.zerofill,
            reset: self.config.reset && !self.has_reset.load(Relaxed),
        };
        self.devices_are_the_same()?;
        let start = |files| (self.start_engine)(files).map_err(Into::into);
        let give_up = Instant::now() + UNLOCKED_WITHIN;
        loop {
            match DiskStore::open(&config, &start) {
                // The kernel may still be busy with what is left of a daemon that was killed.
                Err(DiskError::InUse { .. }) if Instant::now() < give_up => {
                    thread::sleep(UNLOCKED_WITHIN / 50)
                }
                opened => {
                    let store = opened?;
                    self.has_reset.store(true, Relaxed);
                    self.devices.lock().get_or_insert(devices(&self.config.directories)?);
                    return Ok(Arc::new(store));
                }
            }
        }
    }

    /// A drive that was unmounted leaves a directory on another file system: nothing is made there.
    fn devices_are_the_same(&self) -> Result<(), DiskError> {
        match &*self.devices.lock() {
            Some(known) if *known != devices(&self.config.directories)? => Err(DiskError::Config(
                "a disk directory is on another file system than before: mount its drive".into(),
            )),
            Some(_) | None => Ok(()),
        }
    }

    /// The files, while they are open.
    pub fn store(&self) -> Option<Arc<DiskStore>> {
        self.store.read().clone()
    }

    fn recovered(&self) -> bool {
        self.is_recovered.load(Relaxed)
    }

    fn is_on(&self) -> bool {
        *self.state.lock() == DiskState::On
    }

    fn is_out(&self, reason: &str) {
        let mut state = self.state.lock();
        if !matches!(*state, DiskState::Out(_)) {
            self.outages.fetch_add(1, Relaxed);
            tracing::error!(reason, "the disk tier is out of service");
        }
        *state = DiskState::Out(reason.to_owned());
    }

    pub fn figures(&self) -> DiskFigures {
        let store = self.store();
        let store = store.as_deref();
        DiskFigures {
            state: self.state.lock().clone(),
            capacity_bytes: store.map_or(0, DiskStore::capacity_bytes),
            load: store.map(DiskStore::load).unwrap_or_default(),
            engine: store.map_or("none", DiskStore::engine),
            corrupt: self.corrupt.load(Relaxed),
            read_failures: self.read_failures.load(Relaxed),
            write_failures: self.write_failures.load(Relaxed),
            scrubbed_bytes: self.scrubbed_bytes.load(Relaxed),
            outages: self.outages.load(Relaxed),
            recovery: *self.recovery.lock(),
        }
    }
}

/// File systems on which directories are, or would be made.
fn devices(directories: &[PathBuf]) -> Result<Vec<u64>, DiskError> {
    let device = |path: &PathBuf| {
        let failed = |source| DiskError::Io { op: "find", path: path.clone(), source };
        let found =
            path.ancestors().map(|path| if path.as_os_str().is_empty() { Path::new(".") } else { path });
        let mut found = found.map(std::fs::metadata).skip_while(|found| {
            found.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
        });
        let nearest = found.next().unwrap_or_else(|| std::fs::metadata("."));
        nearest.map(|metadata| metadata.dev()).map_err(failed)
    };
    directories.iter().map(device).collect()
}

impl Shared {
    /// The drive does not behave: until it does, the tier is not used.
    fn disk_fault(&self, tier: &DiskTier, reason: &str) {
        // State and service change together, under the ledger's lock.
        let went_out = self.with_ledger(|ledger, _| {
            let was_on = tier.is_on();
            if was_on {
                tier.is_out(reason);
                ledger.set_disk_service(false);
            }
            was_on
        });
        if !went_out {
            return;
        }
        if let Some(store) = tier.store() {
            store.abandon_waiting();
        }
    }

    /// The first pool tells how large blocks are, and so how large the tier is to be.
    pub(super) fn size_disk(&self, block_bytes: u64) {
        let Some(tier) = &self.disk else { return };
        if let DiskCapacity::Blocks(blocks) = tier.config.capacity {
            tier.capacity_bytes.lock().get_or_insert(DiskStore::bytes_for(
                u64::from(blocks),
                block_bytes,
                tier.config.directories.len(),
            ));
        }
    }
}

impl super::Manager {
    /// Starts the threads of the disk tier.
    pub(super) fn start_disk(&self) -> Result<(), Error> {
        if self.shared.disk.as_ref().is_none_or(|tier| tier.config.capacity.is_zero()) {
            return Ok(());
        }
        let config = &self.shared.disk.as_ref().expect("it was just seen").config;
        debug_assert!(DEMOTE_THREADS * config.batch.blocks <= config.io.waiting_writes_max);
        for _ in 0..DEMOTE_THREADS {
            self.spawn_disk("kvbm-demote", flow::run_demotes)?;
        }
        for _ in 0..PROMOTE_THREADS {
            self.spawn_disk("kvbm-promote", flow::run_promotes)?;
        }
        self.spawn_disk("kvbm-disk-care", care::run)?;
        self.spawn_disk("kvbm-disk-watch", keeper::run)
    }

    fn spawn_disk(&self, name: &'static str, run: fn(&Shared, &DiskTier)) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let thread = thread::Builder::new().name(name.into()).spawn(move || {
            let tier = shared.disk.as_ref().expect("it was there when this was started");
            run(&shared, tier);
        });
        self.shared.disk_threads.lock().push(thread.map_err(|source| Error::Thread { name, source })?);
        Ok(())
    }

    /// Ends the threads of the disk tier and closes its files. A drive that does not answer is not waited for.
    pub(super) fn stop_disk(&self) {
        let Some(tier) = &self.shared.disk else { return };
        tier.demotes.close();
        tier.promotes.close();
        let give_up = Instant::now() + GOODBYE;
        for thread in std::mem::take(&mut *self.shared.disk_threads.lock()) {
            while !thread.is_finished() {
                if Instant::now() > give_up {
                    tracing::warn!("a drive does not answer: the disk cache is left as it is");
                    return;
                }
                thread::sleep(Duration::from_millis(1));
            }
            if thread.join().is_err() {
                tracing::error!("a thread of the disk tier panicked");
            }
        }
        let Some(store) = tier.store.write().take() else { return };
        if !tier.is_on() {
            tracing::warn!("the disk tier is not in service: the disk cache is left as it is");
            return store.unlock();
        }
        // The drive may stop answering just now.
        let closing = thread::Builder::new().name("kvbm-disk-close".into()).spawn(move || {
            if let Err(error) = store.close() {
                tracing::warn!(%error, "the disk cache was not closed cleanly: its next start finds what was written");
            }
            store.unlock();
        });
        while closing.as_ref().is_ok_and(|closing| !closing.is_finished()) {
            if Instant::now() > give_up {
                return tracing::warn!("a drive does not answer: the disk cache is left as it is");
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[cfg(test)]
mod tests;
