//! Why the daemon cannot start.

use std::net::SocketAddr;
use std::path::PathBuf;

use thiserror::Error;

use crate::remote::Misfit;

/// One line for the person who started it.
#[derive(Debug, Error)]
pub enum StartError {
    /// Somebody serves at this socket.
    #[error("a daemon is already serving at {}{}", socket.display(), process(*pid))]
    InUse {
        /// The socket.
        socket: PathBuf,
        /// Its process, if it says so.
        pid: Option<u32>,
    },
    /// Something that is no socket is where the socket should be.
    #[error("refuse to replace {}: it is not a socket", path.display())]
    NotASocket {
        /// What is in the way.
        path: PathBuf,
    },
    /// The file system or network refused.
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
    /// The file to record into cannot be used.
    #[error("cannot record into {}: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// No port for the admin HTTP server.
    #[error("bind admin HTTP at {address}: {source}")]
    Admin {
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// No port for gRPC over TCP.
    #[error("bind gRPC at {address}: {source}")]
    Remote {
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// What was to protect that port has changed since the settings were checked.
    #[error(transparent)]
    Credentials(#[from] Misfit),
    /// The side channel could not be set up.
    #[error(transparent)]
    Side(#[from] kvbm_shm::Error),
    /// The block manager could not start.
    #[error("start the block manager: {0}")]
    Manager(#[from] kvbm::Error),
}

fn process(pid: Option<u32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

impl StartError {
    pub(crate) fn io(op: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { op, path, source }
    }

    /// 2: change the settings. 1: the machine said no.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InUse { .. }
            | Self::NotASocket { .. }
            | Self::Record { .. }
            | Self::Credentials(_)
            | Self::Manager(kvbm::Error::Disk(_)) => 2,
            Self::Io { .. } | Self::Admin { .. } | Self::Remote { .. } | Self::Side(_) | Self::Manager(_) => {
                1
            }
        }
    }
}
