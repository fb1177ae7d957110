//! What waits and what is with the kernel: the book-keeping that all engines share.
//!
//! ```text
//!   accept ──► reads ──┐
//!          ──► syncs ──┼── start ──► in flight ── end ──► ended, once the last I/O of the batch did
//!          ──► writes ─┘   (reads first)
//!          ──► held: syncs whose batch has writes that did not end yet; then they go to syncs
//! ```
//!
//! Invariant: an I/O of an accepted batch is in exactly one of these places until it ends, and a batch ends with its last
//! I/O. No lock, no clock and no I/O here: an engine keeps a backlog behind its mutex and tells it the time.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use super::{Finished, Io, IoBatch, IoFailure, IoLoad, IoOptions};

/// What came of one I/O.
pub(super) type IoResult = Result<(), IoFailure>;

/// See the header.
pub(super) struct Backlog {
    batches: HashMap<u64, Batch>,
    batches_ever_count: u64,
    reads: VecDeque<Ticket>,
    syncs: VecDeque<Ticket>,
    writes: VecDeque<Ticket>,
    held_count: usize,
    /// Number of elements: the depth.
    flights: Vec<Option<Flight>>,
    slots_free: Vec<usize>,
    bytes_in_flight: usize,
    bytes_in_flight_max: usize,
    waiting_reads_max: usize,
    waiting_writes_max: usize,
    /// Batches that ended without the kernel: nobody has called them back yet.
    ended: Vec<Ended>,
    closed: bool,
}

/// Names one I/O of an accepted batch.
#[derive(Debug, Clone, Copy)]
struct Ticket {
    batch: u64,
    index: usize,
}

#[derive(Debug)]
struct Flight {
    ticket: Ticket,
    started: Instant,
    bytes: usize,
}

struct Batch {
    ios: Vec<Io>,
    results: Vec<IoResult>,
    left_count: usize,
    writes_left_count: usize,
    /// Its syncs, as long as it has writes that did not end.
    held: Vec<usize>,
    finished: Finished,
}

/// An I/O for the kernel. The memory that it names must not be let go before the kernel is done with it.
#[derive(Debug)]
pub(super) struct Started {
    /// Where to say that it ended; below the depth.
    pub slot: usize,
    pub io: Io,
}

/// A batch whose I/Os have all ended.
pub(super) struct Ended {
    finished: Finished,
    results: Vec<IoResult>,
}

impl Ended {
    /// Tells whoever handed it in. Not to be called with a lock held.
    pub fn call(self) {
        let Self { finished, results } = self;
        // Whoever is told may have a bug; the batches of others must still end.
        if catch_unwind(AssertUnwindSafe(|| finished(results))).is_err() {
            tracing::error!("what was to follow a disk i/o panicked");
        }
    }
}

impl Backlog {
    /// Nothing waits; at most `depth` I/Os will be with the kernel.
    pub fn new(depth: usize, options: &IoOptions) -> Self {
        Self {
            batches: HashMap::new(),
            batches_ever_count: 0,
            reads: VecDeque::new(),
            syncs: VecDeque::new(),
            writes: VecDeque::new(),
            held_count: 0,
            flights: (0..depth).map(|_| None).collect(),
            slots_free: (0..depth).rev().collect(),
            bytes_in_flight: 0,
            bytes_in_flight_max: options.bytes_in_flight_max,
            waiting_reads_max: options.waiting_reads_max,
            waiting_writes_max: options.waiting_writes_max,
            ended: Vec::new(),
            closed: false,
        }
    }

    /// Takes the batch, or gives it back. A batch longer than the queue is taken when the queue is empty: with every
    /// queue at length 1 everything still works.
    pub fn accept(&mut self, batch: IoBatch) -> Result<(), IoBatch> {
        let reads = batch.ios.iter().filter(|io| matches!(io, Io::Read { .. })).count();
        let writes = batch.ios.iter().filter(|io| matches!(io, Io::Write { .. })).count();
        let others = batch.ios.len() - reads;
        let fits = |new: usize, waiting: usize, max: usize| new == 0 || waiting == 0 || waiting + new <= max;
        let room = fits(reads, self.reads.len(), self.waiting_reads_max)
            && fits(others, self.waiting_writes_count(), self.waiting_writes_max);
        if self.closed || !room {
            return Err(batch);
        }
        let IoBatch { ios, finished } = batch;
        if ios.is_empty() {
            self.ended.push(Ended { finished, results: Vec::new() });
            return Ok(());
        }
        let id = self.batches_ever_count;
        self.batches_ever_count += 1;
        let mut held = Vec::new();
        for (index, io) in ios.iter().enumerate() {
            let ticket = Ticket { batch: id, index };
            match io {
                Io::Read { .. } => self.reads.push_back(ticket),
                Io::Write { .. } => self.writes.push_back(ticket),
                Io::Sync { .. } if writes > 0 => held.push(index),
                Io::Sync { .. } => self.syncs.push_back(ticket),
            }
        }
        self.held_count += held.len();
        let results = vec![Ok(()); ios.len()];
        let (left_count, writes_left_count) = (ios.len(), writes);
        self.batches.insert(id, Batch { ios, results, left_count, writes_left_count, held, finished });
        Ok(())
    }

