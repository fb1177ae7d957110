//! What Prometheus scrapes. Nothing is counted here.

use std::fmt::{Display, Write};

use crate::system::Condition;

/// The document.
pub(crate) fn render(condition: &Condition) -> String {
    let model = condition.model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    let mut page = Page { text: String::new(), model };
    page.gauge(
        "answers_in_flight",
        "Answers that clients have not read to the end.",
        condition.running.len(),
    );
    let draining = u8::from(condition.draining.is_cancelled());
    page.gauge("draining", "1 when no more requests are taken.", draining);
    if let Some(loaded) = condition.loaded.get() {
        page.engine(&loaded.counters.lock().clone());
        page.cache(&loaded.cache);
    }
    page.text
}

struct Page {
    text: String,
    model: String,
}

impl Page {
    fn engine(&mut self, counters: &crate::Counters) {
        self.family(
            "requests_total",
            "counter",
            "Requests, by what became of them.",
            "outcome",
            &[
                ("accepted", counters.requests),
                ("refused", counters.refused),
                ("finished", counters.finished),
                ("cancelled", counters.cancelled),
                ("failed", counters.failed),
            ],
        );
        self.family(
            "cached_tokens_total",
            "counter",
            "Prompt tokens not computed, by tier.",
            "tier",
            &[
                ("device", counters.device_tokens),
                ("host", counters.host_tokens),
                ("disk", counters.disk_tokens),
            ],
        );
        for (name, help, value) in [
            ("prompt_tokens_total", "Prompt tokens of requests that started.", counters.prompt_tokens),
            ("generated_tokens_total", "Tokens generated.", counters.generated_tokens),
            ("computed_tokens_total", "Tokens whose KV was computed.", counters.computed_tokens),
            ("preemptions_total", "Sequences that lost their blocks to others.", counters.preemptions),
            ("failed_onboards_total", "Onboards after which blocks were computed.", counters.failed_onboards),
            ("steps_total", "Passes of the engine.", counters.steps),
            ("decode_steps_total", "Passes in which sequences decoded.", counters.decode_steps),
            ("decode_sequences_total", "Sequences that decoded, over passes.", counters.decode_sequences),
        ] {
            self.counter(name, help, value);
        }
        self.counter("step_seconds_total", "Time spent in passes.", counters.step_seconds);
        self.gauge("decode_batch_max", "Most sequences that decoded in a pass.", counters.max_decode_batch);
        self.gauge("requests_waiting", "Requests in the queue.", counters.waiting);
        self.gauge("requests_running", "Requests that left the queue and have not ended.", counters.running);
    }

    fn cache(&mut self, cache: &kvbm_connector::Counters) {
        self.gauge("cache_attached", "1 while the daemon decides about the pool.", cache.attached.get());
        let help = "Blocks that a daemon that fell silent may still write to.";
        self.gauge("cache_quarantined_blocks", help, cache.quarantined_blocks.get());
        for (name, help, value) in [
            ("cache_matches_total", "Lookups answered by the daemon.", &cache.matches),
            ("cache_local_matches_total", "Lookups answered without it.", &cache.local_matches),
            ("cache_match_timeouts_total", "Lookups it did not answer in time.", &cache.match_timeouts),
            ("cache_matched_blocks_total", "Matched blocks in the pool.", &cache.device_blocks_matched),
            ("cache_disk_waits_total", "Lookups that waited for the disk.", &cache.disk_waits),
            ("cache_disk_wait_timeouts_total", "Such waits that took too long.", &cache.disk_wait_timeouts),
            ("cache_promoted_blocks_total", "Host blocks found because of one.", &cache.promoted_blocks),
            ("cache_onboarded_blocks_total", "Blocks brought from host memory.", &cache.onboarded_blocks),
            ("cache_onboard_failures_total", "Onboards that did not deliver.", &cache.onboard_failures),
            ("cache_allocated_blocks_total", "Blocks given to requests.", &cache.allocated_blocks),
            ("cache_exhausted_total", "Allocations for which nothing was free.", &cache.exhausted),
            ("cache_detaches_total", "Times the engine went on alone.", &cache.detaches),
            ("cache_reattaches_total", "Times the daemon took the pool back.", &cache.reattaches),
            ("cache_attach_failures_total", "Times it did not take the pool.", &cache.attach_failures),
            ("cache_contradictions_total", "Times it said what cannot be.", &cache.contradictions),
        ] {
            self.counter(name, help, value.get());
        }
    }

    fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.single(name, "counter", help, value);
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.single(name, "gauge", help, value);
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: impl Display) {
        self.head(name, kind, help);
        let model = self.model.clone();
        self.line(format_args!("kvbm_worker_{name}{{model=\"{model}\"}} {value}"));
    }

    fn family(&mut self, name: &str, kind: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.head(name, kind, help);
        let model = self.model.clone();
        for (of, value) in values {
            self.line(format_args!("kvbm_worker_{name}{{model=\"{model}\",{label}=\"{of}\"}} {value}"));
        }
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP kvbm_worker_{name} {help}\n# TYPE kvbm_worker_{name} {kind}"));
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.text, "{line}").expect("a string takes everything");
    }
}
