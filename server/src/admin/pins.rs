//! Pins over HTTP: `POST /pins`, `GET /pins`, `DELETE /pins/{id}`.
//!
//! What changes something is open on loopback and nowhere else, unless there is a token: then it is demanded always.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::{delete, get};
use kvbm::{NamespaceId, PinId};
use kvbm_hash::SequenceHash;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::core::Core;
use crate::rights::{self, Blocks, By, NamespaceName, PIN_BLOCKS_MAX, RightsError};

/// Bytes of a request: a key takes 35 as JSON.
const BODY_BYTES_MAX: usize = PIN_BLOCKS_MAX * 40 + 4096;

pub(super) fn routes() -> Router<Arc<Core>> {
    Router::new()
        .route("/pins", get(list).post(pin))
        .route("/pins/{id}", delete(unpin))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
}

/// The body of `POST /pins`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PinBody {
    namespace: Option<u32>,
    model: Option<String>,
    prefix: Option<Vec<String>>,
    keys: Option<Vec<String>>,
    duration_s: f64,
}

#[derive(Debug, Serialize)]
struct PinAnswer {
    id: u64,
    blocks: std::collections::BTreeMap<&'static str, usize>,
    bytes: u64,
    missing: usize,
}

async fn list(State(core): State<Arc<Core>>) -> Response {
    Json(json!({ "pins": crate::inventory::pins(&core) })).into_response()
}

async fn pin(
    State(core): State<Arc<Core>>,
    headers: HeaderMap,
    body: Result<Json<PinBody>, JsonRejection>,
) -> Response {
    if let Err((code, why)) = may_change(&core, &headers) {
        return fail(code, why);
    }
    let body = match body {
        Ok(Json(body)) => body,
        Err(rejection) => return fail(rejection.status(), &rejection.body_text()),
    };
    let pinned = read(body).and_then(|(name, blocks, lifetime)| {
        rights::pin(&core, By::Operator, &name, blocks.what(), lifetime)
    });
    match pinned {
        Ok(pinned) => {
            let blocks = pinned.blocks_by_tier.iter().map(|(tier, blocks)| (tier.name(), *blocks)).collect();
            let answer = PinAnswer { id: pinned.id.0, blocks, bytes: pinned.bytes, missing: pinned.missing };
            (StatusCode::CREATED, Json(answer)).into_response()
        }
        Err(error) => fail(error.http(), &error.to_string()),
    }
}

async fn unpin(State(core): State<Arc<Core>>, headers: HeaderMap, Path(id): Path<String>) -> Response {
    if let Err((code, why)) = may_change(&core, &headers) {
        return fail(code, why);
    }
    let Ok(number) = id.parse() else {
        return fail(StatusCode::BAD_REQUEST, &format!("id: {id:?} is not a number"));
    };
    match rights::unpin(&core, By::Operator, PinId(number)) {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => fail(error.http(), &error.to_string()),
    }
}

/// Where the server listens decides, not who is at the other end: a proxy is on loopback for everybody.
fn may_change(core: &Core, headers: &HeaderMap) -> Result<(), (StatusCode, &'static str)> {
    if core.stopping.is_cancelled() {
        return Err((StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping"));
    }
    let shown = headers.get(header::AUTHORIZATION);
    match &core.admin_token {
        Some(token) if shown.is_some_and(|header| token.is_in(header.as_bytes())) => Ok(()),
        Some(_) => Err((
            StatusCode::UNAUTHORIZED,
            "the token is missing or wrong: send `authorization: Bearer TOKEN`, the token of admin_token_file",
        )),
        None if core.config.metrics_host.is_loopback() => Ok(()),
        None => Err((
            StatusCode::FORBIDDEN,
            "without a token nothing is changed over HTTP but on loopback: set admin_token_file, or use `kvbm pin` \
             on the node",
        )),
    }
}

fn fail(code: StatusCode, why: &str) -> Response {
    (code, Json(json!({ "error": why }))).into_response()
}

fn read(body: PinBody) -> Result<(NamespaceName, Blocks, Duration), RightsError> {
    let one_of = |field, reason: &str| RightsError::Invalid { field, reason: reason.to_owned() };
    let name = match (body.namespace, body.model) {
        (Some(id), None) => NamespaceName::Id(NamespaceId(id)),
        (None, Some(model)) => NamespaceName::Model(model),
        _ => return Err(one_of("namespace", "name either a namespace's id or a model")),
    };
    let what = match (body.prefix, body.keys) {
        (Some(prefix), None) => Blocks::Prefix(hashes("prefix", &prefix)?),
        (None, Some(keys)) => Blocks::Keys(hashes("keys", &keys)?),
        _ => return Err(one_of("prefix", "give either a prefix or keys")),
    };
    let lifetime = Duration::try_from_secs_f64(body.duration_s)
        .map_err(|_| one_of("duration_s", "a number of seconds above 0 is permitted"))?;
    Ok((name, what, lifetime))
}

fn hashes(field: &'static str, keys: &[String]) -> Result<Vec<SequenceHash>, RightsError> {
    let key = |(position, text): (usize, &String)| {
        let bytes = bytes_of(text);
        bytes.map(SequenceHash).ok_or_else(|| RightsError::Invalid {
            field,
            reason: format!("[{position}] is {text:?}; 32 hexadecimal digits are permitted"),
        })
    };
    keys.iter().enumerate().map(key).collect()
}

fn bytes_of(text: &str) -> Option<[u8; 16]> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_32_digits() {
        assert_eq!(bytes_of("000102030405060708090a0b0c0d0eFF").unwrap()[15], 0xFF);
        for text in ["", "00", "+00102030405060708090a0b0c0d0eff", "g00102030405060708090a0b0c0d0eff"] {
            assert_eq!(bytes_of(text), None, "{text}");
        }
    }

    #[test]
    fn a_body_names_one_namespace_one_way_and_a_time() {
        let body = || PinBody {
            namespace: Some(1),
            model: None,
            prefix: Some(vec!["0".repeat(32)]),
            keys: None,
            duration_s: 1.5,
        };
        assert_eq!(read(body()).unwrap().2, Duration::from_millis(1500));
        let wrong = [
            PinBody { namespace: None, ..body() },
            PinBody { model: Some("m".into()), ..body() },
            PinBody { prefix: None, ..body() },
            PinBody { keys: Some(vec![]), ..body() },
            PinBody { duration_s: -1.0, ..body() },
            PinBody { prefix: Some(vec!["x".into()]), ..body() },
        ];
        wrong.into_iter().for_each(|body| assert!(read(body).is_err()));
    }
}
