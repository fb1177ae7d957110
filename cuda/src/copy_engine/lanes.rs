//! Batches that wait, in a queue per lane; lanes take turns.

use std::collections::{HashMap, VecDeque};

use super::LaneId;

/// Number of a batch within its engine.
pub(super) type BatchId = u64;

/// Lanes that have a batch waiting, in the order of their turns.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    turns: VecDeque<LaneId>,
    waiting: HashMap<LaneId, VecDeque<BatchId>>,
}

impl Lanes {
    pub fn push(&mut self, lane: LaneId, batch: BatchId) {
        let queue = self.waiting.entry(lane).or_default();
        if queue.is_empty() {
            self.turns.push_back(lane);
        }
        queue.push_back(batch);
    }

    /// The first batch of each lane, those whose turn it is first.
    pub fn heads(&self) -> impl Iterator<Item = (LaneId, BatchId)> {
        self.turns.iter().map(|lane| (*lane, self.waiting[lane][0]))
    }

    /// The lane had its turn; its first batch still waits.
    pub fn turn_taken(&mut self, lane: LaneId) {
        self.turns.retain(|other| *other != lane);
        self.turns.push_back(lane);
    }

    /// The lane's first batch does not wait any more.
    pub fn pop(&mut self, lane: LaneId) {
        self.turn_taken(lane);
        let queue = self.waiting.get_mut(&lane).expect("only lanes with a batch have turns");
        queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&lane);
            self.turns.pop_back();
        }
    }

    /// Takes all that wait in a lane, in order.
    pub fn close(&mut self, lane: LaneId) -> VecDeque<BatchId> {
        self.turns.retain(|other| *other != lane);
        self.waiting.remove(&lane).unwrap_or_default()
    }

    /// Lanes with a batch waiting.
    pub fn ids(&self) -> Vec<LaneId> {
        self.turns.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_take_turns_and_keep_their_order() {
        let mut lanes = Lanes::default();
        for (lane, batch) in [(1, 10), (1, 11), (2, 20), (3, 30), (2, 21)] {
            lanes.push(LaneId(lane), batch);
        }
        let mut order = Vec::new();
        loop {
            let Some((lane, batch)) = lanes.heads().next() else { break };
            order.push(batch);
            lanes.pop(lane);
        }
        assert_eq!(order, [10, 20, 30, 11, 21]);
        assert!(lanes.ids().is_empty());
    }

    #[test]
    fn a_batch_in_pieces_lets_others_have_their_turn() {
        let mut lanes = Lanes::default();
        lanes.push(LaneId(1), 10);
        lanes.push(LaneId(2), 20);
        lanes.turn_taken(LaneId(1));
        assert_eq!(lanes.heads().collect::<Vec<_>>(), [(LaneId(2), 20), (LaneId(1), 10)]);
        lanes.push(LaneId(1), 11);
        assert_eq!(lanes.close(LaneId(1)), [10, 11]);
        assert_eq!((lanes.close(LaneId(9)).len(), lanes.ids()), (0, vec![LaneId(2)]));
    }
}
