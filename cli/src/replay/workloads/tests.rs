use std::collections::{HashMap, HashSet};

use super::*;

const COUNT: usize = 3000;

#[test]
fn a_seed_is_a_workload() {
    for workload in Workload::ALL {
        let requests = workload.requests(3, COUNT);
        assert_eq!(requests, workload.requests(3, COUNT));
        assert_ne!(requests, workload.requests(4, COUNT));
        assert_eq!(requests.len(), COUNT);
        assert!(requests.is_sorted_by_key(|request| request.at_ms), "{workload:?}");
        assert!(requests.iter().all(|request| !request.blocks.is_empty()));
    }
}

/// A number stands for a block and all before it.
#[test]
fn a_block_is_always_behind_the_same_one() {
    for workload in Workload::ALL {
        let mut parents = HashMap::new();
        for request in workload.requests(5, COUNT) {
            let mut before = None;
            for block in request.blocks {
                assert_eq!(*parents.entry(block).or_insert(before), before, "{workload:?}");
                before = Some(block);
            }
        }
    }
}

/// Share of the blocks of all requests that an earlier request had.
fn ideal(requests: &[Request]) -> f64 {
    let mut seen = HashSet::new();
    let (mut all, mut known) = (0, 0);
    for request in requests {
        all += request.blocks.len();
        known += request.blocks.iter().filter(|block| !seen.insert(**block)).count();
    }
    known as f64 / all as f64
}

#[test]
fn workloads_differ_in_what_can_be_found_again() {
    let ideals = Workload::ALL.map(|workload| ideal(&workload.requests(1, COUNT)));
    let [chat, agents, rag, scan] = ideals;
    assert!((0.5..0.85).contains(&chat), "{ideals:?}");
    assert!((0.8..0.97).contains(&agents), "{ideals:?}");
    assert!((0.4..0.9).contains(&rag), "{ideals:?}");
    assert!((0.05..0.4).contains(&scan), "{ideals:?}");
}
