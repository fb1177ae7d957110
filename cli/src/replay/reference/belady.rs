//! Belady's choice with bypass: of all blocks the one that is looked up again latest goes, or is not stored at all.
//!
//! Optimal where each block counts by itself. Where only leading blocks count it is no proven bound, but nothing known
//! comes near it.

use std::collections::BinaryHeap;

use crate::replay::trace::{BlockId, Trace};

/// It is not looked up again.
const NEVER: u32 = u32::MAX;

pub(super) fn hit_blocks(trace: &Trace, capacity: usize) -> u64 {
    let next_uses = next_uses(trace);
    let mut next_uses = next_uses.iter();
    // When each block in the pool is looked up next; absent: not in the pool.
    let mut resident: Vec<Option<u32>> = vec![None; trace.unique_blocks()];
    let mut count = 0;
    // The latest first, of those the lowest number. Entries that have been overtaken are skipped.
    let mut order: BinaryHeap<(u32, std::cmp::Reverse<BlockId>)> = BinaryHeap::new();
    let mut hits = 0;
    for event in &trace.events {
        let blocks = trace.blocks(event);
        let next: Vec<u32> = next_uses.by_ref().take(blocks.len()).copied().collect();
        if event.kind.looks_up() {
            hits += blocks.iter().take_while(|block| resident[block.at()].is_some()).count() as u64;
        }
        for (block, next) in blocks.iter().zip(next).rev() {
            let place = &mut resident[block.at()];
            if place.is_some() {
                *place = Some(next);
                order.push((next, std::cmp::Reverse(*block)));
                continue;
            }
            if next == NEVER || !event.kind.stores() {
                continue;
            }
            while count >= capacity {
                let Some((latest, std::cmp::Reverse(victim))) = order.pop() else { break };
                if resident[victim.at()] != Some(latest) {
                    continue;
                }
                if latest <= next {
                    order.push((latest, std::cmp::Reverse(victim)));
                    break;
                }
                resident[victim.at()] = None;
                count -= 1;
            }
            if count < capacity {
                resident[block.at()] = Some(next);
                order.push((next, std::cmp::Reverse(*block)));
                count += 1;
            }
        }
    }
    hits
}

/// For each block of each event the number of the next event that looks it up.
fn next_uses(trace: &Trace) -> Vec<u32> {
    let mut last = vec![NEVER; trace.unique_blocks()];
    let mut next_uses = Vec::new();
    for (number, event) in trace.events.iter().enumerate().rev() {
        let blocks = trace.blocks(event);
        // From behind, to be turned around as a whole.
        next_uses.extend(blocks.iter().rev().map(|block| last[block.at()]));
        if event.kind.looks_up() {
            blocks.iter().for_each(|block| last[block.at()] = number as u32);
        }
    }
    next_uses.reverse();
    next_uses
}
