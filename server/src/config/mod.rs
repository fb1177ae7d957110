//! Settings of the daemon: flags, then environment, then `kvbm.toml`, then defaults.
//!
//! Every setting is one row of [`settings::SETTINGS`]: its names in each source, its range, its default and its help.
//! Everything is parsed and checked before any socket is bound; a value that cannot be used is one line that names the
//! setting as it was written, the value and what is permitted.

mod foreign;
mod load;
pub(crate) mod memory;
mod nearest;
mod quotas;
mod setting;
mod settings;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvbm::disk_io::IoKind;
use kvbm::ledger::Millis;
use kvbm::{
    AdmissionRules, DiskCapacity, DiskTierConfig, HostCapacity, ManagerConfig, MapShared, PolicyKind, Quotas,
};

pub use load::{ConfigError, Environment, Loaded, Source, load};
pub use setting::Setting;
pub use settings::SETTINGS;

/// The checked settings. See [`SETTINGS`] for names, ranges and defaults.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the table of settings documents each")]
pub struct Config {
    pub state_dir: PathBuf,
    pub socket: PathBuf,
    pub holder: Option<PathBuf>,
    pub cpu_cache_gb: f64,
    pub cpu_cache_blocks: Option<u64>,
    pub host_offload_prefix_min_priority: u64,
    pub disk_cache_gb: f64,
    pub disk_cache_blocks: Option<u64>,
    pub disk_cache_dir: Vec<PathBuf>,
    pub disk_io: String,
    pub disk_disable_o_direct: bool,
    pub disk_zerofill_fallback: bool,
    pub disable_disk_offload_filter: bool,
    pub disk_priority_min: u64,
    pub disk_write_budget_gb_per_day: f64,
    pub disk_idle_ms: u64,
    pub disk_deadline_ms: u64,
    pub disk_scrub_mb_per_s: u64,
    pub reset_disk: bool,
    pub metrics: bool,
    pub metrics_host: IpAddr,
    pub metrics_port: u64,
    pub grpc_listen: Option<SocketAddr>,
    pub grpc_tls_cert: Option<PathBuf>,
    pub grpc_tls_key: Option<PathBuf>,
    pub grpc_tls_client_ca: Option<PathBuf>,
    pub grpc_token_file: Option<PathBuf>,
    pub announce: Option<String>,
    pub announce_url: Option<String>,
    pub events: Option<String>,
    pub events_credentials: Option<PathBuf>,
    pub record: Option<PathBuf>,
    pub record_max_gb: f64,
    pub admin_token_file: Option<PathBuf>,
    pub init_timeout_secs: u64,
    pub queue_depth: u64,
    pub batch_blocks: u64,
    pub lease_ms: u64,
    /// How long a block waits for the shards of other ranks, milliseconds.
    pub shard_wait_ms: u64,
    /// How long blocks are copied out of the memory of a dead engine, milliseconds.
    pub rescue_ms: u64,
    pub orphan_pools_max: u64,
    pub orphan_pool_ttl_secs: u64,
    pub events_kept: u64,
    pub what_if_window_secs: u64,
    pub eviction_policy: String,
    pub pin_budget_gb: f64,
    pub tenants: Quotas,
    pub sessions_max: u64,
    pub session_queue_depth: u64,
    pub session_stall_ms: u64,
    pub bind_timeout_ms: u64,
    pub allowed_uids: Vec<u32>,
    /// By how much copies in the background may make decode steps longer, percent.
    pub gpu_slowdown_percent: f64,
    pub copy_delay_us: u64,
    pub log: String,
    pub log_json: bool,
}

impl Config {
    /// Nothing is valid about it until each row of the table was written into it.
    fn blank() -> Self {
        Self {
            state_dir: PathBuf::new(),
            socket: PathBuf::new(),
            holder: None,
            cpu_cache_gb: 0.0,
            cpu_cache_blocks: None,
            host_offload_prefix_min_priority: 0,
            disk_cache_gb: 0.0,
            disk_cache_blocks: None,
            disk_cache_dir: Vec::new(),
            disk_io: String::new(),
            disk_disable_o_direct: false,
            disk_zerofill_fallback: false,
            disable_disk_offload_filter: false,
            disk_priority_min: 0,
            disk_write_budget_gb_per_day: 0.0,
            disk_idle_ms: 0,
            disk_deadline_ms: 0,
            disk_scrub_mb_per_s: 0,
            reset_disk: false,
            metrics: false,
            metrics_host: IpAddr::V4(Ipv4Addr::LOCALHOST),
            metrics_port: 0,
            grpc_listen: None,
            grpc_tls_cert: None,
            grpc_tls_key: None,
            grpc_tls_client_ca: None,
            grpc_token_file: None,
            announce: None,
            announce_url: None,
            events: None,
            events_credentials: None,
            record: None,
            record_max_gb: 0.0,
            admin_token_file: None,
            init_timeout_secs: 0,
            queue_depth: 0,
            batch_blocks: 0,
            lease_ms: 0,
            shard_wait_ms: 0,
            rescue_ms: 0,
            orphan_pools_max: 0,
            orphan_pool_ttl_secs: 0,
            events_kept: 0,
            what_if_window_secs: 0,
            eviction_policy: String::new(),
            pin_budget_gb: 0.0,
            tenants: Quotas::default(),
            sessions_max: 0,
            session_queue_depth: 0,
            session_stall_ms: 0,
            bind_timeout_ms: 0,
            allowed_uids: Vec::new(),
            gpu_slowdown_percent: 0.0,
            copy_delay_us: 0,
            log: String::new(),
            log_json: false,
        }
    }

