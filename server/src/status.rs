//! The document of `kvbm status --json`, and the table that people read.
//!
//! Others script against it: fields are added, never renamed; `schema` changes only when an old reader would
//! misunderstand.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

/// Value of [`Status::schema`].
pub const SCHEMA: u32 = 1;

/// What the daemon holds and for whom.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct Status {
    pub schema: u32,
    pub daemon: DaemonStatus,
    pub tiers: Vec<TierStatus>,
    pub pools: Vec<PoolStatus>,
    /// Pools that engines own.
    #[serde(default)]
    pub engine_pools: Vec<EnginePoolStatus>,
    pub layouts: Vec<LayoutStatus>,
    pub namespaces: Vec<NamespaceStatus>,
    pub sessions: Vec<SessionStatus>,
    pub leases: u64,
    pub transfers_in_flight: u64,
    pub workers: Vec<WorkerStatus>,
    /// What is found, and what other capacities would find; empty when that is turned off, or no tier is on.
    #[serde(default)]
    pub what_if: Vec<WhatIfStatus>,
    /// What tenants have, one entry for each tier; those without a quota are one, under no name.
    #[serde(default)]
    pub tenants: Vec<TenantStatus>,
    /// What operators keep.
    #[serde(default)]
    pub pins: Vec<PinStatus>,
    /// GPUs that this daemon may use.
    #[serde(default)]
    pub gpus: Vec<GpuStatus>,
}

/// The process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct DaemonStatus {
    pub version: String,
    pub pid: u32,
    pub uptime_s: f64,
    pub socket: String,
    /// Base URL of the admin HTTP server.
    pub admin: String,
    /// URL of gRPC over TCP; `null` when that is off.
    #[serde(default)]
    pub grpc: Option<String>,
    pub ready: bool,
    /// Why it is not ready.
    pub reasons: Vec<String>,
}

/// One tier.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct TierStatus {
    pub tier: String,
    /// `on`, `off`, `populating` (host), `opening` or `out` (of service; disk).
    pub state: String,
    /// Why it is in that state; empty when it is on.
    pub reason: String,
    pub capacity_bytes: u64,
    pub used_bytes: u64,
    pub slots: SlotStatus,
    pub evictions: u64,
}

/// Slots by state. Pinned and quarantined ones are also counted in the state they are in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct SlotStatus {
    pub free: u64,
    pub filling: u64,
    pub resident: u64,
    pub pinned: u64,
    pub quarantined: u64,
}

/// One device pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct PoolStatus {
    pub id: u32,
    /// The session that writes it; `null` while a pool of a dead worker waits for a successor.
    pub session: Option<u64>,
    pub device: String,
    pub mode: String,
    pub epoch: u64,
    pub slots: SlotStatus,
    /// `attached`, `silent`, `orphan` or `retired`.
    pub state: String,
    pub block_bytes: u64,
}

/// One pool that an engine owns: one rank of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct EnginePoolStatus {
    pub id: u32,
    /// The session that has it; `null` when its process is dead.
    pub session: Option<u64>,
    /// The engine, 32 hexadecimal digits: its ranks have the same.
    pub engine: String,
    pub rank: u32,
    pub rank_count: u32,
    pub shard: u32,
    pub shard_count: u32,
    pub device: String,
    /// `ipc` or `staged`.
    pub mode: String,
    /// `attached`, `silent`, `former` (opened anew), `rescue` (its process is dead) or `retired`.
    pub state: String,
    /// Bytes of this rank's part of a block.
    pub block_bytes: u64,
    pub blocks: u64,
    /// Complete blocks that are known and not in host memory.
    pub registered: u64,
    /// Host slots that its process is writing.
    pub writing: u64,
}

/// Host segments of one slot size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct LayoutStatus {
    pub slot_bytes: u64,
    pub segments: u64,
}

