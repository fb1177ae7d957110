//! Random walks of a slot table against a plain oracle.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::ledger::key::NamespaceId;

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

#[derive(Debug, Clone)]
enum Op {
    Reserve(u16),
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
        4 => (0u16..40).prop_map(Op::Reserve),
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
        match op {
            Op::Reserve(n) => match self.table.reserve(key(*n), parent(*n).map(|p| key(p).hash)) {
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
            },
            Op::Commit(i) => {
                if let Some(i) = pick(self.reserved.len(), *i) {
                    let (reserved, n, doomed) = self.reserved.swap_remove(i);
                    let expected = !doomed && parent(n).is_none_or(|p| self.oracle.resident.contains(&p));
                    assert_eq!(self.table.commit(reserved), expected);
                    if !expected {
                        self.doom_behind(n);
                    }
                }
            }
            Op::Abandon(i) => {
                if let Some(i) = pick(self.reserved.len(), *i) {
                    let (reserved, n, _) = self.reserved.swap_remove(i);
                    self.table.abandon(reserved);
                    self.doom_behind(n);
                }
            }
            Op::Grant => {
                if let Some(slot) = self.table.grant() {
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
                    let up = parent(*n).map(|p| key(p).hash);
                    match self.table.commit_granted(slot, generation, key(*n), up) {
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
                        Committed::Stale => panic!("{slot:?} is granted"),
                    }
                    assert_eq!(
                        self.table.commit_granted(slot, generation.wrapping_sub(1), key(*n), up),
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
                    self.table.unpin(slot, 1);
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
                    self.table.end_copy(self.copies.swap_remove(i));
                }
            }
            Op::Condemn(i) => {
                if let Some(i) = pick(self.copies.len(), *i) {
                    let copying = self.copies.swap_remove(i);
                    let key = self.table.block(copying.slot()).map(|(key, _)| key);
                    self.table.condemn([&copying]);
                    self.table.check_integrity();
                    assert!(key.is_none_or(|key| self.table.resident(key).is_none()), "it is a miss");
                    if let Some(key) = key {
                        self.doom_behind(number(key));
                    }
                    self.table.end_copy(copying);
                }
            }
            Op::DropAllPins => {
                self.table.drop_all_pins();
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
                    self.retired = self.table.retire(RETIRABLE);
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
                Change::Removed(key) => assert!(self.oracle.resident.remove(&number(key))),
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
            table: SlotTable::new(SLOTS, KeyHasher::new(7)),
            oracle: Oracle::default(),
            reserved: vec![],
            granted: vec![],
            pinned: vec![],
            copies: vec![],
            retired: false,
        };
        for op in &ops {
            walk.apply(op);
            walk.table.check_integrity();
        }
        // Everything given back: no slot is lost.
        walk.reserved.drain(..).for_each(|(reserved, ..)| walk.table.abandon(reserved));
        walk.copies.drain(..).for_each(|copy| walk.table.end_copy(copy));
        walk.table.drop_all_pins();
        walk.table.check_integrity();
        let counts = walk.table.counts();
        prop_assert_eq!((counts.filling, counts.pinned), (0, 0));
        prop_assert_eq!(counts.free + counts.resident + counts.bad, walk.table.slots());
    }
}

fn chain_of(table: &mut SlotTable, numbers: &[u16]) {
    let mut before = None;
    for n in numbers {
        let reserved = table.reserve(key(*n), before).unwrap();
        assert!(table.commit(reserved));
        before = Some(key(*n).hash);
    }
}

#[test]
fn leaves_go_first_and_the_least_recent_chain_before_others() {
    let mut table = SlotTable::new(4, KeyHasher::new(7));
    chain_of(&mut table, &[10, 11]);
    chain_of(&mut table, &[20, 21]);
    // A use of the first chain's end is a use of the chain.
    let (_, deepest) = table.prefix(|i| key([10, 11][i]), 2);
    table.pin(deepest.unwrap());
    table.unpin(deepest.unwrap(), 1);
    let gone = |table: &mut SlotTable, n| {
        let _ = table.reserve(key(n), None).map(|r| table.commit(r));
        [10, 11, 20, 21].into_iter().filter(|n| table.resident(key(*n)).is_none()).collect::<Vec<_>>()
    };
    assert_eq!(gone(&mut table, 1), [21]);
    assert_eq!(gone(&mut table, 2), [20, 21]);
    table.check_integrity();
}

#[test]
fn a_failed_parent_takes_its_children_along() {
    let mut table = SlotTable::new(4, KeyHasher::new(7));
    let first = table.reserve(key(1), None).unwrap();
    let second = table.reserve(key(2), Some(key(1).hash)).unwrap();
    let third = table.reserve(key(3), Some(key(2).hash)).unwrap();
    table.abandon(first);
    table.check_integrity();
    assert_eq!(table.counts().free, 1, "the failed slot waits for its child");
    assert!(!table.commit(second));
    assert!(!table.commit(third));
    assert_eq!(table.counts().free, 4);
    table.check_integrity();
}

#[test]
fn a_parent_is_not_evicted_for_its_own_child() {
    let mut table = SlotTable::new(1, KeyHasher::new(7));
    chain_of(&mut table, &[1]);
    assert_eq!(table.reserve(key(2), Some(key(1).hash)), Err(NotReserved::Exhausted));
    assert!(table.resident(key(1)).is_some());
    table.check_integrity();
}

#[test]
fn a_condemned_slot_takes_along_what_hangs_on_it_and_is_not_used_again() {
    let mut table = SlotTable::new(4, KeyHasher::new(7));
    chain_of(&mut table, &[1, 2, 3]);
    let read = [1, 2, 3].map(|n| {
        let slot = table.resident(key(n)).unwrap();
        table.begin_copy(slot)
    });
    table.condemn([&read[1]]);
    assert_eq!([1, 2, 3].map(|n| table.resident(key(n)).is_some()), [true, false, false]);
    read.into_iter().for_each(|copy| table.end_copy(copy));
    table.check_integrity();
    let counts = table.counts();
    assert_eq!((counts.free, counts.resident, counts.bad), (2, 1, 1));
}
