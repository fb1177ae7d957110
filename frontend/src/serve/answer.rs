//! Answers one request: as a whole, or as a stream of events.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, header};
use kvbm_proto::v1::TraceContext;

use super::body;
use super::choice::Choice;
use super::event_stream::{EventStream, Timing};
use super::prepare::{Job, prepare};
use super::routes::App;
use crate::metrics::{Api, RequestRecord};
use crate::openai::{ApiError, CachedTokens, ChunkWriter, Said, Usage, answer_body};
use crate::request_id;

const CACHED_TOKENS_HEADER: &str = "x-kvbm-cached-tokens";
const ROUTE_HEADER: &str = "x-kvbm-route";

/// Serves a completion or a chat.
pub async fn answer(app: &Arc<App>, api: Api, request: Request) -> Response {
    let id = app.ids.of(request.headers());
    let mut record = RequestRecord::new(app.metrics.clone(), api, &id, trace(request.headers()));
    let request = match pass(app, request, record).await {
        Ok(mut response) => {
            name(&mut response, id);
            return response;
        }
        Err((request, same)) => {
            record = same;
            request
        }
    };
    let mut response = match prepare(app, api, &id, &mut record, request).await {
        Ok(job) if job.options.stream => streamed(app, api, &id, job, record).await,
        Ok(job) => {
            let whole = within(app.timing.request, whole(app, api, &id, &job, &mut record)).await;
            whole.unwrap_or_else(|error| failed(error, &mut record))
        }
        Err(error) => failed(error, &mut record),
    };
    name(&mut response, id);
    response
}

fn name(response: &mut Response, id: String) {
    // A client's id that made it here is printable.
    if let Ok(value) = HeaderValue::try_from(id) {
        response.headers_mut().insert(request_id::HEADER, value);
    }
}

/// What decides where a request goes.
#[derive(serde::Deserialize)]
struct Named {
    model: String,
    #[serde(default)]
    stream: Option<bool>,
}

/// The answer of another server, if the model is one of its own; else the request as it was.
async fn pass(
    app: &App,
    request: Request,
    mut record: RequestRecord,
) -> Result<Response, (Request, RequestRecord)> {
    if app.upstreams.is_empty() {
        return Err((request, record));
    }
    let (mut head, body) = request.into_parts();
    let body = match body::read(&head.headers, body, app.body_limit_bytes).await {
        Ok(body) => body,
        Err(error) => return Ok(failed(error, &mut record)),
    };
    let named = serde_json::from_slice::<Named>(&body).ok();
    let theirs =
        |named: &Named| app.fleet.entry(&named.model).is_none() && app.upstreams.serves(&named.model);
    let Some(named) = named.filter(theirs) else {
        return Err((Request::from_parts(head, Body::from(body)), record));
    };
    record.set_stream(named.stream.unwrap_or(false));
    record.set_model(app.metrics.model(&named.model), 0);
    // The other server's part of the trace is a part of this one's.
    if let Some(Ok(parent)) = record.trace().map(|trace| HeaderValue::try_from(trace.traceparent)) {
        head.headers.insert("traceparent", parent);
    }
    let path = head.uri.path();
    Ok(match app.upstreams.pass(&named.model, path, &head.headers, body, record).await {
        Ok(response) => response,
        Err((error, mut record)) => failed(error, &mut record),
    })
}

/// Where the first choice of an answer went, if that is to be told.
fn with_route<B>(mut response: Response<B>, app: &App, choices: &[Choice]) -> Response<B> {
    let choice = choices.first().filter(|_| app.router.config().debug_headers);
    if let Some(Ok(route)) = choice.map(|choice| HeaderValue::try_from(choice.route().to_string())) {
        response.headers_mut().insert(ROUTE_HEADER, route);
    }
    response
}

/// W3C trace context, as far as it can be handed on.
fn trace(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let traceparent = text("traceparent")?;
    Some(TraceContext { traceparent, tracestate: text("tracestate").unwrap_or_default() })
}

