//! What `/metrics` says, under the names that users of Dynamo's frontend know.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::openai::ErrorKind;

/// Which API was called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    Completions,
    Chat,
}

impl Api {
    fn label(self) -> &'static str {
        match self {
            Self::Completions => "completions",
            Self::Chat => "chat_completions",
        }
    }
}

/// All series.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    inflight: IntGaugeVec,
    disconnected: IntCounter,
    duration: HistogramVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    input_tokens: HistogramVec,
    output_tokens: HistogramVec,
    output_tokens_total: IntCounterVec,
    cached_tokens: HistogramVec,
    models: Mutex<HashMap<String, Arc<ModelMetrics>>>,
}

/// Series of one model, looked up once.
pub struct ModelMetrics {
    model: String,
    inflight: IntGauge,
    duration: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    input_tokens: Histogram,
    output_tokens: Histogram,
    output_tokens_total: IntCounter,
    cached_tokens: Histogram,
}

const DURATION: &[f64] = &[0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 510.0];
const FIRST_TOKEN: &[f64] = &[
    0.0005, 0.001, 0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47, 1.0, 2.2, 4.7, 10.0, 22.0, 48.0,
    100.0, 220.0, 480.0,
];
const INTER_TOKEN: &[f64] =
    &[0.0005, 0.001, 0.0019, 0.0035, 0.0067, 0.013, 0.024, 0.045, 0.084, 0.16, 0.3, 0.56, 1.1, 2.0];
const INPUT_TOKENS: &[f64] =
    &[100.0, 210.0, 430.0, 870.0, 1800.0, 3600.0, 7400.0, 15000.0, 31000.0, 63000.0, 130_000.0];
const OUTPUT_TOKENS: &[f64] = &[1.0, 16.0, 64.0, 160.0, 400.0, 1000.0, 2400.0, 5800.0, 14000.0, 32000.0];

impl Metrics {
    /// With every series registered.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new_custom(Some("dynamo_frontend".to_owned()), None)?;
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let vector =
                HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &["model"])?;
            registry.register(Box::new(vector.clone()))?;
            Ok::<_, prometheus::Error>(vector)
        };
        let duration =
            histogram("request_duration_seconds", "Seconds from request to end of answer", DURATION)?;
        let first_token =
            histogram("time_to_first_token_seconds", "Seconds from request to first token", FIRST_TOKEN)?;
        let inter_token =
            histogram("inter_token_latency_seconds", "Seconds from one token to the next", INTER_TOKEN)?;
        let input_tokens = histogram("input_sequence_tokens", "Tokens of prompts", INPUT_TOKENS)?;
        let output_tokens = histogram("output_sequence_tokens", "Tokens of answers", OUTPUT_TOKENS)?;
        let cached_tokens =
            histogram("cached_tokens", "Tokens of prompts that did not have to be computed", INPUT_TOKENS)?;
        let requests = IntCounterVec::new(
            Opts::new("requests_total", "Requests that were answered or given up"),
            &["model", "endpoint", "request_type", "status", "error_type"],
        )?;
        let output_tokens_total =
            IntCounterVec::new(Opts::new("output_tokens_total", "Tokens generated"), &["model"])?;
        let inflight =
            IntGaugeVec::new(Opts::new("inflight_requests", "Requests being answered"), &["model"])?;
        let disconnected =
            IntCounter::new("disconnected_clients", "Clients that left before their answer was complete")?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(output_tokens_total.clone()))?;
        registry.register(Box::new(inflight.clone()))?;
        registry.register(Box::new(disconnected.clone()))?;
        let models = Mutex::default();
        Ok(Self {
            registry,
            requests,
            inflight,
            disconnected,
            duration,
            first_token,
            inter_token,
            input_tokens,
            output_tokens,
            output_tokens_total,
            cached_tokens,
            models,
        })
    }

    /// Series of a model.
    pub fn model(&self, model: &str) -> Arc<ModelMetrics> {
        let mut models = self.models.lock();
        if let Some(metrics) = models.get(model) {
            return metrics.clone();
        }
        let label = &[model];
        let metrics = Arc::new(ModelMetrics {
            model: model.to_owned(),
            inflight: self.inflight.with_label_values(label),
            duration: self.duration.with_label_values(label),
            first_token: self.first_token.with_label_values(label),
            inter_token: self.inter_token.with_label_values(label),
            input_tokens: self.input_tokens.with_label_values(label),
            output_tokens: self.output_tokens.with_label_values(label),
            output_tokens_total: self.output_tokens_total.with_label_values(label),
            cached_tokens: self.cached_tokens.with_label_values(label),
        });
        models.insert(model.to_owned(), metrics.clone());
        metrics
    }

    /// Where other parts register their series.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The text of `/metrics`.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// One request, from its arrival to its end. Dropped without `finish`: its client left.
pub struct RequestRecord {
    metrics: Arc<Metrics>,
    model: Option<Arc<ModelMetrics>>,
    api: Api,
    stream: bool,
    started: Instant,
    last_token: Option<Instant>,
    finished: bool,
}

impl RequestRecord {
    /// A request has arrived.
    pub fn new(metrics: Arc<Metrics>, api: Api) -> Self {
        let started = Instant::now();
        Self { metrics, model: None, api, stream: false, started, last_token: None, finished: false }
    }

    /// Its answer will be streamed.
    pub fn set_stream(&mut self, stream: bool) {
        self.stream = stream;
    }

    /// It goes to this model, with so many tokens of prompt.
    pub fn set_model(&mut self, model: Arc<ModelMetrics>, prompt_tokens: usize) {
        model.inflight.inc();
        model.input_tokens.observe(prompt_tokens as f64);
        self.model = Some(model);
    }

    /// So many tokens came at once.
    pub fn tokens(&mut self, count: usize) {
        let Some(model) = &self.model else { return };
        if count == 0 {
            return;
        }
        let now = Instant::now();
        match self.last_token.replace(now) {
            None => model.first_token.observe((now - self.started).as_secs_f64()),
            Some(last) => model.inter_token.observe((now - last).as_secs_f64() / count as f64),
        }
        model.output_tokens_total.inc_by(count as u64);
    }

    /// The answer is complete.
    pub fn succeed(&mut self, completion_tokens: u32, cached_tokens: u32) {
        if let Some(model) = &self.model {
            model.output_tokens.observe(f64::from(completion_tokens));
            model.cached_tokens.observe(f64::from(cached_tokens));
        }
        self.end("success", "");
    }

    /// The answer of another server is complete; nobody counted its tokens.
    pub fn pass(&mut self) {
        self.end("success", "");
    }

    /// The answer is, or ends with, an error.
    pub fn fail(&mut self, kind: ErrorKind) {
        self.end("error", kind.label());
    }

    fn end(&mut self, status: &str, error_type: &str) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let request_type = if self.stream { "stream" } else { "unary" };
        let model = match &self.model {
            Some(model) => {
                model.inflight.dec();
                model.duration.observe(self.started.elapsed().as_secs_f64());
                model.model.as_str()
            }
            None => "",
        };
        let labels = [model, self.api.label(), request_type, status, error_type];
        self.metrics.requests.with_label_values(&labels).inc();
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        if !self.finished {
            self.metrics.disconnected.inc();
            self.end("error", "cancelled");
        }
    }
}
