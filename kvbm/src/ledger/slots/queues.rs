//! Which queues of the policy anybody waits in.

use std::collections::BTreeMap;

use super::GroupId;
use crate::ledger::policy::QueueId;

/// The queue of a group's blocks of one priority. Queues of a lower priority come first.
pub(super) fn queue_of(group: GroupId, priority: u8) -> QueueId {
    QueueId(u16::from(priority) * GroupId::END + group.0)
}

pub(super) fn group_of(queue: QueueId) -> GroupId {
    GroupId(queue.0 % GroupId::END)
}

pub(super) fn priority_of(queue: QueueId) -> u8 {
    (queue.0 / GroupId::END) as u8
}

/// Blocks that wait, by queue. Mostly there is one, or a few.
#[derive(Debug, Default)]
pub(super) struct Queues(BTreeMap<QueueId, usize>);

impl Queues {
    pub fn enter(&mut self, queue: QueueId) {
        *self.0.entry(queue).or_default() += 1;
    }

    pub fn leave(&mut self, queue: QueueId) {
        if let Some(count) = self.0.get_mut(&queue) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&queue);
            }
        }
    }

    /// Those in which somebody waits, lowest priority first.
    pub fn iter(&self) -> impl Iterator<Item = QueueId> + '_ {
        self.0.keys().copied()
    }

    /// The first queue, if there is no other of its priority.
    pub fn only_lowest(&self) -> Option<QueueId> {
        let mut queues = self.iter();
        let first = queues.next()?;
        queues.next().is_none_or(|second| priority_of(second) > priority_of(first)).then_some(first)
    }

    pub fn counts(&self) -> &BTreeMap<QueueId, usize> {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_of_all_groups_and_priorities_are_told_apart_in_order_of_priority() {
        for (group, priority) in [(0, 0), (511, 0), (0, 1), (3, 35), (511, 100)] {
            let queue = queue_of(GroupId(group), priority);
            assert_eq!((group_of(queue), priority_of(queue)), (GroupId(group), priority));
        }
        assert!(queue_of(GroupId(511), 34) < queue_of(GroupId(0), 35));
    }
}
