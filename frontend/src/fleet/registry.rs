//! The daemon's list of workers, followed for ever. While the daemon is away the last list holds.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::v1::{RegisterWorker, WatchWorkersRequest, WorkerEntry, WorkerList};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tonic::Streaming;
use tracing::{info, warn};

use super::keeper::{self, Listing, Means, keep_listed};
use super::{Connection, Daemon, Description, Endpoint, Node, Place, Role, base_namespace};

/// Keeps the workers that the daemon lists. Ends only by being dropped.
pub async fn watch_registry(daemon: Daemon, node: Arc<Node>, means: Means) {
    let mut keepers = Keepers {
        daemon: daemon.clone(),
        node,
        means,
        listings: HashMap::new(),
        unusable: HashSet::new(),
        tasks: JoinSet::new(),
    };
    let mut pause = keeper::BACKOFF_MIN;
    let mut last_reason = String::new();
    loop {
        match subscribe(&daemon, &keepers.means).await {
            Ok((_connection, lists)) => {
                info!(%daemon, "following the daemon's list of workers");
                pause = keeper::BACKOFF_MIN;
                last_reason = keepers.follow(lists).await;
                warn!(%daemon, reason = last_reason, "lost the daemon, going on with the workers known");
            }
            Err(reason) => {
                if reason != last_reason {
                    warn!(%daemon, reason, "cannot reach the daemon, trying on");
                    last_reason = reason;
                }
            }
        }
        keepers.pause(pause).await;
        pause = keeper::next_pause(pause);
    }
}

async fn subscribe(daemon: &Daemon, means: &Means) -> Result<(Connection, Streaming<WorkerList>), String> {
    let connection =
        Connection::open_daemon(daemon, &means.drivers).await.map_err(|error| error.to_string())?;
    let lists = connection.registry().watch_workers(daemon.request(WatchWorkersRequest {})).await;
    let lists = lists.map_err(|status| status.message().to_owned())?.into_inner();
    Ok((connection, lists))
}

/// One task per worker that is, or lately was, listed.
struct Keepers {
    daemon: Daemon,
    node: Arc<Node>,
    means: Means,
    listings: HashMap<Endpoint, watch::Sender<Listing>>,
    /// Worker and endpoint of those in the last list that cannot be used; each was warned of once.
    unusable: HashSet<(String, String)>,
    tasks: JoinSet<Endpoint>,
}

impl Keepers {
    /// Applies each list until the stream ends; says why it did.
    async fn follow(&mut self, mut lists: Streaming<WorkerList>) -> String {
        loop {
            tokio::select! {
                list = lists.message() => match list {
                    Ok(Some(list)) => self.apply(list),
                    Ok(None) => return "the stream ended".to_owned(),
                    Err(status) => return status.message().to_owned(),
                },
                Some(ended) = self.tasks.join_next() => self.ended(ended),
            }
        }
    }

    async fn pause(&mut self, pause: Duration) {
        let end = sleep(pause);
        tokio::pin!(end);
        loop {
            tokio::select! {
                () = &mut end => return,
                Some(ended) = self.tasks.join_next() => self.ended(ended),
            }
        }
    }

    fn apply(&mut self, list: WorkerList) {
        let (mut listed, mut unusable) = (HashMap::new(), HashSet::new());
        for WorkerEntry { worker, base_namespace, .. } in list.workers {
            let Some(worker) = worker else { continue };
            match usable_endpoint(&self.daemon, &worker) {
                Ok(endpoint) => {
                    listed.insert(endpoint, self.listing(worker, &base_namespace));
                }
                Err(reason) => {
                    let who = (worker.worker_id, worker.endpoint);
                    if !self.unusable.contains(&who) {
                        let (worker, endpoint) = &who;
                        warn!(worker, endpoint, reason, "worker cannot be used");
                    }
                    unusable.insert(who);
                }
            }
        }
        self.unusable = unusable;
        for (endpoint, listing) in &self.listings {
            if !listed.contains_key(endpoint) {
                listing.send_if_modified(|listing| match listing {
                    Listing::Absent(_) => false,
                    Listing::Listed { .. } => {
                        *listing = Listing::Absent(Instant::now());
                        true
                    }
                });
            }
        }
        for (endpoint, listing) in listed {
            match self.listings.get(&endpoint) {
                Some(known) => {
                    known.send_if_modified(|before| {
                        let changed = *before != listing;
                        *before = listing;
                        changed
                    });
                }
                None => self.keep(endpoint, listing),
            }
        }
    }

    fn listing(&self, worker: RegisterWorker, base: &[u8]) -> Listing {
        let description = Description {
            worker_id: worker.worker_id,
            model: worker.model,
            model_path: worker.model_path.into(),
            context_length: if worker.context_length == 0 { u32::MAX } else { worker.context_length },
            role: Role::parse(&worker.role),
            base: base_namespace(base),
            tokens_per_block: worker.tokens_per_block as usize,
            place: Place { node: self.node.clone(), pool: worker.pool_id },
        };
        Listing::Listed { description, draining: worker.state == "draining" }
    }

    fn keep(&mut self, endpoint: Endpoint, listing: Listing) {
        let (sender, receiver) = watch::channel(listing);
        self.listings.insert(endpoint.clone(), sender);
        let means = self.means.clone();
        self.tasks.spawn(async move {
            keep_listed(endpoint.clone(), receiver, means).await;
            endpoint
        });
    }

    /// A keeper gave up an absent worker, which may have been listed again meanwhile.
    fn ended(&mut self, endpoint: Result<Endpoint, tokio::task::JoinError>) {
        let Ok(endpoint) = endpoint else { return };
        let last = self.listings.remove(&endpoint).map(|sender| sender.borrow().clone());
        if let Some(listing @ Listing::Listed { .. }) = last {
            self.keep(endpoint, listing);
        }
    }
}

/// Nobody looks after its workers any more: they are served no longer.
impl Drop for Keepers {
    fn drop(&mut self) {
        self.tasks.abort_all();
        for endpoint in self.listings.keys() {
            self.means.fleet.remove(endpoint);
        }
    }
}

fn usable_endpoint(daemon: &Daemon, worker: &RegisterWorker) -> Result<Endpoint, &'static str> {
    let endpoint = Endpoint::parse(&worker.endpoint);
    let endpoint = endpoint.ok_or("its endpoint is neither unix:/path nor http://host:port")?;
    match daemon.hides(&endpoint) {
        Some(reason) => Err(reason),
        None => Ok(endpoint),
    }
}