/// Gives up after a time, if there is one.
async fn within<T>(
    time: Option<Duration>,
    work: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ApiError> {
    match time {
        None => work.await,
        Some(time) => match tokio::time::timeout(time, work).await {
            Ok(result) => result,
            Err(_) => Err(ApiError::response_timeout(time)),
        },
    }
}

fn failed(error: ApiError, record: &mut RequestRecord) -> Response {
    record.fail(error.kind);
    error.into_response()
}

/// What fails before the first token has a status of its own, unless that takes so long that the connection has to be
/// kept alive.
async fn streamed(app: &Arc<App>, api: Api, id: &str, job: Job, mut record: RequestRecord) -> Response {
    let options = &job.options;
    let writer = ChunkWriter::new(api, &answer_id(api, id), now(), &options.model, options.include_usage);
    let include_usage = options.include_usage;
    let mut opening = Box::pin(async move { job.open().await });
    let timing = Timing::begin(&app.timing);
    let opened = match app.timing.first_token() {
        None => Ok(opening.as_mut().await),
        Some(time) => tokio::time::timeout(time, opening.as_mut()).await,
    };
    let mut response = match opened {
        Ok(Ok(choices)) => {
            let headers = with_cached(Response::new(()), cached(&choices));
            let headers = with_route(headers, app, &choices);
            let events = EventStream::of(choices, writer, include_usage, record, timing);
            headers.map(|()| Body::new(events))
        }
        Ok(Err(error)) => return failed(error, &mut record),
        Err(_) if timing.is_over() => {
            let time = app.timing.request.unwrap_or_default();
            return failed(ApiError::response_timeout(time), &mut record);
        }
        Err(_) => {
            Response::new(Body::new(EventStream::opening(opening, writer, include_usage, record, timing)))
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

async fn whole(
    app: &App,
    api: Api,
    id: &str,
    job: &Job,
    record: &mut RequestRecord,
) -> Result<Response, ApiError> {
    let mut choices = job.open().await?;
    let mut said: Vec<Said> = choices.iter().map(|_| Said::default()).collect();
    poll_fn(|cx| poll_all(&mut choices, &mut said, record, cx)).await?;
    let usage = usage(&choices);
    let scored = job.options.sampling.logprobs.is_some();
    let body = answer_body(api, &answer_id(api, id), now(), &job.options.model, &said, usage, scored)
        .map_err(|error| ApiError::internal(format!("The answer cannot be written: {error}.")))?;
    let cached = cached(&choices);
    record.succeed(usage.completion_tokens, cached.total());
    let response = with_cached(Response::new(Body::from(body)), cached);
    let mut response = with_route(response, app, &choices);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

fn poll_all(
    choices: &mut [Choice],
    said: &mut [Said],
    record: &mut RequestRecord,
    cx: &mut Context<'_>,
) -> Poll<Result<(), ApiError>> {
    let mut all = Poll::Ready(Ok(()));
    for (index, (choice, said)) in choices.iter_mut().zip(said).enumerate() {
        while !choice.is_finished() {
            match choice.poll(cx, &mut said.delta) {
                Poll::Pending => {
                    all = Poll::Pending;
                    break;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(progress)) => {
                    record.tokens(index, progress.tokens);
                    said.finish = progress.finish;
                }
            }
        }
    }
    all
}

fn with_cached<B>(mut response: Response<B>, cached: CachedTokens) -> Response<B> {
    if let Ok(value) = HeaderValue::try_from(cached.header()) {
        response.headers_mut().insert(CACHED_TOKENS_HEADER, value);
    }
    response
}

/// What the cache had of all prompts.
pub fn cached(choices: &[Choice]) -> CachedTokens {
    choices.iter().map(Choice::cached).fold(CachedTokens::default(), |sum, cached| sum + cached)
}

/// What all choices cost.
pub fn usage(choices: &[Choice]) -> Usage {
    let sum = |count: fn(&Choice) -> u32| choices.iter().map(count).fold(0, u32::saturating_add);
    Usage::new(sum(Choice::prompt_tokens), sum(Choice::completion_tokens), cached(choices))
}

fn answer_id(api: Api, id: &str) -> String {
    match api {
        Api::Completions => format!("cmpl-{id}"),
        Api::Chat => format!("chatcmpl-{id}"),
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}
