//! What is to be loaded, and what to be saved.

use kvbm_hash::SequenceHash;

use super::request::Request;
use super::{LoadUnderWay, SchedulerHalf};
use crate::engine::metadata::{Load, Pages, Save};

impl SchedulerHalf {
    /// Has the offered blocks loaded for which there are pages.
    pub(super) fn load(&mut self, id: u64, request: &mut Request) {
        let Some(offer) = &mut request.offer else { return };
        let first = offer.first + offer.loaded;
        let placed = request.pages.iter().map(Vec::len).min().unwrap_or(0);
        let count = placed.saturating_sub(first).min(offer.slots.len() - offer.loaded);
        let parked = request.parked;
        // A parked request is waited for also when there is nothing to load: the engine honours less than was offered.
        if count == 0 && !parked {
            return;
        }
        let load_id = self.next_load;
        self.next_load += 1;
        let pages: Vec<Pages> =
            request.pages.iter().map(|group| Pages { pages: group[first..first + count].to_vec() }).collect();
        let slots = &offer.slots[offer.loaded..offer.loaded + count];
        let segments = slots.iter().map(|slot| slot.segment).collect();
        let indices = slots.iter().map(|slot| slot.index).collect();
        offer.loaded += count;
        let lease = offer.lease;
        let last = parked || offer.loaded == offer.slots.len();
        if parked {
            let targets: Vec<(usize, i32)> = pages
                .iter()
                .enumerate()
                .flat_map(|(group, pages)| pages.pages.iter().map(move |page| (group, *page)))
                .filter(|(_, page)| *page >= 0)
                .collect();
            for (group, page) in &targets {
                self.set_target(*group, *page, load_id);
            }
            self.loads.insert(load_id, LoadUnderWay { request_id: id, targets });
        }
        if !parked {
            request.loaded_to = first + count;
        }
        if last {
            request.offer = None;
        }
        let in_layers = self.by_layer && request.alone;
        let load = Load { load_id, request_id: id, parked, segments, indices, pages, lease, last, in_layers };
        self.next.loads.push(load);
    }

    /// Gives the blocks [saved, complete) to the worker halves. The first time from the start: what host memory has is
    /// told by key and not copied, and what it lost comes back.
    pub(super) fn save(&mut self, id: u64, request: &mut Request, complete: usize) {
        let complete = complete.min(request.pages.iter().map(Vec::len).min().unwrap_or(0));
        // What a window has left cannot be saved any more; the daemon knows whether it has it.
        let is_absent = |block: &usize| request.pages.iter().any(|group| group[*block] < 0);
        let (saved, end) = (request.saved, complete);
        let first = (saved..end).rev().find(is_absent).map_or(saved, |absent| absent + 1);
        if first >= end {
            return;
        }
        let keys = request.keys.keys();
        self.next.saves.push(Save {
            request_id: id,
            namespace: request.keys.namespace().0.to_vec(),
            keys: pack(&keys[first..end]),
            parent: first.checked_sub(1).map_or_else(Vec::new, |before| keys[before].0.to_vec()),
            pages: request.pages.iter().map(|group| Pages { pages: group[first..end].to_vec() }).collect(),
            priorities: request.priorities(first..end),
        });
        request.saved = end;
        request.saves_given = true;
        self.counts.blocks_to_save += (end - first) as u64;
    }
}

/// 16 bytes each.
fn pack(keys: &[SequenceHash]) -> Vec<u8> {
    let mut packed = Vec::with_capacity(keys.len() * 16);
    keys.iter().for_each(|key| packed.extend_from_slice(&key.0));
    packed
}
