//! The table of settings: the one place where a setting is named, bounded, defaulted and explained.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use kvbm::{PolicyKind, Quotas};
use tracing_subscriber::EnvFilter;

use super::{Config, quotas};

/// One setting. Its flag is `--` and the key with dashes; of `tenants`, `--tenant-quota`.
#[derive(Debug)]
pub struct Setting {
    /// Key in `kvbm.toml`.
    pub key: &'static str,
    /// Variables, the first that is set counts.
    pub env: &'static [&'static str],
    pub(super) default: Default,
    pub(super) kind: Kind,
    /// What it does, one sentence.
    pub help: &'static str,
}

/// What holds when no source says otherwise.
#[derive(Debug)]
pub(super) enum Default {
    /// This, as the user would write it.
    Text(&'static str),
    /// `$XDG_STATE_HOME/kvbm`, else `~/.local/state/kvbm`.
    StateHome,
    /// A file of the state directory.
    InStateDir(&'static str),
    /// Nothing.
    Unset,
}

/// How it is read and where it goes.
#[derive(Debug)]
pub(super) enum Kind {
    Number {
        range: RangeInclusive<f64>,
        field: fn(&mut Config) -> &mut f64,
    },
    Count {
        range: RangeInclusive<u64>,
        field: fn(&mut Config) -> &mut u64,
    },
    OptionalCount {
        range: RangeInclusive<u64>,
        field: fn(&mut Config) -> &mut Option<u64>,
    },
    Switch {
        field: fn(&mut Config) -> &mut bool,
    },
    Path {
        bytes_max: usize,
        field: fn(&mut Config) -> &mut PathBuf,
    },
    Paths {
        count_max: usize,
        bytes_max: usize,
        field: fn(&mut Config) -> &mut Vec<PathBuf>,
    },
    Choice {
        words: &'static [&'static str],
        field: fn(&mut Config) -> &mut String,
    },
    OptionalPath {
        bytes_max: usize,
        field: fn(&mut Config) -> &mut Option<PathBuf>,
    },
    Address {
        field: fn(&mut Config) -> &mut IpAddr,
    },
    OptionalText {
        form: &'static str,
        is_form: fn(&str) -> bool,
        field: fn(&mut Config) -> &mut Option<String>,
    },
    OptionalListen {
        field: fn(&mut Config) -> &mut Option<SocketAddr>,
    },
    Users {
        field: fn(&mut Config) -> &mut Vec<u32>,
    },
    Policy {
        field: fn(&mut Config) -> &mut String,
    },
    Quotas {
        field: fn(&mut Config) -> &mut Quotas,
    },
    Filter {
        field: fn(&mut Config) -> &mut String,
    },
}

/// The kernel takes no longer ones.
const PATH_BYTES_MAX: usize = 4095;

fn policy_names() -> impl Iterator<Item = &'static str> {
    PolicyKind::ALL.into_iter().map(PolicyKind::name)
}

