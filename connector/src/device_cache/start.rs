//! How a cache begins: with the daemon, or on memory of its own until the daemon appears.

use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::sync::Arc;
use std::time::Instant;

use kvbm_hash::BaseNamespace;
use kvbm_shm::{PoolLayout, PoolMemory};
use thiserror::Error;
use tokio::runtime::Handle;

use super::{CacheEvent, DeviceCache, Mode, Shortage};
use crate::desk::Desk;
use crate::exchange::{Arrival, Attempt, Command, Inbox, Opened, Opening, Waker};
use crate::link::{LinkHandle, LinkParts};
use crate::pool_table::{DaemonId, PoolTable};
use crate::{Config, Counters, DetachReason, Tenants, WorkerRegistration};

/// What [`DeviceCache::attach`] needs.
pub struct Startup {
    /// Settings.
    pub config: Config,
    /// Shape of the pool.
    pub layout: PoolLayout,
    /// What all its blocks have in common.
    pub base: BaseNamespace,
    /// How to be listed in the daemon's registry.
    pub worker: Option<WorkerRegistration>,
    /// Whose the namespaces are; of those that are not named, `config.tenant`'s.
    pub tenants: Tenants,
    /// Called when there is something to poll for.
    pub waker: Waker,
    /// Where the link runs; `None` gives it a thread of its own. Not a runtime that the caller blocks.
    pub runtime: Option<Handle>,
}

/// A pool of the engine's own making: what it is called and what it is to be like.
pub type MakePool<'a> = dyn FnOnce([u8; 16], PoolLayout) -> Result<PoolMemory, StartError> + 'a;

/// Why there is no cache at all.
#[derive(Debug, Error)]
pub enum StartError {
    /// There is no memory for the pool.
    #[error("create the pool: {0}")]
    Memory(#[from] kvbm_shm::Error),
    /// There is none on the GPU.
    #[error("create the pool on the GPU: {0}")]
    Device(String),
    /// The link has nothing to run on.
    #[error("start the link: {0}")]
    Link(#[from] std::io::Error),
}

/// A pool and who decides about it.
pub(super) struct Beginning {
    pub table: PoolTable,
    pub memory: PoolMemory,
    pub mode: Mode,
}

impl DeviceCache {
    /// The same allocator over private memory, without any daemon.
    pub fn private(layout: PoolLayout) -> Result<Self, StartError> {
        Self::private_in(layout, Box::new(in_host_memory))
    }

    /// As [`DeviceCache::private`], in memory that `make` makes.
    pub fn private_in(layout: PoolLayout, make: Box<MakePool<'_>>) -> Result<Self, StartError> {
        Ok(Self::begin(Config::new(""), None, private(layout, make)?))
    }

    /// Opens a pool at the daemon, waiting up to `init_timeout` for it. Without one it starts on private memory, and
    /// hands that over when a daemon appears. This is the only call here that waits.
    pub fn attach(startup: Startup) -> Result<Self, StartError> {
        Self::attach_or(startup, Box::new(in_host_memory))
    }

    /// As [`DeviceCache::attach`]; without a daemon it starts on memory that `make` makes.
    pub fn attach_or(startup: Startup, make: Box<MakePool<'_>>) -> Result<Self, StartError> {
        let Startup { config, layout, base, worker, tenants, waker, runtime } = startup;
        let inbox = Arc::new(Inbox::new(waker));
        let desk = Arc::new(Desk::default());
        let parts = LinkParts { config: config.clone(), tenants, layout, base, desk, inbox };
        let link = LinkHandle::start(parts, worker, runtime)?;
        let (beginning, event) = match open(&link, &config) {
            Ok((attempt, daemon, opened, memory)) => {
                let mut table = PoolTable::new_granted(layout.block_count);
                let inherited = table.inherit(opened.inherited);
                tracing::info!(pool = opened.pool_id, inherited, "attached to the daemon");
                let mode = Mode::Attached { attempt, daemon };
                let event = CacheEvent::Attached { pool_id: opened.pool_id };
                (Beginning { table, memory, mode }, Some(event))
            }
            Err(reason) => {
                tracing::warn!(%reason, "started without the daemon");
                (private(layout, make)?, None)
            }
        };
        let mut cache = Self::begin(config, Some(link), beginning);
        if let Some(event) = event {
            cache.counters.attached.set(1);
            cache.push(event);
            cache.top_up();
        }
        Ok(cache)
    }

    pub(super) fn begin(config: Config, link: Option<LinkHandle>, beginning: Beginning) -> Self {
        let Beginning { table, memory, mode } = beginning;
        Self {
            config,
            table,
            memory: Arc::new(memory),
            mode,
            link,
            breaker_open: false,
            events: VecDeque::new(),
            lookups: HashMap::new(),
            onboards: HashMap::new(),
            leases: HashMap::new(),
            notes: Vec::new(),
            grants: HashMap::new(),
            wanted: 0,
            shortage: Shortage::Unknown,
            releases: 0,
            numbers: 0,
            began: Instant::now(),
            counters: Arc::new(Counters::default()),
        }
    }
}

fn in_host_memory(uuid: [u8; 16], layout: PoolLayout) -> Result<PoolMemory, StartError> {
    Ok(PoolMemory::create(uuid, layout)?)
}

fn private(layout: PoolLayout, make: Box<MakePool<'_>>) -> Result<Beginning, StartError> {
    let mut uuid = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut uuid)?;
    let memory = make(uuid, layout)?;
    let table = PoolTable::new_private(layout.block_count);
    Ok(Beginning { table, memory, mode: Mode::Detached })
}

/// Waits until the daemon opened a fresh pool, refused to, or is not there.
fn open(link: &LinkHandle, config: &Config) -> Result<(Attempt, DaemonId, Opened, PoolMemory), DetachReason> {
    let mut deadline = Instant::now() + config.init_timeout;
    let mut opening = None;
    let mut last = DetachReason::Silent;
    loop {
        match link.inbox.wait(deadline) {
            Some((attempt, Arrival::Reachable { daemon })) => {
                opening = Some((attempt, daemon));
                // A daemon that has begun is waited for: a pool without a holder would stay with it.
                deadline = deadline.max(Instant::now() + config.attach_deadline * 2);
                link.send(attempt, Command::Open(Opening::Fresh))?;
            }
            Some((attempt, Arrival::Opened(opened))) => {
                let mut opened = *opened;
                if let (Some((_, daemon)), Some(memory)) = (opening, opened.memory.take()) {
                    return Ok((attempt, daemon, opened, memory));
                }
            }
            Some((_, Arrival::Down { reason: reason @ DetachReason::Refused(_), .. })) => return Err(reason),
            Some((_, Arrival::Down { reason, .. })) => {
                opening = None;
                last = reason;
                if Instant::now() >= deadline {
                    return Err(last);
                }
            }
            Some(_) => {}
            None => {
                if let Some((attempt, _)) = opening {
                    link.hang_up(attempt);
                }
                return Err(last);
            }
        }
    }
}
