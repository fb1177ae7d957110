//! What can go wrong while a model is loaded. Running it does not fail, unless a GPU does: bad requests are refused before.

use std::io;
use std::path::PathBuf;

/// Result of loading a model.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("{op} {}: {source}", path.display())]
    Io {
        /// What was tried, for example `read`.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// A file is not of the format it should have.
    #[error("parse {}: {detail}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A field of the configuration is absent or has an impossible value.
    #[error("config field {field}: {detail}")]
    Invalid {
        /// Name of the field.
        field: String,
        /// What is wrong, with the value that was found.
        detail: String,
    },
    /// The configuration asks for something that this engine does not do.
    #[error("config field {field} = {found}: this engine supports only {supported}")]
    Unsupported {
        /// Name of the field.
        field: String,
        /// The value that was found.
        found: String,
        /// What would be accepted.
        supported: String,
    },
    /// A weight that the configuration calls for is in none of the files.
    #[error("tensor {name} is missing")]
    MissingTensor {
        /// Name of the tensor.
        name: String,
    },
    /// A weight has other dimensions than the configuration says.
    #[error("tensor {name}: expected shape {expected:?}, found {found:?}")]
    WrongShape {
        /// Name of the tensor.
        name: String,
        /// The shape that follows from the configuration.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A weight has an element type that is not bf16, f16 or f32.
    #[error("tensor {name}: element type {found} is not one of BF16, F16, F32")]
    WrongType {
        /// Name of the tensor.
        name: String,
        /// The type in the file.
        found: String,
    },
    /// The engine cannot compute this shape on a GPU.
    #[error("compute on {device}: {detail}")]
    Device {
        /// The GPU.
        device: String,
        /// What it, or the engine, cannot do.
        detail: String,
    },
    /// The GPU has too little memory.
    #[error("allocate {bytes} bytes for {what} on {device}: {free} of {total} bytes are free")]
    DeviceMemory {
        /// The GPU.
        device: String,
        /// What it was for.
        what: &'static str,
        /// How much was wanted.
        bytes: usize,
        /// Memory of the GPU that nobody uses.
        free: u64,
        /// All of it.
        total: u64,
    },
    /// CUDA is missing, or said no.
    #[error(transparent)]
    Cuda(#[from] kvbm_cuda::Error),
    /// Memory of the host for what the GPU reads and writes could not be had.
    #[error(transparent)]
    Shared(#[from] kvbm_shm::Error),
    /// The engine's threads could not be started.
    #[error("start {threads} engine threads: {detail}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The reason.
        detail: String,
    },
}

impl Error {
    pub(crate) fn invalid(field: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), detail: detail.into() }
    }

    pub(crate) fn unsupported(field: &str, found: impl ToString, supported: &str) -> Self {
        Self::Unsupported { field: field.into(), found: found.to_string(), supported: supported.into() }
    }
}
