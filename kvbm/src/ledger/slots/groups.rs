//! Who may have how much of a table, and how much they have.

/// Tenants that are treated alike. Each tenant with a quota is a group, all others are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u16);

impl GroupId {
    /// Everybody who has no quota.
    pub const COMMON: Self = Self(0);
    /// One above the highest.
    pub const END: u16 = 512;
}

/// What one group may have of a table, in slots. What it has elsewhere in the tier has been deducted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Up to so many are not evicted for others.
    pub min_slots: usize,
    /// No more than so many.
    pub max_slots: usize,
}

/// What groups may have of a table. Those that are not listed have neither minimum nor maximum.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowances(pub Vec<Allowance>);

impl Allowances {
    /// Nobody has a quota.
    pub const NONE: &'static Self = &Self(Vec::new());

    pub(super) fn of(&self, group: GroupId) -> Option<Allowance> {
        self.0.get(usize::from(group.0)).copied()
    }
}

/// What one group has of a table, and what it lost and was refused there.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GroupCounts {
    /// Slots that are being filled, or hold a block.
    pub in_use: usize,
    /// Blocks evicted to make room, ever.
    pub evicted: u64,
    /// Blocks that found no place because of quotas, ever.
    pub refused: u64,
}

/// By group, as far as there was ever one.
#[derive(Debug, Default)]
pub(super) struct Groups(Vec<GroupCounts>);

impl Groups {
    pub fn get(&self, group: GroupId) -> GroupCounts {
        self.0.get(usize::from(group.0)).copied().unwrap_or_default()
    }

    pub fn of(&mut self, group: GroupId) -> &mut GroupCounts {
        let at = usize::from(group.0);
        if self.0.len() <= at {
            self.0.resize(at + 1, GroupCounts::default());
        }
        &mut self.0[at]
    }

    /// Whether its maximum leaves it no more slot.
    pub fn is_at_max(&self, group: GroupId, allowances: &Allowances) -> bool {
        allowances.of(group).is_some_and(|allowed| self.get(group).in_use >= allowed.max_slots)
    }

    /// Whether nothing of it may be evicted for others, after `lost` of its slots have gone.
    pub fn is_at_min(&self, group: GroupId, lost: usize, allowances: &Allowances) -> bool {
        let in_use = self.get(group).in_use;
        allowances
            .of(group)
            .is_some_and(|allowed| allowed.min_slots > 0 && in_use.saturating_sub(lost) <= allowed.min_slots)
    }

    pub fn all(&self) -> &[GroupCounts] {
        &self.0
    }
}
