//! Keeps what is listed: one task each, started when it appears and ended when it is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::task::{AbortHandle, JoinSet};

use super::Item;
use crate::fleet::{self, Daemon, DaemonFiles, Drivers, Follower, Means, Node};
use crate::router::{Knowledge, RouterMetrics};
use crate::upstream::{self, Upstreams};

/// See the module. Dropped, all of them end.
pub(crate) struct Appointed {
    means: Means,
    upstreams: Arc<Upstreams>,
    knowledge: Arc<Knowledge>,
    metrics: Arc<RouterMetrics>,
    files: DaemonFiles,
    running: BTreeMap<Item, AbortHandle>,
    tasks: JoinSet<()>,
}

impl Appointed {
    /// Nobody yet. `files` are shown to each daemon over TLS.
    pub fn new(
        means: Means,
        upstreams: Arc<Upstreams>,
        knowledge: Arc<Knowledge>,
        metrics: Arc<RouterMetrics>,
        files: DaemonFiles,
    ) -> Self {
        let (running, tasks) = (BTreeMap::new(), JoinSet::new());
        Self { means, upstreams, knowledge, metrics, files, running, tasks }
    }

    /// These and no others, from now on.
    pub fn become_items(&mut self, items: BTreeSet<Item>) {
        self.running.retain(|item, task| {
            let stays = items.contains(item);
            if !stays {
                tracing::info!(?item, "is no longer listed");
                task.abort();
                match item {
                    Item::Upstream(url) => self.upstreams.remove(url),
                    // Their tasks take workers along.
                    Item::Daemon(_) | Item::Worker(_) => {}
                }
            }
            stays
        });
        for item in items {
            if !self.running.contains_key(&item) {
                self.start(item);
            }
        }
    }

    fn start(&mut self, item: Item) {
        tracing::info!(?item, "is listed");
        let means = self.means.clone();
        let task = match &item {
            Item::Worker(endpoint) => self.tasks.spawn(fleet::keep_static(endpoint.clone(), means)),
            Item::Upstream(url) => {
                let upstream = self.upstreams.add(url);
                self.tasks.spawn(upstream::watch(self.upstreams.clone(), upstream))
            }
            Item::Daemon(text) => match Daemon::parse(text, &self.files) {
                Ok(daemon) => {
                    let drivers = means.drivers.clone();
                    let kept =
                        keep_daemon(daemon, means, self.knowledge.clone(), self.metrics.clone(), drivers);
                    self.tasks.spawn(kept)
                }
                Err(unusable) => {
                    tracing::warn!(
                        daemon = text,
                        "a listed daemon cannot be used: {} must be {}",
                        unusable.flag,
                        unusable.must_be
                    );
                    return;
                }
            },
        };
        self.running.insert(item, task);
    }

    /// Collects tasks that have ended; never returns while there is none.
    pub async fn reap(&mut self) {
        if self.tasks.join_next().await.is_none() {
            std::future::pending().await
        }
    }
}

/// Follows a daemon's workers and events. Ends only by being dropped.
pub(crate) async fn keep_daemon(
    daemon: Daemon,
    means: Means,
    knowledge: Arc<Knowledge>,
    metrics: Arc<RouterMetrics>,
    drivers: Drivers,
) {
    let node = Node::of(daemon.clone());
    let follower = Follower { daemon: daemon.clone(), node: node.clone(), knowledge, metrics, drivers };
    tokio::join!(follower.follow(), fleet::watch_registry(daemon, node, means));
}
