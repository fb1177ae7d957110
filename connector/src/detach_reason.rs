//! Why the engine goes on alone.

use thiserror::Error;

use crate::ClientError;

/// Why a session ended, or did not begin.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DetachReason {
    /// The kernel says that the daemon is dead.
    #[error("the daemon died")]
    Died,
    /// The connection ended.
    #[error("lost the daemon: {0}")]
    Gone(ClientError),
    /// An answer is missing.
    #[error("the daemon does not answer")]
    Silent,
    /// The daemon does not keep up with what the engine tells it.
    #[error("the queue to the daemon is full")]
    QueueFull,
    /// The daemon does not take the pool.
    #[error("the daemon does not serve the pool: {0}")]
    Refused(ClientError),
    /// The daemon said what cannot be true.
    #[error("the daemon contradicts the pool: {0}")]
    Contradiction(String),
    /// The engine's thread ended the session before.
    #[error("the engine hung up")]
    HungUp,
}
