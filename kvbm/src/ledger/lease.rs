//! Leases: the right to copy a matched prefix out of host memory.
//!
//! A lease pins the deepest block only; the blocks before it cannot be evicted while it is there. Its deadline ends it
//! only while nothing has started: once a copy begins, the copy holds the pin.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kvbm_hash::SequenceHash;

use super::device::{Backlogged, DevicePool};
use super::engine::EngineLease;
use super::key::{Key, NamespaceId};
use super::peers::{PeerAsk, PeerSource};
use super::pools::Held;
use super::segments::{Class, SegmentTier};
use super::slots::SlotIndex;
use super::{BlockRef, Ledger, Millis, Owner, PoolId, Retention, SessionId};
use crate::error::Refused;

/// Number of a lease within one life of the daemon. Never reused, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// The longest prefix that is held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matched {
    /// Leading blocks in the pool that was asked, each with one more pin.
    pub device: Vec<BlockRef>,
    /// Blocks directly behind them in host memory.
    pub host_blocks: usize,
    /// Blocks directly behind those of the device in another pool of this node, where host memory has fewer; then it counts
    /// for nothing here.
    pub peer_blocks: usize,
    /// Blocks directly behind those on disk: on their way to host memory, not pinned.
    pub disk_blocks: usize,
    /// Pins the host blocks, or those of the other pool, if there are any.
    pub lease: Option<LeaseId>,
}

/// One lease.
#[derive(Debug)]
pub(super) struct Lease {
    pub session: SessionId,
    pub namespace: NamespaceId,
    pub class: Class,
    pub deepest: SlotIndex,
    /// Blocks of the prefix that the lease is about: its last `count`.
    pub count: usize,
    /// `None`: it does not end by itself.
    pub expires: Option<Millis>,
    /// Of an engine: its ranks use it.
    pub engine: Option<EngineLease>,
    /// Then `deepest` is a block of another pool.
    pub peer: Option<PeerSource>,
}

/// All leases.
#[derive(Debug, Default)]
pub(super) struct Leases {
    leases: HashMap<LeaseId, Lease>,
    deadlines: BTreeSet<(Millis, LeaseId)>,
    last: u64,
}

impl Leases {
    pub fn add(&mut self, lease: Lease) -> LeaseId {
        self.last += 1;
        let id = LeaseId(self.last);
        if let Some(expires) = lease.expires {
            self.deadlines.insert((expires, id));
        }
        self.leases.insert(id, lease);
        id
    }

    pub fn get(&self, id: LeaseId) -> Option<&Lease> {
        self.leases.get(&id)
    }

    pub fn get_mut(&mut self, id: LeaseId) -> Option<&mut Lease> {
        self.leases.get_mut(&id)
    }

    pub fn remove(&mut self, id: LeaseId) -> Option<Lease> {
        self.keep(id);
        self.leases.remove(&id)
    }

    /// Something has started on it: it has no deadline any more.
    pub fn keep(&mut self, id: LeaseId) {
        let expires = self.leases.get_mut(&id).and_then(|lease| lease.expires.take());
        if let Some(expires) = expires {
            self.deadlines.remove(&(expires, id));
        }
    }

