//! An engine that asks again, against a directory that knows what is held.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvbm_hash::{Namespace, SequenceHash};
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::engine::metadata::{Lease, Metadata};
use crate::engine::scheduler::{Directory, LoadMode, Promised, Report, Slot};

const SIZE: usize = 4;

#[derive(Default)]
struct Shelf {
    in_host: Mutex<usize>,
    on_disk: Mutex<usize>,
    held: Mutex<BTreeSet<u64>>,
    next: Mutex<u64>,
    arrived: Arc<AtomicBool>,
}

impl Directory for Shelf {
    fn look_up(
        &self,
        _: Namespace,
        keys: &[SequenceHash],
        skip: usize,
        _: &mut dyn FnMut() -> bool,
    ) -> Option<Promised> {
        let found = (*self.in_host.lock()).min(keys.len()).saturating_sub(skip);
        if found == 0 {
            return None;
        }
        let mut next = self.next.lock();
        *next += 1;
        self.held.lock().insert(*next);
        let slots = (0..found as u32).map(|index| Slot { segment: 1, index }).collect();
        Some(Promised { lease: Lease { lease_id: *next, pin: 0 }, slots })
    }

    fn look_up_patiently(&self, namespace: Namespace, keys: &[SequenceHash], skip: usize) -> Look {
        if *self.on_disk.lock() > 0 {
            return Look::Later(Arrival { ended: self.arrived.clone(), patience: Duration::from_secs(3) });
        }
        Look::Now(self.look_up(namespace, keys, skip, &mut || false))
    }

    fn take_back(&self, lease: Lease) {
        assert!(self.held.lock().remove(&lease.lease_id), "taken back twice");
    }

    fn takes_saves(&self) -> bool {
        true
    }
}

struct Engine {
    shelf: Arc<Shelf>,
    half: SchedulerHalf,
}

fn engine(in_host: usize, on_disk: usize) -> Engine {
    engine_that(LoadMode::Parked, in_host, on_disk)
}

fn engine_that(mode: LoadMode, in_host: usize, on_disk: usize) -> Engine {
    let shelf =
        Arc::new(Shelf { in_host: Mutex::new(in_host), on_disk: Mutex::new(on_disk), ..Shelf::default() });
    let half = SchedulerHalf::new([7; 16], SIZE as u32, mode, shelf.clone()).of_known_size();
    Engine { shelf, half }
}

fn tokens(count: usize) -> Vec<u32> {
    (0..count as u32).collect()
}

impl Engine {
    fn query(&mut self, id: u64, count: usize, local: usize, at_s: u64) -> Option<usize> {
        self.look_up(id, count, local, 0, at_s).map(|(found, _)| found)
    }

    fn look_up(
        &mut self,
        id: u64,
        count: usize,
        local: usize,
        others: usize,
        at_s: u64,
    ) -> Option<(usize, bool)> {
        let new = NewRequest {
            id,
            tokens: tokens(count),
            namespace: Namespace([1; 32]),
            items: Vec::new(),
            cacheable: true,
        };
        self.half.query_patiently(new, local, others, Duration::from_secs(at_s))
    }

    fn allocated(&mut self, id: u64, pages: Vec<i32>) {
        assert!(self.half.allocated(id, &[pages], Duration::ZERO));
    }

    fn build(&mut self, new: Vec<Report>) -> Metadata {
        Metadata::decode(&self.half.build(new, Vec::new(), Duration::ZERO)).unwrap().unwrap()
    }

    fn held(&self) -> usize {
        self.shelf.held.lock().len()
    }
}

#[test]
fn a_request_waits_once_for_blocks_from_disk_and_holds_nothing_meanwhile() {
    let mut engine = engine(1, 2);
    assert_eq!(engine.query(1, 17, 0, 0), None);
    assert_eq!((engine.query(1, 17, 0, 1), engine.held()), (None, 0));
    *engine.shelf.in_host.lock() = 3;
    engine.shelf.arrived.store(true, Ordering::Release);
    // More is still on disk, but it has waited.
    assert_eq!((engine.query(1, 17, 0, 2), engine.held()), (Some(12), 1));
    assert_eq!(engine.half.counts().queries, 2);
}

#[test]
fn what_has_not_come_in_time_is_computed() {
    let mut engine = engine(1, 2);
    assert_eq!(engine.query(1, 17, 0, 10), None);
    assert_eq!(engine.query(1, 17, 0, 12), None);
    assert_eq!(engine.query(1, 17, 0, 13), Some(4));
}

