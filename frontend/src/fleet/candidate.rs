//! A worker that takes requests.

use std::sync::Arc;

use kvbm_hash::BaseNamespace;

use super::{Connection, Description, Place};
use crate::router::{Keying, Load};

/// What a worker takes on where prefill and decode are separate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    Prefill,
    Decode,
    #[default]
    Both,
}

impl Role {
    /// As workers say it; whatever is not known takes on both.
    pub fn parse(text: &str) -> Self {
        match text {
            "prefill" => Self::Prefill,
            "decode" => Self::Decode,
            _ => Self::Both,
        }
    }
}

/// See the module.
pub struct Candidate {
    pub connection: Arc<Connection>,
    pub worker_id: String,
    pub role: Role,
    pub place: Place,
    /// `None`: its keys cannot be computed here.
    pub keying: Option<Keying>,
    pub load: Arc<Load>,
}

impl Candidate {
    pub fn new(description: &Description, connection: Arc<Connection>, load: Arc<Load>) -> Self {
        let keying = description.base.filter(|_| description.tokens_per_block > 0);
        Self {
            connection,
            worker_id: description.worker_id.clone(),
            role: description.role,
            place: description.place.clone(),
            keying: keying.map(|base| Keying { base, tokens_per_block: description.tokens_per_block }),
            load,
        }
    }

    /// Whether it can be tried: it is connected, and was not tried before.
    pub fn is_open(&self, tried: &[u64]) -> bool {
        !self.connection.is_closed() && !tried.contains(&self.connection.id())
    }
}

/// The base namespace in a message; none if it has another length.
pub fn base_namespace(bytes: &[u8]) -> Option<BaseNamespace> {
    bytes.try_into().ok().map(BaseNamespace)
}
