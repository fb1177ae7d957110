//! How many blocks the router's index takes in, gives out and looks up, and what they weigh.

use kvbm_frontend::{Fingerprint, Index, Source, SourceId, Tier};

use rustix::time::{ClockId, clock_gettime};

use super::Row;

/// Blocks in one sequence.
const CHAIN: usize = 1000;
const CHAINS: usize = 1000;
/// Two daemons with three pools, host and disk each.
const NODES: u32 = 2;
const POOLS: u32 = 3;
/// Block operations per second and core, and bytes, that the project demands.
const RATE_MIN: f64 = 5e6;
const BYTES_MAX: f64 = 200e6;

pub(super) fn measure() -> Result<Vec<Row>, String> {
    let chains: Vec<Vec<Fingerprint>> = (0..CHAINS).map(chain).collect();
    let before = resident_bytes()?;
    let mut index = Index::default();
    let sources = sources(&mut index)?;
    // Where each chain is: in one pool, and in the host memory beside it.
    let places = |at: usize| [sources[at % sources.len()], sources[(at + 1) % sources.len()]];

    let started = cpu_seconds();
    for (at, chain) in chains.iter().enumerate() {
        for id in places(at) {
            chain.iter().for_each(|key| index.store(id, *key));
        }
    }
    let stored = rate(2 * CHAIN * CHAINS, started);
    let bytes = resident_bytes()?.saturating_sub(before) as f64;
    let blocks = index.blocks();

    let wanted: Vec<Option<SourceId>> = sources.iter().copied().map(Some).collect();
    let started = cpu_seconds();
    let mut found = 0;
    for at in 0..CHAINS {
        // In an order that caches cannot guess.
        let depths = index.depths(&chains[at.wrapping_mul(389) % CHAINS], &wanted);
        found += depths.iter().max().copied().unwrap_or(0);
    }
    let looked_up = rate(CHAIN * CHAINS, started);
    if found != blocks {
        return Err(format!("the index found {found} of {blocks} blocks"));
    }

    let started = cpu_seconds();
    for (at, chain) in chains.iter().enumerate() {
        for id in places(at) {
            chain.iter().for_each(|key| index.remove(id, *key));
        }
    }
    let removed = rate(2 * CHAIN * CHAINS, started);
    let detail = format!("{blocks} blocks of {CHAINS} sequences, each in 2 of {} places", sources.len());
    let row = |name: &str, value: f64| {
        Row::new(format!("router.{name}"), value, "1/s").at_least(RATE_MIN).detail(&detail)
    };
    Ok(vec![
        row("stored", stored),
        row("looked_up", looked_up),
        row("removed", removed),
        Row::new("router.memory", bytes, "B").at_most(BYTES_MAX).detail(&detail),
    ])
}

fn rate(operations: usize, started: f64) -> f64 {
    operations as f64 / (cpu_seconds() - started)
}

/// What this thread has had of a core: the figures are per core, however many share it.
fn cpu_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Keys like those of real sequences: uniform bytes.
fn chain(number: usize) -> Vec<Fingerprint> {
    let key = |depth: usize| {
        let digest = blake3::hash(&((number as u64) << 32 | depth as u64).to_le_bytes());
        Fingerprint::of(digest.as_bytes().first_chunk().expect("16 of 32 bytes"))
    };
    (0..CHAIN).map(key).collect()
}

fn sources(index: &mut Index) -> Result<Vec<SourceId>, String> {
    let pools = (0..NODES).flat_map(|node| {
        let pools = (1..=POOLS).map(move |pool| Source { node, tier: Tier::Device, pool });
        pools.chain([Tier::Host, Tier::Disk].map(|tier| Source { node, tier, pool: 0 }))
    });
    let ids: Option<Vec<SourceId>> = pools.map(|source| index.source(source)).collect();
    ids.ok_or_else(|| "the index has no room for its sources".to_owned())
}

/// Memory of this process, as the kernel counts it.
fn resident_bytes() -> Result<u64, String> {
    let statm = std::fs::read_to_string("/proc/self/statm").map_err(|error| error.to_string())?;
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    Ok(pages.ok_or("/proc/self/statm is not as expected")? * rustix::param::page_size() as u64)
}
