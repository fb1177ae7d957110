//! Host memory that outlives the daemon, in the hands of `kvbm hold`.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use kvbm::{Keeper, WarmHost, WarmSegment};
use kvbm_shm::SharedMemory;

use crate::holder::{Client, HeldSegment};

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
    let mut found = Vec::with_capacity(held.len());
    for segment in held {
        let index = segment.index;
        match map(segment) {
            Ok(segment) => found.push(segment),
            Err(error) => tracing::warn!(index, %error, "memory of an earlier daemon cannot be used"),
        }
    }
    let keeper = Box::new(Kept(Arc::clone(&client)));
    Some((client, WarmHost { found, keeper }))
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
}
