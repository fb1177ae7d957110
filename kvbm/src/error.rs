//! What callers are told, by what they can do about it.

use thiserror::Error;

use crate::Tier;

/// An expected answer to a request that is not carried out. The caller goes on without the cache.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refused {
    /// A bounded queue or budget is full.
    #[error("{queue} is full")]
    Busy {
        /// Which.
        queue: &'static str,
    },
    /// Nothing can be evicted.
    #[error("{tier} has {available} of {wanted} blocks free or evictable")]
    Exhausted {
        /// Where.
        tier: Tier,
        /// Blocks asked for.
        wanted: usize,
        /// Blocks that could be had.
        available: usize,
    },
    /// More than a budget allows.
    #[error("{what}: {wanted} bytes more than the {used} in use would exceed the budget of {budget} bytes")]
    OverBudget {
        /// What has the budget.
        what: &'static str,
        /// Its bytes.
        budget: u64,
        /// Those that are used.
        used: u64,
        /// Those that were asked for on top.
        wanted: u64,
    },
    /// The request breaks its contract.
    #[error("{field}: {reason}")]
    Invalid {
        /// Part of the request.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The session has no such namespace, pool or lease, or no longer.
    #[error("{what} is not this session's")]
    Unknown {
        /// Kind of the thing.
        what: &'static str,
    },
    /// Generation or epoch has moved on.
    #[error("{what} is of the past")]
    Stale {
        /// Kind of the thing.
        what: &'static str,
    },
    /// The manager is stopping.
    #[error("stopping")]
    Closed,
}

impl Refused {
    pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}

/// The manager cannot start or get memory.
#[derive(Debug, Error)]
pub enum Error {
    /// Shared memory could not be had or was not acceptable.
    #[error(transparent)]
    Memory(#[from] kvbm_shm::Error),
    /// A thread could not be started.
    #[error("start thread {name}: {source}")]
    Thread {
        /// Its name.
        name: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The disk tier cannot be used as it is configured.
    #[error("disk cache: {0}")]
    Disk(#[from] crate::DiskError),
    /// The request was refused.
    #[error(transparent)]
    Refused(#[from] Refused),
}
