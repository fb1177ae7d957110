//! What tenants may have: at most, and for sure.
//!
//! A tenant that is at its maximum in a tier makes room of its own blocks there, or is refused. Blocks of a tenant that
//! has no more than its minimum are not evicted for others. Bytes are counted with what is being filled, over all pools
//! or classes of the tier.
//!
//! Minimums may add up to more than there is: they are not reserved, whoever comes first has his. What is left out then is
//! the newcomer, in host and on disk. In a pool it is the guarantee: an engine that is granted no block stands still.

use std::collections::BTreeMap;

use super::segments::SegmentTier;
use super::slots::{Allowance, Allowances, GroupCounts, GroupId, SlotTable};
use super::{Ledger, Owner, PoolId};
use crate::error::Refused;
use crate::tier::Tier;

/// What one tenant may have in one tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierQuota {
    /// Up to so much is not evicted for others.
    pub min_bytes: u64,
    /// No more than so much; `None`: no limit.
    pub max_bytes: Option<u64>,
}

/// What one tenant may have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TenantQuota {
    /// In all device pools together.
    pub device: TierQuota,
    /// In host memory.
    pub host: TierQuota,
    /// On disk.
    pub disk: TierQuota,
}

impl TenantQuota {
    fn of(&self, tier: Tier) -> TierQuota {
        match tier {
            Tier::Device => self.device,
            Tier::Host => self.host,
            Tier::Disk => self.disk,
            Tier::Remote => TierQuota::default(),
        }
    }
}

/// Tenants with a quota, by label. All others have neither minimum nor maximum.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Quotas {
    /// By label of the tenant.
    pub tenants: BTreeMap<String, TenantQuota>,
}

impl Quotas {
    /// Tenants that can have a quota.
    pub const TENANTS_MAX: usize = GroupId::END as usize - 1;

    /// Whether they can be obeyed: no minimum above its maximum, no more tenants than can be told apart.
    pub fn validate(&self) -> Result<(), Refused> {
        if self.tenants.len() > Self::TENANTS_MAX {
            let reason =
                format!("{} tenants; at most {} can have one", self.tenants.len(), Self::TENANTS_MAX);
            return Err(Refused::invalid("quotas", reason));
        }
        for (tenant, quota) in &self.tenants {
            for tier in [Tier::Device, Tier::Host, Tier::Disk] {
                let TierQuota { min_bytes, max_bytes } = quota.of(tier);
                if let Some(max_bytes) = max_bytes.filter(|max_bytes| *max_bytes < min_bytes) {
                    let reason = format!(
                        "tenant {tenant}, {tier}: the minimum of {min_bytes} bytes is above the maximum of \
                         {max_bytes} bytes"
                    );
                    return Err(Refused::invalid("quotas", reason));
                }
            }
        }
        Ok(())
    }
}

/// What a tenant has in a tier, and what it may have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TenantUsage {
    /// Its label; empty for all that have no quota, together.
    pub tenant: String,
    /// Where.
    pub tier: Tier,
    /// Being filled or holding its blocks.
    pub used_bytes: u64,
    /// What it may have.
    pub quota: TierQuota,
    /// Blocks that found no place because of quotas.
    pub refused: u64,
    /// Blocks evicted to make room.
    pub evicted: u64,
}

/// See the module. Groups are tenants in the order of their labels, behind the common one.
#[derive(Debug, Default)]
pub(super) struct Tenants {
    labels: Vec<String>,
    quotas: Vec<TenantQuota>,
    /// Of pools that are no more, by group.
    gone: BTreeMap<GroupId, GroupCounts>,
}

impl Tenants {
    pub fn new(quotas: Quotas) -> Self {
        let taken = quotas.tenants.into_iter().take(Quotas::TENANTS_MAX);
        let (labels, quotas) = taken.unzip();
        Self { labels, quotas, gone: BTreeMap::new() }
    }

    /// To which group a tenant's blocks belong.
    pub fn group_of(&self, label: &str) -> GroupId {
        let found = self.labels.binary_search_by(|known| known.as_str().cmp(label));
        found.map_or(GroupId::COMMON, |at| GroupId(at as u16 + 1))
    }

    fn groups(&self) -> impl Iterator<Item = GroupId> + use<> {
        (0..=self.labels.len() as u16).map(GroupId)
    }

    fn quota(&self, group: GroupId, tier: Tier) -> TierQuota {
        let at = usize::from(group.0).checked_sub(1);
        at.map_or(TierQuota::default(), |at| self.quotas[at].of(tier))
    }

