//! Who wants to know when blocks are in host memory, and what they are told.

use std::collections::HashMap;

use super::PoolId;
use super::key::Key;

/// Number of a question about blocks on their way to host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WaiterId(pub u64);

/// What became of the blocks somebody asked about.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ArrivalReport {
    /// In host memory.
    pub done: usize,
    /// Not, and not going to be.
    pub failed: usize,
}

/// All questions that are open.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    open: HashMap<WaiterId, Open>,
    by_key: HashMap<Key, Vec<WaiterId>>,
    finished: Vec<(WaiterId, ArrivalReport)>,
    last: u64,
}

#[derive(Debug)]
struct Open {
    /// The pool that the blocks come from; `None`: they come from disk.
    pool: Option<PoolId>,
    blocks: usize,
    report: ArrivalReport,
}

impl Waiters {
    /// Somebody waits for `keys`.
    pub fn add(&mut self, pool: Option<PoolId>, keys: &[Key]) -> WaiterId {
        self.last += 1;
        let id = WaiterId(self.last);
        self.open.insert(id, Open { pool, blocks: keys.len(), report: ArrivalReport::default() });
        for key in keys {
            self.by_key.entry(*key).or_default().push(id);
        }
        id
    }

    /// A block is in host memory (`done`), or will not be.
    pub fn settle(&mut self, key: Key, done: bool) {
        if self.by_key.is_empty() {
            return;
        }
        for id in self.by_key.remove(&key).unwrap_or_default() {
            // The question may have been answered: its pool, or the disk, has gone.
            let Some(open) = self.open.get_mut(&id) else { continue };
            *if done { &mut open.report.done } else { &mut open.report.failed } += 1;
            open.blocks -= 1;
            if open.blocks == 0 {
                self.finish(id);
            }
        }
    }

    fn finish(&mut self, id: WaiterId) {
        if let Some(Open { blocks, report, .. }) = self.open.remove(&id) {
            self.finished.push((id, ArrivalReport { failed: report.failed + blocks, ..report }));
        }
    }

    /// The blocks of a pool are no more.
    pub fn pool_gone(&mut self, pool: PoolId) {
        let of_pool = self.open.iter().filter(|(_, open)| open.pool == Some(pool));
        let ids: Vec<WaiterId> = of_pool.map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.finish(id));
        let open = &self.open;
        self.by_key.retain(|_, ids| {
            ids.retain(|id| open.contains_key(id));
            !ids.is_empty()
        });
    }

    /// The disk answers nothing now: whoever waits for it is told.
    pub fn disk_gone(&mut self) {
        let of_disk = self.open.iter().filter(|(_, open)| open.pool.is_none());
        let ids: Vec<WaiterId> = of_disk.map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.finish(id));
    }

    /// Questions that have been answered since the last call.
    pub fn take_finished(&mut self) -> Vec<(WaiterId, ArrivalReport)> {
        std::mem::take(&mut self.finished)
    }
}
