//! The session of one process of the engine: attaches for ever, keeps what the daemon hands over, asks it, and never
//! lets the engine wait for it longer than once.
//!
//! ```text
//!  connect ──► open pool (staged) ──► map words and segments ──► serve ──► former
//!     ▲                                                            │ ended, silent
//!     └────────────────────────────── pause ◄──────────────────────┘
//! ```
//!
//! What a session mapped stays mapped as long as promises made in it are left: they are kept from there.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvbm_hash::{BaseNamespace, Namespace, SequenceHash};
use kvbm_proto::v1;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;

use super::host::{Host, HostMemory, StoreRequest, Write, Writes};
use super::metadata::Lease;
use super::pool::{Mover, PoolShape};
use super::scheduler::{Directory, Promised};
use super::settings::EngineSettings;
use crate::client::Client;
use crate::session::Question;

mod ask;
mod attach;
mod breaker;

use ask::Reply;
use breaker::Breaker;

/// Sessions that are over whose mappings are kept, at most.
const FORMER_MAX: usize = 4;

/// Totals since the start.
#[derive(Debug, Default)]
pub struct LinkCounts {
    /// Times a session was opened.
    pub attaches: AtomicU64,
    /// Lookups that the daemon did not answer in time.
    pub lookup_timeouts: AtomicU64,
    /// Lookups that were not asked, because nobody was there or the one before was not answered in time.
    pub lookups_skipped: AtomicU64,
    /// Lookups that found blocks.
    pub lookups_found: AtomicU64,
}

/// What was registered.
pub(crate) struct Registered {
    pub shape: PoolShape,
    pub base: BaseNamespace,
    pub device: String,
    pub mover: Arc<dyn Mover>,
}

/// A session that is open.
struct Attachment {
    client: Client,
    pool_id: u32,
    host: Arc<HostMemory>,
    namespaces: tokio::sync::Mutex<HashMap<Namespace, u32>>,
    /// Set to end it.
    given_up: watch::Sender<bool>,
}

/// See the module. Clones share the session.
#[derive(Clone)]
pub(crate) struct EngineLink(Arc<Inner>);

struct Inner {
    settings: EngineSettings,
    registered: Registered,
    handle: Handle,
    current: RwLock<Option<Arc<Attachment>>>,
    former: Mutex<VecDeque<Arc<HostMemory>>>,
    breaker: Breaker,
    counts: LinkCounts,
}

/// Ends the session when it is dropped.
pub(crate) struct LinkOwner {
    runtime: Option<Runtime>,
    engine: watch::Sender<Option<[u8; 16]>>,
    link: EngineLink,
}

impl LinkOwner {
    /// Attaches as soon as the engine's name is known.
    pub fn start(settings: EngineSettings, registered: Registered) -> std::io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("kvbm-engine")
            .enable_all()
            .build()?;
        let link = EngineLink(Arc::new(Inner {
            settings,
            registered,
            handle: runtime.handle().clone(),
            current: RwLock::default(),
            former: Mutex::default(),
            breaker: Breaker::default(),
            counts: LinkCounts::default(),
        }));
        let (engine, named) = watch::channel(None);
        runtime.spawn(attach::run(link.0.clone(), named));
        Ok(Self { runtime: Some(runtime), engine, link })
    }

    /// The session.
    pub fn link(&self) -> &EngineLink {
        &self.link
    }

    /// Says which engine this is a process of.
    pub fn name(&self, engine: [u8; 16]) {
        self.engine.send_if_modified(|named| named.replace(engine) != Some(engine));
    }
}

