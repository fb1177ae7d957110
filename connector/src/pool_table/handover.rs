//! The table changes hands: from the daemon to the engine (detach) and back (adoption, then its answer).

use std::collections::{HashMap, HashSet};

use kvbm_hash::{Retention, SequenceHash};

use super::{BlockRef, Content, DaemonId, Owner, PoolTable, State};

/// A complete block, as it is reported to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdoptionEntry {
    /// Which block.
    pub block: BlockRef,
    /// What it holds.
    pub content: Content,
    /// What it is to be kept like.
    pub retention: Retention,
    /// In use: the daemon gives it one pin.
    pub held: bool,
}

/// What the daemon is told when it is given the pool back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AdoptionTable {
    /// Complete blocks, each key once, parents before children.
    pub entries: Vec<AdoptionEntry>,
    /// Blocks without an entry that are not free; one pin each.
    pub held: Vec<BlockRef>,
}

impl PoolTable {
    /// The daemon is not listened to any more: all pins are void, and what has no user is free or local cache. Raise
    /// the pool's epoch first, then quarantine what the daemon may still write to.
    pub fn detach(&mut self) {
        self.owner = Owner::Engine;
        for block in 0..self.block_count() {
            let known = self.at_mut(block);
            known.pins = 0;
            if known.state == State::Unowned {
                known.state = State::Free;
                self.free.push(block);
            }
            self.refresh(block);
        }
    }

    /// The table to give to `daemon`. From here on the rules of an attached pool hold, as if the answer were there:
    /// blocks in use have one pin, nothing else is ours. [`PoolTable::attached`] confirms it, [`PoolTable::detach`]
    /// takes it back.
    pub fn adoption(&mut self, daemon: DaemonId) -> AdoptionTable {
        self.owner = Owner::Daemon;
        self.evictable.clear();
        for block in std::mem::take(&mut self.free) {
            self.at_mut(block).state = State::Unowned;
        }
        let listed = self.closed_prefixes();
        let is_listed: HashSet<u32> = listed.iter().copied().collect();
        let mut table = AdoptionTable::default();
        for &block in &listed {
            let content = self.content(block).expect("only complete blocks are listed");
            let held = self.at(block).refs > 0;
            let retention = self.at(block).retention;
            table.entries.push(AdoptionEntry { block: self.block_ref(block), content, retention, held });
            self.at_mut(block).pins = u32::from(held);
        }
        for block in (0..self.block_count()).filter(|block| !is_listed.contains(block)) {
            let known = *self.at(block);
            let held = match known.state {
                State::Private => true,
                State::Complete(_) => known.refs > 0,
                // Its own copies the daemon will have ended when it answers; those of another it knows nothing about.
                State::Quarantined(by) => by != daemon,
                State::Unowned | State::Free => false,
            };
            self.at_mut(block).pins = u32::from(held);
            if held {
                table.held.push(self.block_ref(block));
            } else {
                self.forget(block);
            }
        }
        table
    }

    /// One block for each key whose whole prefix is complete, parents before children. Blocks in use go first.
    fn closed_prefixes(&self) -> Vec<u32> {
        let mut by_parent: HashMap<Option<SequenceHash>, Vec<u32>> = HashMap::new();
        for twins in self.by_key.values() {
            let in_use = twins.iter().find(|block| self.at(**block).refs > 0);
            let block = *in_use.unwrap_or(&twins[0]);
            let content = self.content(block).expect("only complete blocks are indexed");
            by_parent.entry(content.parent).or_default().push(block);
        }
        let mut listed = by_parent.remove(&None).unwrap_or_default();
        let mut next = 0;
        while let Some(&block) = listed.get(next) {
            let key = self.content(block).expect("only complete blocks are listed").key;
            listed.extend(by_parent.remove(&Some(key)).unwrap_or_default());
            next += 1;
        }
        listed
    }

    /// `daemon` answered the adoption: none of its old copies runs any more.
    pub fn attached(&mut self, daemon: DaemonId) {
        assert!(self.owner == Owner::Daemon, "an adoption comes before its answer");
        for known in &mut self.blocks {
            if known.state == State::Quarantined(daemon) {
                known.state = State::Unowned;
            }
        }
    }
}
