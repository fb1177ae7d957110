//! Recorded steps that only decode.
//!
//! A recording holds for one number of rows, one division of keys and one pool: few numbers are recorded, and batches in
//! between are filled up with rows that nobody asked for. What changes from step to step is in the lists, at the same
//! places.

use std::collections::HashMap;

use kvbm_cuda::{Graph, Stream};

use crate::Result;

/// Numbers of rows that are recorded; larger batches are issued kernel by kernel, which they outweigh.
const SIZES: [usize; 12] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256];

/// What a recording holds for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub rows: usize,
    /// Parts of a sequence's keys.
    pub splits: usize,
    /// Where block 0 is: addresses are recorded.
    pub pool: u64,
}

/// See the module.
pub(super) struct Graphs {
    rows_max: usize,
    /// `None`: came once. The first time, libraries load what they need, which cannot be recorded.
    known: HashMap<Key, Option<Graph>>,
}

/// What is to be done with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Advice {
    /// Issue the kernels.
    Issue,
    /// Record them, and launch the recording.
    Record,
    /// Launch the recording.
    Launch,
}

impl Graphs {
    /// For engines of at most `sequences` sequences.
    pub fn new(sequences: usize) -> Self {
        Self { rows_max: sequences, known: HashMap::new() }
    }

    /// To how many rows a batch that only decodes is filled up.
    pub fn rows_for(&self, rows: usize) -> usize {
        SIZES.into_iter().find(|size| *size >= rows && *size <= self.rows_max).unwrap_or(rows)
    }

    /// What to do with a step that comes now.
    pub fn advise(&mut self, key: Key) -> Advice {
        if !SIZES.contains(&key.rows) {
            return Advice::Issue;
        }
        match self.known.get(&key) {
            None => {
                self.known.insert(key, None);
                Advice::Issue
            }
            Some(None) => Advice::Record,
            Some(Some(_)) => Advice::Launch,
        }
    }

    /// Keeps a recording.
    pub fn keep(&mut self, key: Key, graph: Graph) {
        self.known.insert(key, Some(graph));
    }

    /// Launches a recording.
    ///
    /// # Safety
    /// What was promised when it was recorded still holds.
    pub unsafe fn launch(&mut self, key: Key, stream: &Stream) -> Result<()> {
        let graph = self.known.get_mut(&key).and_then(Option::as_mut).expect("it was kept");
        // SAFETY: the caller's promise.
        Ok(unsafe { graph.launch(stream) }?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_are_filled_up_to_sizes_within_the_limit() {
        let graphs = Graphs::new(20);
        assert_eq!([1, 3, 9, 16].map(|rows| graphs.rows_for(rows)), [1, 4, 16, 16]);
        assert_eq!([17, 20].map(|rows| graphs.rows_for(rows)), [17, 20]);
        assert_eq!(Graphs::new(4096).rows_for(300), 300);
    }

    #[test]
    fn the_second_time_is_recorded() {
        let mut graphs = Graphs::new(64);
        let key = Key { rows: 8, splits: 2, pool: 0x1000 };
        let odd = Key { rows: 17, ..key };
        assert_eq!(graphs.advise(key), Advice::Issue);
        assert_eq!(graphs.advise(Key { splits: 4, ..key }), Advice::Issue);
        assert_eq!(graphs.advise(Key { pool: 0x2000, ..key }), Advice::Issue);
        assert_eq!(graphs.advise(key), Advice::Record);
        assert_eq!([graphs.advise(odd), graphs.advise(odd)], [Advice::Issue, Advice::Issue]);
    }
}
