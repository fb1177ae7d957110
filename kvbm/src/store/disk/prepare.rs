//! From files that were found to a store that serves: headers, space, tables.

use std::time::Instant;

use rustix::io::Errno;
use tracing::{info, warn};

use super::allocate::{cut, reserve};
use super::error::DiskError;
use super::files::{is_direct, use_page_cache};
use super::header::{FileHeader, SetState};
use super::recovery::{Recovered, Recovery};
use super::store::{DiskStore, Phase};
use crate::store::disk_io::IoFailure;
use crate::store::table::PAGE_BYTES;

impl DiskStore {
    /// Reserves space and reads what is there; takes long. Once, and before anything else is asked for.
    pub fn prepare(&self, stopping: &dyn Fn() -> bool) -> Result<Recovered, DiskError> {
        let started = Instant::now();
        {
            let mut phase = self.phase.lock();
            if *phase == Phase::Closed {
                return Err(DiskError::Stopped);
            }
            assert_eq!(*phase, Phase::Opened, "a store is prepared once");
            *phase = Phase::Preparing;
        }
        let kept = self.found.map_or(0, |found| found.segments.min(self.segment_count()));
        self.reserve_space(kept, stopping)?;
        let mut recovered = Recovery::new(self.pages(), *self.geometry(), kept, stopping)?.run()?;
        recovered.report.unclean = self.found.is_some_and(|found| !found.clean);
        recovered.report.took = started.elapsed();
        let mut phase = self.phase.lock();
        if *phase == Phase::Closed {
            return Err(DiskError::Stopped);
        }
        *phase = Phase::Ready;
        Ok(recovered)
    }

    /// Gives the files their size. Whenever this ends, what the headers say is true: segments are named by them only
    /// while they are there, and whatever lies behind the last of them reads as zeros before it is named.
    fn reserve_space(&self, kept: u32, stopping: &dyn Fn() -> bool) -> Result<(), DiskError> {
        let wanted = self.segment_count();
        match self.found {
            None => self.write_headers(SetState::Creating, wanted)?,
            Some(_) => self.write_headers(SetState::Open, kept)?,
        }
        let kept_bytes = self.geometry().file_bytes(kept);
        cut(&self.files, kept_bytes)?;
        let bytes = self.geometry().file_bytes(wanted);
        let reserved = reserve(&self.files, bytes, self.zerofill, self.pages().engine(), stopping);
        if let Err(error) = reserved {
            // Others may need the space more than a disk cache that does not work.
            if let Err(also) = cut(&self.files, kept_bytes) {
                warn!("disk cache: space that was reserved is not given back: {also}");
            }
            return Err(error);
        }
        if self.found.is_none() || wanted > kept {
            self.write_headers(SetState::Open, wanted)?;
        }
        if self.found.is_some_and(|found| found.segments != wanted) {
            info!("disk cache has {wanted} segments now, {kept} of them from before");
        }
        Ok(())
    }

    /// Writes the headers of all files and makes them durable.
    pub(super) fn write_headers(&self, state: SetState, segments: u32) -> Result<(), DiskError> {
        let header = |file| FileHeader {
            state,
            set: self.set,
            file,
            geometry: *self.geometry(),
            segments,
            created_at_s: self.created_at_s,
        };
        let pages: Vec<[u8; PAGE_BYTES]> =
            (0..self.files.len() as u32).map(|file| header(file).encode()).collect();
        let mut written = self.pages().write_headers(&pages);
        // Some file systems take O_DIRECT and then refuse what is written.
        let refused = Err(IoFailure::Os(Errno::INVAL.raw_os_error()));
        if written.map_err(|(_, failure)| failure) == refused && is_direct(&self.files) {
            warn!("the file system refuses I/O past the page cache: the disk cache goes through it");
            use_page_cache(&self.files)?;
            written = self.pages().write_headers(&pages);
        }
        written.map_err(|(file, failure)| DiskError::drive("write header of", self.path(file))(failure))?;
        self.pages().sync().map_err(|(file, failure)| DiskError::drive("sync", self.path(file))(failure))
    }

    fn path(&self, file: usize) -> &std::path::Path {
        &self.files[file].path
    }
}
