//! From a request's body to choices that have come to their first token.

use std::sync::Arc;

use axum::extract::Request;
use futures_util::future::try_join_all;
use kvbm_proto::v1::{self, GenerateRequest, LogitBias};
use tokio::time::Instant;

use super::body;
use super::choice::Choice;
use super::routes::App;
use super::source::Source;
use crate::fleet::Entry;
use crate::generation::{Echo, Frame, Generation};
use crate::metrics::{Api, RequestRecord};
use crate::model::Model;
use crate::openai::{ApiError, Options, Parameters, ToolChoice, tenant};
use crate::router::{Dispatch, Wish};
use crate::tools::{CallParser, Format};

/// Tokens that a completion gets when it does not say.
const COMPLETION_TOKENS: u32 = 16;
/// Most choices of all prompts of a request.
const CHOICES_MAX: usize = 128;

/// A request that was understood: what is left is to be answered.
pub struct Job {
    pub options: Options,
    app: Arc<App>,
    api: Api,
    id: String,
    entry: Arc<Entry>,
    prompts: Vec<Vec<u32>>,
    template: GenerateRequest,
    /// Of choices; `None`: tools are not called.
    format: Option<Format>,
    wish: Wish,
    deadline: Instant,
}

/// Everything that can be wrong with a request in itself.
pub async fn prepare(
    app: &Arc<App>,
    api: Api,
    id: &str,
    record: &mut RequestRecord,
    request: Request,
) -> Result<Job, ApiError> {
    let deadline = app.router.deadline();
    let (head, body) = request.into_parts();
    let body = body::read(&head.headers, body, app.body_limit_bytes).await?;
    let parameters = Parameters::parse(&body)?;
    drop(body);
    let mut options = Options::of(&parameters, api)?;
    record.set_stream(options.stream);
    let tenant = tenant(&head.headers, options.tenant.take())?;
    let source = Source::of(api, parameters, options.tools.as_ref())?;
    let entry = app.router.resolve(&options.model, deadline).await?;
    let format = app.tool_calls.or(entry.model.call_format());
    if options.tools.as_ref().is_some_and(|tools| tools.choice == ToolChoice::Auto) && format.is_none() {
        let message = "The chat template of this model knows no tools. Say which to call with 'tool_choice'.";
        return Err(ApiError::parameter("tools", message));
    }
    let encoding = Instant::now();
    let prompts = source.encode(&entry).await?;
    app.metrics.tokenized(encoding.elapsed());
    if prompts.len() * options.choices as usize > CHOICES_MAX {
        let message = format!("'n' times the number of prompts must not be above {CHOICES_MAX}.");
        return Err(ApiError::parameter("n", message));
    }
    record.set_model(entry.metrics.clone(), prompts.iter().map(Vec::len).sum());
    let template = template(&mut options, &entry.model, tenant, record.trace());
    let (app, id, wish) = (app.clone(), id.to_owned(), Wish::of(&head.headers));
    Ok(Job { options, app, api, id, entry, prompts, template, format, wish, deadline })
}

/// What the requests of all choices have in common.
fn template(
    options: &mut Options,
    model: &Model,
    tenant: String,
    trace: Option<v1::TraceContext>,
) -> GenerateRequest {
    let (sampling, defaults) = (&options.sampling, model.defaults());
    let bias = |(&token, &bias): (&u32, &f32)| LogitBias { token, bias };
    GenerateRequest {
        sampling: Some(v1::Sampling {
            temperature: sampling.temperature.or(defaults.temperature).unwrap_or(1.0),
            seed: sampling.seed,
            top_p: sampling.top_p.or(defaults.top_p),
            top_k: sampling.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: sampling.min_p.or(defaults.min_p).unwrap_or(0.0),
            repetition_penalty: sampling.repetition_penalty.or(defaults.repetition_penalty),
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            logit_bias: sampling.logit_bias.iter().map(bias).collect(),
            min_tokens: sampling.min_tokens,
            logprobs: sampling.logprobs,
            prompt_logprobs: sampling.logprobs.filter(|_| options.echo),
        }),
        guide: options.guide().map(|guided| guided.message()),
        ignore_eos: options.ignore_eos,
        stop_token_ids: stop_token_ids(options, model),
        cache_salt: std::mem::take(&mut options.cache_salt),
        lora: std::mem::take(&mut options.lora),
        tenant,
        retention: options.retention.as_ref().map(Into::into),
        trace,
        ..GenerateRequest::default()
    }
}

