//! Passes a request to one of the servers of its model, and the answer back.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::{HeaderMap, HeaderName, Request, StatusCode, header};
use http_body::Frame;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use super::{Upstream, Upstreams};
use crate::metrics::RequestRecord;
use crate::openai::{ApiError, ErrorKind};
use crate::router::Burden;

/// Servers tried for one request, at most.
const ATTEMPTS_MAX: usize = 4;

/// What of a request's head is passed on, and of an answer's.
const REQUEST_HEADERS: [&str; 6] =
    ["authorization", "content-type", "accept", "traceparent", "tracestate", "x-request-id"];
const ANSWER_HEADERS: [HeaderName; 3] = [header::CONTENT_TYPE, header::CACHE_CONTROL, header::RETRY_AFTER];

impl Upstreams {
    /// The answer of a server that has begun to give one. `record` is finished with it.
    pub async fn pass(
        &self,
        model: &str,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
        mut record: RequestRecord,
    ) -> Result<Response, (ApiError, RequestRecord)> {
        let mut reason = "those that serve it are left alone for a while".to_owned();
        let ready = self.of(model).into_iter().filter(|upstream| upstream.lets_through());
        for upstream in ready.take(ATTEMPTS_MAX) {
            let burden = Burden::new(&upstream.load, 0);
            match self.ask(&upstream, path, headers, body.clone()).await {
                Ok(Begun { mut response, first, rest }) => {
                    upstream.succeeded();
                    record.begin();
                    let passed = Passed { first, rest, burden, record: Some(record) };
                    *response.body_mut() = Body::new(passed);
                    return Ok(response);
                }
                Err(error) => {
                    tracing::info!(url = %upstream.url, error, "an upstream failed before it answered");
                    upstream.failed();
                    reason = format!("{}: {error}", upstream.url);
                }
            }
        }
        Err((ApiError::no_worker(model, &reason), record))
    }

    async fn ask(
        &self,
        upstream: &Upstream,
        path: &str,
        headers: &HeaderMap,
        body: Bytes,
    ) -> Result<Begun, String> {
        let uri = upstream.url.at(path).ok_or("its URL is none")?;
        let mut request = Request::post(uri).body(Body::from(body)).map_err(|error| error.to_string())?;
        for name in REQUEST_HEADERS {
            if let Some(value) = headers.get(name) {
                request.headers_mut().insert(name, value.clone());
            }
        }
        let answer = self.client.request(request).await.map_err(|error| error.to_string())?;
        let (head, mut rest) = answer.into_parts();
        // Of the server, not of the request: another may do better.
        if head.status.is_server_error() || head.status == StatusCode::TOO_MANY_REQUESTS {
            return Err(format!("it answered {}", head.status));
        }
        let first = match rest.frame().await {
            None => None,
            Some(frame) => Some(frame.map_err(|error| format!("its answer broke off: {error}"))?),
        };
        let mut response = Response::new(Body::empty());
        *response.status_mut() = head.status;
        for name in ANSWER_HEADERS {
            if let Some(value) = head.headers.get(&name) {
                response.headers_mut().insert(name, value.clone());
            }
        }
        Ok(Begun { response, first, rest })
    }
}

/// An answer of which something has come.
struct Begun {
    response: Response,
    first: Option<Frame<Bytes>>,
    rest: Incoming,
}

/// The body of an answer on its way through.
struct Passed {
    first: Option<Frame<Bytes>>,
    rest: Incoming,
    #[expect(dead_code, reason = "it counts for as long as it is there")]
    burden: Burden,
    /// Until the end.
    record: Option<RequestRecord>,
}

impl http_body::Body for Passed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        let frame = ready!(Pin::new(&mut this.rest).poll_frame(cx));
        match (&frame, &mut this.record) {
            (None, Some(record)) => record.pass(),
            (Some(Err(_)), Some(record)) => record.fail(ErrorKind::Unavailable),
            _ => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        false
    }
}
