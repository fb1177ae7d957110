//! Other OpenAI servers behind the frontend, named by flags and by a file.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{StreamExt, stream};
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use kvbm_frontend::discovery::{Kind, Place};
use kvbm_frontend::{Config, UpstreamUrl};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;

use crate::client::{self, Answer};
use crate::frontend::{Frontend, config};
use crate::mock::{MockWorker, say};

/// One that serves the model `far` and answers with its own name.
struct Other {
    url: UpstreamUrl,
    state: Arc<Served>,
    task: JoinHandle<()>,
}

struct Served {
    name: &'static str,
    status: AtomicU16,
    answered: AtomicUsize,
    last: Mutex<(HeaderMap, Bytes)>,
    /// Let the rest of answers to the user `patient` go.
    go: Semaphore,
}

impl Served {
    fn named(name: &'static str) -> Arc<Self> {
        let (status, answered, last) = (AtomicU16::new(200), AtomicUsize::new(0), Mutex::default());
        Arc::new(Self { name, status, answered, last, go: Semaphore::new(0) })
    }
}

impl Other {
    fn routes(state: Arc<Served>) -> Router {
        let models = get(async || axum::Json(json!({ "data": [{ "id": "far" }] })));
        Router::new().route("/v1/models", models).route("/v1/completions", post(answer)).with_state(state)
    }