impl Drop for LinkOwner {
    fn drop(&mut self) {
        *self.link.0.current.write() = None;
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl EngineLink {
    /// True while a session is open.
    pub fn is_attached(&self) -> bool {
        self.0.current.read().is_some()
    }

    pub fn counts(&self) -> &LinkCounts {
        &self.0.counts
    }
}

impl Inner {
    fn current(&self) -> Option<Arc<Attachment>> {
        self.current.read().clone()
    }

    /// Current memory first, then what former sessions left.
    fn memories(&self) -> Vec<Arc<HostMemory>> {
        let current = self.current().map(|attachment| attachment.host.clone());
        current.into_iter().chain(self.former.lock().iter().rev().cloned()).collect()
    }

    fn keep(&self, host: Arc<HostMemory>) {
        let mut former = self.former.lock();
        former.push_back(host);
        let dropped = (former.len() > FORMER_MAX).then(|| former.pop_front());
        drop(former);
        drop(dropped);
    }

    /// Lets go of memory in which no promise is left: it may be all that is left of a daemon's.
    fn forget_former(&self) {
        let mut former = self.former.lock();
        let (kept, dropped): (VecDeque<_>, VecDeque<_>) = former.drain(..).partition(|host| host.is_pinned());
        *former = kept;
        drop(former);
        drop(dropped);
    }
}

impl Directory for EngineLink {
    fn look_up(&self, namespace: Namespace, keys: &[SequenceHash], skip: usize) -> Option<Promised> {
        let inner = &self.0;
        let Some(attachment) = inner.current().filter(|_| !inner.breaker.is_open()) else {
            inner.counts.lookups_skipped.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let reply = Reply::default();
        let (asked, answered) = (inner.clone(), reply.clone());
        let keys = keys.to_vec();
        inner.handle.spawn(async move {
            let promised = asked.look_up(&attachment, namespace, &keys, skip).await;
            if let Some(Some(late)) = answered.answer(promised) {
                asked.take_back(&attachment, late.lease);
            }
        });
        match reply.wait(inner.settings.lookup_deadline) {
            Some(promised) => promised.inspect(|_| {
                inner.counts.lookups_found.fetch_add(1, Ordering::Relaxed);
            }),
            None => {
                inner.counts.lookup_timeouts.fetch_add(1, Ordering::Relaxed);
                inner.breaker.open(Instant::now());
                None
            }
        }
    }

    fn take_back(&self, lease: Lease) {
        if let Some(attachment) = self.0.current() {
            let inner = self.0.clone();
            self.0.handle.spawn(async move { inner.take_back(&attachment, lease) });
        }
    }

    fn takes_saves(&self) -> bool {
        self.is_attached()
    }
}

impl Host for EngineLink {
    fn begin(&self, lease: Lease) -> Option<Arc<HostMemory>> {
        self.0.memories().into_iter().find(|host| host.begin(lease))
    }

    fn end(&self, lease: Lease) {
        for host in self.0.memories() {
            host.end(lease);
        }
        if let Some(attachment) = self.0.current() {
            let question = v1::ReleaseLease { lease_id: lease.lease_id, whole: false };
            self.0.handle.spawn(async move { attachment.tell(Question::ReleaseLease(question)).await });
        }
    }

    fn store(&self, request: &StoreRequest) -> Option<Writes> {
        let attachment = self.0.current()?;
        let stored = self.0.handle.block_on(self.0.store(&attachment, request));
        stored.inspect_err(|error| tracing::debug!(%error, "blocks were not stored")).ok()
    }

    fn store_done(&self, writes: &Writes, copied: Vec<bool>) {
        // A session that is over frees what was not reported.
        if let Some(attachment) = self.0.current().filter(|now| Arc::ptr_eq(&now.host, &writes.host)) {
            let copied = copied.into_iter().map(u8::from).collect();
            let done = v1::StoreDone { store_id: writes.store_id, copied };
            self.0.handle.block_on(attachment.tell(Question::StoreDone(done)));
        }
    }
}

impl Inner {
    /// How long a lookup's task goes on waiting: then the daemon is silent.
    fn patience(&self) -> Duration {
        self.settings.detach_after
    }
}

/// A place and a pin of each block that is to be written, from the columns of the wire.
fn writes_of(verdicts: &[u8], slots: &v1::Slots) -> Option<Vec<Write>> {
    let to_write = verdicts
        .iter()
        .enumerate()
        .filter(|(_, verdict)| i32::from(**verdict) == v1::StoreVerdict::Write as i32)
        .map(|(block, _)| block);
    let writes: Option<Vec<Write>> = to_write
        .enumerate()
        .map(|(row, block)| {
            let (segment, index) = (*slots.segments.get(row)?, *slots.indices.get(row)?);
            Some(Write { block, segment, index, pin: *slots.pins.get(row)? })
        })
        .collect();
    writes.filter(|writes| writes.len() == slots.segments.len())
}
