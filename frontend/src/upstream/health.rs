//! Looks at a server's models, for ever.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::Request;
use http_body_util::{BodyExt, Limited};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::{Upstream, Upstreams};

/// Pause between looks, and how long one may take.
const PAUSE: Duration = Duration::from_secs(2);
const DEADLINE: Duration = Duration::from_secs(2);
/// Largest list of models, bytes.
const LIST_BYTES_MAX: usize = 4 << 20;

#[derive(Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    id: String,
}

/// Ends only by being dropped.
pub async fn watch(upstreams: Arc<Upstreams>, upstream: Arc<Upstream>) {
    let mut last_reason = None;
    loop {
        let looked = timeout(DEADLINE, look(&upstreams, &upstream)).await;
        match looked.unwrap_or_else(|_| Err(format!("no answer within {DEADLINE:?}"))) {
            Ok(models) => {
                if last_reason != Some(String::new()) {
                    tracing::info!(url = %upstream.url, ?models, "upstream is ready");
                    last_reason = Some(String::new());
                }
                upstream.is_up(models);
            }
            Err(reason) => {
                if last_reason.as_ref() != Some(&reason) {
                    tracing::warn!(url = %upstream.url, reason, "upstream cannot be used, trying on");
                    last_reason = Some(reason.clone());
                }
                upstream.is_down(reason);
            }
        }
        sleep(PAUSE).await;
    }
}

async fn look(upstreams: &Upstreams, upstream: &Upstream) -> Result<BTreeSet<String>, String> {
    let uri = upstream.url.at("/v1/models").ok_or("its URL is none")?;
    let request = Request::get(uri).body(Body::empty()).map_err(|error| error.to_string())?;
    let response = upstreams.client.request(request).await.map_err(|error| error.to_string())?;
    let status = response.status();
    if !status.is_success() {
        return Err(format!("/v1/models is answered {status}"));
    }
    let body = Limited::new(response.into_body(), LIST_BYTES_MAX).collect().await;
    let body = body.map_err(|error| error.to_string())?.to_bytes();
    let models: Models = serde_json::from_slice(&body)
        .map_err(|error| format!("/v1/models is no list of models ({error})"))?;
    Ok(models.data.into_iter().map(|model| model.id).collect())
}
