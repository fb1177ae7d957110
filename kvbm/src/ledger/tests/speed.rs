//! How many references to blocks the ledger takes in a second: printed, not judged.

use rustix::time::{ClockId, clock_gettime};

use super::node::{BLOCK, Sizes};
use super::*;

const CHAIN: usize = 32;

/// A key like those of real sequences: uniform bytes (splitmix64).
fn key(chain: u64, depth: u64) -> SequenceHash {
    let mixed = |n: u64| {
        let mut word = (chain << 32 | depth << 8 | n).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        word = (word ^ word >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ word >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ word >> 31
    };
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&mixed(1).to_le_bytes());
    hash[8..].copy_from_slice(&mixed(2).to_le_bytes());
    SequenceHash(hash)
}

/// Of this thread: what others do meanwhile does not count.
fn cpu_seconds() -> f64 {
    let spent = clock_gettime(ClockId::ThreadCPUTime);
    spent.tv_sec as f64 + spent.tv_nsec as f64 / 1e9
}

/// A request as a pool sees it: match, grants for what is missing, commit, release.
#[test]
#[ignore = "a measurement"]
fn references_through_a_pool() {
    for (blocks, chains) in [(10_000, 1_000), (100_000, 10_000), (1_000_000, 100_000)] {
        let mut node =
            super::node::Node::new(Sizes { device: blocks, ..Sizes::default() }, Quotas::default());
        let namespace = node.namespace("");
        let mut random = 1u64;
        let (mut references, mut hits) = (0u64, 0u64);
        let mut started = cpu_seconds();
        let requests = (12 * blocks as usize).max(4_000_000) / CHAIN;
        let warm = requests / 3;
        for request in 0..requests {
            if request == warm {
                (references, hits, started) = (0, 0, cpu_seconds());
            }
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Skewed: the square of a uniform number.
            let uniform = (random >> 33) as f64 / (1u64 << 31) as f64;
            let chain = (uniform * uniform * chains as f64) as u64;
            let keys: Vec<SequenceHash> = (0..CHAIN as u64).map(|depth| key(chain, depth)).collect();
            let now = Millis(request as u64 / 4);
            let pool = node.pool;
            let matched =
                node.ledger.match_prefix(node.session, namespace, &keys, Some(pool), &[], now).unwrap();
            let mut held = matched.device;
            let found = held.len();
            let granted = node.ledger.request_grants(node.session, pool, CHAIN - found, now).unwrap();
            let commits: Vec<CommitBlock> = granted
                .iter()
                .enumerate()
                .map(|(i, block)| CommitBlock {
                    block: *block,
                    hash: keys[found + i],
                    parent: (found + i).checked_sub(1).map(|before| keys[before]),
                    retention: None,
                })
                .collect();
            node.ledger.commit(node.session, namespace, pool, &commits, now).unwrap();
            held.extend(granted);
            let held: Vec<Held> = held.iter().rev().map(|block| Held { block: *block, pins: 1 }).collect();
            node.ledger.release(node.session, pool, &held, now).unwrap();
            node.ledger.take_events().clear();
            references += CHAIN as u64;
            hits += found as u64;
        }
        let seconds = cpu_seconds() - started;
        let slots = &node.ledger.pool(node.pool).unwrap().slots;
        eprintln!(
            "{blocks} blocks of {BLOCK} bytes: {:.2} million references per second, hit ratio {:.3}, {} bytes of \
             metadata per block without the policy's",
            references as f64 / seconds / 1e6,
            hits as f64 / references as f64,
            slots.metadata_bytes() / slots.counts().resident.max(1),
        );
    }
}
