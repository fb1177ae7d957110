//! One trace from a client's request to the daemon's copies, as a collector gets it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvbm_tests::{Up, eventually, eventually_within};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::trace::v1::Span;
use serde_json::json;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

/// Keeps what it is sent.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<Span>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.into_inner().resource_spans.into_iter();
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        self.0.lock().unwrap().extend(scopes.flat_map(|scope| scope.spans));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT: &str = "b7ad6b7169203331";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_request_is_followed_to_the_daemons_copies() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let collector = Collector::default();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let service = TraceServiceServer::new(collector.clone());
    runtime.spawn(async move {
        let incoming = TcpIncoming::from(tokio::net::TcpListener::from_std(listener).unwrap());
        Server::builder().add_service(service).serve_with_incoming(incoming).await
    });

    let folder = Arc::new(tempfile::Builder::new().prefix("kvbm").tempdir().unwrap());
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", address.as_str()), ("OTEL_BSP_SCHEDULE_DELAY", "100")];
    let up = Up::start_in(folder, &["--workers", "2"], &environment);
    let prompt = "In the beginning God created the heaven and the earth. And the earth was without form, and void; \
                  and darkness was upon the face of the deep. And the Spirit of God moved upon the waters.";
    let body = json!({ "model": "tiny", "prompt": prompt, "max_tokens": 2, "temperature": 0 });
    assert_eq!(up.post("/v1/completions", &body).0, 200);
    // The second request goes to the other worker, to which the daemon copies what the first one left.
    eventually("the prompt is in host memory", || {
        (up.metric("kvbm_offload_blocks_d2h", "") >= 1.0).then_some(())
    });
    let traced = ureq::post(up.url("/v1/completions"))
        .header("traceparent", format!("00-{TRACE}-{CLIENT}-01"))
        .header("content-type", "application/json")
        .send(body.to_string())
        .unwrap();
    let cached = traced.headers()["x-kvbm-cached-tokens"].to_str().unwrap();
    assert!(cached.contains("host=32"), "{cached}");

    let spans = eventually_within(Duration::from_secs(20), "all spans have come", || {
        let all = collector.0.lock().unwrap();
        let spans: Vec<Span> = all.iter().filter(|span| hex(&span.trace_id) == TRACE).cloned().collect();
        (spans.len() >= 4).then_some(spans)
    });
    let find = |name: &str| {
        spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:?}"))
    };
    let (request, generate) = (find("request"), find("generate"));
    assert_eq!(hex(&request.parent_span_id), CLIENT);
    assert_eq!(generate.parent_span_id, request.span_id);
    for name in ["match", "onboard"] {
        let span = find(name);
        assert_eq!(span.parent_span_id, generate.span_id, "{name}");
        assert!(request.start_time_unix_nano <= span.start_time_unix_nano);
        assert!(span.end_time_unix_nano <= request.end_time_unix_nano, "{name} ends before the answer does");
    }
}
