//! What can go wrong between a daemon and its holder.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use super::SEGMENTS_MAX;
use super::limit::DESCRIPTORS_RESERVED;
use super::message::{Malformed, VERSION};

/// One line. None of it stops a daemon: it serves without warm memory.
#[derive(Debug, Error)]
pub enum HolderError {
    /// Nobody serves there, or has no room for us.
    #[error("connect to the holder at {}: {source}", path.display())]
    Unavailable {
        /// Its socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: kvbm_shm::Error,
    },
    /// The memory still belongs to another process.
    #[error("the holder serves another daemon that is not dead (process {pid})")]
    Busy {
        /// That process.
        pid: u32,
    },
    /// The other side speaks another version.
    #[error(
        "the holder's protocol has version {theirs} there and {VERSION} here: start both from the same kvbm"
    )]
    Version {
        /// Its version.
        theirs: u32,
    },
    /// Memory is only exchanged between processes of one user.
    #[error("user {uid} is at the other end, not our own")]
    Stranger {
        /// Whoever it is.
        uid: u32,
    },
    /// The other side refuses us because of our user.
    #[error("the holder serves another user")]
    NotOurs,
    /// The other side does not keep the protocol.
    #[error("the other side of the holder's socket {0}")]
    Malformed(#[from] Malformed),
    /// The other side did not do its part in time.
    #[error("no {what} within {limit:?}")]
    Late {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The connection has ended. What the holder kept is there for the next daemon unless the holder has ended, too.
    #[error("the connection to the holder has ended")]
    Lost,
    /// No more segments.
    #[error(
        "the holder keeps {capacity} segments at most: {SEGMENTS_MAX}, or what its limit of open files permits \
         (two for each, {DESCRIPTORS_RESERVED} for itself)"
    )]
    Full {
        /// How many it keeps.
        capacity: u32,
    },
    /// This process may not have as many descriptors as it needs.
    #[error(
        "the limit of open files is {limit} and at least {needed} are needed: raise it (ulimit -Hn, LimitNOFILE=)"
    )]
    Descriptors {
        /// The hard limit.
        limit: u64,
        /// What is needed.
        needed: u64,
    },
    /// A holder lives there.
    #[error("a holder is already serving at {}{}", path.display(), process(*pid))]
    InUse {
        /// Its socket.
        path: PathBuf,
        /// Its process, if it says so.
        pid: Option<u32>,
    },
    /// Something that is no socket is where the socket should be.
    #[error("refuse to replace {}: it is not a socket", path.display())]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The file system refused.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// Verb.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The kernel refused something about a socket or a process.
    #[error(transparent)]
    System(#[from] kvbm_shm::Error),
    /// The runtime or the kernel refused to watch a socket, or to change a limit.
    #[error("{op}: {source}")]
    Kernel {
        /// Verb and object.
        op: &'static str,
        /// Its answer.
        #[source]
        source: std::io::Error,
    },
}

fn process(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

impl HolderError {
    pub(super) fn io(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { op, path, source }
    }

    pub(super) fn kernel(op: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Kernel { op, source }
    }

    /// 2: change the settings. 1: the machine said no.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InUse { .. } | Self::NotASocket { .. } | Self::Descriptors { .. } => 2,
            Self::Unavailable { .. }
            | Self::Busy { .. }
            | Self::Version { .. }
            | Self::Stranger { .. }
            | Self::NotOurs
            | Self::Malformed(_)
            | Self::Late { .. }
            | Self::Lost
            | Self::Full { .. }
            | Self::Io { .. }
            | Self::System(_)
            | Self::Kernel { .. } => 1,
        }
    }
}

/// Too many descriptors of this user are under way in sockets: those that are read make room.
pub(super) fn is_crowded(error: &kvbm_shm::Error) -> bool {
    let crowded = rustix::io::Errno::TOOMANYREFS.raw_os_error();
    matches!(error, kvbm_shm::Error::System { source, .. } if source.raw_os_error() == Some(crowded))
}

/// The other end of a connection has been closed.
pub(super) fn is_closed(error: &kvbm_shm::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error, kvbm_shm::Error::System { source, .. } if matches!(source.kind(), BrokenPipe | ConnectionReset))
}