/// Rows are resolved in this order; a default may refer to rows above it.
pub static SETTINGS: &[Setting] = &[
    Setting {
        key: "state_dir",
        env: &["KVBM_STATE_DIR"],
        default: Default::StateHome,
        kind: Kind::Path { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.state_dir },
        help: "Directory of everything the daemon keeps",
    },
    Setting {
        key: "socket",
        env: &["KVBM_SOCKET"],
        default: Default::InStateDir("kvbm.sock"),
        // sun_path has 108 bytes, and the longest name beside the socket adds ".lock" (a file) or ".fd" (a socket).
        kind: Kind::Path { bytes_max: 104, field: |c| &mut c.socket },
        help: "Unix socket of the daemon; the side channel is beside it with .fd behind its name",
    },
    Setting {
        key: "holder",
        env: &["KVBM_HOLDER"],
        default: Default::Unset,
        // All that sun_path has room for.
        kind: Kind::OptionalPath { bytes_max: 107, field: |c| &mut c.holder },
        help: "Unix socket of `kvbm hold`, which keeps host memory warm while no daemon runs; empty turns that off",
    },
    Setting {
        key: "cpu_cache_gb",
        env: &["DYN_KVBM_CPU_CACHE_GB"],
        default: Default::Text("1"),
        kind: Kind::Number { range: 0.0..=65536.0, field: |c| &mut c.cpu_cache_gb },
        help: "Host memory for KV blocks, GB of 10^9 bytes; 0 turns the host tier off",
    },
    Setting {
        key: "cpu_cache_blocks",
        env: &["DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS"],
        default: Default::Unset,
        kind: Kind::OptionalCount { range: 0..=u32::MAX as u64, field: |c| &mut c.cpu_cache_blocks },
        help: "Host memory for that many blocks of the first pool's size; wins over cpu_cache_gb",
    },
    Setting {
        key: "host_offload_prefix_min_priority",
        env: &["DYN_KVBM_HOST_OFFLOAD_PREFIX_MIN_PRIORITY"],
        default: Default::Text("0"),
        kind: Kind::Count { range: 0..=100, field: |c| &mut c.host_offload_prefix_min_priority },
        help: "A prompt goes to host memory up to its first block below this retention priority; 0 is off",
    },
    Setting {
        key: "disk_cache_gb",
        env: &["DYN_KVBM_DISK_CACHE_GB"],
        default: Default::Text("0"),
        kind: Kind::Number { range: 0.0..=1_048_576.0, field: |c| &mut c.disk_cache_gb },
        help: "Disk space for KV blocks, GB of 10^9 bytes, in all directories together; 0 turns the disk tier off",
    },
    Setting {
        key: "disk_cache_blocks",
        env: &["DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS"],
        default: Default::Unset,
        kind: Kind::OptionalCount { range: 0..=u32::MAX as u64, field: |c| &mut c.disk_cache_blocks },
        help: "Disk space for that many blocks of the first pool's size; wins over disk_cache_gb",
    },
    Setting {
        key: "disk_cache_dir",
        env: &["DYN_KVBM_DISK_CACHE_DIR"],
        default: Default::InStateDir("disk"),
        kind: Kind::Paths { count_max: 64, bytes_max: 4095, field: |c| &mut c.disk_cache_dir },
        help: "Directories of the disk tier, separated by commas, one per drive: blocks are striped over them",
    },
    Setting {
        key: "disk_io",
        env: &["KVBM_DISK_IO"],
        default: Default::Text("auto"),
        kind: Kind::Choice { words: &["auto", "io_uring", "pread"], field: |c| &mut c.disk_io },
        help: "How the disk is read and written; auto is io_uring where the kernel permits it, else a few threads",
    },
    Setting {
        key: "disk_disable_o_direct",
        env: &["DYN_KVBM_DISK_DISABLE_O_DIRECT"],
        default: Default::Text("false"),
        kind: Kind::Switch { field: |c| &mut c.disk_disable_o_direct },
        help: "Go through the page cache, for file systems on which O_DIRECT misbehaves",
    },
    Setting {
        key: "disk_zerofill_fallback",
        env: &["DYN_KVBM_DISK_ZEROFILL_FALLBACK"],
        default: Default::Text("false"),
        kind: Kind::Switch { field: |c| &mut c.disk_zerofill_fallback },
        help: "Write zeros to reserve space where the file system has no fallocate",
    },
    Setting {
        key: "disable_disk_offload_filter",
        env: &["DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER"],
        default: Default::Text("false"),
        kind: Kind::Switch { field: |c| &mut c.disable_disk_offload_filter },
        help: "Write every block to disk, not only those that were used twice; wears drives out",
    },
    Setting {
        key: "disk_priority_min",
        env: &["KVBM_DISK_PRIORITY_MIN"],
        default: Default::Text("0"),
        kind: Kind::Count { range: 0..=100, field: |c| &mut c.disk_priority_min },
        help: "Only blocks of this retention priority or more are written to disk",
    },
    Setting {
        key: "disk_write_budget_gb_per_day",
        env: &["KVBM_DISK_WRITE_BUDGET_GB_PER_DAY"],
        default: Default::Text("0"),
        kind: Kind::Number { range: 0.0..=10_000_000.0, field: |c| &mut c.disk_write_budget_gb_per_day },
        help: "GB of 10^9 bytes that are written to disk per day at most; 0 is no limit",
    },
    Setting {
        key: "disk_idle_ms",
        env: &["KVBM_DISK_IDLE_MS"],
        default: Default::Text("1000"),
        kind: Kind::Count { range: 0..=600_000, field: |c| &mut c.disk_idle_ms },
        help: "Blocks are written when nothing was read from disk for so long, or host memory is 80 % full, milliseconds",
    },
    Setting {
        key: "disk_deadline_ms",
        env: &["KVBM_DISK_DEADLINE_MS"],
        default: Default::Text("5000"),
        kind: Kind::Count { range: 10..=600_000, field: |c| &mut c.disk_deadline_ms },
        help: "A drive that does not answer a request for so long is out of service until it does, milliseconds",
    },
    Setting {
        key: "disk_scrub_mb_per_s",
        env: &["KVBM_DISK_SCRUB_MB_PER_S"],
        default: Default::Text("16"),
        kind: Kind::Count { range: 0..=100_000, field: |c| &mut c.disk_scrub_mb_per_s },
        help: "MB that are read from disk per second to find damage early; 0 turns it off",
    },
    Setting {
        key: "reset_disk",
        env: &["KVBM_RESET_DISK"],
        default: Default::Text("false"),
        kind: Kind::Switch { field: |c| &mut c.reset_disk },
        help: "Discard what is in the disk cache's files, whatever it is",
    },
    Setting {
        key: "metrics",
        env: &["DYN_KVBM_METRICS"],
        default: Default::Text("true"),
        kind: Kind::Switch { field: |c| &mut c.metrics },
        help: "Serve /metrics; health and status are served in any case",
    },
    Setting {
        key: "metrics_host",
        env: &["KVBM_METRICS_HOST"],
        default: Default::Text("127.0.0.1"),
        kind: Kind::Address { field: |c| &mut c.metrics_host },
        help: "Address of the admin HTTP server",
    },
    Setting {
        key: "metrics_port",
        env: &["DYN_KVBM_METRICS_PORT"],
        default: Default::Text("6880"),
        kind: Kind::Count { range: 0..=65535, field: |c| &mut c.metrics_port },
        help: "Port of the admin HTTP server; 0 is any free one, a busy one gives way to the next free one",
    },
    Setting {
        key: "grpc_listen",
        env: &["KVBM_GRPC_LISTEN"],
        default: Default::Unset,
        kind: Kind::OptionalListen { field: |c| &mut c.grpc_listen },
        help: "Serve the registry (workers, KV events, snapshots) over TCP here; port 0 is any free one",
    },
    Setting {
        key: "grpc_tls_cert",
        env: &["KVBM_GRPC_TLS_CERT"],
        default: Default::Unset,
        kind: Kind::OptionalPath { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.grpc_tls_cert },
        help: "PEM file with the certificate that is shown there, and those that lead to its authority",
    },
    Setting {
        key: "grpc_tls_key",
        env: &["KVBM_GRPC_TLS_KEY"],
        default: Default::Unset,
        kind: Kind::OptionalPath { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.grpc_tls_key },
        help: "PEM file with its private key",
    },
    Setting {
        key: "grpc_tls_client_ca",
        env: &["KVBM_GRPC_TLS_CLIENT_CA"],
        default: Default::Unset,
        kind: Kind::OptionalPath { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.grpc_tls_client_ca },
        help: "PEM file with the authorities one of which must have signed a client's certificate",
    },
    Setting {
        key: "grpc_token_file",
        env: &["KVBM_GRPC_TOKEN_FILE"],
        default: Default::Unset,
        kind: Kind::OptionalPath { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.grpc_token_file },
        help: "File with the token that each request over TCP must carry; only its owner may read it",
    },
    Setting {
        key: "announce",
        env: &["KVBM_ANNOUNCE"],
        default: Default::Unset,
        kind: Kind::OptionalText {
            form: "etcd://host:port, with further members behind commas, or etcds:// over TLS",
            is_form: |text| {
                let named = text.starts_with("etcd://") || text.starts_with("etcds://");
                named && kvbm_etcd::Etcd::parse(text).is_some()
            },
            field: |c| &mut c.announce,
        },
        help: "Tell frontends through etcd that the registry is served at grpc_listen",
    },
    Setting {
        key: "announce_url",
        env: &["KVBM_ANNOUNCE_URL"],
        default: Default::Unset,
        kind: Kind::OptionalText {
            form: "http://host:port or https://host:port",
            is_form: |text| {
                let authority = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
                let port = authority.and_then(|authority| authority.rsplit_once(':'));
                port.is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
            },
            field: |c| &mut c.announce_url,
        },
        help: "The URL under which others reach grpc_listen, if it is not its own",
    },
    Setting {
        key: "events",
        env: &["KVBM_EVENTS"],
        default: Default::Unset,
        kind: Kind::OptionalText {
            form: kvbm_nats::Nats::FORM,
            is_form: |text| kvbm_nats::Nats::parse(text).is_some(),
            field: |c| &mut c.events,
        },
        help: "Tell frontends through NATS JetStream, too, which blocks come and go",
    },
    Setting {
        key: "events_credentials",
        env: &["NATS_AUTH_CREDENTIALS_FILE"],
        default: Default::Unset,
        kind: Kind::OptionalPath { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.events_credentials },
        help: "File with the JWT and the seed that are shown to NATS, as `nsc` writes it; read when the daemon starts",
    },
    Setting {
        key: "record",
        env: &["KVBM_RECORD"],
        default: Default::Unset,
        kind: Kind::OptionalPath { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.record },
        help: "Record what engines look up and store, keys only, into this file, for `kvbm replay`",
    },
    Setting {
        key: "record_max_gb",
        env: &["KVBM_RECORD_MAX_GB"],
        default: Default::Text("1"),
        kind: Kind::Number { range: 0.000001..=65536.0, field: |c| &mut c.record_max_gb },
        help: "Size at which that file is full and nothing more is recorded, GB of 10^9 bytes",
    },
    Setting {
        key: "admin_token_file",
        env: &["KVBM_ADMIN_TOKEN_FILE"],
        default: Default::Unset,
        kind: Kind::OptionalPath { bytes_max: PATH_BYTES_MAX, field: |c| &mut c.admin_token_file },
        help: "File with the token that changes over admin HTTP must carry; only its owner may read it",
    },
    Setting {
        key: "init_timeout_secs",
        env: &["DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS"],
        default: Default::Text("30"),
        kind: Kind::Count { range: 0..=86_400, field: |c| &mut c.init_timeout_secs },
        help: "How long a worker waits for the daemon when it starts, seconds; workers read it",
    },
    Setting {
        key: "queue_depth",
        env: &["KVBM_QUEUE_DEPTH"],
        default: Default::Text("64"),
        kind: Kind::Count { range: 1..=65_536, field: |c| &mut c.queue_depth },
        help: "Batches waiting per copy route; full is answered with busy",
    },
    Setting {
        key: "batch_blocks",
        env: &["KVBM_BATCH_BLOCKS"],
        default: Default::Text("128"),
        kind: Kind::Count { range: 1..=256, field: |c| &mut c.batch_blocks },
        help: "Blocks in one batch of copies",
    },
    Setting {
        key: "lease_ms",
        env: &["KVBM_LEASE_MS"],
        default: Default::Text("30000"),
        kind: Kind::Count { range: 10..=3_600_000, field: |c| &mut c.lease_ms },
        help: "How long a match stays pinned when nothing is started on it, milliseconds",
    },
    Setting {
        key: "shard_wait_ms",
        env: &["KVBM_SHARD_WAIT_MS"],
        default: Default::Text("10000"),
        kind: Kind::Count { range: 10..=3_600_000, field: |c| &mut c.shard_wait_ms },
        help: "How long a block waits in host memory for the shards of other ranks, milliseconds",
    },
    Setting {
        key: "rescue_ms",
        env: &["KVBM_RESCUE_MS"],
        default: Default::Text("3000"),
        kind: Kind::Count { range: 0..=3_600_000, field: |c| &mut c.rescue_ms },
        help: "How long complete blocks are copied out of the memory of a dead engine, milliseconds",
    },
    Setting {
        key: "orphan_pools_max",
        env: &["KVBM_ORPHAN_POOLS_MAX"],
        default: Default::Text("4"),
        kind: Kind::Count { range: 0..=1024, field: |c| &mut c.orphan_pools_max },
        help: "Device pools of dead workers that are kept for a successor",
    },
    Setting {
        key: "orphan_pool_ttl_secs",
        env: &["KVBM_ORPHAN_POOL_TTL_SECS"],
        default: Default::Text("600"),
        kind: Kind::Count { range: 0..=31_536_000, field: |c| &mut c.orphan_pool_ttl_secs },
        help: "How long each of them is kept, seconds",
    },
    Setting {
        key: "events_kept",
        env: &["KVBM_EVENTS_KEPT"],
        default: Default::Text("65536"),
        kind: Kind::Count { range: 1..=100_000_000, field: |c| &mut c.events_kept },
        help: "KV events kept for watchers that fall behind",
    },
    Setting {
        key: "what_if_window_secs",
        env: &["KVBM_WHAT_IF_WINDOW_SECS"],
        default: Default::Text("3600"),
        kind: Kind::Count { range: 0..=604_800, field: |c| &mut c.what_if_window_secs },
        help: "How far back the hit rates by capacity look, seconds; 0 turns them off",
    },
    Setting {
        key: "eviction_policy",
        env: &["KVBM_EVICTION_POLICY"],
        default: Default::Text("gittins"),
        kind: Kind::Policy { field: |c| &mut c.eviction_policy },
        help: "Which block is evicted first among those of equal right",
    },
    Setting {
        key: "pin_budget_gb",
        env: &["KVBM_PIN_BUDGET_GB"],
        default: Default::Text("1"),
        kind: Kind::Number { range: 0.0..=1_048_576.0, field: |c| &mut c.pin_budget_gb },
        help: "GB of 10^9 bytes that pins of one namespace may keep; 0 turns pins off",
    },
    Setting {
        key: "tenants",
        env: &["KVBM_TENANT_QUOTAS"],
        default: Default::Text(""),
        kind: Kind::Quotas { field: |c| &mut c.tenants },
        help: "What tenants may have at most, and what is not evicted for others; may be given several times",
    },
    Setting {
        key: "sessions_max",
        env: &["KVBM_SESSIONS_MAX"],
        default: Default::Text("256"),
        kind: Kind::Count { range: 1..=65_536, field: |c| &mut c.sessions_max },
        help: "Sessions at once, silent ones included",
    },
    Setting {
        key: "session_queue_depth",
        env: &["KVBM_SESSION_QUEUE_DEPTH"],
        default: Default::Text("1024"),
        kind: Kind::Count { range: 1..=65_536, field: |c| &mut c.session_queue_depth },
        help: "Questions of one session that are unanswered or whose answers it has not taken yet",
    },
    Setting {
        key: "session_stall_ms",
        env: &["KVBM_SESSION_STALL_MS"],
        default: Default::Text("10000"),
        kind: Kind::Count { range: 10..=3_600_000, field: |c| &mut c.session_stall_ms },
        help: "A session with a full queue that takes no answer for so long is disconnected, milliseconds",
    },
    Setting {
        key: "bind_timeout_ms",
        env: &["KVBM_BIND_TIMEOUT_MS"],
        default: Default::Text("10000"),
        kind: Kind::Count { range: 10..=600_000, field: |c| &mut c.bind_timeout_ms },
        help: "How long an engine may take for each step of attaching, and a client over TCP for its first \
               permitted request, milliseconds",
    },
    Setting {
        key: "allowed_uids",
        env: &["KVBM_ALLOWED_UIDS"],
        default: Default::Text(""),
        kind: Kind::Users { field: |c| &mut c.allowed_uids },
        help: "Users besides the daemon's own whose processes may attach, numbers separated by commas",
    },
    Setting {
        key: "gpu_slowdown_percent",
        env: &["KVBM_GPU_SLOWDOWN_PERCENT"],
        default: Default::Text("3"),
        kind: Kind::Number { range: 0.0..=100.0, field: |c| &mut c.gpu_slowdown_percent },
        help: "By how much offloads in the background may make an engine's decode steps longer, percent; 0: they wait until \
               it is idle",
    },
    Setting {
        key: "copy_delay_us",
        env: &["KVBM_COPY_DELAY_US"],
        default: Default::Text("0"),
        kind: Kind::Count { range: 0..=10_000_000, field: |c| &mut c.copy_delay_us },
        help: "Waits so long after each copied block, microseconds; for drills that must hit a copy in flight",
    },
    Setting {
        key: "log",
        env: &["KVBM_LOG", "DYN_LOG", "RUST_LOG"],
        default: Default::Text("info"),
        kind: Kind::Filter { field: |c| &mut c.log },
        help: "What is logged: error, warn, info, debug, trace, or target=level, separated by commas",
    },
    Setting {
        key: "log_json",
        env: &["KVBM_LOG_JSON", "DYN_LOGGING_JSONL"],
        default: Default::Text("false"),
        kind: Kind::Switch { field: |c| &mut c.log_json },
        help: "Log one JSON object per line",
    },
];

