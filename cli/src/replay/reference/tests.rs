use super::*;
use crate::replay::trace::Numbered;
use crate::replay::workloads::{Workload, trace_of};

fn hits(reference: Reference, capacity: usize, requests: &[&[u64]]) -> u64 {
    let mut numbered = Numbered::new();
    requests.iter().for_each(|ids| numbered.request(0, ids).unwrap());
    reference.hit_blocks(&numbered.finish(512), capacity)
}

#[test]
fn each_policy_makes_its_own_choice() {
    use Reference::{Arc, Belady, Fifo, Infinite, Lfu, Lru, S3Fifo, Sieve};
    // A block that is used between two others that are not.
    let used: &[&[u64]] = &[&[1], &[2], &[1], &[3], &[1]];
    let of = |requests| [Fifo, Lru, Lfu, Sieve, S3Fifo, Arc, Belady, Infinite].map(|r| hits(r, 2, requests));
    assert_eq!(of(used), [1, 2, 2, 2, 2, 2, 2, 2]);
    // A round that is one longer than the pool: only who knows the future keeps something.
    let round: &[&[u64]] = &[&[1], &[2], &[3], &[1], &[2], &[3], &[1], &[2], &[3]];
    let [fifo, lru, .., belady, infinite] = of(round);
    assert_eq!((fifo, lru, belady, infinite), (0, 0, 4, 6));
}

#[test]
fn only_leading_blocks_count() {
    // The first block of the sequence goes first where the newest stays: nothing behind it is found.
    assert_eq!(hits(Reference::Lru, 3, &[&[1, 2, 3, 4], &[1, 2, 3, 4]]), 3);
    assert_eq!(hits(Reference::Infinite, 9, &[&[1, 2, 3, 4], &[1, 9, 3, 4]]), 1);
    assert_eq!(hits(Reference::Belady, 0, &[&[1], &[1]]), 0);
}

#[test]
fn nobody_finds_more_than_those_who_know_more() {
    for workload in Workload::ALL {
        let trace = trace_of(&workload.requests(11, 1500)).unwrap();
        let infinite = Reference::Infinite.hit_blocks(&trace, 1);
        for capacity in [300, 3000] {
            let belady = Reference::Belady.hit_blocks(&trace, capacity);
            assert!(belady <= infinite, "{workload:?}");
            for reference in Reference::ALL.into_iter().filter(|r| *r != Reference::Infinite) {
                let found = reference.hit_blocks(&trace, capacity);
                assert!(found <= belady, "{workload:?} {capacity} {reference:?}: {found} > {belady}");
            }
        }
        let room = trace.unique_blocks();
        assert!(Reference::ALL.into_iter().all(|r| r.hit_blocks(&trace, room) == infinite), "{workload:?}");
    }
}
