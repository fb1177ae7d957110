//! Why a question to the daemon has no answer. All of these are expected: the caller goes on without the cache.

use kvbm_proto::Malformed;
use kvbm_proto::v1::Refusal;
use thiserror::Error;

/// What came of a question instead of its answer.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ClientError {
    /// There is no daemon, or the connection to it ended.
    #[error("reach the daemon: {reason}")]
    Unavailable {
        /// What was seen.
        reason: String,
    },
    /// The daemon did not answer in time. A later answer is given back by itself.
    #[error("wait for the daemon: no answer within the deadline")]
    Deadline,
    /// The daemon answered that it will not.
    #[error("ask the daemon: refused as {refusal:?}: {detail}")]
    Refused {
        /// Why.
        refusal: Refusal,
        /// In words.
        detail: String,
    },
    /// The daemon's answer breaks the protocol.
    #[error("read the daemon's answer: {detail}")]
    Malformed {
        /// What is wrong with it.
        detail: String,
    },
}

impl ClientError {
    pub(crate) fn unavailable(reason: impl ToString) -> Self {
        Self::Unavailable { reason: reason.to_string() }
    }

    pub(crate) fn malformed(detail: impl ToString) -> Self {
        Self::Malformed { detail: detail.to_string() }
    }
}

impl From<Malformed> for ClientError {
    fn from(malformed: Malformed) -> Self {
        Self::malformed(malformed)
    }
}

impl From<tonic::Status> for ClientError {
    fn from(status: tonic::Status) -> Self {
        let detail = status.message().to_owned();
        match status.code() {
            tonic::Code::OutOfRange => Self::Refused { refusal: Refusal::Stale, detail },
            tonic::Code::ResourceExhausted => Self::Refused { refusal: Refusal::Busy, detail },
            tonic::Code::InvalidArgument => Self::Refused { refusal: Refusal::Invalid, detail },
            tonic::Code::NotFound => Self::Refused { refusal: Refusal::Unknown, detail },
            tonic::Code::DeadlineExceeded => Self::Deadline,
            code => Self::Unavailable { reason: format!("{code:?}: {detail}") },
        }
    }
}
