//! Ranks that hold the same bytes (a replicated shard) load them from host memory once: the rank that comes first leads, and
//! the others copy out of its blocks, piece by piece, while it goes on.
//!
//! ```text
//!   host ──► leader's blocks ──┬──► a follower's blocks
//!                              └──► another's
//! ```
//!
//! The rule of generations holds for the leader's blocks as for any: what was copied out of one counts only if its word is
//! afterwards what it was when it was loaded. What does not count, and what the leader does not load, comes from host memory.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};

use crate::ledger::{BlockRef, LeaseId, LoadBatch};
use crate::store::EnginePoolMemory;

/// Loads that are remembered, so that a rank may come a little later than the first.
const REMEMBERED: usize = 64;

/// What a load is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct About {
    lease: LeaseId,
    first: usize,
}

/// A load that others may follow.
pub(super) struct Leader {
    about: About,
    memory: Weak<EnginePoolMemory>,
    targets: Vec<BlockRef>,
    progress: Mutex<Progress>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Progress {
    /// Leading targets that are loaded.
    blocks: usize,
    ended: bool,
}

/// What a load is to the others of its lease.
pub(super) enum Role {
    /// Others may follow it.
    Leads(Leading),
    /// Its blocks are, or will be, in those of another rank.
    Follows(Arc<Leader>, Arc<EnginePoolMemory>),
}

/// Tells those who wait that it is over when it is dropped.
pub(super) struct Leading(Arc<Leader>);

impl Leading {
    /// So many more targets are loaded.
    pub fn advance(&self, blocks: usize) {
        self.0.progress.lock().blocks += blocks;
        self.0.moved.notify_all();
    }
}

impl Drop for Leading {
    fn drop(&mut self) {
        self.0.progress.lock().ended = true;
        self.0.moved.notify_all();
    }
}

impl Leader {
    /// Waits until the first `blocks` targets are loaded. False: they will not be.
    pub fn wait_for(&self, blocks: usize) -> bool {
        let mut progress = self.progress.lock();
        while progress.blocks < blocks && !progress.ended {
            self.moved.wait(&mut progress);
        }
        progress.blocks >= blocks
    }

    /// Its targets, in order.
    pub fn targets(&self) -> &[BlockRef] {
        &self.targets
    }
}

/// The latest loads.
#[derive(Default)]
pub(in crate::manager) struct FanOut(Mutex<VecDeque<Arc<Leader>>>);

impl FanOut {
    /// A load begins.
    pub(super) fn begin(&self, batch: &LoadBatch, memory: &Arc<EnginePoolMemory>) -> Role {
        let about = About { lease: batch.lease, first: batch.first };
        let targets: Vec<BlockRef> = batch.copies().iter().map(|(_, to)| *to).collect();
        let mut latest = self.0.lock();
        latest.retain(|leader| leader.memory.strong_count() > 0);
        let others = latest.iter().filter(|leader| leader.about == about);
        let found = others.filter(|leader| leader.targets.len() >= targets.len()).find_map(|leader| {
            let source = leader.memory.upgrade()?;
            let is_same = !Arc::ptr_eq(&source, memory) && memory.connect(&source);
            is_same.then(|| Role::Follows(Arc::clone(leader), source))
        });
        if let Some(role) = found {
            return role;
        }
        // A rank that loads the same again leads anew.
        latest.retain(|leader| leader.about != about || !leader.memory.ptr_eq(&Arc::downgrade(memory)));
        let (progress, moved) = Default::default();
        let leader = Arc::new(Leader { about, memory: Arc::downgrade(memory), targets, progress, moved });
        if latest.len() == REMEMBERED {
            latest.pop_front();
        }
        latest.push_back(Arc::clone(&leader));
        Role::Leads(Leading(leader))
    }
}
