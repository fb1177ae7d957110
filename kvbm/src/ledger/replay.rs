//! A door for replaying traces: blocks become resident in host memory without a pool that they are copied from.
//!
//! Everything is decided by the tables that serve the daemon; only the copies are left out, as if each ended at once.

use kvbm_hash::SequenceHash;

use super::key::{Key, NamespaceId};
use super::segments::Claimed;
use super::slots::{Incoming, Need, NotReserved};
use super::{Ledger, Millis, Retention, SessionId};
use crate::error::Refused;
use crate::tier::Tier;

/// What became of blocks that were to be stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Blocks that were not resident and are now.
    pub blocks: usize,
    /// The block before the first that is missing is not resident: nothing behind it can be stored.
    pub is_orphan: bool,
}

impl Ledger {
    /// Blocks of a base namespace have this size, although no pool holds them.
    pub fn declare_blocks(
        &mut self,
        session: SessionId,
        base: [u8; 32],
        stride: usize,
    ) -> Result<(), Refused> {
        let domain = self.registry.session(session)?.domain;
        self.strides.insert((domain, base), stride);
        Ok(())
    }

    /// Stores the blocks of a sequence behind `parent` in host memory, first one first, as far as there is room. What
    /// is stored already is left as it is. The blocks before a block are not evicted for it.
    pub fn store_in_host(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        parent: Option<SequenceHash>,
        hashes: &[SequenceHash],
        now: Millis,
    ) -> Result<Stored, Refused> {
        let base = self.registry.base_of(session, namespace)?;
        let mut stored = Stored::default();
        let Some(class) = self.host_class(session, &base) else { return Ok(stored) };
        self.host.claim_share(class, Claimed { tier: Tier::Host, tenants: &self.tenants, now });
        let allowances = self.tenants.in_segments(Tier::Host, &self.host, class);
        let (group, retention) = (self.registry.group_of(namespace), Retention::default());
        let need = if self.disk.tier.is_on() { Need::Passing } else { Need::Optional };
        let mut parent = parent;
        for (at, hash) in hashes.iter().enumerate() {
            let key = Key { namespace, hash: *hash };
            let Some(table) = self.host.make_room(class) else { break };
            let block = Incoming { key, parent, retention, group };
            match table.slots.reserve(block, need, &allowances, now) {
                Ok(reserved) => {
                    if !table.slots.commit(reserved, now) {
                        break;
                    }
                    stored.blocks += 1;
                    self.used_in_host(class, key, retention.priority);
                }
                Err(NotReserved::Resident | NotReserved::Filling) => {}
                Err(NotReserved::Orphan) => {
                    stored.is_orphan = true;
                    break;
                }
                Err(NotReserved::NotAdmitted) => {
                    let before = parent.and_then(|hash| table.slots.resident(Key { namespace, hash }));
                    let depth = table.slots.depth(before) + 1;
                    for (behind, hash) in hashes[at..].iter().enumerate().skip(1) {
                        table.slots.passed_over(Key { namespace, hash: *hash }, (depth + behind) as u32, now);
                    }
                    break;
                }
                Err(NotReserved::Exhausted | NotReserved::OverQuota) => break,
            }
            parent = Some(*hash);
        }
        self.sweep();
        Ok(stored)
    }

    /// Slots with memory behind them, in all tiers.
    pub fn slots(&self) -> usize {
        let tiers = [Tier::Device, Tier::Host, Tier::Disk].into_iter();
        tiers.flat_map(|tier| self.tables_of(tier)).map(|(_, table)| table.slots()).sum()
    }
}
