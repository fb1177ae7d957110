//! Who was evicted, judged by who could have been.

use std::collections::BTreeMap;

use super::*;

#[derive(Debug, Clone, Copy)]
struct Waiting {
    priority: u8,
    group: GroupId,
}

/// The table before a step.
pub(super) struct Before {
    waiting: BTreeMap<u16, Waiting>,
    in_use: [usize; 3],
    free: usize,
    evictions: u64,
    resident: HashSet<u16>,
}

impl Before {
    pub fn of(table: &mut SlotTable, now: Millis) -> Self {
        // What has run out by now counts as it is then.
        table.expire(now);
        let offered = table.slots.iter().filter(|slot| slot.offered);
        let waiting =
            |slot: &Slot| (number(slot.key), Waiting { priority: slot.priority, group: slot.group });
        let resident = table.slots.iter().filter(|slot| slot.is_resident());
        Self {
            waiting: offered.map(waiting).collect(),
            in_use: [0, 1, 2].map(|group| table.group(GroupId(group)).in_use),
            free: table.counts().free,
            evictions: table.evictions(),
            resident: resident.map(|slot| number(slot.key)).collect(),
        }
    }

    fn is_protected(&self, group: GroupId) -> bool {
        let allowed = allowances().0[usize::from(group.0)];
        allowed.min_slots > 0 && self.in_use[usize::from(group.0)] <= allowed.min_slots
    }

    /// Pin, then minimum, then maximum, then priority.
    pub fn check(&self, op: &Op, after: &SlotTable) {
        let evicted = after.evictions() - self.evictions;
        assert!(evicted <= 1, "one place is one eviction");
        if evicted == 0 {
            return;
        }
        let gone = self.resident.iter().copied().filter(|n| after.resident(key(*n)).is_none());
        let gone = gone.collect::<Vec<_>>();
        let [victim] = gone[..] else { panic!("{gone:?} left for one place") };
        let went = *self.waiting.get(&victim).expect("only what nobody holds is evicted");
        let claimant = match op {
            Op::Reserve(n, ..) | Op::CommitGranted(_, n) => group(*n),
            Op::Grant => GroupId::COMMON,
            _ => panic!("{op:?} evicts nothing"),
        };
        let at_max = claimant == GroupId(1) && self.in_use[1] >= 4;
        assert!(at_max || self.free == 0, "nobody is evicted while there is room");
        if at_max && !matches!(op, Op::Grant) {
            assert_eq!(went.group, claimant, "who is at the maximum makes room of its own");
        }
        // The parent of the newcomer does not wait while its child comes.
        let newcomer = match op {
            Op::Reserve(n, ..) | Op::CommitGranted(_, n) => Some(*n),
            _ => None,
        };
        let others = self.waiting.iter().filter(|(n, _)| newcomer.and_then(parent) != Some(**n));
        let others: Vec<Waiting> = others.map(|(_, waiting)| *waiting).collect();
        let may_go = |waiting: &&Waiting| {
            if at_max && !matches!(op, Op::Grant) {
                waiting.group == claimant
            } else {
                waiting.group == claimant || !self.is_protected(waiting.group)
            }
        };
        let lowest = others.iter().filter(may_go).map(|waiting| waiting.priority).min();
        match lowest {
            Some(lowest) => {
                assert!(may_go(&&went), "what is guaranteed is not taken");
                assert_eq!(went.priority, lowest, "the lowest priority goes first");
            }
            None => assert!(matches!(op, Op::Grant), "only a grant takes what is guaranteed"),
        }
        if let Op::Reserve(_, retention, Need::Passing | Need::Optional) = op {
            assert!(went.priority <= retention.priority, "nothing dearer goes for what may be left out");
        }
    }
}

/// Both groups wait with blocks of one priority: the one used longest ago goes, whoever's it is.
#[test]
fn of_two_groups_at_one_priority_the_one_used_longest_ago_goes() {
    let mut table = SlotTable::new(2, TableRules::of_tests());
    let allowed = Allowances(vec![Allowance { min_slots: 0, max_slots: usize::MAX }; 3]);
    let store = |table: &mut SlotTable, n, at| {
        let reserved = table.reserve(incoming(n, Retention::default()), Need::Wanted, &allowed, Millis(at));
        assert!(table.commit(reserved.unwrap(), Millis(at)));
    };
    store(&mut table, 1, 0);
    store(&mut table, 2, 1);
    let first = table.resident(key(1)).unwrap();
    table.used(first, Millis(2));
    store(&mut table, 0, 3);
    assert!(table.resident(key(1)).is_some() && table.resident(key(2)).is_none());
}
