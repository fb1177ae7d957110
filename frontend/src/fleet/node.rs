//! A daemon as frontends need it: told of requests that are about to come, and asked to keep blocks for them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use kvbm_proto::pack_keys;
use kvbm_proto::v1::{EndHandOverRequest, HandOverReply, HandOverRequest, PrefetchKeysRequest};
use parking_lot::Mutex;
use tokio::time::timeout;

use super::{Connection, Daemon};
use crate::router::Keys;

/// How long a request waits for its keys to be passed on: much longer than that takes, much shorter than a person sees.
const PREFETCH_DEADLINE: Duration = Duration::from_millis(20);
/// What the way there and back takes, besides what the daemon may wait.
const REPLY_DEADLINE: Duration = Duration::from_secs(1);

static NEXT_ID: AtomicU32 = AtomicU32::new(1);

/// Workers whose blocks lie in the same host memory and on the same disk.
pub struct Node {
    id: u32,
    daemon: Option<Daemon>,
    link: Mutex<Option<Arc<Connection>>>,
}

/// Where a worker's blocks are.
#[derive(Debug, Clone)]
pub struct Place {
    pub node: Arc<Node>,
    /// Number of its pool there; 0 without one.
    pub pool: u32,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Node({})", self.id)
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        (self.node.id, self.pool) == (other.node.id, other.pool)
    }
}

impl Eq for Place {}

impl Node {
    /// Of a daemon.
    pub fn of(daemon: Daemon) -> Arc<Self> {
        Self::new(Some(daemon))
    }

    /// Of a worker that has none, or none that is known.
    pub fn alone() -> Arc<Self> {
        Self::new(None)
    }

    fn new(daemon: Option<Daemon>) -> Arc<Self> {
        Arc::new(Self { id: NEXT_ID.fetch_add(1, Ordering::Relaxed), daemon, link: Mutex::default() })
    }

    /// Its number within this process.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether somebody tells what its tiers hold.
    pub fn has_events(&self) -> bool {
        self.daemon.is_some()
    }

    /// The connection to use from now on.
    pub fn set_link(&self, connection: &Arc<Connection>) {
        *self.link.lock() = Some(connection.clone());
    }

    fn link(&self) -> Option<(&Daemon, Arc<Connection>)> {
        let link = self.link.lock().clone().filter(|link| !link.is_closed());
        self.daemon.as_ref().zip(link)
    }

    /// Has what is on disk of these blocks brought to host memory. True if the daemon has begun with that.
    pub async fn prefetch(&self, keys: &Keys) -> bool {
        let Some((daemon, link)) = self.link() else { return false };
        let message = PrefetchKeysRequest {
            namespace_digest: keys.namespace.0.to_vec(),
            keys: pack_keys(keys.hashes.iter().map(|key| &key.0)),
        };
        let mut registry = link.registry();
        let asked = registry.prefetch_keys(daemon.request(message));
        // A daemon that is slow, or does not know the namespace yet: the worker asks for the blocks itself.
        matches!(timeout(PREFETCH_DEADLINE, asked).await, Ok(Ok(_)))
    }

    /// Has these blocks kept, and waits until they are in host memory; at most `wait`.
    pub async fn hand_over(&self, keys: &Keys, wait: Duration, lease: Duration) -> Option<HandOverReply> {
        let (daemon, link) = self.link()?;
        let ms = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        let message = HandOverRequest {
            namespace_digest: keys.namespace.0.to_vec(),
            keys: pack_keys(keys.hashes.iter().map(|key| &key.0)),
            wait_ms: ms(wait),
            lease_ms: ms(lease),
        };
        let mut registry = link.registry();
        let asked = registry.hand_over(daemon.request(message));
        timeout(wait + REPLY_DEADLINE, asked).await.ok()?.ok().map(tonic::Response::into_inner)
    }

    /// Ends what a hand-over keeps. If this does not get through, its lease ends it.
    pub async fn end_hand_over(&self, pin_id: u64) {
        let Some((daemon, link)) = self.link() else { return };
        let mut registry = link.registry();
        let asked = registry.end_hand_over(daemon.request(EndHandOverRequest { pin_id }));
        let _ = timeout(REPLY_DEADLINE, asked).await;
    }
}
