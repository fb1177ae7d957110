//! What is printed of a replay over several nodes.

use std::fmt::Write;

use kvbm_frontend::RouterMode;
use serde::Serialize;

use super::Figures;
use crate::replay::trace::Trace;

/// One mode. Scripts read this: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub(super) struct FleetRow {
    router_mode: &'static str,
    /// Events that looked something up.
    requests: u64,
    /// Blocks that were looked up.
    block_refs: u64,
    /// Those of them that were found where the request went.
    pub hit_blocks: u64,
    hit_ratio: f64,
    /// Those of them that were in the worker's own pool.
    pub device_hit_blocks: u64,
    /// Time to first token, milliseconds.
    pub first_token_p50_ms: f64,
    first_token_p99_ms: f64,
    /// Blocks that the worker with most to do computed, over the mean.
    pub most_over_mean: f64,
}

impl FleetRow {
    pub fn new(mode: RouterMode, trace: &Trace, mut figures: Figures) -> Self {
        figures.first_token_us.sort_unstable();
        let times = &figures.first_token_us;
        let percentile = |part: f64| {
            let at = ((times.len() as f64 * part) as usize).min(times.len().saturating_sub(1));
            times.get(at).map_or(0.0, |us| *us as f64 / 1000.0)
        };
        let block_refs = trace.block_refs();
        let computed: u64 = figures.computed.iter().sum();
        let most = figures.computed.iter().max().copied().unwrap_or(0);
        Self {
            router_mode: mode.name(),
            requests: trace.requests(),
            block_refs,
            hit_blocks: figures.hits.total(),
            hit_ratio: figures.hits.total() as f64 / block_refs.max(1) as f64,
            device_hit_blocks: figures.hits.device,
            first_token_p50_ms: percentile(0.5),
            first_token_p99_ms: percentile(0.99),
            most_over_mean: most as f64 * figures.computed.len() as f64 / computed.max(1) as f64,
        }
    }
}

pub(super) fn table(rows: &[FleetRow]) -> String {
    let mut text = format!(
        "{:12} {:>9} {:>9} {:>12} {:>12} {:>12} {:>10}\n",
        "router mode", "hit ratio", "hits", "device hits", "ttft p50 ms", "ttft p99 ms", "most/mean"
    );
    for row in rows {
        let _ = writeln!(
            text,
            "{:12} {:>9.4} {:>9} {:>12} {:>12.1} {:>12.1} {:>10.2}",
            row.router_mode,
            row.hit_ratio,
            row.hit_blocks,
            row.device_hit_blocks,
            row.first_token_p50_ms,
            row.first_token_p99_ms,
            row.most_over_mean
        );
    }
    text
}
