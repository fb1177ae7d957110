//! From a request's body to generations that have come to their first token.

use std::sync::Arc;

use axum::extract::Request;
use futures_util::future::try_join_all;
use http::HeaderMap;
use kvbm_proto::v1::{GenerateRequest, Sampling, TraceContext};
use tokio::time::Instant;

use super::body;
use super::routes::App;
use super::source::Source;
use crate::fleet::Entry;
use crate::generation::Generation;
use crate::metrics::{Api, RequestRecord};
use crate::model::Model;
use crate::openai::{ApiError, Options, Parameters, tenant};
use crate::router::{Dispatch, Wish};

/// Tokens that a completion gets when it does not say.
const COMPLETION_TOKENS: u32 = 16;

/// A request whose answer can begin.
pub struct Prepared {
    pub options: Options,
    /// One per prompt, in order.
    pub generations: Vec<Generation>,
}

/// Everything that can fail with a status of its own.
pub async fn prepare(
    app: &App,
    api: Api,
    id: &str,
    record: &mut RequestRecord,
    request: Request,
) -> Result<Prepared, ApiError> {
    let deadline = app.router.deadline();
    let (head, body) = request.into_parts();
    let body = body::read(&head.headers, body, app.body_limit_bytes).await?;
    let parameters = Parameters::parse(&body)?;
    drop(body);
    let mut options = Options::of(&parameters)?;
    record.set_stream(options.stream);
    let tenant = tenant(&head.headers, options.tenant.take())?;
    let source = Source::of(api, parameters)?;
    let entry = app.router.resolve(&options.model, deadline).await?;
    let token_lists = source.encode(&entry).await?;
    record.set_model(entry.metrics.clone(), token_lists.iter().map(Vec::len).sum());

    let stop_token_ids = stop_token_ids(&mut options, &entry.model);
    let template = GenerateRequest {
        sampling: Some(Sampling {
            temperature: options.temperature.unwrap_or_else(|| entry.model.temperature()),
            seed: options.seed,
        }),
        ignore_eos: options.ignore_eos,
        stop_token_ids,
        cache_salt: std::mem::take(&mut options.cache_salt),
        tenant,
        retention: options.retention.as_ref().map(Into::into),
        trace: trace(&head.headers),
        ..GenerateRequest::default()
    };
    let wish = Wish::of(&head.headers);
    let job = Job { app, api, options: &options, entry: &entry, template, wish, deadline };
    let opening =
        token_lists.into_iter().enumerate().map(|(index, tokens)| job.open(request_id(id, index), tokens));
    let generations = try_join_all(opening).await?;
    Ok(Prepared { options, generations })
}

/// Tokens that end the answer: the request's, and the model's unless they are to be ignored.
fn stop_token_ids(options: &mut Options, model: &Model) -> Vec<u32> {
    let mut ids = std::mem::take(&mut options.stop_token_ids);
    if !options.ignore_eos {
        ids.extend_from_slice(model.eos());
    }
    ids
}

/// What the prompts of one request have in common.
struct Job<'a> {
    app: &'a App,
    api: Api,
    options: &'a Options,
    entry: &'a Arc<Entry>,
    template: GenerateRequest,
    wish: Wish,
    deadline: Instant,
}

impl Job<'_> {
    async fn open(&self, request_id: String, prompt: Vec<u32>) -> Result<Generation, ApiError> {
        let mut request = GenerateRequest {
            request_id,
            max_tokens: self.max_tokens(prompt.len())?,
            prompt,
            ..self.template.clone()
        };
        if let Some(sampling) = &mut request.sampling
            && sampling.temperature > 0.0
        {
            // Drawn here: whoever goes on with the answer must draw as the first worker did.
            sampling.seed.get_or_insert_with(|| self.app.router.seed());
        }
        let dispatch = Arc::new(Dispatch {
            router: self.app.router.clone(),
            model: self.options.model.clone(),
            entry: self.entry.clone(),
            request,
            wish: self.wish.clone(),
        });
        let opened = dispatch.open(self.deadline).await?;
        Ok(Generation::new(opened, dispatch, self.options.stop.clone()))
    }

    /// What is asked for, as far as the context has room: `[0, prompt) [prompt, prompt + max_tokens) ... context`.
    fn max_tokens(&self, prompt_tokens: usize) -> Result<u32, ApiError> {
        let context_length = self.entry.context_length;
        let param = match self.api {
            Api::Completions => "prompt",
            Api::Chat => "messages",
        };
        let room = u32::try_from(prompt_tokens).ok().and_then(|prompt| context_length.checked_sub(prompt));
        match room {
            None | Some(0) => Err(ApiError::too_long(param, context_length, prompt_tokens, true)),
            Some(room) => Ok(match (self.options.max_tokens, self.api) {
                (Some(max_tokens), _) => max_tokens.min(room),
                (None, Api::Completions) => COMPLETION_TOKENS.min(room),
                (None, Api::Chat) => room,
            }),
        }
    }
}

fn request_id(id: &str, index: usize) -> String {
    if index == 0 { id.to_owned() } else { format!("{id}-{index}") }
}

fn trace(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let traceparent = text("traceparent")?;
    Some(TraceContext { traceparent, tracestate: text("tracestate").unwrap_or_default() })
}
