//! What `/metrics` says, under the names that users of Dynamo's frontend know.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use kvbm_proto::v1::TraceContext;
use tracing::field::Empty;
use tracing::{Span, info, info_span};

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
    started: IntCounterVec,
    failures: IntCounterVec,
    cancellations: IntCounterVec,
    rejections: IntCounterVec,
    inflight: IntGaugeVec,
    queued: IntGaugeVec,
    active: IntGaugeVec,
    ready: IntGaugeVec,
    context_length: IntGaugeVec,
    tokenizer: HistogramVec,
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
    queued: IntGauge,
    active: IntGauge,
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
const TOKENIZER_MS: &[f64] = &[0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];
const OUTPUT_TOKENS: &[f64] = &[1.0, 16.0, 64.0, 160.0, 400.0, 1000.0, 2400.0, 5800.0, 14000.0, 32000.0];

impl Metrics {
    /// With every series registered.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new_custom(Some("dynamo_frontend".to_owned()), None)?;
        let histogram_by = |name: &str, help: &str, buckets: &[f64], label: &str| {
            let vector =
                HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &[label])?;
            registry.register(Box::new(vector.clone()))?;
            Ok::<_, prometheus::Error>(vector)
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| histogram_by(name, help, buckets, "model");
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let vector = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(vector.clone()))?;
            Ok::<_, prometheus::Error>(vector)
        };
        let gauge = |name: &str, help: &str| {
            let vector = IntGaugeVec::new(Opts::new(name, help), &["model"])?;
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
        let by_request = ["model", "endpoint", "request_type", "status", "error_type"];
        let disconnected =
            IntCounter::new("disconnected_clients", "Clients that left before their answer was complete")?;
        registry.register(Box::new(disconnected.clone()))?;
        let models = Mutex::default();
        Ok(Self {
            requests: counter("requests_total", "Requests that were answered or given up", &by_request)?,
            started: counter(
                "requests_started_total",
                "Requests that were understood and went to a model",
                &["model", "endpoint", "request_type"],
            )?,
            failures: counter(
                "failures_total",
                "Requests that ended with an error",
                &["model", "endpoint", "error_type"],
            )?,
            cancellations: counter(
                "model_cancellation_total",
                "Requests whose client left",
                &["model", "endpoint"],
            )?,
            rejections: counter(
                "model_rejection_total",
                "Requests for which every worker was full",
                &["model", "endpoint"],
            )?,
            inflight: gauge("inflight_requests", "Requests being answered")?,
            queued: gauge("queued_requests", "Requests that wait for their first token")?,
            active: gauge("active_requests", "Requests of which tokens have come")?,
            ready: gauge("model_ready", "Whether a worker of the model can be used")?,
            context_length: gauge("model_context_length", "Tokens of prompt and answer together")?,
            tokenizer: histogram_by(
                "tokenizer_latency_ms",
                "Milliseconds to render and tokenize the prompts of a request",
                TOKENIZER_MS,
                "operation",
            )?,
            output_tokens_total: counter("output_tokens_total", "Tokens generated", &["model"])?,
            registry,
            disconnected,
            duration,
            first_token,
            inter_token,
            input_tokens,
            output_tokens,
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
            queued: self.queued.with_label_values(label),
            active: self.active.with_label_values(label),
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

    /// Models that can be used now, and their context lengths.
    pub fn set_models<'a>(&self, models: impl Iterator<Item = (&'a str, u32)>) {
        let usable: HashMap<&str, u32> = models.collect();
        for model in self.models.lock().keys() {
            self.ready.with_label_values(&[model]).set(i64::from(usable.contains_key(model.as_str())));
        }
        for (model, context_length) in usable {
            self.ready.with_label_values(&[model]).set(1);
            self.context_length.with_label_values(&[model]).set(i64::from(context_length));
        }
    }

    /// The prompts of a request were tokenized.
    pub fn tokenized(&self, time: Duration) {
        self.tokenizer.with_label_values(&["tokenize"]).observe(time.as_secs_f64() * 1e3);
    }

    /// The text of `/metrics`.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// One request, from its arrival to its end, which is a line of the log. Dropped without `finish`: its client left.
pub struct RequestRecord {
    metrics: Arc<Metrics>,
    model: Option<Arc<ModelMetrics>>,
    api: Api,
    id: String,
    stream: bool,
    started: Instant,
    /// Something of the answer has come.
    begun: bool,
    first_token: Option<Instant>,
    /// Of each choice.
    last_token: Vec<Option<Instant>>,
    prompt_tokens: usize,
    completion_tokens: u32,
    cached_tokens: u32,
    finished: bool,
    span: Span,
    /// As the client sent it.
    parent: Option<TraceContext>,
}

impl RequestRecord {
    /// A request has arrived, perhaps as a part of a trace.
    pub fn new(metrics: Arc<Metrics>, api: Api, id: &str, parent: Option<TraceContext>) -> Self {
        let span = info_span!(
            "request",
            request_id = id,
            endpoint = api.label(),
            model = Empty,
            error_type = Empty,
            prompt_tokens = Empty,
            completion_tokens = Empty,
        );
        if let Some(parent) = &parent {
            kvbm_telemetry::follow(&span, parent);
        }
        Self {
            metrics,
            model: None,
            api,
            id: id.to_owned(),
            stream: false,
            started: Instant::now(),
            begun: false,
            first_token: None,
            last_token: Vec::new(),
            prompt_tokens: 0,
            completion_tokens: 0,
            cached_tokens: 0,
            finished: false,
            span,
            parent,
        }
    }

    /// Its place in a trace: its own where traces are sent, else the client's.
    pub fn trace(&self) -> Option<TraceContext> {
        kvbm_telemetry::context_of(&self.span).or_else(|| self.parent.clone())
    }

    /// Its answer will be streamed.
    pub fn set_stream(&mut self, stream: bool) {
        self.stream = stream;
    }

    /// It goes to this model, with so many tokens of prompt.
    pub fn set_model(&mut self, model: Arc<ModelMetrics>, prompt_tokens: usize) {
        model.inflight.inc();
        model.queued.inc();
        model.input_tokens.observe(prompt_tokens as f64);
        let labels = [model.model.as_str(), self.api.label(), self.request_type()];
        self.metrics.started.with_label_values(&labels).inc();
        self.prompt_tokens = prompt_tokens;
        self.model = Some(model);
    }

    /// Something of the answer has come.
    pub fn begin(&mut self) {
        if let Some(model) = self.model.as_ref().filter(|_| !self.begun) {
            model.queued.dec();
            model.active.inc();
            self.begun = true;
        }
    }

    /// So many tokens of a choice came at once.
    pub fn tokens(&mut self, choice: usize, count: usize) {
        let Some(model) = &self.model else { return };
        if count == 0 {
            return;
        }
        let now = Instant::now();
        if self.first_token.is_none() {
            model.first_token.observe((now - self.started).as_secs_f64());
            self.first_token = Some(now);
        }
        self.begin();
        let Some(model) = &self.model else { return };
        if self.last_token.len() <= choice {
            self.last_token.resize(choice + 1, None);
        }
        if let Some(last) = self.last_token[choice].replace(now) {
            let each = (now - last).as_secs_f64() / count as f64;
            (0..count).for_each(|_| model.inter_token.observe(each));
        }
        model.output_tokens_total.inc_by(count as u64);
        self.completion_tokens =
            self.completion_tokens.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
    }

    /// The answer is complete.
    pub fn succeed(&mut self, completion_tokens: u32, cached_tokens: u32) {
        if let Some(model) = &self.model {
            model.output_tokens.observe(f64::from(completion_tokens));
            model.cached_tokens.observe(f64::from(cached_tokens));
        }
        (self.completion_tokens, self.cached_tokens) = (completion_tokens, cached_tokens);
        self.end("success", "");
    }

    /// The answer of another server is complete; nobody counted its tokens.
    pub fn pass(&mut self) {
        self.end("success", "");
    }

    /// The answer is, or ends with, an error.
    pub fn fail(&mut self, kind: ErrorKind) {
        if kind == ErrorKind::Overload {
            self.metrics.rejections.with_label_values(&[self.model_name(), self.api.label()]).inc();
        }
        self.end("error", kind.label());
    }

    fn request_type(&self) -> &'static str {
        if self.stream { "stream" } else { "unary" }
    }

    fn model_name(&self) -> &str {
        self.model.as_ref().map_or("", |model| &model.model)
    }

    fn end(&mut self, status: &'static str, error_type: &'static str) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let elapsed = self.started.elapsed();
        if let Some(model) = &self.model {
            model.inflight.dec();
            if self.begun { &model.active } else { &model.queued }.dec();
            model.duration.observe(elapsed.as_secs_f64());
        }
        let (model, endpoint) = (self.model_name(), self.api.label());
        self.span.record("model", model);
        self.span.record("error_type", error_type);
        self.span.record("prompt_tokens", self.prompt_tokens);
        self.span.record("completion_tokens", self.completion_tokens);
        let labels = [model, endpoint, self.request_type(), status, error_type];
        self.metrics.requests.with_label_values(&labels).inc();
        if !error_type.is_empty() {
            self.metrics.failures.with_label_values(&[model, endpoint, error_type]).inc();
        }
        info!(
            target: "access",
            request_id = self.id,
            endpoint,
            model,
            stream = self.stream,
            status,
            error_type,
            prompt_tokens = self.prompt_tokens,
            cached_tokens = self.cached_tokens,
            completion_tokens = self.completion_tokens,
            first_token_ms = self.first_token.map(|at| (at - self.started).as_secs_f64() * 1e3),
            duration_ms = elapsed.as_secs_f64() * 1e3,
        );
    }
}

impl Drop for RequestRecord {
    fn drop(&mut self) {
        if !self.finished {
            self.metrics.disconnected.inc();
            self.metrics.cancellations.with_label_values(&[self.model_name(), self.api.label()]).inc();
            self.end("error", "cancelled");
        }
    }
}
