//! What can go wrong with a GPU, by what the caller can do about it.

use thiserror::Error;

/// Failure to find CUDA, or of a call to it.
#[derive(Debug, Error)]
pub enum Error {
    /// Something that CUDA needs is not on this machine.
    #[error("find {what}: {reason}; {remedy}")]
    Missing {
        /// The library, function or device.
        what: String,
        /// Why it was not found, and where it was looked for.
        reason: String,
        /// What the operator can do.
        remedy: String,
    },
    /// CUDA refused a call, or reports that earlier work failed.
    #[error("{call}: {name} ({code}): {meaning}")]
    Call {
        /// Name of the function.
        call: &'static str,
        /// CUDA's number for the error.
        code: u32,
        /// CUDA's name for the error.
        name: String,
        /// CUDA's description of the error.
        meaning: String,
    },
    /// The arguments cannot be right.
    #[error("refuse {what}: {reason}")]
    Refused {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        reason: String,
    },
}

/// Errors after which the context, or the device, is of no more use to this process: every later call fails too.
const STICKY: [u32; 18] = [
    4,   // deinitialized
    46,  // device unavailable
    101, // invalid device
    214, // ECC error that cannot be corrected
    220, // NVLink error that cannot be corrected
    226, // contained error
    700, // illegal address
    702, // launch timeout
    709, // context is destroyed
    710, // assert
    714, // hardware stack error
    715, // illegal instruction
    716, // misaligned address
    717, // invalid address space
    718, // invalid program counter
    719, // launch failed
    802, // system not ready
    999, // unknown
];

impl Error {
    pub(crate) fn missing(
        what: impl Into<String>,
        reason: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Missing { what: what.into(), reason: reason.into(), remedy: remedy.into() }
    }

    pub(crate) fn refused(what: &'static str, reason: impl Into<String>) -> Self {
        Self::Refused { what, reason: reason.into() }
    }

    /// True if the GPU cannot be used any more by this process. Other errors concern only the call that failed.
    pub fn is_sticky(&self) -> bool {
        matches!(self, Self::Call { code, .. } if STICKY.contains(code))
    }

    /// True if there was not enough memory on the GPU.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::Call { code: 2, .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(code: u32) -> Error {
        Error::Call { call: "cuEventQuery", code, name: "NAME".into(), meaning: "meaning".into() }
    }

    #[test]
    fn errors_that_concern_one_call_are_told_from_those_that_end_the_context() {
        assert!(failed(700).is_sticky() && failed(719).is_sticky() && failed(214).is_sticky());
        assert!(!failed(1).is_sticky() && !failed(2).is_sticky() && !failed(600).is_sticky());
        assert!(failed(2).is_out_of_memory() && !failed(1).is_out_of_memory());
        assert!(!Error::missing("a", "b", "c").is_sticky());
        assert_eq!(failed(700).to_string(), "cuEventQuery: NAME (700): meaning");
    }
}
