//! Talks to a worker: tokens in, tokens out.

use std::path::Path;
use std::sync::Arc;

use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::worker_client::WorkerClient as Generated;
use kvbm_proto::v1::{GenerateRequest, Logprobs, Sampling};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

/// What a worker answered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Generated tokens.
    pub tokens: Vec<u32>,
    /// Of each of them, if asked for.
    pub logprobs: Vec<Logprobs>,
    /// Prompt tokens found in the worker's pool.
    pub device: u32,
    /// Prompt tokens found in host memory.
    pub host: u32,
    /// Prompt tokens found on disk.
    pub disk: u32,
}

/// Blocking client; clones share the connection.
#[derive(Debug, Clone)]
pub struct WorkerClient {
    runtime: Arc<Runtime>,
    client: Generated<Channel>,
}

impl WorkerClient {
    /// Connects, when needed.
    pub fn connect(socket: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let endpoint = Endpoint::try_from(format!("unix:{}", socket.display())).unwrap();
        let client = {
            let _guard = runtime.enter();
            Generated::new(endpoint.connect_lazy())
        };
        Self { runtime: Arc::new(runtime), client }
    }

    /// A greedy request.
    pub fn request(prompt: &[u32], max_tokens: u32) -> GenerateRequest {
        GenerateRequest {
            prompt: prompt.to_vec(),
            max_tokens,
            ignore_eos: true,
            sampling: Some(Sampling::default()),
            ..GenerateRequest::default()
        }
    }

    /// Greedy continuation.
    pub fn generate(&self, prompt: &[u32], max_tokens: u32) -> Answer {
        self.send(Self::request(prompt, max_tokens)).unwrap()
    }

    /// Sends any request and collects the answer.
    pub fn send(&self, request: GenerateRequest) -> Result<Answer, tonic::Status> {
        let mut client = self.client.clone();
        self.runtime.block_on(async move {
            let mut stream = client.generate(request).await?.into_inner();
            let mut answer = Answer::default();
            let mut finished = false;
            while let Some(event) = stream.message().await? {
                match event.body {
                    Some(Body::Started(started)) => {
                        (answer.device, answer.host) = (started.device_tokens, started.host_tokens);
                        answer.disk = started.disk_tokens;
                    }
                    Some(Body::Tokens(tokens)) => {
                        answer.tokens.extend(tokens.ids);
                        answer.logprobs.extend(tokens.logprobs);
                    }
                    Some(Body::Finished(_)) => finished = true,
                    None => {}
                }
            }
            if finished { Ok(answer) } else { Err(tonic::Status::internal("the answer broke off")) }
        })
    }
}
