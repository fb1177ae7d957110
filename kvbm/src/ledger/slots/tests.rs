//! Random walks of a slot table against a plain oracle.

use std::collections::{HashMap, HashSet};

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::ledger::Retention;
use crate::ledger::key::NamespaceId;

mod rights;
mod tensorrt;

fn key(n: u16) -> Key {
    let mut hash = [0; 16];
    hash[..2].copy_from_slice(&n.to_le_bytes());
    Key { namespace: NamespaceId(1), hash: SequenceHash(hash) }
}

fn number(key: Key) -> u16 {
    u16::from_le_bytes([key.hash.0[0], key.hash.0[1]])
}

/// Keys form a forest: the parent of n is n / 3; 0, 1 and 2 are first blocks.
fn parent(n: u16) -> Option<u16> {
    (n > 2).then_some(n / 3)
}

/// Three groups of tenants, by key.
fn group(n: u16) -> GroupId {
    GroupId(n % 3)
}

fn incoming(n: u16, retention: Retention) -> Incoming {
    Incoming { key: key(n), parent: parent(n).map(|p| key(p).hash), retention, group: group(n) }
}

/// Of twelve slots.
fn allowances() -> Allowances {
    Allowances(vec![
        Allowance { min_slots: 0, max_slots: usize::MAX },
        Allowance { min_slots: 2, max_slots: 4 },
        Allowance { min_slots: 3, max_slots: usize::MAX },
    ])
}

fn retention() -> impl Strategy<Value = Retention> {
    let priority = prop_oneof![Just(0), Just(35), Just(36), Just(80), Just(100)];
    let duration =
        prop_oneof![2 => Just(None), 1 => (1u64..20).prop_map(|ms| Some(Duration::from_millis(ms)))];
    (priority, duration).prop_map(|(priority, duration)| Retention { priority, duration })
}

#[derive(Debug, Clone)]
enum Op {
    Reserve(u16, Retention, Need),
    Reuse(u16, Vec<Option<Retention>>),
    Keep(u16),
    LetGo(u16),
    Wait(u64),
    Expire,
    Commit(usize),
    Abandon(usize),
    Grant,
    CommitGranted(usize, u16),
    Pin(u16),
    Unpin(usize),
    BeginCopy(u16),
    EndCopy(usize),
    Condemn(usize),
    DropAllPins,
    Prefix(u16),
    Retire,
    Revive,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        5 => (0u16..40, retention(), prop_oneof![Just(Need::Wanted), Just(Need::Passing), Just(Need::Optional)])
            .prop_map(|(n, retention, need)| Op::Reserve(n, retention, need)),
        3 => (0u16..40, prop::collection::vec(prop::option::of(retention()), 0..5))
            .prop_map(|(n, said)| Op::Reuse(n, said)),
        1 => (0u16..40).prop_map(Op::Keep),
        2 => (0u16..40).prop_map(Op::LetGo),
        3 => (1u64..15).prop_map(Op::Wait),
        1 => Just(Op::Expire),
        4 => any::<usize>().prop_map(Op::Commit),
        1 => any::<usize>().prop_map(Op::Abandon),
        2 => Just(Op::Grant),
        2 => (any::<usize>(), 0u16..40).prop_map(|(i, n)| Op::CommitGranted(i, n)),
        2 => (0u16..40).prop_map(Op::Pin),
        3 => any::<usize>().prop_map(Op::Unpin),
        1 => (0u16..40).prop_map(Op::BeginCopy),
        2 => any::<usize>().prop_map(Op::EndCopy),
        1 => any::<usize>().prop_map(Op::Condemn),
        1 => Just(Op::DropAllPins),
        3 => (0u16..40).prop_map(Op::Prefix),
        1 => Just(Op::Retire),
        1 => Just(Op::Revive),
    ]
}

/// What a careful reader would keep on paper.
#[derive(Default)]
struct Oracle {
    resident: HashSet<u16>,
    pins: HashMap<SlotIndex, u32>,
    kept: HashSet<u16>,
}

struct Walk {
    table: SlotTable,
    oracle: Oracle,
    /// With its key, and whether a block before it has failed since.
    reserved: Vec<(Reserved, u16, bool)>,
    granted: Vec<SlotIndex>,
    pinned: Vec<SlotIndex>,
    copies: Vec<Copying>,
    retired: bool,
    now: Millis,
}

