//! Pins of users: blocks that stay for a time, whatever else wants their place.
//!
//! A pin is about keys, not slots: it holds a block in every tier where it is, and where it comes later. The blocks before
//! a pinned one stay too, so they belong to the pin and are counted. A namespace has a budget; each block counts once in
//! each pin that names it, whatever the tiers it is in. In a device pool, pins hold no more than half of the blocks: an
//! engine has to compute in the others.
//!
//! Pins end by their time, by [`Ledger::unpin`], and with the daemon.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use kvbm_hash::SequenceHash;

use super::key::{Key, NamespaceId};
use super::slots::SlotTable;
use super::{Ledger, Millis, Owner};
use crate::error::Refused;
use crate::tier::Tier;

/// Number of a pin within one life of the daemon. Never reused, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PinId(pub u64);

/// What is to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinWhat<'a> {
    /// These blocks, each behind the one before: as many of the first as are somewhere, and what is before them.
    Prefix(&'a [SequenceHash]),
    /// These blocks, and what is before them.
    Keys(&'a [SequenceHash]),
}

/// What a pin holds from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pinned {
    /// Which.
    pub id: PinId,
    /// Blocks held in each tier.
    pub blocks_by_tier: BTreeMap<Tier, usize>,
    /// Bytes that count against the budget.
    pub bytes: u64,
    /// Blocks that were asked for and are nowhere: not pinned.
    pub missing: usize,
}

/// A pin, to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinInfo {
    /// Which.
    pub id: PinId,
    /// Whose blocks.
    pub namespace: NamespaceId,
    /// How many.
    pub blocks: usize,
    /// Bytes that count against the budget.
    pub bytes: u64,
    /// When it ends.
    pub until: Millis,
}

#[derive(Debug)]
struct Pin {
    namespace: NamespaceId,
    keys: Vec<SequenceHash>,
    bytes: u64,
    until: Millis,
}

/// All pins.
#[derive(Debug, Default)]
pub(super) struct Pins {
    pins: BTreeMap<PinId, Pin>,
    /// In how many pins each key is.
    keys: HashMap<Key, u32>,
    ends: BTreeSet<(Millis, PinId)>,
    used_bytes: HashMap<NamespaceId, u64>,
    last: u64,
}

impl Pins {
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    pub fn contains(&self, key: Key) -> bool {
        self.keys.contains_key(&key)
    }

    fn add(&mut self, pin: Pin) -> PinId {
        self.last += 1;
        let id = PinId(self.last);
        for hash in &pin.keys {
            *self.keys.entry(Key { namespace: pin.namespace, hash: *hash }).or_default() += 1;
        }
        *self.used_bytes.entry(pin.namespace).or_default() += pin.bytes;
        self.ends.insert((pin.until, id));
        self.pins.insert(id, pin);
        id
    }

    /// The pin, and those of its keys that no other pin holds.
    fn remove(&mut self, id: PinId) -> Option<(NamespaceId, Vec<Key>)> {
        let pin = self.pins.remove(&id)?;
        self.ends.remove(&(pin.until, id));
        let used = self.used_bytes.get_mut(&pin.namespace).expect("it was counted");
        *used -= pin.bytes;
        if *used == 0 {
            self.used_bytes.remove(&pin.namespace);
        }
        let mut let_go = Vec::new();
        for hash in pin.keys {
            let key = Key { namespace: pin.namespace, hash };
            let count = self.keys.get_mut(&key).expect("it was counted");
            *count -= 1;
            if *count == 0 {
                self.keys.remove(&key);
                let_go.push(key);
            }
        }
        Some((pin.namespace, let_go))
    }

    fn ended(&self, now: Millis) -> Vec<PinId> {
        self.ends.iter().take_while(|(until, _)| *until <= now).map(|(_, id)| *id).collect()
    }

    pub fn check_integrity(&self) {
        assert_eq!(self.pins.len(), self.ends.len());
        let named: usize = self.pins.values().map(|pin| pin.keys.len()).sum();
        assert_eq!(named, self.keys.values().map(|count| *count as usize).sum::<usize>());
        let bytes: u64 = self.pins.values().map(|pin| pin.bytes).sum();
        assert_eq!(bytes, self.used_bytes.values().sum::<u64>());
    }
}

/// Blocks, each behind the one before it.
#[derive(Debug, Default)]
struct Chains {
    keys: Vec<SequenceHash>,
    known: HashSet<SequenceHash>,
}

/// Blocks of a pool that pins may hold.
fn pool_share(slots: &SlotTable) -> usize {
    slots.slots() / 2
}

impl Ledger {
    /// Keeps blocks where they are until `until`. Those that are nowhere are reported as missing.
    pub fn pin_blocks(
        &mut self,
        namespace: NamespaceId,
        what: PinWhat<'_>,
        until: Millis,
        now: Millis,
    ) -> Result<Pinned, Refused> {
        if until <= now {
            return Err(Refused::invalid("until", "has passed already"));
        }
        self.registry.namespace(namespace).ok_or(Refused::Unknown { what: "namespace" })?;
        let (PinWhat::Prefix(hashes) | PinWhat::Keys(hashes)) = what;
        let mut chains = Chains::default();
        let there = hashes.iter().map(|hash| self.add_chain(namespace, *hash, &mut chains));
        let missing = match what {
            PinWhat::Prefix(hashes) => hashes.len() - there.take_while(|there| *there).count(),
            PinWhat::Keys(_) => there.filter(|there| !there).count(),
        };
        let keys: Vec<SequenceHash> = chains.keys;
        let Some(stride) = keys.first().and_then(|hash| self.stride_of(Key { namespace, hash: *hash }))
        else {
            return Err(Refused::invalid("keys", "none of these blocks is in any tier"));
        };
        let wanted = keys.len() as u64 * stride as u64;
        let used = self.pins.used_bytes.get(&namespace).copied().unwrap_or(0);
        let budget = self.config.pin_budget_bytes;
        if used.saturating_add(wanted) > budget {
            return Err(Refused::OverBudget { what: "pins of the namespace", budget, used, wanted });
        }
        let blocks_by_tier = self.keep(keys.iter().map(|hash| Key { namespace, hash: *hash }));
        self.registry.hold_known(namespace);
        let id = self.pins.add(Pin { namespace, keys, bytes: wanted, until });
        Ok(Pinned { id, blocks_by_tier, bytes: wanted, missing })
    }

