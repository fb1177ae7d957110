//! Variables that users of other block managers may have set, and why they have no effect here (yet).

use super::load::Environment;
use super::nearest::nearest;
use super::settings::SETTINGS;

const DISK: &str = "O_DIRECT is used where the file system has it, see DYN_KVBM_DISK_DISABLE_O_DIRECT";
const BATCHES: &str = "copies are batched by KVBM_BATCH_BLOCKS and queued by KVBM_QUEUE_DEPTH";
const PINNED: &str = "host memory is not registered with a GPU yet";
const ZMQ: &str = "engines reach the daemon over a Unix socket (KVBM_SOCKET), not over ZMQ";
const RECORD: &str = "calls are not recorded yet";
const HIT_RATE: &str = "the hit rate's window and period are fixed";
const NCCL: &str = "several ranks per engine are not served yet";
const EVENTS: &str = "there is nothing to consolidate: the daemon numbers the events of all tiers itself";
const REMOTE: &str = "no remote tier is in service yet";
const NIXL: &str = "NIXL is not used";
const START: &str = "ports cannot clash: a busy metrics port gives way to the next free one";

/// Exact names first, prefixes (ending in `_`) after them.
const WITHOUT_EFFECT: &[(&str, &str)] = &[
    ("DYN_KVBM_DISK_ALLOCATOR_TYPE", DISK),
    ("DYN_KVBM_MAX_CONCURRENT_TRANSFERS", BATCHES),
    ("DYN_KVBM_MAX_TRANSFER_BATCH_SIZE", BATCHES),
    ("DYN_KVBM_TRANSFER_BATCH_SIZE", BATCHES),
    ("DYN_KVBM_DISABLE_WRITE_COMBINED", PINNED),
    ("DYN_KVBM_ENABLE_NUMA", PINNED),
    ("DYN_KVBM_ENABLE_RECORD", RECORD),
    ("DYN_KVBM_TRTLLM_ZMQ_PORT", EVENTS),
    ("DYN_KVBM_SLEEP", START),
    ("DYN_KVBM_LEADER_ZMQ_", ZMQ),
    ("DYN_KVBM_CACHE_STATS_", HIT_RATE),
    ("DYN_KVBM_NCCL_", NCCL),
    ("DYN_KVBM_KV_EVENTS_", EVENTS),
    ("DYN_KVBM_NIXL_", NIXL),
    ("DYN_KVBM_OBJECT_", REMOTE),
];

/// Variables that belong to other parts of the project, which check them themselves.
const ELSEWHERE: &[&str] = &[
    "KVBM_WORKER_",
    "KVBM_FRONTEND_",
    "KVBM_LOCAL_KV_RETENTION_",
    "KVBM_CONNECTOR_",
    "KVBM_DAEMON_",
    "KVBM_UP_",
    "KVBM_BENCH_",
    "KVBM_TEST_",
];
const ELSEWHERE_EXACT: &[&str] = &[
    "KVBM_BLOCK_SIZE",
    "KVBM_CONFIG",
    "KVBM_DAEMON",
    "KVBM_DETACH_AFTER_MS",
    "KVBM_DEVICE_CACHE_GB",
    "KVBM_DRAIN_SECONDS",
    "KVBM_DRILL_SEEDS",
    "KVBM_MATCH_DEADLINE_MS",
    "KVBM_MODEL_PATH",
    "KVBM_PARENT_PID",
    "KVBM_SEED",
];

/// At most one warning about `DYN_KVBM_*`, and at most one about `KVBM_*`.
pub(super) fn warnings(environment: &Environment) -> Vec<String> {
    let known = |name: &str| SETTINGS.iter().any(|setting| setting.env.contains(&name));
    let set = |prefix: &'static str| {
        let names = environment.names().filter(move |name| name.starts_with(prefix));
        names.filter(|name| !known(name)).collect::<Vec<_>>()
    };
    let mut warnings = Vec::new();
    let foreign: Vec<_> = set("DYN_KVBM_").iter().map(|name| format!("{name}: {}", reason(name))).collect();
    if !foreign.is_empty() {
        warnings.push(format!("these variables have no effect: {}", foreign.join("; ")));
    }
    let elsewhere = |name: &str| {
        ELSEWHERE_EXACT.contains(&name) || ELSEWHERE.iter().any(|prefix| name.starts_with(prefix))
    };
    let own: Vec<_> = set("KVBM_").into_iter().filter(|name| !elsewhere(name)).collect();
    if !own.is_empty() {
        let own: Vec<_> = own.iter().map(|name| format!("{name}{}", meant(name))).collect();
        warnings.push(format!("unknown variables are ignored: {}", own.join("; ")));
    }
    warnings
}

fn reason(name: &str) -> String {
    let row =
        WITHOUT_EFFECT.iter().find(|(row, _)| name == *row || row.ends_with('_') && name.starts_with(row));
    row.map_or_else(|| format!("unknown{}", meant(name)), |(_, why)| (*why).to_owned())
}

fn meant(name: &str) -> String {
    let ours = SETTINGS.iter().flat_map(|setting| setting.env.iter().copied());
    nearest(name, ours).map_or_else(String::new, |nearest| format!(" (did you mean {nearest}?)"))
}
