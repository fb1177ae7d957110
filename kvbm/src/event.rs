//! Residency changes, numbered without gaps, kept for a while.

use std::collections::VecDeque;

use kvbm_hash::SequenceHash;
use parking_lot::{Condvar, Mutex};

use crate::ledger::{NamespaceId, PoolId};
use crate::tier::Tier;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// A block became resident.
    Stored {
        /// Its namespace.
        namespace: NamespaceId,
        /// Its key.
        key: SequenceHash,
        /// Key of the block before it.
        parent: Option<SequenceHash>,
    },
    /// A block is no longer resident.
    Removed {
        /// Its namespace.
        namespace: NamespaceId,
        /// Its key.
        key: SequenceHash,
    },
    /// Nothing in the tier (or pool) is resident any more.
    Cleared,
}

/// One change of residency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Where.
    pub tier: Tier,
    /// Which pool, in the device tier.
    pub pool: Option<PoolId>,
    /// What.
    pub kind: EventKind,
}

/// The events asked for are no longer kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EventsGone;

/// A bounded log. The first event has number 1.
#[derive(Debug)]
pub struct EventLog {
    inner: Mutex<Inner>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Inner {
    events: VecDeque<Event>,
    /// Number of the last event ever logged.
    last: u64,
    listener: Option<Box<dyn Waker>>,
}

/// Called, without locks of the caller, whenever events were appended.
trait Waker: Fn() + Send {}
impl<F: Fn() + Send> Waker for F {}

impl std::fmt::Debug for dyn Waker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waker")
    }
}

impl EventLog {
    /// A log of the last `capacity` events.
    pub fn new(capacity: usize) -> Self {
        Self { inner: Mutex::default(), changed: Condvar::new(), capacity: capacity.max(1) }
    }

    pub(crate) fn append(&self, events: &mut Vec<Event>) {
        if events.is_empty() {
            return;
        }
        let mut inner = self.inner.lock();
        inner.last += events.len() as u64;
        inner.events.extend(events.drain(..));
        let surplus = inner.events.len().saturating_sub(self.capacity);
        inner.events.drain(..surplus);
        if let Some(listener) = &inner.listener {
            listener();
        }
        self.changed.notify_all();
    }

    /// So many events happened that are not told one by one: whoever reads them is told that they are gone.
    pub(crate) fn skip(&self, count: u64) {
        let mut inner = self.inner.lock();
        if count == 0 {
            return;
        }
        inner.last += count;
        inner.events.clear();
        if let Some(listener) = &inner.listener {
            listener();
        }
        self.changed.notify_all();
    }

    /// `listener` is called after each append; it must return at once and not call back.
    pub fn listen(&self, listener: impl Fn() + Send + 'static) {
        self.inner.lock().listener = Some(Box::new(listener));
    }

    /// Number of the last event; 0 before the first.
    pub fn last(&self) -> u64 {
        self.inner.lock().last
    }

    /// Up to `max` events behind number `after`, with the number of the first of them.
    pub fn after(&self, after: u64, max: usize) -> Result<(u64, Vec<Event>), EventsGone> {
        let inner = self.inner.lock();
        let first_kept = inner.last + 1 - inner.events.len() as u64;
        let first = after.saturating_add(1);
        if first < first_kept || after > inner.last {
            return Err(EventsGone);
        }
        let skip = usize::try_from(first - first_kept).expect("no more than the events kept");
        Ok((first, inner.events.iter().skip(skip).take(max).copied().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleared() -> Event {
        Event { tier: Tier::Host, pool: None, kind: EventKind::Cleared }
    }

    #[test]
    fn numbers_have_no_gaps_and_old_events_are_reported_gone() {
        let log = EventLog::new(3);
        assert_eq!(log.after(0, 10), Ok((1, vec![])));
        log.append(&mut vec![cleared(); 2]);
        assert_eq!(log.after(0, 10), Ok((1, vec![cleared(); 2])));
        assert_eq!(log.after(1, 10), Ok((2, vec![cleared(); 1])));
        log.append(&mut vec![cleared(); 2]);
        assert_eq!((log.last(), log.after(0, 10)), (4, Err(EventsGone)));
        assert_eq!(log.after(1, 2), Ok((2, vec![cleared(); 2])));
        assert_eq!(log.after(4, 10), Ok((5, vec![])));
        assert_eq!(log.after(5, 10), Err(EventsGone));
        log.skip(10);
        assert_eq!(
            (log.last(), log.after(13, 10), log.after(14, 10)),
            (14, Err(EventsGone), Ok((15, vec![])))
        );
    }
}