/// One namespace.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct NamespaceStatus {
    pub id: u32,
    pub tenant: String,
    pub model: String,
    /// By tier.
    pub resident_bytes: BTreeMap<String, u64>,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct SessionStatus {
    pub id: u64,
    /// Process, by the kernel's word; `null` before the side channel is bound.
    pub pid: Option<u32>,
    pub uid: u32,
    /// As it introduced itself.
    pub client: String,
    /// `attaching`, `attached` or `silent`.
    pub state: String,
    pub age_s: f64,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct WorkerStatus {
    pub id: String,
    pub pid: u32,
    pub model: String,
    pub role: String,
    pub state: String,
    pub session: u64,
    pub endpoint: String,
}

/// What one tenant has in one tier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct TenantStatus {
    /// Empty: all tenants without a quota.
    pub tenant: String,
    pub tier: String,
    pub used_bytes: u64,
    pub min_bytes: u64,
    /// `null`: no limit.
    pub max_bytes: Option<u64>,
    /// Blocks that found no place because of quotas.
    pub refused: u64,
    pub evicted: u64,
}

/// One pin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct PinStatus {
    pub id: u64,
    pub namespace: u32,
    pub blocks: u64,
    pub bytes: u64,
    pub remaining_s: f64,
}

/// One GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct GpuStatus {
    /// As the vendor's tools print it: `GPU-...`.
    pub uuid: String,
    pub name: String,
    pub pci_bus_id: String,
    /// Host memory that is closest; `null` where there is only one kind.
    pub numa_node: Option<u32>,
    pub memory_bytes: u64,
    /// Nobody's now; `null` where it is not known, as while no engine needed the GPU.
    #[serde(default)]
    pub memory_free_bytes: Option<u64>,
    /// `idle` (no engine needed it yet), `on` or `out` (of service).
    pub state: String,
    /// Why it is out of service.
    pub reason: String,
    pub onboard_bytes: u64,
    pub offload_bytes: u64,
    pub onboard_batches: u64,
    pub offload_batches: u64,
    pub failed_batches: u64,
    /// Time during which something was being copied that way.
    pub onboard_busy_s: f64,
    pub offload_busy_s: f64,
    /// Host memory that copies find registered, once for all GPUs; the rest is when it is first used.
    #[serde(default)]
    pub host_registered_bytes: u64,
    /// Rate of copies in the background while the engine decodes; `null` while they go as fast as they can.
    pub paced_bytes_per_second: Option<u64>,
}

/// What requests find down to one tier, and would find.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each field is named as it is shown")]
pub struct WhatIfStatus {
    /// `host`: on the device or in host memory; `disk`: anywhere.
    pub tier: String,
    pub capacity_bytes: u64,
    /// How far back the figures look.
    pub window_s: f64,
    /// Blocks asked for in that time; 0: the rates say nothing.
    pub blocks: u64,
    /// Share that was found, 0..=1.
    pub hit_rate: f64,
    /// Share that would have been found by least recently used, by capacity: `0.5`, `1`, `2` and `4` times that of
    /// now, and `inf`.
    pub estimates: BTreeMap<String, f64>,
    /// Share of keys that the estimates look at, 0..=1.
    pub sampled: f64,
}

impl WhatIfStatus {
    /// One line, without its end.
    fn sentence(&self) -> String {
        let Self { tier, window_s, .. } = self;
        if self.blocks == 0 {
            return format!("{tier}: nothing was asked for in the last {window_s:.0} s");
        }
        let percent = |rate: f64| format!("{:.0} %", rate * 100.0);
        let at = |key: &str| self.estimates.get(key).copied().map_or_else(|| "?".to_owned(), percent);
        format!(
            "{tier}: {} now; 2 x {} would give {}, 4 x {}, half {}, all {}",
            percent(self.hit_rate),
            bytes(self.capacity_bytes),
            at("2"),
            at("4"),
            at("0.5"),
            at("inf")
        )
    }
}

