//! One daemon's host memory in the hands of the next.

use std::collections::BTreeMap;
use std::sync::Arc;

use kvbm_shm::{PoolWords, ProcessWatch, SharedMemory};
use parking_lot::Mutex;

use crate::ledger::{Ledger, SegmentId};
use crate::manager::tests::{Engine, with_host};
use crate::{Keeper, Manager, ManagerConfig, WarmHost, WarmSegment, WarmWords};

/// Keeps memory as another process would: by its descriptors.
#[derive(Clone, Default)]
pub(in crate::manager) struct Kept {
    segments: Arc<Mutex<BTreeMap<u32, WarmSegment>>>,
    pub words: Arc<Mutex<BTreeMap<u32, WarmWords>>>,
}

impl Keeper for Kept {
    fn keep(&self, segment: &WarmSegment) {
        self.segments.lock().insert(segment.index, segment.clone());
    }

    fn discard(&self, index: u32) {
        self.segments.lock().remove(&index);
    }

    fn keep_words(&self, number: u32, words: &PoolWords, process: &ProcessWatch) {
        self.words.lock().insert(number, words_again(number, words, process));
    }

    fn discard_words(&self, number: u32) {
        self.words.lock().remove(&number);
    }
}

fn again(memory: &SharedMemory) -> Arc<SharedMemory> {
    Arc::new(SharedMemory::from_fd(memory.fd().try_clone_to_owned().unwrap()).unwrap())
}

fn words_again(number: u32, words: &PoolWords, process: &ProcessWatch) -> WarmWords {
    let words = PoolWords::from_fd(words.fd().try_clone_to_owned().unwrap()).unwrap();
    WarmWords { number, words, process: process.try_clone().unwrap() }
}

impl Kept {
    fn warm(&self) -> WarmHost {
        let segment = |segment: &WarmSegment| WarmSegment {
            memory: again(&segment.memory),
            table: again(&segment.table),
            ..*segment
        };
        let words = |kept: &WarmWords| words_again(kept.number, &kept.words, &kept.process);
        WarmHost {
            found: self.segments.lock().values().map(segment).collect(),
            words: self.words.lock().values().map(words).collect(),
            keeper: Box::new(self.clone()),
        }
    }
}

pub(in crate::manager) fn start(config: ManagerConfig, kept: &Kept) -> Manager {
    let manager = Manager::start_warm(config, Some(kept.warm())).unwrap();
    while manager.host_bytes().0 != manager.host_bytes().1 {
        std::thread::yield_now();
    }
    manager
}

fn found(engine: &Engine, keys: &[kvbm_hash::SequenceHash]) -> usize {
    let matched = engine.manager.match_prefix(engine.session, engine.namespace, keys, None, &[]).unwrap();
    let Some(lease) = matched.lease else { return 0 };
    let targets = engine.granted(matched.host_blocks);
    assert_eq!(engine.onboard(lease, &targets).unwrap().blocks_done, matched.host_blocks);
    engine.check(&targets, keys);
    engine.release(&targets);
    matched.host_blocks
}

#[test]
fn blocks_in_host_memory_are_found_by_the_next_daemon() {
    let kept = Kept::default();
    let manager = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..48).collect::<Vec<_>>());
    assert_eq!(engine.offloaded(&engine.compute(&keys)).blocks_done, 12);
    // Not stopped: as if it had been killed.
    let next = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&next, true);
    assert_eq!(found(&engine, &keys), 12);
    next.inspect(Ledger::check_integrity);
    // What it stores is found by the one after it.
    let more = engine.keys(&(100..116).collect::<Vec<_>>());
    assert_eq!(engine.offloaded(&engine.compute(&more)).blocks_done, 4);
    let last = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&last, true);
    assert_eq!((found(&engine, &more), found(&engine, &keys)), (4, 12));
    [manager, next, last].iter().for_each(Manager::stop);
}

#[test]
fn a_slot_that_was_being_filled_is_free() {
    let kept = Kept::default();
    let manager = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..32).collect::<Vec<_>>());
    assert_eq!(engine.offloaded(&engine.compute(&keys)).blocks_done, 8);
    let table = crate::store::WarmTables::new(Box::new(kept.clone()), 0);
    let segments = kept.warm().found;
    segments.iter().for_each(|segment| {
        drop(table.adopt(SegmentId(segment.index), segment, segment.memory.bytes(), true))
    });
    // The fifth block is overwritten just when its daemon dies.
    table.clear(std::iter::once(manager.inspect(|ledger| ledger.host_place(keys[4])).unwrap()));
    let next = start(with_host(1 << 20), &kept);
    assert_eq!(found(&Engine::attach(&next, true), &keys), 4);
    next.inspect(Ledger::check_integrity);
    [manager, next].iter().for_each(Manager::stop);
}

