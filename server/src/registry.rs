//! `kvbm.v1.Registry`: what frontends and operators watch.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::Arc;

use kvbm::{Event, EventKind, NamespaceId, PoolId};
use kvbm_proto::v1;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::core::Core;
use crate::{ahead, inventory, wire};

/// Messages that a watcher may be behind before it is left to the event log.
const BACKLOG: usize = 4;
/// Events in one message.
const BATCH_EVENTS: usize = 4096;
/// Digests that a stream remembers before it asks again.
const DIGESTS_MAX: usize = 1 << 16;

/// See the module.
#[derive(Debug)]
pub(crate) struct RegistryService {
    core: Arc<Core>,
    watchers: Arc<Semaphore>,
}

type Items<T> = ReceiverStream<Result<T, Status>>;
type Sender<T> = mpsc::Sender<Result<T, Status>>;

/// The client went away.
struct Gone;

impl RegistryService {
    /// `watchers_max`: streams served at once.
    pub fn new(core: Arc<Core>, watchers_max: usize) -> Self {
        Self { core, watchers: Arc::new(Semaphore::new(watchers_max)) }
    }

    /// Runs `feed` beside the stream it feeds, until one of them or the daemon ends.
    fn stream<T, F>(&self, feed: impl FnOnce(Arc<Core>, Sender<T>) -> F) -> Result<Response<Items<T>>, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<(), Gone>> + Send + 'static,
    {
        let place = Arc::clone(&self.watchers).try_acquire_owned();
        let place = place.map_err(|_| Status::resource_exhausted("too many watchers"))?;
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let core = Arc::clone(&self.core);
        let fed = feed(Arc::clone(&core), sender.clone());
        self.core.tasks.spawn(async move {
            let _place = place;
            tokio::select! {
                _ = fed => {}
                () = sender.closed() => {}
                () = core.closing.cancelled() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

async fn send<T>(sender: &Sender<T>, item: Result<T, Status>) -> Result<(), Gone> {
    sender.send(item).await.map_err(|_| Gone)
}

#[tonic::async_trait]
impl v1::registry_server::Registry for RegistryService {
    type WatchWorkersStream = Items<v1::WorkerList>;
    type WatchEventsStream = Items<v1::EventBatch>;
    type SnapshotStream = Items<v1::SnapshotPart>;

    async fn watch_workers(
        &self,
        _: Request<v1::WatchWorkersRequest>,
    ) -> Result<Response<Self::WatchWorkersStream>, Status> {
        self.stream(|core, sender| async move {
            let mut watch = core.workers.watch();
            loop {
                let list = Arc::clone(&watch.borrow_and_update());
                send(&sender, Ok(Arc::unwrap_or_clone(list))).await?;
                watch.changed().await.map_err(|_| Gone)?;
            }
        })
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let mut after = request.into_inner().after_sequence;
        self.stream(move |core, sender| async move {
            let mut watch = core.events_changed.subscribe();
            let mut encoder = Encoder::new(core);
            loop {
                watch.mark_unchanged();
                let Ok((first, events)) = encoder.core.manager.events().after(after, BATCH_EVENTS) else {
                    let status = Status::out_of_range(format!("events after {after} are not kept"));
                    return send(&sender, Err(status)).await;
                };
                if events.is_empty() {
                    watch.changed().await.map_err(|_| Gone)?;
                    continue;
                }
                after += events.len() as u64;
                let events = encoder.encode(&events, Some(first));
                send(&sender, Ok(v1::EventBatch { events, last_sequence: 0 })).await?;
            }
        })
    }

    async fn snapshot(
        &self,
        _: Request<v1::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        self.stream(|core, sender| async move {
            let resident = core.manager.residents();
            let sequence = resident.sequence;
            let instance = core.instance.clone();
            let mut encoder = Encoder::new(core);
            for events in resident.stored.chunks(BATCH_EVENTS) {
                let stored = encoder.encode(events, None);
                send(&sender, Ok(v1::SnapshotPart { sequence, stored, ..Default::default() })).await?;
            }
            send(&sender, Ok(v1::SnapshotPart { sequence, stored: Vec::new(), last: true, instance })).await
        })
    }

    async fn status(&self, _: Request<v1::StatusRequest>) -> Result<Response<v1::StatusReply>, Status> {
        let json = serde_json::to_string(&inventory::take(&self.core));
        let json = json.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(v1::StatusReply { json }))
    }

    async fn prefetch_keys(
        &self,
        request: Request<v1::PrefetchKeysRequest>,
    ) -> Result<Response<v1::PrefetchReply>, Status> {
        ahead::prefetch(&self.core, request).map(Response::new)
    }

    async fn hand_over(
        &self,
        request: Request<v1::HandOverRequest>,
    ) -> Result<Response<v1::HandOverReply>, Status> {
        let place = self.watchers.try_acquire();
        let _place = place.map_err(|_| Status::resource_exhausted("too many watchers"))?;
        ahead::hand_over(&self.core, request).await.map(Response::new)
    }

    async fn end_hand_over(
        &self,
        request: Request<v1::EndHandOverRequest>,
    ) -> Result<Response<v1::EndHandOverReply>, Status> {
        ahead::end_hand_over(&self.core, &request).map(Response::new)
    }
}

/// Turns events into messages. Remembers digests, because a namespace may be forgotten with its last block, before the
/// event of that block's removal is sent.
pub(crate) struct Encoder {
    core: Arc<Core>,
    digests: HashMap<NamespaceId, [u8; 32]>,
}

impl Encoder {
    pub fn new(core: Arc<Core>) -> Self {
        Self { core, digests: HashMap::new() }
    }

    /// `first` is the number of the first event; parts of a snapshot have none.
    pub fn encode(&mut self, events: &[Event], first: Option<u64>) -> Vec<v1::Event> {
        self.learn(events);
        let workers = self.core.workers.by_pool();
        let number = |position: usize| first.map_or(0, |first| first + position as u64);
        events.iter().enumerate().map(|(i, event)| self.message(event, number(i), &workers)).collect()
    }

    fn learn(&mut self, events: &[Event]) {
        if self.digests.len() > DIGESTS_MAX {
            self.digests.clear();
        }
        let mut unknown: Vec<NamespaceId> = events.iter().filter_map(namespace).collect();
        unknown.retain(|id| !self.digests.contains_key(id));
        unknown.sort();
        unknown.dedup();
        if unknown.is_empty() {
            return;
        }
        let digests = &mut self.digests;
        self.core.manager.inspect(|ledger| {
            let known = unknown.into_iter().filter_map(|id| Some((id, ledger.namespace(id)?.digest)));
            digests.extend(known);
        });
    }

    fn message(&self, event: &Event, sequence: u64, workers: &BTreeMap<PoolId, String>) -> v1::Event {
        let (kind, key, parent) = match event.kind {
            EventKind::Stored { key, parent, .. } => (v1::EventKind::Stored, Some(key), parent),
            EventKind::Removed { key, .. } => (v1::EventKind::Removed, Some(key), None),
            EventKind::Cleared => (v1::EventKind::Cleared, None, None),
        };
        let namespace = namespace(event);
        let digest = namespace.and_then(|id| self.digests.get(&id));
        v1::Event {
            sequence,
            kind: kind.into(),
            tier: wire::tier(event.tier).into(),
            pool_id: event.pool.map_or(0, |pool| pool.0),
            worker_id: event.pool.and_then(|pool| workers.get(&pool).cloned()).unwrap_or_default(),
            namespace_id: namespace.map_or(0, |id| id.0),
            namespace_digest: digest.map_or_else(Vec::new, |digest| digest.to_vec()),
            key: key.map_or_else(Vec::new, |key| key.0.to_vec()),
            parent: parent.map_or_else(Vec::new, |key| key.0.to_vec()),
        }
    }
}

fn namespace(event: &Event) -> Option<NamespaceId> {
    match event.kind {
        EventKind::Stored { namespace, .. } | EventKind::Removed { namespace, .. } => Some(namespace),
        EventKind::Cleared => None,
    }
}