/// The status for people: a few short tables.
pub fn render(status: &Status) -> String {
    let daemon = &status.daemon;
    let ready =
        if daemon.ready { "ready".to_owned() } else { format!("not ready: {}", daemon.reasons.join("; ")) };
    let mut text = format!(
        "kvbm {}  pid {}  up {:.0} s  {ready}\nsocket {}\nadmin  {}\n",
        daemon.version, daemon.pid, daemon.uptime_s, daemon.socket, daemon.admin
    );
    if let Some(grpc) = &daemon.grpc {
        let _ = writeln!(text, "grpc   {grpc}");
    }
    let _ = writeln!(text, "leases {}  transfers in flight {}", status.leases, status.transfers_in_flight);
    let slots = |slots: &SlotStatus| {
        [slots.free, slots.filling, slots.resident, slots.pinned, slots.quarantined]
            .map(|count| count.to_string())
    };
    let mut tiers = Table::new("tiers", &["tier", "state", "capacity", "used"], SLOTS);
    for tier in &status.tiers {
        let state = if tier.reason.is_empty() {
            tier.state.clone()
        } else {
            format!("{} ({})", tier.state, tier.reason)
        };
        tiers.row(
            [tier.tier.clone(), state, bytes(tier.capacity_bytes), bytes(tier.used_bytes)],
            slots(&tier.slots),
        );
    }
    tiers.print(&mut text);
    if !status.what_if.is_empty() {
        text.push_str("\nhit rate by capacity\n");
        status.what_if.iter().for_each(|tier| {
            let _ = writeln!(text, "{}", tier.sentence());
        });
    }
    let mut pools =
        Table::new("pools", &["pool", "session", "device", "mode", "state", "epoch", "block"], SLOTS);
    for pool in &status.pools {
        let session = pool.session.map_or_else(|| "-".to_owned(), |id| id.to_string());
        let cells = [pool.device.clone(), pool.mode.clone(), pool.state.clone(), pool.epoch.to_string()];
        let cells = [pool.id.to_string(), session].into_iter().chain(cells).chain([bytes(pool.block_bytes)]);
        pools.row(cells, slots(&pool.slots));
    }
    pools.print(&mut text);
    print_engine_pools(&status.engine_pools, &mut text);
    let mut layouts = Table::new("layouts", &["slot", "segments"], &[]);
    for layout in &status.layouts {
        layouts.row([bytes(layout.slot_bytes), layout.segments.to_string()], []);
    }
    layouts.print(&mut text);
    let mut namespaces = Table::new("namespaces", &["namespace", "tenant", "model", "resident"], &[]);
    for namespace in &status.namespaces {
        let resident = namespace.resident_bytes.iter().filter(|(_, count)| **count > 0);
        let resident = resident.map(|(tier, count)| format!("{tier} {}", bytes(*count))).collect::<Vec<_>>();
        let labels = [namespace.id.to_string(), namespace.tenant.clone(), namespace.model.clone()];
        namespaces.row(labels, [resident.join(", ")]);
    }
    namespaces.print(&mut text);
    let mut gpus = Table::new("gpus", &["gpu", "name", "node", "memory", "state", "onboard", "offload"], &[]);
    for gpu in &status.gpus {
        let state =
            if gpu.reason.is_empty() { gpu.state.clone() } else { format!("{} ({})", gpu.state, gpu.reason) };
        let node = gpu.numa_node.map_or_else(|| "-".to_owned(), |node| node.to_string());
        let what = [gpu.uuid.clone(), gpu.name.clone(), node, bytes(gpu.memory_bytes), state];
        gpus.row(what, [bytes(gpu.onboard_bytes), bytes(gpu.offload_bytes)]);
    }
    gpus.print_if_any(&mut text);
    let mut tenants =
        Table::new("tenants", &["tenant", "tier", "used", "min", "max", "refused", "evicted"], &[]);
    // Those without a quota, and nothing else, are no news.
    for tenant in status.tenants.iter().filter(|_| status.tenants.iter().any(|any| !any.tenant.is_empty())) {
        let name = if tenant.tenant.is_empty() { "(others)".to_owned() } else { tenant.tenant.clone() };
        let limit = |limit: Option<u64>| limit.map_or_else(|| "-".to_owned(), bytes);
        let quota = [limit(Some(tenant.min_bytes).filter(|min| *min > 0)), limit(tenant.max_bytes)];
        let counts = [tenant.refused.to_string(), tenant.evicted.to_string()];
        let cells = [name, tenant.tier.clone(), bytes(tenant.used_bytes)];
        tenants.row(cells, quota.into_iter().chain(counts));
    }
    tenants.print_if_any(&mut text);
    print_pins(&status.pins, &mut text);
    let mut sessions = Table::new("sessions", &["session", "pid", "uid", "state", "age", "client"], &[]);
    for session in &status.sessions {
        let pid = session.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let who = [session.id.to_string(), pid, session.uid.to_string()];
        sessions.row(who, [session.state.clone(), format!("{:.0} s", session.age_s), session.client.clone()]);
    }
    sessions.print(&mut text);
    let mut workers = Table::new("workers", &["worker", "pid", "model", "role", "state", "endpoint"], &[]);
    for worker in &status.workers {
        let who = [worker.id.clone(), worker.pid.to_string(), worker.model.clone()];
        workers.row(who, [worker.role.clone(), worker.state.clone(), worker.endpoint.clone()]);
    }
    workers.print(&mut text);
    text
}

