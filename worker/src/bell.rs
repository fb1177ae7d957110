//! Wakes the engine's thread when there is something to do.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Rung by whoever has news for the engine's loop. Clones ring the same bell.
#[derive(Clone, Default)]
pub struct Bell(Arc<(Mutex<Rung>, Condvar)>);

#[derive(Clone, Copy, PartialEq, Eq, Default)]
enum Rung {
    #[default]
    No,
    Yes,
}

impl Bell {
    /// Wakes the waiter, or the next one.
    pub fn ring(&self) {
        *self.0.0.lock() = Rung::Yes;
        self.0.1.notify_one();
    }

    /// Waits until the bell was rung since the last wait, or the time is over.
    pub fn wait(&self, at_most: Duration) {
        let mut rung = self.0.0.lock();
        if *rung == Rung::No {
            self.0.1.wait_for(&mut rung, at_most);
        }
        *rung = Rung::No;
    }
}
