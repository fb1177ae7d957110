//! What can go wrong with shared memory.

use thiserror::Error;

/// Failure of a call to the kernel, or memory that is not what the other side promised.
#[derive(Debug, Error)]
pub enum Error {
    /// A system call failed.
    #[error("{call} {what}: {source}")]
    System {
        /// Name of the call.
        call: &'static str,
        /// On what.
        what: String,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A received descriptor or header does not keep its contract.
    #[error("refuse shared memory: {reason}")]
    Refused {
        /// What is wrong with it.
        reason: String,
    },
}

impl Error {
    pub(crate) fn system(
        call: &'static str,
        what: impl Into<String>,
    ) -> impl FnOnce(rustix::io::Errno) -> Self {
        let what = what.into();
        move |errno| Self::System { call, what, source: errno.into() }
    }

    pub(crate) fn refused(reason: impl Into<String>) -> Self {
        Self::Refused { reason: reason.into() }
    }

    /// True when the kernel said "not now" on a non-blocking descriptor.
    pub fn is_would_block(&self) -> bool {
        matches!(self, Self::System { source, .. } if source.kind() == std::io::ErrorKind::WouldBlock)
    }
}
