//! One direction of a GPU as the executor sees it.

use super::CopyMemory;
use super::device::CopyDevice;
use crate::{BatchCopier, Context, Driver, Error, Event, RawCopy, Stream};

/// The streams of one direction, and marks that were used before.
#[derive(Debug)]
pub(super) struct CudaDevice {
    context: Context,
    /// They take turns.
    streams: Vec<Stream>,
    turn: usize,
    copier: BatchCopier,
    spare: Vec<Event>,
}

impl CudaDevice {
    /// With so many streams.
    pub fn new(driver: &Driver, context: &Context, streams: usize) -> Result<Self, Error> {
        Ok(Self {
            context: context.clone(),
            streams: (0..streams.max(1)).map(|_| Stream::new(context)).collect::<Result<_, _>>()?,
            turn: 0,
            copier: BatchCopier::new(driver),
            spare: Vec::new(),
        })
    }
}

impl CopyDevice for CudaDevice {
    type Mark = Event;

    fn reaches(memory: &CopyMemory) -> bool {
        match memory {
            CopyMemory::Device(_) | CopyMemory::Registered(_) => true,
            CopyMemory::Shared(_) => false,
        }
    }

    unsafe fn issue(&mut self, copies: &[RawCopy]) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.copier.copy(&self.streams[self.turn], copies) }
    }

    fn mark(&mut self) -> Result<Event, Error> {
        let event = match self.spare.pop() {
            Some(event) => event,
            None => Event::new(&self.context)?,
        };
        event.record(&self.streams[self.turn])?;
        // What is marked is done with; the next piece need not wait for it.
        self.turn = (self.turn + 1) % self.streams.len();
        Ok(event)
    }

    fn is_reached(&mut self, mark: &Event) -> Result<bool, Error> {
        mark.is_reached()
    }

    fn recycle(&mut self, mark: Event) {
        self.spare.push(mark);
    }

    fn finish(&mut self) {
        for stream in &self.streams {
            if let Err(error) = stream.synchronize() {
                tracing::warn!(gpu = %self.context.device().uuid, %error, "copies of a GPU ended with an error");
            }
        }
    }
}
