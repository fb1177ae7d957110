//! Which unused block goes next while the engine decides: the lowest priority first, among equals the one that was left
//! longest ago, leaves before what they hang on. A priority that holds for a while ends while the block is unused; then
//! the block is an ordinary one, as if it had just been left.

use std::time::Duration;

use kvbm_hash::{Retention, SequenceHash};

use super::{Block, Content, Owner, PoolTable, State};

#[cfg(test)]
mod tests;

/// Lowest goes first: priority, when the last user left, block.
pub(super) type Rank = (u8, u64, u32);

impl Block {
    pub(super) fn rank(&self, block: u32) -> Rank {
        (self.retention.priority, self.used, block)
    }
}

impl PoolTable {
    /// It is `now` on the caller's monotonic clock. Ends the priorities whose time is over.
    pub fn advance(&mut self, now: Duration) {
        self.now = self.now.max(now);
        while let Some(&(at, block)) = self.expiring.first()
            && at <= self.now
        {
            self.stay(block);
            self.evictable.remove(&self.at(block).rank(block));
            self.uses += 1;
            let used = self.uses;
            let known = self.at_mut(block);
            (known.retention, known.used) = (Retention::default(), used);
            self.refresh(block);
        }
    }

    /// The last user of a complete block is gone: from now on its priority's time runs.
    pub(super) fn rest(&mut self, block: u32) {
        let Retention { priority, duration } = self.at(block).retention;
        let Some(duration) = duration.filter(|_| priority != Retention::default().priority) else { return };
        let at = self.now.saturating_add(duration);
        self.at_mut(block).expires_at = Some(at);
        self.expiring.insert((at, block));
    }

    /// An unused block is used again, or gone: the time of its priority does not run.
    pub(super) fn stay(&mut self, block: u32) {
        if let Some(at) = self.at_mut(block).expires_at.take() {
            self.expiring.remove(&(at, block));
        }
    }

    /// A request found a block that another one made. What it says counts from now on; the time that an earlier one
    /// asked for does not.
    pub(super) fn reuse(&mut self, block: u32, said: Option<Retention>) {
        let known = self.at_mut(block);
        known.retention = said.unwrap_or(Retention { duration: None, ..known.retention });
    }

    /// A block was computed although others hold the same, as the last of a prompt is that has no token besides: what
    /// the request says of it holds for all, unless it is what holds when nothing is said.
    pub(super) fn keep_twins_like(&mut self, block: u32, key: SequenceHash) {
        let retention = self.at(block).retention;
        if retention == Retention::default() {
            return;
        }
        for at in 0..self.by_key[&key].len() {
            let twin = self.by_key[&key][at];
            if twin == block {
                continue;
            }
            self.stay(twin);
            self.evictable.remove(&self.at(twin).rank(twin));
            self.reuse(twin, Some(retention));
            if self.at(twin).refs == 0 {
                self.rest(twin);
                self.refresh(twin);
            }
        }
    }

    /// Evicts until `count` blocks are free, or does nothing if they cannot be.
    pub(super) fn make_room(&mut self, count: usize) {
        if self.free.len() + self.idle < count {
            return;
        }
        while self.free.len() < count {
            let Some(&(_, _, block)) = self.evictable.first() else { return };
            self.forget(block);
            self.at_mut(block).state = State::Free;
            self.free.push(block);
        }
    }

    pub(super) fn refresh_relatives(&mut self, content: Content) {
        if self.owner == Owner::Daemon {
            return;
        }
        for key in [Some(content.key), content.parent].into_iter().flatten() {
            for at in 0..self.by_key.get(&key).map_or(0, Vec::len) {
                self.refresh(self.by_key[&key][at]);
            }
        }
    }

    /// Derives whether `block` may be evicted: complete, unused, and no prefix ends without it.
    pub(super) fn refresh(&mut self, block: u32) {
        let known = self.at(block);
        let evictable = match known.state {
            State::Complete(Content { key, .. }) => {
                let spare = self.by_key[&key].len() > 1 || !self.children.contains_key(&key);
                self.owner == Owner::Engine && known.refs == 0 && spare
            }
            State::Unowned | State::Free | State::Private | State::Quarantined(_) => false,
        };
        let rank = known.rank(block);
        if evictable {
            self.evictable.insert(rank);
        } else {
            self.evictable.remove(&rank);
        }
    }
}
