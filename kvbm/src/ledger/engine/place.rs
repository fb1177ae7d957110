//! Places in host memory for shards of engines' blocks.

use super::Verdict;
use super::fill::{Begun, Fill, Shard};
use crate::ledger::disk::StoredBlock;
use crate::ledger::key::Key;
use crate::ledger::segments::{Claimed, Class, Place};
use crate::ledger::slots::{Allowances, Incoming, Need, NotReserved};
use crate::ledger::{Ledger, Millis, PoolId, Retention};
use crate::tier::Tier;

/// Why a shard is not copied.
pub(super) enum NotBegun {
    /// It will not be.
    Verdict(Verdict),
    /// There will be room.
    Later,
}

/// One shard that is to have a place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub pool: PoolId,
    pub block: Incoming,
    pub need: Need,
}

impl Ledger {
    pub(super) fn prepare_host(&mut self, class: Class, now: Millis) -> Allowances {
        let rights = Claimed { tier: Tier::Host, tenants: &self.tenants, now };
        self.host.claim_share(class, rights);
        self.tenants.in_segments(Tier::Host, &self.host, class)
    }

    pub(super) fn store_need(&self) -> Need {
        if self.disk.tier.is_on() { Need::Passing } else { Need::Optional }
    }

    /// Whether a block is in host memory, which is a use of it.
    pub(super) fn is_in_host(
        &mut self,
        id: PoolId,
        key: Key,
        retention: Option<Retention>,
        now: Millis,
    ) -> bool {
        let Some(pool) = self.engines.pools.get(&id) else { return false };
        let class = pool.identity.class();
        let Some(table) = self.host.class_mut(class) else { return false };
        let Some(slot) = table.slots.resident(key) else { return false };
        if let Some(retention) = retention {
            table.slots.set_retention(slot, retention, now);
        }
        let priority = table.slots.priority(slot);
        self.used_in_host(class, key, priority);
        true
    }

    /// A place for a shard: a new slot, or the one that other shards of the block are in.
    pub(super) fn begin_shard(
        &mut self,
        wanted: Wanted,
        allowances: &Allowances,
        now: Millis,
    ) -> Result<Place, NotBegun> {
        let Wanted { pool: id, block, need } = wanted;
        let key = block.key;
        let identity = &self.engines.pools[&id].identity;
        let (class, shard, shards) = (identity.class(), identity.shard, identity.shard_count);
        let engine = identity.engine;
        match self.join_fill(key, shard, id) {
            Begun::Copy(place) => return Ok(place),
            Begun::Elsewhere => return Err(NotBegun::Verdict(Verdict::InFlight)),
            Begun::Failing => return Err(NotBegun::Verdict(Verdict::Failed)),
            Begun::Unknown => {}
        }
        if block.retention.priority < self.config.offload_priority_min {
            self.tally.offloads_unimportant += 1;
            return Err(NotBegun::Verdict(Verdict::NotAdmitted));
        }
        let namespace = self.registry.namespace(key.namespace).map(|namespace| namespace.digest);
        let Some(namespace) = namespace else { return Err(NotBegun::Verdict(Verdict::Failed)) };
        let is_on = self.host.is_on();
        let node = self.engines.pools[&id].node;
        let Some(table) = self.host.make_room_near(class, node) else {
            return Err(NotBegun::Verdict(Verdict::Exhausted));
        };
        let target = match table.slots.reserve(block, need, allowances, now) {
            Ok(target) => target,
            Err(NotReserved::Resident) => return Err(NotBegun::Verdict(Verdict::Resident)),
            Err(NotReserved::Filling) => return Err(NotBegun::Verdict(Verdict::InFlight)),
            Err(NotReserved::Orphan) => return Err(NotBegun::Verdict(Verdict::Orphan)),
            Err(NotReserved::NotAdmitted | NotReserved::OverQuota) => {
                return Err(NotBegun::Verdict(Verdict::NotAdmitted));
            }
            Err(NotReserved::Exhausted) => {
                let counts = table.slots.counts();
                // Memory that is not populated yet, copies that end, leases that end: room will come.
                let later = is_on && (table.slots.slots() == 0 || counts.filling + counts.pinned > 0);
                self.tally.host_exhausted += u64::from(!later);
                return Err(if later { NotBegun::Later } else { NotBegun::Verdict(Verdict::Exhausted) });
            }
        };
        let place = table.place(target.slot());
        let stored =
            StoredBlock { namespace, key: key.hash, parent: block.parent, retention: block.retention };
        let mut states = vec![Shard::Missing; shards as usize];
        states[shard as usize] = Shard::Copying(id);
        let deadline = Millis(now.0 + self.config.shard_wait.as_millis() as u64);
        let (shards, failed) = (states, false);
        self.open_fill(key, Fill { engine, class, target, place, stored, shards, failed, deadline }, id);
        Ok(place)
    }
}
