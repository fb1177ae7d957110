//! Who is let in over TCP, and the count of who was not.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use super::credentials::Token;
use super::guest::Admission;
use crate::core::Core;

/// Connections at once, those that have not been let in yet included.
const CONNECTIONS_MAX: usize = 256;

/// Why somebody was not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// A request with a wrong token, or without one.
    Token,
    /// A connection that spoke no TLS, or whose certificate is not accepted.
    Tls,
    /// A connection on which nothing permitted was asked in time.
    Silent,
}

impl Reason {
    const ALL: [Self; 3] = [Self::Token, Self::Tls, Self::Silent];

    fn name(self) -> &'static str {
        match self {
            Self::Token => "token",
            Self::Tls => "tls",
            Self::Silent => "silent",
        }
    }
}

/// Places for connections, and the counts.
#[derive(Debug)]
pub(crate) struct Door {
    places: Arc<Semaphore>,
    rejected: [AtomicU64; Reason::ALL.len()],
}

impl Default for Door {
    fn default() -> Self {
        Self { places: Arc::new(Semaphore::new(CONNECTIONS_MAX)), rejected: Default::default() }
    }
}

impl Door {
    /// Waits for a place, which is free again when it is dropped.
    pub(super) async fn place(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.places).acquire_owned().await.expect("the places are never closed")
    }

    /// Counts one.
    pub(super) fn reject(&self, reason: Reason) {
        self.rejected[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts by reason.
    pub fn rejections(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Reason::ALL
            .into_iter()
            .map(|reason| (reason.name(), self.rejected[reason as usize].load(Ordering::Relaxed)))
    }

    /// Connections now.
    pub fn connections(&self) -> usize {
        CONNECTIONS_MAX - self.places.available_permits()
    }
}

/// Looks at each request before any service does.
#[derive(Clone)]
pub(super) struct Doorkeeper {
    core: Arc<Core>,
    token: Option<Token>,
}

impl Doorkeeper {
    /// Without a token, the certificate that TLS has asked for is enough.
    pub fn new(core: Arc<Core>, token: Option<Token>) -> Self {
        Self { core, token }
    }
}

impl Interceptor for Doorkeeper {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.token {
            let header = request.metadata().get("authorization");
            if !header.is_some_and(|header| token.is_in(header.as_bytes())) {
                self.core.door.reject(Reason::Token);
                return Err(Status::unauthenticated("the token is missing or wrong"));
            }
        }
        if let Some(admission) = request.extensions().get::<Admission>() {
            admission.grant();
        }
        Ok(request)
    }
}