    async fn start(name: &'static str) -> Self {
        let state = Served::named(name);
        let routes = Self::routes(state.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = UpstreamUrl::parse(&format!("http://{}/v1", listener.local_addr().unwrap())).unwrap();
        let task = tokio::spawn(async move { axum::serve(listener, routes).await.unwrap() });
        Self { url, state, task }
    }

    fn answered(&self) -> usize {
        self.state.answered.load(Ordering::Relaxed)
    }

    fn fail_with(&self, status: u16) {
        self.state.status.store(status, Ordering::Relaxed);
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(served): State<Arc<Served>>, headers: HeaderMap, body: Bytes) -> Response {
    served.answered.fetch_add(1, Ordering::Relaxed);
    let asks = |what: &str| String::from_utf8_lossy(&body).contains(what);
    let (streamed, held) = (asks("\"stream\":true"), asks("\"user\":\"patient\""));
    *served.last.lock().unwrap() = (headers, body);
    let status = StatusCode::from_u16(served.status.load(Ordering::Relaxed)).unwrap();
    let text = match streamed {
        true => format!("data: {{\"name\":\"{}\"}}\n\ndata: [DONE]\n\n", served.name),
        false => json!({ "name": served.name }).to_string(),
    };
    if held {
        let rest = stream::once(async move {
            drop(served.go.acquire().await);
            Ok::<_, Infallible>("data: [DONE]\n\n".to_owned())
        });
        return Body::from_stream(stream::iter([Ok(text)]).chain(rest)).into_response();
    }
    (status, text).into_response()
}

async fn of(upstreams: &[&Other], workers: &[&MockWorker]) -> Frontend {
    let upstreams: Vec<UpstreamUrl> = upstreams.iter().map(|other| other.url.clone()).collect();
    let workers = workers.iter().map(|worker| worker.endpoint.clone()).collect();
    Frontend::start(Config { upstreams, workers, ..config() }).await
}

async fn until_upstreams(frontend: &Frontend, wanted: impl Fn(&[Value]) -> bool) {
    loop {
        let health = client::get(frontend.address, "/health").await.json();
        if wanted(health["upstreams"].as_array().unwrap()) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
}

fn ready(count: usize) -> impl Fn(&[Value]) -> bool {
    move |all| all.iter().filter(|upstream| upstream["state"] == "ready").count() == count
}

async fn ask(frontend: &Frontend, more: Value) -> Answer {
    let mut body = json!({ "model": "far", "prompt": "Once", "logprobs": 3 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let headers = [("authorization", "Bearer key"), ("content-type", "application/json"), ("cookie", "c")];
    client::send(frontend.address, http::Method::POST, "/v1/completions", &headers, body.to_string()).await
}

#[tokio::test]
async fn requests_and_answers_pass_through_unread() {
    let folder = tempfile::tempdir().unwrap();
    let (other, worker) =
        (Other::start("other").await, MockWorker::start(folder.path(), "w", "tiny", say(" x")));
    let frontend = of(&[&other], &[&worker]).await;
    until_upstreams(&frontend, ready(1)).await;
    frontend.until_ready(1).await;
    assert_eq!(ask(&frontend, json!({})).await.json(), json!({ "name": "other" }));
    let (headers, body) = other.state.last.lock().unwrap().clone();
    assert_eq!((headers["authorization"].to_str().unwrap(), headers.get("cookie")), ("Bearer key", None));
    assert_eq!(serde_json::from_slice::<Value>(&body).unwrap()["logprobs"], 3);
    assert!(ask(&frontend, json!({ "stream": true })).await.text().ends_with("data: [DONE]\n\n"));
    let models = client::get(frontend.address, "/v1/models").await.json();
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["tiny", "far"]);
    let own =
        client::post(frontend.address, "/v1/completions", json!({ "model": "tiny", "prompt": "Once" })).await;
    assert_eq!((own.status, other.answered()), (StatusCode::OK, 2));
    // What the client did wrong is its own affair.
    other.fail_with(400);
    assert_eq!(ask(&frontend, json!({})).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_request_is_queued_until_something_of_its_answer_has_come() {
    let other = Other::start("other").await;
    let frontend = of(&[&other], &[]).await;
    until_upstreams(&frontend, ready(1)).await;
    let asked = async { ask(&frontend, json!({ "stream": true, "user": "patient" })).await };
    let watch = async {
        frontend.until_metric("dynamo_frontend_active_requests{model=\"far\"} 1").await;
        frontend.until_metric("dynamo_frontend_queued_requests{model=\"far\"} 0").await;
        other.state.go.add_permits(1);
    };
    assert_eq!(tokio::join!(asked, watch).0.status, StatusCode::OK);
    frontend.until_metric("dynamo_frontend_active_requests{model=\"far\"} 0").await;
}

#[tokio::test]
async fn another_answers_for_one_that_fails_and_one_that_goes_on_failing_is_left_alone() {
    let (bad, good) = (Other::start("bad").await, Other::start("good").await);
    let frontend = of(&[&bad, &good], &[]).await;
    until_upstreams(&frontend, ready(2)).await;
    bad.fail_with(503);
    for _ in 0..20 {
        assert_eq!(ask(&frontend, json!({})).await.json(), json!({ "name": "good" }));
    }
    assert!(bad.answered() <= 3, "{}", bad.answered());
    until_upstreams(&frontend, ready(1)).await;
    good.fail_with(500);
    let answer = ask(&frontend, json!({})).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.json()["error"]["code"], "no_worker");
}

#[tokio::test]
async fn one_that_is_gone_is_passed_over() {
    let (gone, good) = (Other::start("gone").await, Other::start("good").await);
    let frontend = of(&[&gone, &good], &[]).await;
    until_upstreams(&frontend, ready(2)).await;
    drop(gone);
    tokio::task::yield_now().await;
    for _ in 0..6 {
        assert_eq!(ask(&frontend, json!({})).await.json(), json!({ "name": "good" }));
    }
}

#[tokio::test]
async fn a_file_adds_and_removes_while_requests_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("fleet.json");
    let place = Place::parse(&format!("file:{}", path.display())).unwrap();
    let other = Other::start("other").await;
    let worker = MockWorker::start(folder.path(), "w", "tiny", say(" x"));
    let frontend = Frontend::start(Config { discovery: Some(place.clone()), ..config() }).await;
    let (url, endpoint) = (other.url.to_string(), worker.endpoint.to_string());
    assert!(place.add(Kind::Upstream, &url).await.unwrap());
    assert!(!place.add(Kind::Upstream, &url).await.unwrap(), "it is listed already");
    place.add(Kind::Worker, &endpoint).await.unwrap();
    until_upstreams(&frontend, ready(1)).await;
    frontend.until_ready(1).await;
    assert_eq!(ask(&frontend, json!({})).await.status, StatusCode::OK);
    // Nonsense changes nothing.
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, "{").unwrap();
    assert!(place.remove(Kind::Upstream, &url).await.is_err());
    std::fs::write(&path, good).unwrap();
    assert!(place.remove(Kind::Upstream, &url).await.unwrap());
    until_upstreams(&frontend, |all| all.is_empty()).await;
    let unknown = json!({ "model": "far", "prompt": "Once" });
    let answer = client::post(frontend.address, "/v1/completions", unknown).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert!(place.remove(Kind::Worker, &endpoint).await.unwrap());
    frontend.until_workers(|workers| workers.is_empty()).await;
}

/// Serves the routes of a server over TLS, as somebody whom only `ca` vouches for.
async fn start_tls(name: &'static str, folder: &std::path::Path) -> (UpstreamUrl, std::path::PathBuf) {
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate =
        rcgen::CertificateParams::new(vec!["localhost".to_owned()]).unwrap().self_signed(&key).unwrap();
    let ca = folder.join("ca.pem");
    std::fs::write(&ca, certificate.pem()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = UpstreamUrl::parse(&format!("https://localhost:{}", listener.local_addr().unwrap().port()));
    let routes = Other::routes(Served::named(name));
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let (acceptor, routes) = (acceptor.clone(), routes.clone());
            tokio::spawn(async move {
                let Ok(stream) = acceptor.accept(socket).await else { return };
                let service = TowerToHyperService::new(routes);
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    (url.unwrap(), ca)
}

#[tokio::test]
async fn a_server_with_tls_is_asked_if_its_authority_is_known() {
    let folder = tempfile::tempdir().unwrap();
    let (url, ca) = start_tls("safe", folder.path()).await;
    let of = async |upstream_ca| {
        let upstreams = vec![url.clone()];
        Frontend::start(Config { upstreams, upstream_ca, ..config() }).await
    };
    let stranger = of(None).await;
    let frontend = of(Some(ca)).await;
    until_upstreams(&frontend, ready(1)).await;
    assert_eq!(ask(&frontend, json!({})).await.json()["name"], "safe");
    let health = client::get(stranger.address, "/health").await.json();
    assert_ne!(health["upstreams"][0]["state"], "ready", "{health}");
}
