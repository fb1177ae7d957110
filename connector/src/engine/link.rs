//! The session of one process of the engine: attaches for ever, keeps what the daemon hands over, asks it, and never
//! lets the engine wait for it longer than once.
//!
//! ```text
//!  connect ──► open pool (staged) ──► map words and segments ──► serve ──► former
//!     ▲                                                            │ ended, silent
//!     └────────────────────────────── pause ◄──────────────────────┘
//! ```
//!
//! What a session mapped stays mapped as long as promises made in it are left: they are kept from there. Memory that the
//! next session is given again stays as it is.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvbm_hash::{BaseNamespace, Namespace, SequenceHash};
use kvbm_proto::v1;
use parking_lot::{Mutex, RwLock};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::watch;

use super::export::Exported;
use super::generations::Generations;
use super::host::{Host, HostMemory, MappedSegment, StoreRequest, Stored, Write, WritePins, Writes};
use super::metadata::Lease;
use super::pool::{Mover, PoolShape};
use super::scheduler::{Arrival, Directory, Look, Promised};
use super::settings::EngineSettings;
use crate::client::Client;
use crate::lookups::Lookups;
use crate::session::Question;

mod ask;
mod attach;
mod breaker;
mod direct;
mod wait;

use ask::Found;
use breaker::Breaker;
use direct::Direct;

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
    /// Lookups on the session's stream, because the connection for lookups was not to be had.
    pub lookups_on_stream: AtomicU64,
    /// Requests that waited for blocks from disk.
    pub disk_waits: AtomicU64,
    /// Host segments that were mapped already when a session brought them.
    pub segments_kept: AtomicU64,
}

/// What was registered.
pub(crate) struct Registered {
    pub base: BaseNamespace,
    /// Bytes of a block, all ranks'.
    pub block_bytes: usize,
    /// `None`: a process without KV memory, which only asks.
    pub pool: Option<RegisteredPool>,
}

/// KV memory of this process.
pub(crate) struct RegisteredPool {
    pub shape: PoolShape,
    pub device: String,
    pub mover: Arc<dyn Mover>,
    pub generations: Arc<Generations>,
    /// For the daemon to copy out of, or why it cannot.
    pub exported: Result<Arc<Exported>, String>,
}

/// Namespaces that are made known in a new session before it is asked for anything, at most.
const NAMESPACES_KEPT: usize = 64;

/// How long entries that a session left are looked after when it is over.
const PINS_KEPT: Duration = Duration::from_secs(30);

/// A session that is open.
struct Attachment {
    client: Client,
    pool: Option<OpenPool>,
    namespaces: tokio::sync::Mutex<HashMap<Namespace, u32>>,
    /// Where the engine's thread asks by itself. `None` while a late answer is waited for, and where there is no such.
    lookups: Mutex<Option<Lookups>>,
    /// Set to end it.
    given_up: watch::Sender<bool>,
}