#[test]
fn memory_that_is_cut_otherwise_is_given_up() {
    let kept = Kept::default();
    let manager = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..16).collect::<Vec<_>>());
    engine.offloaded(&engine.compute(&keys));
    let larger = start(with_host(2 << 20), &kept);
    assert_eq!(found(&Engine::attach(&larger, true), &keys), 0);
    let sizes: Vec<usize> = kept.segments.lock().values().map(|segment| segment.memory.bytes()).collect();
    assert!(
        sizes.iter().sum::<usize>() > 1 << 20 && sizes.iter().all(|bytes| *bytes == sizes[0]),
        "{sizes:?}"
    );
    [manager, larger].iter().for_each(Manager::stop);
}

/// Where one user alone may attach, memory is given to engines before anything is in it. The next daemon may admit others.
#[test]
fn memory_that_nothing_was_in_has_a_successor_where_there_is_one_domain_only() {
    for one_domain in [false, true] {
        let kept = Kept::default();
        let manager = start(with_host(1 << 20), &kept);
        let engine = Engine::attach(&manager, true);
        let keys = engine.keys(&(0..16).collect::<Vec<_>>());
        assert_eq!(engine.offloaded(&engine.compute(&keys)).blocks_done, 4);
        let bound = manager.inspect(|ledger| ledger.host_place(keys[0])).unwrap().segment.0;
        let memory = |index: u32| Arc::clone(&kept.segments.lock()[&index].memory);
        let unbound: Vec<_> = kept.segments.lock().keys().copied().filter(|index| *index != bound).collect();
        assert!(!unbound.is_empty());
        let at = memory(bound).bytes() - 8;
        unbound.iter().for_each(|index| memory(*index).write(at, b"was here"));
        let next = start(ManagerConfig { one_domain, ..with_host(1 << 20) }, &kept);
        assert_eq!(found(&Engine::attach(&next, true), &keys), 4);
        let is_old = |memory: Arc<SharedMemory>| {
            let mut end = [0; 8];
            memory.read(at, &mut end);
            end == *b"was here"
        };
        let old = kept.segments.lock().values().filter(|segment| is_old(Arc::clone(&segment.memory))).count();
        assert_eq!(old, if one_domain { unbound.len() } else { 0 });
        assert_eq!(kept.segments.lock().len(), unbound.len() + 1);
        next.inspect(Ledger::check_integrity);
        [manager, next].iter().for_each(Manager::stop);
    }
}

/// The holder may give us anything: nothing of it is believed that is not consistent.
#[test]
fn scribbled_tables_do_no_harm() {
    let kept = Kept::default();
    let manager = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..32).collect::<Vec<_>>());
    engine.offloaded(&engine.compute(&keys));
    for segment in kept.segments.lock().values() {
        let bytes = segment.table.bytes();
        for at in (0..bytes).step_by(61) {
            segment.table.write(at, &[(at * 7) as u8]);
        }
    }
    let next = start(with_host(1 << 20), &kept);
    assert_eq!(found(&Engine::attach(&next, true), &keys), 0);
    next.inspect(Ledger::check_integrity);
    [manager, next].iter().for_each(Manager::stop);
}

/// The drive does not know that the daemon is dead: what it reads may come at any time.
#[test]
fn a_segment_into_which_a_dead_daemons_drive_may_write_has_no_successor() {
    let kept = Kept::default();
    let manager = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..32).collect::<Vec<_>>());
    assert_eq!(engine.offloaded(&engine.compute(&keys)).blocks_done, 8);
    let table = crate::store::WarmTables::new(Box::new(kept.clone()), 0);
    let segments = kept.warm().found;
    for segment in &segments {
        assert!(table.adopt(SegmentId(segment.index), segment, segment.memory.bytes(), true).is_some());
    }
    let place = manager.inspect(|ledger| ledger.host_place(keys[4])).unwrap();
    let old = segments.iter().find(|segment| segment.index == place.segment.0).unwrap();
    table.mark_reading(std::iter::once(place));
    let next = start(with_host(1 << 20), &kept);
    let engine = Engine::attach(&next, true);
    assert_eq!(found(&engine, &keys), 0);
    let more = engine.keys(&(100..164).collect::<Vec<_>>());
    assert_eq!(engine.offloaded(&engine.compute(&more)).blocks_done, 16);
    // Now it comes.
    old.memory.write(0, &vec![0xEE; old.memory.bytes()]);
    let other = Engine::attach(&next, true);
    assert_eq!(found(&other, &more), 16);
    // All others are kept under new numbers, without gaps.
    let numbers: Vec<u32> = kept.segments.lock().keys().copied().collect();
    assert_eq!(numbers, (0..numbers.len() as u32).collect::<Vec<_>>());
    next.inspect(Ledger::check_integrity);
    [manager, next].iter().for_each(Manager::stop);
}
