//! `kvbm.v1.Worker`: what a request says, checked and handed to the engine.

use std::path::PathBuf;

use kvbm_connector::Tenants;
use kvbm_hash::{BaseNamespace, RetentionConfig};
use kvbm_proto::v1::worker_server::Worker;
use kvbm_proto::v1::{DescribeReply, DescribeRequest, GenerateRequest};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use crate::answer::{Answer, status};
use crate::settings::Lora;
use crate::{Eos, Handle, Limits, RequestId, Sampling};

/// Longest name of a tenant, bytes.
const TENANT_BYTES_MAX: usize = 256;

/// See the module.
pub(crate) struct Service {
    pub handle: Handle,
    pub limits: Limits,
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
            sampling: sampling(message.sampling.unwrap_or_default())?,
            max_tokens: message.max_tokens as usize,
            eos: if message.ignore_eos { Eos::Ignored } else { Eos::Ends },
            stop_token_ids: message.stop_token_ids,
            retention,
        };
        self.limits.check(&request).map_err(|refusal| status(&refusal))?;
        if !message.tenant.is_empty() {
            self.tenants.name(namespace, &message.tenant);
        }
        Ok(request)
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
        let request = self.request(id, message)?;
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

fn size(value: usize) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn sampling(message: kvbm_proto::v1::Sampling) -> Result<Sampling, Status> {
    let temperature = message.temperature;
    if temperature == 0.0 {
        return Ok(Sampling::Greedy);
    }
    if !(temperature.is_finite() && temperature > 0.0) {
        let detail = format!("temperature: {temperature} is not 0 or a positive number");
        return Err(Status::invalid_argument(detail));
    }
    Ok(Sampling::Temperature { temperature, seed: message.seed.map_or_else(random_seed, Ok)? })
}

fn random_seed() -> Result<u64, Status> {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Status::internal(format!("draw a seed: {error}")))?;
    Ok(u64::from_le_bytes(bytes))
}
