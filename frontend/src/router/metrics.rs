//! What `/metrics` says about routing and migration.

use std::time::Duration;

use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};

use super::cost::Overlap;
use super::recomputed::Recomputed;

/// Microseconds to milliseconds.
const DECISION: &[f64] = &[1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2];
const SHARE: &[f64] = &[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];
const MIGRATION: &[f64] = &[0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0];

/// Series of the router.
pub struct RouterMetrics {
    /// Seconds that a choice took.
    pub decision_seconds: Histogram,
    /// Events of daemons taken in, by who told them: the daemon, or NATS.
    pub events: IntCounterVec,
    /// Times that events were missed.
    pub event_gaps: IntCounter,
    /// Snapshots taken in.
    pub snapshots: IntCounter,
    /// Requests whose keys were announced to a daemon, by whether it took them.
    pub prefetches: IntCounterVec,
    /// Answers that moved, by model, type and outcome.
    pub migrations: IntCounterVec,
    /// Seconds from the loss of a worker to the next token.
    pub migration_seconds: Histogram,
    /// Seconds from a token to the next one over a move, by part.
    gap_seconds: HistogramVec,
    /// Tokens that the next worker did not find and computed again, by reason.
    recomputed_tokens: IntCounterVec,
    /// Requests by how prefill was done.
    pub disaggregated: IntCounterVec,
    hit_rate: Histogram,
    predicted: IntCounterVec,
    reused: IntCounter,
    index_blocks: IntGauge,
    active_blocks: IntGaugeVec,
    prefill_tokens: IntGaugeVec,
}

impl RouterMetrics {
    /// With every series registered.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(name, help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            let counters = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(counters.clone()))?;
            Ok::<_, prometheus::Error>(counters)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let histogram = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))?;
            registry.register(Box::new(histogram.clone()))?;
            Ok::<_, prometheus::Error>(histogram)
        };
        let gauges = |name: &str, help: &str| {
            let gauges = IntGaugeVec::new(Opts::new(name, help), &["worker"])?;
            registry.register(Box::new(gauges.clone()))?;
            Ok::<_, prometheus::Error>(gauges)
        };
        let index_blocks = IntGauge::new("router_index_blocks", "Blocks that the router knows of")?;
        registry.register(Box::new(index_blocks.clone()))?;
        let gap = HistogramOpts::new(
            "model_migration_gap_seconds",
            "Seconds from the last token before a move to the first one behind it: in which the next worker copied KV into \
             its pool (onboard), and all others (rest)",
        );
        let gap_seconds = HistogramVec::new(gap.buckets(MIGRATION.to_vec()), &["part"])?;
        registry.register(Box::new(gap_seconds.clone()))?;
        Ok(Self {
            decision_seconds: histogram("router_decision_seconds", "Seconds to choose a worker", DECISION)?,
            events: counters("router_events_total", "KV events taken in", &["from"])?,
            event_gaps: counter("router_event_gaps_total", "Times that KV events were missed")?,
            snapshots: counter("router_snapshots_total", "Snapshots of daemons taken in")?,
            prefetches: counters(
                "router_prefetches_total",
                "Requests whose blocks on disk were announced to the daemon before they were sent",
                &["outcome"],
            )?,
            migrations: counters(
                "model_migration_total",
                "Requests that were sent to another worker: before (new_request) or in the middle of (ongoing_request) \
                 the answer",
                &["model", "migration_type", "outcome"],
            )?,
            migration_seconds: histogram(
                "model_migration_duration_seconds",
                "Seconds from the loss of a worker to the next token",
                MIGRATION,
            )?,
            gap_seconds,
            recomputed_tokens: counters(
                "model_migration_recomputed_tokens_total",
                "Tokens that the next worker of a migrated request did not find in any tier: of the block being filled, \
                 of blocks not offloaded in time, or missed",
                &["reason"],
            )?,
            disaggregated: counters(
                "disaggregated_requests_total",
                "Requests by where their prompt was computed, with --disagg",
                &["prefill"],
            )?,
            hit_rate: histogram(
                "kv_hit_rate",
                "Share of a prompt that its worker was thought to have",
                SHARE,
            )?,
            predicted: counters(
                "kv_selected_cached_prefix_tokens_total",
                "Tokens of prompts that their worker was thought to have, by tier",
                &["tier"],
            )?,
            reused: counter(
                "kv_worker_reused_tokens_total",
                "Tokens of those prompts that their worker did not have to compute",
            )?,
            index_blocks,
            active_blocks: gauges(
                "worker_active_decode_tokens",
                "Tokens in blocks of running requests, as far as this frontend sent them",
            )?,
            prefill_tokens: gauges(
                "worker_active_prefill_tokens",
                "Tokens of prompts still to be computed, as far as this frontend sent them",
            )?,
        })
    }

    /// An answer went on, so long after its last token; for `onboard` of that KV was copied.
    pub fn gap(&self, gap: Duration, onboard: Duration) {
        let rest = gap.saturating_sub(onboard);
        for (part, time) in [("onboard", onboard), ("rest", rest)] {
            self.gap_seconds.with_label_values(&[part]).observe(time.as_secs_f64());
        }
    }

    /// An answer went on at another worker.
    pub fn recomputed(&self, Recomputed { open_block, not_offloaded, missed }: Recomputed) {
        for (reason, tokens) in
            [("open_block", open_block), ("not_offloaded", not_offloaded), ("missed", missed)]
        {
            self.recomputed_tokens.with_label_values(&[reason]).inc_by(tokens as u64);
        }
    }

    /// A request was answered by a worker that was chosen for its blocks.
    pub fn compare(&self, prompt_tokens: usize, predicted: Overlap, reused_tokens: u32) {
        self.hit_rate.observe(predicted.total() as f64 / prompt_tokens.max(1) as f64);
        for (tier, tokens) in
            [("device", predicted.device), ("host", predicted.host), ("disk", predicted.disk)]
        {
            self.predicted.with_label_values(&[tier]).inc_by(tokens as u64);
        }
        self.reused.inc_by(reused_tokens.into());
    }

    /// Sets what is looked up when somebody asks.
    pub fn refresh(&self, index_blocks: usize, loads: &[(String, std::sync::Arc<super::Load>)]) {
        let whole = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        self.index_blocks.set(whole(index_blocks as u64));
        self.active_blocks.reset();
        self.prefill_tokens.reset();
        for (worker, load) in loads {
            self.active_blocks.with_label_values(&[worker]).set(whole(load.active_tokens()));
            self.prefill_tokens.with_label_values(&[worker]).set(whole(load.prefill_tokens()));
        }
    }
}
