//! A queue that can be full.

use std::collections::VecDeque;

use parking_lot::{Condvar, Mutex};

/// First in, first out, at most `capacity` waiting.
#[derive(Debug)]
pub(crate) struct BoundedQueue<T> {
    inner: Mutex<Inner<T>>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Debug)]
struct Inner<T> {
    waiting: VecDeque<T>,
    /// Taken, but not finished.
    running: usize,
    closed: bool,
}

impl<T> BoundedQueue<T> {
    pub fn new(capacity: usize) -> Self {
        let inner = Inner { waiting: VecDeque::new(), running: 0, closed: false };
        Self { inner: Mutex::new(inner), changed: Condvar::new(), capacity: capacity.max(1) }
    }

    /// True if [`BoundedQueue::push`] would succeed now.
    pub fn has_room(&self) -> bool {
        let inner = self.inner.lock();
        !inner.closed && inner.waiting.len() < self.capacity
    }

    /// Gives the item back when the queue is full or closed.
    pub fn push(&self, item: T) -> Result<(), T> {
        let mut inner = self.inner.lock();
        if inner.closed || inner.waiting.len() >= self.capacity {
            return Err(item);
        }
        inner.waiting.push_back(item);
        self.changed.notify_one();
        Ok(())
    }

    /// Waits for the next item; `None` once the queue is closed and empty. Each is to be followed by `finished`.
    pub fn next(&self) -> Option<T> {
        let mut inner = self.inner.lock();
        loop {
            if let Some(item) = inner.waiting.pop_front() {
                inner.running += 1;
                return Some(item);
            }
            if inner.closed {
                return None;
            }
            self.changed.wait(&mut inner);
        }
    }

    /// An item taken with `next` is done with.
    pub fn finished(&self) {
        self.inner.lock().running -= 1;
    }

    /// No more pushes. What waits is still worked off.
    pub fn close(&self) {
        self.inner.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waiting and running.
    pub fn len(&self) -> usize {
        let inner = self.inner.lock();
        inner.waiting.len() + inner.running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_is_an_answer_and_closing_works_off_what_waits() {
        let queue = BoundedQueue::new(1);
        assert_eq!(queue.push(1), Ok(()));
        assert_eq!((queue.push(2), queue.has_room()), (Err(2), false));
        queue.close();
        assert_eq!((queue.next(), queue.len()), (Some(1), 1));
        queue.finished();
        assert_eq!((queue.next(), queue.len(), queue.push(3)), (None, 0, Err(3)));
    }
}
