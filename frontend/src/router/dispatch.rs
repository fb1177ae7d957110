//! One request on its way: to the worker that was chosen, to the next one if that has answered nothing yet, and to
//! another with what has been generated so far if it is lost later. Each connection is tried once each time.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::v1::generate_event::Body;
use kvbm_proto::v1::{GenerateEvent, GenerateRequest, Started};
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status, Streaming};

use super::disagg::HandOver;
use super::recomputed::Recomputed;
use super::{Ask, Burden, Choice, Route, Router, RouterMode, Wish};
use crate::fleet::{Candidate, Entry, Role};
use crate::openai::{ApiError, CachedTokens};

/// Workers tried for one request, at most.
const ATTEMPTS_MAX: usize = 8;

/// A request, for as long as it may have to be sent again.
pub struct Dispatch {
    pub router: Arc<Router>,
    pub model: String,
    /// Workers with the tokenizer that the prompt was encoded with.
    pub entry: Arc<Entry>,
    pub request: GenerateRequest,
    pub wish: Wish,
}

/// A worker's stream that has come to its first token, or to its end.
pub struct Opened {
    pub events: Streaming<GenerateEvent>,
    pub cached: CachedTokens,
    /// How long the worker took to copy what of that was not in its pool.
    pub onboard: Duration,
    /// `Tokens` or `Finished`.
    pub first: Body,
    pub route: Route,
    /// The connection that it comes over.
    pub connection: u64,
    pub burden: Burden,
    /// It is the first token only: a decode worker is to go on.
    pub hand_over: Option<HandOver>,
}

/// Why a worker did not answer.
enum Failure {
    Unreachable(String),
    Busy,
    Refused(ApiError),
}

/// Workers by what they take on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    Any,
    /// Prefill only.
    Prefill,
    /// Decode, alone or with prefill.
    Decode,
}

impl Wanted {
    pub(super) fn fits(self, role: Role) -> bool {
        match self {
            Self::Any => true,
            Self::Prefill => role == Role::Prefill,
            Self::Decode => role != Role::Prefill,
        }
    }
}

/// Which workers may be asked.
#[derive(Debug, Clone)]
pub(super) struct Among {
    pub role: Wanted,
    /// Only those of these nodes.
    pub nodes: Option<Vec<u32>>,
    /// Only the one behind this connection.
    pub only: Option<u64>,
}

impl Among {
    pub(super) const ALL: Self = Self::of(Wanted::Any);

    pub(super) const fn of(role: Wanted) -> Self {
        Self { role, nodes: None, only: None }
    }

    pub(super) fn contains(&self, worker: &Candidate) -> bool {
        self.role.fits(worker.role)
            && self.nodes.as_ref().is_none_or(|nodes| nodes.contains(&worker.place.node.id()))
            && self.only.is_none_or(|only| worker.connection.id() == only)
    }
}

impl Dispatch {
    /// Opens a stream that has come to its first token.
    pub async fn open(&self, deadline: Instant) -> Result<Opened, ApiError> {
        if self.router.config.mode == RouterMode::Direct && self.wish.worker.is_none() {
            let message = "The router is in mode direct: name the worker in the header 'x-kvbm-worker'.";
            return Err(ApiError::request(message));
        }
        match &self.router.config.disagg {
            Some(config) => self.open_apart(config, deadline).await,
            None => self.send(&self.request, Among::ALL, &mut Vec::new(), deadline).await,
        }
    }

    /// Goes on with an answer whose worker was lost: not over `lost`, and behind the tokens `generated`, the last of which
    /// came at `last`.
    pub async fn resume(
        self: Arc<Self>,
        generated: Vec<u32>,
        lost: u64,
        last: Instant,
    ) -> Result<Opened, ApiError> {
        let started = std::time::Instant::now();
        let request = GenerateRequest { generated, ..self.request.clone() };
        let tokens = request.prompt.len() + request.generated.len();
        let sent = self.send(&request, Among::ALL, &mut vec![lost], self.router.deadline()).await;
        let metrics = &self.router.metrics;
        let outcome = if sent.is_ok() { "success" } else { "failure" };
        metrics.migrations.with_label_values(&[self.model.as_str(), "ongoing_request", outcome]).inc();
        if let Ok(opened) = &sent {
            metrics.migration_seconds.observe(started.elapsed().as_secs_f64());
            // Else the answer was complete but for the word of its end.
            if matches!(opened.first, Body::Tokens(_)) {
                metrics.gap(last.elapsed(), opened.onboard);
                metrics.recomputed(Recomputed::of(tokens, opened.cached.total() as usize, &opened.route));
            }
        }
        sent
    }

