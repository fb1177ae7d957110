//! Spans on their way to a collector.

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::registry::LookupSpan;

/// Switches traces on or off, whatever else is said.
const SWITCH: &str = "OTEL_EXPORT_ENABLED";
/// Where the collector is; either of them switches traces on.
const ENDPOINTS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
/// How long a process that ends waits for the collector.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Sends spans in the background. Dropped, it sends the rest.
pub struct Export {
    provider: SdkTracerProvider,
    tracer: opentelemetry_sdk::trace::Tracer,
    /// The connection to the collector lives on it; it has to go last.
    _runtime: tokio::runtime::Runtime,
}

impl Export {
    /// As the environment says; `None`: off.
    pub fn from_environment(service: &str) -> Result<Option<Self>, String> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let on = match variable(SWITCH).as_deref() {
            Some("1" | "true") => true,
            Some(_) => false,
            None => ENDPOINTS.iter().any(|name| variable(name).is_some()),
        };
        if on { Self::start(service).map(Some) } else { Ok(None) }
    }

    fn start(service: &str) -> Result<Self, String> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("traces")
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let _entered = runtime.enter();
        let exporter = SpanExporter::builder().with_tonic().build().map_err(|error| error.to_string())?;
        let resource = match std::env::var("OTEL_SERVICE_NAME") {
            Ok(_) => Resource::builder().build(),
            Err(_) => Resource::builder().with_service_name(service.to_owned()).build(),
        };
        let provider =
            SdkTracerProvider::builder().with_resource(resource).with_batch_exporter(exporter).build();
        let tracer = provider.tracer("kvbm");
        drop(_entered);
        Ok(Self { provider, tracer, _runtime: runtime })
    }

    /// Takes spans of this project; those of libraries are about how they are sent.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
        let own = Targets::new().with_target("kvbm", LevelFilter::INFO);
        tracing_opentelemetry::layer().with_tracer(self.tracer.clone()).with_filter(own)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        // A collector that is gone is no reason to stay.
        let _ = self.provider.shutdown_with_timeout(LAST_WORDS);
    }
}
