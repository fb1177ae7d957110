//! What the engine knows about every block of its pool: pure, synchronous, no I/O, no clock (it is told the time).
//!
//! ```text
//!              grant                take               commit
//!   Unowned ──────────► Free ──────────────► Private ──────────► Complete(key)
//!     ▲  ▲                ▲                   │    │                │      ▲
//!     │  └────────────────┼── last reference ─┘    │ quarantine     │      │ lookup, match
//!     │    (attached)     │   (detached: Free)     ▼                └──────┘
//!     │                   └──────────────────  Quarantined
//!     └── adoption: what is free or unlisted ──────┘ (its daemon answered or died)
//! ```
//!
//! While *attached* the daemon's ledger decides: an unreferenced block is the daemon's, and what the table still says
//! about its content counts again only after a detach, because nobody but this engine ever writes into the pool. While
//! *detached* the table is the allocator: unreferenced complete blocks are a cache, evicted leaf first, of the leaves
//! those of the lowest priority first.
//!
//! Invariants (see [`PoolTable::check_integrity`]): a block is handed out once until it is released; a quarantined
//! block is never handed out; attached, a block has pins exactly while it is referenced or waits in the stash.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use kvbm_hash::{Namespace, Retention, SequenceHash};

mod eviction;
mod handover;
mod integrity;
#[cfg(test)]
mod tests;

pub use handover::{AdoptionEntry, AdoptionTable};

use eviction::Rank;

/// A block at one point of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Index in the pool.
    pub block: u32,
    /// Raised each time the block is granted.
    pub generation: u32,
}

/// Pins to give back to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Release {
    /// The block, in the generation the pins were given for.
    pub block: BlockRef,
    /// How many, at least 1.
    pub pins: u32,
}

/// What a complete block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Content {
    /// The namespace its key is chained from.
    pub namespace: Namespace,
    /// Stands for the block's tokens and all before them.
    pub key: SequenceHash,
    /// Key of the block before it; none for the first of a sequence.
    pub parent: Option<SequenceHash>,
}

/// A daemon process, told apart from its predecessors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DaemonId(pub u64);

/// The daemon said something about a block that cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contradiction {
    /// The block it is about.
    pub block: u32,
}

/// Who decides about unreferenced blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Daemon,
    Engine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The daemon's, content unknown.
    Unowned,
    /// Ours to hand out.
    Free,
    /// Being filled by a request.
    Private,
    /// Filled, and not written again in this generation.
    Complete(Content),
    /// A daemon that stopped answering may still write there.
    Quarantined(DaemonId),
}

#[derive(Debug, Clone, Copy)]
struct Block {
    generation: u32,
    state: State,
    /// Local users.
    refs: u32,
    /// Pins the daemon gave and did not get back.
    pins: u32,
    /// When the last user left, in the table's own count.
    used: u64,
    /// What its content is to be kept like. Attached, the daemon obeys it, and the table after a detach.
    retention: Retention,
    /// When its priority ends: of unused complete blocks only.
    expires_at: Option<Duration>,
}

/// All blocks of one pool.
#[derive(Debug)]
pub struct PoolTable {
    blocks: Vec<Block>,
    owner: Owner,
    /// Exactly the blocks in `State::Free`. Attached, that is the stash of granted blocks.
    free: Vec<u32>,
    /// Complete blocks by key; more than one when requests computed the same block side by side.
    by_key: HashMap<SequenceHash, Vec<u32>>,
    /// Complete blocks that name this key as their parent.
    children: HashMap<SequenceHash, u32>,
    /// Derived by `refresh`: unreferenced complete blocks that may go now, in order. Empty while attached.
    evictable: BTreeSet<Rank>,
    /// Exactly the blocks with `expires_at`.
    expiring: BTreeSet<(Duration, u32)>,
    /// As the table was told last.
    now: Duration,
    /// Complete blocks without a local user.
    idle: usize,
    uses: u64,
}

