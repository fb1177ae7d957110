//! The file that is measured: that of a disk cache, past the page cache. What is in it is of no worth.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::{FdFlags, fcntl_setfd};

/// The largest I/O is a divisor of the size that is used.
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
    /// The only file in a directory. The reference opens it in the same way.
    pub fn open(dir: &Path) -> Result<Self, String> {
        let told =
            |what: &'static str| move |error: std::io::Error| format!("{what} in {}: {error}", dir.display());
        let mut files = std::fs::read_dir(dir).map_err(told("look for the file"))?;
        let path = match (files.next(), files.next()) {
            (Some(Ok(file)), None) => file.path(),
            _ => return Err(format!("look for the file in {}: there is not exactly one", dir.display())),
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(OFlags::DIRECT.bits() as i32)
            .open(path)
            .map_err(told("O_DIRECT, which this measures, is not possible"))?;
        let bytes = file.metadata().map_err(told("look at the file"))?.len() / GRAIN * GRAIN;
        Ok(Self { file, bytes })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Has the drive write down what it was given.
    pub fn sync(&self) -> Result<(), String> {
        self.file.sync_data().map_err(|error| format!("sync the file that is measured: {error}"))
    }
}

/// Refuses a directory that has no room for a file of this size.
pub(super) fn has_room(dir: &Path, bytes: u64) -> Result<(), String> {
    let space =
        rustix::fs::statvfs(dir).map_err(|error| format!("look for space in {}: {error}", dir.display()))?;
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
    Ok(())
}

/// Lets processes started from now on have a descriptor, under its number.
pub(super) fn inherit(fd: impl AsFd) -> Result<RawFd, String> {
    fcntl_setfd(&fd, FdFlags::empty()).map_err(|error| format!("pass a descriptor on: {error}"))?;
    Ok(fd.as_fd().as_raw_fd())
}
