//! Why a pin is not set or ended, and what to do about it.

use kvbm::{PinId, Refused};
use thiserror::Error;

/// One line for the person who asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub(crate) enum RightsError {
    /// No such namespace, or none that this user may see.
    #[error(
        "there is no {name}: `kvbm status` lists those that a worker has registered, and a digest is that of one model, \
         revision, block size, adapter and salt"
    )]
    UnknownNamespace {
        /// As it was named.
        name: String,
    },
    /// More than one.
    #[error("{name} is not the only one, there are {count} ({ids}): name one by its id")]
    Ambiguous {
        /// As it was named.
        name: String,
        /// How many.
        count: usize,
        /// Some of them.
        ids: String,
    },
    /// Nothing to hold on to.
    #[error("no tier has any of the {asked} blocks in {name}: have the prompt computed once, then pin it")]
    NothingResident {
        /// As the namespace was named.
        name: String,
        /// Blocks asked for.
        asked: usize,
    },
    /// No such pin, or none that this user may see.
    #[error("there is no pin {}: it has ended, or `kvbm pin --list` shows it under another id", .0.0)]
    UnknownPin(PinId),
    /// The request breaks its contract.
    #[error("{field}: {reason}")]
    Invalid {
        /// Part of the request.
        field: &'static str,
        /// What is wrong with it, and what is permitted.
        reason: String,
    },
    /// The caller may not.
    #[error("{0}")]
    Forbidden(&'static str),
    /// The budget of pins is used up.
    #[error(
        "{wanted} bytes more than the {used} that pins of this namespace keep would exceed the budget of {budget}: end a \
         pin, ask for less, or raise pin_budget_gb"
    )]
    OverBudget {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes in use.
        used: u64,
        /// Bytes at most.
        budget: u64,
    },
    /// The block manager said no.
    #[error("{0}")]
    Refused(Refused),
}

impl From<Refused> for RightsError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::OverBudget { budget, used, wanted, .. } => Self::OverBudget { wanted, used, budget },
            other => Self::Refused(other),
        }
    }
}

impl RightsError {
    /// The code of HTTP that says the same.
    pub fn http(&self) -> axum::http::StatusCode {
        use axum::http::StatusCode;
        match self {
            Self::UnknownNamespace { .. } | Self::UnknownPin(_) | Self::NothingResident { .. } => {
                StatusCode::NOT_FOUND
            }
            Self::Ambiguous { .. } | Self::OverBudget { .. } => StatusCode::CONFLICT,
            Self::Invalid { .. } => StatusCode::BAD_REQUEST,
            Self::Forbidden(_) => StatusCode::FORBIDDEN,
            Self::Refused(refused) => match refused {
                Refused::Unknown { .. } => StatusCode::NOT_FOUND,
                Refused::Invalid { .. } => StatusCode::BAD_REQUEST,
                Refused::Closed => StatusCode::SERVICE_UNAVAILABLE,
                Refused::Busy { .. }
                | Refused::Exhausted { .. }
                | Refused::OverBudget { .. }
                | Refused::Stale { .. } => StatusCode::CONFLICT,
            },
        }
    }
}

impl From<RightsError> for tonic::Status {
    fn from(error: RightsError) -> Self {
        let text = error.to_string();
        match error {
            RightsError::UnknownNamespace { .. }
            | RightsError::UnknownPin(_)
            | RightsError::NothingResident { .. }
            | RightsError::Refused(Refused::Unknown { .. }) => Self::not_found(text),
            RightsError::Ambiguous { .. }
            | RightsError::Invalid { .. }
            | RightsError::Refused(Refused::Invalid { .. }) => Self::invalid_argument(text),
            RightsError::Forbidden(_) => Self::permission_denied(text),
            RightsError::Refused(Refused::Closed) => Self::unavailable(text),
            RightsError::OverBudget { .. }
            | RightsError::Refused(
                Refused::Busy { .. }
                | Refused::Exhausted { .. }
                | Refused::OverBudget { .. }
                | Refused::Stale { .. },
            ) => Self::resource_exhausted(text),
        }
    }
}