impl PoolTable {
    /// The table of a pool that no daemon knows: every block is free.
    pub fn new_private(block_count: u32) -> Self {
        let mut table = Self::new_granted(block_count);
        table.detach();
        table
    }

    /// The table of a pool that a daemon just handed out: every block is the daemon's.
    pub fn new_granted(block_count: u32) -> Self {
        let block = Block {
            generation: 0,
            state: State::Unowned,
            refs: 0,
            pins: 0,
            used: 0,
            retention: Retention::default(),
            expires_at: None,
        };
        Self {
            blocks: vec![block; block_count as usize],
            owner: Owner::Daemon,
            free: Vec::new(),
            by_key: HashMap::new(),
            children: HashMap::new(),
            evictable: BTreeSet::new(),
            expiring: BTreeSet::new(),
            now: Duration::ZERO,
            idle: 0,
            uses: 0,
        }
    }

    /// Blocks in the pool.
    pub fn block_count(&self) -> u32 {
        u32::try_from(self.blocks.len()).expect("it was built from a u32")
    }

    /// Blocks that can be taken without eviction: while attached, the stash.
    pub fn free_count(&self) -> usize {
        self.free.len()
    }

    /// Unreferenced complete blocks: while detached, the local cache.
    pub fn idle_count(&self) -> usize {
        self.idle
    }

    /// Blocks in quarantine.
    pub fn quarantined_count(&self) -> usize {
        self.blocks.iter().filter(|block| matches!(block.state, State::Quarantined(_))).count()
    }

    /// True while the table itself decides about unreferenced blocks.
    pub fn is_detached(&self) -> bool {
        self.owner == Owner::Engine
    }

    /// Names `block` in its current generation.
    pub fn block_ref(&self, block: u32) -> BlockRef {
        BlockRef { block, generation: self.at(block).generation }
    }

    /// Local users of `block`.
    pub fn refs(&self, block: u32) -> u32 {
        self.at(block).refs
    }

    /// What `block` holds, if it is complete.
    pub fn content(&self, block: u32) -> Option<Content> {
        match self.at(block).state {
            State::Complete(content) => Some(content),
            State::Unowned | State::Free | State::Private | State::Quarantined(_) => None,
        }
    }

    /// Blocks granted by the daemon, one pin each, go to the stash.
    pub fn grant(&mut self, granted: &[BlockRef]) -> Result<(), Contradiction> {
        for &BlockRef { block, generation } in granted {
            let known = self.blocks.get(block as usize);
            let grantable = known.is_some_and(|known| {
                let unowned = matches!(known.state, State::Unowned | State::Complete(_));
                unowned && known.refs == 0 && known.pins == 0
            });
            if self.owner == Owner::Engine || !grantable {
                return Err(Contradiction { block });
            }
            self.forget(block);
            let known = self.at_mut(block);
            *known = Block { generation, state: State::Free, pins: 1, ..*known };
            self.free.push(block);
        }
        Ok(())
    }

