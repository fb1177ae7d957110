//! A GPU as the executor sees it.

use super::device::CopyDevice;
use super::{CopyMemory, Direction};
use crate::{BatchCopier, Context, Driver, Error, Event, RawCopy, Stream};

/// Streams of both directions, and marks that were used before.
#[derive(Debug)]
pub(super) struct CudaDevice {
    context: Context,
    onboard: Streams,
    offload: Streams,
    copier: BatchCopier,
    spare: Vec<Event>,
}

/// Streams that take turns.
#[derive(Debug)]
struct Streams {
    streams: Vec<Stream>,
    turn: usize,
}

impl Streams {
    fn new(context: &Context, count: usize) -> Result<Self, Error> {
        let streams = (0..count.max(1)).map(|_| Stream::new(context)).collect::<Result<_, _>>()?;
        Ok(Self { streams, turn: 0 })
    }

    fn current(&self) -> &Stream {
        &self.streams[self.turn]
    }
}

impl CudaDevice {
    /// With so many streams for each direction.
    pub fn new(driver: &Driver, context: &Context, streams: usize) -> Result<Self, Error> {
        Ok(Self {
            context: context.clone(),
            onboard: Streams::new(context, streams)?,
            offload: Streams::new(context, streams)?,
            copier: BatchCopier::new(driver),
            spare: Vec::new(),
        })
    }

    fn streams(&mut self, direction: Direction) -> &mut Streams {
        match direction {
            Direction::Onboard => &mut self.onboard,
            Direction::Offload => &mut self.offload,
        }
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

    unsafe fn issue(&mut self, direction: Direction, copies: &[RawCopy]) -> Result<(), Error> {
        let streams = match direction {
            Direction::Onboard => &self.onboard,
            Direction::Offload => &self.offload,
        };
        // SAFETY: the caller's promise.
        unsafe { self.copier.copy(streams.current(), copies) }
    }

    fn mark(&mut self, direction: Direction) -> Result<Event, Error> {
        let event = match self.spare.pop() {
            Some(event) => event,
            None => Event::new(&self.context)?,
        };
        let streams = self.streams(direction);
        event.record(streams.current())?;
        // What is marked is done with; the next piece need not wait for it.
        streams.turn = (streams.turn + 1) % streams.streams.len();
        Ok(event)
    }

    fn is_reached(&mut self, mark: &Event) -> Result<bool, Error> {
        mark.is_reached()
    }

    fn recycle(&mut self, mark: Event) {
        self.spare.push(mark);
    }

    fn finish(&mut self) {
        for stream in self.onboard.streams.iter().chain(&self.offload.streams) {
            if let Err(error) = stream.synchronize() {
                tracing::warn!(gpu = %self.context.device().uuid, %error, "copies of a GPU ended with an error");
            }
        }
    }
}
