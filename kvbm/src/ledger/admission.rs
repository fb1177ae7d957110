//! Which blocks are worth a write to disk.
//!
//! Drives wear out and most blocks are never asked for again: a block is admitted when it has been used a second time
//! (computed again, or found by a match), or at once if its writer gave it more than the default priority.

use super::Millis;
use super::frequency::Frequency;
use super::key::{Key, KeyHasher};
use super::slots::PRIORITY_DEFAULT;

/// Uses after which a block is admitted.
const USES_WANTED: u8 = 2;

/// What is admitted to disk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdmissionRules {
    /// Only blocks that were used twice.
    pub frequency_filter: bool,
    /// Only blocks of this priority or more, 0..=100.
    pub priority_min: u8,
    /// Bytes that may be written per day; `None`: no limit.
    pub bytes_per_day: Option<u64>,
}

/// What was turned away, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AdmissionTally {
    /// Used once so far.
    pub infrequent: u64,
    /// Of too low a priority.
    pub unimportant: u64,
    /// Times that the write budget ran out while blocks waited.
    pub over_budget: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Admission {
    rules: AdmissionRules,
    uses: Frequency,
    budget: Option<Budget>,
    is_short: bool,
    pub tally: AdmissionTally,
}

impl Admission {
    pub fn new(rules: AdmissionRules, hasher: KeyHasher) -> Self {
        let budget = rules.bytes_per_day.map(Budget::new);
        Self {
            rules,
            uses: Frequency::new(hasher),
            budget,
            is_short: false,
            tally: AdmissionTally::default(),
        }
    }

    /// A block was used. True if it is worth a write now.
    pub fn used(&mut self, key: Key, priority: u8) -> bool {
        let uses = self.uses.count(key);
        if priority < self.rules.priority_min {
            self.tally.unimportant += 1;
            return false;
        }
        let admitted = !self.rules.frequency_filter || uses >= USES_WANTED || priority > PRIORITY_DEFAULT;
        self.tally.infrequent += u64::from(!admitted);
        admitted
    }

    /// Whether there is anything left to spend.
    pub fn has_budget(&mut self, now: Millis) -> bool {
        let Some(budget) = &mut self.budget else { return true };
        let left = budget.has_left(now);
        // Once each time that it runs out, not each time that somebody looks.
        self.tally.over_budget += u64::from(!left && !std::mem::replace(&mut self.is_short, !left));
        self.is_short = !left;
        left
    }

    /// So much is being written.
    pub fn spend(&mut self, bytes: u64) {
        if let Some(budget) = &mut self.budget {
            budget.bytes -= bytes as f64;
        }
    }
}

/// Bytes that may be written: they accrue evenly, an hour's worth at most is kept. May be overdrawn by one batch.
#[derive(Debug)]
struct Budget {
    bytes_per_ms: f64,
    bytes: f64,
    at: Option<Millis>,
}

impl Budget {
    const MS_PER_DAY: f64 = 86_400_000.0;
    const KEPT_MS: f64 = 3_600_000.0;

    fn new(bytes_per_day: u64) -> Self {
        let bytes_per_ms = bytes_per_day as f64 / Self::MS_PER_DAY;
        Self { bytes_per_ms, bytes: bytes_per_ms * Self::KEPT_MS, at: None }
    }

    fn has_left(&mut self, now: Millis) -> bool {
        let elapsed = self.at.map_or(0, |at| now.0.saturating_sub(at.0));
        self.at = Some(now);
        self.bytes = (self.bytes + elapsed as f64 * self.bytes_per_ms).min(self.bytes_per_ms * Self::KEPT_MS);
        self.bytes > 0.0
    }
}

#[cfg(test)]
mod tests {
    use kvbm_hash::SequenceHash;

    use super::*;
    use crate::ledger::key::NamespaceId;

    fn key(n: u32) -> Key {
        let mut hash = [0; 16];
        let mixed = u64::from(n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        hash[..8].copy_from_slice(&mixed.to_le_bytes());
        Key { namespace: NamespaceId(1), hash: SequenceHash(hash) }
    }

    fn admission(frequency_filter: bool, priority_min: u8, bytes_per_day: Option<u64>) -> Admission {
        let rules = AdmissionRules { frequency_filter, priority_min, bytes_per_day };
        Admission::new(rules, KeyHasher::new(3))
    }

    #[test]
    fn the_second_use_admits_and_a_high_priority_at_once() {
        let mut admission = admission(true, 0, None);
        assert_eq!([admission.used(key(1), 35), admission.used(key(1), 35)], [false, true]);
        assert!(admission.used(key(2), 36));
        let early = (100..50_100).filter(|n| admission.used(key(*n), 35)).count();
        assert!(early < 50, "{early} of 50000 were admitted because others were used");
    }

    #[test]
    fn a_low_priority_is_never_admitted() {
        let mut admission = admission(false, 36, None);
        assert_eq!(
            [admission.used(key(1), 35), admission.used(key(1), 35), admission.used(key(2), 36)],
            [false, false, true]
        );
        assert_eq!(admission.tally, AdmissionTally { infrequent: 0, unimportant: 2, over_budget: 0 });
    }

    #[test]
    fn a_day_writes_no_more_than_its_budget_and_an_hours_worth() {
        let mut admission = admission(false, 0, Some(24_000));
        let mut written = 0;
        for ms in (0..86_400_000).step_by(1000) {
            while admission.has_budget(Millis(ms)) {
                admission.spend(10);
                written += 10;
            }
        }
        assert!((24_000..=25_020).contains(&written), "{written}");
        assert!(admission.tally.over_budget > 0);
    }
}