/// The pool of this process, as the daemon knows it.
struct OpenPool {
    id: u32,
    /// Who copies blocks out.
    mode: v1::PoolMode,
    host: Arc<HostMemory>,
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
    /// Entries of sessions that are over, and since when.
    former_writes: Mutex<Vec<(Instant, Arc<WritePins>)>>,
    /// Those asked for last.
    namespaces: Mutex<VecDeque<Namespace>>,
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
        let breaker = Breaker::new(settings.lookup_deadline);
        // That of most requests is made known before the first of them comes.
        let plain = settings.namespace(registered.base, None, None);
        let link = EngineLink(Arc::new(Inner {
            settings,
            registered,
            handle: runtime.handle().clone(),
            current: RwLock::default(),
            former: Mutex::default(),
            former_writes: Mutex::default(),
            namespaces: Mutex::new([plain].into()),
            breaker,
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

    /// True while the daemon copies blocks out by itself.
    pub fn is_ipc(&self) -> bool {
        let mode = self.0.current().and_then(|attachment| Some(attachment.pool.as_ref()?.mode));
        mode == Some(v1::PoolMode::Ipc)
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
        let current = self.current().and_then(|attachment| Some(attachment.pool.as_ref()?.host.clone()));
        current.into_iter().chain(self.former.lock().iter().rev().cloned()).collect()
    }

    /// Segments of all of them, by the names of their memory.
    fn mapped(&self) -> HashMap<(u64, u64), Arc<MappedSegment>> {
        let of = |host: Arc<HostMemory>| host.segments.read().values().cloned().collect::<Vec<_>>();
        self.memories().into_iter().flat_map(of).filter_map(|mapped| Some((mapped.id()?, mapped))).collect()
    }

    fn keep(&self, host: Arc<HostMemory>) {
        let mut former = self.former.lock();
        former.push_back(host);
        let dropped = (former.len() > FORMER_MAX).then(|| former.pop_front());
        drop(former);
        self.let_go(dropped);
    }

    /// Has memory unmapped where nobody waits: a device takes long to forget it.
    fn let_go(&self, memory: impl Send + 'static) {
        self.handle.spawn_blocking(move || drop(memory));
    }

    /// Lets go of memory in which no promise is left: it may be all that is left of a daemon's.
    fn forget_former(&self) {
        let mut former = self.former.lock();
        let (kept, dropped): (VecDeque<_>, VecDeque<_>) = former.drain(..).partition(|host| host.is_pinned());
        *former = kept;
        drop(former);
        if !dropped.is_empty() {
            self.let_go(dropped);
        }
        let mut writes = self.former_writes.lock();
        writes.retain(|(ended, writes)| {
            writes.end_session();
            ended.elapsed() < PINS_KEPT
        });
    }

    /// A namespace was asked for; it will be again.
    fn note_namespace(&self, namespace: Namespace) {
        let mut namespaces = self.namespaces.lock();
        namespaces.retain(|known| *known != namespace);
        namespaces.push_back(namespace);
        if namespaces.len() > NAMESPACES_KEPT {
            namespaces.pop_front();
        }
    }
}

impl EngineLink {
    /// What is in host memory behind the first `skip` blocks, and how many behind that are on disk.
    fn ask(
        &self,
        namespace: Namespace,
        keys: &[SequenceHash],
        skip: usize,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Option<Found> {
        let inner = &self.0;
        let begun = Instant::now();
        let asked = inner.current().zip(inner.breaker.patience(begun));
        let Some((attachment, patience)) = asked else {
            inner.counts.lookups_skipped.fetch_add(1, Ordering::Relaxed);
            return None;
        };
        let deadline = begun + patience;
        let told = match inner.ask_directly(&attachment, (namespace, keys, skip), deadline, meanwhile) {
            Some(Direct::Told(found)) => Some(found),
            Some(Direct::Late) => None,
            None => self.ask_on_stream(attachment, (namespace, keys, skip), deadline, meanwhile),
        };
        match told {
            Some(found) => {
                let now = Instant::now();
                inner.breaker.answered(now, now - begun);
                found
            }
            None => {
                inner.counts.lookup_timeouts.fetch_add(1, Ordering::Relaxed);
                inner.breaker.open(Instant::now());
                None
            }
        }
    }

    /// `None`: not in time.
    fn ask_on_stream(
        &self,
        attachment: Arc<Attachment>,
        (namespace, keys, skip): (Namespace, &[SequenceHash], usize),
        deadline: Instant,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Option<Option<Found>> {
        let inner = &self.0;
        inner.counts.lookups_on_stream.fetch_add(1, Ordering::Relaxed);
        let (asking, keys) = (inner.clone(), keys.to_vec());
        let asked = attachment.clone();
        let mut answer = Box::pin(async move { asking.look_up(&asked, namespace, &keys, skip).await });
        let _entered = inner.handle.enter();
        let found = wait::until(&mut answer, deadline, meanwhile);
        if found.is_none() {
            let late = inner.clone();
            // It says whether the daemon lives; what it brings goes back.
            inner.handle.spawn(async move {
                if let Some((Some(promised), _)) = answer.await {
                    late.take_back(&attachment, promised.lease);
                }
            });
        }
        found
    }

    fn found(&self, promised: Option<Promised>) -> Option<Promised> {
        promised.inspect(|_| {
            self.0.counts.lookups_found.fetch_add(1, Ordering::Relaxed);
        })
    }

    /// Has blocks brought from disk to host memory.
    fn fetch(&self, namespace: Namespace, keys: &[SequenceHash], blocks: usize) -> Option<Arrival> {
        let patience = self.0.settings.wait_for_disk(self.0.registered.block_bytes.saturating_mul(blocks));
        let attachment = self.0.current().filter(|_| !patience.is_zero())?;
        let ended = Arc::new(AtomicBool::new(false));
        let (asked, keys, told) = (self.0.clone(), keys.to_vec(), ended.clone());
        self.0.counts.disk_waits.fetch_add(1, Ordering::Relaxed);
        self.0.handle.spawn(async move {
            tokio::select! {
                () = asked.bring(&attachment, namespace, &keys, patience) => {}
                () = asked.silence(&attachment) => asked.breaker.open(Instant::now()),
            }
            told.store(true, Ordering::Release);
        });
        Some(Arrival { ended, patience })
    }
}

impl Directory for EngineLink {
    fn look_up(
        &self,
        namespace: Namespace,
        keys: &[SequenceHash],
        skip: usize,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Option<Promised> {
        self.found(self.ask(namespace, keys, skip, meanwhile)?.0)
    }

    fn look_up_patiently(&self, namespace: Namespace, keys: &[SequenceHash], skip: usize) -> Look {
        let Some((promised, on_disk)) = self.ask(namespace, keys, skip, &mut || false) else {
            return Look::Now(None);
        };
        if on_disk > 0 {
            let in_host = promised.as_ref().map_or(0, |promised| promised.slots.len());
            let end = keys.len().min(skip + in_host + on_disk);
            if let Some(arrival) = self.fetch(namespace, &keys[..end], on_disk) {
                // While it waits it holds nothing.
                if let Some(promised) = promised {
                    self.take_back(promised.lease);
                }
                return Look::Later(arrival);
            }
        }
        Look::Now(self.found(promised))
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

    fn store(&self, request: &StoreRequest) -> Option<Stored> {
        let attachment = self.0.current()?;
        let stored = self.0.handle.block_on(self.0.store(&attachment, request));
        stored.inspect_err(|error| tracing::debug!(%error, "blocks were not stored")).ok()
    }

    fn store_done(&self, writes: &Writes, copied: Vec<bool>) {
        // What a session that is over does not report, the daemon sees by the entries that were cleared.
        let is_current = |now: &Arc<Attachment>| {
            now.pool.as_ref().is_some_and(|pool| Arc::ptr_eq(&pool.host, &writes.host))
        };
        if let Some(attachment) = self.0.current().filter(is_current) {
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
