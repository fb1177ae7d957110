//! Ends of work in the order in which it was planned, whoever finishes first.

use std::collections::BTreeMap;

use parking_lot::Mutex;

/// Items are numbered from 0 without gaps.
#[derive(Debug)]
pub(crate) struct InOrder<T>(Mutex<Inner<T>>);

#[derive(Debug)]
struct Inner<T> {
    next: u64,
    early: BTreeMap<u64, T>,
}

impl<T> Default for InOrder<T> {
    fn default() -> Self {
        Self(Mutex::new(Inner { next: 0, early: BTreeMap::new() }))
    }
}

impl<T> InOrder<T> {
    /// Number `number` has ended. `settle` is called for every item whose turn has come, one after the other, on
    /// whichever thread closes the gap.
    pub fn ended(&self, number: u64, item: T, mut settle: impl FnMut(T)) {
        let mut inner = self.0.lock();
        let doubled = inner.early.insert(number, item);
        assert!(doubled.is_none() && number >= inner.next, "each number ends once");
        loop {
            let next = inner.next;
            let Some(item) = inner.early.remove(&next) else { return };
            inner.next += 1;
            settle(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_settled_in_the_order_of_their_numbers() {
        let order = InOrder::default();
        let mut settled = Vec::new();
        for number in [2, 0, 3, 1, 4] {
            order.ended(number, number, |item| settled.push(item));
        }
        assert_eq!(settled, [0, 1, 2, 3, 4]);
    }
}
