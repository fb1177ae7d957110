//! What is at which path.

use std::sync::Arc;

use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router as Routes};
use http::{HeaderValue, Method, StatusCode, Uri, header};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::answer::answer;
use super::event_stream::Times;
use crate::fleet::{Entry, Fleet};
use crate::metrics::{Api, Metrics};
use crate::openai::{ApiError, openapi};
use crate::request_id::RequestIds;
use crate::router::{Knowledge, Router, RouterMetrics};
use crate::tools::Format;
use crate::upstream::Upstreams;

/// What requests share.
pub struct App {
    pub router: Arc<Router>,
    pub knowledge: Arc<Knowledge>,
    pub routing: Arc<RouterMetrics>,
    pub upstreams: Arc<Upstreams>,
    pub fleet: Arc<Fleet>,
    pub metrics: Arc<Metrics>,
    pub ids: RequestIds,
    pub body_limit_bytes: usize,
    pub timing: Times,
    /// How models write calls of tools; `None`: as their templates say.
    pub tool_calls: Option<Format>,
    /// Seconds since 1970.
    pub started: u64,
    /// Cancelled: no new requests are wanted.
    pub stop: CancellationToken,
}

/// All routes.
pub fn routes(app: Arc<App>) -> Routes {
    Routes::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/health", get(health))
        .route("/live", get(live))
        .route("/openapi.json", get(async || Json(openapi())))
        .route("/metrics", get(metrics))
        .fallback(async |uri: Uri| ApiError::route_not_found(uri.path()))
        .method_not_allowed_fallback(async |method: Method, uri: Uri| {
            ApiError::wrong_method(&method, uri.path())
        })
        .with_state(app)
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, Api::Completions, request).await
}

async fn chat(State(app): State<Arc<App>>, request: Request) -> Response {
    answer(&app, Api::Chat, request).await
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let view = app.fleet.view();
    let own = view.models().map(|(name, entry)| model_object(&app, name, entry));
    let others = app.upstreams.models().into_iter().filter(|name| view.entry(name).is_none());
    let data: Vec<Value> = own.chain(others.map(|name| upstream_object(&app, &name))).collect();
    Json(json!({ "object": "list", "data": data }))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    match app.fleet.entry(&name) {
        Some(entry) => Ok(Json(model_object(&app, &name, &entry))),
        None if app.upstreams.models().contains(&name) => Ok(Json(upstream_object(&app, &name))),
        None => Err(ApiError::model_not_found(&name)),
    }
}

fn model_object(app: &App, name: &str, entry: &Entry) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.started,
        "owned_by": "kvbm",
        "max_model_len": entry.context_length,
    })
}

fn upstream_object(app: &App, name: &str) -> Value {
    json!({ "id": name, "object": "model", "created": app.started, "owned_by": "upstream" })
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let view = app.fleet.view();
    let mut models: Vec<String> = view.models().map(|(name, _)| name.clone()).collect();
    models.extend(app.upstreams.models().into_iter().filter(|name| view.entry(name).is_none()));
    let (workers, upstreams) = (app.fleet.health(), app.upstreams.health());
    if models.is_empty() {
        let reason = if workers.is_empty() { "no worker is known" } else { "no worker is ready" };
        let body = json!({
            "status": "unhealthy", "message": "No endpoints available", "reason": reason, "workers": workers,
            "upstreams": upstreams,
        });
        return (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response();
    }
    let body = json!({ "status": "healthy", "models": models, "workers": workers, "upstreams": upstreams });
    Json(body).into_response()
}

async fn live(State(app): State<Arc<App>>) -> Response {
    if app.stop.is_cancelled() {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "status": "draining" }))).into_response();
    }
    Json(json!({ "status": "live" })).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    app.routing.refresh(app.knowledge.blocks(), &app.fleet.loads());
    let view = app.fleet.view();
    app.metrics.set_models(view.models().map(|(name, entry)| (name.as_str(), entry.context_length)));
    match app.metrics.text() {
        Ok(text) => {
            let content_type = HeaderValue::from_static("text/plain; version=0.0.4");
            ([(header::CONTENT_TYPE, content_type)], text).into_response()
        }
        Err(error) => ApiError::internal(format!("The metrics cannot be written: {error}.")).into_response(),
    }
}
