//! What Prometheus scrapes. Nothing is counted here: the block manager counts completions, this only writes them down.

mod disk;
mod engine;
mod gpu;
mod rights;
mod text;
mod what_if;

use kvbm::{Counters, Histogram, Refused, Route, Tier};

use crate::core::Core;
use crate::inventory;
use crate::status::{SlotStatus, Status};
use text::{Family, Text};

/// The document.
pub(crate) fn render(core: &Core) -> String {
    let mut text = Text::default();
    let (status, counters) = (inventory::figures(core), core.manager.counters());
    let mut build = text.family("kvbm_build_info", "gauge", "Always 1; the label says which version runs.");
    build.value(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    text.gauge("kvbm_uptime_seconds", "Time since the daemon started.", status.daemon.uptime_s);
    text.gauge("kvbm_ready", "1 when /ready answers 200.", u8::from(status.daemon.ready));
    found(&mut text, counters);
    moved(&mut text, counters);
    what_if::render(&mut text, &status);
    let help = "Requests and commits that came too fast for these figures.";
    text.counter("kvbm_what_if_unseen_total", help, core.manager.what_if().unseen);
    rights::render(&mut text, &status);
    held(&mut text, core, &status);
    disk::render(&mut text, core);
    engine::render(&mut text, core);
    refused(&mut text, core, counters);
    recorded(&mut text, core);
    gpu::render(&mut text, &status);
    text.finish()
}

/// Only while something is recorded.
fn recorded(text: &mut Text, core: &Core) {
    let Some(recorder) = &core.recorder else { return };
    let (lines, bytes, dropped) = recorder.figures();
    text.counter("kvbm_record_lines_total", "Lines written to the recorded trace.", lines);
    text.gauge("kvbm_record_file_bytes", "Size of the recorded trace.", bytes);
    let help =
        "Matches and commits that are missing in the recorded trace: it was full, or writing too slow.";
    text.counter("kvbm_record_dropped_total", help, dropped);
}

fn found(text: &mut Text, counters: &Counters) {
    let help = "Tokens found outside the device and brought there, counted when they arrived.";
    text.counter("kvbm_matched_tokens", help, counters.matched_tokens());
    let help = "Share of the blocks asked for behind those on the device that host memory had, over the last 1000 \
                requests.";
    text.gauge("kvbm_host_cache_hit_rate", help, counters.hit_rate(Tier::Host));
    let help = "Share of those blocks that were on disk and not in host memory.";
    text.gauge("kvbm_disk_cache_hit_rate", help, counters.hit_rate(Tier::Disk));
}

fn moved(text: &mut Text, counters: &Counters) {
    let (offload, onboard) = (counters.blocks(Route::DeviceToHost), counters.blocks(Route::HostToDevice));
    text.counter("kvbm_offload_blocks_d2h", "Blocks that arrived in host memory from a device.", offload);
    text.counter("kvbm_onboard_blocks_h2d", "Blocks that arrived on a device from host memory.", onboard);
    let (demote, promote) = (counters.blocks(Route::HostToDisk), counters.blocks(Route::DiskToHost));
    text.counter("kvbm_offload_blocks_h2d", "Blocks that arrived on disk from host memory.", demote);
    let help = "Blocks that arrived from disk, checked, in host memory, on their way to a device.";
    text.counter("kvbm_onboard_blocks_d2d", help, promote);
    let mut bytes = text.family("kvbm_transfer_bytes_total", "counter", "Bytes that arrived, by route.");
    Route::ALL.iter().for_each(|route| bytes.value(&[("route", route.name())], counters.bytes(*route)));
    let mut failed = text.family(
        "kvbm_transfer_failed_batches_total",
        "counter",
        "Batches of copies whose bytes did not count in the end, by route.",
    );
    Route::ALL
        .iter()
        .for_each(|route| failed.value(&[("route", route.name())], counters.failed_batches(*route)));
    let help = "Time from start to end of each batch of copies, by route.";
    let mut seconds = text.family("kvbm_transfer_seconds", "histogram", help);
    for route in Route::ALL {
        histogram(&mut seconds, &[("route", route.name())], counters.seconds(route));
    }
    let help = "How long the lock of the ledger was held, each time.";
    histogram(
        &mut text.family("kvbm_ledger_lock_held_seconds", "histogram", help),
        &[],
        counters.lock_held(),
    );
}

fn held(text: &mut Text, core: &Core, status: &Status) {
    let mut family = text.family("kvbm_tier_capacity_bytes", "gauge", "Size of each tier.");
    status.tiers.iter().for_each(|tier| family.value(&[("tier", &tier.tier)], tier.capacity_bytes));
    let mut family = text.family("kvbm_tier_used_bytes", "gauge", "Bytes of slots in use, by tier.");
    status.tiers.iter().for_each(|tier| family.value(&[("tier", &tier.tier)], tier.used_bytes));
    let mut family = text.family("kvbm_tier_resident_blocks", "gauge", "Blocks that can be found, by tier.");
    status.tiers.iter().for_each(|tier| family.value(&[("tier", &tier.tier)], tier.slots.resident));
    let mut family =
        text.family("kvbm_tier_slots", "gauge", "Slots by tier and state; pinned ones are also resident.");
    for tier in &status.tiers {
        let SlotStatus { free, filling, resident, pinned, quarantined: _ } = tier.slots;
        for (state, count) in
            [("free", free), ("filling", filling), ("resident", resident), ("pinned", pinned)]
        {
            family.value(&[("tier", &tier.tier), ("state", state)], count);
        }
    }
    let help = "Blocks evicted to make room, by tier.";
    let mut family = text.family("kvbm_evictions_total", "counter", help);
    status.tiers.iter().for_each(|tier| family.value(&[("tier", &tier.tier)], tier.evictions));
    let quarantined: u64 = status.tiers.iter().map(|tier| tier.slots.quarantined).sum();
    let help = "Slots that are not used: their holder is silent but alive, or they did not give back what was stored in them.";
    text.gauge("kvbm_quarantined_blocks", help, quarantined);
    text.gauge("kvbm_leases", "Leases alive.", status.leases);
    text.gauge("kvbm_sessions", "Sessions, silent ones included.", core.sessions.count());
    text.gauge("kvbm_workers", "Workers registered.", status.workers.len());
    text.gauge("kvbm_pools", "Device pools, those of dead workers included.", status.pools.len());
    text.gauge(
        "kvbm_transfers_in_flight",
        "Batches of copies waiting or running.",
        status.transfers_in_flight,
    );
    text.gauge("kvbm_offload_backlog_blocks", "Blocks that wait to be copied to host memory.", backlog(core));
    text.counter("kvbm_events_total", "KV events numbered so far.", core.manager.events().last());
}

fn backlog(core: &Core) -> usize {
    core.manager.inspect(|ledger| ledger.backlog())
}

fn refused(text: &mut Text, core: &Core, counters: &Counters) {
    let help = "Times that a bounded queue was full, by queue.";
    let mut busy = text.family("kvbm_busy_total", "counter", help);
    counters.busy().for_each(|(queue, count)| busy.value(&[("queue", queue)], count));
    core.refusals.each(|queue, count| busy.value(&[("queue", queue)], count));
    let help = "Requests and connections over TCP that were not let in, by reason.";
    let mut rejected = text.family("kvbm_grpc_rejected_total", "counter", help);
    core.door.rejections().for_each(|(reason, count)| rejected.value(&[("reason", reason)], count));
    text.gauge("kvbm_grpc_connections", "Connections over TCP.", core.door.connections());
    let tally = core.manager.inspect(|ledger| ledger.tally());
    for (name, help, count) in [
        (
            "kvbm_duplicate_commits_total",
            "Committed blocks whose key was resident in the pool already.",
            tally.duplicate_commits,
        ),
        (
            "kvbm_orphan_blocks_total",
            "Blocks whose parent was not resident when they were committed or offloaded.",
            tally.orphans,
        ),
        (
            "kvbm_host_exhausted_total",
            "Blocks not offloaded because all host memory was in use.",
            tally.host_exhausted,
        ),
        (
            "kvbm_offloads_unimportant_total",
            "Blocks not offloaded because of too low a priority, their own or that of one before them.",
            tally.offloads_unimportant,
        ),
        (
            "kvbm_grants_short_total",
            "Requests for blocks that could not be granted in full.",
            tally.grants_short,
        ),
        ("kvbm_leases_expired_total", "Leases that ended unused by their deadline.", tally.leases_expired),
    ] {
        text.counter(name, help, count);
    }
}

fn histogram(family: &mut Family<'_>, labels: &[(&str, &str)], histogram: &Histogram) {
    let counts = histogram.buckets();
    let buckets: Vec<(f64, u64)> = Histogram::BOUNDS.into_iter().zip(counts).collect();
    family.histogram(labels, &buckets, counts[Histogram::BOUNDS.len()], histogram.seconds());
}

/// Times that a queue of the daemon itself was full. The block manager counts its own.
#[derive(Debug, Default)]
pub(crate) struct Refusals([std::sync::atomic::AtomicU64; Refusals::QUEUES.len()]);

impl Refusals {
    const QUEUES: [&'static str; 3] = ["sessions", "session_pools", "session_answers"];

    /// Counts it if it is about one of these queues.
    pub fn note(&self, refused: &Refused) {
        if let Refused::Busy { queue } = refused {
            self.note_queue(queue);
        }
    }

    /// As [`Refusals::note`].
    pub fn note_queue(&self, queue: &str) {
        if let Some(i) = Self::QUEUES.iter().position(|name| *name == queue) {
            self.0[i].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn each(&self, mut see: impl FnMut(&'static str, u64)) {
        for (name, count) in Self::QUEUES.into_iter().zip(&self.0) {
            see(name, count.load(std::sync::atomic::Ordering::Relaxed));
        }
    }
}