    /// Ends a pin.
    pub fn unpin(&mut self, id: PinId, now: Millis) -> Result<(), Refused> {
        let (namespace, keys) = self.pins.remove(id).ok_or(Refused::Unknown { what: "pin" })?;
        for (_, slots) in self.tables_mut() {
            for slot in keys.iter().filter_map(|key| slots.resident(*key)).collect::<Vec<_>>() {
                slots.let_go(slot, now);
            }
        }
        self.registry.let_go(namespace);
        Ok(())
    }

    pub(super) fn end_pins(&mut self, now: Millis) {
        for id in self.pins.ended(now) {
            self.unpin(id, now).expect("listed just now");
        }
    }

    /// All pins.
    pub fn pins(&self) -> Vec<PinInfo> {
        let info = |(id, pin): (&PinId, &Pin)| PinInfo {
            id: *id,
            namespace: pin.namespace,
            blocks: pin.keys.len(),
            bytes: pin.bytes,
            until: pin.until,
        };
        self.pins.pins.iter().map(info).collect()
    }

    /// Bytes that pins of a namespace hold, and may hold.
    pub fn pinned_bytes(&self, namespace: NamespaceId) -> (u64, u64) {
        (self.pins.used_bytes.get(&namespace).copied().unwrap_or(0), self.config.pin_budget_bytes)
    }

    /// Bytes of the slot of a block, if it is anywhere.
    fn stride_of(&self, key: Key) -> Option<usize> {
        let mut tables = self.all_tables();
        tables.find_map(|(stride, slots)| slots.resident(key).map(|_| stride))
    }

    /// Adds a block and those before it. False: it is nowhere.
    fn add_chain(&self, namespace: NamespaceId, hash: SequenceHash, chains: &mut Chains) -> bool {
        if chains.known.contains(&hash) {
            return true;
        }
        let found = self.all_tables().find_map(|(_, slots)| {
            let slot = slots.resident(Key { namespace, hash })?;
            Some(slots.ancestors(slot).filter_map(|slot| slots.block(slot)).map(|(key, _)| key.hash))
        });
        let Some(chain) = found else { return false };
        let mut new: Vec<SequenceHash> = chain.take_while(|hash| chains.known.insert(*hash)).collect();
        new.reverse();
        chains.keys.append(&mut new);
        true
    }

    /// Keeps the blocks of these keys, parents first, wherever they are.
    fn keep(&mut self, keys: impl Iterator<Item = Key> + Clone) -> BTreeMap<Tier, usize> {
        let mut kept = BTreeMap::new();
        for (tier, slots) in self.tables_mut() {
            for key in keys.clone() {
                if tier == Tier::Device && slots.kept() >= pool_share(slots) {
                    break;
                }
                if let Some(slot) = slots.resident(key) {
                    slots.keep(slot);
                    *kept.entry(tier).or_default() += 1;
                }
            }
        }
        kept
    }

    /// Holds what is pinned in tables that were not there before.
    pub(super) fn keep_pinned(&mut self) {
        let of = |pin: &Pin| {
            let namespace = pin.namespace;
            pin.keys.iter().map(move |hash| Key { namespace, hash: *hash }).collect::<Vec<_>>()
        };
        let keys: Vec<Key> = self.pins.pins.values().flat_map(of).collect();
        self.keep(keys.into_iter());
    }

    /// Holds what is pinned and has just become resident.
    pub(super) fn keep_arrivals(&mut self) {
        if self.pins.is_empty() {
            return;
        }
        let Self { pools, host, disk, pins, .. } = self;
        for pool in pools.values_mut() {
            let share = pool_share(&pool.slots);
            pool.slots.keep_stored(|key| pins.contains(key), share);
        }
        let classes = host.classes_mut().chain(disk.tier.classes_mut());
        classes.for_each(|(_, table)| table.slots.keep_stored(|key| pins.contains(key), usize::MAX));
    }

    fn all_tables(&self) -> impl Iterator<Item = (usize, &SlotTable)> {
        let tiers = [Tier::Host, Tier::Disk, Tier::Device];
        tiers.into_iter().flat_map(|tier| self.tables_of(tier))
    }

    fn tables_mut(&mut self) -> impl Iterator<Item = (Tier, &mut SlotTable)> {
        let living = self.pools.values_mut().filter(|pool| pool.owner != Owner::Retired);
        let pools = living.map(|pool| (Tier::Device, &mut pool.slots));
        let host = self.host.classes_mut().map(|(_, table)| (Tier::Host, &mut table.slots));
        let disk = self.disk.tier.classes_mut().map(|(_, table)| (Tier::Disk, &mut table.slots));
        pools.chain(host).chain(disk)
    }
}
