//! Which worker answers: the ready ones of the model in turn. One that cannot be reached, is draining or full is
//! passed over as long as it has sent no token; each connection is tried once per request.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::{GenerateRequest, Started};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status};

use crate::fleet::{Connection, Entry, Fleet};
use crate::generation::Opened;
use crate::openai::{ApiError, CachedTokens};

/// Workers tried for one request, at most.
const ATTEMPTS_MAX: usize = 8;

/// Sends requests to workers.
pub struct Router {
    fleet: Arc<Fleet>,
    wait: Duration,
}

/// Why a worker did not answer.
enum Failure {
    Unreachable(String),
    Busy,
    Refused(ApiError),
}

impl Router {
    /// A request waits at most `wait` for a worker.
    pub fn new(fleet: Arc<Fleet>, wait: Duration) -> Self {
        Self { fleet, wait }
    }

    /// Until when a request that arrives now may wait.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.wait
    }

    /// The workers of a model, as soon as there is one.
    pub async fn resolve(&self, model: &str, deadline: Instant) -> Result<Arc<Entry>, ApiError> {
        if let Some(entry) = self.fleet.entry(model) {
            return Ok(entry);
        }
        let mut views = self.fleet.subscribe();
        loop {
            {
                let view = views.borrow_and_update();
                if let Some(entry) = view.entry(model) {
                    return Ok(entry.clone());
                }
                if !view.may_come(model) {
                    return Err(ApiError::model_not_found(model));
                }
            }
            if !matches!(timeout_at(deadline, views.changed()).await, Ok(Ok(()))) {
                return Err(ApiError::no_worker(model, &format!("none became ready within {:?}", self.wait)));
            }
        }
    }

    /// Opens a stream that has come to its first token.
    pub async fn open(
        &self,
        model: &str,
        entry: &Arc<Entry>,
        request: &GenerateRequest,
        deadline: Instant,
    ) -> Result<Opened, ApiError> {
        let mut tried = Vec::new();
        let mut busy = false;
        let mut reason = "its workers have been lost".to_owned();
        while tried.len() < ATTEMPTS_MAX {
            let worker = match entry.pick(&tried) {
                Some(worker) => worker,
                None if busy => return Err(ApiError::overloaded(model)),
                None => match self.next_worker(model, entry, &tried, deadline).await {
                    Some(worker) => worker,
                    None => break,
                },
            };
            tried.push(worker.id());
            match first_token(&worker, request.clone()).await {
                Ok(opened) => return Ok(opened),
                Err(Failure::Unreachable(message)) => reason = message,
                Err(Failure::Busy) => busy = true,
                Err(Failure::Refused(error)) => return Err(error),
            }
        }
        Err(if busy { ApiError::overloaded(model) } else { ApiError::no_worker(model, &reason) })
    }

    /// A worker that has come up, with the tokenizer that the prompt was encoded with.
    async fn next_worker(
        &self,
        model: &str,
        entry: &Arc<Entry>,
        tried: &[u64],
        deadline: Instant,
    ) -> Option<Arc<Connection>> {
        let mut views = self.fleet.subscribe();
        loop {
            let fresh = views.borrow_and_update().entry(model).cloned();
            let same_tokenizer = fresh.filter(|fresh| Arc::ptr_eq(&fresh.model, &entry.model));
            if let Some(worker) = same_tokenizer.and_then(|fresh| fresh.pick(tried)) {
                return Some(worker);
            }
            timeout_at(deadline, views.changed()).await.ok()?.ok()?;
        }
    }
}

async fn first_token(worker: &Connection, request: GenerateRequest) -> Result<Opened, Failure> {
    let mut events = worker.worker().generate(request).await.map_err(failure)?.into_inner();
    let mut cached = CachedTokens::default();
    loop {
        match events.message().await.map_err(failure)?.and_then(|event| event.body) {
            Some(Body::Started(Started { device_tokens, host_tokens, disk_tokens })) => {
                cached = CachedTokens { device: device_tokens, host: host_tokens, disk: disk_tokens };
            }
            Some(first @ (Body::Tokens(_) | Body::Finished(_))) => {
                return Ok(Opened { events, cached, first });
            }
            None => return Err(Failure::Unreachable("the worker's stream ended early".to_owned())),
        }
    }
}

fn failure(status: Status) -> Failure {
    // What the transport reports has a source; what the worker answers has not.
    if status.source().is_some() {
        return Failure::Unreachable(format!("the connection to the worker was lost ({})", status.message()));
    }
    match status.code() {
        Code::Unavailable | Code::Cancelled => Failure::Unreachable(status.message().to_owned()),
        Code::ResourceExhausted => Failure::Busy,
        Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition => {
            Failure::Refused(ApiError::request(status.message()))
        }
        code => Failure::Refused(ApiError::internal(format!(
            "The worker failed: {} ({code:?}).",
            status.message()
        ))),
    }
}
