//! Lets onboard go before offload.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How long an offload waits for onboards before it copies one more block anyway.
const YIELD_MAX: Duration = Duration::from_millis(2);

/// Counts urgent batches in flight.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Only a hint for who looks without the lock; changed under it.
    urgent: AtomicUsize,
    lock: Mutex<()>,
    idle: Condvar,
}

impl Gate {
    pub fn enter(&self) {
        let _lock = self.lock.lock();
        self.urgent.fetch_add(1, Ordering::Relaxed);
    }

    pub fn leave(&self) {
        let _lock = self.lock.lock();
        if self.urgent.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.idle.notify_all();
        }
    }

    /// Returns when nothing urgent is in flight, or after a short while.
    pub fn give_way(&self) {
        if self.urgent.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut lock = self.lock.lock();
        if self.urgent.load(Ordering::Relaxed) > 0 {
            self.idle.wait_for(&mut lock, YIELD_MAX);
        }
    }
}
