//! Shared words in which an engine tells how fast it decodes, so that copies in the background can be paced by it.
//!
//! ```text
//!   0  sequence     odd while the engine changes the words below
//!   8  begun        passes through the model that began, of any kind
//!  16  ended        passes that ended
//!  24  decodes      of these, passes that only decoded
//!  32  decode_ns    time that those took, from begin to end, nanoseconds
//! ```
//!
//! One thread of one engine writes, with plain stores to shared memory and no call to the kernel.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use kvbm_shm::SharedMemory;

/// Bytes that the words take: a line of a cache of their own.
pub const STEP_WORDS_BYTES: usize = 64;

/// How often a reader looks again while the engine is writing.
const READ_TRIES: usize = 16;

/// What a pass did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassKind {
    /// One token for each sequence: comparable with the pass before.
    Decode,
    /// Anything else.
    Other,
}

/// The words, at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepSample {
    /// Passes that began.
    pub begun: u64,
    /// Passes that ended.
    pub ended: u64,
    /// Passes that only decoded, and ended.
    pub decodes: u64,
    /// Time that those took.
    pub decode_time: Duration,
}

/// Where the words are.
#[derive(Debug, Clone)]
pub struct StepWords {
    memory: Arc<SharedMemory>,
    offset: usize,
}

impl StepWords {
    /// At a multiple of 64 bytes. Memory that is all zero is an engine that has not begun.
    pub fn new(memory: Arc<SharedMemory>, offset: usize) -> Self {
        assert!(
            offset.is_multiple_of(STEP_WORDS_BYTES) && offset + STEP_WORDS_BYTES <= memory.bytes(),
            "step words at {offset} of {} bytes",
            memory.bytes()
        );
        Self { memory, offset }
    }

    /// A new engine begins from nothing: whoever wrote before may have died in the middle of a pass.
    pub fn reset(&self) {
        self.change(|words| *words = [0; 4]);
    }

    /// The engine begins a pass.
    pub fn begin(&self) {
        self.change(|words| {
            let [begun, ..] = words;
            *begun += 1;
        });
    }

    /// The pass that began last has ended after so long.
    pub fn end(&self, kind: PassKind, took: Duration) {
        self.change(|[_, ended, decodes, decode_ns]| {
            *ended += 1;
            if kind == PassKind::Decode {
                *decodes += 1;
                *decode_ns += u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
            }
        });
    }

    /// What the engine last wrote; `None` if it was writing all the time, or was killed while it did.
    pub fn read(&self) -> Option<StepSample> {
        (0..READ_TRIES).find_map(|_| {
            let before = self.word(0).load(Ordering::Acquire);
            let [begun, ended, decodes, decode_ns] =
                [1, 2, 3, 4].map(|i| self.word(i).load(Ordering::Relaxed));
            fence(Ordering::Acquire);
            let same = self.word(0).load(Ordering::Relaxed) == before && before.is_multiple_of(2);
            same.then(|| StepSample { begun, ended, decodes, decode_time: Duration::from_nanos(decode_ns) })
        })
    }

    /// True if both are the same words.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory) && self.offset == other.offset
    }

    fn change(&self, change: impl FnOnce(&mut [u64; 4])) {
        let sequence = self.word(0);
        let before = sequence.load(Ordering::Relaxed);
        sequence.store(before | 1, Ordering::Relaxed);
        fence(Ordering::Release);
        let mut words = [1, 2, 3, 4].map(|i| self.word(i).load(Ordering::Relaxed));
        change(&mut words);
        for (i, word) in words.into_iter().enumerate() {
            self.word(i + 1).store(word, Ordering::Relaxed);
        }
        sequence.store((before | 1).wrapping_add(1), Ordering::Release);
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.memory.word64(self.offset + index * 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words() -> StepWords {
        StepWords::new(Arc::new(SharedMemory::create("test", 4096).unwrap()), 128)
    }

    #[test]
    fn passes_are_counted_and_only_decodes_are_timed() {
        let words = words();
        assert_eq!(words.read(), Some(StepSample::default()));
        words.begin();
        words.end(PassKind::Decode, Duration::from_millis(10));
        words.begin();
        words.end(PassKind::Other, Duration::from_millis(300));
        words.begin();
        let sample = words.read().unwrap();
        assert_eq!((sample.begun, sample.ended, sample.decodes), (3, 2, 1));
        assert_eq!(sample.decode_time, Duration::from_millis(10));
    }

    #[test]
    fn a_writer_that_died_while_writing_is_not_believed() {
        let words = words();
        words.begin();
        words.word(0).fetch_add(1, Ordering::Relaxed);
        assert_eq!(words.read(), None);
        words.reset();
        words.begin();
        assert_eq!(words.read().unwrap(), StepSample { begun: 1, ..StepSample::default() });
    }

    #[test]
    fn a_reader_never_sees_half_of_a_change() {
        let words = words();
        let other = words.clone();
        let writer = std::thread::spawn(move || {
            for _ in 0..20_000 {
                other.begin();
                other.end(PassKind::Decode, Duration::from_nanos(7));
            }
        });
        while !writer.is_finished() {
            if let Some(sample) = words.read() {
                assert!(sample.begun - sample.ended <= 1, "{sample:?}");
                assert_eq!(sample.decode_time.as_nanos(), u128::from(sample.decodes) * 7, "{sample:?}");
                assert_eq!(sample.decodes, sample.ended);
            }
        }
        writer.join().unwrap();
        assert_eq!(words.read().unwrap().ended, 20_000);
    }
}