#[test]
fn a_request_that_ends_while_it_waits_is_forgotten() {
    let mut engine = engine(1, 2);
    assert_eq!(engine.query(1, 17, 0, 0), None);
    assert!(!engine.half.finished(1));
    *engine.shelf.on_disk.lock() = 0;
    assert_eq!(engine.query(1, 17, 0, 0), Some(4));
}

#[test]
fn an_offer_stands_until_the_request_is_another() {
    let mut engine = engine(3, 0);
    assert_eq!(engine.query(1, 17, 0, 0), Some(12));
    assert_eq!(engine.query(1, 17, 0, 0), Some(12));
    assert_eq!((engine.held(), *engine.shelf.next.lock()), (1, 1), "nobody was asked again");
    assert_eq!(engine.query(1, 17, 4, 0), Some(8));
    assert_eq!((engine.held(), *engine.shelf.next.lock()), (1, 2));
    assert_eq!(engine.query(1, 18, 4, 0), Some(8));
    assert_eq!((engine.held(), *engine.shelf.next.lock()), (1, 3));
}

#[test]
fn an_offer_that_is_declined_is_taken_back_and_not_loaded() {
    let mut engine = engine(3, 0);
    assert_eq!(engine.query(1, 17, 0, 0), Some(12));
    engine.half.declined(1);
    assert_eq!(engine.held(), 0);
    let scheduled = Some(17);
    let report = Report {
        id: 1,
        tokens: tokens(17),
        pages: vec![vec![1, 2, 3, 4, 5]],
        scheduled,
        ..Report::default()
    };
    assert!(engine.build(vec![report]).loads.is_empty());
}

fn first_report(id: u64, count: usize, pages: Vec<i32>, computed: usize) -> Report {
    let scheduled = Some(count - computed);
    Report { id, tokens: tokens(count), pages: vec![pages], computed, scheduled, ..Report::default() }
}

#[test]
fn a_short_load_is_done_in_the_pass_and_a_long_one_parked() {
    let mut engine = engine_that(LoadMode::Auto, 3, 0);
    assert_eq!(engine.look_up(1, 17, 0, 0, 0), Some((12, true)), "it was never measured");
    engine.half.measured(Duration::from_micros(300));
    assert_eq!(engine.look_up(1, 17, 0, 0, 0), Some((12, true)), "the same offer");
    engine.half.finished(1);
    assert_eq!(engine.look_up(2, 17, 0, 4, 0), Some((12, false)));
    engine.allocated(2, vec![1, 2, 3, 4, 5]);
    assert_eq!(engine.look_up(3, 17, 0, 4, 0), Some((12, true)), "the pass waits for one already");
    engine.allocated(3, vec![6, 7, 8, 9, 10]);
    let loads = engine.build(vec![first_report(2, 17, vec![1, 2, 3, 4, 5], 12)]).loads;
    assert_eq!(
        loads.iter().map(|load| (load.request_id, load.parked)).collect::<Vec<_>>(),
        [(3, true), (2, false)]
    );
    assert_eq!(engine.look_up(4, 17, 0, 0, 0), Some((12, true)), "one is being loaded, which comes first");
}

#[test]
fn only_a_request_that_is_alone_goes_on_before_all_layers_are_there() {
    for (by_layer, others, expected) in [(true, 0, true), (true, 1, false), (false, 0, false)] {
        let mut engine = engine(3, 0);
        engine.half = engine.half.by_layer(by_layer);
        assert_eq!(engine.look_up(1, 17, 0, others, 0), Some((12, true)));
        // It stays what it was when the offer was made.
        assert_eq!(engine.look_up(1, 17, 0, 1 - others, 0), Some((12, true)));
        engine.allocated(1, vec![1, 2, 3, 4, 5]);
        let loads = engine.build(Vec::new()).loads;
        assert_eq!(loads.iter().map(|load| load.in_layers).collect::<Vec<_>>(), [expected]);
        // One is being loaded, which comes first.
        engine.look_up(2, 17, 0, 0, 0);
        engine.allocated(2, vec![6, 7, 8, 9, 10]);
        assert!(engine.build(Vec::new()).loads.iter().all(|load| !load.in_layers));
    }
}

