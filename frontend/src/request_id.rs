//! Names of requests: the client's, or one that no other request of any process has.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};

use http::HeaderMap;

/// The header that carries it, both ways.
pub const HEADER: &str = "x-request-id";

const CLIENT_BYTES_MAX: usize = 128;

/// Makes request ids. One per server.
pub struct RequestIds {
    nonce: u64,
    next: AtomicU64,
}

impl RequestIds {
    /// With a prefix drawn for this process.
    pub fn new() -> Self {
        // The standard library's only source of randomness: keys of a fresh hasher.
        Self { nonce: RandomState::new().hash_one(std::process::id()), next: AtomicU64::new(1) }
    }

    /// What the client named this request, else a new id.
    pub fn of(&self, headers: &HeaderMap) -> String {
        let given = headers.get(HEADER).and_then(|value| value.to_str().ok());
        match given {
            Some(id)
                if (1..=CLIENT_BYTES_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()) =>
            {
                id.to_owned()
            }
            _ => format!("{:016x}{:08x}", self.nonce, self.next.fetch_add(1, Ordering::Relaxed)),
        }
    }
}
