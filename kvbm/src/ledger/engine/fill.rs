//! Blocks of engines on their way to host memory, shard by shard.
//!
//! Invariant: a slot is given up only when nobody copies into it any more, and becomes resident only when every shard
//! has arrived and the block before it is resident. A block whose parent is still being filled waits for it.

use std::collections::{HashMap, HashSet};

use super::{EngineId, EngineOwner, EnginePool};
use crate::ledger::disk::StoredBlock;
use crate::ledger::key::Key;
use crate::ledger::segments::{Class, Place};
use crate::ledger::slots::Reserved;
use crate::ledger::{Ledger, Millis, PoolId};

/// A block that is resident because its last shard arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Filled {
    /// Bytes from slot to slot.
    pub stride: usize,
    /// Where it is.
    pub place: Place,
    /// What it is.
    pub stored: StoredBlock,
}

/// How far a shard is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shard {
    Missing,
    /// Somebody, from that pool, copies it.
    Copying(PoolId),
    Arrived,
}

/// One block.
#[derive(Debug)]
pub(super) struct Fill {
    pub engine: EngineId,
    pub class: Class,
    pub target: Reserved,
    pub place: Place,
    pub stored: StoredBlock,
    pub shards: Vec<Shard>,
    /// It goes as soon as nobody copies any more.
    pub failed: bool,
    /// Shards that nobody has begun to copy by then do not come.
    pub deadline: Millis,
}

impl Fill {
    fn is_touched(&self) -> bool {
        self.shards.iter().any(|shard| matches!(shard, Shard::Copying(_)))
    }

    fn is_complete(&self) -> bool {
        self.shards.iter().all(|shard| *shard == Shard::Arrived)
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Fills {
    pub open: HashMap<Key, Fill>,
    /// Those that something happened to, to be looked at again.
    touched: Vec<Key>,
    /// Complete ones that wait for the block before them.
    waiting: HashSet<Key>,
    /// Became resident lately.
    filled: Vec<Filled>,
}

/// What a shard finds when it is to be copied.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Begun {
    /// It is to be copied there.
    Copy(Place),
    /// Somebody else copies it, or has.
    Elsewhere,
    /// The block is being given up.
    Failing,
    /// Nothing is known of the block.
    Unknown,
}

impl Ledger {
    /// A shard joins the others of a block that is being filled.
    pub(super) fn join_fill(&mut self, key: Key, shard: u32, pool: PoolId) -> Begun {
        let Some(fill) = self.engines.fills.open.get_mut(&key) else { return Begun::Unknown };
        match fill.shards.get_mut(shard as usize) {
            _ if fill.failed => Begun::Failing,
            Some(state @ Shard::Missing) => {
                *state = Shard::Copying(pool);
                Begun::Copy(fill.place)
            }
            Some(Shard::Copying(_) | Shard::Arrived) => Begun::Elsewhere,
            None => Begun::Failing,
        }
    }

    /// The first shard of a block has a slot for it. Other ranks that know the block, and have it in line no more, are
    /// to bring theirs.
    pub(super) fn open_fill(&mut self, key: Key, fill: Fill, by: PoolId) {
        let engine = fill.engine;
        let is_whole = fill.shards.len() == 1;
        self.engines.fills.open.insert(key, fill);
        if is_whole {
            return;
        }
        for (id, pool) in &mut self.engines.pools {
            let known = pool.by_key.get(&key).filter(|_| *id != by && pool.identity.engine == engine);
            if let Some(block) = known {
                pool.backlog.push_front((*block, pool.registered[block].number));
            }
        }
    }

    /// A copy of a shard ended.
    pub(super) fn end_shard(&mut self, key: Key, shard: u32, arrived: bool) {
        let fills = &mut self.engines.fills;
        let fill = fills.open.get_mut(&key).expect("it stays while it is copied");
        fill.shards[shard as usize] = if arrived { Shard::Arrived } else { Shard::Missing };
        fill.failed |= !arrived;
        fills.touched.push(key);
    }

