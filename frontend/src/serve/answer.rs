//! Answers one request: as a whole, or as a stream of events.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, header};

use super::body;
use super::event_stream::EventStream;
use super::prepare::{Prepared, prepare};
use super::routes::App;
use crate::generation::Generation;
use crate::metrics::{Api, RequestRecord};
use crate::openai::{ApiError, CachedTokens, ChunkWriter, Finish, Usage, answer_body};
use crate::request_id;

const CACHED_TOKENS_HEADER: &str = "x-kvbm-cached-tokens";
const ROUTE_HEADER: &str = "x-kvbm-route";

/// Serves a completion or a chat.
pub async fn answer(app: &App, api: Api, request: Request) -> Response {
    let id = app.ids.of(request.headers());
    let mut record = RequestRecord::new(app.metrics.clone(), api);
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
        Ok(prepared) => {
            let route = route(app, &prepared.generations);
            let mut response = match prepared.options.stream {
                true => streamed(api, &id, prepared, record),
                false => match whole(api, &id, prepared, &mut record).await {
                    Ok(response) => response,
                    Err(error) => failed(error, &mut record),
                },
            };
            if let Some(route) = route {
                response.headers_mut().insert(ROUTE_HEADER, route);
            }
            response
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
    let (head, body) = request.into_parts();
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
    let path = head.uri.path();
    Ok(match app.upstreams.pass(&named.model, path, &head.headers, body, record).await {
        Ok(response) => response,
        Err((error, mut record)) => failed(error, &mut record),
    })
}

/// Where the first prompt of a request went, if that is to be told.
fn route(app: &App, generations: &[Generation]) -> Option<HeaderValue> {
    let generation = generations.first().filter(|_| app.router.config().debug_headers)?;
    HeaderValue::try_from(generation.route().to_string()).ok()
}

fn failed(error: ApiError, record: &mut RequestRecord) -> Response {
    record.fail(error.kind);
    error.into_response()
}

fn streamed(api: Api, id: &str, prepared: Prepared, record: RequestRecord) -> Response {
    let Prepared { options, generations } = prepared;
    let writer = ChunkWriter::new(api, &answer_id(api, id), now(), &options.model, options.include_usage);
    let cached = cached(&generations);
    let events = EventStream::new(generations, writer, options.include_usage, record);
    let mut response = with_cached(Response::new(Body::new(events)), cached);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    response
}

async fn whole(
    api: Api,
    id: &str,
    prepared: Prepared,
    record: &mut RequestRecord,
) -> Result<Response, ApiError> {
    let Prepared { options, mut generations } = prepared;
    let mut choices: Vec<(String, Option<Finish>)> = vec![(String::new(), None); generations.len()];
    poll_fn(|cx| poll_all(&mut generations, &mut choices, record, cx)).await?;
    let finished = choices.into_iter().map(|(text, finish)| (text, finish.unwrap_or(Finish::Stop)));
    let choices: Vec<(String, Finish)> = finished.collect();
    let usage = usage(&generations);
    let body = answer_body(api, &answer_id(api, id), now(), &options.model, &choices, usage)
        .map_err(|error| ApiError::internal(format!("The answer cannot be written: {error}.")))?;
    let cached = cached(&generations);
    record.succeed(usage.completion_tokens, cached.total());
    let mut response = with_cached(Response::new(Body::from(body)), cached);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

fn poll_all(
    generations: &mut [Generation],
    choices: &mut [(String, Option<Finish>)],
    record: &mut RequestRecord,
    cx: &mut Context<'_>,
) -> Poll<Result<(), ApiError>> {
    let mut all = Poll::Ready(Ok(()));
    for (generation, (text, finish)) in generations.iter_mut().zip(choices) {
        while !generation.is_finished() {
            match generation.poll(cx, text) {
                Poll::Pending => {
                    all = Poll::Pending;
                    break;
                }
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(progress)) => {
                    record.tokens(progress.tokens);
                    *finish = progress.finish;
                }
            }
        }
    }
    all
}

fn with_cached(mut response: Response, cached: CachedTokens) -> Response {
    if let Ok(value) = HeaderValue::try_from(cached.header()) {
        response.headers_mut().insert(CACHED_TOKENS_HEADER, value);
    }
    response
}

/// What the cache had of all prompts.
pub fn cached(generations: &[Generation]) -> CachedTokens {
    generations.iter().map(Generation::cached).fold(CachedTokens::default(), |sum, cached| sum + cached)
}

/// What all choices cost.
pub fn usage(generations: &[Generation]) -> Usage {
    let sum = |count: fn(&Generation) -> u32| generations.iter().map(count).fold(0, u32::saturating_add);
    Usage::new(sum(Generation::prompt_tokens), sum(Generation::completion_tokens), cached(generations))
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