    /// The next I/O for the kernel, if one waits and there is room for it.
    pub fn start(&mut self, now: Instant) -> Option<Started> {
        let ticket = self.next()?;
        let slot = self.slots_free.pop()?;
        for queue in [&mut self.reads, &mut self.syncs, &mut self.writes] {
            if queue.pop_front().is_some() {
                break;
            }
        }
        let io = self.io(ticket).clone();
        let bytes = io.bytes();
        self.bytes_in_flight += bytes;
        self.flights[slot] = Some(Flight { ticket, started: now, bytes });
        Some(Started { slot, io })
    }

    /// True if [`Backlog::start`] would give something.
    pub fn can_start(&self) -> bool {
        !self.slots_free.is_empty() && self.next().is_some()
    }

    /// The first in line, if its bytes may be in flight now. One that is larger than all that may be in flight goes alone.
    fn next(&self) -> Option<Ticket> {
        let first =
            [&self.reads, &self.syncs, &self.writes].into_iter().find_map(VecDeque::front).copied()?;
        let bytes = self.io(first).bytes();
        let room = self.bytes_in_flight == 0 || self.bytes_in_flight + bytes <= self.bytes_in_flight_max;
        room.then_some(first)
    }

    fn io(&self, ticket: Ticket) -> &Io {
        &self.batches[&ticket.batch].ios[ticket.index]
    }

    /// The kernel is done with what was started in this slot. Gives the batch, if this was the last of it.
    pub fn end(&mut self, slot: usize, result: IoResult) -> Option<Ended> {
        let flight = self.flights[slot].take().expect("only what was started ends");
        self.slots_free.push(slot);
        self.bytes_in_flight -= flight.bytes;
        self.settle(flight.ticket, result)
    }

    fn settle(&mut self, Ticket { batch: id, index }: Ticket, result: IoResult) -> Option<Ended> {
        let batch = self.batches.get_mut(&id).expect("a batch stays until its last I/O ended");
        batch.results[index] = result;
        batch.left_count -= 1;
        if matches!(batch.ios[index], Io::Write { .. }) {
            batch.writes_left_count -= 1;
            if batch.writes_left_count == 0 {
                self.held_count -= batch.held.len();
                self.syncs.extend(batch.held.drain(..).map(|index| Ticket { batch: id, index }));
            }
        }
        if batch.left_count > 0 {
            return None;
        }
        let Batch { finished, results, .. } = self.batches.remove(&id)?;
        Some(Ended { finished, results })
    }

    /// Ends all that waits. Batches that are over by that are for [`Backlog::take_ended`].
    pub fn abandon_waiting(&mut self) {
        let mut given_up: Vec<Ticket> = Vec::new();
        // Before the writes, whose end would let them go.
        for (&batch, held) in self.batches.iter_mut().map(|(id, batch)| (id, &mut batch.held)) {
            given_up.extend(held.drain(..).map(|index| Ticket { batch, index }));
        }
        self.held_count = 0;
        for queue in [&mut self.reads, &mut self.syncs, &mut self.writes] {
            given_up.extend(queue.drain(..));
        }
        for ticket in given_up {
            if let Some(ended) = self.settle(ticket, Err(IoFailure::Abandoned)) {
                self.ended.push(ended);
            }
        }
    }

    /// Batches that ended without the kernel, to be called back.
    pub fn take_ended(&mut self) -> Vec<Ended> {
        std::mem::take(&mut self.ended)
    }

    /// True if [`Backlog::take_ended`] would give something.
    pub fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Accepts nothing more.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Closed, and nothing is left to be done.
    pub fn is_over(&self) -> bool {
        self.closed && self.batches.is_empty() && self.ended.is_empty()
    }

    /// What is going on.
    pub fn load(&self, now: Instant, deadline: Duration) -> IoLoad {
        let ages = self.flights.iter().flatten().map(|flight| now.saturating_duration_since(flight.started));
        IoLoad {
            in_flight: self.flights.len() - self.slots_free.len(),
            bytes_in_flight: self.bytes_in_flight,
            waiting: self.reads.len() + self.waiting_writes_count(),
            overdue: ages.clone().filter(|age| *age > deadline).count(),
            oldest: ages.max().unwrap_or_default(),
        }
    }

    fn waiting_writes_count(&self) -> usize {
        self.writes.len() + self.syncs.len() + self.held_count
    }
}

#[cfg(test)]
mod tests;
