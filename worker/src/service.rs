//! `kvbm.v1.Worker`: what a request says, checked and handed to the engine.

use std::path::PathBuf;
use std::sync::Arc;

use kvbm_connector::Tenants;
use kvbm_hash::{BaseNamespace, RetentionConfig};
use kvbm_proto::v1::guide::Kind;
use kvbm_proto::v1::worker_server::Worker;
use kvbm_proto::v1::{DescribeReply, DescribeRequest, GenerateRequest, TraceContext};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};
use tracing::field::Empty;
use tracing::{Span, info_span};

use crate::answer::{Answer, status};
use crate::settings::Lora;
use crate::{Eos, Grammar, Guide, Guides, Handle, Limits, RequestId, Sampling};

/// Longest name of a tenant, bytes.
const TENANT_BYTES_MAX: usize = 256;

/// See the module.
pub(crate) struct Service {
    pub handle: Handle,
    pub limits: Limits,
    pub guides: Arc<Guides>,
    pub base: BaseNamespace,
    pub description: Description,
    pub lora: Lora,
    /// Whose the namespaces are.
    pub tenants: Tenants,
    /// Of requests that say nothing.
    pub retention: Option<RetentionConfig>,
    /// Cancelled when no more requests are taken.
    pub draining: CancellationToken,
    /// Holds a token for each answer under way.
    pub running: TaskTracker,
}

/// What the worker says about itself.
#[derive(Debug, Clone)]
pub(crate) struct Description {
    pub worker_id: String,
    pub model: String,
    pub model_path: PathBuf,
    pub eos_token_ids: Vec<u32>,
    pub role: String,
}

impl Service {
    fn request(&self, id: RequestId, message: GenerateRequest) -> Result<crate::Request, Status> {
        if !message.lora.is_empty() && self.lora == Lora::Refused {
            return Err(Status::invalid_argument("lora: this worker serves no adapters"));
        }
        for (field, is_set) in [
            ("dp_rank", message.dp_rank.is_some()),
            ("logits_processors", !message.logits_processors.is_empty()),
            ("multimodal", !message.multimodal.is_empty()),
        ] {
            if is_set {
                return Err(Status::invalid_argument(format!("{field}: this worker has no such thing")));
            }
        }
        if message.tenant.len() > TENANT_BYTES_MAX {
            let detail = format!(
                "tenant: has {} bytes, at most {TENANT_BYTES_MAX} are permitted",
                message.tenant.len()
            );
            return Err(Status::invalid_argument(detail));
        }
        let text = |text: &'_ String| Some(text.clone()).filter(|text| !text.is_empty());
        let namespace = self
            .base
            .namespace(text(&message.lora).as_deref(), text(&message.cache_salt).as_deref())
            .of_tenant(&message.tenant);
        let retention = match &message.retention {
            Some(said) => Some(RetentionConfig::try_from(said).map_err(|error| {
                Status::invalid_argument(format!("retention.{}: {}", error.field, error.reason))
            })?),
            None => self.retention.clone(),
        };
        let request = crate::Request {
            id,
            namespace,
            prompt: message.prompt,
            generated: message.generated,
            guide: None,
            sampling: sampling(message.sampling.unwrap_or_default())?,
            max_tokens: message.max_tokens as usize,
            eos: if message.ignore_eos { Eos::Ignored } else { Eos::Ends },
            stop_token_ids: message.stop_token_ids,
            retention,
            span: Span::none(),
        };
        self.limits.check(&request).map_err(|refusal| status(&refusal))?;
        if !message.tenant.is_empty() {
            self.tenants.name(namespace, &message.tenant);
        }
        Ok(request)
    }
}

impl Service {
    /// Made on a thread that may take its time.
    async fn guide(&self, grammar: Grammar) -> Result<Guide, Status> {
        let guides = self.guides.clone();
        let made = tokio::task::spawn_blocking(move || guides.guide(&grammar)).await;
        let made = made.map_err(|error| Status::internal(format!("make the guide: {error}")))?;
        made.map_err(|detail| Status::invalid_argument(format!("guide: {detail}")))
    }
}

#[tonic::async_trait]
impl Worker for Service {
    type GenerateStream = Answer;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Answer>, Status> {
        // Counted first: whoever drains waits for it, or it sees the draining.
        let running = self.running.token();
        if self.draining.is_cancelled() {
            return Err(Status::unavailable("the worker is draining"));
        }
        let id = self.handle.next_id();
        let message = request.into_inner();
        tracing::debug!(request_id = message.request_id, prompt_tokens = message.prompt.len(), "request");
        let span = message.trace.as_ref().map_or_else(Span::none, |trace| span(&message.request_id, trace));
        let grammar = message.guide.clone().map(grammar).transpose()?;
        let mut request = self.request(id, message)?;
        if let Some(grammar) = grammar {
            request.guide = Some(self.guide(grammar).await?);
        }
        request.span = span;
        let events = self.handle.submit(request).map_err(|refusal| status(&refusal))?;
        Ok(Response::new(Answer::new(events, self.handle.clone(), id, running)))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeReply>, Status> {
        let Description { worker_id, model, model_path, eos_token_ids, role } = self.description.clone();
        Ok(Response::new(DescribeReply {
            worker_id,
            model,
            model_path: model_path.display().to_string(),
            context_length: size(self.limits.context_length),
            tokens_per_block: size(self.limits.tokens_per_block),
            vocab_size: size(self.limits.vocab_size),
            eos_token_ids,
            role,
            state: if self.draining.is_cancelled() { "draining" } else { "ready" }.into(),
            pid: std::process::id(),
            base_namespace: self.base.0.to_vec(),
        }))
    }
}

/// From here to the last token.
fn span(request_id: &str, trace: &TraceContext) -> Span {
    let span = info_span!(
        "generate",
        request_id,
        prompt_tokens = Empty,
        device_tokens = Empty,
        host_tokens = Empty,
        disk_tokens = Empty,
        completion_tokens = Empty,
    );
    kvbm_telemetry::follow(&span, trace);
    span
}

fn size(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn sampling(message: kvbm_proto::v1::Sampling) -> Result<Sampling, Status> {
    let count = |count: Option<u32>| count.map(|count| count as usize);
    Ok(Sampling {
        temperature: message.temperature,
        seed: message.seed.map_or_else(random_seed, Ok)?,
        top_p: message.top_p.unwrap_or(1.0),
        top_k: message.top_k as usize,
        min_p: message.min_p,
        repetition_penalty: message.repetition_penalty.unwrap_or(1.0),
        presence_penalty: message.presence_penalty,
        frequency_penalty: message.frequency_penalty,
        logit_bias: message.logit_bias.iter().map(|entry| (entry.token, entry.bias)).collect(),
        min_tokens: message.min_tokens as usize,
        logprobs: count(message.logprobs),
        prompt_logprobs: count(message.prompt_logprobs),
    })
}

fn grammar(message: kvbm_proto::v1::Guide) -> Result<Grammar, Status> {
    match message.kind {
        Some(Kind::JsonSchema(text)) => Ok(Grammar::JsonSchema(text)),
        Some(Kind::Regex(text)) => Ok(Grammar::Regex(text)),
        Some(Kind::Lark(text)) => Ok(Grammar::Lark(text)),
        Some(Kind::Choice(choices)) => Ok(Grammar::Choice(choices.texts)),
        None => Err(Status::invalid_argument("guide: says nothing")),
    }
}

fn random_seed() -> Result<u64, Status> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Status::internal(format!("draw a seed: {error}")))?;
    Ok(u64::from_le_bytes(bytes))
}
