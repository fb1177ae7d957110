//! Why the frontend does not start. Errors of requests are in `openai::error`.

use std::net::SocketAddr;

/// What keeps the frontend from running.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    /// A setting is outside its range.
    #[error("{flag} = {value} is not valid, it must be {range}")]
    Invalid {
        /// The flag, with its dashes.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What is permitted.
        range: &'static str,
    },
    /// A flag does not go with the others, or with what is in its file.
    #[error("{flag} = {value} is not valid, it must be {must_be}")]
    Daemon {
        /// The flag, with its dashes.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What is permitted.
        must_be: String,
    },
    /// Events cannot be asked for as `--events` says.
    #[error("--events: {0}")]
    Events(String),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Host and port that were asked for.
        address: SocketAddr,
        /// The kernel's answer.
        source: std::io::Error,
    },
}
