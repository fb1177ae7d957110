//! The thread that owns the ring.
//!
//! Invariant: it sleeps only in the kernel, and only after it said so under the lock and found nothing that it could do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_shm::SharedMemory;
use rustix::io::Errno;

use super::Shared;
use super::ring::{Completed, Ring};
use crate::store::disk_io::backlog::{Ended, IoResult, Started};
use crate::store::disk_io::engine::is_transient;
use crate::store::disk_io::{IoFailure, Overdue};

/// Between two attempts at an I/O that the kernel did not want now.
const RETRY_AFTER: Duration = Duration::from_millis(1);

/// See the header.
pub(super) struct Owner {
    ring: Ring,
    shared: Arc<Shared>,
    /// By slot: what is with the kernel.
    flights: Vec<Option<Flight>>,
    /// To be handed to the kernel once more.
    again: Vec<Started>,
}

#[derive(Debug, Clone, Copy)]
struct Flight {
    started: Instant,
    cancelled: bool,
}

/// What one look at the inbox gave.
#[derive(Default)]
struct Turn {
    ended: Vec<Ended>,
    started: Vec<Started>,
    memories: Vec<Arc<SharedMemory>>,
    over: bool,
}

impl Owner {
    pub fn new(ring: Ring, shared: Arc<Shared>) -> Self {
        let flights = vec![None; ring.depth()];
        Self { ring, shared, flights, again: Vec::new() }
    }

    /// Returns when the engine was closed and everything accepted has ended.
    pub fn run(mut self) {
        loop {
            let again = std::mem::take(&mut self.again);
            let now = Instant::now();
            let done = self.collect(now);
            let turn = self.turn(done, now);
            if turn.over {
                return self.ring.stop();
            }
            if !turn.memories.is_empty() {
                self.register(&turn.memories);
            }
            self.cancel_overdue(now);
            for Started { slot, io } in again.into_iter().chain(turn.started) {
                self.ring.start(slot, io);
            }
            if turn.ended.is_empty() {
                self.ring.submit_and_wait(self.patience(now));
            } else {
                // The drive works while those who waited are told.
                self.ring.submit();
                turn.ended.into_iter().for_each(Ended::call);
            }
        }
    }

    /// What the kernel is done with.
    fn collect(&mut self, now: Instant) -> Vec<(usize, IoResult)> {
        let mut done = Vec::new();
        while let Some(Completed { slot, io, result }) = self.ring.completed() {
            let flight = self.flights[slot].expect("only what was started completes");
            let outcome = match usize::try_from(result) {
                Ok(moved) if moved == io.bytes() => Ok(()),
                Ok(moved) => Err(IoFailure::Short { moved, wanted: io.bytes() }),
                Err(_) => {
                    let code = -result;
                    let given_up = is_transient(code) || code == Errno::CANCELED.raw_os_error();
                    if flight.cancelled && given_up {
                        Err(IoFailure::TimedOut)
                    } else if is_transient(code) && now - flight.started <= self.shared.deadline {
                        self.again.push(Started { slot, io });
                        continue;
                    } else if is_transient(code) {
                        Err(IoFailure::TimedOut)
                    } else {
                        Err(IoFailure::Os(code))
                    }
                }
            };
            self.flights[slot] = None;
            done.push((slot, outcome));
        }
        done
    }

    /// The one place where the inbox is looked at.
    fn turn(&mut self, done: Vec<(usize, IoResult)>, now: Instant) -> Turn {
        let mut turn = Turn::default();
        let mut inbox = self.shared.inbox.lock();
        for (slot, result) in done {
            turn.ended.extend(inbox.backlog.end(slot, result));
        }
        turn.ended.extend(inbox.backlog.take_ended());
        turn.memories = std::mem::take(&mut inbox.memories);
        while let Some(started) = inbox.backlog.start(now) {
            self.flights[started.slot] = Some(Flight { started: now, cancelled: false });
            turn.started.push(started);
        }
        turn.over = turn.ended.is_empty() && inbox.backlog.is_over();
        // Whoever is told may submit: then there is another turn before the sleep.
        inbox.asleep = turn.ended.is_empty();
        turn
    }

    fn register(&mut self, memories: &[Arc<SharedMemory>]) {
        for memory in memories {
            self.ring.register(memory);
        }
        self.shared.inbox.lock().registered_count = self.ring.registered_count();
    }

    fn cancel_overdue(&mut self, now: Instant) {
        if self.shared.overdue == Overdue::Wait {
            return;
        }
        for (slot, flight) in self.flights.iter_mut().enumerate() {
            let Some(flight) = flight else { continue };
            if !flight.cancelled && now - flight.started > self.shared.deadline {
                flight.cancelled = true;
                self.ring.cancel(slot);
            }
        }
    }

    /// How long the sleep may be: until the next I/O becomes overdue, or is tried again.
    fn patience(&self, now: Instant) -> Option<Duration> {
        let retry = (!self.again.is_empty()).then_some(RETRY_AFTER);
        if self.shared.overdue == Overdue::Wait {
            return retry;
        }
        let waited_for = self.flights.iter().flatten().filter(|flight| !flight.cancelled);
        let oldest = waited_for.map(|flight| flight.started).min();
        // A little more, so that it is overdue when we look.
        let next = oldest.map(|started| {
            (started + self.shared.deadline).saturating_duration_since(now) + Duration::from_micros(100)
        });
        retry.into_iter().chain(next).min()
    }
}
