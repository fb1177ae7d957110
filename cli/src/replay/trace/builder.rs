//! Makes a trace of events as they are read.

use std::collections::HashMap;

use kvbm_hash::SequenceHash;

use super::{BlockId, Event, EventKind, Trace, hash_of};

/// See the module.
#[derive(Debug)]
pub(super) struct Builder(Trace);

impl Builder {
    pub(super) fn new() -> Self {
        let (events, block_bytes, blocks, keys, parents) = Default::default();
        Self(Trace { events, tokens_per_block: 1, block_bytes, blocks, keys, parents })
    }

    /// When the last event was.
    pub(super) fn last_ms(&self) -> u64 {
        self.0.events.last().map_or(0, |event| event.at_ms)
    }

    /// A block that was not there before.
    pub(super) fn add(&mut self, parent: Option<BlockId>, key: SequenceHash) -> Result<BlockId, String> {
        let id = u32::try_from(self.0.keys.len()).map_err(|_| "more than 2^32 blocks".to_owned())?;
        self.0.keys.push(key);
        self.0.parents.push(parent);
        Ok(BlockId(id))
    }

    pub(super) fn key(&self, block: BlockId) -> SequenceHash {
        self.0.key(block)
    }

    pub(super) fn event(&mut self, at_ms: u64, kind: EventKind, blocks: &[BlockId]) {
        let start = self.0.blocks.len();
        self.0.blocks.extend_from_slice(blocks);
        self.0.events.push(Event { at_ms, kind, blocks: start..self.0.blocks.len() });
    }

    pub(super) fn finish(self, tokens_per_block: u32, block_bytes: Option<u64>) -> Trace {
        Trace { tokens_per_block, block_bytes, ..self.0 }
    }
}

/// Requests whose blocks are named by numbers. Numbers that are no hash of the blocks before them do no harm: the same
/// number behind another block is another block.
#[derive(Debug)]
pub(in crate::replay) struct Numbered {
    known: HashMap<(Option<BlockId>, u64), BlockId>,
    builder: Builder,
}

impl Numbered {
    pub(in crate::replay) fn new() -> Self {
        Self { known: HashMap::new(), builder: Builder::new() }
    }

    /// When the last request was.
    pub(super) fn last_ms(&self) -> u64 {
        self.builder.last_ms()
    }

    pub(in crate::replay) fn request(&mut self, at_ms: u64, ids: &[u64]) -> Result<(), String> {
        let mut blocks: Vec<BlockId> = Vec::with_capacity(ids.len());
        for id in ids {
            let parent = blocks.last().copied();
            let block = match self.known.get(&(parent, *id)) {
                Some(known) => *known,
                None => {
                    let before = parent.map_or([0; 16], |parent| self.builder.key(parent).0);
                    let mut bytes = [0; 24];
                    bytes[..16].copy_from_slice(&before);
                    bytes[16..].copy_from_slice(&id.to_le_bytes());
                    let block = self.builder.add(parent, hash_of(&bytes))?;
                    self.known.insert((parent, *id), block);
                    block
                }
            };
            blocks.push(block);
        }
        self.builder.event(at_ms, EventKind::Request, &blocks);
        Ok(())
    }

    pub(in crate::replay) fn finish(self, tokens_per_block: u32) -> Trace {
        self.builder.finish(tokens_per_block, None)
    }
}
