//! Other OpenAI servers, whose models are served as if they were ours: requests and answers pass through unread.
//!
//! One that cannot be reached, or fails before the first byte of its answer, is passed over; one that fails again and
//! again is left alone for a while. Both are found out by requests and by a look at its models now and then.

mod breaker;
mod client;
mod health;
mod proxy;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::error::FrontendError;

pub use health::watch;
pub use server::{Upstream, UpstreamUrl};

/// All of them, as they are added and removed.
pub struct Upstreams {
    servers: Mutex<BTreeMap<UpstreamUrl, Arc<Upstream>>>,
    client: client::HttpClient,
    turn: AtomicUsize,
}

/// A line of `/health`.
#[derive(Debug, serde::Serialize)]
pub struct UpstreamHealth {
    url: String,
    models: BTreeSet<String>,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

impl Upstreams {
    /// None yet. Those with TLS are vouched for by an authority in the PEM file `ca`, or else by one that this machine
    /// trusts.
    pub fn new(ca: Option<&Path>) -> Result<Self, FrontendError> {
        Ok(Self { servers: Mutex::default(), client: client::client(ca)?, turn: AtomicUsize::new(0) })
    }

    /// One more. It serves nothing before it was looked at.
    pub fn add(&self, url: &UpstreamUrl) -> Arc<Upstream> {
        self.servers.lock().entry(url.clone()).or_insert_with(|| Arc::new(Upstream::new(url))).clone()
    }

    /// One less. What it is answering goes on.
    pub fn remove(&self, url: &UpstreamUrl) {
        self.servers.lock().remove(url);
    }

    /// Whether there are none, so that nobody need look.
    pub fn is_empty(&self) -> bool {
        self.servers.lock().is_empty()
    }

    /// Those that serve a model, the ones with the fewest requests first, equals in turn. Whether they can be asked now is
    /// theirs to say.
    fn of(&self, model: &str) -> Vec<Arc<Upstream>> {
        let mut all: Vec<Arc<Upstream>> =
            self.servers.lock().values().filter(|server| server.serves(model)).cloned().collect();
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % all.len().max(1);
        all.rotate_left(first);
        all.sort_by_key(|server| server.load.requests());
        all
    }

    /// Whether one of them serves a model.
    pub fn serves(&self, model: &str) -> bool {
        self.servers.lock().values().any(|server| server.serves(model))
    }

    /// All models that one of them serves now.
    pub fn models(&self) -> BTreeSet<String> {
        self.servers.lock().values().flat_map(|server| server.models()).collect()
    }

    /// Every one and its state.
    pub fn health(&self) -> Vec<UpstreamHealth> {
        self.servers.lock().iter().map(|(url, server)| server.health(url)).collect()
    }
}
