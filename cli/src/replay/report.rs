//! What is printed.

use kvbm::ledger::PolicyKind;
use serde::Serialize;

use super::drive::{Capacities, Hits, Outcome};
use super::policies::{BASELINE, Candidate};
use super::trace::Trace;

/// One policy at one capacity. Scripts read this: fields are added, never renamed.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    policy: &'static str,
    /// `ledger`: the block manager's own tables decided; `reference`: a plain pool of as many blocks as all tiers
    /// together.
    kind: &'static str,
    capacities: Tiers,
    /// Events that looked something up.
    requests: u64,
    /// Blocks that were looked up.
    block_refs: u64,
    /// Those of them that were found, with all before them.
    hit_blocks: u64,
    hit_ratio: f64,
    /// Found blocks by tier.
    tiers: Tiers,
    /// Copied from tier to tier.
    bytes_moved: Option<u64>,
    /// Blocks written to disk.
    disk_writes: Option<u64>,
    /// Blocks written to disk for each that was computed.
    write_amplification: Option<f64>,
    /// Parsing excluded.
    refs_per_second: Option<f64>,
    /// Memory of the ledger for each slot of all tiers.
    metadata_bytes_per_block: Option<f64>,
    /// Share of what Belady's choice gains over the baseline that this policy gains; only where both were replayed.
    #[serde(skip_serializing_if = "Option::is_none")]
    gap_closed: Option<f64>,
}

/// Blocks of each tier; no tier where the row is about a plain pool.
#[derive(Debug, Clone, Copy, Serialize)]
struct Tiers {
    device: u64,
    host: u64,
    disk: u64,
}

impl From<Hits> for Tiers {
    fn from(Hits { device, host, disk }: Hits) -> Self {
        Self { device, host, disk }
    }
}

impl From<Capacities> for Tiers {
    fn from(Capacities { device, host, disk }: Capacities) -> Self {
        Self { device: device.into(), host: host.into(), disk: disk.into() }
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl Row {
    fn new(candidate: Candidate, trace: &Trace, capacities: Capacities, hits: Hits) -> Self {
        let block_refs = trace.block_refs();
        Self {
            policy: candidate.name(),
            kind: match candidate {
                Candidate::Ledger(_) => "ledger",
                Candidate::Reference(_) => "reference",
            },
            capacities: capacities.into(),
            requests: trace.requests(),
            block_refs,
            hit_blocks: hits.total(),
            hit_ratio: ratio(hits.total(), block_refs),
            tiers: hits.into(),
            bytes_moved: None,
            disk_writes: None,
            write_amplification: None,
            refs_per_second: None,
            metadata_bytes_per_block: None,
            gap_closed: None,
        }
    }

    pub(super) fn of_ledger(
        policy: PolicyKind,
        trace: &Trace,
        capacities: Capacities,
        outcome: &Outcome,
        block_bytes: u64,
    ) -> Self {
        let row = Self::new(Candidate::Ledger(policy), trace, capacities, outcome.hits);
        let seconds = outcome.elapsed.as_secs_f64();
        Self {
            bytes_moved: Some(outcome.moved.saturating_mul(block_bytes)),
            disk_writes: Some(outcome.disk_writes),
            write_amplification: Some(ratio(outcome.disk_writes, outcome.computed)),
            refs_per_second: Some(if seconds > 0.0 { row.block_refs as f64 / seconds } else { 0.0 }),
            metadata_bytes_per_block: Some(ratio(outcome.metadata_bytes as u64, outcome.slots as u64)),
            ..row
        }
    }

    /// A plain pool has no tiers: what it finds counts as found in host memory.
    pub(super) fn of_reference(
        candidate: Candidate,
        trace: &Trace,
        capacities: Capacities,
        hit_blocks: u64,
    ) -> Self {
        Self::new(candidate, trace, capacities, Hits { device: 0, host: hit_blocks, disk: 0 })
    }

    pub(super) fn policy(&self) -> &'static str {
        self.policy
    }

    pub(super) fn hit_ratio(&self) -> f64 {
        self.hit_ratio
    }
}

/// Fills in which share of the gap each row closes.
pub(super) fn close_gaps(rows: &mut [Row]) {
    let of = |name: &str| rows.iter().find(|row| row.policy == name).map(|row| row.hit_ratio);
    let (Some(baseline), Some(best)) = (of(BASELINE.name()), of("belady")) else { return };
    if best > baseline {
        rows.iter_mut().for_each(|row| row.gap_closed = Some((row.hit_ratio - baseline) / (best - baseline)));
    }
}

/// For people.
pub(super) fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<18} {:>9} {:>9} {:>9} {:>9} {:>12} {:>10} {:>8} {:>12} {:>7}\n",
        "policy",
        "hit ratio",
        "device",
        "host",
        "disk",
        "moved MB",
        "disk wr.",
        "Mrefs/s",
        "bytes/block",
        "gap"
    );
    let dash = || "-".to_owned();
    for row in rows {
        let of = |value: Option<f64>, digits: usize| value.map_or_else(dash, |v| format!("{v:.digits$}"));
        let moved = of(row.bytes_moved.map(|bytes| bytes as f64 / 1e6), 1);
        let writes = row.disk_writes.map_or_else(dash, |writes| writes.to_string());
        let tiers = match row.kind {
            "ledger" => [row.tiers.device, row.tiers.host, row.tiers.disk].map(|blocks| blocks.to_string()),
            _ => [dash(), dash(), dash()],
        };
        text += &format!(
            "{:<18} {:>9.4} {:>9} {:>9} {:>9} {moved:>12} {writes:>10} {:>8} {:>12} {:>7}\n",
            row.policy,
            row.hit_ratio,
            tiers[0],
            tiers[1],
            tiers[2],
            of(row.refs_per_second.map(|refs| refs / 1e6), 2),
            of(row.metadata_bytes_per_block, 1),
            of(row.gap_closed, 3),
        );
    }
    text
}
