//! Lets onboard go before offload.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// How long an offload waits for onboards before it copies one more block anyway.
const YIELD_MAX: Duration = Duration::from_millis(2);

/// Counts urgent batches in flight.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    urgent: Mutex<usize>,
    idle: Condvar,
}

impl Gate {
    pub fn enter(&self) {
        *self.urgent.lock() += 1;
    }

    pub fn leave(&self) {
        let mut urgent = self.urgent.lock();
        *urgent -= 1;
        if *urgent == 0 {
            self.idle.notify_all();
        }
    }

    /// Returns when nothing urgent is in flight, or after a short while.
    pub fn give_way(&self) {
        let mut urgent = self.urgent.lock();
        if *urgent > 0 {
            self.idle.wait_for(&mut urgent, YIELD_MAX);
        }
    }
}
