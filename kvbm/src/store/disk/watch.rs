//! Whether the files can still be used, and what they are.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use kvbm_shm::SharedMemory;

use super::error::DiskError;
use super::exchange::{carry_out, first_failure};
use super::geometry::Geometry;
use super::store::DiskStore;
use crate::store::disk_io::{Buffer, Io};
use crate::store::table::PAGE_BYTES;

impl DiskStore {
    /// Bytes of all segments.
    pub fn capacity_bytes(&self) -> u64 {
        let geometry = self.geometry();
        u64::from(self.segment_count()) * geometry.extent_bytes * u64::from(geometry.files)
    }

    /// How I/O is done.
    pub fn engine(&self) -> &'static str {
        self.pages().engine().name()
    }

    /// Whether each file is still the one at its path. One that was removed still takes bytes, but loses them all.
    pub fn files_are_there(&self) -> Result<(), DiskError> {
        for file in &self.files {
            let at_path = std::fs::metadata(&file.path).map_err(DiskError::io("find", &file.path))?;
            let ours = file.file.metadata().map_err(DiskError::io("stat", &file.path))?;
            if (at_path.dev(), at_path.ino()) != (ours.dev(), ours.ino()) {
                return Err(DiskError::Config(format!(
                    "{} was replaced by another file",
                    file.path.display()
                )));
            }
        }
        Ok(())
    }

    /// Asks the drive for a sign of life: what is still to be written is written, and a page of each file is read.
    pub fn probe(&self) -> Result<(), DiskError> {
        let first = &self.files[0].path;
        self.flush().map_err(DiskError::drive("flush", first))?;
        let memory = Arc::new(SharedMemory::create("kvbm-probe", self.files.len() * PAGE_BYTES)?);
        let read = |file: usize| {
            let buffer = Buffer { memory: Arc::clone(&memory), offset: file * PAGE_BYTES, len: PAGE_BYTES };
            Io::Read { file, offset: 0, buffer }
        };
        let results = carry_out(self.pages().engine(), (0..self.files.len()).map(read).collect());
        first_failure(&results).map_err(|(file, failure)| {
            DiskError::drive("read", &self.files.get(file).unwrap_or(&self.files[0]).path)(failure)
        })
    }

    /// Gives the files up as they are. Nothing may be written or read meanwhile.
    pub fn abandon(&self) {
        self.pages().engine().abandon_waiting();
        self.pages().engine().close();
        self.unlock();
    }

    /// Lets another daemon have the files, now and not when the kernel has forgotten the engine.
    pub fn unlock(&self) {
        for file in &self.files {
            let _ = rustix::fs::flock(&file.file, rustix::fs::FlockOperation::Unlock);
        }
    }

    /// Bytes that a new set of so many files needs to hold `blocks` slots of `stride` bytes.
    pub fn bytes_for(blocks: u64, stride: u64, files: usize) -> u64 {
        let files = u32::try_from(files).unwrap_or(u32::MAX).max(1);
        let fits = |capacity: u64| {
            let geometry = Geometry::plan(capacity, files);
            let stride = usize::try_from(stride).unwrap_or(usize::MAX);
            geometry.is_some_and(|geometry| {
                u64::from(geometry.segments(capacity)) * u64::from(geometry.slots(stride)) >= blocks
            })
        };
        // Tables and what does not fill a segment come on top.
        let mut capacity = blocks.saturating_mul(stride);
        while !fits(capacity) && capacity < u64::MAX / 2 {
            capacity += capacity / 64 + (1 << 20) * u64::from(files);
        }
        capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_of_blocks_gets_its_slots_and_not_many_more() {
        for (blocks, stride, files) in [(1, 4096, 1), (100, 32_768, 1), (5000, 1 << 20, 3), (7, 4 << 20, 2)] {
            let bytes = DiskStore::bytes_for(blocks, stride, files);
            let geometry = Geometry::plan(bytes, files as u32).unwrap();
            let slots = u64::from(geometry.segments(bytes)) * u64::from(geometry.slots(stride as usize));
            assert!(slots >= blocks, "{blocks} blocks of {stride} on {files}: {slots}");
            let most = (blocks * stride) * 3 / 2 + (64 << 20) * files as u64;
            assert!(bytes <= most, "{bytes} bytes for {blocks} blocks of {stride}");
        }
    }
}