    /// What groups may have of a table with slots of `stride` bytes; the `others` belong to the same tier.
    pub fn allowances<'a>(
        &self,
        tier: Tier,
        stride: usize,
        others: impl Iterator<Item = (usize, &'a SlotTable)> + Clone,
    ) -> Allowances {
        if self.labels.is_empty() {
            return Allowances::default();
        }
        let allowance = |group: GroupId| {
            let elsewhere: u64 = others.clone().map(|(stride, table)| bytes_of(table, stride, group)).sum();
            let TierQuota { min_bytes, max_bytes } = self.quota(group, tier);
            let slots = |bytes: u64| usize::try_from(bytes / stride as u64).unwrap_or(usize::MAX);
            let min_bytes = min_bytes.saturating_sub(elsewhere);
            Allowance {
                min_slots: slots(min_bytes.saturating_add(stride as u64 - 1)),
                max_slots: max_bytes.map_or(usize::MAX, |bytes| slots(bytes.saturating_sub(elsewhere))),
            }
        };
        Allowances(self.groups().map(allowance).collect())
    }

    /// What groups may have of the table of a class.
    pub fn in_segments(&self, tier: Tier, segments: &SegmentTier, class: super::Class) -> Allowances {
        let others = segments.classes().filter(move |(other, _)| **other != class);
        self.allowances(tier, class.stride, others.map(|(class, table)| (class.stride, &table.slots)))
    }

    /// A pool is no more: what it counted is kept.
    pub fn pool_gone(&mut self, slots: &SlotTable) {
        for group in self.groups() {
            let counts = slots.group(group);
            let gone = self.gone.entry(group).or_default();
            gone.evicted += counts.evicted;
            gone.refused += counts.refused;
        }
    }
}

fn bytes_of(table: &SlotTable, stride: usize, group: GroupId) -> u64 {
    table.group(group).in_use as u64 * stride as u64
}

impl Ledger {
    pub(super) fn device_allowances(&self, id: PoolId) -> Allowances {
        let Some(stride) = self.pools.get(&id).map(|pool| pool.identity.layout.stride()) else {
            return Allowances::default();
        };
        let others =
            self.pools.iter().filter(move |(other, pool)| **other != id && pool.owner != Owner::Retired);
        let others = others.map(|(_, pool)| (pool.identity.layout.stride(), &pool.slots));
        self.tenants.allowances(Tier::Device, stride, others)
    }

    /// Moves the blocks of a namespace to another group.
    pub(super) fn regroup(&mut self, namespace: super::NamespaceId, group: GroupId, now: super::Millis) {
        let pools = self.pools.values_mut().map(|pool| &mut pool.slots);
        let host = self.host.classes_mut().map(|(_, table)| &mut table.slots);
        let disk = self.disk.tier.classes_mut().map(|(_, table)| &mut table.slots);
        pools.chain(host).chain(disk).for_each(|table| table.regroup(namespace, group, now));
    }

    /// What tenants have in each tier. Those without a quota are one, under no label.
    pub fn tenants(&self) -> Vec<TenantUsage> {
        let mut usage = Vec::new();
        for tier in [Tier::Device, Tier::Host, Tier::Disk] {
            let tables = self.tables_of(tier);
            for group in self.tenants.groups() {
                let at = usize::from(group.0).checked_sub(1);
                let tenant = at.map_or(String::new(), |at| self.tenants.labels[at].clone());
                let quota = self.tenants.quota(group, tier);
                let gone = self.tenants.gone.get(&group).copied().filter(|_| tier == Tier::Device);
                let GroupCounts { mut refused, mut evicted, .. } = gone.unwrap_or_default();
                let mut used_bytes = 0;
                for (stride, table) in &tables {
                    used_bytes += bytes_of(table, *stride, group);
                    refused += table.group(group).refused;
                    evicted += table.group(group).evicted;
                }
                usage.push(TenantUsage { tenant, tier, used_bytes, quota, refused, evicted });
            }
        }
        usage
    }

    /// The tables of a tier, with the bytes of a slot of each.
    pub(super) fn tables_of(&self, tier: Tier) -> Vec<(usize, &SlotTable)> {
        fn of_classes(segments: &SegmentTier) -> Vec<(usize, &SlotTable)> {
            segments.classes().map(|(class, table)| (class.stride, &table.slots)).collect()
        }
        match tier {
            Tier::Device => {
                let living = self.pools.values().filter(|pool| pool.owner != Owner::Retired);
                living.map(|pool| (pool.identity.layout.stride(), &pool.slots)).collect()
            }
            Tier::Host => of_classes(&self.host),
            Tier::Disk => of_classes(&self.disk.tier),
            Tier::Remote => Vec::new(),
        }
    }
}