    /// Those that pin tables hold.
    pub fn held(&self) -> impl Iterator<Item = LeaseId> + '_ {
        let is_held = |lease: &Lease| lease.engine.as_ref().is_some_and(|of| of.pin.is_some());
        self.leases.iter().filter(move |(_, lease)| is_held(lease)).map(|(id, _)| *id)
    }

    /// Those that a rank of an engine is not done with.
    pub fn held_by(&self, rank: PoolId) -> Vec<LeaseId> {
        let theirs = |lease: &Lease| lease.engine.as_ref().is_some_and(|of| of.ranks.contains(&rank));
        let mut ids: Vec<_> =
            self.leases.iter().filter(|(_, lease)| theirs(lease)).map(|(id, _)| *id).collect();
        ids.sort();
        ids
    }

    /// Whether there is one that a rank of an engine is not done with.
    pub fn is_held_by(&self, rank: PoolId) -> bool {
        self.leases.values().any(|lease| lease.engine.as_ref().is_some_and(|of| of.ranks.contains(&rank)))
    }

    pub fn of_session(&self, session: SessionId) -> Vec<LeaseId> {
        let mut ids: Vec<_> =
            self.leases.iter().filter(|(_, lease)| lease.session == session).map(|(id, _)| *id).collect();
        ids.sort();
        ids
    }

    /// Those that are about blocks of a pool.
    pub fn of_peer(&self, pool: PoolId) -> Vec<LeaseId> {
        let theirs = |lease: &Lease| lease.peer.as_ref().is_some_and(|peer| peer.pool == pool);
        let mut ids: Vec<_> =
            self.leases.iter().filter(|(_, lease)| theirs(lease)).map(|(id, _)| *id).collect();
        ids.sort();
        ids
    }

    pub fn expired(&self, now: Millis) -> Vec<LeaseId> {
        self.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| *id).collect()
    }

    pub fn len(&self) -> usize {
        self.leases.len()
    }

    pub fn check_integrity(&self, host: &SegmentTier, pools: &BTreeMap<PoolId, DevicePool>) {
        let with_deadline = self.leases.values().filter(|lease| lease.expires.is_some()).count();
        assert_eq!(with_deadline, self.deadlines.len());
        for (id, lease) in &self.leases {
            if let Some(peer) = &lease.peer {
                let pool = pools.get(&peer.pool).expect("leases end before their pool does");
                assert!(pool.slots.block(lease.deepest).is_some(), "{id:?} is about a resident block");
                continue;
            }
            let table = host.class(lease.class).expect("a lease is about a class that exists");
            assert!(table.slots.pins(lease.deepest) > 0, "{id:?} has its pin");
            assert!(table.slots.block(lease.deepest).is_some(), "{id:?} is about a resident block");
        }
    }
}

/// What is looked for.
#[derive(Debug, Clone, Copy)]
struct Asked<'a> {
    session: SessionId,
    namespace: NamespaceId,
    hashes: &'a [SequenceHash],
    retention: &'a [Option<Retention>],
}

impl Ledger {
    /// The longest prefix of `hashes` that is held, pinned for the session. `retention` says how each of the first of
    /// them is to be kept from now on, wherever it is; where nothing is said, a priority stays, and a duration ends.
    pub fn match_prefix(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        hashes: &[SequenceHash],
        pool: Option<PoolId>,
        retention: &[Option<Retention>],
        now: Millis,
    ) -> Result<Matched, Refused> {
        let base = self.registry.base_of(session, namespace)?;
        let key = |i: usize| Key { namespace, hash: hashes[i] };
        let (mut device, offloads) = (Vec::new(), self.host.is_on());
        if let Some(id) = pool {
            let pool = self.owned_pool_mut(session, id)?;
            let (blocks, deepest) = pool.slots.prefix(key, hashes.len());
            let mut chain = deepest.map_or(Vec::new(), |deepest| pool.slots.chain(deepest, blocks));
            // Prefixes are closed, but whether these keys are one is the client's word.
            let is_meant = |(i, slot): (usize, &SlotIndex)| pool.slots.holds(*slot, key(i));
            let meant = chain.iter().enumerate().take_while(|at| is_meant(*at)).count();
            chain.truncate(meant);
            chain.iter().for_each(|slot| pool.slots.pin(*slot));
            if let Some(deepest) = chain.last().copied() {
                pool.slots.reuse(deepest, retention, now);
                // Wanted again: it may be worth a place in host now.
                if offloads && pool.slots.is_left_out(deepest) {
                    pool.slots.try_again(deepest);
                    let block = pool.block_ref(deepest);
                    pool.backlog.push_back(Backlogged { block, key: key(chain.len() - 1) });
                }
            }
            device.extend(chain.into_iter().map(|slot| pool.block_ref(slot)));
        }
        let (in_host, in_peer, on_disk, lease) = match self.host_class(session, &base) {
            None => (0, 0, 0, None),
            Some(class) => {
                let asked = Asked { session, namespace, hashes, retention };
                let (mut in_host, mut lease) = self.lease_host(asked, class, device.len(), now);
                let in_device = device.len();
                let further = pool.and_then(|into| {
                    let ask =
                        PeerAsk { session, namespace, class, hashes, retention, into, in_device, in_host };
                    self.lease_peer(ask, now)
                });
                let in_peer = further.map_or(0, |(blocks, _)| blocks);
                if let Some((_, further)) = further {
                    if let Some(fewer) = lease.replace(further) {
                        self.end_lease(fewer, now);
                    }
                    in_host = 0;
                }
                let on_disk = self.disk_prefix(class, namespace, hashes);
                if let Some((deepest, _)) = on_disk {
                    let table = self.disk.tier.class_mut(class).expect("it was found there");
                    table.slots.reuse(deepest, retention, now);
                }
                (in_host, in_peer, on_disk.map_or(0, |(_, blocks)| blocks), lease)
            }
        };
        let behind = |blocks: usize| blocks.saturating_sub(device.len());
        let (host_blocks, peer_blocks) = (behind(in_host), behind(in_peer));
        let disk_blocks = on_disk.saturating_sub(in_host.max(in_peer).max(device.len()));
        Ok(Matched { device, host_blocks, peer_blocks, disk_blocks, lease })
    }

