//! The invariants of the table, checked from scratch. For tests: it costs time in proportion to the pool.

use std::collections::{BTreeSet, HashMap};

use super::eviction::Rank;
use super::{Owner, PoolTable, State};

impl PoolTable {
    /// Says what is wrong, if anything is.
    pub fn check_integrity(&self) -> Result<(), String> {
        let mut free: Vec<u32> = self.free.clone();
        free.sort_unstable();
        let mut idle = 0;
        let mut indexed = 0;
        let mut children = HashMap::new();
        for (number, block) in (0u32..).zip(&self.blocks) {
            let attached = self.owner == Owner::Daemon;
            let used = block.refs > 0;
            let unused = matches!(block.state, State::Complete(_)) && !used;
            let sound = (block.expires_at.is_none() || unused)
                && match block.state {
                    State::Unowned => attached && !used && block.pins == 0,
                    State::Free => !used && block.pins == u32::from(attached),
                    State::Private => used && attached == (block.pins > 0),
                    State::Complete(_) => (attached && used) == (block.pins > 0),
                    State::Quarantined(_) => !used && block.pins <= u32::from(attached),
                };
            if !sound {
                return Err(format!("block {number} while {:?} decides: {block:?}", self.owner));
            }
            if (block.state == State::Free) != free.binary_search(&number).is_ok() {
                return Err(format!("block {number} and the list of free blocks disagree: {block:?}"));
            }
            if let State::Complete(content) = block.state {
                idle += usize::from(!used);
                indexed += 1;
                if !self.by_key.get(&content.key).is_some_and(|twins| twins.contains(&number)) {
                    return Err(format!("block {number} is not found under its key"));
                }
                if let Some(parent) = content.parent {
                    *children.entry(parent).or_default() += 1;
                }
            }
        }
        if free.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("a block is free twice".into());
        }
        if indexed != self.by_key.values().map(Vec::len).sum::<usize>() || idle != self.idle {
            return Err(format!("{indexed} complete, {idle} idle blocks are not what the index counts"));
        }
        if children != self.children {
            return Err("children are miscounted".into());
        }
        let expiring =
            (0u32..).zip(&self.blocks).filter_map(|(number, block)| Some((block.expires_at?, number)));
        if self.expiring != expiring.collect() {
            return Err("the blocks whose priority ends are not those that say so".into());
        }
        if self.evictable != self.evictable_from_scratch() {
            return Err("the order of eviction is not what the blocks say".into());
        }
        Ok(())
    }

    fn evictable_from_scratch(&self) -> BTreeSet<Rank> {
        let blocks = (0u32..).zip(&self.blocks).filter(|(_, block)| match block.state {
            State::Complete(content) => {
                let spare = self.by_key[&content.key].len() > 1 || !self.children.contains_key(&content.key);
                self.owner == Owner::Engine && block.refs == 0 && spare
            }
            State::Unowned | State::Free | State::Private | State::Quarantined(_) => false,
        });
        blocks.map(|(number, block)| block.rank(number)).collect()
    }
}
