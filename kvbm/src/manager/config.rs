//! Settings of a manager.

use std::sync::Arc;
use std::time::Duration;

use super::DiskTierConfig;
use crate::ledger::{PolicyKind, Quotas};
use crate::store::{MapExports, MapShared};

/// How much host memory the cache gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCapacity {
    /// So many bytes.
    Bytes(u64),
    /// So many blocks of the first layout that attaches.
    Blocks(u32),
}

/// Bytes that pins of one namespace may hold, if nothing else is said.
pub const PIN_BUDGET_BYTES: u64 = 1_000_000_000;

/// Settings of a manager.
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// Size of the host tier; 0 turns it off.
    pub host: HostCapacity,
    /// Node of the machine's memory that each GPU is closest to, where the machine has several; host memory is spread over
    /// them.
    pub gpu_nodes: Vec<u32>,
    /// The disk tier, if there is to be one.
    pub disk: Option<DiskTierConfig>,
    /// Batches that may wait per route, at least 1.
    pub queue_depth: usize,
    /// Blocks in one batch, 1..=256.
    pub batch_blocks: usize,
    /// How long an unused lease lives.
    pub lease: Duration,
    /// Pools of dead workers kept for a successor, at most.
    pub orphan_pools_max: usize,
    /// How long such a pool is kept.
    pub orphan_pool_ttl: Duration,
    /// Only blocks of this retention priority or more go to host, and only behind a prefix that does. 0..=100.
    pub offload_priority_min: u8,
    /// Events kept for watchers.
    pub events_kept: usize,
    /// How far back [`crate::Manager::what_if`] looks; zero turns it off.
    pub what_if_window: Duration,
    /// Which block goes first among those of equal right.
    pub policy: PolicyKind,
    /// What tenants may have.
    pub quotas: Quotas,
    /// Bytes that pins of one namespace may hold.
    pub pin_budget_bytes: u64,
    /// How long blocks are copied out of the pool of a dead engine.
    pub rescue: Duration,
    /// How long a block waits for shards that nobody has begun to copy.
    pub shard_wait: Duration,
    /// Sessions are of one trust domain only: engines are given host segments before anything is in them.
    pub one_domain: bool,
    /// Maps the memory of engines that own theirs.
    pub exports: Arc<dyn MapExports>,
    /// Waits so long after each copied block. For drills that must hit a copy in flight; zero otherwise.
    pub copy_delay: Duration,
    /// Spreads keys over buckets; a random number.
    pub secret: u64,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            host: HostCapacity::Bytes(0),
            gpu_nodes: Vec::new(),
            disk: None,
            queue_depth: 64,
            batch_blocks: 128,
            lease: Duration::from_secs(30),
            orphan_pools_max: 4,
            orphan_pool_ttl: Duration::from_secs(600),
            offload_priority_min: 0,
            events_kept: 1 << 16,
            what_if_window: Duration::from_secs(3600),
            policy: PolicyKind::default(),
            quotas: Quotas::default(),
            pin_budget_bytes: PIN_BUDGET_BYTES,
            rescue: Duration::from_secs(3),
            shard_wait: Duration::from_secs(10),
            one_domain: false,
            exports: Arc::new(MapShared),
            copy_delay: Duration::ZERO,
            secret: 0x5DEE_CE66_D1CE_4E5B,
        }
    }
}
