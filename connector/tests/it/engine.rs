//! An engine's loop, as far as the cache is concerned.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use kvbm_connector::{
    Allocate, CacheEvent, CacheState, Config, DeviceCache, LeaseId, MakePool, Startup, Tenants,
    WorkerRegistration,
};
use kvbm_hash::{BaseNamespace, Namespace, Retention, SequenceHash};
use kvbm_shm::{PoolLayout, PoolMemory};

pub const BASE: BaseNamespace = BaseNamespace([3; 32]);
pub const NAMESPACE: Namespace = Namespace([7; 32]);

pub struct Engine {
    pub cache: DeviceCache,
    woken: Receiver<()>,
    pending: Vec<CacheEvent>,
}

/// Patient enough that no deadline passes by itself.
pub fn patient(socket: &Path) -> Config {
    Config {
        match_deadline: Duration::from_secs(60),
        detach_after: Duration::from_secs(60),
        attach_deadline: Duration::from_secs(10),
        ..Config::new(socket)
    }
}

pub fn layout(block_count: u32) -> PoolLayout {
    PoolLayout { block_bytes: 64, block_count }
}

pub fn key(at: u8) -> SequenceHash {
    SequenceHash([at + 1; 16])
}

pub fn keys(count: u8) -> Vec<SequenceHash> {
    (0..count).map(key).collect()
}

impl Engine {
    pub fn start(config: Config, block_count: u32) -> Self {
        Self::start_or(config, block_count, Box::new(|uuid, layout| Ok(PoolMemory::create(uuid, layout)?)))
    }

    /// With a pool that `make` makes if there is no daemon.
    pub fn start_or(config: Config, block_count: u32, make: Box<MakePool<'_>>) -> Self {
        let (wake, woken) = sync_channel(1);
        let waker = Arc::new(move || {
            let _ = wake.try_send(());
        });
        let worker =
            WorkerRegistration { worker_id: "w".into(), state: "ready".into(), ..Default::default() };
        let startup = Startup {
            config,
            layout: layout(block_count),
            base: BASE,
            worker: Some(worker),
            tenants: Tenants::default(),
            waker,
            runtime: None,
        };
        let mut cache = DeviceCache::attach_or(startup, make).unwrap();
        let first = cache.poll();
        let attached = matches!(cache.state(), CacheState::Attached { .. });
        assert_eq!(matches!(first[..], [CacheEvent::Attached { .. }]), attached, "{first:?}");
        Self { cache, woken, pending: Vec::new() }
    }

    /// Turns the loop until an event is what `pick` looks for. Others stay for later.
    pub fn until<T>(&mut self, what: &str, mut pick: impl FnMut(&CacheEvent) -> Option<T>) -> T {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let polled = self.cache.poll();
            self.pending.extend(polled);
            let found = self.pending.iter().enumerate().find_map(|(at, event)| Some((at, pick(event)?)));
            if let Some((at, found)) = found {
                self.pending.remove(at);
                self.cache.table().check_integrity().unwrap();
                return found;
            }
            match self.woken.recv_timeout(Duration::from_millis(50)) {
                Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => panic!("the link is gone"),
            }
            assert!(Instant::now() < deadline, "waited too long for {what}; {:?}", self.pending);
        }
    }

    pub fn until_state(&mut self, state: CacheState) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.cache.state() != state {
            let polled = self.cache.poll();
            self.pending.extend(polled);
            let _ = self.woken.recv_timeout(Duration::from_millis(10));
            assert!(Instant::now() < deadline, "waited too long for {state:?}");
        }
    }

    pub fn allocate(&mut self, count: usize) -> Vec<u32> {
        loop {
            match self.cache.allocate(count) {
                Allocate::Blocks(blocks) => return blocks,
                Allocate::Pending => {
                    self.until("grants", |event| (*event == CacheEvent::Granted).then_some(()));
                }
                Allocate::Exhausted => panic!("nothing left"),
            }
        }
    }

    pub fn look(&mut self, ticket: u64, count: u8) -> (Vec<u32>, u32, Option<LeaseId>) {
        self.cache.lookup(ticket, NAMESPACE, keys(count), vec![]);
        self.looked(ticket)
    }

    pub fn looked(&mut self, wanted: u64) -> (Vec<u32>, u32, Option<LeaseId>) {
        self.until("an answer to a lookup", |event| match event {
            CacheEvent::Looked { ticket, device, host_blocks, lease, .. } if *ticket == wanted => {
                Some((device.clone(), *host_blocks, *lease))
            }
            _ => None,
        })
    }

    pub fn onboarded(&mut self, wanted: u64) -> bool {
        self.until("an onboard", |event| match event {
            CacheEvent::Onboarded { ticket, ok } if *ticket == wanted => Some(*ok),
            _ => None,
        })
    }

    /// Computes the first `count` blocks of the one sequence there is.
    pub fn compute(&mut self, count: u8) -> Vec<u32> {
        let blocks = self.allocate(count.into());
        for (at, block) in (0..count).zip(&blocks) {
            self.commit(*block, at);
        }
        self.cache.flush();
        blocks
    }

    pub fn commit(&mut self, block: u32, at: u8) {
        let memory = self.cache.memory();
        memory.memory().write(memory.layout().offset(block), &[at + 1; 64]);
        self.cache.commit(block, NAMESPACE, key(at), at.checked_sub(1).map(key), Retention::default());
    }

    /// The first byte of a block.
    pub fn byte(&self, block: u32) -> u8 {
        let memory = self.cache.memory();
        let mut byte = [0];
        memory.memory().read(memory.layout().offset(block), &mut byte);
        byte[0]
    }
}
