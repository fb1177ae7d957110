use kvbm::AdmissionRules;

use super::*;
use crate::replay::policies::BASELINE;
use crate::replay::reference::Reference;
use crate::replay::workloads::{Workload, trace_of};

const BLOCK_BYTES: u64 = 1000;

fn setup(device: u32, host: u32, disk: u32) -> Setup {
    Setup {
        policy: BASELINE,
        capacities: Capacities { device, host, disk },
        disk_rules: DiskRules::default(),
        secret: 1,
        block_bytes: BLOCK_BYTES,
        engines: 1,
    }
}

fn run(trace: &Trace, setup: &Setup) -> Outcome {
    replay(trace, setup, Progress::new(String::new(), trace.events.len())).unwrap()
}

fn workload(workload: Workload) -> Trace {
    trace_of(&workload.requests(2, 1500)).unwrap()
}

/// Against policies that know nothing of leaves: what is known best differs from workload to workload.
#[test]
fn the_default_is_nowhere_much_below_the_best_known() {
    for kind in Workload::ALL {
        let trace = trace_of(&kind.requests(3, 10_000)).unwrap();
        for capacity in [500, 2000, 8000] {
            let ours = Setup { policy: PolicyKind::DEFAULT, ..setup(0, capacity, 0) };
            let ours = run(&trace, &ours).hits.total();
            let known = Reference::ALL.into_iter().filter(|known| known.is_attainable());
            let best = known.map(|known| known.hit_blocks(&trace, capacity as usize)).max().unwrap();
            assert!(ours as f64 >= 0.99 * best as f64, "{kind:?} with {capacity}: {ours} of {best}");
        }
    }
}

#[test]
fn the_default_takes_64_bytes_for_a_slot_more_than_lru_at_most() {
    let trace = workload(Workload::Chat);
    let bytes = |policy| run(&trace, &Setup { policy, ..setup(0, 20_000, 0) }).metadata_bytes;
    assert!(bytes(PolicyKind::Gittins) <= bytes(PolicyKind::Lru) + 64 * 20_000);
}

/// Leaves first, parents as young as their children: that is LRU of blocks whose requests store the last one first.
#[test]
fn the_ledger_with_lru_finds_what_plain_lru_finds() {
    for kind in Workload::ALL {
        let trace = workload(kind);
        for capacity in [500, 2000, 8000] {
            let ledger = run(&trace, &setup(0, capacity, 0)).hits.total() as f64;
            let plain = Reference::Lru.hit_blocks(&trace, capacity as usize) as f64;
            let difference = (ledger - plain).abs() / trace.block_refs() as f64;
            assert!(difference < 0.002, "{kind:?} with {capacity}: {ledger}, not {plain}");
        }
    }
}

#[test]
fn with_room_for_all_each_block_is_computed_once() {
    let trace = workload(Workload::Agents);
    let unique = trace.unique_blocks() as u64;
    let repeated = trace.block_refs() - unique;
    let room = unique as u32;
    for setup in [setup(0, room, 0), setup(room, 0, 0), setup(room, room, 0), setup(400, room, room)] {
        let outcome = run(&trace, &setup);
        assert_eq!((outcome.computed, outcome.hits.total()), (unique, repeated), "{:?}", setup.capacities);
    }
}

#[test]
fn a_pool_before_host_memory_finds_the_same_and_moves_less() {
    let trace = workload(Workload::Chat);
    let host = run(&trace, &setup(0, 3000, 0));
    let both = run(&trace, &setup(1000, 3000, 0));
    assert!(both.hits.device > 0 && both.hits.host > 0, "{:?}", both.hits);
    let (alone, with_pool) = (host.hits.total() as f64, both.hits.total() as f64);
    assert!((with_pool / alone - 1.0).abs() < 0.05, "{with_pool} and {alone}");
    assert!(both.moved < host.moved, "what is on the device is not copied to it");
    assert!(host.metadata_bytes > 0 && host.slots == 3000 && both.slots == 4000);
}

#[test]
fn a_disk_finds_what_host_memory_forgot_and_its_filter_spares_it() {
    let trace = workload(Workload::Chat);
    let with = |filter: bool, budget: Option<u64>| {
        let admission = AdmissionRules {
            frequency_filter: filter,
            bytes_per_day: budget,
            ..DiskRules::default().admission
        };
        let rules = DiskRules { admission, ..DiskRules::default() };
        run(&trace, &Setup { disk_rules: rules, ..setup(0, 1000, 20_000) })
    };
    let (without, filtered, all) = (run(&trace, &setup(0, 1000, 0)), with(true, None), with(false, None));
    assert!(filtered.hits.disk > 0 && filtered.hits.total() > without.hits.total());
    assert!(all.hits.total() > filtered.hits.total(), "more is found where more is written");
    assert!(filtered.disk_writes * 4 < all.disk_writes * 3, "{} {}", filtered.disk_writes, all.disk_writes);
    // A day's budget accrues evenly, and an hour's worth is there from the start.
    let hours = trace.events.last().unwrap().at_ms as f64 / 3_600_000.0;
    let budget = 200 * BLOCK_BYTES * 24;
    let sparing = with(false, Some(budget));
    let most = 200.0 * (1.0 + hours) + BATCH as f64;
    assert!(sparing.disk_writes as f64 <= most, "{} of {most}", sparing.disk_writes);
    assert!(sparing.disk_writes > 0 && sparing.hits.total() < all.hits.total());
}