impl Setting {
    /// Name on the command line, without the leading dashes.
    pub fn flag(&self) -> String {
        if self.is_repeated() { "tenant-quota".to_owned() } else { self.key.replace('_', "-") }
    }

    /// True for settings that may be given several times on the command line.
    pub(crate) fn is_repeated(&self) -> bool {
        matches!(self.kind, Kind::Quotas { .. })
    }

    /// True for settings that need no value on the command line.
    pub(crate) fn is_switch(&self) -> bool {
        matches!(self.kind, Kind::Switch { .. })
    }

    /// Help with range, default and variables.
    pub fn long_help(&self) -> String {
        let default = match &self.default {
            Default::Text("") | Default::Unset => "none".to_owned(),
            Default::Text(text) => (*text).to_owned(),
            Default::StateHome => "$XDG_STATE_HOME/kvbm".to_owned(),
            Default::InStateDir(name) => format!("STATE_DIR/{name}"),
        };
        format!("{} [{}] [default: {default}] [env: {}]", self.help, self.permitted(), self.env.join(", "))
    }

    /// What may be written, in words.
    pub fn permitted(&self) -> String {
        match &self.kind {
            Kind::Number { range, .. } => {
                format!("a number from {} to {}", range.start(), range.end())
            }
            Kind::Count { range, .. } | Kind::OptionalCount { range, .. } => {
                format!("a whole number from {} to {}", range.start(), range.end())
            }
            Kind::Switch { .. } => "true or false".to_owned(),
            Kind::Path { bytes_max, .. } => format!("a path of 1 to {bytes_max} bytes"),
            Kind::Paths { count_max, bytes_max, .. } => {
                format!("1 to {count_max} different paths of 1 to {bytes_max} bytes, separated by commas")
            }
            Kind::Choice { words, .. } => words.join(", "),
            Kind::Policy { .. } => policy_names().collect::<Vec<_>>().join(", "),
            Kind::OptionalPath { bytes_max, .. } => {
                format!("a path of at most {bytes_max} bytes, or nothing")
            }
            Kind::Address { .. } => "an IP address".to_owned(),
            Kind::OptionalText { form, .. } => (*form).to_owned(),
            Kind::OptionalListen { .. } => {
                "an IP address and a port, as in 127.0.0.1:6881 or [::]:6881".to_owned()
            }
            Kind::Users { .. } => "user ids from 0 to 4294967294, separated by commas".to_owned(),
            Kind::Quotas { .. } => quotas::PERMITTED.to_owned(),
            Kind::Filter { .. } => {
                "levels error, warn, info, debug, trace or off, or target=level".to_owned()
            }
        }
    }

