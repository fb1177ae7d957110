//! Loads under way, by the question that asked for them, so that their targets can be had back.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::ledger::SessionId;

/// A question of a session.
pub(in crate::manager) type Question = (SessionId, u64);

#[derive(Default)]
struct Flight {
    cancelled: Arc<AtomicBool>,
    /// Told when nothing more is written to its targets.
    drained: Vec<Box<dyn FnOnce() + Send>>,
}

/// All of them.
#[derive(Default)]
pub(in crate::manager) struct Flights(Mutex<HashMap<Question, Flight>>);

impl Flights {
    /// A load begins. Says later whether it is still wanted.
    pub fn begin(&self, question: Question) -> Arc<AtomicBool> {
        let mut flights = self.0.lock();
        Arc::clone(&flights.entry(question).or_default().cancelled)
    }

    /// Nothing more is written to its targets, and whoever asked for it has been told.
    pub fn end(&self, question: Question) {
        let flight = self.0.lock().remove(&question);
        flight.into_iter().flat_map(|flight| flight.drained).for_each(|drained| drained());
    }

    /// The targets are wanted back. False, and `drained` is not kept, if there is nothing to wait for.
    pub fn cancel(&self, question: Question, drained: Box<dyn FnOnce() + Send>) -> bool {
        let mut flights = self.0.lock();
        let Some(flight) = flights.get_mut(&question) else { return false };
        flight.cancelled.store(true, Ordering::SeqCst);
        flight.drained.push(drained);
        true
    }
}
