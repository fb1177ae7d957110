//! Host memory that outlives the daemon, in the hands of `kvbm hold`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use kvbm::{Keeper, WarmHost, WarmSegment, WarmWords};
use kvbm_shm::{PoolWords, ProcessWatch, SharedMemory};

use crate::holder::{Client, HeldSegment};

/// Indexes from here on are of words that are shared with engines: the words, and the pidfd of the process.
const WORDS: u32 = 1 << 31;
/// Tells them from segments.
const WORDS_FINGERPRINT: [u8; 32] = *b"kvbm words of an engine 1\0\0\0\0\0\0\0";

/// Connects to the holder and takes what it keeps. A daemon without a holder serves all the same, and starts cold.
pub(crate) fn connect(path: &Path) -> Option<(Arc<Client>, WarmHost)> {
    let (client, held) = match Client::connect(path) {
        Ok(connected) => connected,
        Err(error) => {
            tracing::warn!(%error, "host memory will not outlive this daemon");
            return None;
        }
    };
    let client = Arc::new(client);
    let (mut found, mut words) = (Vec::with_capacity(held.len()), Vec::new());
    for segment in held {
        let index = segment.index;
        if segment.fingerprint == WORDS_FINGERPRINT {
            match PoolWords::from_fd(segment.memory) {
                Ok(of_engine) => words.push(WarmWords {
                    number: index & !WORDS,
                    words: of_engine,
                    process: ProcessWatch::from_fd(segment.table),
                }),
                Err(error) => tracing::warn!(index, %error, "words of an engine cannot be read"),
            }
            continue;
        }
        match map(segment) {
            Ok(segment) => found.push(segment),
            Err(error) => tracing::warn!(index, %error, "memory of an earlier daemon cannot be used"),
        }
    }
    let keeper = Box::new(Kept(Arc::clone(&client)));
    Some((client, WarmHost { found, words, keeper }))
}

fn map(segment: HeldSegment) -> Result<WarmSegment, kvbm_shm::Error> {
    let HeldSegment { index, fingerprint, memory, table } = segment;
    let map = |fd: OwnedFd| SharedMemory::from_fd(fd).map(Arc::new);
    Ok(WarmSegment { index, fingerprint, memory: map(memory)?, table: map(table)? })
}

struct Kept(Arc<Client>);

impl Keeper for Kept {
    fn keep(&self, segment: &WarmSegment) {
        let kept = self.0.keep(segment.index, segment.fingerprint, segment.memory.fd(), segment.table.fd());
        if let Err(error) = kept {
            tracing::warn!(index = segment.index, %error, "a host segment will not outlive this daemon");
        }
    }

    fn discard(&self, index: u32) {
        if let Err(error) = self.0.drop_segment(index) {
            tracing::warn!(index, %error, "memory of an earlier daemon is still held");
        }
    }

    fn keep_words(&self, number: u32, words: &PoolWords, process: &ProcessWatch) {
        let kept = self.0.keep(WORDS | number, WORDS_FINGERPRINT, words.fd(), process.as_fd());
        if let Err(error) = kept {
            tracing::warn!(number, %error, "what an engine has pinned would not be known to the next daemon");
        }
    }

    fn discard_words(&self, number: u32) {
        self.discard(WORDS | number);
    }
}
