//! A span's place in a trace, as it travels in headers and messages.

use std::collections::HashMap;

use kvbm_proto::v1::TraceContext;
use opentelemetry::propagation::TextMapPropagator;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const PARENT: &str = "traceparent";
const STATE: &str = "tracestate";

/// Makes a span the child of one in another process. What is no context is ignored, as the standard wants it.
pub fn follow(span: &Span, context: &TraceContext) {
    let carrier = HashMap::from([
        (PARENT.to_owned(), context.traceparent.clone()),
        (STATE.to_owned(), context.tracestate.clone()),
    ]);
    // Where no traces are sent the span has no place to be given.
    let _ = span.set_parent(TraceContextPropagator::new().extract(&carrier));
}

/// What a child of this span in another process is to be told. `None`: no traces are sent.
pub fn context_of(span: &Span) -> Option<TraceContext> {
    if span.is_disabled() {
        return None;
    }
    let mut carrier = HashMap::new();
    TraceContextPropagator::new().inject_context(&span.context(), &mut carrier);
    let traceparent = carrier.remove(PARENT)?;
    Some(TraceContext { traceparent, tracestate: carrier.remove(STATE).unwrap_or_default() })
}
