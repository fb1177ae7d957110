//! The system server: /health, /live, /metrics.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use axum::serve::ListenerExt;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::engine_thread::Loaded;
use crate::{WorkerError, metrics};

/// What can be told about the worker.
#[derive(Clone)]
pub(crate) struct Condition {
    pub model: String,
    /// Set once the worker serves.
    pub loaded: Arc<OnceLock<Loaded>>,
    pub draining: CancellationToken,
    pub running: TaskTracker,
}

/// A bound port and the URL it is reached under.
pub(crate) async fn bind((host, port): (IpAddr, u16)) -> Result<(TcpListener, String), WorkerError> {
    let address = SocketAddr::new(host, port);
    let error = |source| WorkerError::Listen { endpoint: format!("http://{address}"), source };
    let listener = TcpListener::bind(address).await.map_err(error)?;
    let mut bound = listener.local_addr().map_err(error)?;
    if bound.ip().is_unspecified() {
        bound.set_ip([127, 0, 0, 1].into());
    }
    Ok((listener, format!("http://{bound}")))
}

/// Serves until it is aborted.
pub(crate) async fn serve(listener: TcpListener, condition: Condition) {
    let router = Router::new()
        .route("/live", get(|| async { Json(json!({ "status": "live" })) }))
        .route("/health", get(health))
        .route("/metrics", get(scrape))
        .with_state(condition);
    let listener = listener.tap_io(|stream| {
        // Answers are small and written at once: only latency is at stake.
        let _ = stream.set_nodelay(true);
    });
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the system server ended");
    }
}

async fn health(State(condition): State<Condition>) -> Response {
    let (code, status) = if condition.draining.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "draining")
    } else if condition.loaded.get().is_none() {
        (StatusCode::SERVICE_UNAVAILABLE, "starting")
    } else {
        (StatusCode::OK, "healthy")
    };
    let attached = condition.loaded.get().is_some_and(|loaded| loaded.cache.attached.get() == 1);
    let cache = if attached { "attached" } else { "detached" };
    (code, Json(json!({ "status": status, "cache": cache }))).into_response()
}

async fn scrape(State(condition): State<Condition>) -> Response {
    let kind = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([kind], metrics::render(&condition)).into_response()
}
