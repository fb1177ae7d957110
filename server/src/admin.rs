//! The admin HTTP server: metrics, health, status, pins.

mod pins;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use axum::serve::ListenerExt;
use serde_json::json;
use tokio::net::TcpListener;

use crate::config::Config;
use crate::core::Core;
use crate::error::StartError;
use crate::{inventory, metrics};

/// Ports tried behind a busy one.
const PORTS_TRIED: u16 = 100;

/// Binds the configured port, or the next free one.
pub(crate) async fn bind(config: &Config) -> Result<TcpListener, StartError> {
    let wanted = config.metrics_address();
    let last = wanted.port().saturating_add(if wanted.port() == 0 { 0 } else { PORTS_TRIED });
    let mut port = wanted.port();
    loop {
        let address = SocketAddr::new(wanted.ip(), port);
        match TcpListener::bind(address).await {
            Ok(listener) => {
                if port != wanted.port() {
                    tracing::warn!("port {} is busy, the admin HTTP server uses {port}", wanted.port());
                }
                return Ok(listener);
            }
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && port < last => port += 1,
            Err(source) => return Err(StartError::Admin { address, source }),
        }
    }
}

/// Serves until copies have ended, so that the last figures can be read.
pub(crate) async fn serve(core: Arc<Core>, listener: TcpListener) {
    let closing = core.closing.clone();
    let listener = listener.tap_io(|stream| {
        // Answers are small and written at once: only latency is at stake.
        let _ = stream.set_nodelay(true);
    });
    let served = axum::serve(listener, router(core)).with_graceful_shutdown(closing.cancelled_owned());
    if let Err(error) = served.await {
        tracing::error!(%error, "the admin HTTP server ended");
    }
}

fn router(core: Arc<Core>) -> Router {
    let mut router = Router::new()
        .route("/live", get(|| async { Json(json!({ "status": "live" })) }))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/status", get(status))
        .merge(pins::routes());
    if core.config.metrics {
        router = router.route("/metrics", get(scrape));
    }
    router.with_state(core)
}

async fn scrape(State(core): State<Arc<Core>>) -> Response {
    let kind = (header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8");
    ([kind], metrics::render(&core)).into_response()
}

async fn health(State(core): State<Arc<Core>>) -> Response {
    if core.stopping.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "stopping" }))).into_response();
    }
    Json(json!({ "status": "healthy" })).into_response()
}

async fn ready(State(core): State<Arc<Core>>) -> Response {
    let reasons = core.reasons_not_ready();
    let code = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(json!({ "ready": reasons.is_empty(), "reasons": reasons }))).into_response()
}

async fn status(State(core): State<Arc<Core>>) -> Response {
    Json(inventory::take(&core)).into_response()
}
