//! How long the ledger takes for a match.

use std::time::{Duration, Instant};

use kvbm::ledger::{DiskRules, Ledger, LedgerConfig, Millis, PoolIdentity, SegmentId, SlotsIn};
use kvbm::{BlockRef, CommitBlock, Held, NamespaceId, PolicyKind, Quotas, SessionId, TrustDomain};
use kvbm_hash::SequenceHash;
use kvbm_shm::PoolLayout;

use super::Row;
use super::row::{histogram, percentile_us};

/// Blocks in one sequence, and in one match.
const CHAIN: usize = 1024;
const MATCHES: usize = 4000;
/// Microseconds at the median that the project demands, by resident blocks.
const CATALOGS: [(&str, usize, f64); 2] = [("100k", 100_000, 60.0), ("1m", 1_000_000, 100.0)];

pub(super) fn measure() -> Vec<Row> {
    CATALOGS.into_iter().flat_map(|(name, blocks, limit)| measure_catalog(name, blocks, limit)).collect()
}

fn measure_catalog(name: &str, blocks: usize, limit: f64) -> Vec<Row> {
    let mut catalog = Catalog::fill(blocks.div_ceil(CHAIN));
    let mut times = histogram();
    for i in 0..MATCHES {
        // Chains in an order that caches cannot guess.
        let chain = i.wrapping_mul(7919) % catalog.chains;
        let hashes: Vec<SequenceHash> = (0..CHAIN).map(|depth| hash(chain, depth)).collect();
        let started = Instant::now();
        let matched = catalog.ledger.match_prefix(
            catalog.session,
            catalog.namespace,
            &hashes,
            None,
            &[],
            Millis(i as u64),
        );
        let took = started.elapsed();
        let matched = matched.expect("the namespace is registered");
        assert_eq!(matched.host_blocks, CHAIN, "all blocks are resident");
        times.saturating_record(took.as_nanos() as u64);
        let lease = matched.lease.expect("host blocks are leased");
        catalog.ledger.release_lease(catalog.session, lease, Millis(i as u64)).expect("it was just given");
    }
    let resident = catalog.chains * CHAIN;
    let detail = format!("{CHAIN} blocks found and leased among {resident} resident ones");
    vec![
        Row::new(format!("match.1024.{name}.p50"), percentile_us(&times, 50.0), "us")
            .at_most(limit)
            .detail(&detail),
        Row::new(format!("match.1024.{name}.p99"), percentile_us(&times, 99.0), "us").detail(detail),
    ]
}

/// A key like those of real sequences: uniform bytes.
fn hash(chain: usize, depth: usize) -> SequenceHash {
    let digest = blake3::hash(&((chain as u64) << 32 | depth as u64).to_le_bytes());
    SequenceHash(*digest.as_bytes().first_chunk().expect("16 of 32 bytes"))
}

struct Catalog {
    ledger: Ledger,
    session: SessionId,
    namespace: NamespaceId,
    chains: usize,
}

impl Catalog {
    /// Chains go through a small pool into host, as they do in the daemon; only the bytes are missing.
    fn fill(chains: usize) -> Self {
        const STRIDE: usize = 4096;
        const SEGMENT: usize = STRIDE << 16;
        let mut ledger = Ledger::new(LedgerConfig {
            disk: DiskRules::default(),
            lease: Duration::from_secs(30),
            orphan_pools_max: 0,
            orphan_pool_ttl: Duration::ZERO,
            secret: 0x9E37_79B9_7F4A_7C15,
            policy: PolicyKind::default(),
            quotas: Quotas::default(),
            pin_budget_bytes: 0,
            rescue: Duration::from_secs(3),
            shard_wait: Duration::from_secs(10),
            one_domain: true,
            offload_priority_min: 0,
        });
        ledger.set_segments(Some(SlotsIn::bytes(SEGMENT)));
        let segments = (chains * CHAIN * STRIDE).div_ceil(SEGMENT) as u32;
        (0..segments).for_each(|segment| ledger.add_segment(SegmentId(segment)));
        let session = ledger.open_session(TrustDomain(0));
        let namespace = ledger
            .register_namespace(session, [1; 32], [2; 32], "", "bench", Millis(0))
            .expect("the session is there");
        let identity = PoolIdentity {
            uuid: [3; 16],
            base: [2; 32],
            domain: TrustDomain(0),
            layout: PoolLayout { block_bytes: STRIDE, block_count: CHAIN as u32 },
            tokens_per_block: 32,
            device: "cpu:0".into(),
        };
        let pool = ledger.add_pool(session, identity, 1).expect("the session is there");
        for chain in 0..chains {
            let blocks = ledger.request_grants(session, pool, CHAIN, Millis(0)).expect("it is its pool");
            let commits: Vec<CommitBlock> = (0..CHAIN)
                .map(|depth| CommitBlock {
                    block: blocks[depth],
                    hash: hash(chain, depth),
                    parent: depth.checked_sub(1).map(|before| hash(chain, before)),
                    retention: None,
                })
                .collect();
            ledger.commit(session, namespace, pool, &commits, Millis(0)).expect("it is its pool");
            while let Some(batch) = ledger.next_offload(256, Millis(0)) {
                ledger.finish_offload(batch, true, Millis(0));
            }
            let held: Vec<Held> =
                blocks.iter().map(|block: &BlockRef| Held { block: *block, pins: 1 }).collect();
            ledger.release(session, pool, &held, Millis(0)).expect("it is its pool");
            ledger.take_events().clear();
        }
        Self { ledger, session, namespace, chains }
    }
}
