//! The same copies straight through the driver: what the engine is measured against.

use std::time::{Duration, Instant};

use super::{CopyBatch, Direction};
use crate::{BatchCopier, BatchForm, Context, Driver, Error, Stream};

/// How copies are issued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawMethod {
    /// One call for each copy.
    Loop,
    /// One call for all copies of a batch, in the best form that the driver has.
    Batch,
}

/// Issues batches and waits, with nothing in between: no queues, no limits, no order, no callbacks.
#[derive(Debug)]
pub struct RawCopies {
    streams: [Stream; 2],
    single: BatchCopier,
    batched: BatchCopier,
}

impl RawCopies {
    /// A stream for each direction.
    pub fn new(driver: &Driver, context: &Context) -> Result<Self, Error> {
        let single = BatchCopier::with_form(driver, BatchForm::Loop);
        Ok(Self {
            streams: [Stream::new(context)?, Stream::new(context)?],
            single: single.expect("every driver copies one by one"),
            batched: BatchCopier::new(driver),
        })
    }

    /// Copies all of it, both directions at once, and returns the time from the first call to the last byte.
    ///
    /// The batches' callbacks are not called, and their fences not awaited.
    pub fn run(&mut self, method: RawMethod, batches: &[CopyBatch]) -> Result<Duration, Error> {
        let started = Instant::now();
        let issued = batches.iter().try_for_each(|batch| {
            let stream = match batch.direction {
                Direction::Onboard => &self.streams[0],
                Direction::Offload => &self.streams[1],
            };
            let copier = match method {
                RawMethod::Loop => &mut self.single,
                RawMethod::Batch => &mut self.batched,
            };
            // SAFETY: the batch holds what its copies were checked against, and is borrowed until all have ended.
            unsafe { copier.copy(stream, &batch.copies) }
        });
        // Also after an error: nothing may be under way when the batches are given back.
        let ended = self.streams.each_ref().map(Stream::synchronize);
        let took = started.elapsed();
        issued?;
        ended.into_iter().try_for_each(|ended| ended)?;
        Ok(took)
    }
}