#[test]
fn a_request_whose_load_in_the_pass_failed_computes() {
    let mut engine = engine_that(LoadMode::InPass, 3, 0);
    assert_eq!(engine.look_up(1, 17, 0, 0, 0), Some((12, false)));
    engine.allocated(1, vec![5, 6, 7, 8, 9]);
    engine.build(vec![first_report(1, 17, vec![5, 6, 7, 8, 9], 12)]);
    engine.half.loads_failed(&[8, 40]);
    assert_eq!(engine.half.counts().failed_loads, 0, "that page was not loaded");
    engine.half.loads_failed(&[6, 7]);
    assert_eq!(engine.half.counts().failed_loads, 1);
    assert_eq!(engine.look_up(1, 17, 0, 0, 0), Some((0, false)));
}

#[test]
fn a_request_whose_load_failed_computes_and_others_are_still_offered() {
    let mut engine = engine(3, 0);
    assert_eq!(engine.query(1, 17, 0, 0), Some(12));
    engine.allocated(1, vec![5, 6, 7, 8, 9]);
    engine.half.loads_failed(&[6, 40]);
    assert_eq!(engine.half.counts().failed_loads, 1);
    assert_eq!(engine.query(1, 17, 0, 0), Some(0));
    assert_eq!(engine.query(2, 17, 0, 0), Some(12));
    engine.half.finished(1);
    assert_eq!(engine.query(1, 17, 0, 0), Some(12), "the number is another request's now");
}

#[derive(Debug, Clone)]
enum Op {
    Query { id: u64, count: usize, local_blocks: usize },
    Allocated { id: u64 },
    Declined { id: u64 },
    Failed { page: i32 },
    Build,
    Finished { id: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    let id = || 0u64..4;
    prop_oneof![
        4 => (id(), 1usize..30, 0usize..3)
            .prop_map(|(id, count, local_blocks)| Op::Query { id, count, local_blocks }),
        3 => id().prop_map(|id| Op::Allocated { id }),
        1 => id().prop_map(|id| Op::Declined { id }),
        1 => (0i32..40).prop_map(|page| Op::Failed { page }),
        2 => Just(Op::Build),
        2 => id().prop_map(|id| Op::Finished { id }),
    ]
}

proptest! {
    /// Each lease is taken back by the scheduler half, or goes to the worker halves in a load that ends it; never both,
    /// and none is forgotten.
    #[test]
    fn every_lease_ends_once(
        ops in prop::collection::vec(op(), 1..80),
        in_host in 0usize..6,
        mode in prop_oneof![Just(LoadMode::Parked), Just(LoadMode::InPass), Just(LoadMode::Auto)],
    ) {
        let mut engine = engine_that(mode, in_host, 0);
        // Three blocks are short when others go on.
        engine.half.measured(Duration::from_micros(300));
        let mut offered: HashMap<u64, (usize, usize, bool)> = HashMap::new();
        // Loads in the next pass go with the first report.
        let mut in_pass: HashMap<u64, Report> = HashMap::new();
        let mut page = 0;
        let ends = |engine: &mut Engine, reports: Vec<Report>| {
            for load in engine.build(reports).loads {
                assert!(load.last);
                assert!(engine.shelf.held.lock().remove(&load.lease.lease_id), "loaded and taken back");
            }
        };
        for op in ops {
            match op {
                Op::Query { id, count, local_blocks } => {
                    let local = local_blocks * SIZE;
                    let (found, parked) = engine.look_up(id, count, local, id as usize % 2, 0).unwrap();
                    prop_assert!(local + found < count.max(local + 1));
                    prop_assert!(found > 0 || !parked);
                    offered.insert(id, (count, local + found, parked));
                    in_pass.remove(&id);
                }
                Op::Allocated { id } => {
                    let Some((count, computed, parked)) = offered.remove(&id) else { continue };
                    if engine.half.requests.get(&id).is_some_and(|request| request.offer.is_some()) {
                        let pages: Vec<i32> = (page..page + 9).collect();
                        engine.allocated(id, pages.clone());
                        if !parked {
                            in_pass.insert(id, first_report(id, count, pages, computed));
                        }
                        page += 9;
                    }
                }
                Op::Declined { id } => {
                    in_pass.remove(&id);
                    engine.half.declined(id);
                }
                Op::Failed { page } => engine.half.loads_failed(&[page]),
                Op::Build => ends(&mut engine, in_pass.drain().map(|(_, report)| report).collect()),
                Op::Finished { id } => {
                    offered.remove(&id);
                    in_pass.remove(&id);
                    engine.half.finished(id);
                }
            }
        }
        for id in 0..4 {
            engine.half.finished(id);
        }
        ends(&mut engine, Vec::new());
        prop_assert_eq!(engine.held(), 0);
    }
}