    /// What would have been permitted instead of `text`, in words.
    pub(super) fn permitted_instead_of(&self, text: &str) -> String {
        match &self.kind {
            Kind::Quotas { .. } => quotas::parse(text).err().unwrap_or_else(|| self.permitted()),
            _ => self.permitted(),
        }
    }

    /// Puts a value as the user wrote it into `config`; false if it is not permitted.
    pub(super) fn write(&self, config: &mut Config, text: &str) -> bool {
        match &self.kind {
            Kind::Number { range, field } => {
                put(field(config), text.parse().ok().filter(|value| range.contains(value)))
            }
            Kind::Count { range, field } => {
                put(field(config), text.parse().ok().filter(|value| range.contains(value)))
            }
            Kind::OptionalCount { range, field } => {
                put(field(config), text.parse().ok().filter(|value| range.contains(value)).map(Some))
            }
            Kind::Switch { field } => put(field(config), switch(text)),
            Kind::Path { bytes_max, field } => {
                put(field(config), (1..=*bytes_max).contains(&text.len()).then(|| text.into()))
            }
            Kind::Paths { count_max, bytes_max, field } => {
                put(field(config), paths(text, *count_max, *bytes_max))
            }
            Kind::Choice { words, field } => {
                put(field(config), words.contains(&text).then(|| text.to_owned()))
            }
            Kind::OptionalPath { bytes_max, field } => {
                let path = (!text.is_empty()).then(|| text.into());
                put(field(config), (text.len() <= *bytes_max).then_some(path))
            }
            Kind::Address { field } => put(field(config), text.parse().ok()),
            Kind::OptionalText { is_form, field, .. } => {
                put(field(config), is_form(text).then(|| Some(text.to_owned())))
            }
            Kind::OptionalListen { field } => put(field(config), text.parse().ok().map(Some)),
            Kind::Users { field } => put(field(config), users(text)),
            Kind::Policy { field } => {
                put(field(config), policy_names().any(|name| name == text).then(|| text.to_owned()))
            }
            Kind::Quotas { field } => put(field(config), quotas::parse(text).ok()),
            Kind::Filter { field } => put(field(config), filter(text)),
        }
    }