fn print_engine_pools(pools: &[EnginePoolStatus], text: &mut String) {
    let mut table = Table::new(
        "engine pools",
        &["pool", "session", "engine", "rank", "shard", "device", "mode", "state"],
        &["block", "blocks", "registered", "writing"],
    );
    for pool in pools {
        let session = pool.session.map_or_else(|| "-".to_owned(), |id| id.to_string());
        let of = |n: u32, count: u32| format!("{n} of {count}");
        let ids = [pool.id.to_string(), session, pool.engine.chars().take(8).collect()];
        let place = [of(pool.rank, pool.rank_count), of(pool.shard, pool.shard_count), pool.device.clone()];
        let kind = [pool.mode.clone(), pool.state.clone(), bytes(pool.block_bytes)];
        let counts = [pool.blocks, pool.registered, pool.writing].map(|count| count.to_string());
        table.row(ids.into_iter().chain(place).chain(kind), counts);
    }
    table.print_if_any(text);
}

/// The pins for people, nothing if there are none.
pub fn render_pins(pins: &[PinStatus]) -> String {
    let mut text = String::new();
    print_pins(pins, &mut text);
    text
}

fn print_pins(pins: &[PinStatus], text: &mut String) {
    let mut table = Table::new("pins", &["pin", "namespace", "blocks", "bytes", "remaining"], &[]);
    for pin in pins {
        let ids = [pin.id.to_string(), pin.namespace.to_string()];
        let remaining = format!("{:.0} s", pin.remaining_s);
        table.row(ids, [pin.blocks.to_string(), bytes(pin.bytes), remaining]);
    }
    table.print_if_any(text);
}

const SLOTS: &[&str] = &["free", "filling", "resident", "pinned", "quarantined"];

/// Left-aligned columns under a title.
struct Table {
    title: &'static str,
    rows: Vec<Vec<String>>,
}

impl Table {
    fn new(title: &'static str, columns: &[&str], more: &[&str]) -> Self {
        let header = columns.iter().chain(more).map(|name| (*name).to_owned()).collect();
        Self { title, rows: vec![header] }
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>, more: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().chain(more).collect());
    }

    fn print_if_any(&self, text: &mut String) {
        if self.rows.len() > 1 {
            self.print(text);
        }
    }

    fn print(&self, text: &mut String) {
        if self.rows.len() == 1 {
            let _ = writeln!(text, "\n{}: none", self.title);
            return;
        }
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.rows[0].len()).map(width).collect();
        text.push('\n');
        for row in &self.rows {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
            let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        }
    }
}

/// Decimal units, as everywhere.
fn bytes(count: u64) -> String {
    match count {
        0..1_000 => format!("{count} B"),
        1_000..1_000_000 => format!("{:.1} kB", count as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", count as f64 / 1e6),
        _ => format!("{:.2} GB", count as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests;
