//! Reads the body of a request, within limits of size and time.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, header};
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::time::timeout;

use crate::openai::ApiError;

const DEADLINE: Duration = Duration::from_secs(60);

/// How much, and for how long, of a body that is too large is read and thrown away. Most clients do not look for an
/// answer before they have sent everything, and would see a reset connection instead of it.
const DISCARD_BYTES_MAX: usize = 1 << 30;
const DISCARD_DEADLINE: Duration = Duration::from_secs(10);

/// The whole body. One that announces, or turns out, to be too large is never held in memory.
pub async fn read(headers: &HeaderMap, mut body: Body, limit_bytes: usize) -> Result<Bytes, ApiError> {
    let announced = body.size_hint().lower();
    if announced > limit_bytes as u64 {
        // A client that asks first has sent nothing yet; reading would make it send.
        if !headers.contains_key(header::EXPECT) {
            discard(body).await;
        }
        return Err(ApiError::body_too_large(limit_bytes));
    }
    match timeout(DEADLINE, collect(&mut body, limit_bytes)).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => {
            discard(body).await;
            Err(ApiError::body_too_large(limit_bytes))
        }
        Ok(Err(error)) => Err(ApiError::request(format!("The request body could not be read: {error}."))),
        Err(_) => Err(ApiError::body_timeout(DEADLINE.as_secs())),
    }
}

/// `None`: too large.
async fn collect(body: &mut Body, limit_bytes: usize) -> Result<Option<Bytes>, axum::Error> {
    let mut first = Bytes::new();
    let mut all = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else { continue };
        if first.len() + all.len() + data.len() > limit_bytes {
            return Ok(None);
        }
        if first.is_empty() && all.is_empty() {
            first = data;
            continue;
        }
        if all.is_empty() {
            all.reserve((body.size_hint().lower() as usize).min(limit_bytes) + first.len() + data.len());
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&data);
    }
    Ok(Some(if all.is_empty() { first } else { all.freeze() }))
}

async fn discard(mut body: Body) {
    let reading = async {
        let mut discarded = 0;
        while let Some(Ok(frame)) = body.frame().await {
            discarded += frame.data_ref().map_or(0, Bytes::len);
            if discarded > DISCARD_BYTES_MAX {
                break;
            }
        }
    };
    // Out of time or not, the answer is the same.
    let _ = timeout(DISCARD_DEADLINE, reading).await;
}