    /// Takes `count` blocks, one reference each, or none. Detached, it evicts unused complete blocks, leaves first, and
    /// raises the generation of what it hands out.
    pub fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        if self.owner == Owner::Engine {
            self.make_room(count);
        }
        let rest = self.free.len().checked_sub(count)?;
        let taken = self.free.split_off(rest);
        let raise = u32::from(self.owner == Owner::Engine);
        for &block in &taken {
            let block = self.at_mut(block);
            block.state = State::Private;
            block.refs = 1;
            block.generation = block.generation.wrapping_add(raise);
        }
        Some(taken)
    }

    /// One more user of a block that has one.
    pub fn reference(&mut self, block: u32) {
        assert!(self.at(block).refs > 0, "block {block} has no user that could share it");
        self.at_mut(block).refs += 1;
    }

    /// One user less. With the last one, all pins of the block go back to the daemon.
    #[must_use = "pins that are not sent back are never evicted"]
    pub fn unreference(&mut self, block: u32) -> Option<Release> {
        let known = self.at_mut(block);
        known.refs = known.refs.checked_sub(1).expect("a block is released once per reference");
        (known.refs == 0).then(|| self.left(block)).flatten()
    }

    /// The last user of `block` is gone.
    fn left(&mut self, block: u32) -> Option<Release> {
        self.uses += 1;
        let (used, owner) = (self.uses, self.owner);
        let known = self.at_mut(block);
        known.used = used;
        let release = Release { block: BlockRef { block, generation: known.generation }, pins: known.pins };
        known.pins = 0;
        match known.state {
            State::Private if owner == Owner::Engine => {
                known.state = State::Free;
                self.free.push(block);
            }
            State::Private => known.state = State::Unowned,
            State::Complete(_) => {
                self.idle += 1;
                self.rest(block);
                self.refresh(block);
            }
            State::Unowned | State::Free | State::Quarantined(_) => {
                unreachable!("block {block} without owner had a user")
            }
        }
        (release.pins > 0).then_some(release)
    }

    /// A block in use is complete. From now on it is found under its key, and kept as `retention` says.
    pub fn commit(&mut self, block: u32, content: Content, retention: Retention) {
        let known = self.at_mut(block);
        assert!(known.state == State::Private && known.refs > 0, "block {block} is not being filled");
        known.retention = retention;
        self.index(block, content);
        self.keep_twins_like(block, content.key);
    }

    /// The longest prefix of `keys` in this table, one reference more for each block. Attached, only blocks count that
    /// are in use, because only those the daemon cannot take away. `retention` is empty, or says of each key what its
    /// block is to be kept like from now on.
    pub fn find(&mut self, keys: &[SequenceHash], retention: &[Option<Retention>]) -> Vec<u32> {
        let mut found = Vec::new();
        for (at, key) in keys.iter().enumerate() {
            let Some(&block) = self.by_key.get(key).and_then(|twins| {
                twins.iter().find(|block| self.owner == Owner::Engine || self.at(**block).pins > 0)
            }) else {
                break;
            };
            self.share(block);
            self.reuse(block, retention.get(at).copied().flatten());
            found.push(block);
        }
        found
    }

    fn share(&mut self, block: u32) {
        self.at_mut(block).refs += 1;
        if self.at(block).refs == 1 {
            self.idle -= 1;
            self.stay(block);
            self.refresh(block);
        }
    }

    /// The daemon matched the first of `keys` to `matched`, one pin each. Returns the blocks that make sense, with one
    /// reference more each, and the pins of all behind the first that does not. `retention` as with `find`.
    pub fn matched(
        &mut self,
        namespace: Namespace,
        keys: &[SequenceHash],
        matched: &[BlockRef],
        retention: &[Option<Retention>],
    ) -> (Vec<u32>, Vec<Release>) {
        let mut accepted = Vec::new();
        for (at, &block) in matched.iter().enumerate() {
            let parent = at.checked_sub(1).and_then(|before| keys.get(before)).copied();
            let content = keys.get(at).map(|&key| Content { namespace, key, parent });
            if !content.is_some_and(|content| self.believes(block, content)) {
                break;
            }
            self.at_mut(block.block).pins += 1;
            self.share(block.block);
            self.reuse(block.block, retention.get(at).copied().flatten());
            accepted.push(block.block);
        }
        let doubted = matched[accepted.len()..].iter().map(|&block| Release { block, pins: 1 }).collect();
        (accepted, doubted)
    }

    /// Whether `block` holds `content`, as far as this engine saw it filled, inherited or onboarded. It sees all of that,
    /// so a daemon that says more is mistaken.
    fn believes(&self, block: BlockRef, content: Content) -> bool {
        let Some(known) = self.blocks.get(block.block as usize) else { return false };
        if known.generation != block.generation || self.owner == Owner::Engine {
            return false;
        }
        match known.state {
            State::Complete(held) => held == content,
            State::Unowned | State::Free | State::Private | State::Quarantined(_) => false,
        }
    }

    /// A predecessor's complete blocks, found in a pool that was just handed out. What does not fit is left out.
    pub fn inherit(&mut self, entries: impl IntoIterator<Item = (BlockRef, Content, Retention)>) -> usize {
        let mut inherited = 0;
        for (BlockRef { block, generation }, content, retention) in entries {
            let Some(known) = self.blocks.get_mut(block as usize) else { continue };
            if self.owner == Owner::Daemon && known.state == State::Unowned {
                (known.generation, known.retention) = (generation, retention);
                self.index(block, content);
                self.idle += 1;
                self.rest(block);
                inherited += 1;
            }
        }
        inherited
    }

    /// Takes blocks from their users for as long as `daemon` may write to them.
    pub fn quarantine(&mut self, blocks: &[u32], daemon: DaemonId) {
        for &block in blocks {
            let known = self.at_mut(block);
            assert!(known.state == State::Private, "only a block that is being filled goes into quarantine");
            *known = Block { state: State::Quarantined(daemon), refs: 0, ..*known };
        }
    }

    /// `daemon` is dead: what it might have written to is usable again.
    #[must_use = "pins that are not sent back are never evicted"]
    pub fn clear_quarantine(&mut self, daemon: DaemonId) -> Vec<Release> {
        let mut releases = Vec::new();
        for (block, known) in (0u32..).zip(&mut self.blocks) {
            if known.state != State::Quarantined(daemon) {
                continue;
            }
            match self.owner {
                Owner::Engine => {
                    known.state = State::Free;
                    self.free.push(block);
                }
                Owner::Daemon => {
                    known.state = State::Unowned;
                    let block = BlockRef { block, generation: known.generation };
                    let pins = std::mem::take(&mut known.pins);
                    releases.extend((pins > 0).then_some(Release { block, pins }));
                }
            }
        }
        releases
    }

    fn index(&mut self, block: u32, content: Content) {
        self.at_mut(block).state = State::Complete(content);
        self.by_key.entry(content.key).or_default().push(block);
        if let Some(parent) = content.parent {
            *self.children.entry(parent).or_default() += 1;
        }
        self.refresh_relatives(content);
    }

    /// Drops what the table says about the content of a block without users. The caller sets the next state.
    fn forget(&mut self, block: u32) {
        let State::Complete(content) = self.at(block).state else { return };
        assert!(self.at(block).refs == 0, "block {block} is in use");
        self.stay(block);
        self.evictable.remove(&self.at(block).rank(block));
        self.at_mut(block).state = State::Unowned;
        self.idle -= 1;
        let twins = self.by_key.get_mut(&content.key).expect("complete blocks are indexed");
        twins.retain(|twin| *twin != block);
        if twins.is_empty() {
            self.by_key.remove(&content.key);
        }
        if let Some(parent) = content.parent {
            let count = self.children.get_mut(&parent).expect("children are counted");
            *count -= 1;
            if *count == 0 {
                self.children.remove(&parent);
            }
        }
        self.refresh_relatives(content);
    }

    fn at(&self, block: u32) -> &Block {
        &self.blocks[block as usize]
    }

    fn at_mut(&mut self, block: u32) -> &mut Block {
        &mut self.blocks[block as usize]
    }
}

impl From<BlockRef> for kvbm_proto::v1::BlockRef {
    fn from(BlockRef { block, generation }: BlockRef) -> Self {
        Self { block, generation }
    }
}

impl From<kvbm_proto::v1::BlockRef> for BlockRef {
    fn from(kvbm_proto::v1::BlockRef { block, generation }: kvbm_proto::v1::BlockRef) -> Self {
        Self { block, generation }
    }
}