    fn lease_host(
        &mut self,
        asked: Asked<'_>,
        class: Class,
        in_device: usize,
        now: Millis,
    ) -> (usize, Option<LeaseId>) {
        let Asked { session, namespace, hashes, retention } = asked;
        let Some(table) = self.host.class_mut(class) else { return (0, None) };
        let key = |i: usize| Key { namespace, hash: hashes[i] };
        let (blocks, deepest) = table.slots.prefix(key, hashes.len());
        let Some(deepest) = deepest else { return (0, None) };
        table.slots.reuse(deepest, retention, now);
        let priority = table.slots.priority(deepest);
        if blocks <= in_device {
            self.used_in_host(class, key(blocks - 1), priority);
            return (blocks, None);
        }
        table.slots.pin(deepest);
        self.used_in_host(class, key(blocks - 1), priority);
        let expires = Some(Millis(now.0 + self.config.lease.as_millis() as u64));
        let count = blocks - in_device;
        let lease = Lease { session, namespace, class, deepest, count, expires, engine: None, peer: None };
        (blocks, Some(self.leases.add(lease)))
    }

    /// The session does not want the lease any more.
    pub fn release_lease(&mut self, session: SessionId, lease: LeaseId, now: Millis) -> Result<(), Refused> {
        self.leases.get(lease).filter(|l| l.session == session).ok_or(Refused::Unknown { what: "lease" })?;
        self.end_lease(lease, now);
        Ok(())
    }

    pub(super) fn end_lease(&mut self, id: LeaseId, now: Millis) {
        let Some(lease) = self.leases.remove(id) else { return };
        if let Some(PeerSource { pool, hold }) = lease.peer {
            return self.end_peer_holds(pool, std::iter::once(hold), now);
        }
        let table = self.host.class_mut(lease.class).expect("a lease is about a class that exists");
        table.slots.unpin(lease.deepest, 1, now);
        if let Some(engine) = &lease.engine {
            self.free_lease_pin(engine);
        }
    }

    /// Where the blocks of a base namespace are in host, for this session's domain.
    pub(super) fn host_class(&self, session: SessionId, base: &[u8; 32]) -> Option<Class> {
        let domain = self.registry.session(session).ok()?.domain;
        self.stride(domain, *base).map(|stride| Class { domain, stride })
    }

    /// Asks nothing of the pool but that the session writes it now.
    pub(super) fn owned_pool_mut(
        &mut self,
        session: SessionId,
        id: PoolId,
    ) -> Result<&mut super::DevicePool, Refused> {
        let pool = self.pools.get_mut(&id).filter(|pool| pool.owner == Owner::Session(session));
        pool.ok_or(Refused::Unknown { what: "pool" })
    }

    /// Pins given to a session, per block: for tests and status.
    pub fn held_blocks(&self, id: PoolId) -> Vec<Held> {
        let Some(pool) = self.pools.get(&id) else { return Vec::new() };
        let slots = (0..pool.identity.layout.block_count).map(SlotIndex);
        let held = slots.filter(|slot| pool.slots.pins(*slot) > 0);
        held.map(|slot| Held { block: pool.block_ref(slot), pins: pool.slots.pins(slot) }).collect()
    }
}
