//! Why a worker did not start, or stopped by itself.

use std::io;
use std::path::PathBuf;

/// See the module. Each is one line.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A flag has a value that cannot be used.
    #[error("{flag} {value}: expected {expected}")]
    Invalid {
        /// The flag.
        flag: &'static str,
        /// What it was set to.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A variable of the environment has a value that cannot be used.
    #[error(transparent)]
    Variable(#[from] kvbm_connector::InvalidSetting),
    /// The model could not be loaded.
    #[error("load the model in {}: {source}", folder.display())]
    Model {
        /// The model's folder.
        folder: PathBuf,
        /// What is wrong with it.
        #[source]
        source: crate::Error,
    },
    /// The endpoint could not be bound.
    #[error("listen at {endpoint}: {source}")]
    Listen {
        /// The endpoint.
        endpoint: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// There is no pool.
    #[error(transparent)]
    Pool(#[from] kvbm_connector::StartError),
    /// The engine's thread could not be started.
    #[error("start the engine's thread: {0}")]
    Thread(#[source] io::Error),
    /// The engine ended though nobody stopped it; its panic message is in the log.
    #[error("the engine's thread ended")]
    EngineEnded,
    /// The gRPC server ended though nobody stopped it.
    #[error("the gRPC server ended: {0}")]
    Server(String),
}

impl WorkerError {
    pub(crate) fn invalid(flag: &'static str, value: impl ToString, expected: impl Into<String>) -> Self {
        Self::Invalid { flag, value: value.to_string(), expected: expected.into() }
    }

    /// What the process should exit with: 2 when a setting is to be changed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Invalid { .. } | Self::Variable(_) => 2,
            Self::Model { .. }
            | Self::Listen { .. }
            | Self::Pool(_)
            | Self::Thread(_)
            | Self::EngineEnded
            | Self::Server(_) => 1,
        }
    }
}