    /// Does what follows from the ends of copies, here and elsewhere in host memory.
    pub(in crate::ledger) fn settle_fills(&mut self, now: Millis) {
        loop {
            let fills = &mut self.engines.fills;
            let mut next = std::mem::take(&mut fills.touched);
            next.extend(fills.waiting.drain());
            let before = fills.open.len();
            for key in next {
                self.settle_fill(key, now);
            }
            let fills = &self.engines.fills;
            // Each that became resident, or was given up, may be what others wait for.
            if fills.waiting.is_empty() || fills.open.len() == before {
                return;
            }
        }
    }

    /// Blocks that are resident because their last shard arrived, since the last call.
    pub fn take_filled(&mut self) -> Vec<Filled> {
        std::mem::take(&mut self.engines.fills.filled)
    }

    fn settle_fill(&mut self, key: Key, now: Millis) {
        let Some(fill) = self.engines.fills.open.get(&key) else { return };
        let alive = self.registry.namespace(key.namespace).is_some();
        let table = self.host.class_mut(fill.class).expect("a slot is reserved in it");
        let slot = fill.target.slot();
        let goes = fill.failed || !alive || table.slots.is_behind_failed(slot);
        let waits = fill.is_complete() && table.slots.is_behind_filling(slot);
        if fill.is_touched() || !goes && !fill.is_complete() {
            return;
        }
        if !goes && waits {
            self.engines.fills.waiting.insert(key);
            return;
        }
        let fill = self.engines.fills.open.remove(&key).expect("it was just there");
        let priority = fill.stored.retention.priority;
        let committed = if goes {
            table.slots.abandon(fill.target, now);
            false
        } else {
            table.slots.commit(fill.target, now)
        };
        if committed {
            self.used_in_host(fill.class, key, priority);
            let (stride, place, stored) = (fill.class.stride, fill.place, fill.stored);
            self.engines.fills.filled.push(Filled { stride, place, stored });
        } else {
            self.tally.store_drops += 1;
        }
        self.waiters.settle(key, committed);
    }

    /// Nobody brings what is missing any more.
    pub(super) fn expire_fills(&mut self, now: Millis) {
        let fills = &mut self.engines.fills;
        for (key, fill) in &mut fills.open {
            let late = fill.deadline <= now && fill.shards.contains(&Shard::Missing) && !fill.failed;
            if late {
                fill.failed = true;
                self.tally.shards_late += 1;
                fills.touched.push(*key);
            }
        }
    }

    /// A rank is gone: blocks that lack its shard are given up, unless another has the same shard.
    pub(super) fn shards_missing(&mut self, id: PoolId) {
        let Some(pool) = self.engines.pools.get(&id) else { return };
        let (engine, shard) = (pool.identity.engine, pool.identity.shard);
        let has_it = |pool: &EnginePool| {
            let comes = pool.is_open() || matches!(pool.owner, EngineOwner::Rescue(_));
            comes && (pool.identity.engine, pool.identity.shard) == (engine, shard)
        };
        if self.engines.pools.iter().any(|(other, pool)| *other != id && has_it(pool)) {
            return;
        }
        let fills = &mut self.engines.fills;
        for (key, fill) in fills.open.iter_mut().filter(|(_, fill)| fill.engine == engine) {
            if fill.shards[shard as usize] == Shard::Missing {
                fill.failed = true;
                fills.touched.push(*key);
            }
        }
    }

    /// Blocks of engines on their way to host memory.
    pub fn filling(&self) -> usize {
        self.engines.fills.open.len()
    }

    pub(super) fn check_fills(&self) {
        for (key, fill) in &self.engines.fills.open {
            let table = self.host.class(fill.class).expect("a slot is reserved in it");
            assert_eq!(table.place(fill.target.slot()), fill.place);
            assert!(
                table.slots.knows(*key) && table.slots.resident(*key).is_none(),
                "{key:?} is being filled"
            );
            for shard in &fill.shards {
                if let Shard::Copying(pool) = shard {
                    assert!(self.engines.pools.contains_key(pool), "{key:?} is copied by {pool:?}");
                }
            }
        }
    }
}