    pub(super) async fn send(
        &self,
        request: &GenerateRequest,
        among: Among,
        tried: &mut Vec<u64>,
        deadline: Instant,
    ) -> Result<Opened, ApiError> {
        let before = tried.len();
        let mut busy = false;
        let mut reason = "its workers have been lost".to_owned();
        while tried.len() - before < ATTEMPTS_MAX {
            let ask = Ask { request, wish: &self.wish, tried, among: &among };
            let choice = match self.router.choose(&self.entry, &ask) {
                Some(choice) => choice,
                None if busy => return Err(ApiError::overloaded(&self.model)),
                None => match self.next_choice(&ask, deadline).await {
                    Some(choice) => choice,
                    None => break,
                },
            };
            if tried.len() > before {
                let labels = [self.model.as_str(), "new_request", "retry"];
                self.router.metrics.migrations.with_label_values(&labels).inc();
            }
            tried.push(choice.worker.connection.id());
            match self.router.begin(choice, request.clone()).await {
                Ok(opened) => return Ok(opened),
                Err(Failure::Unreachable(message)) => reason = message,
                Err(Failure::Busy) => busy = true,
                Err(Failure::Refused(error)) => return Err(error),
            }
        }
        Err(if busy { ApiError::overloaded(&self.model) } else { ApiError::no_worker(&self.model, &reason) })
    }

    /// Of workers that have come up, with the tokenizer that the prompt was encoded with.
    async fn next_choice(&self, ask: &Ask<'_>, deadline: Instant) -> Option<Choice> {
        let mut views = self.router.fleet.subscribe();
        loop {
            let fresh = views.borrow_and_update().entry(&self.model).cloned();
            let same_tokenizer = fresh.filter(|fresh| Arc::ptr_eq(&fresh.model, &self.entry.model));
            if let Some(choice) = same_tokenizer.and_then(|fresh| self.router.choose(&fresh, ask)) {
                return Some(choice);
            }
            timeout_at(deadline, views.changed()).await.ok()?.ok()?;
        }
    }
}

impl Router {
    /// Sends a request to the worker that was chosen for it.
    async fn begin(&self, choice: Choice, request: GenerateRequest) -> Result<Opened, Failure> {
        let Choice { worker, route, keys } = choice;
        let tokens = request.prompt.len() + request.generated.len();
        let burden = self.chooser.place(&worker.load, tokens.saturating_sub(route.overlap.total()));
        if let Some(keys) = keys {
            if route.overlap.disk > 0 {
                let taken = worker.place.node.prefetch(&keys).await;
                let outcome = if taken { "taken" } else { "not_taken" };
                self.metrics.prefetches.with_label_values(&[outcome]).inc();
            }
            self.homes.note(&keys.prints, worker.connection.id());
            self.knowledge.note(&worker.place, keys.prints);
        }
        let opened = first_token(&worker, request, route, burden).await?;
        if opened.route.mode == RouterMode::Kv {
            self.metrics.compare(tokens, opened.route.overlap, opened.cached.total());
        }
        Ok(opened)
    }
}

async fn first_token(
    worker: &Candidate,
    request: GenerateRequest,
    route: Route,
    mut burden: Burden,
) -> Result<Opened, Failure> {
    let mut events = worker.connection.worker().generate(request).await.map_err(failure)?.into_inner();
    let (mut cached, mut onboard) = Default::default();
    loop {
        match events.message().await.map_err(failure)?.and_then(|event| event.body) {
            Some(Body::Started(Started { device_tokens, host_tokens, disk_tokens, onboard_us })) => {
                cached = CachedTokens { device: device_tokens, host: host_tokens, disk: disk_tokens };
                onboard = Duration::from_micros(onboard_us);
            }
            Some(first @ (Body::Tokens(_) | Body::Finished(_))) => {
                burden.prefilled();
                let connection = worker.connection.id();
                return Ok(Opened {
                    events,
                    cached,
                    onboard,
                    first,
                    route,
                    connection,
                    burden,
                    hand_over: None,
                });
            }
            None => return Err(Failure::Unreachable("the worker's stream ended early".to_owned())),
        }
    }
}

/// Whether a worker that ends a stream like this is lost, so that another could go on.
pub fn is_lost(status: &Status) -> bool {
    // What the transport reports has a source; what the worker answers has not.
    status.source().is_some() || matches!(status.code(), Code::Unavailable | Code::Cancelled)
}

fn failure(status: Status) -> Failure {
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