    /// Host memory asked for, bytes; what a number of blocks needs is known only when their size is.
    pub fn cpu_cache_bytes(&self) -> u64 {
        gigabytes(self.cpu_cache_gb)
    }

    /// Size at which a recorded trace is full, bytes.
    pub fn record_max_bytes(&self) -> u64 {
        gigabytes(self.record_max_gb)
    }

    /// What pins of one namespace may keep, bytes.
    pub fn pin_budget_bytes(&self) -> u64 {
        gigabytes(self.pin_budget_gb)
    }

    /// Which block goes first among those of equal right.
    fn policy(&self) -> PolicyKind {
        self.eviction_policy.parse().expect("the table of settings permits no other")
    }

    /// Where the admin HTTP server should listen; the port may turn out to be busy.
    pub fn metrics_address(&self) -> SocketAddr {
        let port = u16::try_from(self.metrics_port).expect("the table of settings bounds it");
        SocketAddr::new(self.metrics_host, port)
    }

    /// What the block manager is told. `secret` spreads keys over buckets: a random number.
    pub(crate) fn manager(&self, secret: u64) -> ManagerConfig {
        let bounded = |value: u64| usize::try_from(value).expect("the table of settings bounds it");
        let blocks = self.cpu_cache_blocks.map(|blocks| u32::try_from(blocks).expect("as above"));
        ManagerConfig {
            host: blocks.map_or(HostCapacity::Bytes(self.cpu_cache_bytes()), HostCapacity::Blocks),
            gpu_nodes: Vec::new(),
            disk: self.disk(),
            queue_depth: bounded(self.queue_depth),
            batch_blocks: bounded(self.batch_blocks),
            lease: Duration::from_millis(self.lease_ms),
            shard_wait: Duration::from_millis(self.shard_wait_ms),
            one_domain: self.allowed_uids.is_empty(),
            rescue: Duration::from_millis(self.rescue_ms),
            exports: Arc::new(MapShared),
            orphan_pools_max: bounded(self.orphan_pools_max),
            orphan_pool_ttl: Duration::from_secs(self.orphan_pool_ttl_secs),
            offload_priority_min: u8::try_from(self.host_offload_prefix_min_priority).expect("as above"),
            events_kept: bounded(self.events_kept),
            what_if_window: Duration::from_secs(self.what_if_window_secs),
            policy: self.policy(),
            quotas: self.tenants.clone(),
            pin_budget_bytes: self.pin_budget_bytes(),
            copy_delay: Duration::from_micros(self.copy_delay_us),
            secret,
        }
    }

    /// What the disk tier is to be; `None`: there is to be none.
    fn disk(&self) -> Option<DiskTierConfig> {
        let capacity = match self.disk_cache_blocks {
            Some(blocks) => {
                DiskCapacity::Blocks(u32::try_from(blocks).expect("the table of settings bounds it"))
            }
            None => DiskCapacity::Bytes(gigabytes(self.disk_cache_gb)),
        };
        if capacity.is_zero() {
            return None;
        }
        let mut disk = DiskTierConfig::new(self.disk_cache_dir.clone(), capacity);
        disk.direct = !self.disk_disable_o_direct;
        disk.zerofill = self.disk_zerofill_fallback;
        disk.reset = self.reset_disk;
        disk.io.deadline = Duration::from_millis(self.disk_deadline_ms);
        disk.io.kind = match self.disk_io.as_str() {
            "io_uring" => IoKind::Uring,
            "pread" => IoKind::Pread,
            _ => IoKind::Auto,
        };
        disk.scrub_bytes_per_second = self.disk_scrub_mb_per_s * 1_000_000;
        disk.rules.idle = Millis(self.disk_idle_ms);
        disk.rules.admission = AdmissionRules {
            frequency_filter: !self.disable_disk_offload_filter,
            priority_min: u8::try_from(self.disk_priority_min).expect("the table of settings bounds it"),
            bytes_per_day: Some(gigabytes(self.disk_write_budget_gb_per_day)).filter(|bytes| *bytes > 0),
        };
        Some(disk)
    }

    /// The side channel's path: the socket's with `.fd` behind it.
    pub fn side_socket(&self) -> PathBuf {
        with_suffix(&self.socket, ".fd")
    }

    /// Held while a daemon lives at this socket.
    pub(crate) fn socket_lock(&self) -> PathBuf {
        with_suffix(&self.socket, ".lock")
    }
}

fn with_suffix(path: &std::path::Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// 1 GB is 10^9 bytes.
fn gigabytes(value: f64) -> u64 {
    (value * 1e9).round() as u64
}

#[cfg(test)]
mod tests;