    /// The value as it would be written in `kvbm.toml`; `None` when it is unset.
    pub(super) fn read(&self, config: &Config) -> Option<toml::Value> {
        let config = &mut config.clone();
        let whole = |value: u64| toml::Value::Integer(i64::try_from(value).unwrap_or(i64::MAX));
        match &self.kind {
            Kind::Number { field, .. } => Some(toml::Value::Float(*field(config))),
            Kind::Count { field, .. } => Some(whole(*field(config))),
            Kind::OptionalCount { field, .. } => field(config).map(whole),
            Kind::Switch { field } => Some(toml::Value::Boolean(*field(config))),
            Kind::Path { field, .. } => Some(toml::Value::String(field(config).display().to_string())),
            Kind::Paths { field, .. } => {
                let path = |path: &PathBuf| toml::Value::String(path.display().to_string());
                Some(toml::Value::Array(field(config).iter().map(path).collect()))
            }
            Kind::Choice { field, .. } => Some(toml::Value::String(field(config).clone())),
            Kind::OptionalPath { field, .. } => {
                field(config).as_ref().map(|path| toml::Value::String(path.display().to_string()))
            }
            Kind::Address { field } => Some(toml::Value::String(field(config).to_string())),
            Kind::OptionalText { field, .. } => field(config).clone().map(toml::Value::String),
            Kind::OptionalListen { field } => {
                field(config).map(|address| toml::Value::String(address.to_string()))
            }
            Kind::Users { field } => {
                Some(toml::Value::Array(field(config).iter().map(|uid| whole((*uid).into())).collect()))
            }
            Kind::Quotas { field } => Some(quotas::table(field(config))),
            Kind::Policy { field } | Kind::Filter { field } => {
                Some(toml::Value::String(field(config).clone()))
            }
        }
    }
}

fn put<T>(field: &mut T, value: Option<T>) -> bool {
    value.map(|value| *field = value).is_some()
}

fn switch(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "on" | "yes" => Some(true),
        "0" | "false" | "off" | "no" => Some(false),
        _ => None,
    }
}

fn paths(text: &str, count_max: usize, bytes_max: usize) -> Option<Vec<PathBuf>> {
    let paths: Vec<&str> = text.split(',').map(str::trim).collect();
    let different: std::collections::BTreeSet<_> = paths.iter().collect();
    let fit = paths.iter().all(|path| (1..=bytes_max).contains(&path.len()));
    let usable = fit && paths.len() <= count_max && different.len() == paths.len();
    usable.then(|| paths.into_iter().map(PathBuf::from).collect())
}

fn users(text: &str) -> Option<Vec<u32>> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| part.parse().ok().filter(|uid| *uid != u32::MAX)).collect()
}

fn filter(text: &str) -> Option<String> {
    EnvFilter::try_new(text).ok().map(|_| text.to_owned())
}
