//! Buffers for table pages, which live as long as the store.

use std::sync::Arc;

use kvbm_shm::{Error, SharedMemory};
use parking_lot::{Condvar, Mutex};

use crate::store::table::PAGE_BYTES;

/// Pages in a slab.
pub const SLAB_PAGES: usize = 64;
/// Slabs: writers, the flusher and whoever stops the store, each at work on one.
const SLABS: usize = 16;

/// A fixed number of slabs.
#[derive(Debug)]
pub struct Arena {
    memory: Arc<SharedMemory>,
    free: Mutex<Vec<usize>>,
    returned: Condvar,
}

/// The right to one slab, until dropped.
#[derive(Debug)]
pub struct Slab<'a> {
    arena: &'a Arena,
    number: usize,
}

impl Arena {
    /// Its pages come when they are first used.
    pub fn new() -> Result<Self, Error> {
        let bytes = SLABS * SLAB_PAGES * PAGE_BYTES;
        let memory = SharedMemory::create("kvbm-disk-pages", bytes)?;
        Ok(Self {
            memory: Arc::new(memory),
            free: Mutex::new((0..SLABS).collect()),
            returned: Condvar::new(),
        })
    }

    /// The memory of all slabs.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// Waits for a slab. Whoever holds one waits for a drive, or for another holder who does, so this ends.
    pub fn take(&self) -> Slab<'_> {
        let mut free = self.free.lock();
        loop {
            if let Some(number) = free.pop() {
                return Slab { arena: self, number };
            }
            self.returned.wait(&mut free);
        }
    }
}

impl Slab<'_> {
    /// Where in the arena's memory one of its pages begins.
    pub fn offset(&self, page: usize) -> usize {
        assert!(page < SLAB_PAGES, "page {page} lies outside a slab");
        (self.number * SLAB_PAGES + page) * PAGE_BYTES
    }
}

impl Drop for Slab<'_> {
    fn drop(&mut self) {
        self.arena.free.lock().push(self.number);
        self.arena.returned.notify_one();
    }
}
