//! Why there is no disk tier, in words for whoever configured it.

use std::path::PathBuf;

use rustix::io::Errno;
use thiserror::Error;

use crate::store::disk_io::IoFailure;

/// By what can be done about it.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The settings do not make sense.
    #[error("{0}")]
    Config(String),
    /// The kernel refused.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The drive failed.
    #[error("{op} {}: {source}", path.display())]
    Drive {
        /// What was tried.
        op: &'static str,
        /// On which file.
        path: PathBuf,
        /// What came of it.
        #[source]
        source: IoFailure,
    },
    /// Somebody else has it.
    #[error("{} is in use by another daemon: stop it, or give this one a directory of its own", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// A file of that name which is something else.
    #[error(
        "{} is not a disk cache of kvbm: move it away, choose another directory, or reset the disk cache to overwrite it",
        path.display()
    )]
    NotOurs {
        /// The file.
        path: PathBuf,
    },
    /// Written by a later release.
    #[error(
        "{} has format version {found}, this release knows versions up to {known}: start the newer release, choose \
         another directory, or reset the disk cache",
        path.display()
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Written by an earlier release, and not readable any more.
    #[error(
        "{} has format version {found}, which this release (version {known}) does not read: start the older release, \
         or reset the disk cache",
        path.display()
    )]
    Older {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The first page is not what was written.
    #[error("{} has a damaged header: check the drive, then reset the disk cache", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
    },
    /// Directories were added, removed, exchanged or put in another order.
    #[error(
        "{} {reason}: list the directories as they were when the disk cache was made, or reset it",
        path.display()
    )]
    OtherSet {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// The engine that does the I/O did not start.
    #[error("start disk engine: {0}")]
    Engine(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Memory for pages could not be had.
    #[error(transparent)]
    Memory(#[from] kvbm_shm::Error),
    /// The daemon stops, and so did this.
    #[error("stopped before the disk cache was ready")]
    Stopped,
}

impl DiskError {
    pub(super) fn io<E: Into<std::io::Error>>(
        op: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Io { op, path, source: source.into() }
    }

    pub(super) fn drive(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(IoFailure) -> Self {
        let path = path.into();
        move |failure| match failure {
            IoFailure::Os(code) => Self::Io { op, path, source: Errno::from_raw_os_error(code).into() },
            IoFailure::Short { .. } | IoFailure::TimedOut | IoFailure::Abandoned => {
                Self::Drive { op, path, source: failure }
            }
        }
    }
}
