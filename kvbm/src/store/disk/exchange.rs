//! Hands I/Os to an engine and waits for what comes of them.

use std::sync::mpsc::{Receiver, sync_channel};

use super::super::disk_io::{DiskIo, Io, IoBatch, IoFailure};

/// What came of an I/O.
pub type IoResult = Result<(), IoFailure>;

/// I/Os that an engine has, or had no room for. They are not waited for when this is dropped: their buffers live as long
/// as they need them.
#[derive(Debug)]
#[must_use]
pub struct Started {
    count: usize,
    state: State,
}

#[derive(Debug)]
enum State {
    Accepted(Receiver<Vec<IoResult>>),
    NoRoom(Vec<Io>),
}

impl Started {
    /// Hands over a batch. Never blocks.
    pub fn new(engine: &dyn DiskIo, ios: Vec<Io>) -> Self {
        let count = ios.len();
        let (sender, results) = sync_channel(1);
        // Whoever gave up waiting does not want to know.
        let finished = Box::new(move |ended| drop(sender.send(ended)));
        let state = match engine.submit(IoBatch { ios, finished }) {
            Ok(()) => State::Accepted(results),
            Err(refused) => State::NoRoom(refused.ios),
        };
        Self { count, state }
    }

    /// Waits until all have ended. What there was no room for is tried in smaller parts, one after the other; a single
    /// I/O without room is abandoned.
    pub fn wait(self, engine: &dyn DiskIo) -> Vec<IoResult> {
        let abandoned = || vec![Err(IoFailure::Abandoned); self.count];
        match self.state {
            State::Accepted(results) => match results.recv() {
                Ok(results) if results.len() == self.count => results,
                // An engine that forgets a batch or miscounts has not done it, as far as anybody can tell.
                Ok(_) | Err(_) => abandoned(),
            },
            State::NoRoom(ios) if ios.len() <= 1 => abandoned(),
            State::NoRoom(mut first) => {
                let second = first.split_off(first.len() / 2);
                let mut results = carry_out(engine, first);
                results.extend(carry_out(engine, second));
                results
            }
        }
    }
}

/// Hands over a batch and waits until all of it has ended.
pub fn carry_out(engine: &dyn DiskIo, ios: Vec<Io>) -> Vec<IoResult> {
    if ios.is_empty() {
        return Vec::new();
    }
    Started::new(engine, ios).wait(engine)
}

/// The first failure, with the position of its I/O.
pub fn first_failure(results: &[IoResult]) -> Result<(), (usize, IoFailure)> {
    match results.iter().enumerate().find_map(|(at, result)| result.err().map(|failure| (at, failure))) {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}