/// Tokens that end the answer: the request's, and the model's unless they are to be ignored.
fn stop_token_ids(options: &mut Options, model: &Model) -> Vec<u32> {
    let mut ids = std::mem::take(&mut options.stop_token_ids);
    if !options.ignore_eos {
        ids.extend_from_slice(model.eos());
    }
    ids
}

impl Job {
    /// Opens all choices, in order of the prompts. The first choice of a prompt comes to its first token before the
    /// others begin, which so find the prompt's KV.
    pub async fn open(&self) -> Result<Vec<Choice>, ApiError> {
        let prompts = self.prompts.iter().enumerate().map(|(at, prompt)| async move {
            // Drawn here: whoever goes on with an answer must draw as its first worker did.
            let seed = self.options.sampling.seed.unwrap_or_else(|| self.app.router.seed());
            let mut choices = vec![self.open_choice(at, 0, prompt, seed).await?];
            let others =
                (1..self.options.choices as usize).map(|number| self.open_choice(at, number, prompt, seed));
            choices.extend(try_join_all(others).await?);
            Ok(choices)
        });
        Ok(try_join_all(prompts).await?.into_iter().flatten().collect())
    }

    async fn open_choice(
        &self,
        at: usize,
        number: usize,
        prompt: &[u32],
        seed: u64,
    ) -> Result<Choice, ApiError> {
        let index = at * self.options.choices as usize + number;
        let mut request = GenerateRequest {
            request_id: request_id(&self.id, index),
            max_tokens: self.max_tokens(prompt.len())?.max(1),
            prompt: prompt.to_vec(),
            ..self.template.clone()
        };
        if let Some(sampling) = &mut request.sampling {
            // Choices of one prompt differ, and are the same again with the same seed.
            sampling.seed = Some(seed.wrapping_add(number as u64));
        }
        let dispatch = Arc::new(Dispatch {
            router: self.app.router.clone(),
            model: self.options.model.clone(),
            entry: self.entry.clone(),
            request,
            wish: self.wish.clone(),
        });
        let opened = dispatch.open(self.deadline).await.map_err(|error| self.named(error))?;
        let frame = Frame { stop: self.options.stop.clone(), echo: self.echo() };
        let generation = Generation::new(opened, dispatch, frame);
        let calls = self.options.tools.as_ref().map(|tools| CallParser::new(&tools.choice, self.format));
        Ok(Choice::new(generation, calls, number))
    }

    /// An error of a worker, with the parameter that it is about.
    fn named(&self, error: ApiError) -> ApiError {
        let guided = self.options.guide().map_or("response_format", |guided| guided.parameter);
        error.of_worker(guided)
    }

    fn echo(&self) -> Echo {
        let nothing_else = self.options.max_tokens == Some(0);
        match (self.options.echo, self.options.sampling.logprobs.is_some()) {
            (false, _) => Echo::No,
            (true, false) if nothing_else => Echo::PromptOnly,
            (true, true) if nothing_else => Echo::ScoredOnly,
            (true, false) => Echo::Prompt,
            (true, true) => Echo::Scored,
        }
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
                (None, Api::Completions) => COMPLETION_TOKENS.max(self.options.sampling.min_tokens).min(room),
                (None, Api::Chat) => room,
            }),
        }
    }
}

fn request_id(id: &str, index: usize) -> String {
    if index == 0 { id.to_owned() } else { format!("{id}-{index}") }
}
