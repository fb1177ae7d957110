//! A table that drives a policy as the ledger's tables do: prefixes are closed, leaves go first, newcomers need not be
//! admitted.

use std::collections::HashMap;

use super::super::workloads::Request;
use super::*;

const QUEUE: QueueId = QueueId(0);

#[derive(Debug, Clone, Default)]
struct Block {
    name: u64,
    parent: Option<SlotIndex>,
    children: usize,
    offered: bool,
}

pub struct SmallTable {
    pub policy: Box<dyn Policy>,
    blocks: Vec<Block>,
    free: Vec<SlotIndex>,
    by_name: HashMap<u64, SlotIndex>,
}

impl SmallTable {
    pub fn new(slots: usize, policy: Box<dyn Policy>) -> Self {
        let free = (0..slots as u32).rev().map(SlotIndex).collect();
        Self { policy, blocks: vec![Block::default(); slots], free, by_name: HashMap::new() }
    }

    /// Finds the blocks of a request, stores those that are missing. Returns how many were found.
    pub fn request(&mut self, request: &Request) -> usize {
        let now = Millis(request.at_ms);
        let found = request.blocks.iter().map_while(|name| self.by_name.get(name).copied());
        let found: Vec<SlotIndex> = found.collect();
        let mut deepest = found.last().copied();
        if let Some(slot) = deepest {
            self.blocks[slot.at()].offered = false;
            self.policy.withdrawn(slot);
            self.policy.used(slot, now);
        }
        for (at, name) in request.blocks.iter().enumerate().skip(found.len()) {
            let newcomer = Newcomer { fingerprint: *name, parent: deepest, depth: at as u32 + 1 };
            let Some(slot) = self.room(&newcomer, now) else {
                for (at, name) in request.blocks.iter().enumerate().skip(at) {
                    self.policy.left_out(*name, at as u32 + 1, now);
                }
                break;
            };
            self.blocks[slot.at()] = Block { name: *name, parent: deepest, children: 0, offered: false };
            if let Some(parent) = deepest {
                self.blocks[parent.at()].children += 1;
            }
            self.by_name.insert(*name, slot);
            self.policy.stored(slot, newcomer, now);
            deepest = Some(slot);
        }
        if let Some(slot) = deepest {
            self.offer_leaf(slot, now);
        }
        found.len()
    }

    fn room(&mut self, newcomer: &Newcomer, now: Millis) -> Option<SlotIndex> {
        if self.free.is_empty() {
            let victim = self.policy.victim(QUEUE, now)?;
            if !self.policy.admits(newcomer, victim, now) {
                return None;
            }
            self.policy.withdrawn(victim);
            self.policy.removed(victim, true, now);
            let gone = std::mem::take(&mut self.blocks[victim.at()]);
            assert!(gone.offered && gone.children == 0);
            self.by_name.remove(&gone.name);
            self.free.push(victim);
            if let Some(parent) = gone.parent {
                self.blocks[parent.at()].children -= 1;
                if Some(parent) != newcomer.parent {
                    self.offer_leaf(parent, now);
                }
            }
        }
        self.free.pop()
    }

    fn offer_leaf(&mut self, slot: SlotIndex, now: Millis) {
        let block = &mut self.blocks[slot.at()];
        if block.children == 0 && !block.offered {
            block.offered = true;
            self.policy.offered(slot, QUEUE, now);
        }
    }

    pub fn check(&self) {
        self.policy.check_integrity();
        assert_eq!(self.by_name.len() + self.free.len(), self.blocks.len());
    }
}