const SLOTS: u32 = 12;
const RETIRABLE: std::ops::Range<u32> = 8..12;

impl Walk {
    /// What is being filled behind a block that failed will fail.
    fn doom_behind(&mut self, failed: u16) {
        for (_, n, doomed) in &mut self.reserved {
            *doomed |= std::iter::successors(parent(*n), |n| parent(*n)).any(|n| n == failed);
        }
    }

    fn apply(&mut self, op: &Op) {
        let pick = |len: usize, i: usize| (len > 0).then(|| i % len);
        let (now, allowed) = (self.now, allowances());
        match op {
            Op::Wait(ms) => self.now = Millis(now.0 + ms),
            Op::Expire => self.table.expire(now),
            Op::Reuse(n, said) => {
                if let Some(slot) = self.table.resident(key(*n)) {
                    self.table.reuse(slot, said, now);
                }
            }
            Op::Keep(n) => {
                if let Some(slot) = self.table.resident(key(*n)) {
                    self.table.keep(slot);
                    self.oracle.kept.insert(*n);
                }
            }
            Op::LetGo(n) => {
                if self.oracle.kept.remove(n) {
                    let slot = self.table.resident(key(*n)).expect("what is kept stays");
                    self.table.let_go(slot, now);
                }
            }
            Op::Reserve(n, retention, need) => {
                match self.table.reserve(incoming(*n, *retention), *need, &allowed, now) {
                    Ok(reserved) => {
                        assert!(!self.oracle.resident.contains(n));
                        self.reserved.push((reserved, *n, false));
                    }
                    Err(NotReserved::Resident) => assert!(self.oracle.resident.contains(n)),
                    Err(NotReserved::Filling) => assert!(self.reserved.iter().any(|(_, key, _)| key == n)),
                    Err(NotReserved::Orphan) => {
                        let p = parent(*n).expect("first blocks are no orphans");
                        assert!(!self.oracle.resident.contains(&p));
                    }
                    Err(NotReserved::Exhausted) => assert_eq!(self.table.counts().free, 0),
                    Err(NotReserved::OverQuota) => {
                        let of_group = self.table.group(group(*n)).in_use;
                        assert!(group(*n) == GroupId(1) && of_group >= 4 || self.table.counts().free == 0);
                    }
                    Err(NotReserved::NotAdmitted) => assert_ne!(*need, Need::Wanted),
                }
            }
            Op::Commit(i) => {
                if let Some(i) = pick(self.reserved.len(), *i) {
                    let (reserved, n, doomed) = self.reserved.swap_remove(i);
                    let expected = !doomed && parent(n).is_none_or(|p| self.oracle.resident.contains(&p));
                    assert_eq!(self.table.commit(reserved, now), expected);
                    if !expected {
                        self.doom_behind(n);
                    }
                }
            }
            Op::Abandon(i) => {
                if let Some(i) = pick(self.reserved.len(), *i) {
                    let (reserved, n, _) = self.reserved.swap_remove(i);
                    self.table.abandon(reserved, now);
                    self.doom_behind(n);
                }
            }
            Op::Grant => {
                if let Some(slot) = self.table.grant(&allowed, now) {
                    assert!(!self.oracle.pins.contains_key(&slot), "{slot:?} was handed out twice");
                    self.oracle.pins.insert(slot, 1);
                    self.granted.push(slot);
                    self.pinned.push(slot);
                }
            }
            Op::CommitGranted(i, n) => {
                if let Some(i) = pick(self.granted.len(), *i) {
                    let slot = self.granted[i];
                    let generation = self.table.generation(slot);
                    let block = incoming(*n, Retention::default());
                    match self.table.commit_granted(slot, generation, block, &allowed, now) {
                        Committed::Resident => {
                            self.granted.swap_remove(i);
                        }
                        Committed::Duplicate => {
                            assert!(
                                self.oracle.resident.contains(n)
                                    || self.reserved.iter().any(|(_, k, _)| k == n)
                            );
                        }
                        Committed::Orphan => {
                            assert!(!self.oracle.resident.contains(&parent(*n).expect("has a parent")));
                        }
                        Committed::OverQuota => {
                            assert!(group(*n) == GroupId(1) && self.table.group(group(*n)).in_use >= 4);
                        }
                        Committed::Stale => panic!("{slot:?} is granted"),
                    }
                    assert_eq!(
                        self.table.commit_granted(slot, generation.wrapping_sub(1), block, &allowed, now),
                        Committed::Stale
                    );
                }
            }
            Op::Pin(n) => {
                if let Some(slot) = self.table.resident(key(*n)) {
                    self.table.pin(slot);
                    *self.oracle.pins.entry(slot).or_default() += 1;
                    self.pinned.push(slot);
                }
            }
            Op::Unpin(i) => {
                if let Some(i) = pick(self.pinned.len(), *i) {
                    let slot = self.pinned.swap_remove(i);
                    self.table.unpin(slot, 1, now);
                    let pins = self.oracle.pins.get_mut(&slot).expect("it is pinned");
                    *pins -= 1;
                    if *pins == 0 {
                        self.oracle.pins.remove(&slot);
                        self.granted.retain(|granted| *granted != slot);
                    }
                }
            }
            Op::BeginCopy(n) => {
                if let Some(slot) = self.table.resident(key(*n)) {
                    self.copies.push(self.table.begin_copy(slot));
                }
            }
            Op::EndCopy(i) => {
                if let Some(i) = pick(self.copies.len(), *i) {
                    self.table.end_copy(self.copies.swap_remove(i), now);
                }
            }
            Op::Condemn(i) => {
                if let Some(i) = pick(self.copies.len(), *i) {
                    let copying = self.copies.swap_remove(i);
                    let key = self.table.block(copying.slot()).map(|(key, _)| key);
                    self.table.condemn([&copying], now);
                    self.table.check_integrity();
                    assert!(key.is_none_or(|key| self.table.resident(key).is_none()), "it is a miss");
                    if let Some(key) = key {
                        self.doom_behind(number(key));
                    }
                    self.table.end_copy(copying, now);
                }
            }
            Op::DropAllPins => {
                self.table.drop_all_pins(now);
                self.oracle.pins.clear();
                self.pinned.clear();
                self.granted.clear();
            }
            Op::Prefix(n) => {
                let mut path: Vec<u16> = std::iter::successors(Some(*n), |n| parent(*n)).collect();
                path.reverse();
                let (found, deepest) = self.table.prefix(|i| key(path[i]), path.len());
                let expected = path.iter().take_while(|n| self.oracle.resident.contains(n)).count();
                assert_eq!(found, expected);
                if let Some(deepest) = deepest {
                    let chain = self.table.chain(deepest, found);
                    let keys: Vec<_> = chain.iter().map(|slot| self.table.block(*slot).unwrap().0).collect();
                    assert_eq!(keys, path[..found].iter().map(|n| key(*n)).collect::<Vec<_>>());
                }
            }
            Op::Retire => {
                if !self.retired {
                    self.retired = self.table.retire(RETIRABLE, &allowed, now);
                }
            }
            Op::Revive => {
                if std::mem::take(&mut self.retired) {
                    self.table.revive(RETIRABLE);
                }
            }
        }
        for change in self.table.take_changes() {
            match change {
                Change::Stored(key, _) => assert!(self.oracle.resident.insert(number(key))),
                Change::Removed(key) => {
                    let n = number(key);
                    assert!(self.oracle.resident.remove(&n));
                    assert!(!self.oracle.kept.remove(&n) || matches!(op, Op::Condemn(_)), "{n} is kept");
                }
            }
        }
        assert_eq!(self.table.counts().resident, self.oracle.resident.len());
        for (slot, pins) in &self.oracle.pins {
            assert_eq!(self.table.pins(*slot), *pins);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn random_walks_agree_with_the_oracle(ops in prop::collection::vec(op(), 1..200)) {
        let mut walk = Walk {
            table: SlotTable::new(SLOTS, TableRules::of_tests()),
            oracle: Oracle::default(),
            reserved: vec![],
            granted: vec![],
            pinned: vec![],
            copies: vec![],
            retired: false,
            now: Millis(0),
        };
        for op in &ops {
            let before = rights::Before::of(&mut walk.table, walk.now);
            walk.apply(op);
            walk.table.check_integrity();
            before.check(op, &walk.table);
        }
        // Everything given back: no slot is lost.
        walk.reserved.drain(..).for_each(|(reserved, ..)| walk.table.abandon(reserved, walk.now));
        walk.copies.drain(..).for_each(|copy| walk.table.end_copy(copy, walk.now));
        walk.table.drop_all_pins(walk.now);
        walk.table.check_integrity();
        let counts = walk.table.counts();
        prop_assert_eq!((counts.filling, counts.pinned), (0, 0));
        prop_assert_eq!(counts.free + counts.resident + counts.bad, walk.table.slots());
    }
}

fn chain_of(table: &mut SlotTable, numbers: &[u16]) {
    let mut before = None;
    for n in numbers {
        let block = Incoming::of_tests(key(*n), before);
        let reserved = table.reserve(block, Need::Wanted, Allowances::NONE, Millis(0)).unwrap();
        assert!(table.commit(reserved, Millis(0)));
        before = Some(key(*n).hash);
    }
}

#[test]
fn leaves_go_first_and_the_least_recent_chain_before_others() {
    let mut table = SlotTable::new(4, TableRules::of_tests());
    chain_of(&mut table, &[10, 11]);
    chain_of(&mut table, &[20, 21]);
    // A use of the first chain's end is a use of the chain.
    let (_, deepest) = table.prefix(|i| key([10, 11][i]), 2);
    table.used(deepest.unwrap(), Millis(1));
    let gone = |table: &mut SlotTable, n| {
        let block = Incoming::of_tests(key(n), None);
        let reserved = table.reserve(block, Need::Wanted, Allowances::NONE, Millis(2));
        let _ = reserved.map(|reserved| table.commit(reserved, Millis(2)));
        [10, 11, 20, 21].into_iter().filter(|n| table.resident(key(*n)).is_none()).collect::<Vec<_>>()
    };
    assert_eq!(gone(&mut table, 1), [21]);
    assert_eq!(gone(&mut table, 2), [20, 21]);
    table.check_integrity();
}

#[test]
fn a_failed_parent_takes_its_children_along() {
    let mut table = SlotTable::new(4, TableRules::of_tests());
    let mut reserve = |n, before| {
        let block = Incoming::of_tests(key(n), before);
        table.reserve(block, Need::Wanted, Allowances::NONE, Millis(0)).unwrap()
    };
    let first = reserve(1, None);
    let second = reserve(2, Some(key(1).hash));
    let third = reserve(3, Some(key(2).hash));
    table.abandon(first, Millis(0));
    table.check_integrity();
    assert_eq!(table.counts().free, 1, "the failed slot waits for its child");
    assert!(!table.commit(second, Millis(0)));
    assert!(!table.commit(third, Millis(0)));
    assert_eq!(table.counts().free, 4);
    table.check_integrity();
}

#[test]
fn a_parent_is_not_evicted_for_its_own_child() {
    let mut table = SlotTable::new(1, TableRules::of_tests());
    chain_of(&mut table, &[1]);
    let child = Incoming::of_tests(key(2), Some(key(1).hash));
    let refused = table.reserve(child, Need::Wanted, Allowances::NONE, Millis(0));
    assert_eq!(refused, Err(NotReserved::Exhausted));
    assert!(table.resident(key(1)).is_some());
    table.check_integrity();
}

#[test]
fn a_condemned_slot_takes_along_what_hangs_on_it_and_is_not_used_again() {
    let mut table = SlotTable::new(4, TableRules::of_tests());
    chain_of(&mut table, &[1, 2, 3]);
    let read = [1, 2, 3].map(|n| {
        let slot = table.resident(key(n)).unwrap();
        table.begin_copy(slot)
    });
    table.condemn([&read[1]], Millis(0));
    assert_eq!([1, 2, 3].map(|n| table.resident(key(n)).is_some()), [true, false, false]);
    read.into_iter().for_each(|copy| table.end_copy(copy, Millis(0)));
    table.check_integrity();
    let counts = table.counts();
    assert_eq!((counts.free, counts.resident, counts.bad), (2, 1, 1));
}
