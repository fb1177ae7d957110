//! `kvbm daemon --record`: a trace of what engines ask for and store. Keys only, no tokens.
//!
//! A session never waits for it: what it tells goes into a bounded queue to a thread that writes; what finds no room is
//! dropped and counted.

mod line;
mod window;
mod writer;

use std::collections::HashSet;
use std::io::BufWriter;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Instant;

use kvbm::{CommitBlock, Manager, Matched, NamespaceId};
use kvbm_hash::SequenceHash;
use parking_lot::Mutex;

use crate::StartError;
pub use line::{BlockKey, Chain, Commit, Header, Like, Line, MATCHES_BACK_MAX, Match, Namespace, VERSION};
use writer::Writer;

/// Entries that may wait to be written.
const QUEUE: usize = 4096;
/// Keys that may wait to be written: 64 MiB.
const KEYS_QUEUED_MAX: usize = 4 << 20;

/// What sessions tell.
#[derive(Debug)]
enum Entry {
    Namespace(Namespace),
    Match {
        at_ms: u64,
        ns: u32,
        keys: Vec<SequenceHash>,
        hits: [u32; 3],
    },
    /// Keys with those of the blocks before them.
    Commit {
        at_ms: u64,
        ns: u32,
        blocks: Vec<(SequenceHash, Option<SequenceHash>)>,
    },
    Stop,
}

/// What was written.
#[derive(Debug, Default)]
struct Figures {
    lines: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
    keys_queued: AtomicUsize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Recorder {
    started: Instant,
    queue: SyncSender<Entry>,
    figures: Arc<Figures>,
    /// Namespaces that the file describes.
    described: Mutex<HashSet<NamespaceId>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Recorder {
    /// Opens the file and begins to write. The file has `bytes_max` bytes at most.
    pub fn start(path: &Path, bytes_max: u64) -> Result<Self, StartError> {
        let (file, written) = writer::open(path)?;
        let figures = Arc::new(Figures::default());
        let (queue, entries) = sync_channel(QUEUE);
        let writer = Writer {
            path: path.to_owned(),
            file: BufWriter::new(file),
            written,
            bytes_max,
            figures: Arc::clone(&figures),
            window: window::Window::default(),
            last_ms: 0,
        };
        let thread = std::thread::Builder::new().name("kvbm-record".into());
        let thread = thread.spawn(move || writer.run(&entries)).map_err(StartError::io("record", path))?;
        let (started, described) = (Instant::now(), Mutex::default());
        Ok(Self { started, queue, figures, described, thread: Mutex::new(Some(thread)) })
    }

    /// An engine asked for a prefix.
    pub fn matched(
        &self,
        manager: &Manager,
        namespace: NamespaceId,
        keys: Vec<SequenceHash>,
        found: &Matched,
    ) {
        let count = |blocks: usize| u32::try_from(blocks).unwrap_or(u32::MAX);
        let behind = found.host_blocks + found.peer_blocks;
        let hits = [count(found.device.len()), count(behind), count(found.disk_blocks)];
        let (at_ms, weight) = (self.now(), keys.len());
        self.tell(manager, namespace, weight, Entry::Match { at_ms, ns: namespace.0, keys, hits });
    }

    /// An engine declared blocks complete.
    pub fn committed(&self, manager: &Manager, namespace: NamespaceId, blocks: &[CommitBlock]) {
        let blocks: Vec<_> = blocks.iter().map(|block| (block.hash, block.parent)).collect();
        let (at_ms, weight) = (self.now(), blocks.len());
        self.tell(manager, namespace, weight, Entry::Commit { at_ms, ns: namespace.0, blocks });
    }

    /// What is in the queue is written; nothing is recorded any more.
    pub fn stop(&self) {
        // A writer that has ended already does not need to be told.
        let _ = self.queue.send(Entry::Stop);
        let thread = self.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that records panicked");
        }
    }

    /// Lines written in this life of the daemon, bytes in the file, matches and commits that are missing in it.
    pub fn figures(&self) -> (u64, u64, u64) {
        let Figures { lines, bytes, dropped, .. } = &*self.figures;
        (lines.load(Relaxed), bytes.load(Relaxed), dropped.load(Relaxed))
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn tell(&self, manager: &Manager, namespace: NamespaceId, keys: usize, entry: Entry) {
        if keys == 0 {
            return;
        }
        let queued = self.figures.keys_queued.fetch_add(keys, Relaxed);
        let has_room = queued + keys <= KEYS_QUEUED_MAX;
        let told = has_room
            && self.describe(manager, namespace).is_some_and(|()| self.queue.try_send(entry).is_ok());
        if !told {
            self.figures.keys_queued.fetch_sub(keys, Relaxed);
            self.figures.dropped.fetch_add(1, Relaxed);
        }
    }

    /// Makes sure that the file says what a namespace is before anything about it.
    fn describe(&self, manager: &Manager, id: NamespaceId) -> Option<()> {
        let mut described = self.described.lock();
        if described.contains(&id) {
            return Some(());
        }
        let namespace = manager.inspect(|ledger| {
            let known = ledger.namespace(id)?;
            // Before a pool is there nothing can be found or stored.
            let mut pools = ledger.pools().map(|(_, pool)| &pool.identity);
            let pool = pools.find(|pool| Some(pool.base) == known.base && pool.domain == known.domain)?;
            Some(Namespace {
                ns: id.0,
                domain: known.domain.0,
                tenant: known.tenant.clone(),
                model: known.model.clone(),
                tokens_per_block: pool.tokens_per_block,
                block_bytes: pool.layout.block_bytes as u64,
            })
        })?;
        self.queue.try_send(Entry::Namespace(namespace)).ok()?;
        described.insert(id);
        Some(())
    }
}

#[cfg(test)]
mod tests;
