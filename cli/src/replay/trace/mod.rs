//! What is replayed: events in order of time, each about a sequence of blocks.
//!
//! A block's identity contains all blocks before it, so a block has one parent and a prefix is told by its last block.

mod builder;
mod mooncake;
mod open;
mod recorded;

use std::ops::Range;

use kvbm_hash::SequenceHash;

pub(super) use builder::Numbered;
pub(super) use mooncake::write as write_mooncake;
pub(super) use open::open;

/// A block of the trace: numbers from 0 on, parents before children.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct BlockId(pub u32);

impl BlockId {
    pub(super) fn at(self) -> usize {
        self.0 as usize
    }
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EventKind {
    /// A request looked its blocks up, and computed and stored what was missing.
    Request,
    /// Blocks were looked up.
    Lookup,
    /// Blocks were stored. They follow their parent, which the event does not list.
    Store,
}

impl EventKind {
    /// Its blocks count as references.
    pub(super) fn looks_up(self) -> bool {
        matches!(self, Self::Request | Self::Lookup)
    }

    /// What is missing is stored.
    pub(super) fn stores(self) -> bool {
        matches!(self, Self::Request | Self::Store)
    }
}

/// One line of a trace.
#[derive(Debug, Clone)]
pub(super) struct Event {
    /// Milliseconds since the start of the trace.
    pub at_ms: u64,
    pub kind: EventKind,
    blocks: Range<usize>,
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Trace {
    pub events: Vec<Event>,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Bytes in one block, if the trace says so.
    pub block_bytes: Option<u64>,
    blocks: Vec<BlockId>,
    keys: Vec<SequenceHash>,
    parents: Vec<Option<BlockId>>,
}

impl Trace {
    /// Blocks of an event, each behind the one before.
    pub(super) fn blocks(&self, event: &Event) -> &[BlockId] {
        &self.blocks[event.blocks.clone()]
    }

    /// Different blocks.
    pub(super) fn unique_blocks(&self) -> usize {
        self.keys.len()
    }

    /// Blocks that are looked up.
    pub(super) fn block_refs(&self) -> u64 {
        let looked_up = self.events.iter().filter(|event| event.kind.looks_up());
        looked_up.map(|event| event.blocks.len() as u64).sum()
    }

    /// Events that look something up.
    pub(super) fn requests(&self) -> u64 {
        self.events.iter().filter(|event| event.kind.looks_up()).count() as u64
    }

    pub(super) fn key(&self, block: BlockId) -> SequenceHash {
        self.keys[block.at()]
    }

    pub(super) fn parent(&self, block: BlockId) -> Option<BlockId> {
        self.parents[block.at()]
    }

    /// The sequence that ends in `block`, first block first.
    pub(super) fn chain(&self, block: BlockId) -> Vec<BlockId> {
        let mut chain: Vec<BlockId> =
            std::iter::successors(Some(block), |block| self.parent(*block)).collect();
        chain.reverse();
        chain
    }

    /// The same trace with smaller blocks: each becomes as many as fit into it.
    pub(super) fn with_tokens_per_block(self, tokens_per_block: u32) -> Result<Self, String> {
        let known = self.tokens_per_block;
        if tokens_per_block == 0 || !known.is_multiple_of(tokens_per_block) {
            return Err(format!(
                "--tokens-per-block {tokens_per_block} does not divide the {known} tokens in a block of this trace"
            ));
        }
        let parts = known / tokens_per_block;
        if parts == 1 {
            return Ok(self);
        }
        let fits = u32::try_from(self.keys.len()).is_ok_and(|blocks| blocks.checked_mul(parts).is_some());
        if !fits {
            return Err(format!(
                "--tokens-per-block {tokens_per_block} makes more than 2^32 blocks of this trace"
            ));
        }
        let part = |block: BlockId, part: u32| BlockId(block.0 * parts + part);
        let mut split = Self {
            tokens_per_block,
            block_bytes: self.block_bytes.map(|bytes| bytes / u64::from(parts)),
            events: Vec::with_capacity(self.events.len()),
            blocks: Vec::with_capacity(self.blocks.len() * parts as usize),
            keys: Vec::with_capacity(self.keys.len() * parts as usize),
            parents: Vec::with_capacity(self.keys.len() * parts as usize),
        };
        for (key, parent) in self.keys.iter().zip(&self.parents) {
            for number in 0..parts {
                let before = number.checked_sub(1).map(|_| BlockId(split.parents.len() as u32 - 1));
                split.parents.push(before.or(parent.map(|parent| part(parent, parts - 1))));
                split.keys.push(derived(*key, number));
            }
        }
        split.blocks.extend(self.blocks.iter().flat_map(|block| (0..parts).map(|n| part(*block, n))));
        let scale = parts as usize;
        split.events.extend(
            self.events
                .into_iter()
                .map(|event| Event { blocks: event.blocks.start * scale..event.blocks.end * scale, ..event }),
        );
        Ok(split)
    }

    /// The trace so many times, one after the other. `fresh`: none of them has a block of another.
    pub(super) fn repeated(self, times: u32, fresh: bool) -> Result<Self, String> {
        let (unique, length) = (self.keys.len(), self.blocks.len());
        let kinds = if fresh { times } else { 1 };
        if u32::try_from(unique).ok().and_then(|unique| unique.checked_mul(kinds)).is_none() {
            return Err(format!("--repeat {times} --fresh-ids makes more than 2^32 blocks of this trace"));
        }
        // The pause between two runs is one second: longer than most between requests, shorter than most think times.
        let duration = self.events.last().map_or(0, |event| event.at_ms) + 1000;
        let mut whole = self;
        for time in 1..times as usize {
            let offset = if fresh { unique * time } else { 0 };
            let shifted = |block: BlockId| BlockId(block.0 + offset as u32);
            if fresh {
                for block in 0..unique {
                    whole.keys.push(derived(whole.keys[block], time as u32));
                    whole.parents.push(whole.parents[block].map(shifted));
                }
            }
            for at in 0..length {
                whole.blocks.push(shifted(whole.blocks[at]));
            }
            let events = whole.events.len() / time;
            for at in 0..events {
                let first = &whole.events[at];
                let blocks = first.blocks.start + length * time..first.blocks.end + length * time;
                let at_ms = first.at_ms + duration * time as u64;
                whole.events.push(Event { at_ms, blocks, ..*first });
            }
        }
        Ok(whole)
    }
}

/// The key of a block of a user: users have the same keys for the same tokens, but not the same blocks.
fn keyed(domain: u32, key: SequenceHash) -> SequenceHash {
    derived(key, domain.wrapping_add(1))
}

/// Another key for each number; 0 is the key itself.
fn derived(key: SequenceHash, number: u32) -> SequenceHash {
    if number == 0 {
        return key;
    }
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(&key.0);
    bytes[16..].copy_from_slice(&number.to_le_bytes());
    hash_of(&bytes)
}

/// A key like those of real sequences: uniform bytes.
fn hash_of(bytes: &[u8]) -> SequenceHash {
    let digest = blake3::hash(bytes);
    SequenceHash(*digest.as_bytes().first_chunk().expect("16 of 32 bytes"))
}

#[cfg(test)]
mod tests;
