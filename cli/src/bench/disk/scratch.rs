//! The file that is measured. It never has a name, so nothing is left of it however this process ends.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::{FdFlags, fcntl_setfd};

/// The largest I/O is a divisor of the file's size.
const GRAIN: u64 = 4 << 20;
/// Left to others on the file system.
const SPARE_BYTES: u64 = 64 << 20;

/// See the header.
#[derive(Debug)]
pub(super) struct Scratch {
    file: File,
    bytes: u64,
}

impl Scratch {
    /// Makes an empty file, for about this many bytes.
    pub fn create(dir: &Path, bytes: u64) -> Result<Self, String> {
        let bytes = bytes / GRAIN * GRAIN;
        let told =
            |what: &'static str| move |error: std::io::Error| format!("{what} in {}: {error}", dir.display());
        let space = rustix::fs::statvfs(dir).map_err(|error| told("look for space")(error.into()))?;
        let free = space.f_bavail * space.f_frsize;
        if free < bytes + SPARE_BYTES {
            let gb = |bytes: u64| bytes as f64 / 1e9;
            return Err(format!(
                "{:.1} GB are wanted in {}, {:.1} GB are free",
                gb(bytes),
                dir.display(),
                gb(free)
            ));
        }
        let nameless = tempfile::tempfile_in(dir).map_err(told("make a file"))?;
        // The same file once more, past the page cache. The reference opens it in the same way.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits() as i32)
            .open(format!("/proc/self/fd/{}", nameless.as_raw_fd()))
            .map_err(told("O_DIRECT, which this measures, is not possible"))?;
        Ok(Self { file, bytes })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Lets processes started from now on have a descriptor, under its number.
pub(super) fn inherit(fd: impl AsFd) -> Result<RawFd, String> {
    fcntl_setfd(&fd, FdFlags::empty()).map_err(|error| format!("pass a descriptor on: {error}"))?;
    Ok(fd.as_fd().as_raw_fd())
}
